"""Predictions equal a plain loop over samples and the closed forms of linear models."""

import copy
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.swa_utils import update_bn

import blr
from blr import metrics
from blr.optim import NamedGaussian
from blr.predict import predict, prediction_variance, sample_outputs

S, N, K = 7, 5, 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def built(make, dtype=torch.float64):
    """A module with reproducible parameters, and torch's own stream left where it was."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make().to(dtype)


def mlp(dtype=torch.float64):
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, K)]
    return built(lambda: nn.Sequential(*layers), dtype)


def cnn(dtype=torch.float64):
    """A small convolutional network whose BatchNorm has seen data."""
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, K)]
    model = built(lambda: nn.Sequential(*layers), dtype)
    model(normal(9, 2, 5, 5, seed=2, dtype=dtype))
    return model


def posterior(model, spread=0.3):
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}
    precision = {
        name: (1 + normal(*p.shape, seed=3, dtype=p.dtype).abs()) / spread**2
        for name, p in mean.items()
    }
    return NamedGaussian.from_named(mean, precision)


def loop(model, q, x, samples=S, seed=0, prepare=lambda copied: None):
    """Outputs at each sample, by a copy of the model for each."""
    g, f = seeded(seed), []
    for _ in range(samples):
        copied = copy.deepcopy(model)
        theta = q.sample(1, g)[0]
        vector_to_parameters(theta.to(next(model.parameters()).dtype), copied.parameters())
        prepare(copied)
        with torch.no_grad():
            f.append(copied.eval()(x))
    return torch.stack(f)


# ---- equal to a plain loop ----------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("chunk", [1, 2, 7, 100])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_it_is_the_average_of_a_loop_over_samples(make, chunk, dtype, rtol):
    model = make(dtype)
    x = normal(N, *((4,) if make is mlp else (2, 5, 5)), dtype=dtype)
    q = posterior(model)
    f = loop(model, q, x)
    close = {"rtol": rtol, "atol": rtol}
    options = {"chunk": chunk, "samples": S}
    p = predict(model, q, x, generator=seeded(), **options)
    torch.testing.assert_close(p, f.softmax(-1).mean(0), **close)
    log_p = predict(model, q, x, logits=True, generator=seeded(), **options)
    torch.testing.assert_close(log_p, f.softmax(-1).mean(0).log(), **close)
    each = sample_outputs(model, q, x, generator=seeded(), **options)
    torch.testing.assert_close(each, f, **close)
    sigmoids = predict(model, q, x, activation=torch.sigmoid, generator=seeded(), **options)
    torch.testing.assert_close(sigmoids, f.sigmoid().mean(0), **close)


def test_probabilities_are_averaged_and_not_outputs():
    model, x = mlp(), normal(N, 4)
    f = sample_outputs(model, posterior(model, 2.0), x, 64, generator=seeded())
    p = predict(model, posterior(model, 2.0), x, 64, generator=seeded())
    assert (p - f.mean(0).softmax(-1)).abs().max() > 0.05


def test_logits_keep_tails_that_probabilities_lose():
    model = built(lambda: nn.Linear(1, 2, bias=False), torch.float32)
    q = NamedGaussian.from_named(
        {"weight": torch.tensor([[300.0], [0.0]])}, {"weight": torch.tensor([[1e4], [1e4]])}
    )
    x = torch.ones(1, 1)
    assert predict(model, q, x, generator=seeded())[0, 1] == 0
    f = sample_outputs(model, q, x, generator=seeded()).double()
    expected = f.log_softmax(-1).logsumexp(0) - math.log(32)
    log_p = predict(model, q, x, logits=True, generator=seeded())
    torch.testing.assert_close(log_p.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_activation_sees_the_outputs_of_one_sample():
    # Class axis in the middle, as for images of labels: an added axis would change its number.
    model = built(lambda: nn.Conv2d(2, K, 3))
    x, q = normal(N, 2, 5, 5), posterior(model)
    f = loop(model, q, x)
    p = predict(model, q, x, S, activation=nn.Softmax(1), generator=seeded())
    torch.testing.assert_close(p, f.softmax(2).mean(0), rtol=1e-12, atol=0)


# ---- equal to closed forms ----------------------------------------------------------------------


class Linear(nn.Module):
    """f = Xθ, outputs of shape (N,)."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        return x @ self.theta


A = normal(4, 4, seed=5)
FULL = blr.Gaussian.from_moments(normal(4, seed=6), covariance=A @ A.mT / 4 + 0.1 * torch.eye(4))
DIAGONAL = blr.DiagonalGaussian.from_moments(FULL.mean, variance=[0.3, 0.7, 0.2, 1.1])


def covariance(q):
    return torch.diag(q.variance) if isinstance(q, blr.DiagonalGaussian) else q.covariance


@pytest.mark.parametrize("q", [FULL, DIAGONAL], ids=["full", "diagonal"])
@pytest.mark.parametrize("name", ["identity", "exponential", "probit"])
def test_linear_models_have_their_analytic_predictive(q, name):
    x = normal(N, 4, seed=7)
    m, v = x @ q.mean, (x @ covariance(q) * x).sum(-1)
    activation, expected = {
        "identity": (nn.Identity(), m),
        "exponential": (torch.exp, (m + v / 2).exp()),
        "probit": (torch.special.ndtr, torch.special.ndtr(m / (1 + v).sqrt())),
    }[name]
    each = sample_outputs(Linear(), q, x, 4000, activation=activation, generator=seeded())
    error = each.std(0) / math.sqrt(4000)
    p = predict(Linear(), q, x, 4000, activation=activation, generator=seeded(), chunk=500)
    torch.testing.assert_close(p, each.mean(0), rtol=1e-12, atol=1e-12)
    assert ((p - expected).abs() < 4.5 * error).all()
    assert (error < 0.1 * each.std(0)).all()


@pytest.mark.parametrize("q", [FULL, DIAGONAL], ids=["full", "diagonal"])
@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_the_variance_of_a_linear_model_is_exact(q, chunk):
    x = normal(N, 4, seed=7)
    v = prediction_variance(Linear(), q, x, chunk=chunk)
    torch.testing.assert_close(v, (x @ covariance(q) * x).sum(-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("full", [False, True])
def test_the_linearised_covariance_is_that_of_the_jacobian(full):
    model, x = mlp(), normal(N, 4, seed=8)
    q = posterior(model)
    if full:
        P = len(q.mean)
        B = normal(P, P, seed=9)
        q = blr.Gaussian.from_moments(q.mean, B @ B.mT + P * torch.eye(P))
    model.eval()
    V = torch.linalg.inv(q.precision) if full else torch.diag(q.variance)
    for x_i, found in zip(x, prediction_variance(model, q, x), strict=True):
        rows = []
        for k in range(K):
            grads = torch.autograd.grad(model(x_i.unsqueeze(0))[0, k], list(model.parameters()))
            rows.append(parameters_to_vector(grads))
        J = torch.stack(rows)
        torch.testing.assert_close(found, J @ V @ J.mT, rtol=1e-10, atol=1e-13)


def test_the_linearised_variance_is_the_limit_of_narrow_posteriors():
    model, x = mlp(), normal(N, 4, seed=8)
    q = posterior(model, 1e-4)
    f = sample_outputs(model, q, x, 2000, generator=seeded(), chunk=500)
    v = prediction_variance(model, q, x).diagonal(dim1=-2, dim2=-1)
    # The relative standard error of a variance from S normal samples is √(2/S).
    assert ((f.var(0) / v - 1).abs() < 4.5 * math.sqrt(2 / 2000)).all()


# ---- what is left as it was ---------------------------------------------------------------------


def modes(model):
    return [module.training for module in model.modules()]


def test_parameters_buffers_modes_and_random_streams_are_left_alone():
    model, x = cnn(), normal(N, 2, 5, 5)
    model.train()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[4].bias.requires_grad_(False)
    before, mode, stream = copy.deepcopy(model.state_dict()), modes(model), torch.get_rng_state()
    places = [p.data_ptr() for p in model.parameters()]
    q = posterior(model)
    for options in ({}, {"statistics": [normal(6, 2, 5, 5)]}, {"chunk": 1}):
        p = predict(model, q, x, generator=seeded(), **options)
        assert not p.requires_grad
    assert not prediction_variance(model, q, x).requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert modes(model) == mode
    assert [p.data_ptr() for p in model.parameters()] == places
    assert [p.requires_grad for p in model.parameters()][-2:] == [True, False]
    assert (model[0].weight.grad == 1).all() and model[1].weight.grad is None
    assert model[1].momentum == 0.1
    assert torch.equal(torch.get_rng_state(), stream)


def test_neither_inputs_nor_parameters_outside_of_q_get_a_graph():
    model, x = mlp(), normal(N, 4).requires_grad_()
    head = dict(list(model.named_parameters())[2:])
    q = NamedGaussian.from_named(head, {name: torch.ones_like(p) for name, p in head.items()})
    for chunk in (1, 2):
        assert not predict(model, q, x, chunk=chunk).requires_grad
        assert not prediction_variance(model, q, x, chunk=chunk).requires_grad


def test_dropout_is_off_although_the_model_trains():
    model, x = mlp().train(), normal(N, 4)
    q = posterior(model)
    assert torch.equal(*(predict(model, q, x, generator=seeded()) for _ in range(2)))
    still = predict(model.eval(), q, x, generator=seeded())
    assert torch.equal(still, predict(model.train(), q, x, generator=seeded()))


@pytest.mark.parametrize("statistics", [None, [torch.zeros(3, 2, 5, 5).double()]])
def test_modes_are_restored_when_the_model_fails(statistics):
    class Failing(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError

    model = nn.Sequential(*cnn().train(), Failing())
    model[4].eval()
    mode = modes(model)
    with pytest.raises(ZeroDivisionError):
        predict(model, posterior(model), normal(N, 2, 5, 5), statistics=statistics)
    assert modes(model) == mode and model[1].momentum == 0.1
    assert torch.equal(model[1].num_batches_tracked, torch.tensor(1))


def test_eval_methods_with_side_effects_are_not_called():
    class Merging(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("weights would be merged here")

    model = built(lambda: Merging(4, K))
    predict(model, posterior(model), normal(N, 4))


# ---- samples ------------------------------------------------------------------------------------


def test_the_seed_decides_and_neither_chunk_nor_batch_matters():
    model, x = mlp(), normal(N, 4)
    q = posterior(model)
    p = predict(model, q, x, 9, generator=seeded(3))
    for chunk in (1, 4, 9):
        again = predict(model, q, x, 9, generator=seeded(3), chunk=chunk)
        torch.testing.assert_close(again, p, rtol=1e-12, atol=0)
    parts = [predict(model, q, part, 9, generator=seeded(3)) for part in x.split(2)]
    torch.testing.assert_close(torch.cat(parts), p, rtol=1e-12, atol=0)
    assert not torch.allclose(predict(model, q, x, 9, generator=seeded(4)), p)


def test_without_a_generator_samples_come_from_the_stream_of_torch():
    model, x = mlp(), normal(N, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = (predict(model, posterior(model), x) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("chunk", [1, 3])
def test_no_more_samples_are_alive_than_a_chunk(chunk):
    class Counted(blr.DiagonalGaussian):
        alive = most = drawn = 0

        def sample(self, n, generator=None):
            theta = super().sample(n, generator)
            Counted.alive, Counted.drawn = Counted.alive + n, Counted.drawn + n
            Counted.most = max(Counted.most, Counted.alive)
            storage = theta.untyped_storage()
            weakref.finalize(storage, self.gone, n)
            vars(self).setdefault("kept", []).append(weakref.ref(storage))
            return theta

        def gone(self, n):
            Counted.alive -= n

    model, during = mlp(), []
    model.register_forward_hook(lambda *_: during.append(Counted.alive))
    q = Counted(natural=posterior(model).natural)
    predict(model, q, normal(N, 4), 12, chunk=chunk)
    assert Counted.drawn == 12 and Counted.most <= chunk
    # Stacked samples are copies, and one copy is enough.
    assert max(during) == (1 if chunk == 1 else 0)


@pytest.mark.parametrize(("chunk", "calls"), [(1, 20), (6, 4), (20, 1), (50, 1)])
def test_a_chunk_goes_through_the_model_together(chunk, calls):
    model = mlp()
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    predict(model, posterior(model), normal(N, 4), 20, chunk=chunk)
    assert len(seen) == calls
    seen.clear()
    prediction_variance(model, posterior(model), normal(N, 4), chunk=2)
    assert len(seen) == math.ceil(N / 2)


# ---- what q may be ------------------------------------------------------------------------------


def test_any_family_over_vectors_of_parameters_will_do():
    model, x = mlp(), normal(N, 4)
    q = posterior(model)
    flat = blr.DiagonalGaussian(natural=q.natural)
    expected = predict(model, q, x, generator=seeded())
    assert torch.equal(predict(model, flat, x, generator=seeded()), expected)
    fixed = blr.FixedGaussian.from_moments(q.mean, torch.diag(q.precision))
    torch.testing.assert_close(predict(model, fixed, x, generator=seeded()), expected)


def test_names_decide_and_not_the_order():
    model, x = mlp(), normal(N, 4)
    q = posterior(model, 1e-12)
    backwards = {n: dict(model.named_parameters())[n] for n in reversed(list(q.shapes))}
    ones = {name: torch.full_like(p, 1e24) for name, p in backwards.items()}
    turned = NamedGaussian.from_named(backwards, ones)
    torch.testing.assert_close(predict(model, turned, x), model.eval()(x).softmax(-1).detach())


def test_parameters_without_names_go_by_their_number():
    model, x = mlp(), normal(N, 4)
    q = posterior(model)
    numbered = NamedGaussian(q.natural, {str(i): s for i, s in enumerate(q.shapes.values())})
    expected = predict(model, q, x, generator=seeded())
    assert torch.equal(predict(model, numbered, x, generator=seeded()), expected)


def test_the_posterior_of_an_optimizer_predicts():
    model, x = mlp(), normal(N, 4)
    for parameters in (model.parameters(), model.named_parameters()):
        q = blr.IVON(parameters, lr=0.1, ess=50.0).posterior()
        p = predict(model, q, x, S, generator=seeded())
        torch.testing.assert_close(p, loop(model, q, x).softmax(-1).mean(0), rtol=1e-12, atol=0)


def test_frozen_parameters_stay_at_their_values():
    model, x = mlp(), normal(N, 4)
    model[0].requires_grad_(False)
    last = {n: p for n, p in model.named_parameters() if p.requires_grad}
    q = NamedGaussian.from_named(last, {n: torch.ones_like(p) for n, p in last.items()})
    hidden = model.eval()[:3](x).detach()
    expected = predict(model[3], blr.DiagonalGaussian(natural=q.natural), hidden, S)
    head = NamedGaussian(q.natural, {"weight": last["3.weight"].shape, "bias": (K,)})
    expected = predict(model[3], head, hidden, S, generator=seeded())
    torch.testing.assert_close(
        predict(model, q, x, S, generator=seeded()), expected, rtol=1e-12, atol=0
    )


def test_a_compiled_or_wrapped_model_is_its_own_content():
    model, x = mlp(), normal(N, 4)
    expected = predict(model, posterior(model), x, generator=seeded())
    compiled = torch.compile(model, backend="eager")
    assert "_orig_mod." in next(iter(posterior(compiled).shapes))
    for trained, used in [(compiled, compiled), (model, compiled), (compiled, model)]:
        assert torch.equal(predict(used, posterior(trained), x, generator=seeded()), expected)
    wrapped = nn.DataParallel(model)
    assert torch.equal(predict(wrapped, posterior(wrapped), x, generator=seeded()), expected)


# ---- what a model may be ------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, K, bias=False)
        self.again = nn.Linear(4, K, bias=False)
        self.again.weight = self.encode.weight

    def forward(self, x, z):
        return self.encode(x) * self.again(z)


def test_tied_parameters_share_their_samples_and_inputs_may_be_several():
    model, (x, z) = built(Tied), (normal(N, 4), normal(N, 4, seed=1))
    q = posterior(model)
    assert list(q.shapes) == ["encode.weight"]
    theta = q.named(torch.cat([q.sample(1, g) for g in [seeded()] for _ in range(S)]))
    W = theta["encode.weight"]
    expected = torch.einsum("nd,skd->snk", x, W) * torch.einsum("nd,skd->snk", z, W)
    for inputs in ((x, z), {"x": x, "z": z}):
        f = sample_outputs(model, q, inputs, S, generator=seeded())
        torch.testing.assert_close(f, expected, rtol=1e-12, atol=1e-12)


def test_parametrised_models_are_sampled_in_their_parametrisation():
    class Exponential(nn.Module):
        def forward(self, x):
            return x.exp()

    model = built(lambda: nn.Sequential(nn.Linear(4, K)))
    register_parametrization(model[0], "weight", Exponential())
    x, q = normal(N, 4), posterior(model)
    assert "0.parametrizations.weight.original" in q.shapes
    torch.testing.assert_close(
        sample_outputs(model, q, x, S, generator=seeded()), loop(model, q, x), rtol=1e-12, atol=0
    )


def test_a_model_that_vmap_cannot_follow_says_what_helps_and_then_works():
    class Branching(nn.Linear):
        def forward(self, x):
            f = super().forward(x)
            return f if f.sum().item() > 0 else -f

    model, x = built(lambda: Branching(4, K)), normal(N, 4)
    q = posterior(model)
    with pytest.raises(RuntimeError) as caught:
        predict(model, q, x)
    assert "chunk=1" in caught.value.__notes__[0]
    f = sample_outputs(model, q, x, S, generator=seeded(), chunk=1)
    torch.testing.assert_close(f, loop(model, q, x))


def test_models_with_randomness_of_their_own_are_allowed():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, training=True))

    model, x = built(lambda: Noisy(4, K)), normal(N, 4)
    f = sample_outputs(model, posterior(model, 1e-12), x, 8)
    assert f.std(0).max() > 0.01


@pytest.mark.parametrize("chunk", [1, 4])
def test_low_precision_is_averaged_in_float32(chunk):
    model = mlp(torch.bfloat16)
    q = posterior(mlp(torch.float32))
    x = normal(N, 4, dtype=torch.bfloat16)
    p = predict(model, q, x, 8, generator=seeded(), chunk=chunk)
    assert p.dtype == torch.float32
    expected = loop(model, q, x, 8).float().softmax(-1).mean(0)
    torch.testing.assert_close(p, expected, rtol=0.02, atol=0.005)
    assert metrics.nll(p, torch.arange(N) % K) > 0


def test_a_posterior_in_float64_predicts_with_a_model_in_float32():
    model = mlp(torch.float32)
    q = posterior(mlp(torch.float64))
    x = normal(N, 4, dtype=torch.float32)
    p = predict(model, q, x, S, generator=seeded())
    assert p.dtype == torch.float32
    torch.testing.assert_close(p, loop(model, q, x).softmax(-1).mean(0), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 4])
def test_samples_follow_the_model_to_its_device(chunk):
    model = mlp()
    q = posterior(model)
    p = predict(
        model.to("meta"), q, torch.empty(N, 4, dtype=torch.float64, device="meta"), chunk=chunk
    )
    assert p.device.type == "meta" and p.shape == (N, K)


@pytest.mark.parametrize("chunk", [1, 4])
def test_samples_differ_inside_of_autocast(chunk):
    # Autocast remembers low-precision copies of weights; samples must not share one.
    model = mlp(torch.float32)
    x = normal(N, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        f = sample_outputs(model, posterior(model), x, 4, chunk=chunk, generator=seeded())
    torch.testing.assert_close(f, loop(model, posterior(model), x, 4), rtol=0.1, atol=0.03)
    assert (f[0] - f[1]).abs().max() > 0.1


# ---- BatchNorm ----------------------------------------------------------------------------------

BATCHES = [normal(6, 2, 5, 5, seed=11), 2 + normal(6, 2, 5, 5, seed=12)]


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_statistics_are_those_of_update_bn_at_every_sample(chunk):
    model, x = cnn().train(), normal(N, 2, 5, 5)
    q = posterior(model)
    f = loop(model, q, x, prepare=lambda copied: update_bn(BATCHES, copied))
    found = sample_outputs(model, q, x, S, statistics=BATCHES, generator=seeded(), chunk=chunk)
    torch.testing.assert_close(found, f, rtol=1e-10, atol=1e-12)
    stored = sample_outputs(model, q, x, S, generator=seeded(), chunk=chunk)
    assert (stored - found).abs().max() > 0.1


def test_one_batch_of_statistics_may_be_a_tensor():
    model, x = cnn(), normal(N, 2, 5, 5)
    q = posterior(model)
    one, listed = (
        predict(model, q, x, statistics=s, generator=seeded()) for s in (BATCHES[0], [BATCHES[0]])
    )
    assert torch.equal(one, listed)


def test_dropout_is_off_while_statistics_are_estimated():
    layers = [nn.Dropout(0.9), nn.BatchNorm1d(4), nn.Linear(4, K)]
    model, x = built(lambda: nn.Sequential(*layers)), normal(N, 4)
    stream = torch.get_rng_state()
    predict(model, posterior(model), x, statistics=[normal(9, 4)], generator=seeded())
    assert torch.equal(torch.get_rng_state(), stream)


def test_a_batchnorm_alone_or_without_statistics_or_none_at_all():
    x = normal(N, K)
    for make in (
        lambda: nn.BatchNorm1d(K),
        lambda: nn.BatchNorm1d(K, track_running_stats=False),
        lambda: nn.Linear(K, K),
    ):
        model = built(make)
        f = loop(model, posterior(model), x, prepare=lambda copied: update_bn([3 * x], copied))
        found = sample_outputs(
            model, posterior(model), x, S, statistics=[3 * x], generator=seeded()
        )
        torch.testing.assert_close(found, f, rtol=1e-10, atol=1e-12)


def test_units_vary_more_at_samples_than_at_the_mean():
    # E Var(wᵀx) = mᵀΣm + tr(ΣV), which is why stored statistics suit samples.
    model = built(lambda: nn.Sequential(nn.Linear(4, 1, bias=False), nn.BatchNorm1d(1)))
    x, q = normal(40, 4, seed=13), posterior(model, 1.0)
    f = sample_outputs(model[0], NamedGaussian(
        (q.natural[0][:4], q.natural[1][:4]), {"weight": (1, 4)}
    ), x, 4000, generator=seeded(), chunk=500).squeeze(-1)  # fmt: skip
    Sigma, m = torch.cov(x.mT), q.mean[:4]
    expected = m @ Sigma @ m + (Sigma.diagonal() * q.variance[:4]).sum()
    variances = f.var(-1)
    error = variances.std() / math.sqrt(4000)
    assert abs(variances.mean() - expected) < 4.5 * error
    assert expected > 2 * (m @ Sigma @ m)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"logits": True, "activation": torch.sigmoid}, ValueError, "leave out activation"),
        ({"statistics": []}, ValueError, "statistics must have at least one batch"),
        ({"statistics": iter([torch.ones(2, 4)])}, TypeError, "iterator .*pass a list"),
        ({"statistics": {"x": torch.ones(2, 4)}}, TypeError, "mapping; pass it in a list"),
        ({"statistics": [[torch.ones(2, 4)]]}, TypeError, "inputs must be a tensor.*got list"),
        ({"x": [1.0, 2.0]}, TypeError, "inputs must be a tensor.*got list"),
    ],
)
def test_what_is_wrong_is_said_at_the_door(options, error, message):
    model = mlp()
    with pytest.raises(error, match=message):
        predict(model, posterior(model), **{"x": normal(N, 4), **options})


def test_outputs_that_are_no_classes_are_refused_by_softmax():
    for model in (Linear(), built(lambda: nn.Linear(4, 1))):
        for logits in (False, True):
            with pytest.raises(ValueError, match=r"two classes or more.*torch\.sigmoid"):
                predict(model, posterior(model), normal(N, 4), logits=logits)


def test_a_model_that_returns_no_tensor_is_refused():
    class Output(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x)}

    model = built(lambda: Output(4, K))
    with pytest.raises(TypeError, match="must return a tensor, got dict; wrap it"):
        predict(model, posterior(model), normal(N, 4))


def test_a_posterior_of_another_model_is_refused():
    model, x = mlp(), normal(N, 4)
    other = built(lambda: nn.Linear(4, K))
    with pytest.raises(ValueError, match=r"q has a parameter 'weight'.*named_parameters"):
        predict(model, posterior(other), x)
    wide = built(lambda: nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Dropout(), nn.Linear(9, K)))
    with pytest.raises(ValueError, match=r"got \(9, 4\) for '0.weight' of shape \(6, 4\)"):
        predict(model, posterior(wide), x)
    with pytest.raises(ValueError, match="each of the model's 51 parameters, got 75"):
        predict(model, blr.DiagonalGaussian(natural=posterior(wide).natural), x)
    batch = blr.DiagonalGaussian.from_moments(torch.zeros(2, 51), torch.ones(2, 51))
    with pytest.raises(TypeError, match="one distribution over vectors"):
        predict(model, batch, x)
    tuples = blr.NormalGamma.from_parameters([0.0], [[1.0]], 2.0, 1.0)
    with pytest.raises(TypeError, match="one distribution over vectors"):
        predict(model, tuples, x)


def test_variances_need_a_gaussian_and_vectors():
    model, x = mlp(), normal(N, 4)
    with pytest.raises(TypeError, match="one Gaussian or DiagonalGaussian"):
        prediction_variance(model, blr.Poisson.from_rate(1.0), x)
    batch = blr.DiagonalGaussian.from_moments(torch.zeros(2, 51), torch.ones(2, 51))
    with pytest.raises(TypeError, match="one Gaussian or DiagonalGaussian"):
        prediction_variance(model, batch, x)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        prediction_variance(model, posterior(model), x, chunk=0)
    images = built(lambda: nn.Conv2d(2, K, 3))
    with pytest.raises(ValueError, match=r"shape \(N,\) or \(N, K\), got \(3, 3, 3\)"):
        prediction_variance(images, posterior(images), normal(N, 2, 5, 5))


# ---- laws ---------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31), st.floats(1e-3, 3.0))
def test_averages_are_probabilities_and_beat_the_average_sample(samples, chunk, seed, spread):
    model, x = mlp(), normal(N, 4, seed=seed)
    q, y = posterior(model, spread), torch.arange(N) % K
    options = {"generator": seeded(seed), "chunk": chunk}
    p = predict(model, q, x, samples, **options)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(N).double(), rtol=1e-12, atol=0)
    f = sample_outputs(model, q, x, samples, generator=seeded(seed), chunk=chunk)
    each = [metrics.nll(f_s, y, logits=True) for f_s in f]
    assert metrics.nll(p, y) <= sum(each) / samples + 1e-12


def test_a_layer_that_is_used_twice_is_left_as_it_was():
    shared = nn.Linear(3, 3).double()
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(3, 2).double())
    own = {name: (p, p.clone()) for name, p in model.named_parameters()}
    q = blr.DiagonalGaussian.from_moments(parameters_to_vector(model.parameters()).detach(), 4.0)
    x = torch.randn(5, 3, generator=seeded()).double()
    found = sample_outputs(model, q, x, 3, generator=seeded(), activation=lambda f: f)
    for name, p in model.named_parameters():
        assert p is own[name][0]
        assert torch.equal(p, own[name][1])
    other, stream = copy.deepcopy(model), seeded()
    for f in found:
        vector_to_parameters(q.sample(1, stream)[0], other.parameters())
        torch.testing.assert_close(f, other(x).detach())

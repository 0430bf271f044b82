"""Claims about IVON's arithmetic: against the public package, a textbook in NumPy, and laws."""

import copy
import itertools
import math
from collections.abc import Iterator

import ivon as public
import numpy as np
import pytest
import torch

import blr
from blr.optim import _noise, _pieces

SHAPES = (3, 2), (5,), ()
P = 12


def loss(params: list[torch.nn.Parameter], t: int, k: int = 0) -> torch.Tensor:
    """A smooth, coupled function that changes with step t and sample k."""
    v = torch.cat([p.reshape(-1) for p in params])
    A = torch.linspace(0.5, 3.0, v.numel(), dtype=v.dtype)
    return (A * (v - math.sin(t + 0.3 * k)) ** 2).mean() + 0.1 * (v.roll(1) * v).sin().sum()


def start(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g, dtype=dtype)) for s in SHAPES]


def vector(params: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in params]).clone()


# The public package rounds h₀ to float32; these are exact in it.
OPTIONS = [
    {},
    {"weight_decay": 0.0},
    {"weight_decay": 0.3, "hess_init": 0.0625},
    {"debias": False},
    {"rescale_lr": False, "lr": 0.02},
    {"clip_radius": 0.05},
    {"clip_radius": 0.2, "rescale_lr": False, "debias": False},
    {"betas": (0.0, 0.5)},
    {"betas": (0.5, 0.9), "hess_init": 2.0, "ess": 7.0},
    {"betas": (0.99, 0.999), "lr": 1.5},
]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ivon_equals_the_public_package_given_the_same_noise(options, samples, monkeypatch):
    ours, theirs = start(), start()
    settings = {"lr": 0.3, "ess": 50.0} | options
    optimizer = blr.IVON(ours, **settings)
    b1, b2 = settings.pop("betas", (0.9, 0.99999))
    peer = public.IVON(theirs, **settings, beta1=b1, beta2=b2, mc_samples=samples)
    drawn: dict[tuple[int, ...], torch.Tensor] = {}
    monkeypatch.setattr(_noise, "normal", lambda a, b, name, device: drawn[name][a:b])
    for t in range(30):
        mean, precision = vector(theirs), optimizer.posterior().precision
        for k in range(samples):
            with peer.sampled_params(train=True):
                drawn[0, t, 0, k] = (vector(theirs) - mean) * precision.sqrt()
                peer.zero_grad()
                loss(theirs, t, k).backward()
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss(ours, t, k).backward()
        peer.step()
        optimizer.step()
        torch.testing.assert_close(vector(ours), vector(theirs), rtol=1e-10, atol=1e-12)
        for name in ("hess", "momentum"):
            mine = vector([optimizer.state[p][name] for p in ours])
            torch.testing.assert_close(mine, peer.param_groups[0][name], rtol=1e-10, atol=1e-12)


def textbook(m, noise, gradients, lr, N, h0, b1, b2, s0, m0, samples, clip=np.inf):
    """Algorithm 1 of the paper, with a Gaussian prior N(m0, 1/s0), one parameter per entry."""
    h, gbar, delta = np.full_like(m, h0), np.zeros_like(m), s0 / N
    for t, gradient in enumerate(gradients, 1):
        sigma = 1 / np.sqrt(N * (h + delta))
        g, hhat = np.zeros_like(m), np.zeros_like(m)
        for k in range(samples):
            theta = m + sigma * noise(t - 1, k)
            gk = gradient(theta, k)
            g, hhat = g + gk / samples, hhat + gk * (theta - m) / sigma**2 / samples
        gbar = b1 * gbar + (1 - b1) * g
        new = b2 * h + (1 - b2) * hhat + (1 - b2) ** 2 * (h - hhat) ** 2 / (2 * (h + delta))
        h, direction = new, (gbar / (1 - b1**t) + delta * (m - m0)) / (new + delta)
        m = m - lr * (h0 + delta) * np.clip(direction, -clip, clip)
    return m, h


@pytest.mark.parametrize("clip", [np.inf, 0.1])
@pytest.mark.parametrize(
    ("style", "samples"), [("contexts", 1), ("contexts", 2), ("train()", 1), ("closure", 1)]
)
def test_ivon_equals_the_textbook_with_any_gaussian_prior(style, samples, clip):
    ours, N, h0, betas = start(), 40.0, 0.5, (0.8, 0.97)
    rng = np.random.default_rng(1)
    s0, m0 = rng.gamma(2.0, 3.0, P), rng.standard_normal(P)
    prior = blr.DiagonalGaussian.from_moments(m0, s0)
    optimizer = blr.IVON(
        ours, lr=0.2, ess=N, hess_init=h0, betas=betas, clip_radius=clip, seed=3, prior=prior
    )
    before = vector(ours).numpy()

    def gradient(t):
        def at(theta, k):
            q = torch.tensor(theta, requires_grad=True)
            return torch.autograd.grad(loss([q], t, k), q)[0].numpy()

        return at

    def noise(t, k):
        return _noise.normal(0, P, (3, t, 0, k), torch.device("cpu")).double().numpy()

    if style == "train()":
        optimizer.train()
    for t in range(25):

        def closure(t=t, k=0):
            optimizer.zero_grad()
            value = loss(ours, t, k)
            value.backward()
            return value

        if style == "contexts":
            for k in range(samples):
                with optimizer.sampled_params(train=True):
                    closure(k=k)
            optimizer.step()
        elif style == "train()":
            closure()
            optimizer.step()
        else:
            assert optimizer.step(closure) is not None
    optimizer.eval()
    m, h = textbook(
        before, noise, [gradient(t) for t in range(25)], 0.2, N, h0, *betas, s0, m0, samples, clip
    )
    np.testing.assert_allclose(vector(ours), m, rtol=1e-10)
    q = optimizer.posterior()
    np.testing.assert_allclose(q.mean, m, rtol=1e-10)
    np.testing.assert_allclose(q.precision, N * h + s0, rtol=1e-10)


RECIPE_OPTIONS = [
    {},
    {"samples": 3, "weight_decay": 0.2, "betas": (0.8, 0.95)},
    {"samples": 2, "hess_init": 0.05, "clip_radius": 0.02, "schedule": True},
    {"debias": False, "rescale_lr": False, "lr": 0.03, "betas": (0.5, 0.99)},
    {"ess": 96, "weight_decay": 0.0, "betas": (0.0, 0.9), "hess_init": 0.7},
    {"prior": torch.linspace(0.5, 9.0, P, dtype=torch.float64), "betas": (0.9, 0.9)},
]


def recipe_problem(ess: int, prior_precision: float | torch.Tensor) -> blr.likelihoods.TotalLoss:
    """24 examples of a model that is not linear, of which `ess` copies are assumed."""
    g = torch.Generator().manual_seed(3)
    X = torch.randn(24, P, generator=g, dtype=torch.float64)
    y = (X[:, 0] > 0).double()
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    return blr.likelihoods.TotalLoss(
        lambda theta, X: (X @ theta).sin() + X @ theta.square(),
        lambda f, y: bce(f, y, reduction="none"),
        X, y, prior_precision, num_data=ess,
    )  # fmt: skip


@pytest.mark.parametrize("options", RECIPE_OPTIONS, ids=lambda o: ", ".join(o) or "defaults")
def test_ivon_equals_the_recipe_of_the_engine_given_the_same_noise(options, monkeypatch):
    """The recipe in the table is IVON in other letters; here is how they translate.

    `recipes.ivon` learns q = N(m, 1/s) from the total loss, a sum over N examples, the optimizer
    from their mean. So s is N(h + δ): `TotalLoss.num_data` is `ess`, `TotalLoss.prior_precision`
    is `ess` × `weight_decay` or the precision of `prior`, and the precision of the first q says
    `hess_init`. `rescale_lr` is in the recipe's learning rate, and samples are entered one by one.
    """
    settings = {"lr": 0.5, "ess": 24, "hess_init": 0.2, "betas": (0.9, 0.99)} | options
    settings.setdefault("weight_decay", 0.1)
    schedule, samples = settings.pop("schedule", False), settings.pop("samples", 1)
    N, h0, steps, seed = settings["ess"], settings["hess_init"], 40, 6
    delta = settings.pop("prior", N * settings["weight_decay"])
    if isinstance(delta, torch.Tensor):
        settings |= {"prior": blr.DiagonalGaussian.from_moments(torch.zeros(P), delta)}
        settings["rescale_lr"] = False  # one rate for all entries is what the recipe has
    rates = [settings["lr"] / (1 + 0.1 * t * schedule) for t in range(steps)]
    scale = h0 + settings["weight_decay"] if settings.get("rescale_lr", True) else 1.0
    total = recipe_problem(N, delta)

    ours = start()
    optimizer = blr.IVON(ours, **settings, seed=seed)
    q = blr.DiagonalGaussian.from_moments(vector(ours), N * h0 + delta)
    found = []
    for t, part in enumerate(_minibatches(total, steps)):
        optimizer.param_groups[0]["lr"] = rates[t]
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                theta = torch.cat([p.reshape(-1) for p in ours])
                part.examples(theta).mean().backward()
        optimizer.step()
        found.append(optimizer.posterior())

    calls = iter(range(steps))

    def sample(self, *_):
        t = next(calls)
        noise = [_noise.normal(0, P, (seed, t, 0, k), CPU).double() for k in range(samples)]
        return self.mean + torch.stack(noise) / self.precision.sqrt()

    monkeypatch.setattr(blr.DiagonalGaussian, "sample", sample)
    shared = {name: settings[name] for name in ("clip_radius", "debias") if name in settings}
    recipe = blr.recipes.IVON.build(
        lambda t: scale * rates[t - 1], settings["betas"], num_samples=samples, **shared
    )
    generator = torch.Generator().manual_seed(8)
    path = list(blr.run(recipe, total, q, steps, batch=7, generator=generator))
    for mine, theirs in zip(found, path, strict=True):
        torch.testing.assert_close(mine.mean, theirs.mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(mine.precision, theirs.precision, rtol=1e-10, atol=0)
    assert (path[-1].mean - q.mean).abs().min() > 1e-4
    assert (path[-1].precision - q.precision).abs().min() > 1e-4


def _minibatches(total: blr.likelihoods.TotalLoss, steps: int) -> Iterator:
    return itertools.islice(total.minibatches(7, torch.Generator().manual_seed(8)), steps)


def test_weight_decay_is_the_prior_of_mean_zero_and_precision_ess_times_it():
    results = []
    for prior in (None, blr.DiagonalGaussian.from_moments([0.0] * P, 50 * 0.2)):
        params = start()
        optimizer = blr.IVON(params, lr=0.1, ess=50, weight_decay=0.2, prior=prior)
        for t in range(5):
            optimizer.step(lambda t=t, p=params, o=optimizer: backward(o, p, t))
        results.append(vector(params))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=0)


def backward(optimizer, params, t, k=0):
    optimizer.zero_grad()
    value = loss(params, t, k)
    value.backward()
    return value


def test_curvature_keeps_at_least_half_of_its_value_whatever_the_gradient():
    for scale in (1e-3, 1.0, 1e3, 1e6):
        p = torch.nn.Parameter(torch.zeros(200, dtype=torch.float64))
        optimizer = blr.IVON([p], lr=0.0, ess=1.0, betas=(0.9, 0.5), weight_decay=0.01)
        before = optimizer.posterior().precision
        with optimizer.sampled_params(train=True):
            p.grad = scale * torch.linspace(-1, 1, 200, dtype=torch.float64)
        optimizer.step()
        assert (optimizer.posterior().precision >= before / 2 * (1 - 1e-12)).all()


def test_stationary_posterior_of_a_quadratic_is_its_curvature():
    a = torch.linspace(0.5, 4.0, 64, dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(64, dtype=torch.float64))
    optimizer = blr.IVON([p], lr=0.02, ess=100, betas=(0.9, 0.998), weight_decay=0.1)
    average, steps = torch.zeros_like(a), 4_000
    for t in range(steps):
        with optimizer.sampled_params(train=True):
            p.grad = a * (p.detach() - 1)
        optimizer.step()
        average += (t >= 1_000) * optimizer.state[p]["hess"] / (steps - 1_000)
    # ĥ = aε² − …: its stationary average is a, up to the retraction's O(1 − β₂) and sampling.
    torch.testing.assert_close(average, a, rtol=0.15, atol=0)
    mode = a / (a + 0.1)
    assert ((p - mode).abs() < 6 / (100 * a).sqrt()).all()


# ---- noise --------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def test_noise_of_a_slice_is_the_slice_of_the_noise():
    whole = _noise.normal(0, 10_000, (5, 7, 0, 1), CPU)
    for a, b in ((0, 1), (511, 513), (1023, 1025), (3_000, 9_999), (4_096, 5_120)):
        assert torch.equal(_noise.normal(a, b, (5, 7, 0, 1), CPU), whole[a:b])


def test_noise_beyond_four_billion_parameters_is_fresh():
    first = _noise.normal(0, 4096, (0, 0, 0, 0), CPU)
    far = 1 << 33
    assert not torch.equal(_noise.normal(far, far + 4096, (0, 0, 0, 0), CPU), first)
    across = _noise.normal(far - 2000, far + 100, (0, 0, 0, 0), CPU)
    assert torch.equal(across[:2000], _noise.normal(far - 2000, far, (0, 0, 0, 0), CPU))
    assert torch.equal(across[2000:], _noise.normal(far, far + 100, (0, 0, 0, 0), CPU))


def test_noise_is_standard_normal():
    n = 1 << 21
    x = _noise.normal(0, n, (11, 0, 0, 0), CPU).double()
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96), (0, 945)], 1):
        assert abs((x**power).mean() - moment) < 5 * (variance / n) ** 0.5
    grid = torch.linspace(-4, 4, 81, dtype=torch.float64)
    empirical = torch.searchsorted(x.sort().values, grid) / n
    # Kolmogorov and Smirnov: exceeded with probability 1e-5.
    assert (empirical - torch.special.ndtr(grid)).abs().max() < 2.47 / n**0.5
    assert 4.5 < x.abs().max() < 6.8


@pytest.mark.parametrize(
    "name", [(12, 0, 0, 0), (11, 1, 0, 0), (11, 0, 1, 0), (11, 0, 0, 1), (-1, 0, 0, 0)]
)
def test_noise_of_other_seeds_steps_streams_and_samples_is_independent(name):
    n = 1 << 20
    x, y = (_noise.normal(0, n, w, CPU).double() for w in ((11, 0, 0, 0), name))
    for f in (lambda v: v, lambda v: (v**2 - 1) / 2**0.5):
        assert abs((f(x) * f(y)).mean()) < 5 / n**0.5


@pytest.mark.parametrize("lag", [1, 2, 64, 256, 512, 1024, 4096, 65_536])
def test_noise_is_not_correlated_along_the_index(lag):
    n = 1 << 20
    x = _noise.normal(0, n + lag, (2, 3, 0, 0), CPU).double()
    for f in (lambda v: v, lambda v: (v**2 - 1) / 2**0.5):
        assert abs((f(x)[:-lag] * f(x)[lag:]).mean()) < 5 / n**0.5


def test_noise_at_the_same_place_is_not_correlated_along_steps():
    x = torch.stack([_noise.normal(0, 2048, (0, t, 0, 0), CPU) for t in range(1000)]).double()
    z = x.mean(0) * 1000**0.5
    assert abs(z.var() - 1) < 5 * (2 / 2048) ** 0.5
    assert abs((x[1:] * x[:-1]).mean()) < 5 / (999 * 2048) ** 0.5


# ---- pieces -------------------------------------------------------------------------------------


def test_the_result_does_not_depend_on_how_parameters_are_cut_into_pieces(monkeypatch):
    results = []
    for window, small in ((1 << 17, 1 << 13), (64, 4), (64, 1 << 13), (1 << 17, 0)):
        monkeypatch.setitem(_pieces.WINDOW, "cpu", window)
        monkeypatch.setattr(_pieces, "SMALL", small)
        g = torch.Generator().manual_seed(0)
        shapes = (40, 7), (300,), (2, 3, 50)  # all large or all small: the index is the same
        params = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
        optimizer = blr.IVON(params, lr=0.1, ess=10, hess_init=0.1)
        for t in range(4):
            optimizer.step(lambda t=t, p=params, o=optimizer: backward(o, p, t))
        results.append(vector(params))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_that_is_made_again_is_the_sample_that_was_kept(dtype):
    """Looking at another sample between backward and step throws the kept one away."""
    results = []
    for look in (False, True):
        params = start(dtype=dtype)
        optimizer = blr.IVON(params, lr=0.1, ess=10, hess_init=0.1)
        for t in range(5):
            with optimizer.sampled_params(train=True):
                backward(optimizer, params, t)
            if look:
                with optimizer.sampled_params():
                    pass
            optimizer.step()
        results.append(vector(params))
    assert torch.equal(results[0], results[1])


# ---- posterior ----------------------------------------------------------------------------------


def test_posterior_has_the_names_of_the_model_and_goes_back_to_its_tensors():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).double()
    optimizer = blr.IVON(model.named_parameters(), lr=0.1, ess=10, hess_init=0.5, weight_decay=0.1)
    q = optimizer.posterior()
    assert isinstance(q, blr.DiagonalGaussian)
    for name, mean in q.named(q.mean).items():
        torch.testing.assert_close(mean, model.get_parameter(name).detach(), rtol=1e-12, atol=0)
    assert torch.allclose(q.precision, torch.tensor(10 * 0.6, dtype=torch.float64))
    draws = q.named(q.sample(5, generator=torch.Generator().manual_seed(0)))
    assert draws["1.weight"].shape == (5, 2, 4)
    assert q.kl(q).abs() < 1e-10 and q.add(q.natural).shapes == q.shapes


def test_posterior_of_one_task_is_the_prior_of_the_next():
    params = start()
    optimizer = blr.IVON(params, lr=0.1, ess=10)
    optimizer.step(lambda: backward(optimizer, params, 0))
    q = optimizer.posterior()
    later = blr.IVON(copy.deepcopy(params), lr=0.1, ess=20, prior=q)
    expected = 20 * 1.0 + q.precision
    torch.testing.assert_close(later.posterior().precision, expected, rtol=1e-10, atol=0)


def test_a_prior_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"prior must have one entry for each of 12"):
        blr.IVON(
            start(), lr=0.1, ess=1, prior=blr.DiagonalGaussian.from_moments([0.0, 0], [1.0, 1])
        )
    with pytest.raises(TypeError, match="prior must be a DiagonalGaussian, got Gamma"):
        blr.IVON(start(), lr=0.1, ess=1, prior=blr.Gamma.from_shape_rate(1.0, 1.0))
    with pytest.raises(ValueError, match="shapes must have 3 entries"):
        blr.NamedGaussian((torch.zeros(3), -torch.ones(3)), {"a": torch.Size([2])})
    with pytest.raises(ValueError, match="same names and shapes"):
        blr.NamedGaussian.from_named({"a": torch.zeros(2)}, {"b": torch.ones(2)})

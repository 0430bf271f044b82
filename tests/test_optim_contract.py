"""The contract of optimizers with a posterior: what an engineer may rely on, a test for a claim."""

import ast
import copy
import io
import json
import pickle
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import blr
from blr.optim import _pieces

X = torch.linspace(-2, 2, 24).reshape(12, 2)
Y = (X[:, :1] * X[:, 1:]).sin()


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def make(model: nn.Module, **options) -> blr.IVON:
    settings = {"lr": 0.2, "ess": 100, "hess_init": 0.5, "betas": (0.9, 0.99)} | options
    return blr.IVON(model.parameters(), **settings)


def loss_of(model: nn.Module, scale: float = 1.0) -> torch.Tensor:
    p = next(model.parameters())
    return scale * (model(X.to(p.dtype)) - Y.to(p.dtype)).square().mean()


def learn(model: nn.Module, optimizer: blr.IVON, steps: int = 1, scale: float = 1.0) -> None:
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            loss_of(model, scale).backward()
        optimizer.step()


def sampled(optimizer: blr.IVON) -> AbstractContextManager[None]:
    """A sample to learn from, by either spelling: between train() and eval() there is one."""
    return nullcontext() if optimizer.training else optimizer.sampled_params(train=True)


def tensors(*dtypes: torch.dtype) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    shapes = zip(((3, 2), (5,), (4,), (2, 4)), dtypes or 4 * [torch.float64], strict=True)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s, dtype in shapes]


def pull(optimizer: blr.IVON, steps: int = 1) -> None:
    """Steps with gradients in which no two entries meet: one tensor learns nothing of others."""
    for _ in range(steps):
        with sampled(optimizer):
            for p in (p for g in optimizer.param_groups for p in g["params"] if p.requires_grad):
                p.grad = 0.7 * p.detach() + (1.3 * p.detach()).sin()
        optimizer.step()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def averages(params: Iterable[nn.Parameter], optimizer: blr.IVON) -> list[torch.Tensor]:
    return [
        optimizer.state[p][name].clone()
        for p in params
        for name in ("hess", "momentum")
        if name in optimizer.state[p]
    ]


def everything(model: nn.Module, optimizer: blr.IVON) -> list[torch.Tensor]:
    """Parameters, state, and the counters."""
    state = averages(model.parameters(), optimizer)
    return [*weights(model), *state, torch.tensor([g["step"] for g in optimizer.param_groups])]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def assert_close(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], rtol: float = 1e-10, atol: float = 1e-12
) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def moved(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(not torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- contexts -----------------------------------------------------------------------------------


def test_a_context_holds_a_sample_and_restores_the_mean_bit_by_bit():
    model = network()
    optimizer = make(model)
    before = weights(model)
    for train in (False, True):
        with optimizer.sampled_params(train=train):
            assert moved(weights(model), before)
        assert same(weights(model), before)


def test_samples_have_the_spread_of_the_posterior():
    model = nn.Linear(500, 40)
    optimizer = make(model, ess=30, hess_init=0.7, weight_decay=0.3)
    before = model.weight.detach().clone()
    with optimizer.sampled_params():
        z = (model.weight.detach() - before) * 30**0.5
    assert abs(z.std() - 1) < 5 / (2 * z.numel()) ** 0.5
    assert abs(z.mean()) < 5 / z.numel() ** 0.5


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_inside_restores_the_mean_and_teaches_nothing(train, error):
    model, reference = network(), network()
    optimizer, untroubled = make(model), make(reference)
    learn(model, optimizer)
    learn(reference, untroubled)
    before = weights(model)
    with pytest.raises(error), optimizer.sampled_params(train=train):
        loss_of(model).backward()
        raise error
    assert same(weights(model), before)
    learn(model, optimizer)
    learn(reference, untroubled)
    assert same(everything(model, optimizer), everything(reference, untroubled))


def test_an_exception_in_a_later_sample_keeps_the_earlier_ones():
    results = []
    for fail in (False, True):
        model = network()
        optimizer = make(model)
        for k in range(3):
            if fail and k:
                with pytest.raises(ValueError), optimizer.sampled_params(train=True):
                    loss_of(model).backward()
                    raise ValueError
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss_of(model).backward()
        optimizer.step()
        results.append(everything(model, optimizer))
    assert same(*results)


@pytest.mark.parametrize("when", range(8))
@pytest.mark.parametrize("small", [0, 1 << 13])
def test_an_interrupt_while_parameters_are_moved_restores_the_mean(when, small, monkeypatch):
    monkeypatch.setattr(_pieces, "SMALL", small)
    model = network()
    optimizer = make(model)
    learn(model, optimizer)
    before = weights(model)
    calls = 0
    with monkeypatch.context() as patch:
        for kind in (_pieces.Slice, _pieces.Pack):

            def interrupted(self, name, value, write=kind.write):
                nonlocal calls
                calls += 1
                if calls == when + 1:
                    raise KeyboardInterrupt
                write(self, name, value)

            patch.setattr(kind, "write", interrupted)
        with pytest.raises(KeyboardInterrupt), optimizer.sampled_params():
            raise KeyboardInterrupt
    optimizer.eval()
    assert same(weights(model), before)


def test_contexts_nest_and_what_cannot_be_meant_is_refused():
    model = network()
    optimizer = make(model)
    before = weights(model)
    with optimizer.sampled_params():
        sample = weights(model)
        with optimizer.mean_params():
            assert same(weights(model), before)
        assert same(weights(model), sample)
        with optimizer.sampled_params():
            assert moved(weights(model), sample)
        assert same(weights(model), sample)
        for act in (optimizer.step, optimizer.train, optimizer.eval):
            with pytest.raises(RuntimeError, match="leave the context first"):
                act()
        with pytest.raises(RuntimeError, match="already hold a sample"):
            with optimizer.sampled_params(train=True):
                pass
    assert same(weights(model), before)


# ---- train() and eval() -------------------------------------------------------------------------


def test_train_makes_an_unchanged_loop_equal_to_contexts():
    model, reference = network(), network()
    optimizer, contexts = make(model), make(reference)
    optimizer.train()
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    optimizer.eval()
    learn(reference, contexts, 5)
    assert same(weights(model), weights(reference))
    assert same([optimizer.posterior().precision], [contexts.posterior().precision])


def test_train_mode_steps_aside_for_the_mean_and_for_other_samples():
    model = network()
    optimizer = make(model)
    mean = weights(model)
    optimizer.train()
    optimizer.train()
    sample = weights(model)
    assert optimizer.training and moved(sample, mean)
    with optimizer.mean_params():
        assert same(weights(model), mean)
    with optimizer.sampled_params():
        assert moved(weights(model), sample)
    assert same(weights(model), sample)
    optimizer.eval()
    assert same(weights(model), mean)


# ---- steps --------------------------------------------------------------------------------------


def test_step_without_a_sample_says_what_to_do():
    model = network()
    optimizer = make(model)
    optimizer.step()  # nothing to learn from
    loss_of(model).backward()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=r"sampled_params\(train=True\).*train\(\)"):
        optimizer.step()
    assert same(everything(model, optimizer), before)


def test_a_standard_closure_is_evaluated_at_a_sample():
    model, reference = network(), network()
    optimizer, contexts = make(model), make(reference)

    def closure():
        optimizer.zero_grad()
        value = loss_of(model)
        value.backward()
        return value

    value = optimizer.step(closure)
    with contexts.sampled_params():
        pass
    with contexts.sampled_params(train=True):
        expected = loss_of(reference)
        expected.backward()
    contexts.step()
    assert torch.equal(value, expected)
    assert same(weights(model), weights(reference))


def test_a_parameter_that_the_loss_does_not_use_stays_as_it_is():
    model = nn.ModuleDict({"used": network(), "unused": nn.Linear(3, 3)})
    optimizer = make(model)
    before = weights(model["unused"])
    learn(model["used"], optimizer, 3)
    assert same(weights(model["unused"]), before)
    assert torch.equal(optimizer.state[model["unused"].weight]["hess"], torch.full((3, 3), 0.5))


def test_a_frozen_parameter_is_neither_sampled_nor_moved_and_may_thaw():
    model = network()
    model[0].requires_grad_(False)
    optimizer = make(model)
    before = weights(model[0])
    with optimizer.sampled_params(train=True):
        assert same(weights(model[0]), before)
        loss_of(model).backward()
    optimizer.step()
    assert same(weights(model[0]), before)
    model[0].requires_grad_(True)
    learn(model, optimizer, 2)
    assert moved(weights(model[0]), before)
    model[0].requires_grad_(False)
    before = weights(model[0])
    learn(model, optimizer)
    assert same(weights(model[0]), before)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x)).sum(-1, keepdim=True)


def tied_network() -> Tied:
    torch.manual_seed(0)
    return Tied()


def test_tied_parameters_are_one_parameter():
    model = tied_network()
    tied = make(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own word on duplicates
        twice = blr.IVON([model.a.weight, model.a.weight], lr=0.1, ess=10)
    assert len(twice.param_groups[0]["params"]) == 1
    params = weight, a, b = [nn.Parameter(w) for w in weights(model)]
    optimizer = make(nn.ParameterList(params))
    learn(model, tied, 3)
    for _ in range(3):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            h = nn.functional.linear(nn.functional.linear(X, weight, a), weight, b)
            (h.sum(-1, keepdim=True) - Y).square().mean().backward()
        optimizer.step()
    assert model.a.weight is model.b.weight
    ours = everything(model, tied)[:-1]
    assert_close(ours, [*params, *averages(params, optimizer)], rtol=1e-5, atol=1e-6)


# In no option like each other; and in each, one of them is not like the default.
OPTIONS = (
    {"lr": 0.3, "ess": 9.0, "hess_init": 1.5, "betas": (0.5, 0.9), "weight_decay": 0.02,
     "clip_radius": 0.1, "debias": False, "rescale_lr": True, "seed": 8},
    {"lr": 0.1, "ess": 40.0, "hess_init": 0.3, "betas": (0.8, 0.97), "weight_decay": 0.2,
     "clip_radius": 0.5, "debias": True, "rescale_lr": False, "seed": 3},
)  # fmt: skip


@pytest.mark.parametrize("style", ["contexts", "train()"])
@pytest.mark.parametrize("prior", [False, True])
def test_every_option_is_that_of_the_group(style, prior):
    """A group learns as it does where all have its options, which leaves the noise as it is."""
    given = blr.DiagonalGaussian.from_moments(torch.linspace(-1, 1, 23), torch.linspace(1, 9, 23))

    def trained(alike=None):
        params = tensors()
        groups = zip((params[:2], params[2:]), OPTIONS, strict=True)
        groups = [{"params": some} | options for some, options in groups]
        defaults = alike or {"lr": 0.7, "ess": 100}
        optimizer = blr.IVON(
            params if alike else groups, prior=given if prior else None, **defaults
        )
        optimizer.train(style == "train()")
        pull(optimizer, 5)
        optimizer.eval()
        halves = (some + averages(some, optimizer) for some in (params[:2], params[2:]))
        precision = optimizer.posterior().precision.split((11, 12))
        return [[*half, s] for half, s in zip(halves, precision, strict=True)]

    mixed = trained()
    for i, options in enumerate(OPTIONS):
        alike = trained(options)
        assert_close(mixed[i], alike[i])
        assert moved(mixed[1 - i], alike[1 - i])


@pytest.mark.parametrize("style", ["contexts", "train()"])
def test_an_added_group_begins_as_in_a_fresh_optimizer_and_leaves_the_others_alone(style):
    results = []
    for fresh in (False, True):
        params = tensors()
        old, new = {"params": params[:2]}, {"params": params[2:], "lr": 0.05, "ess": 30}
        optimizer = blr.IVON([old], lr=0.2, ess=100, betas=(0.9, 0.99))
        optimizer.train(style == "train()")
        if not fresh:
            pull(optimizer, 3)
        optimizer.add_param_group(new)
        pull(optimizer, 2)
        optimizer.eval()
        assert [g["step"] for g in optimizer.param_groups] == [2 if fresh else 5, 2]
        results.append((params, optimizer))
    (params, optimizer), (others, fresh) = results
    assert same(params[2:], others[2:])
    assert same(averages(params[2:], optimizer), averages(others[2:], fresh))
    assert moved(params[2:], tensors()[2:])
    pull(fresh, 3)
    assert same(params[:2], others[:2])
    assert same(averages(params[:2], optimizer), averages(others[:2], fresh))


def test_groups_have_their_own_options_and_may_be_added_during_training():
    model = network()
    optimizer = blr.IVON(model[0].parameters(), lr=0.2, ess=100, betas=(0.9, 0.99))
    learn(model, optimizer, 2)
    before = weights(model[2])
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.05, "weight_decay": 0.0})
    learn(model, optimizer, 2)
    assert moved(weights(model[2]), before)
    assert [g["step"] for g in optimizer.param_groups] == [4, 2]
    optimizer.train()
    extra = nn.Linear(2, 2)
    before = weights(extra)
    optimizer.add_param_group({"params": extra.parameters()})
    assert moved(weights(extra), before)
    optimizer.eval()
    assert same(weights(extra), before)


def test_groups_with_equal_options_equal_one_group():
    model, reference = network(), network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "ess": 100}]
    optimizer = blr.IVON(groups, lr=0.2, ess=100)
    one = blr.IVON(reference.parameters(), lr=0.2, ess=100)
    learn(model, optimizer, 3)
    learn(reference, one, 3)
    for a, b in zip(weights(model), weights(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("style", ["contexts", "train()"])
def test_gradients_that_are_not_finite_leave_everything_as_it_is_and_are_told_once(bad, style):
    model = network()
    optimizer = make(model)
    learn(model, optimizer)
    if style == "train()":
        optimizer.train()
    before = everything(model, optimizer)
    with pytest.warns(RuntimeWarning, match="gradient is NaN or infinite") as told:
        for _ in range(2):
            if style == "train()":
                loss_of(model, bad).backward()
            else:
                with optimizer.sampled_params(train=True):
                    loss_of(model, bad).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert same(everything(model, optimizer)[:-1], before[:-1])
    assert len([w for w in told if "NaN" in str(w.message)]) == 1
    assert optimizer.param_groups[0]["step"] == 1
    optimizer.eval()
    learn(model, optimizer)
    assert all(torch.isfinite(w).all() for w in weights(model))


def test_huge_finite_gradients_are_not_taken_for_infinite():
    p = nn.Parameter(torch.zeros(10))
    optimizer = blr.IVON([p], lr=1e-30, ess=1.0, betas=(0.9, 0.9999999))
    with optimizer.sampled_params(train=True):
        p.grad = torch.full((10,), 1e38)
    assert not torch.isfinite(p.grad.sum())
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1


# ---- gradients that others change ---------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
def test_a_loss_scaler_changes_nothing(samples):
    model, reference = network(torch.float64), network(torch.float64)
    optimizer, plain = make(model), make(reference)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(4):
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                scaler.scale(loss_of(model)).backward()
            with plain.sampled_params(train=True):
                plain.zero_grad()
                loss_of(reference).backward()
        scaler.step(optimizer)
        scaler.update()
        plain.step()
    for a, b in zip(everything(model, optimizer), everything(reference, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_a_step_that_the_loss_scaler_skips_is_forgotten():
    model, reference = network(), network()
    optimizer, plain = make(model), make(reference)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for scale in (1.0, float("inf"), 1.0):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, scale)).backward()
        scaler.step(optimizer)
        scaler.update()
    learn(reference, plain, 2)
    for a, b in zip(weights(model), weights(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("samples", [1, 2])
def test_clipping_the_gradient_norm_clips_slope_and_curvature_alike(samples):
    """A loss that is scaled has the gradient that clipping gives."""
    model, reference = network(torch.float64), network(torch.float64)
    optimizer, scaled = make(model), make(reference)
    for _ in range(samples):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            loss_of(model, 50.0).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    for _ in range(samples):
        with scaled.sampled_params(train=True):
            scaled.zero_grad()
            loss_of(reference, 50.0 * 0.1 / (norm + 1e-6).item()).backward()
    assert norm > 0.2
    optimizer.step()
    scaled.step()
    for a, b in zip(everything(model, optimizer), everything(reference, scaled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("style", ["one sample", "a sample for each", "train()"])
def test_accumulated_micro_batches_equal_the_full_batch(style):
    model, reference = network(torch.float64), network(torch.float64)
    optimizer, full = make(model), make(reference)
    x, y = X.double().split(4), Y.double().split(4)

    def part(net, i):
        return (net(x[i]) - y[i]).square().mean() / 3

    def context(o):
        return o.sampled_params(train=True)

    if style == "a sample for each":
        optimizer.zero_grad()
        for i in range(3):
            with context(optimizer):
                part(model, i).backward()  # adds up, as everywhere in torch
        for i in range(3):
            with context(full):
                full.zero_grad()  # averaged
                (3 * part(reference, i)).backward()
    else:
        if style == "train()":
            optimizer.train()
            for i in range(3):
                part(model, i).backward()
        else:
            with context(optimizer):
                for i in range(3):
                    part(model, i).backward()
        with context(full):
            loss_of(reference).backward()
    optimizer.step()
    full.step()
    optimizer.eval()
    for a, b in zip(everything(model, optimizer), everything(reference, full), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_a_parameter_may_be_reached_by_only_some_samples():
    model = nn.ModuleList([nn.Linear(1, 1).double(), nn.Linear(1, 1).double()])
    optimizer = make(model, betas=(0.0, 0.99))
    for used in (model[0], model[1], model[0]):
        with optimizer.sampled_params(train=True):
            model.zero_grad()
            used(torch.ones(1, 1, dtype=torch.float64)).sum().backward()
    assert model[0].bias.grad == pytest.approx(2 / 3)
    assert model[1].bias.grad == pytest.approx(1 / 3)
    optimizer.step()
    assert torch.allclose(optimizer.state[model[1].bias]["momentum"], torch.tensor(1 / 3).double())


@pytest.mark.parametrize("train", [False, True])
def test_autocast_sees_every_sample(train):
    model = network()
    optimizer = make(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [model(X)]
        for _ in range(2):
            with optimizer.sampled_params(train=train):
                outputs.append(model(X))
                outputs[-1].sum().backward()  # a training sample without it is drawn again
        again = model(X)
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    assert torch.equal(outputs[0], again)


@pytest.mark.parametrize(("style", "samples"), [("contexts", 1), ("contexts", 2), ("train()", 1)])
def test_one_autocast_around_the_loop_teaches_what_one_for_each_pass_teaches(style, samples):
    """It keeps weights in 16 bits until the outermost one ends, and must not keep them longer."""
    results = []
    for whole in (False, True):
        model = network()
        optimizer = make(model)
        optimizer.train(style == "train()")
        with torch.autocast("cpu", dtype=torch.bfloat16) if whole else nullcontext():
            for _ in range(3):
                for _ in range(samples):
                    with sampled(optimizer):
                        optimizer.zero_grad()
                        with torch.autocast("cpu", dtype=torch.bfloat16):
                            value = loss_of(model)
                        value.backward()
                optimizer.step()
        optimizer.eval()
        results.append(everything(model, optimizer))
    assert same(*results) and moved(results[0][:4], weights(network()))


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=5, cycle_momentum=True),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.5**t),
    ],
)
def test_schedulers_set_the_rate(scheduler):
    model = network()
    optimizer = make(model)
    schedule = scheduler(optimizer)
    rates = []
    for _ in range(4):
        learn(model, optimizer)
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) == 4
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights(model)
    learn(model, optimizer)
    assert same(weights(model), before)


# ---- types, places and layouts ------------------------------------------------------------------


def test_types_may_be_mixed():
    """Each tensor learns, to the bit, what it learns where the others are frozen."""
    types = torch.float32, torch.float64, torch.bfloat16, torch.float16

    def trained(*learning):
        params = [p.requires_grad_(p.dtype in learning) for p in tensors(*types)]
        optimizer = blr.IVON(params, lr=0.1, ess=10, betas=(0.9, 0.97))
        pull(optimizer, 3)
        return params, optimizer

    params, optimizer = trained(*types)
    assert [p.dtype for p in params] == [*types]
    assert moved(params, tensors(*types))
    for i, dtype in enumerate(types):
        others, alone = trained(dtype)
        assert torch.equal(params[i], others[i])
        assert same(averages([params[i]], optimizer), averages([others[i]], alone))


def test_devices_may_be_mixed():
    """The state is where its parameter is. The device "meta" has no numbers, so no gradients."""
    results = []
    for others in ([], [nn.Parameter(torch.zeros(6, dtype=torch.float64, device="meta"))]):
        params = tensors()
        optimizer = blr.IVON([*params, *others], lr=0.1, ess=10)
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                for p in params:
                    p.grad = p.detach().sin()
            optimizer.step()
        optimizer.train()
        for p in (*params, *others):
            assert {*optimizer.state[p]} == {"mean", "hess", "momentum"}
            assert {x.device for x in optimizer.state[p].values()} == {p.device}
        optimizer.eval()
        results.append([*weights(nn.ParameterList(params)), *averages(params, optimizer)])
    assert same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prior", [False, True])
def test_state_follows_a_parameter_to_another_device(dtype, prior):
    given = blr.DiagonalGaussian.from_moments([0.1] * 5, 3.0) if prior else None
    p, stays = nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = blr.IVON([p, stays], lr=0.1, ess=10, prior=given)
    pull(optimizer, 2)
    p.grad = None
    # As `model.to(device)` does in place where tensors of two devices cannot share a Python object.
    torch.utils.swap_tensors(p, nn.Parameter(torch.empty_like(p, device="meta")))
    assert p.device.type == "meta" and optimizer.state[p]["hess"].device.type == "cpu"
    with optimizer.sampled_params():
        for x in (p, stays):
            assert {value.device for value in optimizer.state[x].values()} == {x.device}
    assert optimizer.state[p]["hess"].dtype == torch.float32
    assert len(optimizer.state[p]) == (5 if prior else 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_loaded_to_the_device_of_the_parameter(dtype):
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = blr.IVON([p], lr=0.1, ess=10)
    pull(optimizer)
    other = nn.Parameter(torch.ones(3, dtype=dtype, device="meta"))
    resumed = blr.IVON([other], lr=0.1, ess=10)
    resumed.load_state_dict(optimizer.state_dict())
    assert {x.device for x in resumed.state[other].values()} == {other.device}
    assert {x.dtype for x in resumed.state[other].values()} == {torch.float32}
    assert resumed.param_groups[0]["step"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_parameters_have_their_mean_and_curvature_in_float32(dtype):
    """The trajectory is that of float32, up to what sixteen bits make of inputs and gradients."""
    params = [nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2)]
    params[1] = nn.Parameter(params[1].detach().to(dtype))
    optimizers = [blr.IVON([p], lr=3e-4, ess=1e4, betas=(0.9, 0.9999)) for p in params]
    for t in range(200):
        for p, o in zip(params, optimizers, strict=True):
            with o.sampled_params(train=True):
                p.grad = torch.full_like(p, 0.25 if t % 3 else 0.5)
            o.step()
    short, full = (o.posterior() for o in optimizers)
    assert optimizers[1].state[params[1]]["hess"].dtype == torch.float32
    torch.testing.assert_close(short.mean - full.mean, torch.zeros(50), rtol=0, atol=4e-3)
    torch.testing.assert_close(short.precision, full.precision, rtol=1e-3, atol=0)
    # One step is far below the resolution of the parameter, and yet they add up.
    assert (full.mean - torch.linspace(-1, 1, 50)).abs().min() > 0.01
    assert torch.equal(params[1].detach(), optimizers[1].state[params[1]]["mean"].to(dtype))


def test_weights_that_are_loaded_into_short_parameters_are_taken_over():
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = blr.IVON([p], lr=0.1, ess=1e6)
    with torch.no_grad():
        p.copy_(torch.tensor([5.0, 1.0, 7.0, 1.0]))
    with optimizer.sampled_params():
        pass
    assert p.tolist() == [5.0, 1.0, 7.0, 1.0]


@pytest.mark.parametrize(
    "layout",
    {
        "transposed": lambda: torch.randn(7, 4).t(),
        "channels_last": lambda: torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last),
        "with gaps": lambda: torch.randn(6, 8)[:, ::2],
        "a row of a buffer": lambda: torch.randn(3, 11)[1],
        "scalar": lambda: torch.randn(()),
        "empty": lambda: torch.randn(0, 3),
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("small", [0, 1 << 13])
def test_layout_storage_and_address_are_kept(layout, small, monkeypatch):
    monkeypatch.setattr(_pieces, "SMALL", small)
    torch.manual_seed(0)
    start = layout[1]()
    p, q = nn.Parameter(start), nn.Parameter(start.clone(memory_format=torch.contiguous_format))
    where = p.data_ptr(), p.stride(), p.untyped_storage().data_ptr()
    results = []
    for x in (p, q):
        # Without noise, so that the order of elements in memory does not matter.
        optimizer = blr.IVON([x, nn.Parameter(torch.zeros(2))], lr=0.1, ess=1e30)
        optimizer.train()
        for _ in range(3):
            x.grad = torch.ones(start.shape).cumsum(0) if start.ndim else torch.ones(())
            optimizer.step()
        optimizer.eval()
        results.append(x.detach())
    assert (p.data_ptr(), p.stride(), p.untyped_storage().data_ptr()) == where
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    if p.numel():
        assert not torch.equal(p, start.new_zeros(p.shape))


@pytest.mark.parametrize("style", ["contexts", "train()"])
def test_models_in_channels_last_train_as_others_do(style):
    """Tensors of less than `_pieces.SMALL` entries have the same noise in any memory format."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 1))
        model = model.double().to(memory_format=layout)
        optimizer = make(model, lr=0.05)
        optimizer.train(style == "train()")
        x = torch.randn(4, 3, 6, 6).double().to(memory_format=layout)
        for _ in range(3):
            with sampled(optimizer):
                optimizer.zero_grad()
                model(x).square().mean().backward()
            optimizer.step()
        assert model[0].weight.is_contiguous(memory_format=layout)
        optimizer.eval()
        results.append(everything(model, optimizer))
    assert_close(*results)


@pytest.mark.parametrize("style", ["contexts", "train()"])
def test_large_tensors_have_their_noise_in_the_order_of_memory(style, monkeypatch):
    """So one in channels_last is a contiguous one with its axes in that order."""
    monkeypatch.setattr(_pieces, "SMALL", 0)
    g = torch.Generator().manual_seed(0)
    kernel, x = (torch.randn(*s, generator=g).double() for s in ((8, 3, 3, 2), (4, 3, 6, 6)))
    kernel = kernel.to(memory_format=torch.channels_last)
    results = []
    for axes, back in ((0, 1, 2, 3), (0, 1, 2, 3)), ((0, 2, 3, 1), (0, 3, 1, 2)):
        p = nn.Parameter(kernel.permute(axes).clone())
        optimizer = blr.IVON([p], lr=0.05, ess=20, hess_init=0.5, betas=(0.9, 0.97))
        optimizer.train(style == "train()")
        for _ in range(3):
            with sampled(optimizer):
                optimizer.zero_grad()
                nn.functional.conv2d(x, p.permute(back)).sin().mean().backward()
            optimizer.step()
        optimizer.eval()
        kept = [p.detach(), *averages([p], optimizer)]
        results.append([value.permute(back) for value in kept])
    assert not kernel.is_contiguous() and p.is_contiguous()
    assert_close(*results)


@pytest.mark.parametrize("small", [0, 1 << 13])
def test_a_model_may_change_its_memory_format_during_training(small, monkeypatch):
    monkeypatch.setattr(_pieces, "SMALL", small)
    torch.manual_seed(0)
    model = nn.Conv2d(3, 8, 3)
    optimizer = make(model)
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        before = optimizer.state[model.weight]["momentum"].clone()
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        after = optimizer.state[model.weight]["momentum"]
        torch.testing.assert_close(after, before.lerp(model.weight.grad, 0.1))
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_saving_a_layer_writes_that_layer_only():
    model = network()
    optimizer = make(model)
    learn(model, optimizer)
    file = io.BytesIO()
    torch.save(model[0].bias.detach(), file)
    assert model[0].bias.untyped_storage().nbytes() == 5 * 4
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == 4  # safetensors refuses tensors that share memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_saves_a_trained_model_and_reads_it_back(dtype, tmp_path):
    from safetensors.torch import load_file, save_file

    model, other = network(dtype), network(dtype)
    optimizer = make(model)
    learn(model, optimizer, 2)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    other.load_state_dict(load_file(path))
    assert same(weights(model), weights(other))
    assert path.stat().st_size < sum(w.nbytes for w in weights(model)) + 400  # and a header
    optimizer.train()
    with optimizer.mean_params():
        save_file(model.state_dict(), path)
    read = load_file(path)
    assert same(weights(other), [read[name] for name, _ in model.named_parameters()])


def test_safetensors_saves_tied_parameters_once(tmp_path):
    from safetensors.torch import load_file, load_model, save_file, save_model

    model, other = tied_network(), tied_network()
    learn(model, make(model), 2)
    path = tmp_path / "model.safetensors"
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(model.state_dict(), path)  # its rule for whatever is tied, also without us
    save_model(model, path)
    assert len(load_file(path)) == 3
    load_model(other, path)
    assert same(weights(model), weights(other)) and other.a.weight is other.b.weight


def test_aliases_made_before_the_optimizer_see_its_steps():
    model = network()
    alias = model[0].weight.detach()
    learn(model, make(model))
    assert torch.equal(alias, model[0].weight)


def test_state_follows_a_model_that_changes_its_type():
    model = network()
    optimizer = make(model)
    learn(model, optimizer)
    model.double()
    learn(model, optimizer, 2)
    assert optimizer.state[model[0].weight]["hess"].dtype == torch.float64


def test_parametrised_models_train():
    model = network(torch.float64)
    nn.utils.parametrizations.weight_norm(model[0])
    optimizer = make(model)
    x, y = X.double(), Y.double()
    outputs = model(x).detach()
    with optimizer.sampled_params():
        assert not torch.equal(model(x), outputs)
    assert torch.equal(model(x), outputs)
    # Without parametrisation: length g and direction v of each row are plain tensors.
    names = [name.removeprefix("0.parametrizations.") for name, _ in model.named_parameters()]
    assert names == ["0.bias", "weight.original0", "weight.original1", "2.weight", "2.bias"]
    params = [nn.Parameter(w) for w in weights(model)]
    b0, g, v, w2, b2 = params
    plain = make(nn.ParameterList(params))
    learn(model, optimizer, 3)
    for _ in range(3):
        with plain.sampled_params(train=True):
            plain.zero_grad()
            h = (x @ (g * v / v.norm(dim=1, keepdim=True)).T + b0).tanh()
            (h @ w2.T + b2 - y).square().mean().backward()
        plain.step()
    assert_close(weights(model), params)
    assert_close(averages(model.parameters(), optimizer), averages(params, plain))


@pytest.mark.parametrize("style", ["contexts", "train()"])
def test_compiled_models_see_samples_and_steps(style):
    model, reference = network(), network()
    compiled = torch.compile(model, backend="eager")
    optimizer, plain = make(model), make(reference)
    optimizer.train(style == "train()")
    for _ in range(3):
        with sampled(optimizer):
            optimizer.zero_grad()
            (compiled(X) - Y).square().mean().backward()
        optimizer.step()
    optimizer.eval()
    learn(reference, plain, 3)
    assert same(everything(model, optimizer), everything(reference, plain))


@pytest.mark.parametrize("style", ["looking", "contexts", "train()"])
def test_batch_norm_statistics_are_not_parameters(style):
    """In training they average what the samples give, and neither leaving nor steps touch them."""
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    layer, norm, x = model[0], model[1], X.double()
    optimizer = make(model)
    rest = layer(x).mean(0)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    optimizer.train(style == "train()")
    for _ in range(3):
        with optimizer.sampled_params() if style == "looking" else sampled(optimizer):
            h = x @ layer.weight.detach().T + layer.bias.detach()
            mean, variance = mean.lerp(h.mean(0), 0.1), variance.lerp(h.var(0), 0.1)
            assert ((h.mean(0) - rest).abs() > 1e-4).all()
            model(x).square().mean().backward()
            inside = [b.clone() for b in model.buffers()]
        if style == "looking":
            optimizer.zero_grad()
        optimizer.step()
        assert same(inside, list(model.buffers()))
    optimizer.eval()
    assert_close([norm.running_mean, norm.running_var], [mean, variance])
    assert norm.num_batches_tracked == 3
    model.eval()
    with optimizer.sampled_params():
        model(x)
    assert same(inside, list(model.buffers()))


def test_no_weight_decay_for_some_is_a_group():
    model = network()
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias], "weight_decay": 0.0}]
    optimizer = blr.IVON(groups, lr=1.0, ess=10, weight_decay=0.5, rescale_lr=False)
    before = weights(model[0])
    with optimizer.sampled_params(train=True):
        for p in model[0].parameters():
            p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before[0] * (1 - 0.5 / 1.5))
    assert torch.equal(model[0].bias, before[1])


# ---- saving, copying, reproducing ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("style", ["contexts", "train()"])
@pytest.mark.parametrize("prior", [False, True])
def test_resuming_from_the_state_dict_alone_is_exact_to_the_bit(dtype, style, prior):
    def fresh():
        model = network(dtype)
        extra = {"prior": blr.DiagonalGaussian.from_moments([0.1] * 21, 3.0)} if prior else {}
        return model, make(model, **extra)

    def continue_for(model, optimizer, steps):
        if style == "contexts":
            return learn(model, optimizer, steps)
        optimizer.train()
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    model, optimizer = fresh()
    continue_for(model, optimizer, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    continue_for(model, optimizer, 3)
    file.seek(0)
    torch.manual_seed(99)
    other = network(dtype)
    nn.init.zeros_(other[0].weight)
    resumed = make(other, lr=0.9, seed=5)
    weight, state = torch.load(file, weights_only=True)
    other.load_state_dict(weight)
    resumed.load_state_dict(state)
    continue_for(other, resumed, 3)
    optimizer.eval()
    resumed.eval()
    assert same(everything(model, optimizer), everything(other, resumed))


def test_distributed_checkpoints_take_and_give_the_state():
    """In one process; they fill states that are empty by a step of their own, so none may be."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, other = network(), network()
    optimizer, resumed = make(model), make(other, lr=0.9, seed=5)
    learn(model, optimizer, 3)
    before = everything(model, optimizer)
    weight, state = copy.deepcopy(get_state_dict(model, optimizer))
    assert same(everything(model, optimizer), before)
    set_state_dict(other, resumed, model_state_dict=weight, optim_state_dict=state)
    learn(model, optimizer, 2)
    learn(other, resumed, 2)
    assert same(everything(model, optimizer), everything(other, resumed))


def test_the_mean_is_saved_once():
    model = network()
    optimizer = make(model)
    learn(model, optimizer)
    assert {*optimizer.state_dict()["state"][0]} == {"hess", "momentum"}
    optimizer.train()
    assert {*optimizer.state_dict()["state"][0]} == {"hess", "momentum", "mean"}


@pytest.mark.parametrize("style", ["contexts", "train()"])
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_continue_alike_and_apart(clone, style):
    model = network()
    optimizer = make(model)
    learn(model, optimizer)
    if style == "train()":
        optimizer.train()
    other, twin = clone((model, optimizer))
    optimizer.eval()
    learn(model, optimizer, 2)
    twin.eval()
    learn(other, twin, 2)
    assert same(everything(model, optimizer), everything(other, twin))
    learn(model, optimizer)
    assert not same(weights(model), weights(other))


def test_seeds_make_the_noise_and_equal_seeds_equal_noise():
    samples = []
    for seed in (0, 0, 1):
        model = network()
        with make(model, seed=seed).sampled_params():
            samples.append(weights(model))
    assert same(samples[0], samples[1]) and moved(samples[0], samples[2])


def test_the_random_numbers_of_dropout_and_of_the_data_are_not_touched():
    model = network()
    optimizer = make(model)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    learn(model, optimizer, 2)
    optimizer.train()
    optimizer.eval()
    assert torch.equal(torch.get_rng_state(), before)


def test_looking_at_samples_does_not_change_the_training():
    model, reference = network(), network()
    optimizer, plain = make(model), make(reference)
    for _ in range(3):
        for _ in range(2):
            with optimizer.sampled_params():
                loss_of(model)
        learn(model, optimizer)
    learn(reference, plain, 3)
    assert same(everything(model, optimizer)[:-1], everything(reference, plain)[:-1])


# ---- errors at the door -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"lr must be at least 0, got -0.1; pass"),
        ({"lr": "fast"}, r"lr must be a number, got 'fast'; pass"),
        ({"ess": 0}, r"ess must be greater than 0, got 0; pass the number of training examples"),
        ({"ess": float("inf")}, r"ess must be greater than 0, got inf"),
        ({"hess_init": 0.0}, r"hess_init must be greater than 0, got 0.0; pass"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0.9, 1.0\); pass"),
        ({"betas": 0.9}, r"betas must be a pair of numbers, got 0.9; pass"),
        ({"weight_decay": -1e-4}, r"weight_decay must be at least 0, got -0.0001; pass 0"),
        ({"weight_decay": float("nan")}, r"weight_decay must be at least 0, got nan"),
        ({"clip_radius": 0}, r"clip_radius must be greater than 0, got 0; pass float\('inf'\)"),
        ({"seed": 1.5}, r"seed must be an integer, got 1.5; pass"),
        ({"fused": "yes"}, r"fused must be True, False or None, got 'yes'; leave"),
        ({"capturable": True}, r"capturable=True .*; "),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_named_with_its_value_and_the_remedy(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(network(), **options)
    optimizer = make(network())
    count = len(optimizer.param_groups)
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.add_param_group({"params": nn.Linear(1, 1).parameters(), **options})
    assert len(optimizer.param_groups) == count


def test_parameters_that_cannot_have_a_posterior_are_refused():
    with pytest.raises(TypeError, match=r"params must be real floating-point.*complex64"):
        blr.IVON([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], lr=0.1, ess=1)
    layer = nn.Embedding(4, 2, sparse=True)
    optimizer = make(layer)
    with optimizer.sampled_params(train=True):
        layer(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()


# ---- side by side -------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]


def test_the_published_comparison_names_tests_that_exist_and_claims_what_the_probes_find(
    monkeypatch,
):
    """`book/results/contract.json`, which a chapter shows, was made by `benchmarks/contract.py`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import contract

    rows = json.loads((ROOT / "book" / "results" / "contract.json").read_text("utf-8"))["rows"]
    assert [row["behaviour"] for row in rows] == [name for name, _, _ in contract.PROBES]
    for row, (_, probe, test) in zip(rows, contract.PROBES, strict=True):
        file, name = test.split("::")
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert name in {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
        assert row["test"] == test
        assert row["blr"] == contract.tried(probe, contract.OURS) == "holds", row["behaviour"]

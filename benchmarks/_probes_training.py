"""Probes of the contract, second part: gradients that others change, types, models, noise."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from _probes import HOLDS, Make, X, Y, apart, equal, learn, loss_of, network, sample, weights
from torch import Tensor, nn

import blr

# ---- gradients that others change ---------------------------------------------------------------


def difference(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.cat([(x - y).flatten() for x, y in zip(a, b, strict=True)])


def loss_scaler(make: Make) -> str:
    changes = []
    for scale in (1.0, 1024.0):
        model = network(torch.float64)
        optimizer = make(model.parameters(), weight_decay=0.0, betas=(0.9, 0.999999))
        before = weights(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with sample(optimizer):
            optimizer.zero_grad()
            scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
        changes.append(difference(weights(model), before))
    ratio = (changes[1].norm() / changes[0].norm()).item()
    return HOLDS if abs(ratio - 1) < 1e-6 else f"a loss scaled by 1024 makes a step ×{ratio:.0f}"


def clipping(make: Make) -> str:
    changes = []
    for clip in (False, True):
        model = network(torch.float64)
        optimizer = make(model.parameters(), weight_decay=0.0, betas=(0.9, 0.999999))
        before = weights(model)
        with sample(optimizer):
            (50 * loss_of(model)).backward()
        if clip:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1).item()
        optimizer.step()
        changes.append(difference(weights(model), before))
    ratio = (changes[1].norm() / changes[0].norm()).item()
    expected = 0.1 / norm
    return HOLDS if abs(ratio / expected - 1) < 0.01 else f"the step is ×{ratio:.2f}"


def accumulation(make: Make) -> str:
    """Micro-batches at one sample are the full batch."""
    results = []
    for parts in (1, 3):
        model = network(torch.float64)
        optimizer = make(model.parameters())
        for t in range(3):
            with sample(optimizer, t):
                optimizer.zero_grad()
                for i in range(parts):
                    rows = slice(12 // parts * i, 12 // parts * (i + 1))
                    (loss_of(model, rows) / parts).backward()
            optimizer.step()
        results.append(weights(model))
    return equal(*results, "weights differ", 1e-10)


def accumulation_of_samples(make: Make) -> str:
    """A sample for each micro-batch, gradients left to add up, is the average of samples."""
    results = []
    for add in (False, True):
        model = network(torch.float64)
        optimizer = make(model.parameters(), samples=3)
        for t in range(3):
            optimizer.zero_grad()
            for i in range(3):
                with sample(optimizer, 3 * t + i):
                    if not add:
                        optimizer.zero_grad()
                    value = loss_of(model, slice(4 * i, 4 * i + 4))
                    (value / 3 if add else value).backward()
            optimizer.step()
        results.append(weights(model))
    return equal(*results, "weights differ", 1e-10)


def skipped_step(make: Make) -> str:
    """A step that the loss scaler skips leaves no trace in the next."""
    results = []
    for overflow in (False, True):
        model = network()
        optimizer = make(model.parameters())
        learn(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        for value in (float("inf"), 1.0) if overflow else (1.0,):
            with sample(optimizer, 1):
                optimizer.zero_grad()
                scaler.scale(value * loss_of(model)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(weights(model))
    lost = sum(int(w.isnan().sum()) for w in results[1])
    return f"{lost} of 21 weights are NaN" if lost else equal(*results, "weights differ", 1e-6)


def not_finite(make: Make) -> str:
    model = network()
    optimizer = make(model.parameters())
    learn(model, optimizer)
    before = weights(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with sample(optimizer):
            optimizer.zero_grad()
            (float("nan") * loss_of(model)).backward()
        optimizer.step()
    lost = sum(int(w.isnan().sum()) for w in weights(model))
    if lost:
        return f"{lost} of {sum(w.numel() for w in before)} weights are NaN"
    learn(model, optimizer)
    if any(not w.isfinite().all() for w in weights(model)):
        return "weights are NaN a step later"
    return HOLDS if told else "it is not told"


def schedulers(make: Make) -> str:
    model = network()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for _ in range(3):
        learn(model, optimizer)
        schedule.step()
    before = weights(model)
    learn(model, optimizer)
    return equal(weights(model), before, "a rate of zero moves weights", 1e-12)


# ---- types and models ---------------------------------------------------------------------------


def mixed_types(make: Make) -> str:
    model = network()
    model[2].double()
    optimizer = make(model.parameters())
    before = weights(model)
    with sample(optimizer):
        model[2](model[1](model[0](X)).double()).square().mean().backward()
    optimizer.step()
    return HOLDS if apart(weights(model), before) else "nothing is learned"


def short(make: Make, steps: int) -> tuple[Tensor, Tensor]:
    """(change of the mean, change of the precision), each of float32 and of bf16 parameters."""
    means, precisions = [], []
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.ones(500, dtype=dtype))
        optimizer = make([p], lr=1e-4, ess=50.0, hess_init=1.0, betas=(0.9, 0.99999))
        before = make.precision(optimizer).clone()
        for t in range(steps):
            with sample(optimizer, t):
                optimizer.zero_grad()
                (2.0 * p.float().square()).sum().backward()
            optimizer.step()
        means.append((p.detach().float() - 1).mean())
        precisions.append((make.precision(optimizer).float() - before.float()).mean())
    return torch.stack(means), torch.stack(precisions)


def short_curvature(make: Make) -> str:
    """With bf16 parameters the curvature moves as it does with float32."""
    full, half = short(make, 100)[1].tolist()
    share = half / full
    return HOLDS if abs(share - 1) < 0.1 else f"it moves {round(100 * share)}% of the way"


def short_mean(make: Make) -> str:
    """With bf16 parameters, steps below their resolution add up."""
    full, half = short(make, 100)[0].tolist()
    share = half / full
    return HOLDS if abs(share - 1) < 0.1 else f"it moves {round(100 * share)}% of the way"


def later_type(make: Make) -> str:
    model = network()
    optimizer = make(model.parameters())
    learn(model, optimizer)
    model.double()
    before = weights(model)
    learn(model, optimizer)
    return HOLDS if apart(weights(model), before) else "nothing is learned"


def autocast(make: Make) -> str:
    model = network()
    optimizer = make(model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = []
        for seed in range(3):
            with sample(optimizer, seed, train=False):
                outputs.append(model(X))
    same = torch.equal(outputs[0], outputs[1]) or torch.equal(outputs[1], outputs[2])
    return HOLDS if not same else "all samples give the same outputs"


def compiled(make: Make) -> str:
    results = []
    for compile_it in (False, True):
        model = network()
        optimizer = make(model.parameters())
        f = torch.compile(model, backend="eager") if compile_it else model
        for t in range(3):
            with sample(optimizer, t):
                optimizer.zero_grad()
                (f(X) - Y).square().mean().backward()
            optimizer.step()
        results.append(weights(model))
    return equal(*results, "weights differ")


def parametrised(make: Make) -> str:
    model = network()
    nn.utils.parametrizations.weight_norm(model[0])
    optimizer = make(model.parameters())
    before, outputs = weights(model), model(X).detach()
    with sample(optimizer, train=False):
        if torch.equal(model(X), outputs):
            return "the model does not see the sample"
    learn(model, optimizer, 2)
    return HOLDS if apart(weights(model), before) else "nothing is learned"


def batch_norm(make: Make) -> str:
    """In training they are what the sample gives, and leaving it does not touch them."""
    layer, norm = nn.Linear(2, 4), nn.BatchNorm1d(4)
    model = nn.Sequential(layer, norm, nn.Linear(4, 1))
    optimizer = make(model.parameters())
    rest = layer(X).detach()
    with sample(optimizer, train=False):
        hidden = layer(X).detach()
        model(X)
    if torch.equal(hidden, rest):
        return "the model does not see the sample"
    expected = [0.1 * hidden.mean(0), 0.9 + 0.1 * hidden.var(0)]
    assert norm.running_mean is not None and norm.running_var is not None
    return equal([norm.running_mean, norm.running_var], expected, "they are off", 1e-6)


# ---- noise and posterior ------------------------------------------------------------------------


def width(optimizer: Any, p: Tensor) -> Tensor:
    """Standard deviations as the samples show them: |θ − m| averaged, in the scale of σ."""
    mean, moves = p.detach().clone(), []
    for seed in range(64):
        with sample(optimizer, seed, train=False):
            moves.append((p.detach() - mean).float().abs())
    return torch.stack(moves).mean(0) * (torch.pi / 2) ** 0.5


def untouched_generator(make: Make) -> str:
    model = network()
    optimizer = make(model.parameters())
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with optimizer.sampled_params(train=True):
        loss_of(model).backward()
    optimizer.step()
    same = torch.equal(torch.get_rng_state(), before)
    return HOLDS if same else "the noise draws from the global generator"


def own_seed(make: Make) -> str:
    samples = []
    for seed, other in ((3, 0), (3, 1), (4, 0)):
        model = network()
        optimizer = make(model.parameters(), seed=seed)
        torch.manual_seed(other)
        with optimizer.sampled_params():
            samples.append(weights(model))
    if apart(samples[0], samples[1]):
        return "the global generator matters"
    return HOLDS if apart(samples[0], samples[2]) else "the seed does not matter"


def looking(make: Make) -> str:
    results = []
    for look in (False, True):
        model = network()
        optimizer = make(model.parameters())
        torch.manual_seed(5)
        for _ in range(3):
            if look:
                with optimizer.sampled_params():
                    pass
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss_of(model).backward()
            optimizer.step()
        results.append(weights(model))
    return equal(*results, "weights differ after three steps")


def positive(make: Make) -> str:
    """The precision keeps at least half of its value in a step, however long the gradient."""
    for size in (1e-3, 1.0, 1e3, 1e6):
        p = nn.Parameter(torch.zeros(200, dtype=torch.float64))
        optimizer = make([p], lr=0.0, ess=1.0, betas=(0.9, 0.5), weight_decay=0.01)
        before = make.precision(optimizer).clone()
        with sample(optimizer):
            p.grad = size * torch.linspace(-1, 1, 200, dtype=torch.float64)
        optimizer.step()
        share = (make.precision(optimizer) / before).min().item()
        if share < 0.5 - 1e-6:
            return f"×{share:.2g} in a step"
    return HOLDS


def accessor(make: Make) -> str:
    p = nn.Parameter(torch.zeros(4000))
    optimizer = make([p], ess=30.0, hess_init=0.7, weight_decay=0.3)
    sigma = optimizer.posterior().precision.rsqrt().mean()
    ratio = (width(optimizer, p).mean() / sigma).item()
    return HOLDS if abs(ratio - 1) < 0.02 else f"samples are ×{ratio:.2f} as wide as it says"


def own_prior(make: Make) -> str:
    p = nn.Parameter(torch.zeros(3))
    prior = blr.DiagonalGaussian.from_moments([1.0, 2.0, 3.0], [5.0, 6.0, 7.0])
    optimizer = make([p], ess=10.0, hess_init=2.0, prior=prior)
    expected = prior.precision.float() + 20
    return equal([optimizer.posterior().precision], [expected], "the precision is off", 1e-5)


def option_errors(make: Make) -> str:
    for name, bad in (("lr", -0.125), ("ess", -3.0), ("hess_init", -0.5), ("weight_decay", -0.25)):
        try:
            make(network().parameters(), **{name: bad})
        except (ValueError, TypeError) as error:
            if f"{bad:g}" not in str(error):
                return f"{name} = {bad:g} is refused without its value"
        else:
            return f"{name} = {bad:g} is accepted"
    return HOLDS


def accelerate_prepare(make: Make) -> str:
    """`accelerate.prepare` reads the state and writes it back; nothing may change by that."""
    from accelerate import Accelerator

    results = []
    for prepare in (False, True):
        model = network()
        optimizer = make(model.parameters())
        learn(model, optimizer, 2)
        if prepare:
            Accelerator(cpu=True).prepare(optimizer)
        learn(model, optimizer, 2, first=2)
        results.append(weights(model))
    return equal(*results, "weights differ after two steps")


def distributed_state(make: Make) -> str:
    """torch's distributed checkpoints take and give the state of an optimizer."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, other = network(), network()
    optimizer, resumed = make(model.parameters()), make(other.parameters())
    learn(model, optimizer, 3)
    before = weights(model)
    weight, state = get_state_dict(model, optimizer)
    if apart(weights(model), before):
        return "saving moves the parameters"
    weight, state = copy.deepcopy((weight, state))
    set_state_dict(other, resumed, model_state_dict=weight, optim_state_dict=state)
    for net, o in ((model, optimizer), (other, resumed)):
        learn(net, o, 1, first=3)
    return equal(weights(model), weights(other), "weights differ after one step")

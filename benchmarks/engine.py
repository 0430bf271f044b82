"""What the engine costs over the update written by hand, at 10⁶ parameters.

    python benchmarks/engine.py [--json FILE]

`blr.run` with a recipe against the same mathematics in a few lines of torch, from one start, with
the same gradients, to the same point. The lines are written twice: as expressions, the way a page
has them, and `tuned`, in place wherever torch can be. Once with a loss that costs next to nothing,
where only the update is measured, and once with a network of 10⁶ parameters and minibatches of 128.
One thread; all are timed in turn, and `gradient_share` is the part of the tuned time that goes into
the gradient, which all spend alike. `sgd` is a `FixedGaussian` whose precision is a number, with a
heavy ball; `rule` is `blr.Rule` with squared gradients as curvature.

Where the rest goes: not into Python, but into passes over memory. Tuned lines change m and s where
they are. Here a posterior is a new object at every step that can be kept, as any member of a
family, by its λ alone: λ = (sm, −½s) is written to new memory, read again by its checks, and turned
back into m by whoever evaluates a gradient. `Rule` has nothing but λ, and also takes ∇_μ to pieces
and together again; `DiagonalRule` keeps m and s itself. `passes` counts the operations on whole
vectors in a step, and how many of them write to new memory. The lines by hand keep no earlier m,
and so the engine keeps no earlier posterior, as in `for q in blr.run(…)`; those that a list keeps
take memory that the system has to hand out page by page, which may take longer than the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _machine import in_turn, provenance, ratio, report
from torch import Tensor
from torch.func import grad
from torch.utils._python_dispatch import TorchDispatchMode

import blr
from blr import gradients, recipes
from blr.likelihoods import TotalLoss, from_module, softmax

STEPS = 10
ROUNDS = 31


# ---- by hand, as expressions --------------------------------------------------------------------


def rule_by_hand(losses: Any, m: Tensor) -> Tensor:
    """s ← (1 − ρ)s + ρg², m ← m − ρg/s."""
    s, rho = torch.full_like(m, 50.0), 0.1
    for _ in range(STEPS):
        g = grad(next(losses))(m)
        s = (1 - rho) * s + rho * g**2
        m = m - rho * g / s
    return m


def sgd_by_hand(losses: Any, m: Tensor) -> Tensor:
    """A heavy ball."""
    ball = torch.zeros_like(m)
    for _ in range(STEPS):
        ball = 0.9 * ball + grad(next(losses))(m)
        m = m - 1e-3 * ball
    return m


def adam_by_hand(losses: Any, m: Tensor) -> Tensor:
    """Adam as its paper writes it."""
    gbar, v = torch.zeros_like(m), torch.zeros_like(m)
    for t in range(1, STEPS + 1):
        g = grad(next(losses))(m)
        gbar = 0.9 * gbar + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        m = m - 1e-3 * (gbar / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return m


def ivon_by_hand(losses: Any, m: Tensor) -> Tensor:
    """IVON with one sample, without a prior."""
    source, b1, rho = torch.Generator().manual_seed(0), 0.9, 1e-3
    gbar, s = torch.zeros_like(m), torch.full_like(m, 50.0)
    for t in range(1, STEPS + 1):
        theta = m + torch.randn(m.shape, generator=source) / s.sqrt()
        g = grad(next(losses))(theta)
        h = g * (theta - m) * s
        s = (1 - rho) * s + rho * h + 0.5 * rho**2 * (s - h) ** 2 / s
        gbar = b1 * gbar + (1 - b1) * g
        m = m - 1e-2 * (gbar / (1 - b1**t)) / s
    return m


# ---- by hand, tuned -----------------------------------------------------------------------------


def rule_tuned(losses: Any, m: Tensor) -> Tensor:
    """s ← (1 − ρ)s + ρg², m ← m − ρg/s."""
    m, s, rho = m.clone(), torch.full_like(m, 50.0), 0.1
    for _ in range(STEPS):
        g = grad(next(losses))(m)
        s.mul_(1 - rho).addcmul_(g, g, value=rho)
        m.addcdiv_(g, s, value=-rho)
    return m


def sgd_tuned(losses: Any, m: Tensor) -> Tensor:
    """A heavy ball."""
    m, ball = m.clone(), torch.zeros_like(m)
    for _ in range(STEPS):
        m.sub_(ball.mul_(0.9).add_(grad(next(losses))(m), alpha=1e-3))
    return m


def adam_tuned(losses: Any, m: Tensor) -> Tensor:
    """Adam."""
    m, gbar, v = m.clone(), torch.zeros_like(m), torch.zeros_like(m)
    for t in range(1, STEPS + 1):
        g = grad(next(losses))(m)
        gbar.mul_(0.9).add_(g, alpha=0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        divisor = (v / (1 - 0.999**t)).sqrt_().add_(1e-8)
        m.addcdiv_(gbar, divisor, value=-1e-3 / (1 - 0.9**t))
    return m


def ivon_tuned(losses: Any, m: Tensor) -> Tensor:
    """IVON with one sample, without a prior."""
    source, b1, rho = torch.Generator().manual_seed(0), 0.9, 1e-3
    m, gbar, s = m.clone(), torch.zeros_like(m), torch.full_like(m, 50.0)
    for t in range(1, STEPS + 1):
        move = torch.randn(m.shape, generator=source).mul_(s.rsqrt())
        g = grad(next(losses))(m + move)
        h = move.mul_(s).mul_(g)
        retraction = (s - h).square_().div_(s)
        s.mul_(1 - rho).add_(h, alpha=rho).add_(retraction, alpha=0.5 * rho**2)
        gbar.mul_(b1).add_(g, alpha=1 - b1)
        m.addcdiv_(gbar, s, value=-1e-2 / (1 - b1**t))
    return m


def gradient_alone(losses: Any, m: Tensor) -> Tensor:
    """The gradients, and no update."""
    for _ in range(STEPS):
        grad(next(losses))(m)
    return m


BY_HAND = {"sgd": sgd_by_hand, "rule": rule_by_hand, "adam": adam_by_hand, "ivon": ivon_by_hand}
TUNED = {"sgd": sgd_tuned, "rule": rule_tuned, "adam": adam_tuned, "ivon": ivon_tuned}


# ---- with the engine ----------------------------------------------------------------------------

SQUARED = gradients.squared_batch_gradient
RECIPES: dict[str, Callable[[], Any]] = {
    "sgd": lambda: recipes.gradient_descent(lr=1e-3, momentum=0.9),
    "rule": lambda: blr.Rule(partial(gradients.delta, curvature=SQUARED), lr=0.1),
    "adam": recipes.adam,
    "ivon": lambda: recipes.ivon(
        lr=1e-2, betas=(0.9, 0.999), generator=torch.Generator().manual_seed(0)
    ),
}


def with_engine(name: str, loss: Any, m: Tensor, batch: int | None, keep: int | None = 1) -> Tensor:
    """The mean after the same steps of `blr.run`, whose last posteriors are kept; all for None."""
    q: Any = blr.DiagonalGaussian.from_moments(m, 50.0)
    if name == "sgd":
        q = blr.FixedGaussian.from_moments(m, 1.0)
    source = torch.Generator().manual_seed(1)
    posteriors = blr.run(RECIPES[name](), loss, q, STEPS, batch=batch, generator=source)
    return deque(posteriors, maxlen=keep)[-1].mean


class Passes(TorchDispatchMode):
    """Counts operations whose result is a vector of P entries, and those that make a new one."""

    def __init__(self, P: int) -> None:
        super().__init__()
        self.P, self.all, self.new = P, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count it if it is no view."""
        out = func(*args, **(kwargs or {}))
        whole = any(isinstance(x, Tensor) and x.numel() == self.P for x in (out, *args))
        if whole and not func.is_view and func is not torch.ops.aten.new_zeros.default:
            self.all += 1
            self.new += isinstance(out, Tensor) and out.numel() == self.P and is_new(out, args)
        return out


def is_new(out: Tensor, args: Any) -> bool:
    """Whether a result has memory of its own."""
    return all(out.data_ptr() != x.data_ptr() for x in args if isinstance(x, Tensor))


def passes(f: Callable[[], Any], P: int) -> dict[str, float]:
    """Passes over all parameters in a step, start and end included."""
    with Passes(P) as count:
        f()
    return {"all": round(count.all / STEPS, 1), "new": round(count.new / STEPS, 1)}


# ---- the two problems ---------------------------------------------------------------------------


def cheap() -> tuple[Any, Tensor, None]:
    """½‖θ − a‖² of 10⁶ parameters."""
    a = torch.randn(10**6, generator=torch.Generator().manual_seed(2))
    return (lambda theta: 0.5 * ((theta - a) ** 2).sum()), torch.zeros(10**6), None


def network() -> tuple[Any, Tensor, int]:
    """Three layers on 1,024 random images in ten classes, minibatches of 128."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(
        torch.nn.Linear(784, 700),
        torch.nn.ReLU(),
        torch.nn.Linear(700, 630),
        torch.nn.ReLU(),
        torch.nn.Linear(630, 10),
    )
    model, theta = from_module(net)
    loss = TotalLoss(model, softmax, torch.randn(1024, 784), torch.randint(10, (1024,)))
    return loss, theta, 128


def losses(loss: Any, batch: int | None) -> Any:
    """The losses that `run` takes."""
    if batch is None:
        return iter(lambda: loss, None)
    return loss.minibatches(batch, torch.Generator().manual_seed(1))


def compare(loss: Any, m: Tensor, batch: int | None) -> dict[str, Any]:
    """The ratios of each recipe, and whether all ways end at the same point."""
    found: dict[str, Any] = {"P": len(m)}
    for name in RECIPES:
        ways: dict[str, Callable[[], Tensor]] = {
            "hand": lambda: BY_HAND[name](losses(loss, batch), m),  # noqa: B023
            "tuned": lambda: TUNED[name](losses(loss, batch), m),  # noqa: B023
            "engine": lambda: with_engine(name, loss, m, batch),  # noqa: B023
        }
        times = in_turn(ROUNDS, **ways, gradient=lambda: gradient_alone(losses(loss, batch), m))
        end = {way: f() for way, f in ways.items()}
        moved = (end["tuned"] - m).abs().max()
        gap = max((end[way] - end["tuned"]).abs().max() / moved for way in ("hand", "engine"))
        found[name] = {
            "milliseconds_by_hand": round(1e3 * min(times["hand"]) / STEPS, 3),
            "engine_over_hand": ratio(times["engine"], times["hand"]),
            "engine_over_tuned": ratio(times["engine"], times["tuned"]),
            "gradient_share": round(min(times["gradient"]) / min(times["tuned"]), 2),
            "passes": {way: passes(f, len(m)) for way, f in ways.items()},
            "largest_deviation": float(f"{gap:.1e}"),
        }
    return found


def measure() -> dict[str, Any]:
    """Both problems, on one thread."""
    torch.set_num_threads(1)
    return {**provenance(), "cheap_loss": compare(*cheap()), "network": compare(*network())}


if __name__ == "__main__":
    report(__doc__, measure)

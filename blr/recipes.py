"""The table: learning algorithms as instances of one rule.

    algorithm  =  family  ×  approximation of ∇_μ E_q[ℓ̄]  ×  liberties  ×  schedule

Each row of `TABLE` names its parts and builds its recipe; `run` runs any of them. The tests go
through the rows and hold each against its oracle, an independent implementation or a known answer.

References: Khan & Rue (2023), The Bayesian learning rule, table 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import tqdm

from blr import _tree
from blr.diagonal import DiagonalRule
from blr.expfam import ExponentialFamily
from blr.families.gaussian import DiagonalGaussian, FixedGaussian, Gaussian
from blr.gradients import (
    at_mean,
    at_samples,
    delta,
    exact,
    squared_batch_gradient,
    squared_gradients,
)
from blr.likelihoods import TotalLoss
from blr.rule import Rule


class Recipe(Protocol):
    """What `run` can run: `Rule`, `DiagonalRule`, or anything with their method."""

    def posteriors(self, losses: Iterable[Any], q: Any) -> Iterator[Any]:
        """q after each step, one step for each of `losses`."""
        ...


def run(
    recipe: Recipe,
    loss: Any,
    q: Any,
    steps: int,
    *,
    batch: int | None = None,
    generator: torch.Generator | None = None,
    tolerance: float | None = None,
    progress: bool | None = None,
) -> Iterator[Any]:
    """The posteriors of a recipe, one after each step.

    They come as they are computed: `for q in blr.run(…)` can be left at any step, `list` keeps all.

    Args:
        recipe: A `Rule`, a `DiagonalRule`, or what a row of `TABLE` builds.
        loss: ℓ̄ as a function of θ, a `TotalLoss`; for the gradient `exact`, E_q[ℓ̄] as a function
            of μ.
        q: Posterior to start from; it is not among those that are yielded.
        steps: Most steps to make.
        batch: Examples in a minibatch of a `TotalLoss`; all at each step if missing.
        generator: Source of the minibatches.
        tolerance: Stop when a step changes no natural parameter by more than this times 1 + |λ|.
        progress: Show a progress bar; if missing, on a terminal, after two seconds.

    Raises:
        TypeError: If `batch` is given for a loss that does not know its examples.
        ValueError: If a step leaves the domain of the family: which step, and what to change.
    """
    if batch is not None and not isinstance(loss, TotalLoss):
        raise TypeError(f"batch needs a TotalLoss, got {type(loss).__name__}; or leave batch out")
    losses = itertools.repeat(loss) if batch is None else loss.minibatches(batch, generator)
    return _run(recipe, itertools.islice(losses, steps), q, steps, tolerance, progress)


def _run(
    recipe: Recipe,
    losses: Iterable[Any],
    q: Any,
    steps: int,
    tolerance: float | None,
    progress: bool | None,
) -> Iterator[Any]:
    posteriors = recipe.posteriors(losses, q)
    hidden = None if progress is None else not progress
    with tqdm.tqdm(total=steps, disable=hidden, delay=0 if progress else 2, leave=False) as bar:
        for t in range(1, steps + 1):
            before = q
            try:
                q = next(posteriors)
            except ValueError as error:
                raise ValueError(f"step {t}: {error}") from error
            bar.update()
            yield q
            if tolerance is not None and _change(before, q) <= tolerance:
                return


def _change(before: ExponentialFamily, after: ExponentialFamily) -> float:
    pairs = zip(_tree.leaves(before.natural), _tree.leaves(after.natural), strict=True)
    return max(((b - a).abs() / (1 + a.abs())).max().item() for a, b in pairs)


# ---- the recipes --------------------------------------------------------------------------------


def gradient_descent(lr: float = 0.1, momentum: float = 0.0) -> Rule:
    """m ← m − ρS₀⁻¹∇ℓ̄(m) + γ(m − m_previous): gradient descent and, on minibatches, SGD."""
    return Rule(delta, lr=lr, momentum=momentum)


def newton() -> Rule:
    """S ← ∇²ℓ̄(m), m ← m − S⁻¹∇ℓ̄(m)."""
    return Rule(delta)


def laplace(lr: float = 0.5) -> Rule:
    """S ← (1 − ρ)S + ρ∇²ℓ̄(m), m ← m − ρS⁻¹∇ℓ̄(m): at rest, Laplace's approximation."""
    return Rule(delta, lr=lr)


def bayes() -> Rule:
    """λ ← −∇_μE_q[ℓ̄ + log h] = λ₀ + Σᵢ λ̃ᵢ: Bayes' rule, in one step from anywhere."""
    return Rule(exact)


def rmsprop(lr: float = 0.01, alpha: float = 0.99, eps: float = 1e-8) -> DiagonalRule:
    """s ← αs + (1 − α)ĝ², m ← m − lr ĝ/(√s + ε)."""
    return DiagonalRule(
        partial(at_mean, curvature=squared_batch_gradient),
        lr=1 - alpha,
        lr_mean=lr,
        initial=0.0,
        root=True,
        eps=eps,
    )


def adam(
    lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> DiagonalRule:
    """RMSprop with momentum, and with both averages corrected for their start at zero."""
    return DiagonalRule(
        partial(at_mean, curvature=squared_batch_gradient),
        lr=1 - betas[1],
        lr_mean=lr,
        momentum=betas[0],
        initial=0.0,
        debias=True,
        root=True,
        eps=eps,
    )


def ogn(lr: float = 0.1, beta: float = 0.01) -> DiagonalRule:
    """s ← (1 − β)s + β(Σᵢ gᵢ² + δ), m ← m − α ∇ℓ̄(m)/s: online Gauss–Newton."""
    return DiagonalRule(partial(at_mean, curvature=squared_gradients), lr=beta, lr_mean=lr)


def vogn(
    lr: float = 0.1,
    beta: float = 0.01,
    momentum: float = 0.0,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> DiagonalRule:
    """OGN at samples θ ~ q: variational online Gauss–Newton."""
    derivatives = partial(
        at_samples, num_samples=num_samples, generator=generator, curvature=squared_gradients
    )
    return DiagonalRule(derivatives, lr=beta, lr_mean=lr, momentum=momentum)


# ---- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of the table, as data.

    Args:
        name: Name of the algorithm.
        section: Section of Khan & Rue (2023).
        family: Family of the posterior; the base class stands for any of them.
        gradient: Approximation of ∇_μ E_q[ℓ̄], and what stands for ∇²ℓ̄.
        liberties: Departures from the rule; none if empty.
        schedule: Learning rates and data of each step.
        build: The recipe, from its hyperparameters.
        oracle: What the tests hold it against.
        reference: Where the algorithm comes from.
    """

    name: str
    section: str
    family: type[ExponentialFamily]
    gradient: str
    liberties: tuple[str, ...]
    schedule: str
    build: Callable[..., Recipe]
    oracle: str
    reference: str


TABLE: tuple[Row, ...] = (
    Row(
        name="Gradient descent",
        section="1.3",
        family=FixedGaussian,
        gradient="delta",
        liberties=(),
        schedule="all data, constant ρ",
        build=gradient_descent,
        oracle="torch.optim.SGD on all data, step by step",
        reference="Cauchy (1847)",
    ),
    Row(
        name="Newton",
        section="1.3",
        family=Gaussian,
        gradient="delta, exact Hessian",
        liberties=(),
        schedule="all data, ρ = 1",
        build=newton,
        oracle="textbook Newton by NumPy, step by step; scikit-learn's minimum",
        reference="Nocedal & Wright (2006), section 3.3",
    ),
    Row(
        name="SGD",
        section="4.1",
        family=FixedGaussian,
        gradient="delta",
        liberties=("momentum in λ",),
        schedule="minibatches, constant ρ",
        build=gradient_descent,
        oracle="torch.optim.SGD with momentum on the same minibatches, step by step",
        reference="Robbins & Monro (1951)",
    ),
    Row(
        name="RMSprop",
        section="4.2",
        family=DiagonalGaussian,
        gradient="delta, squared minibatch gradient",
        liberties=("own rate", "√-scale", "starts at zero", "ε"),
        schedule="minibatches, constant ρ",
        build=rmsprop,
        oracle="torch.optim.RMSprop on the same minibatches, step by step",
        reference="Tieleman & Hinton (2012)",
    ),
    Row(
        name="Adam",
        section="4.2",
        family=DiagonalGaussian,
        gradient="delta, squared minibatch gradient",
        liberties=("own rate", "√-scale", "starts at zero", "ε", "momentum", "bias correction"),
        schedule="minibatches, constant ρ",
        build=adam,
        oracle="torch.optim.Adam on the same minibatches, step by step",
        reference="Kingma & Ba (2015)",
    ),
    Row(
        name="OGN",
        section="4.4",
        family=DiagonalGaussian,
        gradient="delta, squared gradients of examples",
        liberties=("own rate",),
        schedule="minibatches, constant ρ",
        build=ogn,
        oracle="the textbook recursion in means per example, by NumPy, step by step",
        reference="Khan et al. (2018); Osawa et al. (2019)",
    ),
    Row(
        name="VOGN",
        section="4.4",
        family=DiagonalGaussian,
        gradient="samples, squared gradients of examples",
        liberties=("own rate", "momentum"),
        schedule="minibatches, constant ρ",
        build=vogn,
        oracle="the textbook recursion in means per example, by NumPy, with the same noise",
        reference="Khan et al. (2018); Osawa et al. (2019)",
    ),
    Row(
        name="Laplace",
        section="4.4",
        family=Gaussian,
        gradient="delta, exact Hessian",
        liberties=(),
        schedule="all data, constant ρ, to convergence",
        build=laplace,
        oracle="scikit-learn's minimum, the Hessian there by NumPy, and its log evidence",
        reference="Laplace (1774); MacKay (1992)",
    ),
    Row(
        name="Conjugate Bayes",
        section="5.1",
        family=ExponentialFamily,
        gradient="exact",
        liberties=(),
        schedule="all data, one step with ρ = 1",
        build=bayes,
        oracle="closed-form posteriors: beta, gamma and Gaussian",
        reference="Bayes (1763); Raiffa & Schlaifer (1961)",
    ),
)

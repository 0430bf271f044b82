"""Run any recipe: posteriors one after another, with minibatches, early stop and a progress bar."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
import tqdm

from blr import _tree, _validate
from blr.expected import ExpectedLoss
from blr.expfam import ExponentialFamily
from blr.likelihoods import TotalLoss


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

    They come as they are computed: `for q in blr.run(…)` can be left at any step, `list`, and
    `*_, q` too, keep all of them in memory.

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
        ValueError: If `steps` is negative; if a step leaves the domain of the family: which step,
            and what to change.
    """
    _validate.number("steps", steps, lambda n: n >= 0, "at least zero")
    if batch is not None and not isinstance(loss, TotalLoss | ExpectedLoss):
        raise TypeError(
            f"batch needs a TotalLoss, got {type(loss).__name__}; pass one, or an ExpectedLoss, "
            "or leave batch out"
        )
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

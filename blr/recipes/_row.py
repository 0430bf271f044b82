"""A row of the table: an algorithm as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blr.recipes._run import Recipe


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
        equation: Label of its equation in the book.
    """

    name: str
    section: str
    family: type[Any]
    gradient: str
    liberties: tuple[str, ...]
    schedule: str
    build: Callable[..., Recipe]
    oracle: str
    reference: str
    equation: str

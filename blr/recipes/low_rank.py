"""SLANG: the rule, projected on precisions that are low-rank plus diagonal.

S ← project_L((1 − ρ)S + ρ(Σᵢ gᵢgᵢᵀ + δI)),  m ← m − αS⁻¹ĝ        the new S, at samples θ ~ q
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from blr import _validate
from blr.families.low_rank import LowRankGaussian
from blr.likelihoods import TotalLoss
from blr.per_example import example_gradients
from blr.recipes._row import Row
from blr.slang import LowRankRule, factored


def slang(
    rank: int = 1,
    lr: float | Callable[[int], float] = 0.05,
    beta: float | Callable[[int], float] = 0.05,
    momentum: float = 0.0,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    rows: Callable[[TotalLoss, Tensor], Tensor] = example_gradients,
) -> LowRankRule:
    """S ← project_L((1 − β)S + β(Σᵢ gᵢgᵢᵀ + δI)), m ← m − lr S⁻¹ĝ, from gradients of examples."""
    # Under the names that they have here.
    _validate.number("lr", lr, lambda x: x > 0, "positive")
    _validate.number("beta", beta, lambda x: 0 <= x <= 1, "between 0 and 1")
    derivatives = partial(factored, num_samples=num_samples, generator=generator, rows=rows)
    return LowRankRule(derivatives, rank, lr=beta, lr_mean=lr, momentum=momentum)


SLANG = Row(
    name="SLANG",
    section="–",
    family=LowRankGaussian,
    gradient="samples, gradients of examples as a factor",
    liberties=("projection", "own rate", "momentum"),
    schedule="minibatches, constant or falling ρ",
    build=slang,
    oracle="the recursion with dense matrices by NumPy, with the same noise",
    reference="Mishkin et al. (2018)",
    equation="eq-br-slang",
)

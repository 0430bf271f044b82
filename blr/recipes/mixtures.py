"""Several minima at once, dropout, and mixtures as approximations of any posterior.

S_k ← S_k + ρ∇²(ℓ̄ + log q)(m_k),  m_k ← m_k − ρS_k⁻¹∇(ℓ̄ + log q)(m_k)     delta, the new S_k
m_j ← m_j − ρs⁻¹(z_j/π)∇_{θ_j}ℓ̄(z∘m)                                     spike and slab
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blr._tree import Tree
from blr.families.mixture import Mixture
from blr.families.spike_and_slab import SpikeAndSlab
from blr.improved import improve
from blr.mixtures import MixtureRule, at_means, at_samples, dropped
from blr.recipes._row import Row
from blr.rule import Rule, learn


def multimodal(
    lr: float | Callable[[int], float] = 0.1,
    weight_rate: float = 0.0,
    step: Callable[[Any, Tree, float, float], Any] = learn,
) -> MixtureRule:
    """S_k ← S_k + ρ∇²(ℓ̄ + log q)(m_k), m_k ← m_k − ρS_k⁻¹∇(ℓ̄ + log q)(m_k): K minima at once."""
    return MixtureRule(at_means, lr, weight_rate=weight_rate, step=step)


def dropout(
    lr: float = 0.1,
    indicators: Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
    temperature: float = 0.0,
) -> Rule:
    """m_j ← m_j − ρs⁻¹(z_j/π)∇_{θ_j}ℓ̄(z∘m), with one mask z at each step.

    Args:
        lr: Learning rate ρ. SGD with inverted dropout and rate α has W = πm and ρ = α/π.
        indicators: Ready-made z, shape (U,), one for each step; sampled from q if missing.
        generator: Source of randomness.
        temperature: Weight of the entropy; 0 is dropout, which takes r_j(m_j) for one, and 1 uses
            the responsibilities as they are.
    """
    ready = None if indicators is None else iter(indicators)
    gradient = partial(dropped, indicators=ready, generator=generator)
    return Rule(gradient, lr=lr, temperature=temperature)


def mixture_vi(
    lr: float | Callable[[int], float] = 0.1,
    weight_rate: float = 1.0,
    num_samples: int = 20,
    generator: torch.Generator | None = None,
    step: Callable[[Any, Tree, float, float], Any] = improve,
) -> MixtureRule:
    """λ_k ← λ_k − ρ∇_{μ_k}E_k[ℓ̄ + log q] with samples of each component, by the improved rule."""
    points = partial(at_samples, num_samples=num_samples, generator=generator)
    return MixtureRule(points, lr, weight_rate=weight_rate, step=step)


MULTIMODAL = Row(
    name="Multimodal optimisation",
    section="3.2",
    family=Mixture,
    gradient="delta at the mean of each component",
    liberties=(),
    schedule="all data, constant ρ, weights kept",
    build=multimodal,
    oracle="the recursion with responsibilities by NumPy, step by step; minima by SciPy",
    reference="Khan & Rue (2023), section 3.2",
    equation="eq-mx-multimodal",
)

DROPOUT = Row(
    name="Dropout",
    section="4.3",
    family=SpikeAndSlab,
    gradient="delta at the means of the slabs, one sample of the indicators",
    liberties=("responsibilities taken to be one",),
    schedule="minibatches, constant ρ",
    build=dropout,
    oracle="torch.nn.Dropout with torch.optim.SGD on the same masks, step by step",
    reference="Srivastava et al. (2014)",
    equation="eq-mx-dropout",
)

NONCONJUGATE_VI = Row(
    name="Non-conjugate VI",
    section="5.4",
    family=Mixture,
    gradient="samples of each component, exact Hessian",
    liberties=("second-order step", "old precision for m"),
    schedule="all data, decreasing ρ",
    build=mixture_vi,
    oracle="the recursion by NumPy with the same noise; quadrature; a posterior in closed form",
    reference="Lin, Khan & Schmidt (2019)",
    equation="eq-mx-improved",
)

"""The improved rule, for Gaussians with full and diagonal precision and for gammas.

S ← S − ρG + ½ρ²GS⁻¹G,  m ← m − ρS⁻¹E_q[∇ℓ̄]           G = S − E_q[∇²ℓ̄], the old S in both
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blr._tree import Tree
from blr.families.gamma import Gamma
from blr.families.gaussian import DiagonalGaussian, Gaussian
from blr.gradients import delta
from blr.improved import improve
from blr.recipes._row import Row
from blr.rule import Rule


def improved(
    lr: float | Callable[[int], float] = 0.1, gradient: Callable[[Any, Any], Tree] = delta
) -> Rule:
    """τ ← τ − ρn − ½ρ²Γ(n, n): the rule along geodesics, to second order."""
    return Rule(gradient, lr=lr, step=improve)


IMPROVED_FULL = Row(
    name="Improved rule, full covariance",
    section="–",
    family=Gaussian,
    gradient="delta or samples, exact Hessian",
    liberties=("second-order step", "old precision for m"),
    schedule="all data, any ρ",
    build=improved,
    oracle="the paper's recursion by NumPy, step by step; the best ELBO by SciPy",
    reference="Lin, Schmidt & Khan (2020)",
    equation="eq-br-improved",
)

IMPROVED_DIAGONAL = Row(
    name="Improved rule, diagonal",
    section="–",
    family=DiagonalGaussian,
    gradient="delta or samples, diagonal of the Hessian",
    liberties=("second-order step", "old precision for m"),
    schedule="all data, any ρ",
    build=improved,
    oracle="the paper's recursion by NumPy, step by step; the best ELBO by SciPy",
    reference="Lin, Schmidt & Khan (2020)",
    equation="eq-br-improved-diagonal",
)

IMPROVED_GAMMA = Row(
    name="Improved rule, gamma",
    section="–",
    family=Gamma,
    gradient="exact",
    liberties=("second-order step",),
    schedule="all data, any ρ",
    build=improved,
    oracle="the geodesic's expansion with F⁻¹ in (a, b/a) by SciPy, step by step; the best ELBO",
    reference="Lin, Schmidt & Khan (2020)",
    equation="eq-br-improved-gamma",
)

"""EM, variational message passing and stochastic variational inference: the rule, block by block.

λ_b ← −∇_{μ_b} E_q[ℓ̄]                                    VMP; for a loss non-linear in μ_b, NCVMP
λ_z ← −∇_{μ_z} E_q[ℓ̄],  λ_θ ← −∇_{μ_θ} E_q[ℓ̄]            EM: z sees the mode of q(θ)
λ_θ ← (1 − ρ_t)λ_θ − ρ_t ∇_{μ_θ} (N/|B|) E_q[ℓ̄_B]       SVI, with the z of minibatch B at rest
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from blr._tree import Tree
from blr.families.product import Product
from blr.messages import Messages, Rate, Stochastic, robbins_monro
from blr.recipes._row import Row

Order = tuple[str | tuple[str, ...], ...]


def vmp(order: Order | None = None) -> Messages:
    """λ_b ← −∇_{μ_b} E_q[ℓ̄], one block after another: for conjugate blocks the exact minimum.

    Args:
        order: Blocks in the order in which they learn; a tuple of names learns together, in
            parallel. All, one after another, if missing.
    """
    return Messages(order)


def em(
    point: tuple[str, ...] = ("theta",),
    order: Order | None = None,
    gradients: Mapping[str, Callable[[Any, Any], Tree]] | None = None,
) -> Messages:
    """VMP in which the parameters are known by their mode: the E-step, then the M-step.

    Args:
        point: Blocks of the parameters.
        order: As for `vmp`.
        gradients: Approximations of ∇_{μ_b} for parameters that are not conjugate; `delta` makes
            the M-step one step of Newton's method.
    """
    return Messages(order, point=point, gradients=gradients or {})


def ncvmp(lr: Rate | Mapping[str, Rate] = 1.0, order: Order | None = None) -> Messages:
    """λ_b ← (1 − ρ)λ_b − ρ∇_{μ_b} E_q[ℓ̄] for an E_q[ℓ̄] that is not linear in μ_b.

    Args:
        lr: ρ of all blocks, or of each by name; ρ = 1 may oscillate or diverge.
        order: As for `vmp`.
    """
    return Messages(order, lr=lr)


def svi(
    lr: Rate | None = None,
    order: Order | None = None,
    local_steps: int = 100,
    local_tolerance: float = 1e-3,
) -> Stochastic:
    """Local blocks of the minibatch to rest with ρ = 1, then one step with ρ_t in the global ones.

    Args:
        lr: ρ, or ρ_t as a function of t; `robbins_monro()` if missing.
        order: Of the global blocks, as for `vmp`; together if missing.
        local_steps: Most steps of the local blocks.
        local_tolerance: Mean change of λ below which an example is at rest.
    """
    return Stochastic(Messages(order, lr=lr or robbins_monro()), local_steps, local_tolerance)


VMP = Row(
    name="VMP",
    section="5.3",
    family=Product,
    gradient="exact",
    liberties=(),
    schedule="all data, ρ = 1, block by block",
    build=vmp,
    oracle="scikit-learn's BayesianGaussianMixture, iteration by iteration: posterior and bound",
    reference="Winn & Bishop (2005); Attias (2000)",
    equation="eq-ms-vmp",
)

EM = Row(
    name="EM",
    section="5.2",
    family=Product,
    gradient="exact; delta for parameters that are not conjugate",
    liberties=("the mode in the place of the posterior of θ",),
    schedule="all data, ρ = 1, E-step and M-step in turn",
    build=em,
    oracle="scikit-learn's GaussianMixture, iteration by iteration; probabilistic PCA by NumPy",
    reference="Dempster, Laird & Rubin (1977)",
    equation="eq-ms-em",
)

SVI = Row(
    name="SVI",
    section="5.3",
    family=Product,
    gradient="exact, on minibatches",
    liberties=(),
    schedule="local blocks to rest with ρ = 1, then a global step with ρ = (τ₀ + t)^−κ",
    build=svi,
    oracle="scikit-learn's LatentDirichletAllocation online, minibatch by minibatch",
    reference="Hoffman, Blei, Wang & Paisley (2013)",
    equation="eq-ms-svi",
)

NONCONJUGATE_VMP = Row(
    name="Non-conjugate VMP",
    section="5.3",
    family=Product,
    gradient="exact, of a loss that is not linear in μ",
    liberties=(),
    schedule="all data, ρ = 1 or damped, block by block",
    build=ncvmp,
    oracle="the minimum of the bound, by scipy's quadrature and optimiser",
    reference="Knowles & Minka (2011)",
    equation="eq-ms-ncvmp",
)

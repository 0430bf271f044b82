"""The improved rule: steps that stay in the domain, whatever the gradient and the rate.

    τ ← τ − ρ n − ½ρ² Γ(n, n)              n = F⁻¹∇_τ( E_q[ℓ̄] − T H(q) )

τ is a block of parameters, F its Fisher information, and Γ the Christoffel symbols of the metric
F: to second order in ρ, the step follows the geodesic that leaves q in the direction of the rule.

    N(m, S⁻¹):   S ← S − ρG + ½ρ² GS⁻¹G,   m ← m − ρS⁻¹E_q[∇ℓ̄] with the old S,   G = TS − E_q[∇²ℓ̄]
    Gamma(a, b): the blocks are a and η = b/a

References: Lin, Schmidt & Khan (2020), Handling the positive-definite constraint in the Bayesian
learning rule.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from blr._tree import Tree
from blr.families.gamma import Gamma
from blr.families.gaussian import DiagonalGaussian, Gaussian
from blr.rule import member

Q = TypeVar("Q", Gaussian, DiagonalGaussian, Gamma)


def improve(q: Q, gradient: Tree, lr: float = 1.0, temperature: float = 1.0) -> Q:
    """One step of the improved rule, in the place of `learn`: for q or for a batch of them.

    Args:
        q: Current posterior: Gaussian, DiagonalGaussian or Gamma.
        gradient: ∇_μ E_q[ℓ̄] at q, with the structure of `q.natural`.
        lr: Learning rate ρ, of any size that leads to finite numbers. No block falls below half
            of what it was.
        temperature: Weight T of the entropy.

    Raises:
        TypeError: If the geometry of the family is not known here.
        ValueError: If the step leads beyond finite numbers.
    """
    if isinstance(q, Gaussian):
        return _full(q, gradient, lr, temperature)
    if isinstance(q, DiagonalGaussian):
        return _diagonal(q, gradient, lr, temperature)
    if isinstance(q, Gamma):
        return _gamma(q, gradient, lr, temperature)
    raise TypeError(
        f"the improved rule is known for Gaussian, DiagonalGaussian and Gamma, got "
        f"{type(q).__name__}; use blr.learn with a smaller lr"
    )


def _full(q: Gaussian, gradient: Any, rho: float, T: float) -> Gaussian:
    """S ← ½(S + RS⁻¹R) = S − ρG + ½ρ²GS⁻¹G, where R = (1 − ρT)S + ρH = S − ρG is the rule's S."""
    m, S, H = q.mean, q.precision, gradient[1] + gradient[1].mT
    g = gradient[0] + (H @ m.unsqueeze(-1)).squeeze(-1)
    R = (1 - rho * T) * S + rho * H
    # S = LLᵀ, so RS⁻¹R = WᵀW cannot be negative, even after rounding.
    W = torch.linalg.solve_triangular(q.cholesky, R, upper=False)
    S = 0.5 * (S + W.mT @ W)
    m = m - rho * q.solve(g)
    return member(q, ((S @ m.unsqueeze(-1)).squeeze(-1), -0.5 * S), rho)


def _diagonal(q: DiagonalGaussian, gradient: Any, rho: float, T: float) -> DiagonalGaussian:
    """The same with the diagonal s in the place of S: s ← ½(s + r²/s), r = (1 − ρT)s + ρh."""
    m, s, h = q.mean, q.precision, 2 * gradient[1]
    g = gradient[0] + h * m
    r = (1 - rho * T) * s + rho * h
    m = m - rho * g / s
    s = 0.5 * (s + r**2 / s)
    return member(q, (s * m, -0.5 * s), rho)


def _gamma(q: Gamma, gradient: Any, rho: float, T: float) -> Gamma:
    """a ← a − ρn₁ − ½ρ²Γ₁n₁²,  η ← η − ρn₂ + ½ρ²n₂²/η for η = b/a.

    F = diag(ψ′(a) − 1/a, a/η²), Γ₁ = (aψ″(a) + 1/a)/(2(aψ′(a) − 1)) < −1/a, Γ₂ = −1/η.
    """
    a, b = q.shape, q.rate
    eta = b / a
    # The rule moves (a, b) by −ρ times this; a direction changes coordinates by their derivatives.
    n_a, n_b = (gradient[0] + T * q.natural[0], -gradient[1] - T * q.natural[1])
    n_eta = (n_b - eta * n_a) / a
    a = a - rho * n_a - 0.5 * rho**2 * gamma_christoffel(a) * n_a**2
    eta = eta - rho * n_eta + 0.5 * rho**2 * n_eta**2 / eta
    return member(q, (a - 1, -a * eta), rho)


def gamma_christoffel(a: Tensor) -> Tensor:
    """Γ₁ = ½ d/da log(ψ′(a) − 1/a), for the shape a of a gamma distribution at fixed b/a."""
    # ψ′(a) = ζ(2, a) and ψ″(a) = −2ζ(3, a); torch's trigamma has only nine digits (torch 2.13).
    x = a.double()
    psi1 = torch.special.zeta(torch.full_like(x, 2), x)
    psi2 = -2 * torch.special.zeta(torch.full_like(x, 3), x)
    gamma = (x * psi2 + 1 / x) / (2 * (x * psi1 - 1))
    # For large a all digits cancel, and the limit is close.
    return torch.where(x > 1e8, -1 / x, gamma).to(a.dtype)

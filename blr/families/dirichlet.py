"""Dirichlet posteriors over the probabilities of K classes, and Beta posteriors over one of two.

    Dirichlet(α):   T(θ) = log θ                    λ = α − 1             μ = ψ(α) − ψ(Σα)
    Beta(a, b):     T(θ) = (log θ, log(1 − θ))      λ = (a − 1, b − 1)    the same with α = (a, b)
    A(λ) = Σ log Γ(α_k) − log Γ(Σα)

The base measure is one, so λ counts observations: the uniform distribution is λ = 0. Densities are
with respect to the first K−1 coordinates of θ.

References: Minka (2000), Estimating a Dirichlet distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blr import _validate
from blr.expfam import ExponentialFamily
from blr.families._special import concentrations as _concentrations


@dataclass(frozen=True, eq=False, repr=False)
class Dirichlet(ExponentialFamily):
    """Dirichlet with concentrations α: p(θ) ∝ Π θ_k^{α_k − 1} on the simplex.

    Args:
        natural: λ = α − 1, shape (*batch, K), K ≥ 2.
    """

    natural: Tensor
    natural_ndims: ClassVar = 1
    parameters: ClassVar = ("concentrations",)

    @classmethod
    def from_concentrations(cls, concentrations: Any) -> Self:
        """Dirichlet(α) from α, all positive, shape (*batch, K)."""
        alpha = _validate.as_float("concentrations", concentrations)
        _validate.positive("concentrations", alpha, "1 is the uniform distribution")
        return cls(natural=alpha - 1)

    @classmethod
    def from_expectation(cls, mu: Tensor, like: Self | None = None) -> Self:
        """The member with E[log θ] = μ; needs Σ exp(μ) < 1."""
        mu = _validate.as_float("mu", mu)
        _at_least_two("mu", mu)
        return cls(natural=(_concentrations(mu) - 1).to(mu.dtype))

    def _validate(self) -> None:
        _at_least_two("natural", self.natural)
        _validate.positive("concentrations", self.concentrations, "natural = α − 1 must exceed −1")

    @property
    def concentrations(self) -> Tensor:
        """α = λ + 1, shape (*batch, K)."""
        return self.natural + 1

    @property
    def mean(self) -> Tensor:
        """E[θ] = α/Σα, shape (*batch, K)."""
        return self.concentrations / self.concentrations.sum(-1, keepdim=True)

    @property
    def variance(self) -> Tensor:
        """Var[θ_k] = m_k(1 − m_k)/(Σα + 1) with m = E[θ], shape (*batch, K)."""
        return self.mean * (1 - self.mean) / (self.concentrations.sum(-1, keepdim=True) + 1)

    @property
    def mode(self) -> Tensor:
        """The θ of highest density, λ/Σλ, shape (*batch, K).

        Raises:
            ValueError: If a λ_k = α_k − 1 is negative, or all are zero: the density has no peak.
        """
        total = self.natural.sum(-1, keepdim=True)
        _validate.require(
            (self.natural >= 0) & (total > 0),
            "concentrations",
            "at least one, and not all one, for a mode",
            self.concentrations,
            "give the prior concentrations above one, or use the mean",
        )
        return self.natural / total

    def log_partition(self) -> Tensor:
        """A(λ) = Σ log Γ(α_k) − log Γ(Σα)."""
        return _log_beta(self.concentrations)

    def expectation(self) -> Tensor:
        """μ = ψ(α) − ψ(Σα)."""
        return _mean_log(self.concentrations)

    def sufficient_statistics(self, theta: Any) -> Tensor:
        """T(θ) = log θ for θ of shape (..., K)."""
        return _validate.as_float("theta", theta).log()

    def outside_support(self, theta: Any) -> Tensor:
        """Where θ has a negative entry or does not sum to one (up to 1e-6, or rounding)."""
        theta = _validate.as_float("theta", theta)
        tolerance = 1e-6 + theta.shape[-1] * torch.finfo(theta.dtype).eps
        return (theta < 0).any(-1) | ~((theta.sum(-1) - 1).abs() <= tolerance)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, *batch, K); entries that underflow become the least normal number."""
        return _sample(self.concentrations, n, generator)


@dataclass(frozen=True, eq=False, repr=False)
class Beta(ExponentialFamily):
    """Beta with concentrations a and b: p(θ) ∝ θ^{a−1} (1 − θ)^{b−1}, 0 ≤ θ ≤ 1.

    Args:
        natural: λ = (a − 1, b − 1), both of shape (*batch).
    """

    natural: tuple[Tensor, Tensor]
    natural_ndims: ClassVar = (0, 0)
    parameters: ClassVar = ("a", "b")

    @classmethod
    def from_concentrations(cls, a: Any, b: Any) -> Self:
        """Beta(a, b) from the concentrations of θ and of 1 − θ, both positive, shape (*batch)."""
        a = _validate.positive("a", _validate.as_float("a", a), "a = 1 is uniform near 0")
        b = _validate.positive("b", _validate.as_float("b", b), "b = 1 is uniform near 1")
        return cls(natural=(a - 1, b - 1))

    @classmethod
    def from_expectation(cls, mu: tuple[Tensor, Tensor], like: Self | None = None) -> Self:
        """The member with E[log θ] = μ₁ and E[log(1 − θ)] = μ₂; needs exp(μ₁) + exp(μ₂) < 1."""
        both = _validate.common(*(_validate.as_float("mu", x) for x in mu))
        alpha = _concentrations(torch.stack(torch.broadcast_tensors(*both), -1))
        lam1, lam2 = (alpha - 1).to(both[0].dtype).unbind(-1)
        return cls(natural=(lam1, lam2))

    def _validate(self) -> None:
        _validate.positive("concentration a", self.a, "natural[0] = a − 1 must exceed −1")
        _validate.positive("concentration b", self.b, "natural[1] = b − 1 must exceed −1")

    @property
    def a(self) -> Tensor:
        """The concentration of θ, λ₁ + 1."""
        return self.natural[0] + 1

    @property
    def b(self) -> Tensor:
        """The concentration of 1 − θ, λ₂ + 1."""
        return self.natural[1] + 1

    @property
    def concentrations(self) -> tuple[Tensor, Tensor]:
        """(a, b)."""
        return self.a, self.b

    @property
    def mean(self) -> Tensor:
        """E[θ] = a/(a + b)."""
        return self.a / (self.a + self.b)

    @property
    def variance(self) -> Tensor:
        """Var[θ] = ab/((a + b)²(a + b + 1))."""
        n = self.a + self.b
        return (self.a / n) * (self.b / n) / (n + 1)

    def log_partition(self) -> Tensor:
        """A(λ) = log Γ(a) + log Γ(b) − log Γ(a + b)."""
        return _log_beta(torch.stack(self.concentrations, -1))

    def expectation(self) -> tuple[Tensor, Tensor]:
        """μ = (ψ(a) − ψ(a + b), ψ(b) − ψ(a + b))."""
        mu1, mu2 = _mean_log(torch.stack(self.concentrations, -1)).unbind(-1)
        return mu1, mu2

    def sufficient_statistics(self, theta: Any) -> tuple[Tensor, Tensor]:
        """T(θ) = (log θ, log(1 − θ))."""
        theta = _validate.as_float("theta", theta)
        return theta.log(), torch.log1p(-theta)

    def outside_support(self, theta: Any) -> Tensor:
        """Where θ < 0 or θ > 1."""
        theta = _validate.as_float("theta", theta)
        return ~((theta >= 0) & (theta <= 1))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, *batch), kept inside (0, 1) where they would round to an end."""
        draws = _sample(torch.stack(self.concentrations, -1), n, generator)[..., 0]
        return draws.clamp_max(1 - torch.finfo(self.dtype).eps / 2)


def _log_beta(alpha: Tensor) -> Tensor:
    return torch.lgamma(alpha).sum(-1) - torch.lgamma(alpha.sum(-1))


def _mean_log(alpha: Tensor) -> Tensor:
    return torch.digamma(alpha) - torch.digamma(alpha.sum(-1, keepdim=True))


def _sample(alpha: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    # Gamma(α) = Gamma(α + 1)·U^{1/α}; as logarithms, because for small α it underflows.
    alpha = alpha.expand(n, *alpha.shape)
    log_u = -torch.empty_like(alpha).exponential_(generator=generator)
    log_gamma = torch._standard_gamma(alpha + 1, generator).log() + log_u / alpha
    return torch.softmax(log_gamma, -1).clamp_min(torch.finfo(alpha.dtype).tiny)


def _at_least_two(name: str, x: Tensor) -> None:
    if x.ndim == 0 or x.shape[-1] < 2:
        raise ValueError(
            f"{name} must have shape (..., K) with K >= 2 classes, got {tuple(x.shape)}; "
            "for a single probability use Beta.from_concentrations(a, b)"
        )

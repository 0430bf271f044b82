"""Gamma and inverse-gamma posteriors over a positive number.

    Gamma(a, b):          T(θ) = (log θ, θ)      λ = (a − 1, −b)      μ = (ψ(a) − log b, a/b)
    InverseGamma(a, b):   T(θ) = (log θ, 1/θ)    λ = (−a − 1, −b)     μ = (log b − ψ(a), a/b)
    A(λ) = log Γ(a) − a log b for both

If θ is gamma, 1/θ is inverse gamma with the same two numbers, so one inverse map serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blr import _validate
from blr.expfam import ExponentialFamily
from blr.families._special import shape_and_rate


@dataclass(frozen=True, eq=False, repr=False)
class Gamma(ExponentialFamily):
    """Gamma with shape a and rate b: p(θ) ∝ θᵃ⁻¹ e^{−bθ}, θ > 0.

    Args:
        natural: λ = (a − 1, −b), both of shape (*batch).
    """

    natural: tuple[Tensor, Tensor]
    natural_ndims: ClassVar = (0, 0)
    parameters: ClassVar = ("shape", "rate")

    @classmethod
    def from_shape_rate(cls, shape: Any, rate: Any) -> Self:
        """Gamma(a, b) from shape a and rate b = 1/scale, both positive, shape (*batch)."""
        a = _validate.positive("shape", _validate.as_float("shape", shape))
        b = _validate.positive("rate", _validate.as_float("rate", rate), "rate is 1/scale")
        return cls(natural=(a - 1, -b))

    @classmethod
    def from_expectation(cls, mu: tuple[Tensor, Tensor], like: Self | None = None) -> Self:
        """The gamma with E[log θ] = μ₁ and E[θ] = μ₂; needs log μ₂ > μ₁."""
        return cls.from_shape_rate(*shape_and_rate(*mu))

    def _validate(self) -> None:
        _validate.positive("shape a", self.shape, "natural[0] = a − 1 must exceed −1")
        _validate.positive("rate b", self.rate, "natural[1] = −b must be negative")

    @property
    def shape(self) -> Tensor:
        """a = λ₁ + 1."""
        return self.natural[0] + 1

    @property
    def rate(self) -> Tensor:
        """b = −λ₂."""
        return -self.natural[1]

    @property
    def mean(self) -> Tensor:
        """E[θ] = a/b."""
        return self.shape / self.rate

    @property
    def variance(self) -> Tensor:
        """Var[θ] = a/b²."""
        return self.shape / self.rate**2

    def log_partition(self) -> Tensor:
        """A(λ) = log Γ(a) − a log b."""
        return torch.lgamma(self.shape) - self.shape * self.rate.log()

    def expectation(self) -> tuple[Tensor, Tensor]:
        """μ = (ψ(a) − log b, a/b)."""
        return torch.digamma(self.shape) - self.rate.log(), self.mean

    def sufficient_statistics(self, theta: Any) -> tuple[Tensor, Tensor]:
        """T(θ) = (log θ, θ)."""
        theta = _validate.as_float("theta", theta)
        return theta.log(), theta

    def outside_support(self, theta: Any) -> Tensor:
        """Where θ < 0."""
        return _validate.as_float("theta", theta) < 0

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, *batch)."""
        return torch._standard_gamma(self.shape.expand(n, *self.batch_shape), generator) / self.rate


@dataclass(frozen=True, eq=False, repr=False)
class InverseGamma(ExponentialFamily):
    """Inverse gamma with shape a and scale b: p(θ) ∝ θ^{−a−1} e^{−b/θ}, θ > 0.

    Args:
        natural: λ = (−a − 1, −b), both of shape (*batch).
    """

    natural: tuple[Tensor, Tensor]
    natural_ndims: ClassVar = (0, 0)
    parameters: ClassVar = ("shape", "scale")

    @classmethod
    def from_shape_scale(cls, shape: Any, scale: Any) -> Self:
        """InverseGamma(a, b) from shape a and scale b, both positive, shape (*batch)."""
        a = _validate.positive("shape", _validate.as_float("shape", shape))
        b = _validate.positive("scale", _validate.as_float("scale", scale))
        return cls(natural=(-a - 1, -b))

    @classmethod
    def from_expectation(cls, mu: tuple[Tensor, Tensor], like: Self | None = None) -> Self:
        """The member with E[log θ] = μ₁ and E[1/θ] = μ₂; needs log μ₂ > −μ₁."""
        mu1, mu2 = mu
        return cls.from_shape_scale(*shape_and_rate(-_validate.as_float("mu[0]", mu1), mu2))

    def _validate(self) -> None:
        _validate.positive("shape a", self.shape, "natural[0] = −a − 1 must be below −1")
        _validate.positive("scale b", self.scale, "natural[1] = −b must be negative")

    @property
    def shape(self) -> Tensor:
        """a = −λ₁ − 1."""
        return -self.natural[0] - 1

    @property
    def scale(self) -> Tensor:
        """b = −λ₂."""
        return -self.natural[1]

    @property
    def mean(self) -> Tensor:
        """E[θ] = b/(a − 1); infinite for a ≤ 1."""
        mean = self.scale / (self.shape - 1)
        return torch.where(self.shape > 1, mean, torch.inf)

    def log_partition(self) -> Tensor:
        """A(λ) = log Γ(a) − a log b."""
        return torch.lgamma(self.shape) - self.shape * self.scale.log()

    def expectation(self) -> tuple[Tensor, Tensor]:
        """μ = (log b − ψ(a), a/b)."""
        return self.scale.log() - torch.digamma(self.shape), self.shape / self.scale

    def sufficient_statistics(self, theta: Any) -> tuple[Tensor, Tensor]:
        """T(θ) = (log θ, 1/θ)."""
        theta = _validate.as_float("theta", theta)
        return theta.log(), 1 / theta

    def outside_support(self, theta: Any) -> Tensor:
        """Where θ ≤ 0: the density vanishes at the origin too."""
        return _validate.as_float("theta", theta) <= 0

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, *batch)."""
        return self.scale / torch._standard_gamma(
            self.shape.expand(n, *self.batch_shape), generator
        )

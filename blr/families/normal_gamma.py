"""Normal-gamma posteriors over a vector and the scale of its precision.

    θ | τ ~ N(m, (τS)⁻¹)      τ ~ Gamma(a, b)
    T = (log τ, τ, τθ, τθθᵀ)      λ = (a − 1 + ½D, −b − ½mᵀSm, Sm, −½S)
    A(λ) = log Γ(a) − a log b − ½ log|S|          log h = −½ D log 2π
    μ = (ψ(a) − log b, a/b, (a/b) m, S⁻¹ + (a/b) mmᵀ)

The conjugate posterior of linear regression when the noise precision τ is unknown. Without τ, θ has
a Student-t distribution with 2a degrees of freedom.

References: Bishop (2006), Pattern recognition and machine learning, section 2.3.6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blr import _validate
from blr.expfam import ExponentialFamily
from blr.families._special import inverse, shape_and_rate


@dataclass(frozen=True, eq=False, repr=False)
class NormalGamma(ExponentialFamily):
    """N(θ; m, (τS)⁻¹) Gamma(τ; a, b) over the pair (θ, τ), θ of length D.

    Args:
        natural: λ = (a − 1 + ½D, −b − ½mᵀSm, Sm, −½S), shapes (*batch), (*batch), (*batch, D) and
            (*batch, D, D). The last block is read through its symmetric part.
    """

    natural: tuple[Tensor, Tensor, Tensor, Tensor]
    natural_ndims: ClassVar = (0, 0, 1, 2)
    parameters: ClassVar = ("mean", "precision", "shape", "rate")

    @classmethod
    def from_parameters(cls, mean: Any, precision: Any, shape: Any, rate: Any) -> Self:
        """θ | τ ~ N(m, (τS)⁻¹), τ ~ Gamma(a, b).

        Args:
            mean: m, shape (*batch, D).
            precision: S, the precision of θ for τ = 1, shape (*batch, D, D).
            shape: a > 0, shape (*batch).
            rate: b > 0, shape (*batch).

        Raises:
            ValueError: If shapes do not fit, S is not symmetric positive definite, or a or b is
                not positive.
        """
        m, S, a, b = _validate.common(
            _validate.vector("mean", _validate.as_float("mean", mean)),
            _validate.as_float("precision", precision),
            _validate.as_float("shape", shape),
            _validate.as_float("rate", rate),
        )
        _validate.finite("mean", m)
        _validate.symmetric("precision", _validate.square("precision", S, m.shape[-1]))
        _validate.positive_definite("precision", S)
        _validate.positive("shape", a)
        _validate.positive("rate", b, "rate is 1/scale")
        Sm = (S @ m.unsqueeze(-1)).squeeze(-1)
        D = m.shape[-1]
        return cls(natural=(a - 1 + 0.5 * D, -b - 0.5 * (m * Sm).sum(-1), Sm, -0.5 * S))

    @classmethod
    def from_expectation(
        cls, mu: tuple[Tensor, Tensor, Tensor, Tensor], like: Self | None = None
    ) -> Self:
        """The member with E[T] = μ: a and b as in a gamma, m = μ₃/μ₂, S⁻¹ = μ₄ − μ₃μ₃ᵀ/μ₂."""
        mu1, mu2, mu3, mu4 = _validate.common(*(_validate.as_float("mu", x) for x in mu))
        a, b = shape_and_rate(mu1, mu2)
        m = mu3 / mu2.unsqueeze(-1)
        covariance = mu4 - mu3.unsqueeze(-1) * m.unsqueeze(-2)
        L = _validate.positive_definite(
            "mu[3] − mu[2] mu[2]ᵀ / mu[1]", covariance, "no normal-gamma has these expectations"
        )
        return cls.from_parameters(m, inverse(L), a, b)

    def _validate(self) -> None:
        lam3, lam4 = self.natural[2:]
        _validate.finite("natural[2] = Sm", _validate.vector("natural[2] = Sm", lam3))
        _validate.square("natural[3] = −½S", lam4, lam3.shape[-1])
        # Validation factorises S; keep the factor.
        object.__setattr__(
            self, "cholesky", _validate.positive_definite("precision S", self.precision)
        )
        _validate.positive("shape a", self.shape, "natural[0] = a − 1 + ½D must exceed ½D − 1")
        _validate.positive("rate b", self.rate, "natural[1] must be below −½mᵀSm")

    @cached_property
    def cholesky(self) -> Tensor:
        """L with S = LLᵀ, lower triangular, shape (*batch, D, D)."""
        return torch.linalg.cholesky(self.precision)

    @property
    def dim(self) -> int:
        """D, the length of θ."""
        return self.natural[2].shape[-1]

    @property
    def precision(self) -> Tensor:
        """S = −2λ₄, shape (*batch, D, D)."""
        return -(self.natural[3] + self.natural[3].mT)

    @property
    def covariance(self) -> Tensor:
        """S⁻¹, the covariance of θ for τ = 1, shape (*batch, D, D)."""
        return inverse(self.cholesky)

    @property
    def mean(self) -> Tensor:
        """m = S⁻¹λ₃, shape (*batch, D); the mean of θ if a > ½."""
        return torch.cholesky_solve(self.natural[2].unsqueeze(-1), self.cholesky).squeeze(-1)

    @property
    def shape(self) -> Tensor:
        """a = λ₁ + 1 − ½D, shape (*batch)."""
        return self.natural[0] + 1 - 0.5 * self.dim

    @property
    def rate(self) -> Tensor:
        """b = −λ₂ − ½mᵀSm, shape (*batch)."""
        return -self.natural[1] - 0.5 * (self.mean * self.natural[2]).sum(-1)

    def log_partition(self) -> Tensor:
        """A(λ) = log Γ(a) − a log b − ½ log|S|."""
        a, b = self.shape, self.rate
        return torch.lgamma(a) - a * b.log() - self._half_log_det()

    def expectation(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """μ = (ψ(a) − log b, a/b, (a/b) m, S⁻¹ + (a/b) mmᵀ)."""
        a, b, m = self.shape, self.rate, self.mean
        tau_m = (a / b).unsqueeze(-1) * m
        second = self.covariance + tau_m.unsqueeze(-1) * m.unsqueeze(-2)
        return torch.digamma(a) - b.log(), a / b, tau_m, second

    def sufficient_statistics(self, theta: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """T = (log τ, τ, τθ, τθθᵀ) for the pair (θ, τ) of shapes (..., D) and (...)."""
        theta, tau = _pair(theta)
        tau_theta = tau.unsqueeze(-1) * theta
        return tau.log(), tau, tau_theta, tau_theta.unsqueeze(-1) * theta.unsqueeze(-2)

    def log_base_measure(self, theta: Any) -> Tensor:
        """log h = −½ D log 2π."""
        return self.natural[0].new_tensor(-0.5 * self.dim * math.log(2 * math.pi))

    def expected_log_base_measure(self) -> Tensor:
        """E[log h] = −½ D log 2π."""
        return self.log_base_measure(None)

    def outside_support(self, theta: Any) -> Tensor:
        """Where τ ≤ 0."""
        return ~(_pair(theta)[1] > 0)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """n draws (θ, τ), shapes (n, *batch, D) and (n, *batch)."""
        tau = torch._standard_gamma(self.shape.expand(n, *self.batch_shape), generator) / self.rate
        noise = torch.randn(
            (n, *self.mean.shape), dtype=tau.dtype, device=tau.device, generator=generator
        )
        # S = LLᵀ, so L⁻ᵀε has covariance S⁻¹.
        scaled = torch.linalg.solve_triangular(self.cholesky.mT, noise.unsqueeze(-1), upper=True)
        return self.mean + scaled.squeeze(-1) / tau.sqrt().unsqueeze(-1), tau

    def marginal_log_prob(self, theta: Any) -> Tensor:
        """log ∫ q(θ, τ) dτ: Student-t, 2a degrees of freedom, location m, precision (a/b)S."""
        theta = _validate.as_float("theta", theta)
        a, b, D = self.shape, self.rate, self.dim
        d = theta - self.mean
        quadratic = ((self.precision @ d.unsqueeze(-1)).squeeze(-1) * d).sum(-1)
        log_constant = torch.lgamma(a + 0.5 * D) - torch.lgamma(a) + self._half_log_det()
        log_scale = 0.5 * D * (2 * math.pi * b).log()
        return log_constant - log_scale - (a + 0.5 * D) * torch.log1p(0.5 * quadratic / b)

    def _half_log_det(self) -> Tensor:
        return self.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _pair(theta: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(theta, tuple | list) or len(theta) != 2:
        raise TypeError(
            f"theta must be the pair (theta, tau), got {type(theta).__name__}; "
            "pass both, or use marginal_log_prob(theta)"
        )
    return _validate.as_float("theta[0]", theta[0]), _validate.as_float("theta[1]", theta[1])

"""Gaussian posteriors N(m, S⁻¹), full and diagonal.

    T(θ) = (θ, θθᵀ)      λ = (Sm, −½S)      μ = (m, S⁻¹ + mmᵀ)
    A(λ) = ½ mᵀSm − ½ log|S|                log h = −½ D log 2π

The precision S is stored, never the covariance: data add to it and forgetting subtracts from it.

References: Khan & Rue (2023), section 1.3; Wainwright & Jordan (2008), example 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blr import _validate
from blr._tree import Tree
from blr.expfam import ExponentialFamily
from blr.families._special import inverse, log_h_normal, standard_normal


@dataclass(frozen=True, eq=False, repr=False)
class Gaussian(ExponentialFamily):
    """N(m, S⁻¹) with a full precision matrix.

    Args:
        natural: λ = (Sm, −½S), shapes (*batch, D) and (*batch, D, D). The second block is read
            through its symmetric part.
    """

    natural: tuple[Tensor, Tensor]
    natural_ndims: ClassVar = (1, 2)
    parameters: ClassVar = ("mean", "precision")

    @classmethod
    def from_moments(cls, mean: Any, precision: Any = None, *, covariance: Any = None) -> Self:
        """N(m, S⁻¹) from its mean and one of precision and covariance.

        Args:
            mean: m, shape (*batch, D).
            precision: S, shape (*batch, D, D).
            covariance: Σ = S⁻¹, same shape; inverted here.

        Raises:
            ValueError: If both or neither are given, shapes do not fit, or one is not positive
                definite.
        """
        m = _validate.finite("mean", _validate.vector("mean", _validate.as_float("mean", mean)))
        name, matrix = _one_of(precision=precision, covariance=covariance)
        m, matrix = _validate.common(m, _validate.as_float(name, matrix))
        _validate.symmetric(name, _validate.square(name, matrix, m.shape[-1]))
        L = _validate.positive_definite(name, matrix)
        S = matrix if name == "precision" else inverse(L)
        return cls(natural=((S @ m.unsqueeze(-1)).squeeze(-1), -0.5 * S))

    @classmethod
    def from_expectation(cls, mu: tuple[Tensor, Tensor], like: Self | None = None) -> Self:
        """The Gaussian with E[θ] = μ₁ and E[θθᵀ] = μ₂: S = (μ₂ − μ₁μ₁ᵀ)⁻¹."""
        m, second = (_validate.as_float("mu", x) for x in mu)
        return cls.from_moments(m, covariance=second - m.unsqueeze(-1) * m.unsqueeze(-2))

    def _validate(self) -> None:
        lam1, lam2 = self.natural
        _validate.finite("natural[0] = Sm", _validate.vector("natural[0] = Sm", lam1))
        _validate.square("natural[1] = -S/2", lam2, lam1.shape[-1])
        # Validation factorises S; keep the factor.
        vars(self)["cholesky"] = _validate.positive_definite("precision S", self.precision)

    @cached_property
    def cholesky(self) -> Tensor:
        """L with S = LLᵀ, lower triangular, shape (*batch, D, D)."""
        return torch.linalg.cholesky(self.precision)

    @property
    def precision(self) -> Tensor:
        """S = −2λ₂, shape (*batch, D, D)."""
        lam2 = self.natural[1]
        return -(lam2 + lam2.mT)

    @property
    def mean(self) -> Tensor:
        """m = S⁻¹λ₁, shape (*batch, D)."""
        return self.solve(self.natural[0])

    @property
    def covariance(self) -> Tensor:
        """S⁻¹, shape (*batch, D, D)."""
        return inverse(self.cholesky)

    @property
    def variance(self) -> Tensor:
        """The diagonal of S⁻¹, shape (*batch, D)."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)

    def solve(self, b: Tensor) -> Tensor:
        """S⁻¹b for vectors b of shape (..., D)."""
        return torch.cholesky_solve(b.unsqueeze(-1), self.cholesky).squeeze(-1)

    def remove(self, dual: Tree) -> Self:
        """The posterior without the dual: λ − λ̃.

        Raises:
            ValueError: If the precision left over is not positive definite, or is nothing but the
                rounding errors of what was subtracted.
        """
        q = super().remove(dual)
        pivots = q.cholesky.detach().diagonal(dim1=-2, dim2=-1) ** 2
        was = self.precision.detach().diagonal(dim1=-2, dim2=-1)
        _validate.require(
            pivots > was.shape[-1] * torch.finfo(q.dtype).eps * was,
            "the precision that remains",
            "positive definite beyond rounding",
            pivots,
            "keep more of the data, or use a prior with positive precision",
        )
        return q

    def log_partition(self) -> Tensor:
        """A(λ) = ½ mᵀSm − ½ log|S|."""
        half_log_det = self.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return 0.5 * (self.mean * self.natural[0]).sum(-1) - half_log_det

    def expectation(self) -> tuple[Tensor, Tensor]:
        """μ = (m, S⁻¹ + mmᵀ)."""
        m = self.mean
        return m, self.covariance + m.unsqueeze(-1) * m.unsqueeze(-2)

    def natural_gradient(self, gradient: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """∇_μ E_q[ℓ] = (g − Hm, ½H), by the theorems of Bonnet and Price.

        Args:
            gradient: g = E_q[∇ℓ], shape (..., D).
            curvature: H = E_q[∇²ℓ], shape (..., D, D).
        """
        g, H = gradient, curvature
        return g - (H @ self.mean.unsqueeze(-1)).squeeze(-1), 0.5 * H

    def sufficient_statistics(self, theta: Any) -> tuple[Tensor, Tensor]:
        """T(θ) = (θ, θθᵀ) for θ of shape (..., D)."""
        theta = _validate.as_float("theta", theta)
        return theta, theta.unsqueeze(-1) * theta.unsqueeze(-2)

    def log_base_measure(self, theta: Any) -> Tensor:
        """log h = −½ D log 2π."""
        return log_h_normal(self.natural[0])

    def expected_log_base_measure(self) -> Tensor:
        """E[log h] = −½ D log 2π."""
        return log_h_normal(self.natural[0])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, *batch, D)."""
        noise = standard_normal(n, self.natural[0], generator)
        # S = LLᵀ, so L⁻ᵀε has covariance S⁻¹.
        return self.mean + torch.linalg.solve_triangular(
            self.cholesky.mT, noise.unsqueeze(-1), upper=True
        ).squeeze(-1)


@dataclass(frozen=True, eq=False, repr=False)
class DiagonalGaussian(ExponentialFamily):
    """N(m, diag(s)⁻¹): the product of D Gaussians.

    Args:
        natural: λ = (sm, −½s), both of shape (*batch, D).
    """

    natural: tuple[Tensor, Tensor]
    natural_ndims: ClassVar = (1, 1)
    parameters: ClassVar = ("mean", "precision")

    @classmethod
    def from_moments(cls, mean: Any, precision: Any = None, *, variance: Any = None) -> Self:
        """N(m, diag(s)⁻¹) from its mean and one of precision s and variance 1/s.

        Args:
            mean: m, shape (*batch, D).
            precision: s, shape (*batch, D) or broadcastable to it.
            variance: 1/s, same shape.

        Raises:
            ValueError: If both or neither are given, or one is not positive.
        """
        m = _validate.finite("mean", _validate.vector("mean", _validate.as_float("mean", mean)))
        name, value = _one_of(precision=precision, variance=variance)
        m, value = _validate.common(m, _validate.as_float(name, value))
        _validate.positive(name, value)
        m, s = torch.broadcast_tensors(m, value if name == "precision" else 1 / value)
        return cls(natural=(s * m, -0.5 * s))

    @classmethod
    def from_expectation(cls, mu: tuple[Tensor, Tensor], like: Self | None = None) -> Self:
        """The member with E[θ] = μ₁ and E[θ²] = μ₂: s = 1/(μ₂ − μ₁²)."""
        m, second = (_validate.as_float("mu", x) for x in mu)
        return cls.from_moments(m, variance=second - m**2)

    def _validate(self) -> None:
        lam1, lam2 = self.natural
        _validate.finite("natural[0] = s·m", _validate.vector("natural[0] = s·m", lam1))
        if lam1.shape[-1] != lam2.shape[-1]:
            raise ValueError(
                f"natural must have two blocks of one length, got {tuple(lam1.shape)} and "
                f"{tuple(lam2.shape)}; pass (s·m, −s/2)"
            )
        _validate.finite("natural[1] = −s/2", lam2)
        # Where all is well this takes no memory.
        if not (lam2.numel() and bool(lam2.detach().amax() < 0)):
            _validate.positive("precision s", self.precision, "natural[1] = −s/2 must be negative")

    @property
    def precision(self) -> Tensor:
        """s = −2λ₂, shape (*batch, D)."""
        return -2 * self.natural[1]

    @property
    def mean(self) -> Tensor:
        """m = λ₁/s, shape (*batch, D)."""
        # −½λ₁/λ₂ in one pass over the parameters.
        lam1, lam2 = self.natural
        return torch.addcdiv(lam1.new_zeros(()), lam1, lam2, value=-0.5)

    @property
    def variance(self) -> Tensor:
        """1/s, shape (*batch, D)."""
        return 1 / self.precision

    def log_partition(self) -> Tensor:
        """A(λ) = Σ ½ s m² − ½ log s."""
        return 0.5 * (self.mean * self.natural[0] - self.precision.log()).sum(-1)

    def expectation(self) -> tuple[Tensor, Tensor]:
        """μ = (m, 1/s + m²)."""
        return self.mean, self.variance + self.mean**2

    def natural_gradient(self, gradient: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """∇_μ E_q[ℓ] = (g − h∘m, ½h), by the theorems of Bonnet and Price.

        Args:
            gradient: g = E_q[∇ℓ], shape (..., D).
            curvature: h = diag E_q[∇²ℓ], shape (..., D).
        """
        g, h, (lam1, lam2) = gradient, curvature, self.natural
        # With −½λ₁/λ₂ for m, in fewer passes.
        return torch.addcmul(g, h / lam2, lam1, value=0.5), 0.5 * h

    def sufficient_statistics(self, theta: Any) -> tuple[Tensor, Tensor]:
        """T(θ) = (θ, θ²), elementwise."""
        theta = _validate.as_float("theta", theta)
        return theta, theta**2

    def log_base_measure(self, theta: Any) -> Tensor:
        """log h = −½ D log 2π."""
        return log_h_normal(self.natural[0])

    def expected_log_base_measure(self) -> Tensor:
        """E[log h] = −½ D log 2π."""
        return log_h_normal(self.natural[0])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, *batch, D)."""
        noise = standard_normal(n, self.natural[0], generator)
        return noise.mul_(self.precision.rsqrt_()).add_(self.mean)


def _one_of(**options: Any) -> tuple[str, Any]:
    given = [(name, value) for name, value in options.items() if value is not None]
    if len(given) != 1:
        names = " and ".join(options)
        raise ValueError(f"exactly one of {names} must be given, got {len(given)} of them")
    return given[0]

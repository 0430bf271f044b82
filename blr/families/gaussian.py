"""Gaussian posteriors N(m, S⁻¹): full, diagonal, and with known precision.

    T(θ) = (θ, θθᵀ)      λ = (Sm, −½S)      μ = (m, S⁻¹ + mmᵀ)
    A(λ) = ½ mᵀSm − ½ log|S|                log h = −½ D log 2π

The precision S is stored, never the covariance: data add to it and forgetting subtracts from it.
With S known, λ = S₀m alone is free, T(θ) = θ, and the base measure N(0, S₀⁻¹) is no constant.

References: Khan & Rue (2023), section 1.3; Wainwright & Jordan (2008), example 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blr import _validate
from blr._tree import Tree
from blr.expfam import ExponentialFamily
from blr.families._special import inverse


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
        return _log_h(self.natural[0])

    def expected_log_base_measure(self) -> Tensor:
        """E[log h] = −½ D log 2π."""
        return _log_h(self.natural[0])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, *batch, D)."""
        noise = _standard_normal(n, self.natural[0], generator)
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
        _validate.positive("precision s", self.precision, "natural[1] = −s/2 must be negative")

    @property
    def precision(self) -> Tensor:
        """s = −2λ₂, shape (*batch, D)."""
        return -2 * self.natural[1]

    @property
    def mean(self) -> Tensor:
        """m = λ₁/s, shape (*batch, D)."""
        return self.natural[0] / self.precision

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
        g, h = gradient, curvature
        return g - h * self.mean, 0.5 * h

    def sufficient_statistics(self, theta: Any) -> tuple[Tensor, Tensor]:
        """T(θ) = (θ, θ²), elementwise."""
        theta = _validate.as_float("theta", theta)
        return theta, theta**2

    def log_base_measure(self, theta: Any) -> Tensor:
        """log h = −½ D log 2π."""
        return _log_h(self.natural[0])

    def expected_log_base_measure(self) -> Tensor:
        """E[log h] = −½ D log 2π."""
        return _log_h(self.natural[0])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, *batch, D)."""
        noise = _standard_normal(n, self.natural[0], generator)
        return self.mean + noise * self.precision.rsqrt()


@dataclass(frozen=True, eq=False, repr=False)
class FixedGaussian(ExponentialFamily):
    """N(m, S₀⁻¹) with known precision S₀: T(θ) = θ, λ = S₀m, μ = m.

    Args:
        natural: λ = S₀m, shape (*batch, D).
        precision: S₀, shape (D, D); no part of λ, and shared by the batch.
    """

    natural: Tensor
    precision: Tensor
    natural_ndims: ClassVar = 1
    parameters: ClassVar = ("mean", "precision")

    @classmethod
    def from_moments(cls, mean: Any, precision: Any) -> Self:
        """N(m, S₀⁻¹) from mean, shape (*batch, D), and known precision, shape (D, D)."""
        m = _validate.finite("mean", _validate.vector("mean", _validate.as_float("mean", mean)))
        m, S = _validate.common(m, _validate.as_float("precision", precision))
        _validate.square("precision", S, m.shape[-1])
        return cls(natural=m @ S, precision=S)

    @classmethod
    def from_expectation(cls, mu: Tensor, like: Self | None = None) -> Self:
        """The member with mean μ and the known precision of `like`.

        Raises:
            ValueError: If `like` is missing.
        """
        if like is None:
            raise ValueError(
                "like must be a FixedGaussian: its precision is known, not part of mu; "
                "pass like=q, or use from_moments(mean, precision)"
            )
        return cls.from_moments(mu, like.precision)

    def _validate(self) -> None:
        _validate.finite("natural = S₀m", _validate.vector("natural = S₀m", self.natural))
        S = _validate.as_float("precision", self.precision).to(self.natural.dtype)
        object.__setattr__(self, "precision", S)
        if S.ndim != 2:
            raise ValueError(f"precision must have shape (D, D), got {tuple(S.shape)}; share one")
        _validate.symmetric("precision", _validate.square("precision", S, self.natural.shape[-1]))
        vars(self)["cholesky"] = _validate.positive_definite("precision", S)

    @cached_property
    def cholesky(self) -> Tensor:
        """L with S₀ = LLᵀ, lower triangular, shape (D, D)."""
        return torch.linalg.cholesky(self.precision)

    @property
    def mean(self) -> Tensor:
        """m = S₀⁻¹λ, shape (*batch, D)."""
        return torch.cholesky_solve(self.natural.unsqueeze(-1), self.cholesky).squeeze(-1)

    @property
    def covariance(self) -> Tensor:
        """S₀⁻¹, shape (D, D)."""
        return inverse(self.cholesky)

    def log_partition(self) -> Tensor:
        """A(λ) = ½ λᵀS₀⁻¹λ."""
        return 0.5 * (self.mean * self.natural).sum(-1)

    def expectation(self) -> Tensor:
        """μ = m."""
        return self.mean

    def entropy_gradient(self) -> Tensor:
        """∇_μH = −λ + S₀m = 0: the entropy does not depend on the mean."""
        return torch.zeros_like(self.natural)

    def natural_gradient(self, gradient: Tensor, curvature: Tensor | None = None) -> Tensor:
        """∇_μ E_q[ℓ] = g: only the mean is free, and no curvature is needed.

        Args:
            gradient: g = E_q[∇ℓ], shape (..., D).
            curvature: Not used; here so that all Gaussians are called alike.
        """
        return gradient

    def log_base_measure(self, theta: Any) -> Tensor:
        """log h(θ) = log N(θ; 0, S₀⁻¹)."""
        theta = _validate.as_float("theta", theta)
        quadratic = ((theta @ self.precision) * theta).sum(-1)
        return self._log_normaliser() - 0.5 * quadratic

    def expected_log_base_measure(self) -> Tensor:
        """E[log h] = log N(m; 0, S₀⁻¹) − ½D."""
        return self._log_normaliser() - 0.5 * ((self.mean * self.natural).sum(-1) + self.dim)

    def _log_normaliser(self) -> Tensor:
        return _log_h(self.natural) + self.cholesky.diagonal().log().sum()

    @property
    def dim(self) -> int:
        """D, the length of θ."""
        return self.natural.shape[-1]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, *batch, D)."""
        noise = _standard_normal(n, self.natural, generator)
        return self.mean + torch.linalg.solve_triangular(
            self.cholesky.mT, noise.unsqueeze(-1), upper=True
        ).squeeze(-1)

    def _check_same_family(self, other: ExponentialFamily) -> None:
        super()._check_same_family(other)
        if not torch.equal(self.precision, other.precision):  # type: ignore[attr-defined]
            raise ValueError(
                "the two Gaussians have different known precisions, so they are members of "
                "different families; use Gaussian.from_moments for both"
            )


def _one_of(**options: Any) -> tuple[str, Any]:
    given = [(name, value) for name, value in options.items() if value is not None]
    if len(given) != 1:
        names = " and ".join(options)
        raise ValueError(f"exactly one of {names} must be given, got {len(given)} of them")
    return given[0]


def _log_h(vector: Tensor) -> Tensor:
    return vector.new_tensor(-0.5 * vector.shape[-1] * math.log(2 * math.pi))


def _standard_normal(n: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn((n, *like.shape), dtype=like.dtype, device=like.device, generator=generator)

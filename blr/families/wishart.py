"""Wishart posteriors over a precision matrix.

    T(X) = (X, log|X|)      λ = (−½W⁻¹, ½(ν − p − 1))      μ = (νW, ψ_p(ν/2) + p log 2 + log|W|)
    A(λ) = ½ν (p log 2 + log|W|) + log Γ_p(ν/2)

X is p × p, positive definite; ν > p − 1 are the degrees of freedom and E[X] = νW. For p = 1 it is
the gamma family with shape ν/2 and rate 1/(2W).

References: Muirhead (1982), Aspects of multivariate statistical theory, chapter 3.
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
from blr.families._special import (
    bartlett,
    digamma_p,
    inverse,
    log_gamma_p,
    not_positive_definite,
    solve_gap,
)


@dataclass(frozen=True, eq=False, repr=False)
class Wishart(ExponentialFamily):
    """Wishart with ν degrees of freedom and scale matrix W.

    Args:
        natural: λ = (−½W⁻¹, ½(ν − p − 1)), shapes (*batch, p, p) and (*batch). The first block is
            read through its symmetric part.
    """

    natural: tuple[Tensor, Tensor]
    natural_ndims: ClassVar = (2, 0)
    parameters: ClassVar = ("dof", "scale")

    @classmethod
    def from_dof_scale(cls, dof: Any, scale: Any) -> Self:
        """Wishart(ν, W) with E[X] = νW.

        Args:
            dof: ν > p − 1, shape (*batch).
            scale: W, symmetric positive definite, shape (*batch, p, p).

        Raises:
            ValueError: If ν ≤ p − 1, or W is not symmetric positive definite.
        """
        nu, W = _validate.common(_validate.as_float("dof", dof), _validate.as_float("scale", scale))
        _validate.symmetric("scale", _validate.square("scale", W))
        L = _validate.positive_definite("scale", W)
        p = W.shape[-1]
        _validate.finite("dof", nu)
        _validate.require(
            nu.detach() > p - 1, "dof", f"greater than p − 1 = {p - 1}", nu, "add to it"
        )
        return cls(natural=(-0.5 * inverse(L), 0.5 * (nu - p - 1)))

    @classmethod
    def from_expectation(cls, mu: tuple[Tensor, Tensor], like: Self | None = None) -> Self:
        """The member with E[X] = μ₁ and E[log|X|] = μ₂; needs log|μ₁| > μ₂."""
        X, log_det = _validate.common(*(_validate.as_float("mu", x) for x in mu))
        dtype = X.dtype
        L = _validate.positive_definite("mu[0]", _validate.square("mu[0]", X).double())
        gap = 2 * _half_log_det(L) - _validate.finite("mu[1]", log_det).double()
        _validate.require(
            gap.detach() > 0,
            "log|mu[0]| − mu[1]",
            "positive (Jensen's inequality)",
            gap,
            "no Wishart distribution has these expectations",
        )
        p = X.shape[-1]
        x = solve_gap(gap, p)
        nu = 2 * x + p - 1
        lam1 = -0.5 * nu[..., None, None] * inverse(L)
        return cls(natural=(lam1.to(dtype), (x - 1).to(dtype)))

    def _validate(self) -> None:
        _validate.square("natural[0] = −½W⁻¹", self.natural[0])
        half = self.natural[1] + 1
        _validate.positive(
            "½(dof − p + 1)", half, "natural[1] = ½(dof − p − 1) must exceed −1: dof > p − 1"
        )
        # Validation factorises W⁻¹; keep the factor.
        object.__setattr__(self, "cholesky", _validate.positive_definite("W⁻¹", self.inverse_scale))

    @cached_property
    def cholesky(self) -> Tensor:
        """L with W⁻¹ = LLᵀ, lower triangular, shape (*batch, p, p)."""
        return torch.linalg.cholesky(self.inverse_scale)

    @property
    def dim(self) -> int:
        """p, the number of rows of X."""
        return self.natural[0].shape[-1]

    @property
    def dof(self) -> Tensor:
        """ν = 2λ₂ + p + 1, shape (*batch)."""
        return 2 * self.natural[1] + self.dim + 1

    @property
    def inverse_scale(self) -> Tensor:
        """W⁻¹ = −2λ₁, shape (*batch, p, p)."""
        return -(self.natural[0] + self.natural[0].mT)

    @property
    def scale(self) -> Tensor:
        """W, shape (*batch, p, p)."""
        return inverse(self.cholesky)

    @property
    def mean(self) -> Tensor:
        """E[X] = νW, shape (*batch, p, p)."""
        return self.dof[..., None, None] * self.scale

    def log_partition(self) -> Tensor:
        """A(λ) = ½ν (p log 2 + log|W|) + log Γ_p(ν/2)."""
        log_det_2W = self.dim * math.log(2) - 2 * _half_log_det(self.cholesky)
        return 0.5 * self.dof * log_det_2W + log_gamma_p(self.natural[1] + 1, self.dim)

    def expectation(self) -> tuple[Tensor, Tensor]:
        """μ = (νW, ψ_p(ν/2) + p log 2 + log|W|)."""
        log_det_2W = self.dim * math.log(2) - 2 * _half_log_det(self.cholesky)
        return self.mean, digamma_p(self.natural[1] + 1, self.dim) + log_det_2W

    def sufficient_statistics(self, theta: Any) -> tuple[Tensor, Tensor]:
        """T(X) = (X, log|X|) for X of shape (..., p, p)."""
        X = _validate.as_float("theta", theta)
        return X, torch.linalg.slogdet(X).logabsdet

    def outside_support(self, theta: Any) -> Tensor:
        """Where X is not symmetric (up to rounding) and positive definite."""
        return not_positive_definite(_validate.as_float("theta", theta))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, *batch, p, p)."""
        B = bartlett(self.natural[1] + 1, self.dim, n, generator)
        # W⁻¹ = LLᵀ, so L⁻ᵀ is a square root of W.
        Y = torch.linalg.solve_triangular(self.cholesky.mT, B, upper=True)
        return Y @ Y.mT


def _half_log_det(L: Tensor) -> Tensor:
    return L.diagonal(dim1=-2, dim2=-1).log().sum(-1)

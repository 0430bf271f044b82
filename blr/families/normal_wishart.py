"""Normal-Wishart posteriors over the mean and the precision matrix of a Gaussian.

    x | Λ ~ N(m, (κΛ)⁻¹)      Λ ~ Wishart(ν, W)
    T = (log|Λ|, Λ, Λx, xᵀΛx)
    λ = (½(ν − D), −½(W⁻¹ + κmmᵀ), κm, −½κ)
    A(λ) = ½ν (D log 2 + log|W|) + log Γ_D(ν/2) − ½ D log κ          log h = −½ D log 2π
    μ = (ψ_D(ν/2) + D log 2 + log|W|, νW, νWm, D/κ + ν mᵀWm)

Its parameter θ is the pair (x, Λ), where x has length D and Λ is D × D, positive definite.

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
from blr.families._special import (
    bartlett,
    digamma_p,
    inverse,
    log_gamma_p,
    not_positive_definite,
    solve_gap,
)


@dataclass(frozen=True, eq=False, repr=False)
class NormalWishart(ExponentialFamily):
    """N(x; m, (κΛ)⁻¹) Wishart(Λ; ν, W) over the pair (x, Λ).

    Args:
        natural: λ = (½(ν − D), −½(W⁻¹ + κmmᵀ), κm, −½κ), shapes (*batch), (*batch, D, D),
            (*batch, D) and (*batch). The second block is read through its symmetric part.
    """

    natural: tuple[Tensor, Tensor, Tensor, Tensor]
    natural_ndims: ClassVar = (0, 2, 1, 0)
    parameters: ClassVar = ("mean", "mean_precision", "dof", "scale")

    @classmethod
    def from_parameters(cls, mean: Any, mean_precision: Any, dof: Any, scale: Any) -> Self:
        """x | Λ ~ N(m, (κΛ)⁻¹), Λ ~ Wishart(ν, W).

        Args:
            mean: m, shape (*batch, D).
            mean_precision: κ > 0, the number of observations that m is worth, shape (*batch).
            dof: ν > D − 1, shape (*batch).
            scale: W, symmetric positive definite, shape (*batch, D, D).

        Raises:
            ValueError: If shapes do not fit, κ ≤ 0, ν ≤ D − 1, or W is not symmetric positive
                definite.
        """
        m, kappa, nu, W = _validate.common(
            _validate.vector("mean", _validate.as_float("mean", mean)),
            _validate.as_float("mean_precision", mean_precision),
            _validate.as_float("dof", dof),
            _validate.as_float("scale", scale),
        )
        _validate.finite("mean", m)
        _validate.positive("mean_precision", kappa)
        _validate.symmetric("scale", _validate.square("scale", W, m.shape[-1]))
        L = _validate.positive_definite("scale", W)
        D = m.shape[-1]
        _validate.finite("dof", nu)
        _validate.require(
            nu.detach() > D - 1, "dof", f"greater than D − 1 = {D - 1}", nu, "add to it"
        )
        return cls._from_inverse_scale(m, kappa, 0.5 * (nu - D + 1), inverse(L))

    @classmethod
    def from_expectation(
        cls, mu: tuple[Tensor, Tensor, Tensor, Tensor], like: Self | None = None
    ) -> Self:
        """The member with E[T] = μ: ν and W as in a Wishart, m = μ₂⁻¹μ₃, κ = D/(μ₄ − mᵀμ₃)."""
        mu1, mu2, mu3, mu4 = _validate.common(*(_validate.as_float("mu", x) for x in mu))
        dtype, D = mu3.dtype, _validate.vector("mu[2]", mu3).shape[-1]
        L = _validate.positive_definite("mu[1]", _validate.square("mu[1]", mu2, D).double())
        gap = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1) - _validate.finite("mu[0]", mu1)
        _validate.require(
            gap.detach() > 0,
            "log|mu[1]| − mu[0]",
            "positive (Jensen's inequality)",
            gap,
            "no normal-Wishart distribution has these expectations",
        )
        m = torch.cholesky_solve(mu3.double().unsqueeze(-1), L).squeeze(-1)
        spread = _validate.finite("mu[3]", mu4).double() - (m * mu3).sum(-1)
        _validate.positive(
            "mu[3] − mᵀmu[2]", spread, "no normal-Wishart distribution has these expectations"
        )
        x = solve_gap(gap, D)
        V = (2 * x + D - 1)[..., None, None] * inverse(L)
        return cls._from_inverse_scale(*(y.to(dtype) for y in (m, D / spread, x, V)))

    @classmethod
    def _from_inverse_scale(cls, m: Tensor, kappa: Tensor, x: Tensor, V: Tensor) -> Self:
        # V = W⁻¹ and x = ½(ν − D + 1), which is what is left of ν above its bound.
        kappa_m = kappa.unsqueeze(-1) * m
        second = -0.5 * (V + kappa_m.unsqueeze(-1) * m.unsqueeze(-2))
        return cls(natural=(x - 0.5, second, kappa_m, -0.5 * kappa))

    def _validate(self) -> None:
        _validate.finite("natural[2] = κm", _validate.vector("natural[2] = κm", self.natural[2]))
        _validate.square("natural[1]", self.natural[1], self.dim)
        _validate.positive("mean_precision κ", self.mean_precision, "natural[3] = −½κ")
        _validate.positive(
            "½(dof − D + 1)", self._x, "natural[0] = ½(dof − D) must exceed −½: dof > D − 1"
        )
        # Validation factorises W⁻¹; keep the factor.
        object.__setattr__(
            self,
            "cholesky",
            _validate.positive_definite("W⁻¹ = −2 natural[1] − κmmᵀ", self.inverse_scale),
        )

    @cached_property
    def cholesky(self) -> Tensor:
        """L with W⁻¹ = LLᵀ, lower triangular, shape (*batch, D, D)."""
        return torch.linalg.cholesky(self.inverse_scale)

    @property
    def _x(self) -> Tensor:
        return self.natural[0] + 0.5

    @property
    def dim(self) -> int:
        """D, the length of x."""
        return self.natural[2].shape[-1]

    @cached_property
    def mean(self) -> Tensor:
        """m = λ₃/κ, shape (*batch, D)."""
        return self.natural[2] / self.mean_precision.unsqueeze(-1)

    @cached_property
    def mean_precision(self) -> Tensor:
        """κ = −2λ₄, shape (*batch)."""
        return -2 * self.natural[3]

    @property
    def dof(self) -> Tensor:
        """ν = 2λ₁ + D, shape (*batch)."""
        return 2 * self.natural[0] + self.dim

    @property
    def inverse_scale(self) -> Tensor:
        """W⁻¹ = −2λ₂ − κmmᵀ, shape (*batch, D, D)."""
        lam2, kappa_m = self.natural[1:3]
        return -(lam2 + lam2.mT) - kappa_m.unsqueeze(-1) * self.mean.unsqueeze(-2)

    @property
    def scale(self) -> Tensor:
        """W, shape (*batch, D, D)."""
        return inverse(self.cholesky)

    @property
    def mode(self) -> tuple[Tensor, Tensor]:
        """The pair (x, Λ) of highest density, (m, (ν − D)W), shapes (*batch, D) and (*batch, D, D).

        Raises:
            ValueError: If ν ≤ D: the density has no peak.
        """
        excess = _validate.positive(
            "dof − D", self.dof - self.dim, "for a mode the family needs more than D degrees"
        )
        return self.mean, excess[..., None, None] * self.scale

    def log_partition(self) -> Tensor:
        """A(λ) = ½ν (D log 2 + log|W|) + log Γ_D(ν/2) − ½ D log κ."""
        wishart = 0.5 * self.dof * self._log_det_2W() + log_gamma_p(self._x, self.dim)
        return wishart - 0.5 * self.dim * self.mean_precision.log()

    def expectation(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """μ = (ψ_D(ν/2) + D log 2 + log|W|, νW, νWm, D/κ + ν mᵀWm)."""
        precision = self.dof[..., None, None] * self.scale
        precision_m = (precision @ self.mean.unsqueeze(-1)).squeeze(-1)
        square = self.dim / self.mean_precision + (self.mean * precision_m).sum(-1)
        return digamma_p(self._x, self.dim) + self._log_det_2W(), precision, precision_m, square

    def sufficient_statistics(self, theta: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """T = (log|Λ|, Λ, Λx, xᵀΛx) for the pair (x, Λ) of shapes (..., D) and (..., D, D)."""
        x, precision = _pair(theta)
        precision_x = (precision @ x.unsqueeze(-1)).squeeze(-1)
        log_det = torch.linalg.slogdet(precision).logabsdet
        return log_det, precision, precision_x, (x * precision_x).sum(-1)

    def log_base_measure(self, theta: Any) -> Tensor:
        """log h = −½ D log 2π."""
        return self.natural[0].new_tensor(-0.5 * self.dim * math.log(2 * math.pi))

    def expected_log_base_measure(self) -> Tensor:
        """E[log h] = −½ D log 2π."""
        return self.log_base_measure(None)

    def outside_support(self, theta: Any) -> Tensor:
        """Where Λ is not symmetric (up to rounding) and positive definite."""
        return not_positive_definite(_pair(theta)[1])

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """n draws (x, Λ), shapes (n, *batch, D) and (n, *batch, D, D)."""
        B = bartlett(self._x, self.dim, n, generator)
        noise = torch.randn(B.shape[:-1], dtype=B.dtype, device=B.device, generator=generator)
        # W⁻¹ = LLᵀ, so Y = L⁻ᵀB gives Λ = YYᵀ, and Y⁻ᵀε = L B⁻ᵀε has covariance Λ⁻¹.
        Y = torch.linalg.solve_triangular(self.cholesky.mT, B, upper=True)
        spread = self.cholesky @ torch.linalg.solve_triangular(
            B.mT, noise.unsqueeze(-1), upper=True
        )
        x = self.mean + spread.squeeze(-1) * self.mean_precision.rsqrt().unsqueeze(-1)
        return x, Y @ Y.mT

    def _log_det_2W(self) -> Tensor:
        log_det_V = 2 * self.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.dim * math.log(2) - log_det_V


def _pair(theta: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(theta, tuple | list) or len(theta) != 2:
        raise TypeError(
            f"theta must be the pair (mean, precision), got {type(theta).__name__}; pass both"
        )
    return _validate.as_float("theta[0]", theta[0]), _validate.as_float("theta[1]", theta[1])

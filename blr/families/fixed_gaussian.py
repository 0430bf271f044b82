"""Gaussian posteriors N(m, S₀⁻¹) whose precision is known.

    T(θ) = θ      λ = S₀m      μ = m      A(λ) = ½ mᵀS₀m      h(θ) = N(θ; 0, S₀⁻¹)

The base measure is no constant: ∇_μH = 0, and a step of the rule is one of gradient descent. S₀ is
a matrix or diagonal, such as s·I: then all but `covariance` and `fisher` take O(D) memory and time.

References: Khan & Rue (2023), section 1.3.
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
class FixedGaussian(ExponentialFamily):
    """N(m, S₀⁻¹) with known precision S₀: T(θ) = θ, λ = S₀m, μ = m.

    Args:
        natural: λ = S₀m, shape (*batch, D).
        precision: S₀, shape (D, D); or its diagonal, shape (D,); or s for s·I, which is kept as
            the diagonal without taking its memory. No part of λ, and shared by the batch.
    """

    natural: Tensor
    precision: Tensor
    natural_ndims: ClassVar = 1
    parameters: ClassVar = ("mean", "precision")

    @classmethod
    def from_moments(cls, mean: Any, precision: Any) -> Self:
        """N(m, S₀⁻¹) from its mean and the known precision.

        Args:
            mean: m, shape (*batch, D).
            precision: S₀, shape (D, D); or its diagonal, shape (D,); or a number s for s·I.

        Raises:
            ValueError: If the precision is of another shape, or not positive definite.
        """
        m = _validate.finite("mean", _validate.vector("mean", _validate.as_float("mean", mean)))
        m, S = _validate.common(m, _validate.as_float("precision", precision))
        _checked(S, m.shape[-1])
        return cls(natural=_times(m, S), precision=S)

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
        D = _validate.vector("natural = S₀m", self.natural).shape[-1]
        _validate.finite("natural = S₀m", self.natural)
        S = _validate.as_float("precision", self.precision).to(self.natural.dtype)
        L = vars(self).get("cholesky")
        # A member that `at` has made brings the factor along, and with it the proof.
        if L is None or S is not self.precision or L.shape[-1] != D:
            S, vars(self)["cholesky"] = _checked(S, D)
            object.__setattr__(self, "precision", S)

    def at(self, natural: Tree) -> Self:
        """The member with the same known precision, which is not factorised again, at another λ."""
        q = object.__new__(type(self))
        vars(q).update(vars(self) | {"natural": natural})
        q.__post_init__()
        return q

    @cached_property
    def cholesky(self) -> Tensor:
        """L with S₀ = LLᵀ, lower triangular, shape (D, D); √s, shape (D,), if S₀ is diagonal."""
        return torch.linalg.cholesky(self.precision) if self._dense else self.precision.sqrt()

    @property
    def mean(self) -> Tensor:
        """m = S₀⁻¹λ, shape (*batch, D)."""
        if not self._dense:
            return self.natural / self.precision
        return torch.cholesky_solve(self.natural.unsqueeze(-1), self.cholesky).squeeze(-1)

    @property
    def covariance(self) -> Tensor:
        """S₀⁻¹, shape (D, D)."""
        return inverse(self.cholesky) if self._dense else torch.diag(self.variance)

    @property
    def variance(self) -> Tensor:
        """The diagonal of S₀⁻¹, shape (D,)."""
        return self.covariance.diagonal() if self._dense else 1 / self.precision

    @property
    def dim(self) -> int:
        """D, the length of θ."""
        return self.natural.shape[-1]

    @property
    def _dense(self) -> bool:
        return self.precision.ndim == 2

    def log_partition(self) -> Tensor:
        """A(λ) = ½ λᵀS₀⁻¹λ."""
        return 0.5 * (self.mean * self.natural).sum(-1)

    def expectation(self) -> Tensor:
        """μ = m."""
        return self.mean

    def entropy_gradient(self) -> Tensor:
        """∇_μH = −λ + S₀m = 0: the entropy does not depend on the mean."""
        return self.natural.new_zeros(()).expand_as(self.natural)

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
        return self._log_normaliser() - 0.5 * (_times(theta, self.precision) * theta).sum(-1)

    def expected_log_base_measure(self) -> Tensor:
        """E[log h] = log N(m; 0, S₀⁻¹) − ½D."""
        return self._log_normaliser() - 0.5 * ((self.mean * self.natural).sum(-1) + self.dim)

    def _log_normaliser(self) -> Tensor:
        pivots = self.cholesky.diagonal() if self._dense else self.cholesky
        return log_h_normal(self.natural) + pivots.log().sum()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, *batch, D)."""
        noise, L = standard_normal(n, self.natural, generator), self.cholesky
        if not self._dense:
            return noise.div_(L).add_(self.mean)
        # S₀ = LLᵀ, so L⁻ᵀε has covariance S₀⁻¹.
        step = torch.linalg.solve_triangular(L.mT, noise.unsqueeze(-1), upper=True)
        return self.mean + step.squeeze(-1)

    def _check_same_family(self, other: ExponentialFamily) -> None:
        super()._check_same_family(other)
        S, other_S = self.precision, other.precision  # type: ignore[attr-defined]
        if S.ndim != other_S.ndim:
            S, other_S = (x if x.ndim == 2 else torch.diag(x) for x in (S, other_S))
        if not torch.equal(S, other_S):
            raise ValueError(
                "the two Gaussians have different known precisions, so they are members of "
                "different families; use Gaussian.from_moments for both"
            )


def _checked(S: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """S₀ and its factor, both as matrices or as diagonals."""
    if S.ndim == 2:
        _validate.symmetric("precision", _validate.square("precision", S, D))
        return S, _validate.positive_definite("precision", S)
    if S.shape not in ((), (D,)):
        raise ValueError(
            f"precision must be a number or have shape ({D},) or ({D}, {D}), "
            f"got {tuple(S.shape)}; share one between the members of a batch"
        )
    _validate.positive("precision", S)
    return S.expand(D), S.sqrt().expand(D)


def _times(x: Tensor, S: Tensor) -> Tensor:
    """S₀x for vectors x of shape (..., D)."""
    return x @ S if S.ndim == 2 else x * S

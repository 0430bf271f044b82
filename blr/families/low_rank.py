"""Gaussians N(m, S⁻¹) whose precision is low-rank plus diagonal: S = UUᵀ + diag d.

    A = D^{−½}U,   AᵀA = V diag(g) Vᵀ
    S⁻¹ = D^{−½}(I − AV diag(1/(1 + g)) VᵀAᵀ)D^{−½},      log|S| = Σ log d + Σ log(1 + g)

With U of shape (P, L) everything costs O(PL²), and no P × P matrix is formed. It is no exponential
family: the sum of two such precisions has rank 2L, so a step of the rule must project.

References: Mishkin et al. (2018), SLANG, appendix; Woodbury (1950).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from blr import _validate


@dataclass(frozen=True, eq=False, repr=False)
class LowRankGaussian:
    """N(m, (UUᵀ + diag d)⁻¹).

    Args:
        mean: m, shape (P,).
        factor: U, shape (P, L); L = 0 is a diagonal Gaussian.
        diagonal: d, positive, shape (P,) or a number.

    Raises:
        ValueError: If shapes do not fit, or d is not positive.
    """

    mean: Tensor
    factor: Tensor
    diagonal: Tensor

    def __post_init__(self) -> None:
        """Convert and check the three parts."""
        m, U, d = _validate.common(
            _validate.as_float("mean", self.mean),
            _validate.as_float("factor", self.factor),
            _validate.as_float("diagonal", self.diagonal),
        )
        if m.ndim != 1 or U.ndim != 2 or len(U) != len(m) or d.shape not in ((), m.shape):
            raise ValueError(
                "mean, factor and diagonal must have shapes (P,), (P, L) and (P,), got "
                f"{tuple(m.shape)}, {tuple(U.shape)} and {tuple(d.shape)}; pass one Gaussian"
            )
        _validate.finite("mean", m)
        _validate.finite("factor", U)
        _validate.positive("diagonal", d, "the part of the precision beside UUᵀ must not vanish")
        for name, value in (("mean", m), ("factor", U), ("diagonal", d.expand(m.shape))):
            object.__setattr__(self, name, value)

    @classmethod
    def from_diagonal(cls, mean: Any, precision: Any) -> Self:
        """N(m, diag(s)⁻¹), of rank L = 0, from m of shape (P,) and s of shape (P,) or a number."""
        mean = _validate.as_float("mean", mean)
        return cls(mean, mean.new_zeros(len(mean), 0), _validate.as_float("precision", precision))

    def at(self, mean: Tensor) -> Self:
        """The Gaussian with the same precision at another mean."""
        return dataclasses.replace(self, mean=mean)

    # ---- the precision ------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """L, the number of columns of U."""
        return self.factor.shape[1]

    @property
    def precision_diagonal(self) -> Tensor:
        """The diagonal of S, shape (P,)."""
        return self.diagonal + (self.factor**2).sum(1)

    @property
    def natural(self) -> tuple[Tensor, Tensor]:
        """(Sm, −½ diag S): the part of (Sm, −½S) that the projection keeps; `run` watches it."""
        return self.times(self.mean), -0.5 * self.precision_diagonal

    @property
    def variance(self) -> Tensor:
        """The diagonal of S⁻¹, shape (P,)."""
        g, AV = self._spectrum
        return (1 - (AV**2 / (1 + g)).sum(1)) / self.diagonal

    def times(self, b: Tensor) -> Tensor:
        """Sb for vectors b of shape (..., P)."""
        return self.diagonal * b + (b @ self.factor) @ self.factor.mT

    def solve(self, b: Tensor) -> Tensor:
        """S⁻¹b for vectors b of shape (..., P), by Woodbury's identity."""
        g, _ = self._spectrum
        root = self.diagonal.sqrt()
        return self._without(b / root, 1 / (1 + g)) / root

    def log_det(self) -> Tensor:
        """log|S|."""
        return self.diagonal.log().sum() + self._spectrum[0].log1p().sum()

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues g of AᵀA, and AV, whose columns are the eigenvectors of AAᵀ times √g."""
        A = self.factor / self.diagonal.sqrt().unsqueeze(1)
        g, V = torch.linalg.eigh(A.mT @ A)
        return g.clamp_min(0), A @ V

    def _without(self, x: Tensor, c: Tensor) -> Tensor:
        """(I − AV diag(c) VᵀAᵀ)x."""
        AV = self._spectrum[1]
        return x - ((x @ AV) * c) @ AV.mT

    # ---- the distribution ---------------------------------------------------------------------

    def log_prob(self, theta: Any) -> Tensor:
        """log q(θ) for θ of shape (..., P)."""
        r = _validate.as_float("theta", theta) - self.mean
        constant = self.log_det() - len(self.mean) * math.log(2 * math.pi)
        return 0.5 * (constant - (r * self.times(r)).sum(-1))

    def entropy(self) -> Tensor:
        """H(q) = ½ P log 2πe − ½ log|S| in nats."""
        return 0.5 * (len(self.mean) * math.log(2 * math.pi * math.e) - self.log_det())

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws m + D^{−½}(I + AAᵀ)^{−½}ε, shape (n, P)."""
        m = self.mean
        shape = (n, len(m))
        noise = torch.randn(shape, dtype=m.dtype, device=m.device, generator=generator)
        root = (1 + self._spectrum[0]).sqrt()
        # (1 − 1/√(1+g))/g, without dividing by a g that may be zero.
        return m + self._without(noise, 1 / (root * (1 + root))) / self.diagonal.sqrt()

    def kl(self, other: Any) -> Tensor:
        """KL(q‖p) = −H(q) − log p(m) + ½ Tr(S_p S⁻¹) in nats.

        Args:
            other: p, a LowRankGaussian, DiagonalGaussian, Gaussian or FixedGaussian.
        """
        g, AV = self._spectrum
        W = AV / (self.diagonal.sqrt().unsqueeze(1) * (1 + g).sqrt())  # S⁻¹ = D⁻¹ − WWᵀ
        if isinstance(other, LowRankGaussian):
            s, product = other.precision_diagonal, other.times(W.mT)
        elif other.precision.ndim == 1:
            s, product = other.precision, other.precision * W.mT
        else:
            s, product = other.precision.diagonal(), W.mT @ other.precision
        trace = (s / self.diagonal).sum() - (W.mT * product).sum()
        return 0.5 * trace - self.entropy() - other.log_prob(self.mean)

    def __repr__(self) -> str:
        """The size and the rank."""
        return f"{type(self).__name__}(P={len(self.mean)}, rank={self.rank})"

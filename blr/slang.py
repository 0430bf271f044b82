"""The rule for Gaussians of low-rank plus diagonal precision, which are no exponential family.

    S ← project_L( (1 − ρ)S + ρ(CCᵀ + diag δ) )      m ← m − αS⁻¹ĝ      CCᵀ + diag δ ≈ E_q[∇²ℓ̄]

with the new S. The average has more columns than S = UUᵀ + diag d may have: the L largest
eigenpairs of its low-rank part are kept, and what is left out goes to d, so that the diagonal of S
stays what the rule makes it.

References: Mishkin, Kunstner, Nielsen, Schmidt & Khan (2018), SLANG: fast structured covariance
approximations for Bayesian deep learning with natural gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blr import _validate
from blr.families.low_rank import LowRankGaussian
from blr.likelihoods import TotalLoss
from blr.per_example import example_gradients, jacobian_and_curvature


def average(
    q: LowRankGaussian, factor: Tensor, delta: float | Tensor, rank: int, lr: float
) -> LowRankGaussian:
    """q with the precision (1 − ρ)S + ρ(CCᵀ + diag δ), projected; the mean stays.

    Args:
        q: Gaussian with precision S = UUᵀ + diag d.
        factor: C, shape (P, M).
        delta: δ, a number or shape (P,).
        rank: L, the most columns that are kept.
        lr: ρ, between 0 and 1.

    Raises:
        ValueError: If ρ is not between 0 and 1, or nothing positive is left on the diagonal.
    """
    if not 0 <= lr <= 1:
        raise ValueError(f"lr must be between 0 and 1, got {lr:g}; precisions are averaged with it")
    B = torch.cat([(1 - lr) ** 0.5 * q.factor, lr**0.5 * factor], 1)
    U = _largest(B, rank)
    left_out = ((B**2).sum(1) - (U**2).sum(1)).clamp_min(0)
    d = (1 - lr) * q.diagonal + lr * delta + left_out
    return LowRankGaussian(q.mean, U, d)


def factored(
    loss: TotalLoss,
    q: LowRankGaussian,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    rows: Callable[[TotalLoss, Tensor], Tensor] = example_gradients,
) -> tuple[Tensor, Tensor, float | Tensor]:
    """ĝ ≈ E_q[∇ℓ̄], and C, δ with CCᵀ + diag δ ≈ E_q[∇²ℓ̄], at samples θ ~ q.

    Args:
        loss: ℓ̄, whose prior is not sampled.
        q: Gaussian to sample from.
        num_samples: S.
        generator: Source of randomness.
        rows: Vectors cⱼ with Σⱼ cⱼcⱼᵀ ≈ Σᵢ ∇²ℓᵢ, shape (M, P): `example_gradients`, the empirical
            Fisher matrix of SLANG, or `gauss_newton_rows`.

    Returns:
        ĝ of shape (P,), C of shape (P, S·M), and δ.

    Raises:
        TypeError: If the loss does not know its examples.
        ValueError: If `num_samples` is less than 1.
    """
    _validate.instance("loss", loss, TotalLoss, "pass one, which knows its examples, N and δ")
    _validate.number("num_samples", num_samples, lambda n: n >= 1, "at least 1")
    theta = q.sample(num_samples, generator)
    weight, delta = loss.weight, loss.prior_precision
    g = torch.stack([example_gradients(loss, t).sum(0) for t in theta]).mean(0)
    C = torch.cat([rows(loss, t) for t in theta]).mT * (weight / num_samples) ** 0.5
    return weight * g + delta * q.mean, C, delta


def gauss_newton_rows(loss: TotalLoss, theta: Tensor) -> Tensor:
    """Vectors with Σⱼ cⱼcⱼᵀ = Σᵢ Jᵢᵀ(∂²ℓᵢ/∂f²)Jᵢ, shape (|B|K, P): cᵢₖ = √hᵢₖ Jᵢᵀvᵢₖ.

    h and v are eigenvalues and eigenvectors of ∂²ℓᵢ/∂f²; negative ones count as zero.
    """
    J, curvature = jacobian_and_curvature(loss, theta)
    remedy = "lower the rates, or look for NaN or inf in the data"
    _validate.require(curvature.isfinite(), "curvature ∂²ℓᵢ/∂f²", "finite", curvature, remedy)
    h, v = torch.linalg.eigh(curvature)
    return torch.einsum("ik,ilk,ilp->ikp", h.clamp_min(0).sqrt(), v, J).flatten(0, 1)


def _largest(B: Tensor, rank: int) -> Tensor:
    """U of at most L columns with UUᵀ the L largest eigenpairs of BBᵀ, from the smaller Gram."""
    if B.shape[1] <= B.shape[0]:
        return B @ _top(B.mT @ B, rank)
    V = _top(B @ B.mT, rank)
    return V * (V.mT @ B).norm(dim=1)


def _top(symmetric: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(symmetric).eigenvectors[:, max(len(symmetric) - rank, 0) :]


@dataclass(frozen=True)
class LowRankRule:
    """The rule in (m, U, d) as a recipe, on a `LowRankGaussian`.

    Args:
        derivatives: (ĝ, C, δ) from (loss, q), such as `factored`.
        rank: L.
        lr: Rate ρ of the precision, or a function of the step t = 1, 2, … that gives it.
        lr_mean: Rate α of the mean, or such a function; ρ if missing.
        momentum: Decay β₁ of an average of ĝ that starts at zero; 0 takes ĝ as it is.

    Raises:
        ValueError: If a number is out of its range.
    """

    derivatives: Callable[[Any, Any], tuple[Tensor, Tensor, float | Tensor]]
    rank: int
    lr: float | Callable[[int], float] = 0.1
    lr_mean: float | Callable[[int], float] | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        _validate.number("rank", self.rank, lambda x: x >= 0, "at least zero")
        _validate.number("lr", self.lr, lambda x: 0 <= x <= 1, "between 0 and 1")
        _validate.number("lr_mean", self.lr_mean, lambda x: x > 0, "positive")
        _validate.number("momentum", self.momentum, lambda x: 0 <= x < 1, "in [0, 1)")

    def posteriors(self, losses: Iterable[Any], q: LowRankGaussian) -> Iterator[LowRankGaussian]:
        """q after each step, one step for each of `losses`, starting from q."""
        remedy = "use LowRankGaussian.from_diagonal(mean, precision)"
        _validate.instance("q", q, LowRankGaussian, remedy)
        gbar = torch.zeros_like(q.mean)
        for t, loss in enumerate(losses, 1):
            rho = _at(self.lr, t)
            alpha = rho if self.lr_mean is None else _at(self.lr_mean, t)
            g, C, delta = self.derivatives(loss, q)
            gbar = self.momentum * gbar + (1 - self.momentum) * g
            try:
                q = average(q, C, delta, self.rank, rho)
                q = q.at(q.mean - alpha * q.solve(gbar))
            except (ValueError, torch.linalg.LinAlgError) as error:
                raise ValueError(
                    f"the rates {rho:g} of the precision and {alpha:g} of the mean lead out of the "
                    f"domain of LowRankGaussian: {str(error).rstrip('.')}. Lower them; a "
                    "prior_precision keeps the diagonal of a parameter without gradient from zero"
                ) from error
            yield q


def _at(rate: float | Callable[[int], float], t: int) -> float:
    return rate(t) if callable(rate) else rate

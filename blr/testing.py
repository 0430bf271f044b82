"""The laws of an exponential family, as one check that any family can be put through.

    ∇A = μ      ∇²A = F = Cov[T]      λ → μ → λ      KL ≥ 0, KL(q, q) = 0      E_q[T] = μ
    ∇_λH = F ∇_μH

A family is its log-partition function; everything else must agree with A. `check_family` compares
the closed forms with automatic differentiation and, where the family can be sampled, with draws.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blr import _tree
from blr.expfam import ExponentialFamily


def check_family(
    q: ExponentialFamily,
    other: ExponentialFamily | None = None,
    *,
    rtol: float = 1e-8,
    draws: int = 20_000,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Check the laws at one member, with no batch axes.

    A family that writes nothing but A passes the identities by construction; what it must still
    show is that its draws, or a quadrature, agree with that A.

    Args:
        q: The member, in float64.
        other: A second member, for the divergence; the draws-free law KL(q, q) = 0 needs none.
        rtol: Relative tolerance of the identities.
        draws: Samples for the Monte-Carlo laws, which allow five standard errors and are skipped
            where the family has no sampler; 0 skips them too.
        generator: Source of randomness; a fresh one with seed 0 if missing.

    Returns:
        The deviation found for each law: relative for identities, in standard errors for draws.

    Raises:
        AssertionError: Naming the law that fails, and by how much.
    """
    if len(q.batch_shape):
        raise ValueError(f"q must be one member, got a batch {tuple(q.batch_shape)}; pass q of one")
    flat = lambda tree: _tree.flatten(tree, q.natural_ndims)  # noqa: E731
    lam, mu, F = flat(q.natural), flat(q.expectation()), q.fisher()
    A = lambda x: q._at(_tree.unflatten(x, q.natural, q.natural_ndims)).log_partition()  # noqa: E731

    found = {
        "∇A = μ": _relative(torch.func.grad(A)(lam), mu),
        "∇²A = F": _relative(torch.func.hessian(A)(lam), F),
        "F = Fᵀ": _relative(F.mT, F),
        "μ → λ → μ": _relative(
            flat(type(q).from_expectation(q.expectation(), q).expectation()), mu
        ),
        "∇_λH = F ∇_μH": _entropy_slope(q, lam, F),
        "KL(q, q) = 0": abs(q.kl(q).item()) / (1 + abs(q.log_partition().item())),
    }
    for law, deviation in found.items():
        assert deviation <= rtol, f"{type(q).__name__}: {law} is off by {deviation:.3g} (relative)"
    # On symmetric matrices F is positive definite; elsewhere in λ-space it may be singular.
    lowest = torch.linalg.eigvalsh(0.5 * (F + F.mT)).min().item()
    assert lowest >= -rtol * F.abs().max().item(), f"F has a negative eigenvalue {lowest:.3g}"
    if other is not None:
        dual = _tree.sub(other.natural, q.natural)
        found["λ + λ̃ − λ̃ = λ"] = _relative(flat(q.add(dual).remove(dual).natural), lam)
        assert found["λ + λ̃ − λ̃ = λ"] <= rtol, "removing what was added does not give λ back"
        size = 1 + abs(q.log_partition().item()) + abs(other.log_partition().item())
        found["KL ≥ 0"] = max(0.0, -q.kl(other).item()) / size
        assert found["KL ≥ 0"] <= 1e-12, f"KL(q, p) = {q.kl(other).item():.3g} is negative"

    if draws and type(q).sample is not ExponentialFamily.sample:
        generator = generator or torch.Generator(device=lam.device).manual_seed(0)
        found |= _check_draws(q, other, q.sample(draws, generator), mu, F)
    return found


def _check_draws(
    q: ExponentialFamily, other: ExponentialFamily | None, theta, mu: Tensor, F: Tensor
) -> dict[str, float]:
    T = _tree.flatten(q.sufficient_statistics(theta), q.natural_ndims)
    centred = T - mu
    log_q = q.log_prob(theta)
    found = {
        "E[T] = μ": _standard_errors(T, mu),
        "Cov[T] = F": _standard_errors(centred.unsqueeze(-1) * centred.unsqueeze(-2), F),
        "H = −E[log q]": _standard_errors(-log_q, q.entropy()),
    }
    if other is not None:
        found["KL = E[log q − log p]"] = _standard_errors(
            log_q - other.log_prob(theta), q.kl(other)
        )
    for law, deviation in found.items():
        assert deviation <= 5, (
            f"{type(q).__name__}: {law} is off by {deviation:.1f} standard errors"
        )
    return found


def _entropy_slope(q: ExponentialFamily, lam: Tensor, F: Tensor) -> float:
    """How far `entropy_gradient` is from autodiff of H, in units of the terms that cancel."""
    H = lambda x: q._at(_tree.unflatten(x, q.natural, q.natural_ndims)).entropy()  # noqa: E731
    slope = _tree.flatten(q.entropy_gradient(), q.natural_ndims)
    gap = (torch.func.grad(H)(lam) - F @ slope).abs()
    terms = F.abs() @ lam.abs()
    # A coordinate that is small beside the others, or beside 1, is left with their rounding.
    return (gap / (terms + 1e-9 * (1 + terms.max()))).max().item()


def _relative(actual: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().item() or 1.0
    return (actual - expected).abs().max().item() / scale


def _standard_errors(draws: Tensor, expected: Tensor) -> float:
    """The largest deviation of a mean over the leading axis, in its own standard errors."""
    error = draws.std(0) / math.sqrt(len(draws))
    rounding = 1e-12 * (1 + expected.abs())
    return ((draws.mean(0) - expected).abs() / (error + rounding)).max().item()

"""Functions that several families share: of p × p matrices, inverse maps λ(μ), normal noise.

    log Γ_p(x + (p−1)/2) = ¼ p(p−1) log π + Σ_{j<p} log Γ(x + j/2)
    ψ_p(x + (p−1)/2)     = Σ_{j<p} ψ(x + j/2)

Arguments are counted from the end of the domain, x = ν/2 − (p−1)/2 > 0, so that nothing cancels
there; with p = 1 these are log Γ and ψ. Inverse maps are solved in float64.

References: Muirhead (1982), Aspects of multivariate statistical theory, section 2.1; Minka (2000),
Estimating a Dirichlet distribution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from blr import _validate


def log_gamma_p(x: Tensor, p: int) -> Tensor:
    """log Γ_p(x + (p−1)/2) for x > 0."""
    return 0.25 * p * (p - 1) * math.log(math.pi) + torch.lgamma(_steps(x, p)).sum(-1)


def digamma_p(x: Tensor, p: int) -> Tensor:
    """ψ_p(x + (p−1)/2) for x > 0: the derivative of log Γ_p."""
    return torch.digamma(_steps(x, p)).sum(-1)


def _steps(x: Tensor, p: int) -> Tensor:
    return x.unsqueeze(-1) + 0.5 * torch.arange(p, dtype=x.dtype, device=x.device)


def inverse(L: Tensor) -> Tensor:
    """(LLᵀ)⁻¹ = L⁻ᵀL⁻¹ from the Cholesky factor, shape (*batch, p, p).

    Not `torch.cholesky_inverse`, whose forward-mode derivative is wrong (torch 2.13), and with it
    every Fisher information.
    """
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand(L.shape)
    inverse_L = torch.linalg.solve_triangular(L, eye, upper=False)
    return inverse_L.mT @ inverse_L


def solve_gap(gap: Tensor, p: int = 1) -> Tensor:
    """The x > 0 with p log(x + (p−1)/2) − ψ_p(x + (p−1)/2) = gap > 0.

    The gap of Jensen's inequality, log |E X| − E log |X|, of a Wishart matrix or, for p = 1, of a
    gamma variable with shape x. Newton's method on 1/gap, which is nearly linear in x and starts
    with slope one; so x = 1/gap is on the side from which the steps do not overshoot.
    """
    gap, x = gap.double(), 1 / gap.double()
    for _ in range(30):
        half_dof = x + 0.5 * (p - 1)
        g = p * half_dof.log() - digamma_p(x, p)
        slope = p / half_dof - torch.polygamma(1, _steps(x, p)).sum(-1)
        x = (x + g * (gap - g) / (slope * gap)).clamp_min(x / 10)
    return x


def shape_and_rate(mean_log: Any, mean: Any) -> tuple[Tensor, Tensor]:
    """(a, b) with ψ(a) − log b = mean_log and a/b = mean: log a − ψ(a) = log mean − mean_log.

    Raises:
        ValueError: If `mean` is not positive, or log mean ≤ mean_log.
    """
    mean_log, mean = _validate.common(
        _validate.as_float("mu[0]", mean_log), _validate.as_float("mu[1]", mean)
    )
    _validate.positive("mu[1]", mean, "it is the mean of a positive number")
    gap = mean.double().log() - _validate.finite("mu[0]", mean_log).double()
    _validate.require(
        gap.detach() > 0,
        "log mu[1] − mu[0]",
        "positive (Jensen's inequality)",
        gap,
        "no gamma distribution has these expectations",
    )
    a = solve_gap(gap)
    return a.to(mean.dtype), (a / mean.double()).to(mean.dtype)


def concentrations(mean_log: Tensor) -> Tensor:
    """The α, in float64, with ψ(α_k) − ψ(Σα) = mean_log_k, shape (*batch, K).

    Newton's method; the Hessian diag ψ′(α) − ψ′(Σα) 11ᵀ is solved by the Sherman–Morrison formula.
    No α_k may fall below a tenth of itself in a step. The start is exact for large α, where
    ψ(x) = log(x − ½) up to O(x⁻²).

    Raises:
        ValueError: If Σ exp(mean_log) ≥ 1.
    """
    mu = _validate.finite("mu", mean_log).double()
    log_sum = torch.logsumexp(mu, -1, keepdim=True)
    _validate.require(
        log_sum.detach() < 0,
        "log Σ exp(mu)",
        "negative (Jensen's inequality)",
        log_sum,
        "no distribution on the simplex has these expectations of log θ",
    )
    total = (mu.shape[-1] - log_sum.exp()) / (-2 * torch.expm1(log_sum))
    y = mu + torch.digamma(total)
    # ψ(x) is close to log(x − ½) above and to −1/x − γ below, where γ = −ψ(1).
    alpha = torch.where(y > -2.22, y.exp() + 0.5, -1 / (y + 0.5772156649015329))
    for _ in range(40):
        total = alpha.sum(-1, keepdim=True)
        r = torch.digamma(alpha) - torch.digamma(total) - mu
        d = torch.polygamma(1, alpha)
        shared = (r / d).sum(-1, keepdim=True)
        shared = shared / ((1 / d).sum(-1, keepdim=True) - 1 / torch.polygamma(1, total))
        alpha = torch.maximum(alpha - (r - shared) / d, alpha / 10)
    return alpha


def bartlett(x: Tensor, p: int, n: int, generator: torch.Generator | None) -> Tensor:
    """n lower-triangular B with BBᵀ ~ Wishart(ν, I), x = ν/2 − (p−1)/2, shape (n, *batch, p, p).

    Bartlett's decomposition: independent entries, χ² with ν, ν−1, …, ν−p+1 degrees of freedom on
    the squared diagonal and standard normal below it.
    """
    half_dofs = _steps(x, p).flip(-1).expand(n, *x.shape, p)
    diagonal = (2 * torch._standard_gamma(half_dofs, generator)).sqrt()
    noise = torch.randn((*half_dofs.shape, p), dtype=x.dtype, device=x.device, generator=generator)
    return noise.tril(-1) + torch.diag_embed(diagonal)


def not_positive_definite(X: Tensor) -> Tensor:
    """Where X, shape (..., p, p), is not symmetric (up to rounding) and positive definite."""
    tolerance = 100 * torch.finfo(X.dtype).eps * X.abs().amax((-2, -1))
    skew = ~((X - X.mT).abs().amax((-2, -1)) <= tolerance)
    return skew | (torch.linalg.cholesky_ex(X).info != 0)


def log_h_normal(vector: Tensor) -> Tensor:
    """log h = −½ D log 2π of Gaussians, for any vector of D entries."""
    return vector.new_tensor(-0.5 * vector.shape[-1] * math.log(2 * math.pi))


def standard_normal(n: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """n draws from N(0, I), shape (n, *like.shape)."""
    return torch.randn((n, *like.shape), dtype=like.dtype, device=like.device, generator=generator)

"""The equations of the optimizers, on flat tensors, in place.

IVON is the rule for q = N(m, 1/(N(h + δ))), with the liberties of an optimizer:

    θ  = m + ε/√(N(h + δ))                    ε ~ N(0, 1)
    ĥ  = ĝ (θ − m) N(h + δ)                   Price: E[∇²ℓ] = E[∇ℓ (θ − m)]/σ²
    h ← h + ρ(ĥ − h) + ½ρ²(ĥ − h)²/(h + δ)    ρ = 1 − β₂; h + δ is at least half of what it was
    ḡ ← β₁ḡ + (1 − β₁)ĝ
    m ← m − α clip((ḡ/(1 − β₁ᵗ) + δm − λ₀)/(h + δ), ξ)

N is the effective number of examples, ĝ the gradient of the mean loss at θ, and the prior
N(λ₀/δ, 1/(Nδ)) is divided by N; weight decay is the prior with λ₀ = 0.

VOGN has squared gradients of examples for ĥ, no correction, and the prior inside of the average:

    h ← h + ρ(mean gᵢ² − h)     ḡ ← β₁ḡ + (1 − β₁)(ĝ + δm − λ₀)     m ← m − α ḡ/(h + δ + γ)

BayesBiNN is the rule for signs with probabilities σ(2λ), of which samples are relaxed:

    x = (λ + ½ logit u)/τ,  θ = tanh x,  s = (1 − θ²)/(τ(1 − tanh²λ))
    ḡ ← βḡ + (1 − β)(N s∘ĝ + Tλ − λ₀)     λ ← λ − ρḡ/(1 − βᵗ)

References: Shen et al. (2024), Variational learning is effective for large deep networks,
algorithm 1; Lin, Schmidt & Khan (2020), Handling the positive-definite constraint; Osawa et al.
(2019), Practical deep learning with Bayesian principles; Meng, Bachmann & Khan (2020), Training
binary neural networks using the Bayesian learning rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prior:
    """δ and λ₀: natural parameters of the prior divided by N, numbers or one entry per parameter.

    Args:
        delta: δ, the precision.
        shift: λ₀ = δ·(mean of the prior).
    """

    delta: float | Tensor
    shift: float | Tensor = 0.0


def sample(mean: Tensor, hess: Tensor, noise: Tensor, delta: float | Tensor, ess: float) -> Tensor:
    """θ = m + ε/√(N(h + δ))."""
    return torch.addcmul(mean, noise, (hess + delta).mul_(ess).rsqrt_())


def ivon_step_(
    mean: Tensor,
    momentum: Tensor,
    hess: Tensor,
    gradient: Tensor,
    product: Tensor,
    prior: Prior,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    ess: float,
    gathered: float,
    clip_radius: float,
) -> None:
    """One step of m, ḡ and h, in place.

    Args:
        mean: m.
        momentum: ḡ.
        hess: h.
        gradient: ĝ, averaged over samples.
        product: ĝ(θ − m), averaged over samples.
        prior: δ and λ₀.
        lr: α.
        betas: β₁ and β₂.
        ess: N.
        gathered: 1 − β₁ᵗ, the weight that ḡ has gathered; 1 leaves ḡ as it is.
        clip_radius: ξ.
    """
    (b1, b2), delta = betas, prior.delta
    s = hess + delta
    r = torch.addcmul(hess, s, product, value=-ess)  # h − ĥ
    hess.add_(r, alpha=b2 - 1).addcdiv_(r.square_(), s, value=0.5 * (1 - b2) ** 2)
    momentum.lerp_(gradient, 1 - b1)
    u = (mean * delta).add_(momentum, alpha=1 / gathered).sub_(prior.shift)
    u.div_(torch.add(hess, delta, out=s))
    if clip_radius < float("inf"):
        u.clamp_(-clip_radius, clip_radius)
    mean.sub_(u.mul_(lr))


def ivon_step(
    mean: Tensor,
    momentum: Tensor,
    hess: Tensor,
    gradient: Tensor,
    product: Tensor,
    prior: Prior,
    *,
    lr: float | Tensor,
    rates: tuple[float | Tensor, float | Tensor],
    ess: float | Tensor,
    gathered: float | Tensor,
    clip_radius: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ivon_step_` with new tensors in place of old: m, ḡ and h.

    For compilers, so every number may be a tensor; and in place of β₁ and β₂ come 1 − β₁ and
    1 − β₂, which in float32 cannot be had from them.
    """
    (rho1, rho), delta = rates, prior.delta
    r = hess - ess * (hess + delta) * product  # h − ĥ
    new = hess - rho * r + 0.5 * (rho * r) ** 2 / (hess + delta)
    momentum = momentum + rho1 * (gradient - momentum)
    u = (momentum / gathered + delta * mean - prior.shift) / (new + delta)
    u = u.clamp(-clip_radius, clip_radius)  # type: ignore[arg-type,call-overload]
    return mean - lr * u, momentum, new


def vogn_step_(
    mean: Tensor,
    momentum: Tensor,
    hess: Tensor,
    gradient: Tensor,
    squares: Tensor,
    prior: Prior,
    *,
    lr: float,
    betas: tuple[float, float],
    gathered: float,
    damping: float,
) -> None:
    """One step of VOGN, in place.

    Args:
        mean: m.
        momentum: ḡ.
        hess: h.
        gradient: ĝ, averaged over samples.
        squares: mean gᵢ², averaged over samples.
        prior: δ and λ₀.
        lr: α.
        betas: β₁ and β₂.
        gathered: 1 − β₁ᵗ, or 1.
        damping: γ.
    """
    (b1, b2), delta = betas, prior.delta
    momentum.lerp_((mean * delta).sub_(prior.shift).add_(gradient), 1 - b1)
    hess.lerp_(squares, 1 - b2)
    mean.addcdiv_(momentum, hess + (delta + damping), value=-lr / gathered)


def binary_sample(natural: Tensor, noise: Tensor, relaxation: float) -> Tensor:
    """x = (λ + ½ logit u)/τ, with u = Φ(ε) uniform for ε ~ N(0, 1)."""
    noise = noise.to(natural.dtype)
    half_logit = (torch.special.log_ndtr(noise) - torch.special.log_ndtr(-noise)).mul_(0.5)
    return half_logit.add_(natural).div_(relaxation)


def binary_scale(natural: Tensor, x: Tensor, relaxation: float) -> Tensor:
    """s = (1 − tanh²x)/(τ(1 − tanh²λ)), which float32 would give as 0/0 from λ = 9 on."""
    return (_log_cosh(natural) - _log_cosh(x)).mul_(2).exp_().div_(relaxation)


def bayesbinn_step_(
    natural: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    shift: Tensor | float,
    *,
    lr: float,
    beta: float,
    gathered: float,
    temperature: float,
) -> None:
    """One step of BayesBiNN, in place.

    Args:
        natural: λ.
        momentum: ḡ.
        gradient: N s∘ĝ, averaged over samples.
        shift: λ₀, of the prior.
        lr: ρ.
        beta: β.
        gathered: 1 − βᵗ.
        temperature: T.
    """
    momentum.lerp_((natural * temperature).sub_(shift).add_(gradient), 1 - beta)
    natural.add_(momentum, alpha=-lr / gathered)


def _log_cosh(x: Tensor) -> Tensor:
    """log cosh x + log 2, without overflow."""
    return x.abs().add_(x.abs().mul_(-2).exp_().log1p_())

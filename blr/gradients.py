"""Natural gradients ∇_μ E_q[ℓ̄]: exact, by the delta method, by sampling.

    exact         ∇_μ of the user's function of μ
    delta         E_q[∇ℓ̄] ≈ ∇ℓ̄(m),                E_q[∇²ℓ̄] ≈ ∇²ℓ̄(m)
    price         E_q[∇ℓ̄] ≈ mean ∇ℓ̄(θₛ),           E_q[∇²ℓ̄] ≈ mean ∇²ℓ̄(θₛ)
    stein         the same, E_q[∇²ℓ̄] = E_q[S(θ − m) ∇ℓ̄ᵀ], without second derivatives
    monte_carlo   F⁻¹ Cov_q[T(θ), ℓ̄(θ)]: any family that can be sampled, no derivative of ℓ̄ at all
    relaxed       mean (∂θₛ/∂μ)∘∇ℓ̄(θₛ), θₛ = tanh((λ + δₛ)/τ): signs, relaxed to reals
    straight_through   ∇ℓ̄(sign λ): signs, as if θ = μ

For Gaussians, the theorems of Bonnet and Price turn E_q[∇ℓ̄] and E_q[∇²ℓ̄] into ∇_μ. What stands
for ∇²ℓ̄ is a part of its own, the `curvature`: a function of (loss, θ, ∇ℓ̄(θ)).

References: Khan & Rue (2023), sections 1.3 and 4; Opper & Archambeau (2009); Lin, Khan & Schmidt
(2019), Stein's lemma for the reparameterization trick with exponential family mixtures; Meng,
Bachmann & Khan (2020), Training binary neural networks using the Bayesian learning rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, vmap

from blr import _tree, _validate, per_example
from blr._tree import Tree
from blr.expfam import ExponentialFamily
from blr.families.bernoulli import Bernoulli, SignBernoulli
from blr.families.fixed_gaussian import FixedGaussian
from blr.families.gaussian import DiagonalGaussian, Gaussian
from blr.likelihoods import TotalLoss

Loss: TypeAlias = Callable[[Tensor], Tensor]
"""ℓ̄, from θ of shape (P,) to a number."""
Curvature: TypeAlias = Callable[[Any, Tensor, Tensor], Tensor]
"""Stands for ∇²ℓ̄(θ): from (loss, θ, ∇ℓ̄(θ)) to shape (P, P), or (P,) for its diagonal."""
AnyGaussian: TypeAlias = Gaussian | DiagonalGaussian | FixedGaussian

CHUNK = 256
"""Directions in which second derivatives are taken at once: memory is CHUNK times P."""


# ---- estimators of ∇_μ E_q[ℓ̄] -------------------------------------------------------------------


def exact(expected_loss: Callable[[Any], Tensor], q: ExponentialFamily) -> Tree:
    """∇_μ E_q[ℓ̄] where the user can write E_q[ℓ̄] as a function of μ.

    Conjugate models, EM, and message passing need nothing else.

    Args:
        expected_loss: E_q[ℓ̄], from μ with the structure of `q.natural` to a number.
        q: Posterior.
    """
    return grad(expected_loss)(q.expectation())


def delta(
    loss: Loss, q: AnyGaussian | Bernoulli | SignBernoulli, curvature: Curvature | None = None
) -> Tree:
    """∇_μ E_q[ℓ̄] with ℓ̄ replaced by its quadratic expansion at m: exact for quadratic ℓ̄.

    For binary variables, which have no more statistics than θ itself, E_q[ℓ̄] ≈ ℓ̄(μ) and the
    gradient is ∇ℓ̄(μ): exact if ℓ̄ is multilinear, linear in each variable.

    Args:
        loss: ℓ̄.
        q: One Gaussian, without batch axes; or independent binary variables.
        curvature: What stands for ∇²ℓ̄; the exact one, or its diagonal, if missing. Not for
            binary variables.
    """
    if isinstance(q, Bernoulli | SignBernoulli):
        return grad(_data_only(loss))(q.mean)
    return _one(q).natural_gradient(*at_mean(loss, q, curvature))


def price(
    loss: Loss,
    q: AnyGaussian,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    curvature: Curvature | None = None,
) -> Tree:
    """∇_μ E_q[ℓ̄] by the theorems of Bonnet and Price with samples; see `at_samples`."""
    return _one(q).natural_gradient(*at_samples(loss, q, num_samples, generator, curvature))


def stein(
    loss: Loss,
    q: Gaussian | DiagonalGaussian,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tree:
    """∇_μ E_q[ℓ̄] from first derivatives only; see `reparametrized`."""
    return _one(q).natural_gradient(*reparametrized(loss, q, num_samples, generator))


def monte_carlo(
    loss: Callable[[Any], Tensor],
    q: ExponentialFamily,
    num_samples: int = 100,
    generator: torch.Generator | None = None,
) -> Tree:
    """∇_μ E_q[ℓ̄] = F⁻¹ Cov_q[T(θ), ℓ̄(θ)] with the covariance of samples; unbiased.

    Needs only values of ℓ̄, so θ may be discrete. The variance grows with that of ℓ̄.

    Args:
        loss: ℓ̄, from one θ to a number.
        q: Any family with a sampler, without batch axes.
        num_samples: S, at least 2.
        generator: Source of randomness.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2 for a covariance, got {num_samples}")
    theta = q.sample(num_samples, generator)
    T = _tree.flatten(q.sufficient_statistics(theta), q.natural_ndims).reshape(num_samples, -1)
    values = vmap(loss)(theta).to(T.dtype)
    covariance = (T - T.mean(0)).mT @ (values - values.mean()) / (num_samples - 1)
    # A symmetric matrix has its off-diagonal twice among the coordinates, so F may be singular.
    F = q.fisher().reshape(T.shape[-1], T.shape[-1])
    flat = torch.linalg.pinv(F, hermitian=True) @ covariance
    return _tree.unflatten(flat, q.natural, q.natural_ndims)


def relaxed(
    loss: Loss,
    q: SignBernoulli,
    relaxation: float = 1.0,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """∇_μ E_q[ℓ̄] with the signs relaxed to θ = tanh((λ + δ)/τ): mean over samples of s∘∇ℓ̄(θ).

    The scale s = ∂θ/∂μ is `SignBernoulli.relaxed_sample`'s. The estimate is unbiased for the
    relaxed objective, and biased for that of the signs: the bias vanishes with τ, the variance
    grows as 1/τ.

    Args:
        loss: ℓ̄, which must be defined between the signs too.
        q: Signs, without batch axes.
        relaxation: Temperature τ > 0.
        num_samples: S.
        generator: Source of randomness.
    """
    theta, scale = _signs(q).relaxed_sample(num_samples, relaxation, generator)
    return (scale * vmap(grad(_data_only(loss)))(theta)).mean(0)


def straight_through(loss: Loss, q: SignBernoulli) -> Tensor:
    """∇ℓ̄(sign λ): the relaxed gradient without noise and with scale 1, for τ → 0.

    It is ∇_μ E_q[ℓ̄] for linear ℓ̄, and for multilinear ℓ̄ in the limit |λ| → ∞; not in general.

    Args:
        loss: ℓ̄, which must have a derivative at the signs.
        q: Signs, without batch axes; sign 0 is +1.
    """
    return grad(_data_only(loss))(_signs(q).mode)


def with_prior(
    gradient: Callable[[Any, Any], Tree], prior: ExponentialFamily
) -> Callable[[Any, Any], Tree]:
    """An estimator of ∇_μ E_q[ℓ̄ − log p₀], exact in the conjugate prior p₀.

    E_q[−log p₀] = A(λ₀) − ⟨λ₀, μ⟩ − E_q[log h], so the prior subtracts λ₀ and is not sampled.

    Args:
        gradient: Estimator of ∇_μ E_q[ℓ̄], a function of (loss, q).
        prior: p₀, a member of the family of q; the posterior of earlier data, for example.
    """

    def estimate(loss: Any, q: ExponentialFamily) -> Tree:
        # λ + ∇_μH = −∇_μE_q[log h], zero where h is constant.
        base_measure = _tree.add(q.natural, q.entropy_gradient())
        return _tree.sub(_tree.add(gradient(loss, q), base_measure), prior.natural)

    return estimate


# ---- E_q[∇ℓ̄] and E_q[∇²ℓ̄] of a Gaussian ---------------------------------------------------------


def at_mean(
    loss: Loss, q: AnyGaussian, curvature: Curvature | None = None
) -> tuple[Tensor, Tensor]:
    """The delta method: ∇ℓ̄(m) and the curvature at m."""
    m = _one(q).mean
    g = grad(loss)(m)
    return g, (curvature or _exact_curvature(q))(loss, m, g)


def at_samples(
    loss: Loss,
    q: AnyGaussian,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    curvature: Curvature | None = None,
) -> tuple[Tensor, Tensor]:
    """Means of ∇ℓ̄(θₛ) and of the curvature at θₛ ~ q; the prior of a `TotalLoss` is exact.

    Args:
        loss: ℓ̄.
        q: One Gaussian, without batch axes.
        num_samples: S.
        generator: Source of randomness.
        curvature: What stands for ∇²ℓ̄; the exact one, or its diagonal, if missing.

    Raises:
        ValueError: If `num_samples` is less than 1.
    """
    _validate.number("num_samples", num_samples, lambda n: n >= 1, "at least 1")
    theta = _one(q).sample(num_samples, generator)
    curvature = curvature or _exact_curvature(q)
    G = [grad(loss)(t) for t in theta]
    H = [curvature(loss, t, g) for t, g in zip(theta, G, strict=True)]
    # E[∇R] = δm is known: no noise from the prior.
    g = _average(G) - _prior_precision(loss) * (_average(theta) - q.mean)
    return g, _average(H)


def reparametrized(
    loss: Loss,
    q: Gaussian | DiagonalGaussian,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """E_q[∇ℓ̄] and E_q[∇²ℓ̄] = E_q[S(θ − m)∇ℓ̄ᵀ] from gradients alone; the prior is exact.

    Unbiased, with a large variance; symmetrised for a full precision.
    """
    _validate.number("num_samples", num_samples, lambda n: n >= 1, "at least 1")
    theta, m, delta = _one(q).sample(num_samples, generator), q.mean, _prior_precision(loss)
    G, move = vmap(grad(loss))(theta), theta - m
    if isinstance(q, DiagonalGaussian) and not isinstance(delta, Tensor) and delta == 0:
        # In few passes over the parameters, and in little new memory.
        return _average(G), _average(move.mul_(G)).mul_(q.precision)
    G = G - delta * theta
    g = _average(G) + delta * m
    if isinstance(q, DiagonalGaussian):
        return g, q.precision * _average(move * G) + delta
    H = q.precision @ move.mT @ G / num_samples
    return g, 0.5 * (H + H.mT) + _diagonal(delta, m)


# ---- curvatures: what stands for ∇²ℓ̄ ------------------------------------------------------------


def hessian(loss: Loss, theta: Tensor, gradient: Tensor) -> Tensor:
    """∇²ℓ̄(θ), shape (P, P)."""
    return torch.func.hessian(loss)(theta)


def hessian_diagonal(loss: Loss, theta: Tensor, gradient: Tensor) -> Tensor:
    """The diagonal of ∇²ℓ̄(θ), shape (P,), by P products of the Hessian with a unit vector."""

    def entry(e: Tensor) -> Tensor:
        return (torch.func.jvp(grad(loss), (theta,), (e,))[1] * e).sum()

    units = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
    return vmap(entry, chunk_size=CHUNK)(units)


def gauss_newton(loss: TotalLoss, theta: Tensor, gradient: Tensor) -> Tensor:
    """(N/|B|) Σᵢ Jᵢᵀ(∂²ℓᵢ/∂f²)Jᵢ + diag δ, shape (P, P): never negative if ℓ is convex in f.

    Equal to the Hessian for models that are linear in θ.
    """
    _validate.instance("loss", loss, TotalLoss, "pass one, which knows its examples, N and δ")
    J, curvature = per_example.jacobian_and_curvature(loss, theta)
    H = torch.einsum("ikp,ikl,ilr->pr", J, curvature, J)
    return loss.weight * H + _diagonal(loss.prior_precision, theta)


def squared_gradients(loss: TotalLoss, theta: Tensor, gradient: Tensor) -> Tensor:
    """(N/|B|) Σᵢ (∇ℓᵢ)² + δ, shape (P,): the gradient of each example is squared, then added.

    Fast for networks of linear layers, and in little memory for convolutions too; see
    `blr.per_example`.
    """
    _validate.instance("loss", loss, TotalLoss, "pass one, which knows its examples, N and δ")
    return loss.weight * per_example.sum_of_squares(loss, theta) + loss.prior_precision


def squared_batch_gradient(loss: Loss, theta: Tensor, gradient: Tensor) -> Tensor:
    """(∇ℓ̄)², shape (P,): what RMSprop and Adam average. No curvature, but cheap.

    For |B| of N examples its mean is (∇ℓ̄)² plus the variance of the minibatch.
    """
    return gradient**2


def no_curvature(loss: Loss, theta: Tensor, gradient: Tensor) -> Tensor:
    """Zero: a Gaussian whose precision is known asks for none."""
    return theta.new_zeros(()).expand_as(theta)


def _exact_curvature(q: AnyGaussian) -> Curvature:
    if isinstance(q, FixedGaussian):
        return no_curvature
    return hessian if isinstance(q, Gaussian) else hessian_diagonal


def _prior_precision(loss: Any) -> float | Tensor:
    return loss.prior_precision if isinstance(loss, TotalLoss) else 0.0


def _average(samples: Sequence[Tensor] | Tensor) -> Tensor:
    """Their mean; of one sample, itself without a copy."""
    if len(samples) == 1:
        return samples[0]
    return (samples if isinstance(samples, Tensor) else torch.stack(tuple(samples))).mean(0)


def _diagonal(delta: float | Tensor, like: Tensor) -> Tensor:
    return torch.diag(torch.ones_like(like) * delta)


def _data_only(loss: Loss) -> Loss:
    delta = torch.as_tensor(_prior_precision(loss))
    if bool((delta != 0).any()):
        raise ValueError(
            f"prior_precision must be 0 for binary variables, got {delta.max():g}: ½δθ² is the "
            "same at both values of a sign, yet has a slope between them; use with_prior"
        )
    return loss


def _signs(q: Any) -> SignBernoulli:
    if not isinstance(q, SignBernoulli):
        raise TypeError(
            f"q must be SignBernoulli, got {type(q).__name__}; use delta or monte_carlo for others"
        )
    if q.batch_shape:
        raise ValueError(f"q must be one vector, got a batch {tuple(q.batch_shape)}; pass one")
    return q


def _one(q: Any) -> Any:
    if not isinstance(q, AnyGaussian):
        raise TypeError(
            f"q must be Gaussian for derivatives in θ, got {type(q).__name__}; "
            "use exact or monte_carlo for other families"
        )
    if q.batch_shape:
        raise ValueError(f"q must be one Gaussian, got a batch {tuple(q.batch_shape)}; pass one")
    return q

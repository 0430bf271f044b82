"""Natural gradients ∇_μ E_q[ℓ̄]: exact, by the delta method, by sampling.

    exact         ∇_μ of the user's function of μ
    delta         E_q[∇ℓ̄] ≈ ∇ℓ̄(m),                E_q[∇²ℓ̄] ≈ ∇²ℓ̄(m)
    price         E_q[∇ℓ̄] ≈ mean ∇ℓ̄(θₛ),           E_q[∇²ℓ̄] ≈ mean ∇²ℓ̄(θₛ)
    stein         the same, E_q[∇²ℓ̄] = E_q[S(θ − m) ∇ℓ̄ᵀ], without second derivatives
    monte_carlo   F⁻¹ Cov_q[T(θ), ℓ̄(θ)]: any family that can be sampled, no derivative of ℓ̄ at all

For Gaussians, the theorems of Bonnet and Price turn E_q[∇ℓ̄] and E_q[∇²ℓ̄] into ∇_μ. What stands
for ∇²ℓ̄ is a part of its own, the `curvature`: a function of (loss, θ, ∇ℓ̄(θ)).

References: Khan & Rue (2023), sections 1.3 and 4; Opper & Archambeau (2009); Lin, Khan & Schmidt
(2019), Stein's lemma for the reparameterization trick with exponential family mixtures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from blr import _tree
from blr._tree import Tree
from blr.expfam import ExponentialFamily
from blr.families.gaussian import DiagonalGaussian, FixedGaussian, Gaussian
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


def delta(loss: Loss, q: AnyGaussian, curvature: Curvature | None = None) -> Tree:
    """∇_μ E_q[ℓ̄] with ℓ̄ replaced by its quadratic expansion at m: exact for quadratic ℓ̄.

    Args:
        loss: ℓ̄.
        q: One Gaussian, without batch axes.
        curvature: What stands for ∇²ℓ̄; the exact one, or its diagonal, if missing.
    """
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
    """
    theta = _one(q).sample(num_samples, generator)
    curvature = curvature or _exact_curvature(q)
    G = [grad(loss)(t) for t in theta]
    H = [curvature(loss, t, g) for t, g in zip(theta, G, strict=True)]
    # E[∇R] = δm is known: no noise from the prior.
    g = torch.stack(G).mean(0) - _prior_precision(loss) * (theta.mean(0) - q.mean)
    return g, torch.stack(H).mean(0)


def reparametrized(
    loss: Loss,
    q: Gaussian | DiagonalGaussian,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """E_q[∇ℓ̄] and E_q[∇²ℓ̄] = E_q[S(θ − m)∇ℓ̄ᵀ] from gradients alone; the prior is exact.

    Unbiased, with a large variance; symmetrised for a full precision.
    """
    theta, delta = _one(q).sample(num_samples, generator), _prior_precision(loss)
    G = vmap(grad(loss))(theta) - delta * theta
    g = G.mean(0) + delta * q.mean
    if isinstance(q, DiagonalGaussian):
        return g, (q.precision * (theta - q.mean) * G).mean(0) + delta
    H = q.precision @ (theta - q.mean).mT @ G / num_samples
    return g, 0.5 * (H + H.mT) + _diagonal(delta, q.mean)


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
    f = loss.model(theta, loss.inputs).reshape(len(loss.inputs), -1)
    J = jacrev(lambda t: loss.model(t, loss.inputs).reshape(f.shape))(theta)
    shape = loss.model(theta, loss.inputs).shape[1:]

    def example(f_i: Tensor, y_i: Tensor) -> Tensor:
        return loss.per_example_loss(f_i.reshape(1, *shape), y_i.unsqueeze(0))[0]

    curvature = vmap(torch.func.hessian(example))(f, loss.targets)
    H = torch.einsum("ikp,ikl,ilr->pr", J, curvature, J)
    return loss.weight * H + _diagonal(loss.prior_precision, theta)


def squared_gradients(loss: TotalLoss, theta: Tensor, gradient: Tensor) -> Tensor:
    """(N/|B|) Σᵢ (∇ℓᵢ)² + δ, shape (P,): the gradient of each example is squared, then added."""

    def example(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return loss.per_example_loss(loss.model(t, x.unsqueeze(0)), y.unsqueeze(0))[0]

    G = vmap(grad(example), in_dims=(None, 0, 0))(theta, loss.inputs, loss.targets)
    return loss.weight * (G**2).sum(0) + loss.prior_precision


def squared_batch_gradient(loss: Loss, theta: Tensor, gradient: Tensor) -> Tensor:
    """(∇ℓ̄)², shape (P,): what RMSprop and Adam average. No curvature, but cheap.

    For |B| of N examples its mean is (∇ℓ̄)² plus the variance of the minibatch.
    """
    return gradient**2


def no_curvature(loss: Loss, theta: Tensor, gradient: Tensor) -> Tensor:
    """Zero: a Gaussian whose precision is known asks for none."""
    return torch.zeros_like(theta)


def _exact_curvature(q: AnyGaussian) -> Curvature:
    if isinstance(q, FixedGaussian):
        return no_curvature
    return hessian if isinstance(q, Gaussian) else hessian_diagonal


def _prior_precision(loss: Any) -> float | Tensor:
    return loss.prior_precision if isinstance(loss, TotalLoss) else 0.0


def _diagonal(delta: float | Tensor, like: Tensor) -> Tensor:
    return torch.diag(torch.ones_like(like) * delta)


def _one(q: Any) -> Any:
    if not isinstance(q, AnyGaussian):
        raise TypeError(
            f"q must be Gaussian for derivatives in θ, got {type(q).__name__}; "
            "use exact or monte_carlo for other families"
        )
    if q.batch_shape:
        raise ValueError(f"q must be one Gaussian, got a batch {tuple(q.batch_shape)}; pass one")
    return q

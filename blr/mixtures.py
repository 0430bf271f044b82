"""The rule for mixtures: every component runs its own, and pays for being where the others are.

    component k:   the rule for the loss ℓ̄ − log r_k               r_k(θ) = π_k N_k(θ)/q(θ)
    weights:       λ_k ← λ_k − ρ (E_k − E_K)[ℓ̄ + log q]           λ_k = log π_k/π_K
    Student's t:   the Gaussian rule with E_q[u ∇²ℓ̄] for E_q[∇²ℓ̄]   u(θ) = E[w | θ]

E_k is the expectation under component k. All of them are taken at points, which are a part of
their own: the means (the delta method: multimodal optimisation), samples, or the nodes of
a quadrature. With K = 1, r_1 = 1 and this is the rule for Gaussians.

References: Lin, Khan & Schmidt (2019), Fast and simple natural-gradient variational inference with
mixture of exponential-family approximations; Khan & Rue (2023), sections 3.2, 4.3 and 5.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from blr import _validate
from blr._tree import Tree
from blr.families.categorical import Categorical
from blr.families.fixed_gaussian import FixedGaussian
from blr.families.gaussian import DiagonalGaussian
from blr.families.mixture import Mixture, StudentT
from blr.families.spike_and_slab import SpikeAndSlab
from blr.gradients import Curvature, Loss, hessian, hessian_diagonal
from blr.rule import learn

Points: TypeAlias = Callable[[Mixture], tuple[Tensor, Tensor]]
"""S points θ for each component, shape (S, K, D), and their weights, shape (S,)."""


class Expectations(NamedTuple):
    """E_k[f], E_k[∇f] and E_k[∇²f] for each component: shapes (K,), (K, D), (K, D, D) or (K, D)."""

    value: Tensor
    gradient: Tensor
    curvature: Tensor


# ---- points -------------------------------------------------------------------------------------


def at_means(q: Mixture) -> tuple[Tensor, Tensor]:
    """The delta method: one point, the component's mean."""
    m = q.components.mean
    return m.unsqueeze(0), m.new_ones(1)


def at_samples(
    q: Mixture, num_samples: int = 1, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """S samples of each component, however small its weight."""
    _validate.number("num_samples", num_samples, lambda n: n >= 1, "at least 1")
    theta = q.components.sample(num_samples, generator)
    return theta, theta.new_full((num_samples,), 1 / num_samples)


def at_nodes(q: Mixture, num_nodes: int = 20) -> tuple[Tensor, Tensor]:
    """The grid of Gauss and Hermite around each component, `num_nodes` in each of D = 1 or 2 axes.

    Exact for polynomials of degree below twice `num_nodes`; where components meet, log r_k is none.
    """
    m = q.components.mean
    x, w = (
        torch.as_tensor(a, dtype=m.dtype) for a in np.polynomial.hermite_e.hermegauss(num_nodes)
    )
    D = m.shape[-1]
    grid = torch.cartesian_prod(*[x] * D).reshape(-1, D)
    weight = torch.cartesian_prod(*[w / w.sum()] * D).reshape(-1, D).prod(-1)
    noise = grid.unsqueeze(1).expand(-1, *m.shape).to(m.device)
    if q.diagonal:
        return m + noise * q.components.precision.rsqrt(), weight.to(m.device)
    # S = LLᵀ, so L⁻ᵀε has covariance S⁻¹.
    L = q.components.cholesky  # type: ignore[union-attr]
    step = torch.linalg.solve_triangular(L.mT, noise.unsqueeze(-1), upper=True).squeeze(-1)
    return m + step, weight.to(m.device)


# ---- expectations under the components ----------------------------------------------------------


def expectations(
    loss: Loss,
    q: Mixture,
    points: Points = at_means,
    temperature: float = 1.0,
    curvature: Curvature | None = None,
    control: bool = True,
) -> Expectations:
    """E_k[f_k], E_k[∇f_k] and E_k[∇²f_k] of f_k = ℓ̄ − T log r_k: the loss of component k.

    The change of r_k with λ is not forgotten: its mean is zero.

    Args:
        loss: ℓ̄, from θ of shape (D,) to a number.
        q: One mixture, without batch axes.
        points: Where to evaluate; `at_means`, `at_samples`, `at_nodes`.
        temperature: Weight T of the entropy.
        curvature: What stands for ∇²ℓ̄; the exact one, or its diagonal, if missing.
        control: Add the own T(log N_k + H(N_k)) and its gradient, both of mean zero. Samples then
            have no noise where q is the posterior. Without it, K = 1 is what `gradients.price` has.
    """
    if q.batch_shape:
        raise ValueError(f"q must be one mixture, got a batch {tuple(q.batch_shape)}; pass one")
    T, (theta, weight) = temperature, points(q)
    f, g, H = _derivatives(loss, q, theta, curvature)
    own = q.pull(theta).diagonal(dim1=-3, dim2=-2).mT
    score, score_curvature = q.score(theta)
    log_r = q.log_responsibilities(theta).diagonal(dim1=-2, dim2=-1)
    f = f - T * log_r
    g = g + T * (score + own)
    H = H + T * (score_curvature + q.components.precision)
    if control:
        log_own = log_r + q.log_prob(theta) - q.log_weights
        f, g = f + T * (log_own + q.components.entropy()), g - T * own
    return Expectations(*(torch.tensordot(weight, x, 1) for x in (f, g, H)))


def _derivatives(
    loss: Loss, q: Mixture, theta: Tensor, curvature: Curvature | None
) -> tuple[Tensor, Tensor, Tensor]:
    """ℓ̄, ∇ℓ̄ and what stands for ∇²ℓ̄ at each θ of shape (S, K, D)."""
    flat = theta.reshape(-1, theta.shape[-1])
    g, f = vmap(grad_and_value(loss))(flat)
    if isinstance(q.components, FixedGaussian):
        H = torch.zeros(()).to(g)
    else:
        exact = hessian_diagonal if isinstance(q.components, DiagonalGaussian) else hessian
        stands = curvature or exact
        H = vmap(lambda t, gradient: stands(loss, t, gradient))(flat, g)
        H = H.reshape(*theta.shape[:-1], *H.shape[1:])
    return f.reshape(theta.shape[:-1]), g.reshape(theta.shape), H


# ---- recipes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixtureRule:
    """The rule for mixtures as a recipe: all blocks at once, each with the others as they were.

    Args:
        points: Where expectations are taken: `at_means`, `partial(at_samples, num_samples=…)`.
        lr: Learning rate ρ of the components, or a function of the step t = 1, 2, ….
        weight_rate: Learning rate of the weights divided by ρ; 0 keeps them.
        temperature: Weight T of the entropy.
        step: A step of the components from (q, gradient, ρ, T): `learn`, or `blr.improve`, with
            which no precision ever leaves the domain.
        curvature: What stands for ∇²ℓ̄; the exact one, or its diagonal, if missing.
        control: Whether to cancel the noise of the own log-density; see `expectations`.

    Raises:
        ValueError: If a number is out of its range.
    """

    points: Points = at_means
    lr: float | Callable[[int], float] = 0.1
    weight_rate: float = 1.0
    temperature: float = 1.0
    step: Callable[[Any, Tree, float, float], Any] = learn
    curvature: Curvature | None = None
    control: bool = True

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        _validate.number("lr", self.lr, lambda x: x > 0, "positive")
        _validate.number("weight_rate", self.weight_rate, lambda x: x >= 0, "at least zero")
        _validate.number("temperature", self.temperature, lambda x: x >= 0, "at least zero")

    def posteriors(self, losses: Iterable[Any], q: Mixture) -> Iterator[Mixture]:
        """q after each step, one step for each of `losses`, starting from q."""
        remedy = "use Mixture.from_components(components), of a batch of Gaussians"
        _validate.instance("q", q, Mixture, remedy)
        for t, loss in enumerate(losses, 1):
            q = self._after(loss, q, self.lr(t) if callable(self.lr) else self.lr)
            yield q

    def _after(self, loss: Loss, q: Mixture, rho: float) -> Mixture:
        T, family = self.temperature, q.components
        f, g, H = expectations(loss, q, self.points, T, self.curvature, self.control)
        try:
            components = self.step(family, family.natural_gradient(g, H), rho, T)
        except ValueError as error:
            raise ValueError(f"block components: {error}") from error
        if q.num_components == 1 or self.weight_rate == 0:
            return Mixture(q.log_odds, components)
        c = f - T * family.entropy()
        try:
            weights = learn(
                Categorical(q.log_odds), c[..., :-1] - c[..., -1:], self.weight_rate * rho, T
            )
        except ValueError as error:
            raise ValueError(f"block log_odds: {error}; or lower weight_rate") from error
        return Mixture(weights.natural, components)


def dropped(
    loss: Loss,
    q: SpikeAndSlab,
    indicators: Iterator[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """∇_μ E_q[ℓ̄] ≈ (z/π)∘∇ℓ̄(z∘m): dropout. The delta method, and one sample z of the indicators.

    Unbiased for the derivative of E_z[ℓ̄(z∘m)] in πm. In the rule, temperature 0 leaves out the
    entropy's gradient, which is zero where the slab is responsible for its mean, r = 1.

    Args:
        loss: ℓ̄.
        q: Spike and slab.
        indicators: Ready-made z, shape (U,), one for each call; sampled from q if missing.
        generator: Source of randomness.

    Raises:
        TypeError: If q is no SpikeAndSlab.
        ValueError: If the ready-made z are used up, or not as long as there are units.
    """
    _validate.instance("q", q, SpikeAndSlab, "use SpikeAndSlab.from_moments")
    z = q.expand(q.indicators(1, generator)[0] if indicators is None else _next(indicators, q))
    scaled = torch.where(q.unit >= 0, z / q.keep, z)  # z/π, in fewer passes
    return scaled * grad(loss)(z * q.slab_mean)


def _next(indicators: Iterator[Tensor], q: SpikeAndSlab) -> Tensor:
    z, U = next(indicators, None), int(q.unit.max()) + 1
    if z is None:
        raise ValueError("indicators are used up; pass as many as there are steps, or none")
    if z.shape != (U,):
        raise ValueError(
            f"indicators must have shape ({U},), one for each unit, got {tuple(z.shape)}; "
            "pass a vector of zeros and ones for each step"
        )
    return z


def scale_mixture(
    loss: Loss,
    q: StudentT,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    control: bool = True,
) -> Tree:
    """∇_μ E_q[ℓ̄] for Student's t: the theorems of Bonnet and Price, the second weighted by u.

        g = E_q[∇ℓ̄],      H = E_q[u(θ) ∇²ℓ̄],      u(θ) = E[w | θ]

    Args:
        loss: ℓ̄.
        q: One Student's t, without batch axes.
        num_samples: S.
        generator: Source of randomness.
        control: Differentiate ℓ̄ + log q and add back E_q[u ∇²log q] = −S, which is known: no
            noise where q is the posterior.
    """
    if q.batch_shape:
        raise ValueError(f"q must be one Student's t, got a batch {tuple(q.batch_shape)}; pass one")
    _validate.number("num_samples", num_samples, lambda n: n >= 1, "at least 1")

    def f(theta: Tensor) -> Tensor:
        return loss(theta) + q.log_prob(theta) if control else loss(theta)

    theta = q.sample(num_samples, generator)
    g = vmap(grad(f))(theta).mean(0)
    u = q.expected_scale(theta)[:, None, None]
    H = (u * vmap(torch.func.hessian(f))(theta)).mean(0)
    return q.natural_gradient(g, H + q.precision if control else H)

"""Mixtures of Gaussians, and Student's t: families that are exponential given a hidden variable.

    q(θ) = Σ_k π_k N(θ; m_k, S_k⁻¹)              λ = (log π_k/π_K, λ₁, …, λ_K)
    q(θ) = ∫ N(θ; m, w S⁻¹) IG(w; a, a) dw        λ = (Sm, −½S), 2a degrees of freedom

Neither has a log-partition function, for the hidden k or w is integrated out. With it, each is
exponential block by block; λ and μ are those of the blocks, and the Fisher information of the joint
distribution is block-diagonal: these are minimal conditional exponential families. What one block
learns depends on the others through the responsibilities r_k(θ) = π_k N_k(θ)/q(θ), or through
u(θ) = E[w | θ].

References: Lin, Khan & Schmidt (2019), Fast and simple natural-gradient variational inference with
mixture of exponential-family approximations.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from blr import _validate
from blr._tree import Tree
from blr.families.categorical import Categorical
from blr.families.fixed_gaussian import FixedGaussian
from blr.families.gaussian import DiagonalGaussian, Gaussian

Components: TypeAlias = Gaussian | DiagonalGaussian | FixedGaussian


@dataclass(frozen=True, eq=False, repr=False)
class Mixture:
    """Σ_k π_k N(m_k, S_k⁻¹) of K ≥ 1 Gaussians, or a batch of such mixtures.

    Args:
        log_odds: λ_w = log π_k/π_K of the first K−1 weights, shape (*batch, K−1).
        components: The K Gaussians: one family member with batch shape (*batch, K).

    Raises:
        ValueError: If the components are not a batch, or the log-odds do not fit it.
    """

    log_odds: Tensor
    components: Components

    def __post_init__(self) -> None:
        """Check that weights and components belong together."""
        shape = self.components.batch_shape
        if not shape or shape[-1] < 1:
            raise ValueError(
                f"components must have batch shape (..., K), got {tuple(shape)}; pass "
                "a Gaussian with a leading axis for the K components, even for K = 1"
            )
        odds = _validate.as_float("log_odds", self.log_odds).to(self.components.dtype)
        wanted = (*shape[:-1], shape[-1] - 1)
        if odds.shape[-1:] != wanted[-1:] or odds.ndim > len(wanted):
            raise ValueError(
                f"block log_odds must have shape {wanted} for {shape[-1]} components, got "
                f"{tuple(odds.shape)}; the last weight is the reference and has none"
            )
        _validate.finite("block log_odds", odds)
        object.__setattr__(self, "log_odds", odds.expand(wanted))

    @classmethod
    def from_components(cls, components: Components, weights: Any = None) -> Self:
        """The mixture with weights π, shape (*batch, K); equal weights if missing.

        Raises:
            ValueError: If a weight is not positive, or they do not sum to one.
        """
        K = components.batch_shape[-1] if components.batch_shape else 1
        if weights is None:
            return cls(torch.zeros(K - 1, dtype=components.dtype), components)
        pi = _validate.as_float("weights", weights)
        if K == 1:
            _validate.require(
                pi == 1, "the weight of a single component", "one", pi, "leave it out"
            )
            return cls(pi[..., :0], components)
        return cls(Categorical.from_probabilities(pi).natural, components)

    @property
    def natural(self) -> Tree:
        """λ = (λ_w, λ_z), weights and components; for K = 1, which has no weight, λ_z alone."""
        lam = self.components.natural
        return (self.log_odds, lam) if self.num_components > 1 else lam

    def at(self, natural: Tree) -> Self:
        """The mixture of as many components of the same kind at another λ."""
        lam_w, lam_z = natural if self.num_components > 1 else (self.log_odds, natural)
        return dataclasses.replace(self, log_odds=lam_w, components=self.components.at(lam_z))

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of mixtures; empty for one."""
        return self.components.batch_shape[:-1]

    @property
    def num_components(self) -> int:
        """K."""
        return self.components.batch_shape[-1]

    @property
    def diagonal(self) -> bool:
        """Whether the precisions are diagonal, and kept as vectors."""
        q = self.components
        return isinstance(q, DiagonalGaussian) or (
            isinstance(q, FixedGaussian) and q.precision.ndim == 1
        )

    @property
    def log_weights(self) -> Tensor:
        """log π, shape (*batch, K)."""
        last = self.log_odds.new_zeros((*self.log_odds.shape[:-1], 1))
        return torch.log_softmax(torch.cat([self.log_odds, last], -1), -1)

    @property
    def weights(self) -> Tensor:
        """π, shape (*batch, K)."""
        return self.log_weights.exp()

    @property
    def mean(self) -> Tensor:
        """E[θ] = Σ π_k m_k, shape (*batch, D)."""
        return (self.weights.unsqueeze(-1) * self.components.mean).sum(-2)

    @property
    def covariance(self) -> Tensor:
        """Cov[θ] = Σ π_k (S_k⁻¹ + (m_k − m)(m_k − m)ᵀ), shape (*batch, D, D)."""
        q, d = self.components, self.components.mean - self.mean.unsqueeze(-2)
        V = torch.diag_embed(q.variance) if isinstance(q, DiagonalGaussian) else q.covariance
        each = V + d.unsqueeze(-1) * d.unsqueeze(-2)
        return (self.weights[..., None, None] * each).sum(-3)

    def log_prob(self, theta: Any) -> Tensor:
        """log q(θ) for θ of shape (..., *batch, D)."""
        return self._log_joint(theta).logsumexp(-1)

    def responsibilities(self, theta: Any) -> Tensor:
        """r_k(θ) = π_k N_k(θ)/q(θ) for θ of shape (..., *batch, D); shape (..., *batch, K)."""
        return torch.softmax(self._log_joint(theta), -1)

    def log_responsibilities(self, theta: Any) -> Tensor:
        """log r_k(θ), finite where r_k itself has underflowed."""
        return torch.log_softmax(self._log_joint(theta), -1)

    def score(self, theta: Any) -> tuple[Tensor, Tensor]:
        """∇log q(θ) and ∇²log q(θ), or its diagonal for diagonal components.

        ∇log q = −Σ r_k d_k,  ∇²log q = Σ r_k (d_k d_kᵀ − S_k) − ∇log q ∇log qᵀ, d_k = S_k(θ − m_k)

        Args:
            theta: θ, shape (..., *batch, D).
        """
        r, d = self.responsibilities(theta).unsqueeze(-1), self.pull(theta)
        g = -(r * d).sum(-2)
        if self.diagonal:
            return g, (r * (d**2 - self.components.precision)).sum(-2) - g**2
        outer = d.unsqueeze(-1) * d.unsqueeze(-2) - self.components.precision
        return g, (r.unsqueeze(-1) * outer).sum(-3) - g.unsqueeze(-1) * g.unsqueeze(-2)

    def pull(self, theta: Any) -> Tensor:
        """S_k(θ − m_k) = −∇log N_k(θ) for θ of shape (..., *batch, D); (..., *batch, K, D)."""
        d = _validate.as_float("theta", theta).unsqueeze(-2) - self.components.mean
        S = self.components.precision
        if self.diagonal:
            return S * d
        return (S @ d.unsqueeze(-1)).squeeze(-1)

    def _log_joint(self, theta: Any) -> Tensor:
        # Centred at m_k: far from the origin, ⟨λ, T(θ)⟩ − A(λ) would lose all its digits.
        q, d = self.components, _validate.as_float("theta", theta).unsqueeze(-2)
        quadratic = ((d - q.mean) * self.pull(theta)).sum(-1)
        if self.diagonal:
            half_log_det = 0.5 * q.precision.log().sum(-1)
        else:
            pivots = q.cholesky.diagonal(dim1=-2, dim2=-1)  # type: ignore[union-attr]
            half_log_det = pivots.log().sum(-1)
        normaliser = half_log_det - 0.5 * d.shape[-1] * math.log(2 * math.pi)
        return self.log_weights + normaliser - 0.5 * quadratic

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, *batch, D)."""
        each = self.components.sample(n, generator)
        pi = self.weights.reshape(-1, self.num_components)
        k = torch.multinomial(pi, n, replacement=True, generator=generator)
        index = k.T.reshape(n, *self.batch_shape, 1, 1).expand(*each.shape[:-2], 1, each.shape[-1])
        return each.gather(-2, index).squeeze(-2)

    def __repr__(self) -> str:
        """Weights and components."""
        pi = [round(x, 4) for x in self.weights.reshape(-1).tolist()]
        return f"Mixture(weights={pi}, components={self.components!r})"


@dataclass(frozen=True, eq=False, repr=False)
class StudentT:
    """Student's t: θ | w ~ N(m, wS⁻¹) with w ~ InverseGamma(a, a), 2a degrees of freedom known.

    `blr.learn` and `blr.Rule` take it like a Gaussian, for it has the λ, the μ and the gradient of
    the entropy of N(m, S⁻¹), from which the known scale w differs by constants only.

    Args:
        conditional: N(m, S⁻¹), the Gaussian given w = 1, or a batch.
        dof: ν = 2a > 0.

    Raises:
        ValueError: If ν is not positive.
    """

    conditional: Gaussian
    dof: float

    def __post_init__(self) -> None:
        """Check the degrees of freedom."""
        _validate.positive("dof", _validate.as_float("dof", self.dof))

    @classmethod
    def from_parameters(cls, location: Any, scale: Any, dof: float) -> Self:
        """t_ν(m, V) from location m, shape (*batch, D), scale matrix V = S⁻¹, and ν."""
        return cls(Gaussian.from_moments(location, covariance=scale), float(dof))

    @property
    def natural(self) -> tuple[Tensor, Tensor]:
        """λ = (Sm, −½S) of θ given w, paired with T = (θ/w, θθᵀ/w)."""
        return self.conditional.natural

    def at(self, natural: Tree) -> Self:
        """The t with the same degrees of freedom at another λ."""
        return dataclasses.replace(self, conditional=self.conditional.at(natural))

    def entropy_gradient(self) -> Tree:
        """∇_μH = −λ: the entropy is ½ log|V| plus a constant, as for a Gaussian."""
        return self.conditional.entropy_gradient()

    def natural_gradient(self, gradient: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """∇_μ E_q[ℓ] = (g − Hm, ½H) from g = E_q[∇ℓ] and H = E_q[u(θ)∇²ℓ]."""
        return self.conditional.natural_gradient(gradient, curvature)

    @property
    def mean(self) -> Tensor:
        """Location m, shape (*batch, D); the expectation where ν > 1."""
        return self.conditional.mean

    @property
    def precision(self) -> Tensor:
        """S, the inverse of the scale matrix, shape (*batch, D, D)."""
        return self.conditional.precision

    @property
    def scale(self) -> Tensor:
        """V = S⁻¹, shape (*batch, D, D); the covariance is Vν/(ν − 2)."""
        return self.conditional.covariance

    @property
    def covariance(self) -> Tensor:
        """Vν/(ν − 2), shape (*batch, D, D); infinite for ν ≤ 2."""
        return self.scale * (self.dof / (self.dof - 2) if self.dof > 2 else math.inf)

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch; empty for one."""
        return self.conditional.batch_shape

    def log_prob(self, theta: Any) -> Tensor:
        """log q(θ) for θ of shape (..., D)."""
        a, D = torch.as_tensor(0.5 * self.dof, dtype=self.mean.dtype), self.mean.shape[-1]
        half_log_det = self.conditional.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = torch.lgamma(a + 0.5 * D) - torch.lgamma(a) - 0.5 * D * (2 * math.pi * a).log()
        tail = (a + 0.5 * D) * torch.log1p(self._distance(theta) / (2 * a))
        return constant + half_log_det - tail

    def expected_scale(self, theta: Any) -> Tensor:
        """u(θ) = E[w | θ] = (a + ½ dᵀSd)/(a + ½D − 1), d = θ − m, for θ of shape (..., D).

        Raises:
            ValueError: If ν ≤ 2 − D: a single θ with ν ≤ 1, for which E[w | θ] is infinite.
        """
        below = 0.5 * self.dof + 0.5 * self.mean.shape[-1] - 1
        if below <= 0:
            raise ValueError(
                f"dof must be above 2 − D = {2 - self.mean.shape[-1]} for E[w | θ] to be finite, "
                f"got {self.dof:g}; use a lighter tail"
            )
        return 0.5 * (self.dof + self._distance(theta)) / below

    def _distance(self, theta: Any) -> Tensor:
        d = _validate.as_float("theta", theta) - self.mean
        return (d * (self.precision @ d.unsqueeze(-1)).squeeze(-1)).sum(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, *batch, D)."""
        m, shape = self.mean, (n, *self.batch_shape)
        a = torch.full(shape, 0.5 * self.dof, dtype=m.dtype, device=m.device)
        w = a / torch._standard_gamma(a, generator)
        return m + w.sqrt().unsqueeze(-1) * (self.conditional.sample(n, generator) - m)

    def __repr__(self) -> str:
        """Location, inverse scale and degrees of freedom."""
        return f"StudentT(dof={self.dof:g}, conditional={self.conditional!r})"

"""Bernoulli posteriors over a binary variable, and over a vector of signs.

    θ ∈ {0, 1}      T(θ) = θ      λ = log p/(1 − p)      A(λ) = log(1 + e^λ)          μ = p
    θ ∈ {−1, 1}     T(θ) = θ      λ = ½ log p/(1 − p)    A(λ) = log(e^λ + e^{−λ})     μ = tanh λ

λ is the log-odds, or half of it, and μ an S-shaped function of it; both ends, p = 0 and p = 1, are
at infinity. A draw of the sign is the sign of λ + δ with logistic noise δ, and its relaxation is

    θ = tanh((λ + δ)/τ),    δ = ½ log u/(1 − u),    ∂θ/∂μ = (1 − θ²)/(τ(1 − μ²)).

References: Maddison, Mnih & Teh (2017) and Jang, Gu & Poole (2017) for the relaxation; Meng,
Bachmann & Khan (2020), Training binary neural networks using the Bayesian learning rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from blr import _validate
from blr.expfam import ExponentialFamily


@dataclass(frozen=True, eq=False, repr=False)
class Bernoulli(ExponentialFamily):
    """A binary variable that is 1 with probability p.

    Args:
        natural: λ = log p/(1 − p), shape (*batch).
    """

    natural: Tensor
    natural_ndims: ClassVar = 0
    parameters: ClassVar = ("probability",)

    @classmethod
    def from_probability(cls, probability: Any) -> Self:
        """Bernoulli(p) from p = P(θ = 1), 0 < p < 1, shape (*batch).

        Raises:
            ValueError: If p is not strictly between 0 and 1.
        """
        return cls(natural=_logit("probability", probability))

    @classmethod
    def from_expectation(cls, mu: Tensor, like: Self | None = None) -> Self:
        """The member with E[θ] = μ: λ = log μ/(1 − μ)."""
        return cls(natural=_logit("mu", mu))

    def _validate(self) -> None:
        _validate.finite("natural = log p/(1 − p)", self.natural)

    @property
    def probability(self) -> Tensor:
        """p = P(θ = 1) = 1/(1 + e^{−λ})."""
        return torch.sigmoid(self.natural)

    @property
    def logit(self) -> Tensor:
        """The log-odds λ."""
        return self.natural

    @property
    def mean(self) -> Tensor:
        """E[θ] = p."""
        return self.probability

    @property
    def variance(self) -> Tensor:
        """Var[θ] = p(1 − p), exact also where 1 − p is lost in p."""
        return torch.sigmoid(self.natural) * torch.sigmoid(-self.natural)

    def log_partition(self) -> Tensor:
        """A(λ) = log(1 + e^λ)."""
        return torch.logaddexp(self.natural, torch.zeros_like(self.natural))

    def expectation(self) -> Tensor:
        """μ = p."""
        return self.probability

    def fisher(self) -> Tensor:
        """F = p(1 − p), shape (*batch, 1, 1)."""
        return self.variance[..., None, None]

    def entropy(self) -> Tensor:
        """H = log(1 + e^{−|λ|}) + |λ|/(1 + e^{|λ|}): even in λ, without cancellation."""
        size = self.natural.abs()
        return size * torch.sigmoid(-size) - logsigmoid(size)

    def sufficient_statistics(self, theta: Any) -> Tensor:
        """T(θ) = θ."""
        return _validate.as_float("theta", theta).to(self.dtype)

    def log_prob(self, theta: Any) -> Tensor:
        """λθ − A(λ) = −log(1 + e^{∓λ}) at θ = 1 and 0; −∞ elsewhere."""
        sign = 2 * self.sufficient_statistics(theta) - 1
        log_p = logsigmoid(sign * self.natural)
        return torch.where(self.outside_support(theta), log_p.new_tensor(-torch.inf), log_p)

    def outside_support(self, theta: Any) -> Tensor:
        """Where θ is neither 0 nor 1."""
        theta = _validate.as_float("theta", theta)
        return (theta != 0) & (theta != 1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of 0. or 1., shape (n, *batch)."""
        return torch.bernoulli(self.probability.expand(n, *self.batch_shape), generator=generator)


@dataclass(frozen=True, eq=False, repr=False)
class SignBernoulli(ExponentialFamily):
    """A vector of P independent signs, sign j being +1 with probability pⱼ.

    Args:
        natural: λ = ½ log p/(1 − p), shape (*batch, P).
    """

    natural: Tensor
    natural_ndims: ClassVar = 1
    parameters: ClassVar = ("probability",)

    @classmethod
    def from_probability(cls, probability: Any) -> Self:
        """The member with P(θ = 1) = p, 0 < p < 1, shape (*batch, P).

        Raises:
            ValueError: If p is not strictly between 0 and 1.
        """
        return cls(natural=0.5 * _logit("probability", probability))

    @classmethod
    def from_expectation(cls, mu: Tensor, like: Self | None = None) -> Self:
        """The member with E[θ] = μ: λ = artanh μ."""
        mu = _validate.finite("mu", _validate.as_float("mu", mu))
        remedy = "at −1 and 1 the natural parameter artanh μ is infinite: move it inside"
        _validate.require(mu.detach().abs() < 1, "mu", "strictly between −1 and 1", mu, remedy)
        return cls(natural=torch.atanh(mu))

    def _validate(self) -> None:
        lam = _validate.vector("natural = ½ log p/(1 − p)", self.natural)
        _validate.finite("natural = ½ log p/(1 − p)", lam)

    @property
    def probability(self) -> Tensor:
        """p = P(θ = 1) = 1/(1 + e^{−2λ}), shape (*batch, P)."""
        return torch.sigmoid(2 * self.natural)

    @property
    def mean(self) -> Tensor:
        """E[θ] = tanh λ, shape (*batch, P)."""
        return torch.tanh(self.natural)

    @property
    def mode(self) -> Tensor:
        """The most probable signs, sign λ with sign 0 = +1, shape (*batch, P)."""
        return _sign(self.natural)

    @property
    def variance(self) -> Tensor:
        """Var[θ] = 1 − tanh²λ = 4p(1 − p), exact also where tanh λ rounds to 1."""
        return 4 * torch.sigmoid(2 * self.natural) * torch.sigmoid(-2 * self.natural)

    def log_partition(self) -> Tensor:
        """A(λ) = Σⱼ log(e^{λⱼ} + e^{−λⱼ})."""
        return torch.logaddexp(self.natural, -self.natural).sum(-1)

    def expectation(self) -> Tensor:
        """μ = tanh λ."""
        return self.mean

    def fisher(self) -> Tensor:
        """F = diag(1 − μ²), shape (*batch, P, P)."""
        return torch.diag_embed(self.variance)

    def entropy(self) -> Tensor:
        """H = Σⱼ log(1 + e^{−2|λⱼ|}) + 2|λⱼ|/(1 + e^{2|λⱼ|}), without cancellation."""
        size = 2 * self.natural.abs()
        return (size * torch.sigmoid(-size) - logsigmoid(size)).sum(-1)

    def sufficient_statistics(self, theta: Any) -> Tensor:
        """T(θ) = θ."""
        return _validate.as_float("theta", theta).to(self.dtype)

    def log_prob(self, theta: Any) -> Tensor:
        """⟨λ, θ⟩ − A(λ) = −Σⱼ log(1 + e^{−2λⱼθⱼ}); −∞ where θ is not a vector of signs."""
        log_p = logsigmoid(2 * self.natural * self.sufficient_statistics(theta)).sum(-1)
        return torch.where(self.outside_support(theta), log_p.new_tensor(-torch.inf), log_p)

    def outside_support(self, theta: Any) -> Tensor:
        """Where some entry of θ is neither −1 nor 1."""
        return (_validate.as_float("theta", theta).abs() != 1).any(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws θ = sign(λ + δ) of −1. and 1., shape (n, *batch, P)."""
        return _sign(self.natural + self._noise(n, generator)).to(self.dtype)

    def relaxed_sample(
        self, n: int, relaxation: float, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """n relaxed draws θ = tanh((λ + δ)/τ) and their slopes ∂θ/∂μ, at fixed noise δ.

        With the same generator the signs of the draws are those of `sample`, which is the limit
        τ → 0. The slope is a ratio of two numbers that may both vanish, hence logarithms.

        Args:
            n: Number of draws, at least 1.
            relaxation: Temperature τ > 0.
            generator: Source of randomness: a uniform number in float64 for each entry.

        Returns:
            θ and the slope (1 − θ²)/(τ(1 − μ²)), each of shape (n, *batch, P). For τ → 0 the slope
            has mean 1 and a variance that grows as 1/τ; for τ > 1 it grows with λ.

        Raises:
            ValueError: If τ or n is not positive, or if a slope is too large for a floating number.
        """
        _validate.number("num_samples, the number of draws n,", n, lambda n: n >= 1, "at least 1")
        if not 0 < relaxation < math.inf:
            raise ValueError(f"relaxation must be positive and finite, got {relaxation}")
        lam = self.natural.double()
        x = (lam + self._noise(n, generator)) / relaxation
        slope = (_log_sech2(x) - _log_sech2(lam)).exp() / relaxation
        slope = slope.to(self.dtype)
        finite = torch.isfinite(slope.detach())
        if not bool(finite.all()):
            remedy = f"|λ| is up to {lam.detach().abs().max():.3g}: lower the learning rate"
            if relaxation > 1:
                remedy += ", or relaxation to 1 or less, where draws with a large slope are rare"
            _validate.require(finite, "slope of a relaxed draw", "finite", slope, remedy)
        return torch.tanh(x).to(self.dtype), slope

    def _noise(self, n: int, generator: torch.Generator | None) -> Tensor:
        # In float64 also for float32: there u = 0, an infinite δ, is one draw in 10⁷.
        shape, device = (n, *self.natural.shape), self.natural.device
        u = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
        u = u.clamp(min=torch.finfo(u.dtype).tiny)
        return 0.5 * (u.log() - torch.log1p(-u))


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def _log_sech2(x: Tensor) -> Tensor:
    """log(1 − tanh²x) = 2(log 2 − |x| − log(1 + e^{−2|x|}))."""
    return 2 * (math.log(2) - x.abs() - torch.log1p(torch.exp(-2 * x.abs())))


def _logit(name: str, probability: Any) -> Tensor:
    p = _validate.finite(name, _validate.as_float(name, probability))
    _validate.require(
        (p.detach() > 0) & (p.detach() < 1),
        name,
        "strictly between 0 and 1",
        p,
        "at 0 and 1 the natural parameter log p/(1 − p) is infinite: move it inside",
    )
    return p.log() - torch.log1p(-p)

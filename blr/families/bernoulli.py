"""Bernoulli posteriors over a binary variable.

    θ ∈ {0, 1}      T(θ) = θ      λ = log p/(1 − p)      A(λ) = log(1 + e^λ)      μ = p

λ is the log-odds and μ the logistic function of it; both ends, p = 0 and p = 1, are at infinity.
"""

from __future__ import annotations

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

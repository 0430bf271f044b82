"""Poisson posteriors over a count.

    θ ∈ {0, 1, 2, …}      T(θ) = θ      λ = log r      A(λ) = e^λ = r      μ = r
    log h(θ) = −log θ!

The base measure is not constant, so entropy and learning need E_q[log h], which has no closed form:

    H(q) = −Σ q(θ) log q(θ)  =  ½ log(2πe r) − Σ_{n≥1} (n−1)! G_n r⁻ⁿ  as r → ∞

with Gregory's coefficients G_n = 1/12, 1/24, 19/720, …. (From E[log(θ + 1)] = dE[log θ!]/dr
= ∫₀¹ (1 − e^{−ru})/(−log(1 − u)) du and Watson's lemma, integrated over r.)

References: Evans, Boersma, Blachman & Jagers (1988), The entropy of a Poisson distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blr import _validate
from blr.expfam import ExponentialFamily

GREGORY = (1 / 12, 1 / 24, 19 / 720, 3 / 160, 863 / 60480, 275 / 24192, 33953 / 3628800)
LARGE_RATE = 60.0  # where the series takes over from the sum
LARGEST_COUNT = 200  # the sum ends here: P(θ > 200) < 1e-40 at the largest of its rates


@dataclass(frozen=True, eq=False, repr=False)
class Poisson(ExponentialFamily):
    """Poisson with rate r, the mean number of events.

    Args:
        natural: λ = log r, shape (*batch).
    """

    natural: Tensor
    natural_ndims: ClassVar = 0
    parameters: ClassVar = ("rate",)

    @classmethod
    def from_rate(cls, rate: Any) -> Self:
        """Poisson(r) from its rate r > 0, shape (*batch)."""
        r = _validate.as_float("rate", rate)
        _validate.positive("rate", r, "at zero the natural parameter log r is infinite")
        return cls(natural=r.log())

    @classmethod
    def from_expectation(cls, mu: Tensor, like: Self | None = None) -> Self:
        """The member with E[θ] = μ: λ = log μ."""
        mu = _validate.positive("mu", _validate.as_float("mu", mu), "it is the mean of a count")
        return cls(natural=mu.log())

    def _validate(self) -> None:
        _validate.finite("natural = log r", self.natural)
        _validate.finite("rate e^natural", self.rate)

    @property
    def rate(self) -> Tensor:
        """r = e^λ."""
        return self.natural.exp()

    @property
    def mean(self) -> Tensor:
        """E[θ] = r."""
        return self.rate

    @property
    def variance(self) -> Tensor:
        """Var[θ] = r."""
        return self.rate

    def log_partition(self) -> Tensor:
        """A(λ) = e^λ."""
        return self.rate

    def expectation(self) -> Tensor:
        """μ = e^λ."""
        return self.rate

    def sufficient_statistics(self, theta: Any) -> Tensor:
        """T(θ) = θ."""
        return _validate.as_float("theta", theta).to(self.dtype)

    def log_base_measure(self, theta: Any) -> Tensor:
        """log h(θ) = −log θ!."""
        return -torch.lgamma(self.sufficient_statistics(theta) + 1)

    def entropy(self) -> Tensor:
        """H(q) by summation below rate 60 and by its series above; both good to 1e-12."""
        lam = self.natural.double()
        return torch.where(
            self.rate < LARGE_RATE,
            _entropy_sum(lam.clamp_max(math.log(LARGE_RATE))),
            _entropy_series(lam.exp().clamp_min(LARGE_RATE)),
        ).to(self.dtype)

    def expected_log_base_measure(self) -> Tensor:
        """E[log h] = A(λ) − λμ − H(q)."""
        return self.rate - self.natural * self.rate - self.entropy()

    def entropy_gradient(self) -> Tensor:
        """∇_μH = −log r + E[log(θ + 1)]: a sum below rate 60, the series' derivative above."""
        lam = self.natural.double()
        return torch.where(
            self.rate < LARGE_RATE,
            _slope_sum(lam.clamp_max(math.log(LARGE_RATE))),
            _slope_series(lam.exp().clamp_min(LARGE_RATE)),
        ).to(self.dtype)

    def outside_support(self, theta: Any) -> Tensor:
        """Where θ is negative or not an integer."""
        theta = _validate.as_float("theta", theta)
        return ~((theta >= 0) & (theta == theta.round()))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, whole numbers in the dtype of λ, shape (n, *batch)."""
        return torch.poisson(self.rate.expand(n, *self.batch_shape), generator=generator)


def _entropy_sum(lam: Tensor) -> Tensor:
    theta = torch.arange(LARGEST_COUNT + 1, dtype=lam.dtype, device=lam.device)
    lam = lam.unsqueeze(-1)
    log_q = theta * lam - lam.exp() - torch.lgamma(theta + 1)
    return -(log_q.exp() * log_q).sum(-1)


def _entropy_series(r: Tensor) -> Tensor:
    series = sum(math.factorial(n) * G / r ** (n + 1) for n, G in enumerate(GREGORY))
    return 0.5 * (2 * math.pi * math.e * r).log() - series


def _slope_sum(lam: Tensor) -> Tensor:
    theta = torch.arange(LARGEST_COUNT + 1, dtype=lam.dtype, device=lam.device)
    log_q = theta * lam.unsqueeze(-1) - lam.exp().unsqueeze(-1) - torch.lgamma(theta + 1)
    return (log_q.exp() * (theta + 1).log()).sum(-1) - lam


def _slope_series(r: Tensor) -> Tensor:
    series = sum(math.factorial(n + 1) * G / r ** (n + 2) for n, G in enumerate(GREGORY))
    return 0.5 / r + series

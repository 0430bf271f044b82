"""Exponential posteriors over a waiting time.

    θ > 0      T(θ) = θ      λ = −r      A(λ) = −log r      μ = 1/r

The gamma family with shape one, where only the rate is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blr import _validate
from blr.expfam import ExponentialFamily


@dataclass(frozen=True, eq=False, repr=False)
class Exponential(ExponentialFamily):
    """Exponential with rate r: p(θ) = r e^{−rθ}, θ ≥ 0.

    Args:
        natural: λ = −r, shape (*batch).
    """

    natural: Tensor
    natural_ndims: ClassVar = 0
    parameters: ClassVar = ("rate",)

    @classmethod
    def from_rate(cls, rate: Any) -> Self:
        """Exponential(r) from its rate r = 1/mean > 0, shape (*batch)."""
        r = _validate.as_float("rate", rate)
        return cls(natural=-_validate.positive("rate", r, "rate is 1/mean"))

    @classmethod
    def from_expectation(cls, mu: Tensor, like: Self | None = None) -> Self:
        """The member with E[θ] = μ: λ = −1/μ."""
        mu = _validate.as_float("mu", mu)
        return cls(natural=-1 / _validate.positive("mu", mu, "it is the mean of a waiting time"))

    def _validate(self) -> None:
        _validate.positive("rate r", self.rate, "natural = −r must be negative")

    @property
    def rate(self) -> Tensor:
        """r = −λ."""
        return -self.natural

    @property
    def mean(self) -> Tensor:
        """E[θ] = 1/r."""
        return 1 / self.rate

    @property
    def variance(self) -> Tensor:
        """Var[θ] = 1/r²."""
        return 1 / self.rate**2

    def log_partition(self) -> Tensor:
        """A(λ) = −log r."""
        return -self.rate.log()

    def expectation(self) -> Tensor:
        """μ = 1/r."""
        return self.mean

    def outside_support(self, theta: Any) -> Tensor:
        """Where θ < 0."""
        return _validate.as_float("theta", theta) < 0

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, *batch)."""
        unit = self.rate.new_empty((n, *self.batch_shape)).exponential_(generator=generator)
        return unit / self.rate

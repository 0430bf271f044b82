"""Categorical posteriors over one of K classes, in minimal form.

    θ ∈ {0, …, K−1}      T(θ)_k = [θ = k]      λ_k = log π_k/π_{K−1}      for k = 0, …, K−2
    A(λ) = log(1 + Σ e^{λ_k})                  μ_k = π_k

The last class is the reference: its probability is what the others leave. With K = 2 and the
classes counted backwards this is the Bernoulli family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blr import _validate
from blr.expfam import ExponentialFamily


@dataclass(frozen=True, eq=False, repr=False)
class Categorical(ExponentialFamily):
    """One of K ≥ 2 classes, class k with probability π_k.

    Args:
        natural: λ, the log-odds of the first K−1 classes against the last, shape (*batch, K−1).
    """

    natural: Tensor
    natural_ndims: ClassVar = 1
    parameters: ClassVar = ("probabilities",)

    @classmethod
    def from_probabilities(cls, probabilities: Any) -> Self:
        """Categorical(π) from all K probabilities.

        Args:
            probabilities: π, positive and summing to one, shape (*batch, K).

        Raises:
            ValueError: If there are fewer than two classes, a probability is not positive, or the
                sum differs from one by more than 1e-6 (more in float32, in proportion to K).
        """
        pi = _validate.as_float("probabilities", probabilities)
        _at_least_two("probabilities", pi, "K", 2)
        _validate.positive(
            "probabilities", pi, "the natural parameter of an impossible class is infinite: drop it"
        )
        total = pi.detach().sum(-1)
        _validate.require(
            (total - 1).abs() <= 1e-6 + pi.shape[-1] * torch.finfo(pi.dtype).eps,
            "the sum of probabilities",
            "one",
            total,
            "divide by the sum; pass all K of them, the last one too",
        )
        return cls(natural=pi[..., :-1].log() - pi[..., -1:].log())

    @classmethod
    def from_expectation(cls, mu: Tensor, like: Self | None = None) -> Self:
        """The member with P(θ = k) = μ_k for the first K−1 classes."""
        mu = _validate.positive("mu", _validate.as_float("mu", mu))
        last = 1 - mu.sum(-1, keepdim=True)
        _validate.require(
            last.detach() > 0,
            "1 − Σ mu",
            "positive",
            last,
            "mu leaves out the last class, which must keep some probability",
        )
        return cls(natural=mu.log() - last.log())

    def _validate(self) -> None:
        _at_least_two("natural", self.natural, "K-1", 1)
        _validate.finite("natural = log π_k/π_K", self.natural)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.natural.shape[-1] + 1

    @property
    def probabilities(self) -> Tensor:
        """π, shape (*batch, K)."""
        return torch.softmax(self._logits, 0).movedim(0, -1)

    @property
    def _logits(self) -> Tensor:
        # The classes come first: torch is slow along a last axis that is short.
        lam = self.natural.movedim(-1, 0)
        return torch.cat([lam, torch.zeros_like(lam[:1])])

    def log_partition(self) -> Tensor:
        """A(λ) = log(1 + Σ e^{λ_k})."""
        return torch.logsumexp(self._logits, 0)

    def expectation(self) -> Tensor:
        """μ = the probabilities of the first K−1 classes."""
        return self.probabilities[..., :-1]

    def sufficient_statistics(self, theta: Any) -> Tensor:
        """T(θ) = ([θ = 0], …, [θ = K−2]) for class indices θ of shape (...)."""
        theta = _validate.as_float("theta", theta).unsqueeze(-1)
        return (theta == torch.arange(self.num_classes - 1, device=theta.device)).to(self.dtype)

    def outside_support(self, theta: Any) -> Tensor:
        """Where θ is not one of 0, …, K−1."""
        theta = _validate.as_float("theta", theta).unsqueeze(-1)
        return (theta != torch.arange(self.num_classes, device=theta.device)).all(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n class indices, int64, shape (n, *batch)."""
        pi = self.probabilities.reshape(-1, self.num_classes)
        draws = torch.multinomial(pi, n, replacement=True, generator=generator)
        return draws.T.reshape(n, *self.batch_shape)


def _at_least_two(name: str, x: Tensor, size: str, least: int) -> None:
    if x.ndim == 0 or x.shape[-1] < least:
        raise ValueError(
            f"{name} must have shape (..., {size}) for K >= 2 classes, got {tuple(x.shape)}; "
            "with a single class nothing is random"
        )

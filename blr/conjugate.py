r"""Conjugate models: each example is a vector λ̃ᵢ, and removing data is subtracting vectors.

    p(yᵢ | θ) = e^{−ℓᵢ(θ)} = cᵢ e^{⟨λ̃ᵢ, T(θ)⟩}
    λ = λ₀ + Σᵢ λ̃ᵢ            λ − λ^{\M} = Σ_{i∈M} λ̃ᵢ
    log p(y_M | rest) = A(λ) − A(λ^{\M}) + Σ_{i∈M} log cᵢ

The second line holds for one example, a group or a class, and at every step of a stream. The
third makes the evidence (rest = nothing) and leave-one-out scores (M = {i}) the same formula.

References: Diaconis & Ylvisaker (1979), Conjugate priors for exponential families; Nickl et al.
(2023), The memory-perturbation equation, theorem 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from blr import _tree, _validate
from blr._tree import Tree
from blr.expfam import ExponentialFamily
from blr.families.dirichlet import Beta, Dirichlet
from blr.families.gamma import Gamma
from blr.families.gaussian import Gaussian

Q = TypeVar("Q", bound=ExponentialFamily)


@dataclass(frozen=True)
class Sensitivity(Generic[Q]):
    """What changes when each example, or each group, is taken away. Leading axis: N, or groups.

    Every change is "with" minus "without".
    """

    posteriors: Q
    r"""q^{\M}, a batch: the posteriors without each group, exactly."""

    natural_change: Tree
    r"""λ − λ^{\M} = Σ_{i∈M} λ̃ᵢ."""

    mean_change: Tensor
    r"""E_q[θ] − E_{q^{\M}}[θ]."""

    prediction_change: Tensor
    """Change of the predictive mean of a new observation."""

    loo_log_score: Tensor
    """log p(y_M | the rest), in nats."""


class ConjugateModel(ABC, Generic[Q]):
    """A likelihood whose examples add natural parameters to the prior.

    A model writes `duals` and `log_carrier`; everything else follows from A.
    """

    prior: Any

    @abstractmethod
    def duals(self, data: Any) -> Tree:
        """λ̃ᵢ of every example: the structure of λ with a leading axis of length N."""

    @abstractmethod
    def log_carrier(self, data: Any) -> Tensor:
        """log cᵢ, the factor of p(yᵢ | θ) that θ does not enter, shape (N,)."""

    @abstractmethod
    def predictive_mean(self, q: Q, inputs: Any = None) -> Tensor:
        """E[y] of a new observation under q.

        Args:
            q: A posterior, or a batch of them.
            inputs: Inputs of the new observation, for models that have any.
        """

    def total_dual(self, data: Any) -> Tree:
        """Σᵢ λ̃ᵢ."""
        return _tree.total(self.duals(data))

    def posterior(self, data: Any) -> Q:
        """λ = λ₀ + Σᵢ λ̃ᵢ.

        Raises:
            ValueError: If an improper prior and these data leave the posterior improper.
        """
        return self.member(_tree.add(self.prior_natural, self.total_dual(data)))

    def stream(self, data: Any) -> Iterator[Q]:
        """The posterior after each example, in order."""
        lam = self.prior_natural
        for i in range(num_examples(data)):
            lam = _tree.add(lam, self.total_dual(take_examples(data, [i])))
            yield self.member(lam)

    @property
    def prior_natural(self) -> Tree:
        """λ₀."""
        return self.prior.natural

    def member(self, natural: Tree) -> Q:
        """The member of the prior's family at λ."""
        return self.prior.at(natural)

    def remove(self, q: Q, data: Any) -> Q:
        """The posterior without these examples: λ − Σ λ̃ᵢ.

        Raises:
            ValueError: If nothing proper remains, as when data are removed that were never added.
        """
        return q.remove(self.total_dual(data))

    def log_evidence(self, data: Any) -> Tensor:
        """log p(y) = A(λ) − A(λ₀) + Σᵢ log cᵢ, in nats."""
        gain = self.posterior(data).log_partition() - self.prior.log_partition()
        return gain + self.log_carrier(data).sum()

    def log_predictive(self, q: Q, data: Any) -> Tensor:
        """log p(yᵢ | q) = A(λ + λ̃ᵢ) − A(λ) + log cᵢ of each example by itself, shape (N,)."""
        with_each = q.add(self.duals(data)).log_partition()
        return with_each - q.log_partition() + self.log_carrier(data)

    def sensitivity(self, data: Any, groups: Any = None, posterior: Q | None = None) -> Any:
        """Exact changes on removing each example or each group, without refitting.

        Args:
            data: The examples that the posterior has seen.
            groups: Labels of shape (N,), numbers or strings, one group for each value in sorted
                order; or a list of index lists; or None for every example by itself.
            posterior: The posterior, if it is already at hand.

        Raises:
            ValueError: If a group cannot be taken away, or an index does not exist.
        """
        q: Any = self.posterior(data) if posterior is None else posterior
        log_c = self.log_carrier(data)
        if groups is None:
            duals = self.duals(data)
        else:
            members = as_groups(groups, len(log_c))
            sums = [self.total_dual(take_examples(data, M)) for M in members]
            duals = _tree.tree_map(lambda *blocks: torch.stack(blocks), *sums)
            log_c = torch.stack([log_c[M].sum() for M in members])
        without = q.remove(duals)
        return Sensitivity(
            posteriors=without,
            natural_change=duals,
            mean_change=q.mean - without.mean,
            prediction_change=self.predictive_mean(q) - self.predictive_mean(without),
            loo_log_score=q.log_partition() - without.log_partition() + log_c,
        )


@dataclass(frozen=True)
class BetaBernoulli(ConjugateModel[Beta]):
    """Coin flips y ∈ {0, 1} of shape (N,) with a beta prior: λ̃ᵢ = (yᵢ, 1 − yᵢ)."""

    prior: Beta

    def duals(self, data: Any) -> tuple[Tensor, Tensor]:
        """λ̃ᵢ = (yᵢ, 1 − yᵢ), shapes (N,)."""
        y = _column("data", data)
        _validate.require((y == 0) | (y == 1), "data", "zeros and ones", y, "code them as 0 and 1")
        return y, 1 - y

    def log_carrier(self, data: Any) -> Tensor:
        """log cᵢ = 0."""
        return torch.zeros_like(_column("data", data))

    def predictive_mean(self, q: Beta, inputs: Any = None) -> Tensor:
        """P(y = 1) = a/(a + b)."""
        return q.mean


@dataclass(frozen=True)
class DirichletMultinomial(ConjugateModel[Dirichlet]):
    """Counts y of shape (N, K), one-hot rows for single draws: λ̃ᵢ = yᵢ."""

    prior: Dirichlet

    def duals(self, data: Any) -> Tensor:
        """λ̃ᵢ = yᵢ, shape (N, K)."""
        y = _validate.as_float("data", data)
        K = self.prior.natural.shape[-1]  # type: ignore[union-attr]
        if y.ndim != 2 or y.shape[1] != K:
            raise ValueError(
                f"data must be counts of shape (N, {K}), got {tuple(y.shape)}; "
                "one-hot encode class labels first"
            )
        return _counts("data", y)

    def log_carrier(self, data: Any) -> Tensor:
        """log cᵢ = log (n! / Πₖ yᵢₖ!), the multinomial coefficient."""
        y = self.duals(data)
        return torch.lgamma(y.sum(-1) + 1) - torch.lgamma(y + 1).sum(-1)

    def predictive_mean(self, q: Dirichlet, inputs: Any = None) -> Tensor:
        """Class probabilities of one new draw, α/Σα, shape (*batch, K)."""
        return q.mean


@dataclass(frozen=True)
class GammaPoisson(ConjugateModel[Gamma]):
    """Counts with a common rate: data are y of shape (N,), or (y, exposure): λ̃ᵢ = (yᵢ, −uᵢ)."""

    prior: Gamma

    def duals(self, data: Any) -> tuple[Tensor, Tensor]:
        """λ̃ᵢ = (yᵢ, −uᵢ), shapes (N,); the exposure u is 1 unless given."""
        y, exposure = self._split(data)
        return y, -exposure

    def log_carrier(self, data: Any) -> Tensor:
        """log cᵢ = yᵢ log uᵢ − log yᵢ!."""
        y, exposure = self._split(data)
        return torch.xlogy(y, exposure) - torch.lgamma(y + 1)

    def predictive_mean(self, q: Gamma, inputs: Any = None) -> Tensor:
        """E[y] = a/b for one unit of exposure."""
        return q.mean

    def _split(self, data: Any) -> tuple[Tensor, Tensor]:
        y, exposure = data if isinstance(data, tuple) else (data, None)
        y = _counts("data", _column("data", y))
        if exposure is None:
            return y, torch.ones_like(y)
        exposure = _validate.positive("exposure", _validate.as_float("exposure", exposure))
        try:
            return y, exposure.to(y).expand(y.shape)
        except RuntimeError as error:
            raise ValueError(
                f"exposure must be a number or have the shape of the counts {tuple(y.shape)}, "
                f"got {tuple(exposure.shape)}"
            ) from error


@dataclass(frozen=True)
class GaussianMean(ConjugateModel[Gaussian]):
    """Vectors y of shape (N, D) around an unknown mean with known noise precision W.

    λ̃ᵢ = (W yᵢ, −½W).

    Args:
        prior: Gaussian over the mean.
        noise_precision: W, shape (D, D).
    """

    prior: Gaussian
    noise_precision: Tensor

    def __post_init__(self) -> None:
        """Check W."""
        W = _validate.as_float("noise_precision", self.noise_precision).to(self.prior.dtype)
        D = self.prior.natural[0].shape[-1]
        _validate.positive_definite("noise_precision", _validate.square("noise_precision", W, D))
        object.__setattr__(self, "noise_precision", W)

    def duals(self, data: Any) -> tuple[Tensor, Tensor]:
        """λ̃ᵢ = (W yᵢ, −½W), shapes (N, D) and (N, D, D)."""
        y, W = self._rows(data), self.noise_precision
        return y @ W, (-0.5 * W).expand(len(y), *W.shape)

    def log_carrier(self, data: Any) -> Tensor:
        """log cᵢ = ½ log|W| − ½ D log 2π − ½ yᵢᵀW yᵢ."""
        y, W = self._rows(data), self.noise_precision
        log_det = torch.linalg.slogdet(W).logabsdet
        return 0.5 * (log_det - len(W) * math.log(2 * math.pi) - ((y @ W) * y).sum(-1))

    def predictive_mean(self, q: Gaussian, inputs: Any = None) -> Tensor:
        """E[y] = m, shape (*batch, D)."""
        return q.mean

    def _rows(self, data: Any) -> Tensor:
        y = _validate.finite("data", _validate.as_float("data", data)).to(self.prior.dtype)
        if y.ndim != 2 or y.shape[1] != len(self.noise_precision):
            raise ValueError(
                f"data must have shape (N, {len(self.noise_precision)}), got {tuple(y.shape)}; "
                "give scalars a trailing axis: y[:, None]"
            )
        return y


def num_examples(data: Any) -> int:
    """N, the length of the leading axis."""
    return len(data[0]) if isinstance(data, tuple) else len(data)


def take_examples(data: Any, index: Any) -> Any:
    """The examples at `index`: of an array, or of each array in a tuple."""
    if isinstance(data, tuple):
        return tuple(take_examples(part, index) for part in data)
    x = _validate.as_float("data", data)
    return x[torch.as_tensor(index)] if x.ndim else x


def as_groups(groups: Any, n: int) -> list[Tensor]:
    """Index tensors of the groups: a vector of n labels, or a sequence of index sequences.

    Raises:
        ValueError: If labels do not match n, or a group is empty, repeats an index or has one
            outside 0 … n − 1.
    """
    if not isinstance(groups, Sequence) or all(np.ndim(g) == 0 for g in groups):
        labels = np.asarray(groups)
        if labels.shape != (n,):
            raise ValueError(
                f"groups must be {n} labels or a list of index lists, got shape "
                f"{labels.shape}; wrap a single group in a list"
            )
        return [torch.from_numpy(np.flatnonzero(labels == value)) for value in np.unique(labels)]
    return [as_indices(group, n) for group in groups]


def as_indices(indices: Any, n: int) -> Tensor:
    """`indices` as distinct positions in 0 … n − 1; a boolean mask of length n works too.

    Raises:
        ValueError: If an index is missing from the data, repeated, or there is none.
    """
    index = torch.as_tensor(indices)
    if index.dtype == torch.bool and index.shape == (n,):
        index = torch.nonzero(index).squeeze(-1)
    index = index.reshape(-1)
    if index.numel() == 0 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"indices must be integers, at least one of them, got {indices!r}")
    if int(index.min()) < 0 or int(index.max()) >= n:
        raise ValueError(
            f"indices must be between 0 and {n - 1}, got {int(index.min())} … {int(index.max())}; "
            "examples that were never added cannot be removed"
        )
    if len(index.unique()) != len(index):
        raise ValueError("indices must be distinct; an example can be removed only once")
    return index


def _column(name: str, data: Any) -> Tensor:
    y = _validate.finite(name, _validate.as_float(name, data))
    if y.ndim != 1:
        raise ValueError(f"{name} must have shape (N,), got {tuple(y.shape)}; flatten it")
    return y


def _counts(name: str, y: Tensor) -> Tensor:
    _validate.finite(name, y)
    _validate.require((y >= 0) & (y == y.round()), name, "counts 0, 1, 2, …", y, "check the data")
    return y

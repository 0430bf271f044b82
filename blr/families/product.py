"""Mean-field posteriors: a product of independent factors.

    q(θ) = Π_b q_b(θ_b)      λ = (λ_1, …, λ_B)      μ = (μ_1, …, μ_B)      A(λ) = Σ_b A_b(λ_b)

Each block θ_b has a family of its own, and a name. A factor may be a whole batch, such as one
responsibility for each of N examples; then its A, entropy and density are summed over the batch.
The rule learns a product block by block, `blr.messages`.

References: Wainwright & Jordan (2008), section 5.3; Khan & Rue (2023), section 5.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from blr import _tree
from blr._tree import Dims, Tree
from blr.expfam import ExponentialFamily


@dataclass(frozen=True, eq=False, repr=False)
class Product(ExponentialFamily):
    """q(θ) = Π_b q_b(θ_b), with named blocks; `q["name"]` is a factor.

    Build it with `from_factors`. θ is the tuple of the blocks' parameters.

    Args:
        natural: λ, the tuple of the natural parameters of the factors.
        factors: One member of each family, which says what is fixed; its own λ is not used.
        names: Names of the blocks.
        plates: Batch axes that belong to each factor; those before them are a batch of products.
    """

    natural: tuple[Tree, ...]
    factors: tuple[ExponentialFamily, ...]
    names: tuple[str, ...]
    plates: tuple[int, ...]

    @classmethod
    def from_factors(cls, **factors: ExponentialFamily) -> Self:
        """The product of named factors, in their order.

        Raises:
            TypeError: If one of them is not an exponential family.
            ValueError: If there is none.
        """
        if not factors:
            raise ValueError("a product needs at least one factor; pass them by name")
        for name, q in factors.items():
            if not isinstance(q, ExponentialFamily):
                raise TypeError(
                    f"factor {name!r} must be a member of an exponential family, got "
                    f"{type(q).__name__}; build one with its from_… method"
                )
        plates = tuple(len(q.batch_shape) for q in factors.values())
        return cls._of(tuple(factors.values()), tuple(factors), plates)

    @classmethod
    def _of(cls, factors: Any, names: tuple[str, ...], plates: tuple[int, ...]) -> Self:
        # The factors have been checked, each at its own door: no second look at λ.
        q = object.__new__(cls)
        for field, value in (("factors", factors), ("names", names), ("plates", plates)):
            object.__setattr__(q, field, value)
        object.__setattr__(q, "natural", tuple(f.natural for f in factors))
        return q

    @classmethod
    def from_expectation(cls, mu: Tree, like: Self | None = None) -> Self:
        """The product whose factors have the expectations μ_b, and the families of `like`.

        Raises:
            ValueError: If `like` is missing, or a factor has no member with this expectation.
        """
        if like is None:
            raise ValueError("like must be a Product: μ does not say what the factors are; pass q")
        factors = (type(f).from_expectation(m, f) for f, m in zip(like.factors, mu, strict=True))
        return cls._of(tuple(factors), like.names, like.plates)

    def replace(self, **factors: ExponentialFamily) -> Self:
        """The product with some of its factors exchanged for others of the same families."""
        for name in factors:
            self._index(name)
        kept = zip(self.names, self.factors, strict=True)
        return self._of(tuple(factors.get(name, f) for name, f in kept), self.names, self.plates)

    def __getitem__(self, name: str) -> Any:
        """The factor of one block."""
        return self.factors[self._index(name)]

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"there is no block {name!r}; the blocks are {', '.join(self.names)}")
        return self.names.index(name)

    @property
    def natural_ndims(self) -> Dims:  # type: ignore[override]
        """Event axes of each block of λ: those of its family, and its plates."""
        families = zip(self.factors, self.plates, strict=True)
        return tuple(_deeper(f.natural_ndims, plates) for f, plates in families)

    def _validate(self) -> None:
        factors = []
        for name, f, lam in zip(self.names, self.factors, self.natural, strict=True):
            try:
                factors.append(f.at(lam))
            except ValueError as error:
                raise ValueError(f"block {name!r}: {error}") from error
        object.__setattr__(self, "factors", tuple(factors))

    def _at(self, natural: Any) -> Self:
        factors = tuple(f._at(lam) for f, lam in zip(self.factors, natural, strict=True))
        return self._of(factors, self.names, self.plates)

    # ---- sums over the factors ------------------------------------------------------------------

    def log_partition(self) -> Tensor:
        """A(λ) = Σ_b A_b(λ_b)."""
        return self._sum(f.log_partition() for f in self.factors)

    def expectation(self) -> tuple[Tree, ...]:
        """μ = (μ_1, …, μ_B)."""
        return tuple(f.expectation() for f in self.factors)

    def entropy(self) -> Tensor:
        """H(q) = Σ_b H(q_b)."""
        return self._sum(f.entropy() for f in self.factors)

    def entropy_gradient(self) -> tuple[Tree, ...]:
        """∇_μH, of each factor its own."""
        return tuple(f.entropy_gradient() for f in self.factors)

    def kl(self, other: Self) -> Tensor:
        """KL(q‖p) = Σ_b KL(q_b‖p_b) for a product p of the same blocks."""
        self._check_same_family(other)
        return self._sum(f.kl(p) for f, p in zip(self.factors, other.factors, strict=True))

    def expected_log_base_measure(self) -> Tensor:
        """E[log h] = Σ_b E[log h_b]."""
        return self._sum(f.expected_log_base_measure().expand(f.batch_shape) for f in self.factors)

    # ---- functions of θ = (θ_1, …, θ_B) ---------------------------------------------------------

    def sufficient_statistics(self, theta: Any) -> tuple[Tree, ...]:
        """T(θ) = (T_1(θ_1), …, T_B(θ_B)) for the tuple of the blocks' parameters."""
        return tuple(f.sufficient_statistics(t) for f, t in self._blocks(theta))

    def log_base_measure(self, theta: Any) -> Tensor:
        """log h(θ) = Σ_b log h_b(θ_b)."""
        return self._sum(f.log_base_measure(t).expand(_shape(f, t)) for f, t in self._blocks(theta))

    def outside_support(self, theta: Any) -> Tensor:
        """Where a block is outside the support of its factor."""
        outside = (f.outside_support(t).expand(_shape(f, t)) for f, t in self._blocks(theta))
        return self._sum(x.double() for x in outside) > 0

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Any, ...]:
        """n draws of each block, independent."""
        return tuple(f.sample(n, generator) for f in self.factors)

    def _blocks(self, theta: Any) -> Iterator[tuple[ExponentialFamily, Any]]:
        if not isinstance(theta, tuple | list) or len(theta) != len(self.factors):
            raise TypeError(
                f"theta must be a tuple of {len(self.factors)} blocks: {', '.join(self.names)}"
            )
        return zip(self.factors, theta, strict=True)

    def _sum(self, values: Any) -> Tensor:
        # Over the blocks, and over the plates of each.
        pairs = zip(values, self.plates, strict=True)
        parts = [x.sum(tuple(range(-n, 0))) if n else x for x, n in pairs]
        return torch.stack(torch.broadcast_tensors(*parts)).sum(0)

    def _check_same_family(self, other: ExponentialFamily) -> None:
        super()._check_same_family(other)
        if self.names != other.names:  # type: ignore[attr-defined]
            raise ValueError(
                f"the blocks are {self.names} and {other.names}; "  # type: ignore[attr-defined]
                "compare products of the same blocks"
            )

    def __repr__(self) -> str:
        """The factors by name."""
        pairs = zip(self.names, self.factors, strict=True)
        return "Product(" + ", ".join(f"{name}={f!r}" for name, f in pairs) + ")"


def _deeper(ndims: Dims, plates: int) -> Dims:
    if isinstance(ndims, tuple):
        return tuple(_deeper(n, plates) for n in ndims)
    return ndims + plates


def _shape(f: ExponentialFamily, theta: Any) -> torch.Size:
    # The axes of θ before those of one event.
    return next(_tree.batch_shapes(f.sufficient_statistics(theta), f.natural_ndims))

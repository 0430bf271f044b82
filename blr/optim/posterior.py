"""The posterior of a network: a diagonal Gaussian whose coordinates have names and shapes.

    λ = (s∘m, −½s)      one vector each, the parameters of the model one after the other

It is a `DiagonalGaussian` like any other, so its mean, precision, divergences and removal are those
of the family. What it adds is the way back from a vector to the tensors of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from blr.families.gaussian import DiagonalGaussian


@dataclass(frozen=True, eq=False, repr=False)
class NamedGaussian(DiagonalGaussian):
    """N(m, diag(s)⁻¹) over named tensors.

    Args:
        natural: λ = (s∘m, −½s), both of shape (P,).
        shapes: Name and shape of each parameter, in the order of the vectors.
        tensors: The parameters of an optimizer that knows no names, by their numbers, as long as
            they live. Not saved and not copied.

    Raises:
        ValueError: If the shapes do not have P entries together.
    """

    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"tensors": {}}

    def _validate(self) -> None:
        super()._validate()
        shapes = {name: torch.Size(shape) for name, shape in self.shapes.items()}
        object.__setattr__(self, "shapes", shapes)
        size, total = self.natural[0].shape[-1], sum(s.numel() for s in shapes.values())
        if size != total:
            raise ValueError(
                f"shapes must have {size} entries together, as natural has, got {total}; "
                "pass the shape of every parameter"
            )

    @classmethod
    def from_named(cls, mean: Mapping[str, Tensor], precision: Mapping[str, Tensor]) -> Self:
        """N(m, diag(s)⁻¹) from tensors m and s by name, of equal shapes.

        Raises:
            ValueError: If names or shapes differ, or a precision is not positive.
        """
        shapes = {name: m.shape for name, m in mean.items()}
        if shapes != {name: s.shape for name, s in precision.items()}:
            theirs = {name: s.shape for name, s in precision.items()}
            raise ValueError(
                f"mean and precision must have the same names and shapes, got {shapes} and "
                f"{theirs}; pass one entry for each parameter"
            )
        m, s = (torch.cat([x.detach().reshape(-1) for x in part.values()])
                for part in (mean, precision))  # fmt: skip
        return cls(natural=(s * m, -0.5 * s), shapes=shapes)

    @classmethod
    def from_expectation(cls, mu: tuple[Tensor, Tensor], like: Self | None = None) -> Self:
        """The member with E[θ] = μ₁ and E[θ²] = μ₂, and the names of `like`.

        Raises:
            ValueError: If `like` is missing, or μ₂ − μ₁² is not positive.
        """
        if like is None:
            raise ValueError("like must be a NamedGaussian: μ has no names; pass the posterior")
        return like.at(DiagonalGaussian.from_expectation(mu).natural)

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """The tensors of the model in a vector such as `q.mean` or `q.sample(n)`, by name.

        Args:
            vector: Shape (*batch, P).

        Returns:
            Views of shape (*batch, *shape) for each parameter, which `torch.func.functional_call`
            takes as they are.
        """
        parts = vector.split([shape.numel() for shape in self.shapes.values()], -1)
        return {
            name: part.reshape((*vector.shape[:-1], *shape))
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

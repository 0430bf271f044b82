"""Vector algebra on nested tuples of tensors.

Natural parameters λ, expectation parameters μ and sufficient statistics T(θ) are one tensor or a
tuple of tensors. Here they are added, subtracted, scaled and paired as the vectors they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

Tree: TypeAlias = "Tensor | tuple[Tree, ...]"
Dims: TypeAlias = Any
"""A number of axes for one tensor, a tuple of such numbers for a tuple of tensors."""


def tree_map(f: Callable[..., Tensor], *trees: Tree) -> Tree:
    """Apply f leaf by leaf to trees of one structure."""
    if isinstance(trees[0], tuple):
        if not all(isinstance(t, tuple) and len(t) == len(trees[0]) for t in trees):
            raise ValueError(
                f"trees differ in structure: {', '.join(map(structure, trees))}; "
                "pass natural parameters with the blocks of the family"
            )
        return tuple(tree_map(f, *branches) for branches in zip(*trees, strict=True))
    if any(isinstance(t, tuple) for t in trees):
        raise ValueError(
            f"trees differ in structure: {', '.join(map(structure, trees))}; "
            "pass natural parameters with the blocks of the family"
        )
    return f(*trees)


def structure(tree: Tree) -> str:
    """The shapes of the leaves, for messages."""
    if isinstance(tree, tuple):
        return "(" + ", ".join(map(structure, tree)) + ")"
    return f"tensor{list(tree.shape)}" if isinstance(tree, Tensor) else type(tree).__name__


def leaves(tree: Tree) -> Iterator[Tensor]:
    """The tensors of a tree, in order."""
    if isinstance(tree, tuple):
        for branch in tree:
            yield from leaves(branch)
    else:
        yield tree


def add(a: Tree, b: Tree, c: float = 1.0) -> Tree:
    """The sum a + cb, without a tree for cb."""
    return tree_map(lambda x, y: torch.add(x, y, alpha=c), a, b)


def add_to(a: Tree, b: Tree, c: float = 1.0) -> Tree:
    """The sum a + cb of an a that nobody needs any more: in its memory, if the sum has its form."""

    def leaf(x: Tensor, y: Tensor) -> Tensor:
        fits = x.shape == y.shape and x.dtype == y.dtype
        return x.add_(y, alpha=c) if fits else torch.add(x, y, alpha=c)

    return tree_map(leaf, a, b)


def sub(a: Tree, b: Tree) -> Tree:
    """The difference a − b."""
    return tree_map(torch.sub, a, b)


def scale(c: float | Tensor, a: Tree) -> Tree:
    """The multiple c·a."""
    return tree_map(lambda x: c * x, a)


def total(a: Tree) -> Tree:
    """The sum over the leading axis of every leaf: Σᵢ aᵢ."""
    return tree_map(lambda x: x.sum(0), a)


def take(a: Tree, index) -> Tree:
    """The entries `index` of the leading axis of every leaf."""
    return tree_map(lambda x: x[index], a)


def inner(a: Any, b: Any, ndims: Dims) -> Tensor:
    """The pairing ⟨a, b⟩ over the last `ndims` axes of each leaf; Tr(aᵀb) for matrices."""
    if isinstance(a, tuple):
        pairs = zip(a, b, ndims, strict=True)
        return torch.stack(torch.broadcast_tensors(*(inner(*p) for p in pairs))).sum(0)
    product = a * b
    return product.sum(tuple(range(-ndims, 0))) if ndims else product


def flatten(a: Any, ndims: Dims) -> Tensor:
    """One vector per batch element, shape (*batch, d): leaves in order, matrices row by row."""
    if isinstance(a, tuple):
        parts = [flatten(x, n) for x, n in zip(a, ndims, strict=True)]
        batch = torch.broadcast_shapes(*(p.shape[:-1] for p in parts))
        return torch.cat([p.expand(*batch, p.shape[-1]) for p in parts], -1)
    return a.reshape(*a.shape[: a.ndim - ndims], -1)


def unflatten(flat: Tensor, like: Tree, ndims: Dims) -> Tree:
    """The tree with the event shapes of `like` whose `flatten` is `flat`."""
    shapes = list(event_shapes(like, ndims))
    parts = flat.split([shape.numel() for shape in shapes], -1)
    blocks = (x.reshape((*x.shape[:-1], *s)) for x, s in zip(parts, shapes, strict=True))

    def build(branch: Tree) -> Tree:
        return tuple(map(build, branch)) if isinstance(branch, tuple) else next(blocks)

    return build(like)


def event_shapes(a: Tree, ndims: Dims) -> Iterator[torch.Size]:
    """The shape of each leaf without its batch axes."""
    if isinstance(a, tuple):
        for x, n in zip(a, ndims, strict=True):
            yield from event_shapes(x, n)
    else:
        yield a.shape[a.ndim - ndims :]


def batch_shapes(a: Tree, ndims: Dims) -> Iterator[torch.Size]:
    """The leading axes of each leaf, before the last `ndims`."""
    if isinstance(a, tuple):
        for x, n in zip(a, ndims, strict=True):
            yield from batch_shapes(x, n)
    else:
        yield a.shape[: a.ndim - ndims]

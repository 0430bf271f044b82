"""Parameters as flat vectors that fit in the cache, in the order of one global index.

The parameters of an optimizer have the global index 0, …, P − 1, the small ones of a group before
the large ones. Large tensors are worked on in place, in parts, through views; small ones are
gathered into one vector and scattered back, so that a hundred biases cost no more than one matrix,
and their state lives in such vectors. The arithmetic sees nothing of this: a `Piece` gives it
vectors, and takes them back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from operator import is_
from typing import Any

import torch
from torch import Tensor

Windows = Mapping[str, int]
WINDOW = {"cpu": 1 << 18}  # elements of a piece by kind of device: what fits in the cache
LARGE = 1 << 24  # elsewhere there are no caches to fit, only launches to save
SMALL = 1 << 15

States = Mapping[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Piece(ABC):
    """The elements [start, stop) of the global index as vectors, by name.

    Names are "parameter", "gradient", and the entries of the state.
    """

    parameters: tuple[Tensor, ...]
    states: tuple[dict[str, Any], ...]
    start: int
    stop: int

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The vector: a view, or a copy that lives until the same name is read again."""

    @abstractmethod
    def write(self, name: str, value: Tensor) -> None:
        """Write the vector back. Nothing is left to do if it is the view that `read` gave."""

    @abstractmethod
    def cut(self, noise: Tensor) -> Tensor:
        """The entries that this process holds of a vector over [start, stop)."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return self.parameters[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters[0].device

    def _tensors(self, name: str) -> list[Tensor]:
        tensors: list[Any]
        if name == "parameter":
            tensors = list(self.parameters)
        elif name == "gradient":
            tensors = [p.grad for p in self.parameters]
        else:
            tensors = [state[name] for state in self.states]
        return list(map(local, tensors)) if sharded(self.parameters[0]) else tensors


@dataclass(frozen=True)
class Slice(Piece):
    """Elements of one large tensor, in place; `first` is the first of them in the tensor."""

    first: int

    def read(self, name: str) -> Tensor:
        (x,) = self._tensors(name)
        return flat(x, local(self.parameters[0]))[self.first : self.first + self.stop - self.start]

    def write(self, name: str, value: Tensor) -> None:
        like = local(self.parameters[0])
        if not dense(like):
            self._tensors(name)[0].copy_(value.view(like.shape))
        elif (view := self.read(name)).data_ptr() != value.data_ptr():
            view.copy_(value)

    def cut(self, noise: Tensor) -> Tensor:
        return noise


@dataclass(frozen=True)
class Pack(Piece):
    """Small tensors, gathered; `firsts` are the global indices of their first elements."""

    firsts: tuple[int, ...]
    _buffers: dict[str, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        tensors = self._tensors(name)
        vector, views = self._buffer(name, tensors)
        if not all(map(is_, tensors, views)):
            torch._foreach_copy_(views, tensors)
            self._adopt(name, tensors, views)
        return vector

    def write(self, name: str, value: Tensor) -> None:
        tensors = self._tensors(name)
        vector, views = self._buffer(name, tensors)
        if vector is not value:
            vector.copy_(value)
        if not all(map(is_, tensors, views)):
            torch._foreach_copy_(tensors, views)

    def _adopt(self, name: str, tensors: list[Tensor], views: list[Tensor]) -> None:
        """Entries of the state live in the vector from now on, so they need not be gathered."""
        for state, x, view in zip(self.states, tensors, views, strict=True):
            if state.get(name) is x:  # not a parameter, not a gradient, not sharded
                state[name] = view

    def cut(self, noise: Tensor) -> Tensor:
        sizes = [local(p).numel() for p in self.parameters]
        if sum(sizes) == self.stop - self.start:
            return noise
        starts = [first - self.start for first in self.firsts]
        return torch.cat([noise[a : a + n] for a, n in zip(starts, sizes, strict=True)])

    def _buffer(self, name: str, like: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """A vector for what has this name, and views of it in the shapes of the parameters."""
        kept = self._buffers.get(name)
        if kept is None or (kept[0].dtype, kept[0].device) != (like[0].dtype, like[0].device):
            sizes = [x.numel() for x in like]
            vector = torch.empty(sum(sizes), dtype=like[0].dtype, device=like[0].device)
            parts = zip(vector.split(sizes), like, strict=True)
            self._buffers[name] = vector, [part.view(x.shape) for part, x in parts]
        return self._buffers[name]


Job = tuple[Piece, dict[str, Any]]
"""A piece and the options of its group."""


def index(groups: Iterable[Iterable[Tensor]]) -> dict[Tensor, int]:
    """The global index of the first element of each parameter; in a group, small ones first."""
    order = [p for group in groups for p in sorted(group, key=lambda p: p.numel() >= SMALL)]
    firsts = accumulate((p.numel() for p in order), initial=0)
    return dict(zip(order, firsts, strict=False))


def sharded(x: Tensor) -> bool:
    """Whether each process holds a part of the tensor."""
    return hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """The rows that this process holds of a sharded tensor; any other tensor as it is."""
    return x.to_local() if sharded(x) else x  # type: ignore[attr-defined]


def offset(x: Tensor) -> int:
    """Where the rows of this process begin among all elements of a sharded tensor.

    Raises:
        ValueError: If the tensor is cut along another axis than the first.
    """
    if not sharded(x):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = x.device_mesh, x.placements  # type: ignore[attr-defined]
    shape, start = compute_local_shape_and_global_offset(x.shape, mesh, placements)
    if tuple(shape[1:]) != tuple(x.shape[1:]):
        raise ValueError(
            f"a parameter of shape {tuple(x.shape)} is sharded as {placements}; "
            "shard along the first axis, as fully_shard does"
        )
    return start[0] * x.shape[1:].numel() if x.ndim else 0


def dense(x: Tensor) -> bool:
    """Whether the elements fill an interval of memory, in whatever order."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def flat(x: Tensor, like: Tensor) -> Tensor:
    """x as a vector in the order in which `like` lies in memory; a view if x lies alike."""
    x = x.detach()
    if like.is_contiguous() or not dense(like):
        return x.reshape(-1)
    if x.stride() != like.stride():
        x = torch.empty_like(like, dtype=x.dtype).copy_(x)
    return x.as_strided((x.numel(),), (1,))


def cut(
    parameters: Iterable[Tensor],
    index: dict[Tensor, int],
    states: States,
    windows: Windows = WINDOW,
) -> Iterator[Piece]:
    """The pieces of parameters, given the global index of the first element of each."""
    packs: dict[tuple[object, ...], list[Tensor]] = {}
    for p in sorted(parameters, key=index.__getitem__):
        if p.numel() < SMALL:
            key = p.device, p.dtype, sharded(p), index[p] // windows.get(p.device.type, LARGE)
            packs.setdefault(key, []).append(p)
        else:
            window = windows.get(p.device.type, LARGE)
            yield from _slices(p, states[p], index[p] + offset(p), window)
    for members in packs.values():
        firsts = tuple(index[p] + offset(p) for p in members)
        stop = firsts[-1] + local(members[-1]).numel()
        yield Pack(tuple(members), tuple(states[p] for p in members), firsts[0], stop, firsts)


def _slices(p: Tensor, state: dict[str, Any], start: int, window: int) -> Iterator[Slice]:
    """In equal parts; a tensor with gaps in memory stays whole."""
    size = local(p).numel()
    parts = -(-size // window) if dense(local(p)) else 1
    step = max(1, -(-size // parts)) if parts else 1
    for first in range(0, size, step):
        yield Slice((p,), (state,), start + first, start + min(size, first + step), first)

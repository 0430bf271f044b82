"""Where tensors lie: tables of addresses that a kernel reads, and chunks for its programs.

    row: addresses of parameter, gradient, state; size; global index; group     chunk: (row, part)

Tensors are taken where they are, in the order of their elements in memory, as in `_pieces`. Shards
and parts of large tensors bring the global index of their first element, of which their noise is
a function.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blr.optim._noise import BLOCK
from blr.optim._pieces import Job, Slice, dense, flat, local

HIGH = 33  # elements that share the upper word of their pair's number, as a power of 2
ADDRESSES = ("parameter", "gradient", "mean", "momentum", "hess", "product", "prior_precision",
             "prior_shift")  # fmt: skip
COLUMNS = len(ADDRESSES) + 4  # and size, first, group, whether four elements are read at a time

Kind = tuple[torch.dtype, torch.dtype, bool]
"""What a launch has in common: type of parameters, type of gradients, a prior for each element."""


@dataclass(frozen=True)
class Row:
    """Consecutive elements of a tensor in memory, with the same upper word of the noise."""

    job: Job
    number: int  # of the tensor in the piece
    first: int  # of its elements, in the tensor
    start: int  # the same, in the global index
    size: int


@dataclass
class Batch:
    """What a launch takes: rows of one kind, their chunks, and the groups that they belong to."""

    kind: Kind
    rows: list[Row]
    groups: list[tuple[dict[str, Any], int]]  # with the upper word of the noise
    chunks: Tensor  # (row, part) for each program, int32
    places: Tensor  # the table without addresses
    firsts: Tensor  # of each row in its tensor
    sent: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)  # from here, and there
    kept: list[Tensor] = field(default_factory=list)  # what recorded graphs will read again
    mark: Tensor | None = None  # on the device: whether a sample was placed where the mean was
    ready: tuple[tuple[str, ...], tuple[Tensor, list[Tensor]]] | None = None

    def table(self, names: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        """The addresses of what has these names, and the tensors, to be kept until the launch."""
        keep: list[Tensor] = []
        table, likes = self.places.clone(), self._tensors("parameter")
        strides = [like.stride() for like in likes]
        for name in names:
            xs = self._tensors(name)
            for i, stride in enumerate(strides):
                if xs[i].stride() != stride:
                    xs[i] = _alike(xs[i], likes[i], self.rows[i], name)
            addresses = torch.tensor([x.data_ptr() for x in xs])
            size = xs[0].element_size()
            table[:, ADDRESSES.index(name)] = addresses + size * self.firsts
            keep += xs
        table[:, -1] &= (table[:, : len(ADDRESSES)] % 16 == 0).all(1)
        return self.send(tuple(names), table), keep

    def prepare(self, names: Sequence[str]) -> Tensor:
        """A table that is taken again by `prepared`, if nothing else is asked for before."""
        self.ready = tuple(names), self.table(names)
        return self.ready[1][0]

    def prepared(self, names: Sequence[str]) -> tuple[Tensor, list[Tensor]] | None:
        """What `prepare` has made, once."""
        ready, self.ready = self.ready, None
        return ready[1] if ready and ready[0] == tuple(names) else None

    def _tensors(self, name: str) -> list[Tensor]:
        """What has this name, for each row."""
        pieces = {id(row.job[0]): row.job[0] for row in self.rows}
        known = {i: b._tensors(name) for i, b in pieces.items()}
        return [known[id(row.job[0])][row.number] for row in self.rows]

    def send(self, name: Any, values: Tensor) -> Tensor:
        """Numbers on the device; the last ones are kept, for they often are the same again."""
        old, recording = self.sent.get(name), _recording(self.chunks.device)
        if old is None or not torch.equal(old[0], values):
            if recording:
                x = _changed(old, values)
                self.kept += [x] if old is None else [x, old[1]]
            else:
                x = values.pin_memory() if self.chunks.is_cuda else values.clone()
                x = x.to(self.chunks.device, non_blocking=True)
            self.sent[name] = old = values, x
        elif recording:
            self.kept.append(old[1])
        return old[1]


def batches(jobs: Iterable[Job], span: int, gradients: bool) -> list[Batch]:
    """One batch for each kind of tensors, on the device where they all are.

    Args:
        jobs: Pieces with their groups.
        span: Elements of a chunk, a multiple of the blocks of noise.
        gradients: Whether there are gradients; else their type is of no matter.
    """
    kinds: dict[Kind, list[Row]] = {}
    for row in _rows(jobs):
        p = row.job[0].parameters[row.number]
        g = p.grad if gradients and p.grad is not None else p
        prior = "prior_precision" in row.job[0].states[row.number]
        kinds.setdefault((p.dtype, g.dtype, prior), []).append(row)
    return [_batch(kind, rows, span) for kind, rows in kinds.items()]


def _rows(jobs: Iterable[Job]) -> Iterator[Row]:
    for job in jobs:
        b, _ = job
        if isinstance(b, Slice):
            parts = [(0, b.first, b.start, b.stop - b.start)]
        else:
            sizes = [local(p).numel() for p in b.parameters]
            firsts = b.firsts  # type: ignore[attr-defined]
            parts = [(i, 0, firsts[i], n) for i, n in enumerate(sizes)]
        for number, first, start, size in parts:
            while size:
                n = min(size, ((start >> HIGH) + 1 << HIGH) - start)
                yield Row(job, number, first, start, n)
                first, start, size = first + n, start + n, size - n


def _batch(kind: Kind, rows: list[Row], span: int) -> Batch:
    assert span % BLOCK == 0
    groups = {(id(r.job[1]), r.start >> HIGH): (r.job[1], r.start >> HIGH) for r in rows}
    counts = torch.tensor([(r.start + r.size - 1) // span - r.start // span + 1 for r in rows])
    which = torch.repeat_interleave(torch.arange(len(rows)), counts)
    part = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
    chunks = torch.stack([which, part], 1).to(torch.int32).to(rows[0].job[0].device)
    number = {key: i for i, key in enumerate(groups)}
    places = torch.zeros(len(rows), COLUMNS, dtype=torch.int64)
    for i, r in enumerate(rows):
        at = number[id(r.job[1]), r.start >> HIGH]
        places[i, -4:] = torch.tensor([r.size, r.start, at, r.start % 8 == 0])
    firsts = torch.tensor([r.first for r in rows])
    return Batch(kind, rows, list(groups.values()), chunks, places, firsts)


def _alike(x: Tensor, like: Tensor, row: Row, name: str) -> Tensor:
    """x in the memory layout of the parameter: a gradient for once, an entry of the state for good.

    Raises:
        RuntimeError: If the parameter has gaps in memory since the work was divided.
    """
    if not dense(like):
        raise RuntimeError(
            f"a parameter of shape {tuple(like.shape)} got the strides {like.stride()}, with gaps "
            "in memory; make it contiguous, or build the optimizer after changing its layout"
        )
    view = flat(x, like)
    if view.data_ptr() == x.data_ptr():
        return x
    view = view.as_strided(like.shape, like.stride())
    if name != "gradient":
        row.job[0].states[row.number][name] = view
    return view


# ---- recording ----------------------------------------------------------------------------------


def _recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _changed(old: tuple[Tensor, Tensor] | None, values: Tensor) -> Tensor:
    """What was sent, with other entries, by launches alone: a graph cannot record the sending.

    Raises:
        RuntimeError: If nothing of the kind was sent before.
    """
    if old is None or old[0].shape != values.shape:
        raise RuntimeError(
            "a CUDA graph records a step unlike those before it; take the same step a few times "
            "on a side stream before recording, as torch.cuda.graph asks for"
        )
    x = old[1].clone()
    entries, changed = x.view(-1), (old[0] != values).view(-1).nonzero().view(-1)
    for i, value in zip(changed.tolist(), values.view(-1)[changed].tolist(), strict=True):
        entries[i].fill_(value)
    return x

"""The work on parameters, in units that a back end does at once: place a sample, rest, update.

    place: m ← θ, θ ← draw(m, ε)     rest: θ ← m     update: m ← learn(m, ĝ, …), θ ← draw(m, ε′)

An optimizer divides its parameters into units (`_divide`). `Eager` is one piece in plain torch, so
that its numbers stay in the cache; a kernel may take many tensors at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from blr.optim import _pieces, _state
from blr.optim._equations import Equations
from blr.optim._pieces import Job, local

TRAINING, LOOKING = 0, 1
"""Streams of noise: samples that are learned from, and samples that are only looked at."""


@dataclass
class Work(ABC):
    """Pieces, each with its group, that are worked on at once.

    Args:
        jobs: The pieces and their groups.
        held: Whether the parameters hold a sample while the mean waits in the state. Set after the
            mean is safe and before the parameters change, cleared after they are back at the mean,
            so that an interrupt at any moment can be undone by `rest`.
    """

    jobs: tuple[Job, ...]
    held: bool = False

    @abstractmethod
    def place(self, opt: Equations, fresh: bool) -> None:
        """Write the sample `opt._at` into the parameters; where `fresh`, they are at the mean."""

    @abstractmethod
    def rest(self, opt: Equations) -> None:
        """Write the mean into parameters that are held; leave others as they are."""

    @abstractmethod
    def update(self, opt: Equations, several: bool) -> None:
        """Learn from `p.grad` and, of one sample, θ, or of several, the averaged "product".

        If the parameters hold a sample, they get that of the next step.
        """

    @abstractmethod
    def add(self, opt: Equations, number: int, weight: float) -> None:
        """Add the product of training sample `number` with `p.grad`, weighted, to "product"."""

    def signs(self) -> Iterator[Tensor]:
        """Tensors that are finite if the gradients are."""
        return (b.read("gradient") for b, _ in self.jobs)


@dataclass
class Eager(Work):
    """One piece, in plain torch."""

    def place(self, opt: Equations, fresh: bool) -> None:
        """See `Work`."""
        ((b, _),) = self.jobs
        if fresh:
            b.write("mean", self._resting(opt))
            self.held = True
        self._show(opt, b.read("mean"))

    def rest(self, opt: Equations) -> None:
        """Swap mean and sample: the sample is kept aside, in case that a step learns from it."""
        ((b, _),) = self.jobs
        if self.held:
            theta = b.read("parameter").clone()
            b.write("parameter", opt._shown(b.read("mean")))
            self.held = False
            if not opt._apart(b.dtype):
                b.write("mean", theta)

    def update(self, opt: Equations, several: bool) -> None:
        """See `Work`."""
        ((b, group),) = self.jobs
        where = self._where(opt)
        m = b.read(where)
        g = b.read("gradient").to(m.dtype)
        product = b.read("product") if several else self._product(opt, m, g, 0)
        opt._learn(b, group, m, g, product)
        b.write(where, m)
        self._follow(opt, m)

    def add(self, opt: Equations, number: int, weight: float) -> None:
        """See `Work`."""
        ((b, _),) = self.jobs
        m = b.read(self._where(opt))
        product = self._product(opt, m, b.read("gradient").to(m.dtype), number)
        b.write("product", b.read("product").add_(product, alpha=weight))

    def _follow(self, opt: Equations, mean: Tensor) -> None:
        """After a step, show in the parameter what it holds now."""
        ((b, _),) = self.jobs
        if opt._at is not None:
            self._show(opt, mean, ahead=1)
        elif opt._apart(b.dtype):
            b.write("parameter", opt._shown(mean))

    def _show(self, opt: Equations, mean: Tensor, ahead: int = 0) -> None:
        ((b, _),) = self.jobs
        assert opt._at is not None
        theta = self._made(opt, mean, opt._at, ahead)
        b.write("parameter", opt._visible(theta, opt._at[0]))

    def _made(self, opt: Equations, mean: Tensor, at: tuple[int, int], ahead: int = 0) -> Tensor:
        """θ of the sample `at`, so many steps ahead."""
        ((b, group),) = self.jobs
        return opt._draw(b, group, mean, opt._noise(b, group, at, ahead))

    def _resting(self, opt: Equations) -> Tensor:
        """The mean of parameters at rest, which may have been changed by others since."""
        ((b, group),) = self.jobs
        shown = b.read("parameter")
        if not opt._apart(b.dtype):
            return shown
        kept = b.read("mean")
        same = opt._shown(kept).to(shown.dtype) == shown
        return torch.where(same, kept, opt._unshown(shown.to(kept.dtype), group))

    def _product(self, opt: Equations, mean: Tensor, gradient: Tensor, number: int) -> Tensor:
        ((b, group),) = self.jobs
        return opt._product(b, group, gradient, self._sample(opt, mean, number), mean)

    def _sample(self, opt: Equations, mean: Tensor, number: int) -> Tensor:
        """θ of a training sample: where it is now, where it is kept aside, or made again."""
        ((b, _),) = self.jobs
        at = (TRAINING, number)
        if not opt._apart(b.dtype):
            if opt._at == at:
                return b.read("parameter")
            if opt._aside == at:
                return b.read("mean")
        return self._made(opt, mean, at)

    def _where(self, opt: Equations) -> str:
        """The name under which the mean is found now."""
        ((b, _),) = self.jobs
        return "parameter" if opt._at is None and not opt._apart(b.dtype) else "mean"


@dataclass(frozen=True)
class Plan:
    """The work on some parameters, and where they were when it was divided."""

    parameters: tuple[Tensor, ...]
    works: tuple[Work, ...]
    places: tuple[tuple[object, ...], ...]

    @classmethod
    def of(cls, parameters: Sequence[Tensor], works: Sequence[Work]) -> Plan:
        """A plan that stands now."""
        return cls(tuple(parameters), tuple(works), _places(parameters))

    def stands(self) -> bool:
        """Whether no parameter has moved to another device, type or memory format."""
        return self.places == _places(self.parameters)


def _places(parameters: Sequence[Tensor]) -> tuple[tuple[object, ...], ...]:
    return tuple((p.device, p.dtype, p.stride()) for p in parameters)


class Divided(Equations):
    """An optimizer whose parameters are divided into units of work."""

    _plans: dict[tuple[int, ...], Plan]
    _index: dict[Tensor, int]  # the global index of the first element of each parameter

    def _free(self) -> set[Tensor]:
        """The parameters that are not frozen."""
        return {p for group in self.param_groups for p in group["params"] if p.requires_grad}

    def _works(self, chosen: Iterable[Tensor]) -> tuple[Work, ...]:
        """The units of work on the chosen parameters, once they have their states."""
        ids = set(map(id, chosen))
        members = [[p for p in g["params"] if id(p) in ids] for g in self.param_groups]
        key = tuple(id(p) for some in members for p in some)
        plan = self._plans.get(key)
        if plan is None or not plan.stands():
            if len(self._plans) > 32:
                self._plans.clear()
            plan = self._plans[key] = self._plan(members)
        return plan.works

    @torch.inference_mode(False)
    @torch.no_grad()
    def _plan(self, members: list[list[Tensor]]) -> Plan:
        """The work on some parameters of each group, which have their states then."""
        jobs: list[Job] = []
        for group, some in zip(self.param_groups, members, strict=True):
            for p in some:
                self._ready(group, p)
            windows = self._windows(group)
            jobs += [(b, group) for b in _pieces.cut(some, self._index, self.state, windows)]
        return Plan.of([*chain(*members)], self._divide(jobs))

    def _divide(self, jobs: list[Job]) -> list[Work]:
        """The units in which a back end works on pieces."""
        return [Eager((job,)) for job in jobs]

    def _ready(self, group: dict[str, Any], p: Tensor) -> None:
        """Give a parameter its state, or bring the state to where the parameter has moved."""
        state = self.state[p]
        if "mean" not in state:
            _state.check(p)
            state.update(self._initial(p, group) | state)
            state["mean"] = self._unshown(p.detach().to(_state.dtype(p), copy=True), group)
            local(p).copy_(local(self._shown(state["mean"])))
        _state.fit(state, p)

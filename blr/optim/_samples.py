"""Samples between two steps: what is kept of them, and how several are averaged.

    ĝ = mean over samples of ĝₖ      product = mean over samples of ĝₖ(θₖ − m), not ĝ(θ_last − m)

After each sample `p.grad` holds the average so far, where gradient clipping and loss scaling
expect it. The product is scaled as the norm of the gradient was since; what else was done to the
gradient, such as a change of sign or of single entries, is not followed. One sample between two
steps, the usual case, keeps nothing but the options that it was drawn with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import gt
from typing import Any

import torch
from torch import Tensor

from blr.optim import _state
from blr.optim._pieces import States, local, sharded

Add = Callable[[list[Tensor], int, float], None]
"""Adds the products of sample number k with the gradients of parameters, weighted, to "product"."""

BUCKETS = (
    "gradients are views of the buckets of DDP, which do not show whether this sample began with "
    "zero_grad or adds to the earlier ones; begin each sample with optimizer.zero_grad(), or leave "
    "gradient_as_bucket_view out"
)

WRITTEN = (
    "parameters that hold a sample were written, as by load_state_dict() or clamp_(), and this is "
    "overwritten: the mean, which learns, waits elsewhere. Call optimizer.eval() before writing "
    "weights and optimizer.train() after. Later writes are overwritten without a word"
)

Groups = Sequence[dict[str, Any]]


class Drawn:
    """The options that samples are drawn with, which groups may change before the step."""

    NAMES = "ess", "weight_decay", "relaxation", "seed"

    def __init__(self, groups: Groups = ()) -> None:
        self._options = [{k: group[k] for k in self.NAMES if k in group} for group in groups]

    def add(self, group: dict[str, Any]) -> None:
        """Note those of one more group."""
        self._options += Drawn([group])._options

    def changed(self, groups: Groups) -> bool:
        """Whether groups have others now."""
        return self._options != Drawn(groups)._options

    @contextmanager
    def again(self, groups: Groups) -> Iterator[None]:
        """Have them back for a while."""
        now = Drawn(groups)._options
        for group, then in zip(groups, self._options, strict=False):
            group.update(then)
        try:
            yield
        finally:
            for group, options in zip(groups, now, strict=True):
                group.update(options)


class Watch:
    """Notices what others write into parameters that hold a sample."""

    def __init__(self) -> None:
        self._versions: list[int] | None = None
        self._told = False

    def begin(self, parameters: set[Tensor]) -> None:
        """From now on."""
        self._versions = None if self._told else [p._version for p in parameters]

    def end(self, parameters: set[Tensor]) -> None:
        """Until now: say once if there was something."""
        before, self._versions = self._versions, None
        if before and any(map(gt, (p._version for p in parameters), before)):
            self._told = True
            warnings.warn(WRITTEN, RuntimeWarning, stacklevel=6)


class Probe:
    """A gradient of zeros, which shows whether `backward` adds to it or zero_grad() clears it.

    Zeros that are zeroed in place have another version when the first pass comes.
    """

    def __init__(self, p: Tensor, like: Tensor) -> None:
        self.parameter, self._zeros = p, torch.zeros_like(like)
        p.grad = self._zeros
        self._version = self._zeros._version
        self._before: int | None = None  # the version before the first pass added to it
        self._hook = p.register_post_accumulate_grad_hook(self._note) if p.requires_grad else None

    @property
    def replaced(self) -> bool:
        """Whether there is another gradient, or none, and nothing was added to this one."""
        return self.parameter.grad is not self._zeros and self._zeros._version == self._version

    @property
    def zeroed(self) -> bool:
        """Whether it was zeroed in place."""
        if self._before is None:  # no pass came here, but the gradient may be written by hand
            return self._zeros._version != self._version and not bool(self._zeros.any())
        return self._before != self._version

    def remove(self) -> None:
        """Leave the parameter alone."""
        if self._hook is not None:
            self._hook.remove()

    def _note(self, p: Tensor) -> None:
        if self._before is None and p.grad is self._zeros:
            # FSDP2 adds to the rows that a process holds, and the whole keeps its version.
            self._before = self._zeros._version - (not sharded(p))


class Samples:
    """The samples since the last step; `linear` says that products scale as gradients do."""

    def __init__(self, linear: bool = True) -> None:
        self._linear = linear
        self.clear()

    def clear(self) -> None:
        """Forget all samples."""
        self.count = 0
        self.cleared = False  # zero_grad() was called inside the context that is open
        self._averaged = 1  # of `count`, those that began with zero_grad
        self._earlier: dict[Tensor, Tensor] = {}  # gradients put aside while a context is open
        self._probe: Probe | None = None
        self._norms: dict[Tensor, Tensor] = {}  # of the averaged gradients

    @torch.inference_mode(False)
    @torch.no_grad()
    def begin(self, parameters: Iterable[Tensor], states: States, add: Add) -> None:
        """A context opens: put the gradients of earlier samples aside, and their products."""
        self.cleared = False
        if not self.count:
            return
        # DDP may have made views of its buckets of them, which the next sample would overwrite.
        earlier = {p: _own(p.grad) for p in parameters if p.grad is not None}
        # Gradients that are gone or overflowed belong to a step that was never taken.
        if not earlier or not _state.agreed(_state.finite(map(local, earlier.values())), earlier):
            return self.clear()
        if self.count == 1:
            for p in earlier:
                states[p]["product"] = torch.zeros_like(states[p]["mean"])
            add(list(earlier), 0, 1.0)
        self.rescale(states)
        for p in earlier:
            p.grad = None
        probe = min(earlier, key=lambda p: (not p.requires_grad, p.numel()))
        self._earlier, self._probe = earlier, Probe(probe, earlier[probe])

    @torch.inference_mode(False)
    @torch.no_grad()
    def end(self, parameters: Iterable[Tensor], states: States, add: Add) -> None:
        """The context closes: average its gradients, and their products, with the earlier ones."""
        if self._probe is None:
            self.count += 1
            return
        replaced, gradient = self._probe.replaced, self._probe.parameter.grad
        if replaced and not self.cleared and gradient is not None and gradient._is_view():
            self.abandon()
            raise RuntimeError(BUCKETS)
        self.count += 1
        self.cleared |= replaced or self._probe.zeroed
        n = self._averaged
        old, new = (n / (n + 1), 1 / (n + 1)) if self.cleared else (1.0, 1 / n)
        self._averaged += self.cleared
        fresh = [p for p in parameters if p.grad is not None]
        known = dict.fromkeys([*self._earlier, *fresh])
        for p in known:
            if p in self._earlier:
                states[p]["product"].mul_(old)
            else:
                states[p]["product"] = torch.zeros_like(states[p]["mean"])
        add(fresh, self.count - 1, new)
        for p in known:
            _average(p, self._earlier.get(p), old, new)
        self._norms = {p: _norm(p) for p in known}
        self._close()

    def abandon(self) -> None:
        """The context failed: as if it had not been opened."""
        for p, gradient in self._earlier.items():
            p.grad = gradient
        self._close()

    def rescale(self, states: States) -> None:
        """Do to the products what was done to the averaged gradients since."""
        for p, before in self._norms.items():
            if self._linear and p.grad is not None:
                now = self._norms[p] = _norm(p)
                local(states[p]["product"]).mul_(torch.where(before > 0, now / before, 1.0))

    def _close(self) -> None:
        if self._probe is not None:
            self._probe.remove()
        self._earlier, self._probe = {}, None


def _average(p: Tensor, earlier: Tensor | None, old: float, new: float) -> None:
    """The gradient becomes old·earlier + new·(what it is now)."""
    if p.grad is not None:
        p.grad.mul_(new)
    if earlier is not None:
        earlier.mul_(old)
        p.grad = earlier if p.grad is None else earlier.add_(p.grad)


def _own(gradient: Tensor) -> Tensor:
    return gradient.clone() if gradient._is_view() else gradient


def _norm(p: Tensor) -> Tensor:
    assert p.grad is not None
    return local(p.grad).norm(dtype=_state.dtype(p))

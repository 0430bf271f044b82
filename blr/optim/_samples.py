"""Several samples between two steps: what is kept of them, and how they are averaged.

    ĝ = mean over samples of ĝₖ      product = mean over samples of ĝₖ(θₖ − m), not ĝ(θ_last − m)

After each sample `p.grad` holds the average so far, where gradient clipping and loss scaling
expect it. The product is scaled by whatever they did to the gradient since, as told by its norm.
One sample between two steps, the usual case, keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from blr.optim import _state
from blr.optim._pieces import States, local

Add = Callable[[list[Tensor], int, float], None]
"""Adds the products of sample number k with the gradients of parameters, weighted, to "product"."""

BUCKETS = (
    "gradients are views of the buckets of DDP, which do not show whether this sample began with "
    "zero_grad or adds to the earlier ones; begin each sample with optimizer.zero_grad(), or leave "
    "gradient_as_bucket_view out"
)


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
        self._probe: tuple[Tensor, Tensor, int] | None = None
        self._norms: dict[Tensor, Tensor] = {}  # of the averaged gradients

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
        # A gradient of zeros shows whether `backward` adds to it or zero_grad() takes it away.
        probe = min(earlier, key=Tensor.numel)
        probe.grad = torch.zeros_like(earlier[probe])
        self._probe = probe, probe.grad, probe.grad._version
        self._earlier = earlier

    @torch.no_grad()
    def end(self, parameters: Iterable[Tensor], states: States, add: Add) -> None:
        """The context closes: average its gradients, and their products, with the earlier ones."""
        if self._probe is None:
            self.count += 1
            return
        probe, untouched, version = self._probe
        replaced = probe.grad is not untouched and untouched._version == version
        if replaced and not self.cleared and probe.grad is not None and probe.grad._is_view():
            self.abandon()
            raise RuntimeError(BUCKETS)
        self.count += 1
        self.cleared |= replaced
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
        self._earlier, self._probe = {}, None

    def abandon(self) -> None:
        """The context failed: as if it had not been opened."""
        for p, gradient in self._earlier.items():
            p.grad = gradient
        self._earlier, self._probe = {}, None

    def rescale(self, states: States) -> None:
        """Do to the products what was done to the averaged gradients since."""
        for p, before in self._norms.items():
            if self._linear and p.grad is not None:
                now = self._norms[p] = _norm(p)
                local(states[p]["product"]).mul_(torch.where(before > 0, now / before, 1.0))


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

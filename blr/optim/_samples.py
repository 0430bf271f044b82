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
from blr.optim._pieces import Piece, States, local

Products = Callable[[list[Tensor], int], Iterable[tuple[Piece, Tensor]]]
"""The products of sample number k with the gradients that parameters hold, piece by piece."""


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
        self._probe: tuple[Tensor, Tensor] | None = None
        self._norms: dict[Tensor, Tensor] = {}  # of the averaged gradients

    @torch.no_grad()
    def begin(self, parameters: Iterable[Tensor], states: States, products: Products) -> None:
        """A context opens: put the gradients of earlier samples aside, and their products."""
        self.cleared = False
        if not self.count:
            return
        earlier = {p: p.grad for p in parameters if p.grad is not None}
        # Gradients that are gone or overflowed belong to a step that was never taken.
        if not earlier or not _state.finite(map(local, earlier.values())):
            return self.clear()
        if self.count == 1:
            for p in earlier:
                states[p]["product"] = torch.zeros_like(states[p]["mean"])
            self._add(products, list(earlier), 1.0)
        self.rescale(states)
        for p in earlier:
            p.grad = None
        # A gradient of zeros shows whether `backward` adds to it or zero_grad() takes it away.
        probe = min(earlier, key=Tensor.numel)
        probe.grad = torch.zeros_like(earlier[probe])
        self._probe, self._earlier = (probe, probe.grad), earlier

    @torch.no_grad()
    def end(self, parameters: Iterable[Tensor], states: States, products: Products) -> None:
        """The context closes: average its gradients, and their products, with the earlier ones."""
        self.count += 1
        if self._probe is None:
            return
        probe, untouched = self._probe
        self.cleared |= probe.grad is not untouched
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
        self._add(products, fresh, new)
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

    def _add(self, products: Products, parameters: list[Tensor], weight: float) -> None:
        for b, product in products(parameters, self.count - 1):
            b.write("product", b.read("product").add_(product, alpha=weight))


def _average(p: Tensor, earlier: Tensor | None, old: float, new: float) -> None:
    """The gradient becomes old·earlier + new·(what it is now)."""
    if p.grad is not None:
        p.grad.mul_(new)
    if earlier is not None:
        earlier.mul_(old)
        p.grad = earlier if p.grad is None else earlier.add_(p.grad)


def _norm(p: Tensor) -> Tensor:
    assert p.grad is not None
    return local(p.grad).norm(dtype=_state.dtype(p))

"""What optimizers with a posterior share: sampling in place, contexts, and the parts of a step.

    sample:  θ = draw(m, ε)      learn:  m, state ← update(m, state, ĝ, product)      rest:  θ = m

Parameters are the model's own tensors throughout: they are written, never replaced, so aliases,
memory formats and saving stay what they are. They rest at the mean; in a context, or between
`train()` and `eval()`, they hold a sample, and the mean waits in the state. What a sample teaches
is read off `p.grad` at the step, so whatever scales, clips or averages gradients before does the
same to the curvature.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from blr.optim import _noise, _pieces, _state
from blr.optim._pieces import Piece, Plan, local
from blr.optim._samples import Samples

TRAINING, LOOKING = 0, 1
"""Streams of noise: samples that are learned from, and samples that are only looked at."""


class PosteriorOptimizer(Optimizer):
    """An optimizer whose state is a posterior over the parameters."""

    _linear: ClassVar[bool] = True  # whether products scale as gradients do
    _transient: ClassVar[tuple[str, ...]] = ("product",)  # entries of the state not worth saving

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._at: tuple[int, int] | None = None  # stream and number of the sample held; None: mean
        self._open = self._looked = 0  # open contexts; samples only looked at since the last step
        self._warned = False
        self._samples = Samples(self._linear)
        self._aside: tuple[int, int] | None = None  # the sample kept where the mean waited
        self._held: set[Tensor] = set()  # the parameters that the last sample moved
        self._placed: list[Piece] = []  # and the pieces of them that hold it now
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._index: dict[Tensor, int] = {}
        super().__init__(params, defaults)

    # ---- what an optimizer writes -------------------------------------------------------------

    def _check(self, group: dict[str, Any]) -> None:
        """Refuse options that make no sense."""

    def _initial(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter at the start, by name, each with the layout of `p`."""
        raise NotImplementedError

    def _draw(self, b: Piece, group: dict[str, Any], mean: Tensor, noise: Tensor) -> Tensor:
        """A sample θ from the mean m and noise ε."""
        raise NotImplementedError

    def _product(
        self, b: Piece, group: dict[str, Any], gradient: Tensor, theta: Tensor, mean: Tensor
    ) -> Tensor:
        """What a sample teaches beyond its gradient, such as ĝ(θ − m)."""
        raise NotImplementedError

    def _renew(self) -> None:
        """Forget what was noted about an earlier sample, if anything is."""

    def _learn(
        self, b: Piece, group: dict[str, Any], mean: Tensor, gradient: Tensor, product: Tensor
    ) -> None:
        """Update m and the state in place."""

    # ---- where the parameters are -------------------------------------------------------------

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """Hold a fresh sample of the posterior; afterwards, whatever happened, the mean again.

        Args:
            train: Learn from the gradients computed inside at the next `step`. Several such samples
                before a step are averaged if each begins with `zero_grad`; gradients that are left
                to accumulate add up, as everywhere in torch.
        """
        if train and self._at is not None:
            raise RuntimeError(
                "sampled_params(train=True) was entered while the parameters already hold a "
                "sample; leave the other context first, or call eval() to end train()"
            )
        if train:
            self._samples.begin(self._held, self.state, self._products)
            self._renew()
            name = (TRAINING, self._samples.count)
        else:
            self._looked += 1
            name = (LOOKING, self._looked)
        try:
            with self._holding(name):
                yield
        except BaseException:
            if train:
                self._samples.abandon()
            raise
        if train:
            self._samples.end(self._held, self.state, self._products)

    @contextmanager
    def mean_params(self) -> Iterator[None]:
        """Hold the mean; afterwards whatever was held before."""
        with self._holding(None):
            yield

    def train(self, mode: bool = True) -> None:
        """Hold a sample from now on, renewed by every step, as schedule-free optimizers do.

        An unchanged training loop then trains the posterior. `eval()` goes back to the mean; call
        it before validating and before saving the model.
        """
        self._outside("train() and eval()")
        self._samples.clear()
        self._go((TRAINING, 0) if mode else None)
        for group in self.param_groups:
            group["training"] = mode

    def eval(self) -> None:
        """Hold the mean from now on."""
        self.train(False)

    @property
    def training(self) -> bool:
        """Whether `train()` was called, and `eval()` was not called since."""
        return bool(self.param_groups) and bool(self.param_groups[0].get("training", False))

    @contextmanager
    def _holding(self, name: tuple[int, int] | None) -> Iterator[None]:
        before = self._at
        self._open += 1
        try:
            self._go(name)
            yield
        finally:
            self._open -= 1
            self._go(before)

    @torch.no_grad()
    def _go(self, name: tuple[int, int] | None) -> None:
        """Move the parameters to the sample with this name, or to the mean."""
        if name == self._at:
            return
        if self._at is not None:
            self._rest()
        if name is not None:
            self._at, self._aside = name, None
            self._held = {p for g in self.param_groups for p in g["params"] if p.requires_grad}
            self._place(self._held, fresh=True)
        # Autocast keeps low-precision copies of weights; they would outlive the swap.
        torch.clear_autocast_cache()

    def _rest(self) -> None:
        """Swap mean and sample: the sample is kept aside, in case that a step learns from it."""
        while self._placed:
            b = self._placed[-1]
            theta = b.read("parameter").clone()
            b.write("parameter", self._shown(b.read("mean")))
            # Whenever an interrupt comes, the rest of the list can still be undone.
            self._placed.pop()
            if not self._apart(b.dtype):
                b.write("mean", theta)
        self._at, self._aside = None, self._at

    def _place(self, parameters: Iterable[Tensor], fresh: bool) -> None:
        """Write samples into parameters; where `fresh`, they are at the mean now."""
        assert self._at is not None
        for b, group in self._each(parameters):
            m = self._resting(b, group) if fresh else b.read("mean")
            theta = self._draw(b, group, m, self._noise(b, group, *self._at))
            if fresh:
                b.write("mean", m)
                self._placed.append(b)
            b.write("parameter", self._visible(theta, self._at[0]))

    def _resting(self, b: Piece, group: dict[str, Any]) -> Tensor:
        """The mean of parameters at rest, which may have been changed by others since."""
        shown = b.read("parameter")
        if not self._apart(b.dtype):
            return shown
        kept = b.read("mean")
        same = self._shown(kept).to(shown.dtype) == shown
        return torch.where(same, kept, self._unshown(shown.to(kept.dtype), group))

    def _sample(self, b: Piece, group: dict[str, Any], mean: Tensor, number: int) -> Tensor:
        """θ of a training sample: where it is now, where it is kept aside, or made again."""
        if not self._apart(b.dtype):
            if self._at == (TRAINING, number):
                return b.read("parameter")
            if self._aside == (TRAINING, number):
                return b.read("mean")
        return self._draw(b, group, mean, self._noise(b, group, TRAINING, number))

    # ---- a step -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the posterior from the gradients of the samples since the last step.

        Args:
            closure: Clears the gradients, computes the loss, calls `backward` and returns the
                loss, at a sample that is drawn here.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: If there are gradients but no sample at which they were computed.
        """
        self._outside("step()")
        loss = None if closure is None else self._evaluate(closure)
        learning = {p for p in self._held if p.grad is not None}
        _state.check_gradients(self.param_groups, self.training or self._samples.count > 0)
        if learning and self._finite(learning):
            self._samples.rescale(self.state)
            self._update(learning)
        self._samples.clear()
        self._renew()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; outside of a context the samples since the last step go as well."""
        if self._open:
            self._samples.cleared = True
        elif not self.training:
            self._samples.clear()
        super().zero_grad(set_to_none)

    @torch.enable_grad()
    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        with nullcontext() if self.training else self.sampled_params(train=True):
            return closure()

    def _update(self, learning: set[Tensor]) -> None:
        several = self._samples.count > 1
        for b, group in self._each(learning):
            m = b.read(self._where(b))
            g = b.read("gradient").to(m.dtype)
            if several:
                product = b.read("product")
            else:
                product = self._product(b, group, g, self._sample(b, group, m, 0), m)
            self._learn(b, group, m, g, product)
            b.write(self._where(b), m)
            if self._at is None and self._apart(b.dtype):
                b.write("parameter", self._shown(m))
        for p in learning if several else ():
            del self.state[p]["product"]
        self._looked = 0
        for group in self.param_groups:
            group["step"] += 1
        if self._at is not None:
            self._place(self._held, fresh=False)
        torch.clear_autocast_cache()

    def _products(self, parameters: list[Tensor], number: int) -> Iterator[tuple[Piece, Tensor]]:
        """What a sample says about curvature by the gradients that parameters hold now."""
        for b, group in self._each(parameters):
            m = b.read(self._where(b))
            g = b.read("gradient").to(m.dtype)
            yield b, self._product(b, group, g, self._sample(b, group, m, number), m)

    def _finite(self, learning: set[Tensor]) -> bool:
        """Whether all gradients are finite; if not, says so once."""
        ok = _state.finite(b.read("gradient") for b, _ in self._each(learning))
        ok = _state.agreed(ok, learning)
        if not (ok or self._warned):
            warnings.warn(_state.NOT_FINITE, RuntimeWarning, stacklevel=4)
        self._warned |= not ok
        return ok

    # ---- groups, saving and loading -----------------------------------------------------------

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, such as layers that thaw; their averages and their steps begin now."""
        self._outside("add_param_group()")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["params"] = list(dict.fromkeys(group["params"]))
        group["step"], group["training"] = 0, self.training
        try:
            self._check(group)
            for p in group["params"]:
                _state.check(p)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        own = [p for p in group["params"] if p.requires_grad]
        for p in own:
            self._ready(group, p)
        self._index = _pieces.index(g["params"] for g in self.param_groups)
        if self._at is not None:
            self._held.update(own)
            self._place(own, fresh=True)

    def state_dict(self) -> dict[str, Any]:
        """State and options. At rest the mean is the parameter itself and is not saved twice."""
        own = list(enumerate(p for group in self.param_groups for p in group["params"]))
        spare = {(name, i) for i, _ in own for name in self._transient}
        if self._at is None:
            spare |= {("mean", i) for i, p in own if not self._apart(p.dtype)}
        return _state.without(super().state_dict(), spare)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, bit by bit. The model loads its own parameters."""
        self._outside("load_state_dict()")
        super().load_state_dict(state_dict)
        _state.reload(self, state_dict)
        self._samples.clear()
        self._plans.clear()
        self._looked, self._aside = 0, None
        self._at = (TRAINING, 0) if self.training else None
        own = [(group, p) for group in self.param_groups for p in group["params"]]
        self._held = {p for _, p in own if self.training and "mean" in self.state.get(p, {})}
        for group, p in own:
            if p in self.state:
                self._ready(group, p)
        self._placed = [b for b, _ in self._each(self._held)] if self._at is not None else []

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy take along."""
        ours = ("_at", "_aside", "_open", "_looked", "_warned", "_samples", "_held")
        return super().__getstate__() | {name: getattr(self, name) for name in ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What is derived is derived again."""
        super().__setstate__(state)
        self._plans = {}
        self._index = _pieces.index(group["params"] for group in self.param_groups)
        self._placed = [b for b, _ in self._each(self._held)] if self._at is not None else []

    # ---- bookkeeping --------------------------------------------------------------------------

    def _plan(self, group: dict[str, Any], chosen: Iterable[Tensor]) -> Plan:
        """The pieces of the chosen parameters of a group."""
        ids = set(map(id, chosen))
        members = [p for p in group["params"] if id(p) in ids]
        key = tuple(map(id, members))
        plan = self._plans.get(key)
        if plan is None or not plan.stands():
            for p in members:
                self._ready(group, p)
            if len(self._plans) > 32:
                self._plans.clear()
            plan = self._plans[key] = Plan.of(members, self._index, self.state)
        return plan

    def _each(self, chosen: Iterable[Tensor]) -> Iterator[tuple[Piece, dict[str, Any]]]:
        """The pieces of the chosen parameters, each with its group."""
        for group in self.param_groups:
            for b in self._plan(group, chosen).pieces:
                yield b, group

    def _noise(self, b: Piece, group: dict[str, Any], stream: int, number: int) -> Tensor:
        name = (group["seed"], group["step"], stream, number)
        return b.cut(_noise.normal(b.start, b.stop, name, b.device))

    def _apart(self, dtype: torch.dtype) -> bool:
        """Whether the mean has its own place also at rest, because 16 bits are too few for it."""
        return _state.short(dtype)

    def _shown(self, mean: Tensor) -> Tensor:
        """What a parameter shows of the mean at rest."""
        return mean

    def _visible(self, sample: Tensor, stream: int) -> Tensor:
        """What a parameter shows of a sample."""
        return sample

    def _unshown(self, shown: Tensor, group: dict[str, Any]) -> Tensor:
        """The mean of a parameter that others have written."""
        return shown

    def _where(self, b: Piece) -> str:
        """The name under which the mean is found now."""
        return "parameter" if self._at is None and not self._apart(b.dtype) else "mean"

    def _ready(self, group: dict[str, Any], p: Tensor) -> None:
        """Give a parameter its state, or bring the state to where the parameter has moved."""
        state = self.state[p]
        if "mean" not in state:
            state.update(self._initial(p, group) | state)
            state["mean"] = self._unshown(p.detach().to(_state.dtype(p), copy=True), group)
            local(p).copy_(local(self._shown(state["mean"])))
        _state.fit(state, p)

    def _outside(self, what: str) -> None:
        if self._open:
            where = "inside sampled_params() or mean_params()"
            raise RuntimeError(f"{what} was called {where}; leave the context first")

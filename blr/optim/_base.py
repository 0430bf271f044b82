"""What optimizers with a posterior share: contexts, steps, groups, saving and loading.

    sample:  θ = draw(m, ε)      learn:  m, state ← update(m, state, ĝ, product)      rest:  θ = m

Parameters are the model's own tensors throughout: they are written, never replaced, so aliases,
memory formats and saving stay what they are. They rest at the mean; in a context, or between
`train()` and `eval()`, they hold a sample, and the mean waits in the state. What a sample teaches
is read off `p.grad` at the step, so whatever scales, clips or averages gradients before does the
same to the curvature. The equations are an optimizer's own (`_equations`), the tensors are written
by `_work`; here is when.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from blr.optim import _distributed, _pieces, _state
from blr.optim._distributed import Agreement, Averaging
from blr.optim._pieces import local
from blr.optim._samples import Drawn, Samples, Watch
from blr.optim._work import LOOKING, TRAINING, Divided, Work


class PosteriorOptimizer(Divided):
    """An optimizer whose state is a posterior over the parameters."""

    _averaging: Averaging | None = None  # of products over ranks that have noise of their own
    _rank: int = 0  # whose noise that is here

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._open = self._looked = 0  # open contexts; samples only looked at since the last step
        self._warned = False
        self._samples = Samples(self._linear)
        self._drawn, self._watch = Drawn(), Watch()
        self._held: set[Tensor] = set()  # the parameters that the last sample moved
        self._placed: list[Work] = []  # and the units of work on them
        self._plans, self._index = {}, {}
        self._agreement = Agreement()
        super().__init__(params, defaults)

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
            self._samples.begin(self._held, self.state, self._add)
            if self._averaging:
                self._averaging.begin()
            self._renew()
            if not self._samples.count:
                self._drawn = Drawn(self.param_groups)
            name = (TRAINING, self._samples.count)
        else:
            self._looked += 1
            name = (LOOKING, self._looked)
        try:
            with self._holding(name):
                yield
                if train:
                    self._learned(self._samples.count)
        except BaseException:
            if train:
                self._samples.abandon()
                if self._averaging:
                    self._averaging.abandon()
            raise
        if train:
            self._samples.end(self._held, self.state, self._add)

    @contextmanager
    def mean_params(self) -> Iterator[None]:
        """Hold the mean; afterwards whatever was held before."""
        with self._holding(None):
            yield

    def train(self, mode: bool = True) -> None:
        """Hold a sample from now on, renewed by every step, as schedule-free optimizers do.

        An unchanged training loop then trains the posterior. `eval()` goes back to the mean; call
        it before validating and before saving the model, and before writing weights: what others
        write into a sample is overwritten. Layers may be frozen and thawed, and options changed:
        what holds a sample, and how wide it is, is settled anew by every step and by `train()`, and
        each step learns with the `ess` and `weight_decay` that its sample was drawn with.
        """
        self._outside("train() and eval()")
        self._forget()
        if not mode:
            self._go(None)
        elif self._at is None or self._stale():
            self._redraw()
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
        before, held = self._at, self._held
        self._open += 1
        try:
            self._go(name)
            yield
        finally:
            self._open -= 1
            self._go(before, held)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _go(self, name: tuple[int, int] | None, held: set[Tensor] | None = None) -> None:
        """Move to the sample with this name, of all that is not frozen if not told, or the mean."""
        if name == self._at:
            return
        self._watch.end(self._held)
        if self._at is not None:
            self._rest()
        if name is not None:
            self._at, self._aside = name, None
            self._held = self._free() if held is None else held
            try:
                self._place(self._held)
            except BaseException:
                self._rest()
                raise
        _distributed.drop_copies(self._held)
        if self._at is not None and not self._open:
            self._watch.begin(self._held)

    def _redraw(self) -> None:
        """Hold a sample of what is not frozen now, with the options that there are now."""
        self._go(None)
        self._drawn = Drawn(self.param_groups)
        self._go((TRAINING, 0))

    def _stale(self) -> bool:
        """Whether layers were frozen or thawed, or options changed, since the sample was drawn."""
        free = sum([p.requires_grad for group in self.param_groups for p in group["params"]])
        same = free == len(self._held) and all([p.requires_grad for p in self._held])
        return not same or self._drawn.changed(self.param_groups)

    def _rest(self) -> None:
        """Back to the mean. Whenever an interrupt comes, the rest of the list can be undone."""
        for work in self._placed:
            work.rest(self)
        self._at, self._aside, self._placed = None, self._at, []

    def _place(self, parameters: Iterable[Tensor]) -> None:
        """Write samples into parameters that are at the mean now."""
        works = self._works(parameters)
        self._placed.extend(works)
        learning = self._at is not None and self._at[0] == TRAINING
        with self._drawn.again(self.param_groups) if learning else nullcontext():
            for work in works:
                work.place(self, fresh=True)

    # ---- a step -------------------------------------------------------------------------------

    @torch.inference_mode(False)
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
        self._watch.end(self._held)
        learning = {p for p in self._held if p.grad is not None and p.requires_grad}
        _state.check_gradients(self.param_groups, self.training or self._samples.count > 0)
        if self._at is not None:
            self._learned(0)
        if learning and self._finite(learning):
            self._agreement.check(self._samples.count)
            self._samples.rescale(self.state)
            with self._drawn.again(self.param_groups):
                self._update(learning)
        self._forget()
        self._renew()
        if self._at is not None:
            self._watch.begin(self._held)
            if self._stale():
                self._redraw()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; outside of a context the samples since the last step go as well."""
        if self._open:
            self._samples.cleared = True
        elif not self.training:
            self._samples.clear()
        if self._averaging:
            self._averaging.clear()
        super().zero_grad(set_to_none)

    @torch.enable_grad()
    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        with nullcontext() if self.training else self.sampled_params(train=True):
            return closure()

    def _update(self, learning: set[Tensor]) -> None:
        several = self._samples.count > 1
        if self._averaging and not several:
            self._averaging.fill(learning, self.state)
            several = True
        for work in self._works(learning):
            work.update(self, several)
        for p in learning if several else ():
            del self.state[p]["product"]
        self._looked = 0
        for group in self.param_groups:
            group["step"] += self._taken
        if self._at is not None:
            for work in self._works(self._held - learning):
                work.place(self, fresh=False)
        _distributed.drop_copies(self._held)

    def _add(self, parameters: list[Tensor], number: int, weight: float) -> None:
        """Note what a sample says about curvature by the gradients that parameters hold now."""
        if self._averaging:
            return self._averaging.add(parameters, self.state, weight)
        with self._drawn.again(self.param_groups):
            for work in self._works(parameters):
                work.add(self, number, weight)

    def _learned(self, number: int) -> None:
        """The gradients of the sample that is held are there."""
        if self._averaging:
            self._averaging.check(self._held)
        else:
            ordered = (p for group in self.param_groups for p in group["params"])
            self._agreement.note(number, (p for p in ordered if p in self._held))

    def _forget(self) -> None:
        """Forget the samples since the last step."""
        self._samples.clear()
        if self._averaging:
            self._averaging.clear()

    def _finite(self, learning: set[Tensor]) -> bool:
        """Whether all gradients are finite; if not, says so once."""
        ok = _state.finite(chain.from_iterable(w.signs() for w in self._works(learning)))
        ok = _state.agreed(ok, learning)
        if not (ok or self._warned):
            warnings.warn(_state.NOT_FINITE, RuntimeWarning, stacklevel=7)
        self._warned |= not ok
        return ok

    # ---- groups, saving and loading -----------------------------------------------------------

    @torch.inference_mode(False)
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
            self._watch.end(self._held)
            self._drawn.add(group)
            self._held.update(own)
            self._place(own)
            self._watch.begin(self._held)

    def state_dict(self) -> dict[str, Any]:
        """State and options. At rest the mean is the parameter itself and is not saved twice.

        Save at rest, before `train()`, after `eval()` or inside of `mean_params()`: then the model
        that is saved is the mean. What is saved with a sample has the mean in here. Both continue
        bit by bit, on any number of processes with `torch.distributed.checkpoint`:

            with optimizer.mean_params():
                model_state, optimizer_state = get_state_dict(model, optimizer)
                dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
        """
        own = list(enumerate(p for group in self.param_groups for p in group["params"]))
        spare = {(name, i) for i, _ in own for name in self._transient}
        if self._at is None:
            spare |= {("mean", i) for i, p in own if not self._apart(p.dtype)}
        for _, p in own if self._at is not None else ():
            if p not in self._held and "mean" in self.state.get(p, {}) and not self._apart(p.dtype):
                local(self.state[p]["mean"]).copy_(local(p.detach()))  # where a sample was aside
        return _state.saved(super().state_dict(), spare, self._at is not None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, bit by bit. The model loads its own parameters.

        What was saved at rest is at rest: call `train()` again if that is how you train. With
        `torch.distributed.checkpoint`, from any number of processes, into an optimizer at rest:

            model_state, optimizer_state = get_state_dict(model, optimizer)
            dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
            set_state_dict(model, optimizer,
                model_state_dict=model_state, optim_state_dict=optimizer_state)

        Raises:
            RuntimeError: If it is called inside of a context.
            ValueError: If the saved model holds a sample and the means are missing, or if this is
                the state of another kind of optimizer.
        """
        self._outside("load_state_dict()")
        state_dict = _state.loaded(state_dict)
        with _state.loading(self) as hooked:
            super().load_state_dict(state_dict)
        _state.reload(self, hooked[-1])
        self._forget()
        self._plans.clear()
        self._looked, self._aside = 0, None
        self._at = (TRAINING, 0) if self.training else None
        own = [(group, p) for group in self.param_groups for p in group["params"]]
        self._held = {p for _, p in own if self.training and "mean" in self.state.get(p, {})}
        self._drawn = Drawn(self.param_groups)
        for group, p in own:
            if p in self.state:
                self._ready(group, p)
        self._resume()

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy take along."""
        ours = ("_at", "_aside", "_open", "_looked", "_warned", "_samples", "_held", "_drawn")
        return super().__getstate__() | {name: getattr(self, name) for name in ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What is derived is derived again."""
        super().__setstate__(state)
        self._plans, self._watch = {}, Watch()
        if "_agreement" not in self.__dict__:  # a copy, and not a loaded state
            self._agreement = Agreement()
        self._index = _pieces.index(group["params"] for group in self.param_groups)
        self._resume()

    # ---- bookkeeping --------------------------------------------------------------------------

    def _name(self, group: dict[str, Any], at: tuple[int, int], ahead: int = 0) -> tuple[int, ...]:
        own = self._rank > 0 and at[0] == TRAINING
        return super()._name(group, at, ahead) + ((self._rank,) if own else ())

    def _resume(self) -> None:
        """Know again what holds a sample, after loading."""
        self._placed = list(self._works(self._held)) if self._at is not None else []
        for work in self._placed:
            work.held = True

    def _outside(self, what: str) -> None:
        if self._open:
            where = "inside sampled_params() or mean_params()"
            raise RuntimeError(f"{what} was called {where}; leave the context first")

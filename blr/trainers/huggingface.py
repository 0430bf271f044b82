"""Hugging Face Trainer and Accelerate: train on samples, evaluate and save the mean.

    optimizer = blr.IVON(model.parameters(), lr=0.1, ess=number_of_tokens)
    Trainer(model, args, optimizers=(optimizer, None), callbacks=[PosteriorCallback()], …).train()

`Trainer` calls `optimizer.train()` before each forward pass and `optimizer.eval()` before each
evaluation, so an optimizer with a posterior trains on samples, one for all micro-batches of a step,
and is evaluated at the mean. What is left for a callback is that whatever else looks at the model
between steps, and whatever saves it, finds the mean: without it, a checkpoint that no evaluation
precedes has a sample for its weights. Training resumes from the trainer's own checkpoint, bit by
bit.

With Accelerate alone, call `optimizer.train()` before each forward pass and `save_mean` once.
"""

from __future__ import annotations

from typing import Any

from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from blr.optim._base import PosteriorOptimizer

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "blr.trainers.huggingface needs transformers and accelerate; "
        "pip install 'bayesian-learning-rule[huggingface]'"
    ) from error


class PosteriorCallback(TrainerCallback):
    """Between the steps of a `Trainer` the model is the mean, and only the mean is saved.

    Pass the optimizer as `Trainer(optimizers=(optimizer, scheduler))`, or its class and options as
    `optimizer_cls_and_kwargs`. The loss of a language model is a mean over tokens, and `ess` their
    number.

    Raises:
        TypeError: At the start of training, if the optimizer has no posterior.
    """

    def __init__(self) -> None:
        self._saving: RemovableHandle | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Module, optimizer: Any, **others: Any
    ) -> None:
        """Whatever saves the model from now on saves the mean, also after an interrupt."""
        if self._saving is not None:
            self._saving.remove()
        self._saving = save_mean(model, optimizer)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, *, optimizer: Any, **others: Any
    ) -> None:
        """Logging, evaluation, saving and other callbacks find the mean."""
        optimizer.eval()

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, *, optimizer: Any, **others: Any
    ) -> None:
        """The mean again, should training stop between the micro-batches of a step."""
        optimizer.eval()

    def on_train_end(
        self, args: Any, state: Any, control: Any, *, optimizer: Any, **others: Any
    ) -> None:
        """The model is left at the mean, without a trace of the callback."""
        optimizer.eval()
        if self._saving is not None:
            self._saving.remove()
            self._saving = None


def save_mean(model: Module, optimizer: Any) -> RemovableHandle:
    """Let `model.state_dict()`, from which everything is saved, be that of the mean.

    The optimizer stays at the mean afterwards, until `optimizer.train()` is called; a step that
    should have been preceded by it says so.

    Args:
        model: The model; one that is wrapped, such as by DDP, may be given with its wrapper or
            without.
        optimizer: An optimizer with a posterior, or Accelerate's wrapper of one.

    Returns:
        A handle, whose `remove()` ends it.

    Raises:
        TypeError: If the optimizer has no posterior.
    """
    return model.register_state_dict_pre_hook(_Mean(_unwrapped(optimizer)))


class _Mean:
    """A hook of `state_dict`. Copies of the model are not those that the optimizer trains."""

    def __init__(self, optimizer: PosteriorOptimizer | None = None) -> None:
        self._optimizer = optimizer

    def __call__(self, module: Module, prefix: str, keep_vars: bool) -> None:
        if self._optimizer is not None and self._optimizer.training:
            self._optimizer.eval()

    def __reduce__(self) -> tuple[type[_Mean], tuple[()]]:
        return _Mean, ()


def _unwrapped(optimizer: Any) -> PosteriorOptimizer:
    """The optimizer inside of wrappers."""
    inner = optimizer
    while not isinstance(inner, PosteriorOptimizer):
        if not hasattr(inner, "optimizer"):
            raise TypeError(
                f"optimizer must have a posterior, got {type(inner).__name__}; "
                "pass one such as blr.IVON to the Trainer, or leave the callback out"
            )
        inner = inner.optimizer
    return inner

"""Lightning: train on samples, validate, test and save at the mean.

    Trainer(callbacks=[PosteriorCallback()]).fit(model, loader)    # configure_optimizers: blr.IVON

Lightning hands `optimizer.step` a closure that computes the gradients, but not always: while
gradients accumulate it runs the closure alone, and with a loss scaler it runs the closure before
the step. So samples are not a matter of the closure. The callback holds one from the start of a
batch, the same for all batches that accumulate, to its end, where checkpoints and validations find
the mean. Training resumes from Lightning's own checkpoint, bit by bit.
"""

from __future__ import annotations

from typing import Any

from blr.optim._base import PosteriorOptimizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "blr.trainers.lightning needs Lightning; pip install 'bayesian-learning-rule[lightning]'"
    ) from error


class PosteriorCallback(Callback):
    """The model is a sample while it sees a batch of training data, and the mean otherwise.

    Return the optimizer from `configure_optimizers`, as any other. Several optimizers, and both
    automatic and manual optimization, may be used. Callbacks that look at weights when a batch ends
    come after this one in the list.

    Raises:
        TypeError: At the start of training, if no optimizer has a posterior.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers without a posterior."""
        if not _posteriors(trainer):
            names = ", ".join(type(o).__name__ for o in trainer.optimizers) or "none"
            raise TypeError(
                f"configure_optimizers must return an optimizer with a posterior, got {names}; "
                "return one such as blr.IVON, or leave the callback out"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hold a sample; while gradients accumulate, the same again."""
        for optimizer in _posteriors(trainer):
            optimizer.train()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Hold the mean, which is what Lightning validates and saves."""
        for optimizer in _posteriors(trainer):
            optimizer.eval()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Hold the mean, which may be saved now."""
        for optimizer in _posteriors(trainer):
            optimizer.eval()


def _posteriors(trainer: Trainer) -> list[PosteriorOptimizer]:
    return [o for o in trainer.optimizers if isinstance(o, PosteriorOptimizer)]

"""Image classification with IVON, AdamW or SGD: accuracy, calibration, and the unfamiliar.

    python experiments/images.py --preset cifar10-resnet20 --data DIRECTORY --optimizer ivon
    torchrun --nproc_per_node=8 experiments/images.py --preset cifar10-resnet18 --data DIRECTORY

Settings of IVON and SGD are those of Shen et al. (2024), Variational learning is effective for
large deep networks, and of their public experiments. What is evaluated is the mean of the
posterior, and the probabilities averaged over samples of it.

BatchNorm's running statistics are no parameters and have no posterior. Those stored were averaged
over the last steps, at samples; they suit the averaged prediction and, less well, the mean.
`--statistics B` estimates them anew from B training batches, at the mean and at every sample.
`--norm filter` has none: filter response normalisation looks at one image at a time, and is the
choice where many processes must give the result of one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from _common import (
    Processes,
    processes,
    provenance,
    save_checkpoint,
    set_lr,
    warmup_cosine,
    write_json,
)
from _image_data import Images, augment, epoch_batches, read
from _networks import DEPTHS, NORMS, ResNet
from _training import (
    Clock,
    about_model,
    common_options,
    fingerprint,
    finite,
    learn,
    looks,
    optimizer,
    parse,
    peak_memory,
    resumed,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from blr import metrics

BINS = 20
"""Bins of the calibration error, as in the code of the paper."""

_SHARED = {
    "all": dict(
        epochs=200, batch=50, warmup_epochs=5, padding=4, mirror=True, norm="batch", samples=64,
        eval_every=10, precision="float32", train_samples=1, data=None, statistics=0,
    ),
    "ivon": dict(
        lr=0.2, ess=50_000, hess_init=0.5, betas=(0.9, 0.99999), weight_decay=2e-4,
        clip_radius=float("inf"),
    ),
    "sgd": dict(lr=0.1, weight_decay=2e-4),
    "adamw": dict(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1),
}  # fmt: skip


def _preset(network: str, ess: float = 50_000, **options: Any) -> dict[str, dict[str, Any]]:
    ivon = _SHARED["ivon"] | {"ess": ess}
    return _SHARED | {"all": _SHARED["all"] | {"network": network} | options, "ivon": ivon}


_CLOTHES = dict(data="fashion_mnist", epochs=30, warmup_epochs=1, eval_every=5, padding=2)
PRESETS = {
    "cifar10-resnet20": _preset("resnet20"),
    "cifar10-resnet18": _preset("resnet18"),
    "cifar100-resnet20": _preset("resnet20"),
    "cifar100-resnet18": _preset("resnet18"),
    "tinyimagenet-resnet18": _preset("resnet18", ess=200_000),
    "fashionmnist-resnet20": _preset("resnet20", ess=60_000, **_CLOTHES),
    "mnist-resnet20": _preset("resnet20", ess=60_000, **_CLOTHES | dict(data=None, mirror=False)),
}
SMOKE = dict(
    data="digits", network="resnet8", norm="filter", epochs=3, batch=60, warmup_epochs=0,
    padding=1, mirror=False, ess=0, samples=4, eval_every=1,
)  # fmt: skip


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for, completed by the preset."""
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    add = parser.add_argument
    add("--data", help="directory with the images, or `fashion_mnist`, or `digits`")
    add("--ood", help="directory with unfamiliar images of the same shape: their test part")
    add("--network", choices=list(DEPTHS))
    add("--norm", choices=list(NORMS), help="batch, or filter response normalisation")
    add("--epochs", type=int)
    add("--batch", type=int, help="images of a step, over all processes")
    add("--warmup-epochs", type=float)
    add("--padding", type=int, help="pixels by which training images are shifted at most")
    add("--mirror", action=argparse.BooleanOptionalAction, help="mirror half of them")
    add("--train-samples", type=int, help="IVON: samples of a step, on the same batch")
    add("--statistics", type=int, help="training batches for BatchNorm at evaluation; 0: stored")
    add("--examples", type=int, help="use only the first of the training and of the test images")
    add("--eval-every", type=int, help="epochs between evaluations")
    add("--eval-batch", type=int, default=500)
    common_options(parser, PRESETS)
    o = parse(parser, PRESETS, SMOKE, argv)
    if o.data is None:
        parser.error(f"--preset {o.preset} needs --data with the directory of its images")
    return o


@dataclass(frozen=True, eq=False)
class Run:
    """What a run consists of."""

    o: argparse.Namespace
    here: Processes
    images: Images
    strange: Tensor | None
    model: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, o: argparse.Namespace, here: Processes) -> Run:
        """Data, model and optimizer; the initial weights depend on the seed only."""
        images = read(o.data).first(o.examples)
        strange = None if o.ood is None else read(o.ood).test_x[: o.examples]
        if strange is not None and strange.shape[1:] != images.x.shape[1:]:
            raise ValueError(
                f"--ood must have images of shape {tuple(images.x.shape[1:])}, got "
                f"{tuple(strange.shape[1:])}; pass another directory"
            )
        o.ess = o.ess or float(len(images.x))
        torch.manual_seed(o.seed)
        model = ResNet(o.network, o.norm, images.x.shape[1], images.classes).to(here.device)
        if o.compile:
            model.compile()
        forward = here.parallel(model)
        strange = None if strange is None else strange.to(here.device)
        found = images.to(here.device)
        best = optimizer(model, o, decay_vectors=True)
        return cls(o, here, found, strange, model, forward, best)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.images.x) // self.o.batch

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""
        low = self.o.precision == "bfloat16"
        return torch.autocast(self.here.device.type, torch.bfloat16, enabled=low)


# ---- training -----------------------------------------------------------------------------------


def train_epoch(run: Run, epoch: int) -> dict[str, float]:
    """One pass over the training images."""
    o, here = run.o, run.here
    here.share("--batch", o.batch)
    x, y = run.images.x, run.images.y
    mean, deviation = run.images.scaling()
    batches = epoch_batches(len(x), o.batch, o.padding, o.mirror, o.seed, epoch)
    bar = tqdm(batches, f"epoch {epoch + 1}", run.steps, False, disable=o.quiet or not here.first)
    total = torch.zeros((), device=here.device)
    clock = Clock(here.device)
    run.model.train()
    for step, batch in enumerate(bar, epoch * run.steps):
        warmup = int(o.warmup_epochs * run.steps)
        set_lr(run.optimizer, o.lr * warmup_cosine(step, o.epochs * run.steps, warmup))
        chosen, shift, flip = (part[here.rank :: here.size].to(here.device) for part in batch)
        inputs = (augment(x[chosen], shift, flip, o.padding) - mean) / deviation
        targets = y[chosen]

        def loss(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            with run.autocast():
                return cross_entropy(run.forward(inputs).float(), targets)

        total += learn(run.optimizer, run.forward, [loss] * o.train_samples)
        clock.tick()
        if step % 50 == 0 and not bar.disable:
            bar.set_postfix(loss=f"{total.item() / (step - epoch * run.steps + 1):.3f}")
    times = clock.per_step()
    loss_now = here.total(total).item() / (here.size * run.steps)
    finite(loss_now, f"epoch {epoch + 1}")
    return {"train_loss": loss_now} | times


def train(o: argparse.Namespace, here: Processes) -> dict[str, Any]:
    """The whole run, from its checkpoint if it resumes; returns what is written as JSON."""
    run = Run.of(o, here)
    about = provenance(o)
    saved = resumed(o, about["options"])
    start, history = 0, []
    if saved is not None:
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        start, history = saved["epoch"], saved["history"]
    for epoch in range(start, o.epochs):
        row = {"epoch": epoch + 1} | train_epoch(run, epoch)
        here.agree(run.model)
        if (epoch + 1) % o.eval_every == 0 or epoch + 1 == o.epochs:
            row |= evaluate(run)
        history.append(row)
        if here.first:
            state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
            state |= {"epoch": epoch + 1, "history": history, "options": about["options"]}
            save_checkpoint(o.checkpoint, state)
            write_json(o.out, about | report(run, history))
    return about | report(run, history)


def report(run: Run, history: list[dict[str, Any]]) -> dict[str, Any]:
    """What is known so far; `complete` says whether the run is at its end."""
    images, complete = run.images, len(history) == run.o.epochs
    return {
        "experiment": "images",
        "complete": complete,
        "model": about_model(run.model),
        "data": {
            "kind": images.kind,
            "train": len(images.x),
            "test": len(images.test_x),
            "shape": list(images.x.shape[1:]),
            "classes": images.classes,
        },
        "steps_per_epoch": run.steps,
        "bins_of_ece": BINS,
        "history": history,
        "final": {n: history[-1][n] for n in ("mean", "averaged") if n in history[-1]},
        "peak_memory_bytes": peak_memory(run.here.device),
        "sha256": fingerprint(run.model) if complete else None,
    }


# ---- evaluation ---------------------------------------------------------------------------------


def evaluate(run: Run) -> dict[str, dict[str, float]]:
    """Scores on the test images at the mean and, with a posterior, averaged over samples."""
    return {name: scores(run, where) for name, where in looks(run.optimizer, run.o.samples).items()}


def scores(run: Run, where: list[Callable[[], AbstractContextManager[Any]]]) -> dict[str, float]:
    """Proper scores, calibration, and how well the unfamiliar is told from the familiar."""
    parts = [run.images.test_x] if run.strange is None else [run.images.test_x, run.strange]
    p, *strange = probabilities(run, parts, where)
    y = run.images.test_y.cpu()
    found = {
        "accuracy": metrics.accuracy(p, y),
        "nll": metrics.nll(p, y),
        "ece": metrics.ece(p, y, num_bins=BINS),
        "brier": metrics.brier(p, y),
    }
    for out in strange:
        found["auroc_confidence"] = metrics.auroc(metrics.confidence(p), metrics.confidence(out))
        found["auroc_entropy"] = metrics.auroc(-metrics.entropy(p), -metrics.entropy(out))
    return found


@torch.no_grad()
def probabilities(
    run: Run, parts: list[Tensor], where: list[Callable[[], AbstractContextManager[Any]]]
) -> list[Tensor]:
    """Probabilities averaged over places, of shape (N, K) for each part, on the CPU.

    Each sample is drawn once for all images, and each process goes through its own.
    """
    o, here = run.o, run.here
    mean, deviation = run.images.scaling()
    totals = [torch.zeros(len(x), run.images.classes, dtype=torch.float64) for x in parts]
    run.model.eval()
    for context in where:
        with context(), refreshed(run, mean, deviation):
            for x, total in zip(parts, totals, strict=True):
                for own in torch.arange(here.rank, len(x), here.size).split(o.eval_batch):
                    with run.autocast():
                        f = run.model((x[own.to(x.device)] - mean) / deviation)
                    total[own] += f.float().softmax(-1).cpu().double()
    return [here.total(t.to(here.device)).cpu() / len(where) for t in totals]


@contextmanager
def refreshed(run: Run, mean: Tensor, deviation: Tensor) -> Iterator[None]:
    """BatchNorm's statistics estimated at the parameters held now; afterwards the stored ones."""
    o, x = run.o, run.images.x
    norms = [m for m in run.model.modules() if isinstance(m, nn.BatchNorm2d)]
    if not (o.statistics and norms):
        yield
        return
    stored = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    momenta = [m.momentum for m in norms]
    try:
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # the plain average over the batches
            m.train()
        batches = epoch_batches(len(x), o.batch, o.padding, o.mirror, o.seed, 0)
        for _, (chosen, shift, flip) in zip(range(o.statistics), batches, strict=False):
            chosen, shift, flip = (part.to(x.device) for part in (chosen, shift, flip))
            with run.autocast():
                run.model((augment(x[chosen], shift, flip, o.padding) - mean) / deviation)
        run.model.eval()
        yield
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
            m.eval()
        for name, buffer in run.model.named_buffers():
            buffer.copy_(stored[name])


def main(argv: Sequence[str] | None = None) -> None:
    """Run, and write the results."""
    o = options(argv)
    with processes(o.device) as here:
        result = train(o, here)
        if here.first:
            write_json(o.out, result)


if __name__ == "__main__":
    main()

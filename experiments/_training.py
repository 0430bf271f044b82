"""What trains a network here: options with presets, optimizers, one step of any, where to look.

IVON and the others meet in one loop: `learn` takes a step from one loss per sample, and `looks`
says at which parameters a model is evaluated.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from _common import load_checkpoint
from torch import Tensor, nn

import blr

Presets = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Options by preset; under "all" for every optimizer, and under the name of one for that one."""

SGD_MOMENTUM = 0.9
TIMES = "seconds_per_step", "cpu_seconds_per_step"
FREE = {"out", "checkpoint", "resume", "device", "compile", "quiet", "save_every", "cache"}
"""Options that a run may change when it resumes: they are no part of what is computed."""


def common_options(parser: argparse.ArgumentParser, presets: Presets) -> None:
    """Add the options that all experiments have; those without a default get the preset's."""
    add = parser.add_argument
    add("--preset", choices=list(presets), default=next(iter(presets)))
    add("--smoke", action="store_true", help="a size that runs in seconds, to see that all works")
    add("--optimizer", choices=list(OPTIMIZERS), default="ivon")
    add("--lr", type=float, help="learning rate after the warm-up")
    add("--weight-decay", type=float)
    add("--betas", type=float, nargs=2, help="decays of IVON and AdamW")
    add("--ess", type=float, help="IVON: effective number of examples or tokens; 0 counts them")
    add("--hess-init", type=float, help="IVON: h at the start")
    add("--clip-radius", type=float, help="IVON: largest step of a parameter in units of lr")
    add("--samples", type=int, help="IVON: samples that evaluation averages over")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("results.json"), help="where the results are written")
    add("--checkpoint", type=Path, help="beside --out if missing")
    add("--resume", action="store_true", help="go on from the checkpoint if there is one")
    add("--device", help="cpu, cuda, …; a GPU where there is one")
    add("--precision", choices=["float32", "bfloat16"], help="of autocast")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--deterministic", action="store_true", help="only algorithms that repeat bit by bit")
    add("--quiet", action="store_true", help="no progress bars")


def parse(
    parser: argparse.ArgumentParser,
    presets: Presets,
    smoke: Mapping[str, Any],
    argv: Sequence[str] | None = None,
) -> argparse.Namespace:
    """Options: what was given, else what the preset says, else the default."""
    given, _ = parser.parse_known_args(argv)
    preset = presets[given.preset]
    parser.set_defaults(**{**preset["all"], **preset.get(given.optimizer, {})})
    if given.smoke:
        parser.set_defaults(**smoke)
    options = parser.parse_args(argv)
    if options.checkpoint is None:
        options.checkpoint = options.out.with_suffix(".pt")
    if options.deterministic:
        torch.use_deterministic_algorithms(True)
    return options


# ---- optimizers ---------------------------------------------------------------------------------


def _ivon(groups: list[dict[str, Any]], o: argparse.Namespace) -> torch.optim.Optimizer:
    return blr.IVON(
        groups, lr=o.lr, ess=o.ess, hess_init=o.hess_init, betas=tuple(o.betas),
        weight_decay=o.weight_decay, clip_radius=o.clip_radius, seed=o.seed,
    )  # fmt: skip


def _adamw(groups: list[dict[str, Any]], o: argparse.Namespace) -> torch.optim.Optimizer:
    betas = tuple(o.betas)
    return torch.optim.AdamW(groups, o.lr, betas, weight_decay=o.weight_decay, fused=True)


def _sgd(groups: list[dict[str, Any]], o: argparse.Namespace) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, o.lr, SGD_MOMENTUM, weight_decay=o.weight_decay)


OPTIMIZERS = {"ivon": _ivon, "adamw": _adamw, "sgd": _sgd}


def optimizer(
    model: nn.Module, o: argparse.Namespace, *, decay_vectors: bool
) -> torch.optim.Optimizer:
    """The optimizer that the options name; `decay_vectors` says whether biases decay as well."""
    own = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": own}]
    if not decay_vectors:
        groups[0]["params"] = [p for p in own if p.ndim > 1]
        groups.append({"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0})
    return OPTIMIZERS[o.optimizer](groups, o)


def learn(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    losses: Sequence[Callable[[], Tensor]],
    clip: float | None = None,
) -> Tensor:
    """One step from mean losses, which are averaged: one sample of the posterior for each.

    Args:
        optimizer: With a posterior, each loss is computed at a sample of its own, and the gradient
            of each is clipped by itself; others average the gradients and clip that.
        model: Wrapped for data parallelism if there is any.
        losses: Functions that compute the mean loss of a micro-batch.
        clip: Largest norm of a gradient.

    Returns:
        The mean of the losses, without gradient.
    """
    values = []
    if isinstance(optimizer, blr.IVON):
        for loss in losses:
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                values.append(_backward(loss, 1))
                _clip(model, clip)
    else:
        optimizer.zero_grad()
        for k, loss in enumerate(losses):
            with _alone(model, k + 1 < len(losses)):
                values.append(_backward(loss, len(losses)))
        _clip(model, clip)
    optimizer.step()
    return torch.stack(values).mean()


def looks(
    optimizer: torch.optim.Optimizer, samples: int
) -> dict[str, list[Callable[[], AbstractContextManager[Any]]]]:
    """Where a model is evaluated: at the mean, and with a posterior averaged over samples."""
    where: dict[str, list[Callable[[], AbstractContextManager[Any]]]] = {"mean": [nullcontext]}
    if isinstance(optimizer, blr.IVON):
        where["averaged"] = [optimizer.sampled_params] * samples
    return where


def _backward(loss: Callable[[], Tensor], parts: int) -> Tensor:
    value = loss()
    (value / parts).backward()
    return value.detach()


def _clip(model: nn.Module, clip: float | None) -> None:
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)


def _alone(model: nn.Module, alone: bool) -> AbstractContextManager[Any]:
    """No exchange of gradients that will be added to before they are used."""
    parallel = isinstance(model, nn.parallel.DistributedDataParallel)
    return model.no_sync() if parallel and alone else nullcontext()


# ---- runs ---------------------------------------------------------------------------------------


def resumed(o: argparse.Namespace, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The checkpoint to go on from, if there is one and one is asked for.

    Raises:
        ValueError: If it belongs to a run with other options.
    """
    if not (o.resume and o.checkpoint.is_file()):
        return None
    saved = load_checkpoint(o.checkpoint)
    before = saved["options"]
    other = [n for n in options if n not in FREE and options[n] != before.get(n)]
    if other:
        changes = ", ".join(f"{n}: {before.get(n)!r} is now {options[n]!r}" for n in other)
        raise ValueError(
            f"{o.checkpoint} is of a run with other options ({changes}); "
            "pass the same options, or another --out"
        )
    return saved


class Clock:
    """Seconds per step: that have passed, and that this process has computed.

    On a machine with other work the first say little, and the second are the ones to compare.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.start()

    def start(self) -> None:
        """From here on."""
        self._steps, self._since = 0, self._now()

    def tick(self) -> None:
        """A step is done."""
        self._steps += 1

    def per_step(self) -> dict[str, float]:
        """Means over the steps since the start."""
        passed = (b - a for a, b in zip(self._since, self._now(), strict=True))
        return {name: x / max(1, self._steps) for name, x in zip(TIMES, passed, strict=True)}

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), time.process_time()


def finite(loss: float, when: str) -> None:
    """Stop a run that has diverged.

    Raises:
        RuntimeError: If the loss is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is {loss} in {when}; lower --lr, or raise --hess-init")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: equal for equal bits."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def about_model(model: nn.Module) -> dict[str, int]:
    """How large a model is."""
    return {"parameters": sum(p.numel() for p in model.parameters())}


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that were allocated on a GPU so far."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

"""IVON's work for the kernel: one launch for all tensors, with what changes from step to step.

What changes, such as the keys of the noise, is computed here in double precision as for eager torch
and sent along. For a step that a CUDA graph records, a small kernel computes it on the device, from
a number of the step that is there too; gradients that are not finite close a gate, and the step
does nothing and is not counted.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from struct import pack, unpack
from typing import Any

import torch
from torch import Tensor

from blr.optim import _noise
from blr.optim._equations import Equations
from blr.optim._gaussian import gathered
from blr.optim._pieces import Job, Piece, dense, local, sharded
from blr.optim._table import Batch, batches
from blr.optim._work import TRAINING, Work

DEVICES = {"cuda"}  # what the kernel is compiled for; the interpreter adds "cpu" in the tests
TYPES = torch.float32, torch.bfloat16, torch.float16
ROWS, WARPS = 2, 8  # blocks and warps of a program: four elements of each half for a thread


# ---- at the door --------------------------------------------------------------------------------


def check(group: dict[str, Any]) -> None:
    """Check what `fused` and `capturable` ask of a GPU.

    Raises:
        ValueError: If a step is to be recorded that the kernel cannot take.
        RuntimeError: If the kernel is asked for and cannot be compiled.
    """
    params, fused, capturable = group["params"], group["fused"], group["capturable"]
    there = [p for p in params if p.device.type in DEVICES]
    if capturable:
        _check_capturable(group)
    if (fused or capturable) and there and (missing := lacking()):
        name = "capturable" if capturable else "fused"
        raise RuntimeError(f"{name}=True on a GPU needs {missing}, or leave {name} out")


def _check_capturable(group: dict[str, Any]) -> None:
    if group["fused"] is False:
        raise ValueError("capturable=True needs the kernel, got fused=False; leave fused out")
    for p in filter(lambda p: p.requires_grad, group["params"]):
        if p.device.type not in DEVICES or p.dtype not in TYPES or sharded(p):
            what = f"{'a shard' if sharded(p) else 'a tensor'} of {p.dtype} on {p.device}"
            raise ValueError(
                "capturable=True is for whole parameters of float32, bfloat16 or float16 on a GPU, "
                f"got {what}; move the model before building the optimizer, or leave capturable out"
            )
        lr = group["lr"]
        if isinstance(lr, Tensor) and (lr.device, lr.dtype) != (p.device, torch.float32):
            raise ValueError(
                f"lr must be a float32 tensor on {p.device} if capturable=True, got {lr.dtype} on "
                f"{lr.device}; or pass a number, which the graph takes as a constant"
            )


@lru_cache
def lacking() -> str:
    """What must be installed before the kernel can be compiled; empty if nothing."""
    if find_spec("triton") is None:
        return "Triton, which is not installed; run: pip install triton"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler, and there is none; install gcc, or set CC"
    if not (header := Path(sysconfig.get_path("include"), "Python.h")).exists():
        return f"Python.h, which is not in {header.parent}; install python3-dev"
    return ""


def divide(jobs: list[Job]) -> tuple[list[Work], list[Job]]:
    """Work for the kernel, one for each device, and the jobs that are left.

    Raises:
        ValueError: If the parameters of a step that is to be recorded have moved to the CPU.
    """
    places: dict[torch.device, list[Job]] = {}
    left = []
    for job in jobs:
        if _fits(*job):
            places.setdefault(job[0].device, []).append(job)
            continue
        if job[1]["capturable"]:
            _check_capturable(job[1])
        left.append(job)
    return [Fused(tuple(some)) for some in places.values()], left


def _fits(b: Piece, group: dict[str, Any]) -> bool:
    """Whether the kernel takes a piece: of a type it knows, without gaps, on a GPU."""
    if group["fused"] is False or b.device.type not in DEVICES or b.dtype not in TYPES:
        return False
    return not lacking() and all(dense(local(p)) for p in b.parameters)


@lru_cache
def _kernels() -> Any:
    """Triton takes a while to import, and is not needed on a CPU."""
    from blr.optim import _triton

    return _triton


# ---- the work -----------------------------------------------------------------------------------


@dataclass
class Fused(Work):
    """All pieces on one device."""

    known: dict[bool, list[Batch]] = field(default_factory=dict)

    def place(self, opt: Equations, fresh: bool) -> None:
        """See `Work`. The mean is saved by the launch that needs its place, if it runs at all."""
        if fresh:
            for batch in self._batches(gradients=False):
                if batch.mark is None:
                    batch.mark = torch.zeros((), dtype=torch.int32, device=self.device)
            self.held = True
        self._run(opt, held=not fresh, sample=True)

    def rest(self, opt: Equations) -> None:
        """See `Work`."""
        if self.held:
            self._run(opt, held=True)
            for batch in self._batches(gradients=False):
                if batch.mark is not None:
                    batch.mark.zero_()
            self.held = False

    def update(self, opt: Equations, several: bool) -> None:
        """See `Work`."""
        held = opt._at is not None
        self._run(
            opt, held=held, update=True, several=several, sample=held, ahead=1, gate=gate(opt)
        )

    def add(self, opt: Equations, number: int, weight: float) -> None:
        """See `Work`."""
        held = opt._at is not None
        self._run(opt, held=held, add=True, number=number, weight=weight)

    def signs(self) -> Iterator[Tensor]:
        """See `Work`: one number for all gradients, 0 or NaN."""
        yield torch.where(taken([self]) > 0, 0.0, torch.nan)

    def check(self, ok: Tensor) -> None:
        """Set `ok` to 0 if a gradient is NaN or infinite."""
        for batch in self._batches(gradients=True):
            # The update that follows reads the same table; the GPU then need not wait for another.
            table = batch.prepare(_names(batch, update=True))
            with torch.cuda.device_of(table):
                _kernels().finite[(len(batch.chunks),)](
                    table, batch.chunks, ok, G=_type(batch.kind[1]), ROWS=ROWS,
                    num_warps=WARPS, enable_fp_fusion=True,
                )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.jobs[0][0].device

    def _run(
        self, opt: Equations, *, held: bool, update: bool = False, several: bool = False,
        add: bool = False, sample: bool = False, ahead: int = 0, number: int = 0,
        weight: float = 0.0, gate: Tensor | None = None,
    ) -> None:  # fmt: skip
        for batch in self._batches(gradients=update or add):
            P, G, prior = batch.kind
            names = _names(batch, update, add, several)
            table, _keep = batch.prepared(names) or batch.table(names)
            numbers, keys = _scalars(opt, batch, number, ahead)
            resting = held and not (update or add or sample)
            gate, mark = batch.mark if resting else gate, batch.mark
            with torch.cuda.device_of(table):
                _kernels().step[(len(batch.chunks),)](
                    table, batch.chunks, numbers, keys, keys if gate is None else gate,
                    keys if mark is None else mark, weight,
                    P=_type(P), G=_type(G), HELD=held, PRIOR=prior, UPDATE=update, SEVERAL=several,
                    ADD=add, SAMPLE=sample, GATED=gate is not None, ROWS=ROWS,
                    num_warps=WARPS, enable_fp_fusion=True,
                )  # fmt: skip

    def _batches(self, gradients: bool) -> list[Batch]:
        if gradients not in self.known:
            self.known[gradients] = batches(self.jobs, ROWS * _noise.BLOCK, gradients)
        return self.known[gradients]


def _names(
    batch: Batch, update: bool = False, add: bool = False, several: bool = False
) -> tuple[str, ...]:
    """What a launch reads or writes."""
    names = ["parameter", "mean", "hess"]
    names += ["gradient"] * (update or add) + ["momentum"] * update + ["product"] * (several or add)
    return *names, *(["prior_precision", "prior_shift"] * batch.kind[2])


def gate(opt: Equations) -> Tensor | None:
    """Where a recorded step finds whether its gradients were finite."""
    return opt._taken if isinstance(opt._taken, Tensor) else None


def _type(dtype: torch.dtype) -> Any:
    return getattr(_kernels().tl, str(dtype).removeprefix("torch."))


def taken(works: Iterable[Work]) -> Tensor:
    """1 if all gradients are finite and else 0, on the device.

    Raises:
        ValueError: If the parameters are on several devices.
    """
    fused = [work for work in works if isinstance(work, Fused)]
    if len({work.device for work in fused}) > 1:
        raise ValueError("capturable=True is for one GPU; make an optimizer for each of them")
    ok = torch.ones((), dtype=torch.int32, device=fused[0].device)
    for work in fused:
        work.check(ok)
    return ok


# ---- numbers ------------------------------------------------------------------------------------


def _scalars(opt: Any, batch: Batch, number: int, ahead: int) -> tuple[Tensor, Tensor]:
    """Options and keys of noise for each group: to learn from a sample, and to draw the next."""
    later = opt.defaults["capturable"]
    own = [numbers(group, batch.kind[2], later) for group, _ in batch.groups]
    options = batch.send("numbers", torch.tensor(own, dtype=torch.float32))
    if later:
        return _prepared(opt, batch, options, number, ahead)
    at, keys = opt._at or (TRAINING, 0), []
    for group, high in batch.groups:
        old = opt._name(group, (TRAINING, number))
        keys += [*_noise.key(*old, high), *_noise.key(*opt._name(group, at, ahead), high)]
    return options, batch.send("keys", torch.tensor(keys, dtype=torch.int32))


def numbers(group: dict[str, Any], prior: bool, later: bool) -> list[float]:
    """A row of numbers: options as the kernel multiplies with them; `prepare` corrects it later."""
    (b1, b2), delta, h0 = group["betas"], group["weight_decay"], group["hess_init"]
    scale, tilt = (h0 + delta * (not prior), float(prior)) if group["rescale_lr"] else (1.0, 0.0)
    lr = group["lr"]
    rate = 0.0 if isinstance(lr, Tensor) and later else float(lr)
    unbias = 1.0 if later else 1 / gathered(group)
    averages = [b1, 1 - b1, b2 - 1, 0.5 * (1 - b2) ** 2]
    return [delta, group["ess"], scale, tilt, *averages, group["clip_radius"], rate, unbias]


def _prepared(
    opt: Any, batch: Batch, options: Tensor, number: int, ahead: int
) -> tuple[Tensor, Tensor]:
    device = options.device
    for group, _ in batch.groups:
        if len(opt._name(group | {"step": 0}, (TRAINING, number))) != 4:
            raise RuntimeError("capturable=True is for noise that all ranks share; leave one out")
        if not isinstance(group["step"], Tensor):
            group["step"] = torch.tensor(group["step"], dtype=torch.int64, device=device)
    words = [word(group, high) for group, high in batch.groups]
    there = batch.send("words", torch.tensor(words))
    (stream, next_number), count = opt._at or (TRAINING, 0), len(batch.groups)
    keys = batch.send("keys", torch.zeros(count, 6, dtype=torch.int32))
    with torch.cuda.device_of(there):
        _kernels().prepare[(count,)](
            there, options, keys, number, stream, next_number, ahead,
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return options, keys


def word(group: dict[str, Any], high: int) -> list[int]:
    """A row of words: what `prepare` needs of a group."""
    lr = group["lr"].data_ptr() if isinstance(group["lr"], Tensor) else 0
    beta = unpack("<q", pack("<d", group["betas"][0]))[0]
    seed = (group["seed"] + (1 << 63)) % (1 << 64) - (1 << 63)
    return [group["step"].data_ptr(), lr, seed, high, beta, int(group["debias"])]

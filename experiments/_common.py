"""What the experiments share: processes, checkpoints, schedules, and results that say whence.

A script runs in one process, or in many through `torchrun`, on CPU or GPU. All random choices are
functions of the seed and of the place in the run, so a checkpoint needs no generator's state, and a
run that was killed continues as if it had not been.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

# ---- results ------------------------------------------------------------------------------------


def provenance(options: Any = None, *, seed: Any = None) -> dict[str, Any]:
    """Whence numbers come: command, commit, date, hardware, versions, seed, and all options.

    Args:
        options: A namespace or mapping of options, such as what `parse_args` returns.
        seed: Seed or seeds; that of the options if missing.
    """
    given = dict(vars(options) if isinstance(options, argparse.Namespace) else options or {})
    return {
        "command": _command(),
        "commit": _output("git", "describe", "--always", "--dirty", "--exclude=*") or "unknown",
        "date": datetime.date.today().isoformat(),
        "hardware": _hardware(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "cuda": torch.version.cuda,
        },
        "seed": given.get("seed") if seed is None else seed,
        "options": {name: _plain(value) for name, value in given.items()},
    }


def write_json(path: str | Path, result: Any) -> None:
    """Write a result whole or not at all: a reader never finds half a file.

    JSON has no NaN and no infinity: they become null and the string "inf".
    """
    text = json.dumps(_plain(result), indent=1, allow_nan=False)
    _replace(Path(path), lambda file: Path(file).write_text(text + "\n", encoding="utf-8"))


def _command() -> str:
    """The command line, with the program named from the top folder of the repository."""
    script = Path(sys.argv[0])
    shown = f"{script.parent.name}/{script.name}"
    processes = os.environ.get("WORLD_SIZE")
    program = f"torchrun --nproc_per_node={processes}" if processes else "python"
    return f"{program} {shlex.join([shown, *sys.argv[1:]])}"


def _hardware() -> dict[str, Any]:
    names = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _output(*command: str) -> str:
    """What a command prints, or nothing if it fails."""
    try:
        here = Path(__file__).parent
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _replace(path: Path, write: Callable[[str], Any]) -> None:
    """Write a file beside its place, then move it there at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# ---- processes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees it.

    Args:
        rank: Number of this one.
        size: Number W of all.
        device: Where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one writes files and draws progress bars."""
        return self.rank == 0

    def total(self, x: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def agree(self, model: nn.Module) -> None:
        """Give all the buffers of the first, such as BatchNorm's statistics."""
        for buffer in model.buffers() if self.size > 1 else ():
            dist.broadcast(buffer, 0)

    def tell(self, value: Any) -> Any:
        """What the first process says, on all."""
        said = [value]
        if self.size > 1:
            dist.broadcast_object_list(said, 0)
        return said[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over processes; with one process as it is."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def share(self, name: str, count: int) -> int:
        """This process's share of a count that all split evenly.

        Raises:
            ValueError: If it cannot be split evenly, for then averages would not be averages.
        """
        if count % self.size:
            raise ValueError(
                f"{name} must be a multiple of the number of processes, got {count} for "
                f"{self.size}; pass another {name} or start another number"
            )
        return count // self.size


@contextmanager
def processes(device: str | None = None) -> Iterator[Processes]:
    """The processes that `torchrun` started, or this one alone; left in order whatever happens.

    Args:
        device: "cpu", "cuda", "cuda:1", …; a GPU where there is one if missing.
    """
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "WORLD_SIZE" not in os.environ:
        yield Processes(0, 1, wanted)
        return
    if wanted.type == "cuda":
        wanted = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(wanted)
    dist.init_process_group("nccl" if wanted.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), wanted)
    finally:
        dist.destroy_process_group()


# ---- checkpoints, seeds, schedules --------------------------------------------------------------


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all, so that a kill at any time leaves one to go on."""
    _replace(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU; loading it into model and optimizer moves it where they are."""
    return torch.load(path, map_location="cpu", weights_only=True)


def generator(*place: int) -> torch.Generator:
    """Random numbers that belong to a place in the run, such as (seed, epoch)."""
    # Its length makes (1,) and (1, 0) different places.
    mixed = np.random.SeedSequence((len(place), *place)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) & (2**63 - 1))


def warmup_cosine(step: int, total: int, warmup: int = 0, final: float = 0.0) -> float:
    """Factor of the learning rate: linear to 1 in `warmup` steps, then a cosine down to `final`.

    Args:
        step: Steps taken before this one, from 0.
        total: Steps of the whole run.
        warmup: Steps of the linear part; the first of them has the factor 1/warmup.
        final: The factor that is reached after `total` steps.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def mean_and_error(values: list[float]) -> dict[str, float]:
    """The mean over seeds and its standard error; NaN for the error of one value."""
    x = np.asarray(values, dtype=np.float64)
    error = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return {"mean": float(x.mean()), "standard_error": float(error)}

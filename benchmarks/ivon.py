"""The cost of a step of IVON on the CPU: sampling, restoring and updating, against AdamW and peers.

    python benchmarks/ivon.py [--threads N] [--repeats R] [--layouts …] [--json FILE]

Each row of the table is one run in one process: all optimizers take turns on the same shapes and
gradients, so a busy machine hurts them alike; medians of the turns and the best of them are kept.
A step of IVON is a training sample, its restoration, and the update; of AdamW it is the update.
Memory is what a process grows by beyond parameters, gradients and what a first step loads once and
for all, such as a compiler. `ivon-opt` is the public package of the authors; at 10⁷ parameters much
of its time goes into page faults of fresh buffers, which the rows with a tuned allocator avoid.
The time to compile is that of the first step of a process, with nothing in the caches on disk, and
again with everything there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _machine import in_turn, provenance

import blr

# This file has the name of the public package; do not find it in its place.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]

Parameters = list[torch.nn.Parameter]
Step = Callable[[], None]
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}


def gpt(width: int, vocabulary: int) -> list[tuple[int, ...]]:
    """The 148 shapes of a GPT-2 with 12 layers."""
    d = width
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,)]
    block += [(d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(vocabulary, d), (128, d), *(12 * block), (d,), (d,)]


LAYOUTS: dict[str, list[tuple[int, ...]]] = {
    "flat 10^5": [(10**5,)],
    "148 tensors 10^5": gpt(24, 700),
    "flat 10^6": [(10**6,)],
    "flat 10^7": [(10**7,)],
    "148 tensors 10^7": gpt(192, 24_000),
}
LARGE = ("flat 10^7", "148 tensors 10^7")  # where memory is worth measuring


def parameters(layout: str) -> Parameters:
    """Parameters and gradients of a layout."""
    return with_gradients(LAYOUTS[layout])


def with_gradients(shapes: list[tuple[int, ...]]) -> Parameters:
    params = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    return params


def adamw(params: Parameters) -> Step:
    optimizer = torch.optim.AdamW(params, fused=True)
    return lambda: (optimizer.step(), None)[1]


def ours(params: Parameters, fused: bool = False) -> Step:
    optimizer = blr.IVON(params, lr=0.1, ess=1e6, fused=fused)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            pass
        optimizer.step()

    return step


def ours_training(params: Parameters, fused: bool = False) -> Step:
    optimizer = blr.IVON(params, lr=0.1, ess=1e6, fused=fused)
    optimizer.train()
    return lambda: (optimizer.step(), None)[1]


def official(params: Parameters) -> Step:
    import ivon

    optimizer = ivon.IVON(params, lr=0.1, ess=1e6)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            pass
        optimizer.step()

    return step


def noise(params: Parameters) -> Step:
    """The noise of one sample, by itself."""
    from blr.optim import _noise, _pieces

    size, window = sum(p.numel() for p in params), _pieces.WINDOW["cpu"]

    def step() -> None:
        for start in range(0, size, window):
            stop = min(size, start + window)
            _noise.normal(start, stop, (0, 0, 0, 0), torch.device("cpu"))

    return step


def compiled_noise(params: Parameters) -> Step:
    """The noise of one sample, by itself, in compiled code."""
    from blr.optim import _compiled

    size, window = sum(p.numel() for p in params), _compiled.WINDOW["cpu"]
    normal = torch.compile(_compiled.normal, dynamic=True)
    key = torch.arange(4, dtype=torch.int32)

    def step() -> None:
        for start in range(0, size, window):
            normal(min(size - start, window), key, 7)

    return step


OPTIMIZERS: dict[str, Callable[[Parameters], Step]] = {
    "AdamW fused": adamw,
    "ivon-opt": official,
    "blr.IVON": ours,
    "blr.IVON train()": ours_training,
    "blr.IVON compiled": lambda params: ours(params, True),
    "blr.IVON compiled train()": lambda params: ours_training(params, True),
}
NOISE: dict[str, Callable[[Parameters], Step]] = {
    "noise of one sample": noise,
    "noise of one sample, compiled": compiled_noise,
}


def times(layout: str, repeats: int) -> dict[str, Any]:
    """Nanoseconds per parameter and step: medians, and the best, of turns one after the other."""
    steps = {name: make(parameters(layout)) for name, make in (OPTIMIZERS | NOISE).items()}
    size = sum(torch.Size(shape).numel() for shape in LAYOUTS[layout])
    in_turn(2, **steps)  # what compiles or is allocated at first
    record = in_turn(repeats, **steps)
    kinds = {"median": statistics.median, "best": min}
    return {
        kind: {name: f(seconds) / size * 1e9 for name, seconds in record.items()}
        for kind, f in kinds.items()
    }


def ratios(median: dict[str, float]) -> dict[str, dict[str, float]]:
    """What the goals are about: fused AdamW, the public package, and the noise as a floor."""
    base, peer = median["AdamW fused"], median["ivon-opt"]
    mine = [name for name in OPTIMIZERS if name.startswith("blr")]
    floor = {name: median[list(NOISE)["compiled" in name]] for name in mine}
    return {
        "of AdamW fused": {name: round(x / base, 2) for name, x in median.items()},
        "times faster than ivon-opt": {name: round(peer / median[name], 2) for name in mine},
        "share of the noise": {name: round(floor[name] / median[name], 2) for name in mine},
    }


def memory(name: str, layout: str) -> float:
    """Bytes per parameter at the peak, beyond parameters and gradients; in a process of its own."""
    make, params = OPTIMIZERS[name], parameters(layout)
    warm = make(with_gradients([(40_000,), (50,)]))  # what a first step loads once and for all
    for _ in range(2):
        warm()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step = make(params)
    for _ in range(3):
        step()
    return (resident("VmHWM") - before) / sum(p.numel() for p in params)


def resident(field: str) -> int:
    """Bytes of memory in use, or at the peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1]) * 1024


def first_step(name: str) -> float:
    """Seconds of the first step of an optimizer."""
    step = OPTIMIZERS[name](parameters("flat 10^5"))
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def child(*arguments: str, **environment: str) -> Any:
    """Run this file with other arguments in a fresh process; returns what it prints as JSON."""
    command = [sys.executable, __file__, *arguments]
    env = os.environ | environment
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def table(layouts: list[str], shared: tuple[str, ...]) -> list[dict[str, Any]]:
    """Times of all layouts; the large ones also with an allocator that keeps what it has."""
    rows = []
    for layout in layouts:
        for tuned in (False, True) if "10^7" in layout else (False,):
            row = child("--times", layout, *shared, **(TUNED if tuned else {}))
            row |= ratios(row["median"])
            rows.append({"layout": layout, "tuned allocator": tuned, "ns per parameter": row})
            print(layout, "(tuned allocator)" if tuned else "", flush=True)
            for name, value in row["median"].items():
                faster = row["times faster than ivon-opt"].get(name)
                print(
                    f"  {name:30s}{value:8.2f} ns (best {row['best'][name]:.2f})"
                    f"{row['of AdamW fused'][name]:8.2f} x AdamW fused"
                    + (f"{faster:8.2f} x faster than ivon-opt" if faster else ""),
                    flush=True,
                )
    return rows


def compilation(shared: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Seconds of the first step, nothing and everything being in the caches on disk."""
    seconds: dict[str, dict[str, float]] = {}
    for name in (name for name in OPTIMIZERS if "compiled" in name):
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("empty", "full"):
                done = child("--first", name, *shared, TORCHINDUCTOR_CACHE_DIR=folder)
                seconds.setdefault(name, {})[f"{cache} cache"] = round(done["seconds"], 1)
        print(f"  {name:30s}", seconds[name], flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--times", help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--first", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.times:
        return print(json.dumps(times(options.times, options.repeats)))
    if options.memory:
        return print(json.dumps({"bytes": memory(*options.memory)}))
    if options.first:
        return print(json.dumps({"seconds": first_step(options.first)}))
    shared = ("--threads", str(options.threads), "--repeats", str(options.repeats))
    rows, peak = table(options.layouts, shared), {}
    for layout in (name for name in options.layouts if name in LARGE):
        print(layout, "peak bytes per parameter beyond parameters and gradients")
        peak[layout] = {}
        for name in OPTIMIZERS:
            found = child("--memory", name, layout, *shared)["bytes"]
            peak[layout][name] = round(found, 1)
            print(f"  {name:30s}{found:8.1f}", flush=True)
    print("seconds of the first step in a process")
    compiled = compilation(shared)
    if options.json:
        about = provenance() | {
            "command": " ".join(["python benchmarks/ivon.py", *sys.argv[1:]]),
            "ivon-opt": importlib.metadata.version("ivon-opt"),
        }
        result = about | {
            "repeats": options.repeats,
            "times": rows,
            "peak bytes per parameter": peak,
            "seconds of the first step": compiled,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

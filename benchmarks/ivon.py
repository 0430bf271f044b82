"""The cost of a step of IVON on the CPU: sampling, restoring and updating, against AdamW and peers.

    python benchmarks/ivon.py [--threads N] [--repeats R] [--json FILE]

Each row of the table is one run in one process: all optimizers take turns on the same shapes and
gradients, so a busy machine hurts them alike, and each time is the median over the turns. A step
of IVON is a training sample, its restoration, and the update; of AdamW it is the update. Memory is
the growth of the resident set of a fresh process, beyond parameters and gradients. `ivon-opt` is
the public package of the authors; at 10⁷ parameters much of its time goes into page faults of
fresh buffers, which the rows with a tuned allocator avoid.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import blr

# This file has the name of the public package; do not find it in its place.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]

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


def parameters(layout: str) -> list[torch.nn.Parameter]:
    """Parameters and gradients of a layout."""
    params = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in LAYOUTS[layout]]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    return params


def adamw(params: list[torch.nn.Parameter]) -> Step:
    optimizer = torch.optim.AdamW(params, fused=True)
    return lambda: (optimizer.step(), None)[1]


def ours(params: list[torch.nn.Parameter]) -> Step:
    optimizer = blr.IVON(params, lr=0.1, ess=1e6)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            pass
        optimizer.step()

    return step


def ours_training(params: list[torch.nn.Parameter]) -> Step:
    optimizer = blr.IVON(params, lr=0.1, ess=1e6)
    optimizer.train()
    return lambda: (optimizer.step(), None)[1]


def official(params: list[torch.nn.Parameter]) -> Step:
    import ivon

    optimizer = ivon.IVON(params, lr=0.1, ess=1e6)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            pass
        optimizer.step()

    return step


def noise(params: list[torch.nn.Parameter]) -> Step:
    """The noise of one sample, by itself."""
    from blr.optim import _noise

    size, window = sum(p.numel() for p in params), 1 << 17

    def step() -> None:
        for start in range(0, size, window):
            stop = min(size, start + window)
            _noise.normal(start, stop, (0, 0, 0, 0), torch.device("cpu"))

    return step


OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], Step]] = {
    "AdamW fused": adamw,
    "blr.IVON": ours,
    "blr.IVON train()": ours_training,
    "ivon-opt": official,
    "noise of one sample": noise,
}


def times(layout: str, repeats: int) -> dict[str, float]:
    """Nanoseconds per parameter and step: medians of turns taken one after the other."""
    steps = {name: make(parameters(layout)) for name, make in OPTIMIZERS.items()}
    size = sum(torch.Size(shape).numel() for shape in LAYOUTS[layout])
    record: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:
                record[name].append((time.perf_counter() - start) / size * 1e9)
    return {name: statistics.median(values) for name, values in record.items()}


def memory(name: str, layout: str) -> float:
    """Bytes per parameter at the peak, beyond parameters and gradients; in a process of its own."""
    make, params = OPTIMIZERS[name], parameters(layout)
    small = [torch.nn.Parameter(p.detach()[:1].clone()) for p in params[:1]]
    for p in small:
        p.grad = torch.zeros_like(p)
    make(small)()  # what a first step loads once and for all
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make(params)
    for _ in range(3):
        step()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return grown * 1024 / sum(p.numel() for p in params)


def child(*arguments: str, tuned: bool = False) -> dict[str, float]:
    """Run this file with other arguments in a fresh process; returns what it prints as JSON."""
    environment = os.environ | (TUNED if tuned else {})
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    here = Path(__file__).parent
    return subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--times", help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.times:
        return print(json.dumps(times(options.times, options.repeats)))
    if options.memory:
        return print(json.dumps({"bytes": memory(*options.memory)}))
    shared = ("--threads", str(options.threads), "--repeats", str(options.repeats))
    rows, largest = [], options.layouts[-1]
    for layout in options.layouts:
        for tuned in (False, True) if "10^7" in layout else (False,):
            row = child("--times", layout, *shared, tuned=tuned)
            rows.append({"layout": layout, "tuned": tuned, "ns per parameter": row})
            base, peer, mine = row["AdamW fused"], row["ivon-opt"], row["blr.IVON"]
            print(layout, "(tuned allocator)" if tuned else "", flush=True)
            for name, value in row.items():
                print(f"  {name:22s}{value:8.2f} ns  {value / base:6.1f} x AdamW fused")
            print(f"  {peer / mine:.1f} times faster than ivon-opt", flush=True)
    peak = {name: child("--memory", name, largest)["bytes"] for name in list(OPTIMIZERS)[:4]}
    print(largest, "peak bytes per parameter beyond parameters and gradients")
    for name, value in peak.items():
        print(f"  {name:22s}{value:8.1f}")
    if options.json:
        about = {
            "command": "python benchmarks/ivon.py " + " ".join(sys.argv[1:]),
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "threads": options.threads,
            "torch": torch.__version__,
        }
        result = about | {"times": rows, "peak bytes per parameter": {largest: peak}}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The cost of a step of IVON on a GPU: time, share of the bandwidth of a copy, and peak memory.

    python benchmarks/gpu.py [--repeats R] [--models …] [--json book/results/gpu.json]

Shapes are those of GPT-2 with 124 and 774 million parameters and of ResNet-50, gradients are random
and stay where they are. A step of IVON includes its sample. Each time is the median over steps that
are timed by events of the device, one by one, so the time of the CPU between launches counts where
the GPU waits for it; a recorded graph has none. AdamW is measured first and last: the difference is
what such a measurement is worth. Memory is the peak beyond parameters and gradients. Bandwidth is
the bytes that a step must move, over its time, as a share of what a copy of a large tensor moves.

Before anything is timed, the kernel is compared with plain torch on the same GPU, and a recorded
step with one that is not. Without a GPU this says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _machine
import torch

import blr

# A file here has the name of the public package; do not find it in its place.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]

Params = list[torch.nn.Parameter]
Step = Callable[[], Any]


def gpt2(layers: int, d: int) -> list[tuple[int, ...]]:
    """The shapes of a GPT-2, output tied to input."""
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,)]
    block += [(d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (1024, d), *(layers * block), (d,), (d,)]


def resnet50() -> list[tuple[int, ...]]:
    """The shapes of ResNet-50: convolutions, and two vectors for each normalisation."""
    shapes, width = [(64, 3, 7, 7), (64,), (64,)], 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * planes
            layers = [(planes, width, 1, 1), (planes, planes, 3, 3), (out, planes, 1, 1)]
            layers += [(out, width, 1, 1)] * (block == 0)
            shapes += [s for layer in layers for s in (layer, layer[:1], layer[:1])]
            width = out
    return [*shapes, (1000, 2048), (1000,)]


MODELS = {
    "GPT-2 124M": gpt2(12, 768),
    "GPT-2 774M": gpt2(36, 1280),
    "ResNet-50": resnet50(),
}


def parameters(shapes: list[tuple[int, ...]]) -> Params:
    """Parameters with gradients."""
    params = [torch.nn.Parameter(0.02 * torch.randn(s, device="cuda")) for s in shapes]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    return params


def ivon(params: Params, **options: Any) -> blr.IVON:
    return blr.IVON(params, lr=0.1, ess=1e6, **options)


def adamw(params: Params, **options: Any) -> Step:
    return torch.optim.AdamW(params, lr=1e-4, **options).step


def training(params: Params, **options: Any) -> Step:
    optimizer = ivon(params, **options)
    optimizer.train()
    return optimizer.step


def contexts(params: Params, **options: Any) -> Step:
    return _sampling(ivon(params, **options))


def official(params: Params) -> Step:
    import ivon as public

    return _sampling(public.IVON(params, lr=0.1, ess=1e6))


def launch(params: Params) -> Step:
    """Update and sample alone, without the check of gradients."""
    optimizer = ivon(params)
    optimizer.train()
    (work,) = optimizer._works(params)
    return lambda: work.update(optimizer, several=False)


def _sampling(optimizer: Any) -> Step:
    def step() -> None:
        with optimizer.sampled_params(train=True):
            pass
        optimizer.step()

    return step


def recorded(step: Step) -> Step:
    """A step as a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# What is measured, and the fewest bytes for a parameter that it can move in float32.
OPTIMIZERS: dict[str, tuple[Callable[[Params], Step], int | None]] = {
    "AdamW fused": (lambda p: adamw(p, fused=True), 28),
    "AdamW foreach": (lambda p: adamw(p, foreach=True), None),
    "AdamW fused, recorded": (lambda p: recorded(adamw(p, fused=True, capturable=True)), 28),
    "blr.IVON train()": (training, 36),
    "blr.IVON train(), launch alone": (launch, 32),
    "blr.IVON train(), recorded": (lambda p: recorded(training(p, capturable=True)), 36),
    "blr.IVON contexts": (contexts, 56),
    "blr.IVON train(), plain torch": (lambda p: training(p, fused=False), None),
    "ivon-opt": (official, None),
    "AdamW fused, again": (lambda p: adamw(p, fused=True), 28),
}


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second, read and written, of a copy of 2 GiB."""
    x = torch.empty(1 << 29, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / statistics.median(timed(lambda: y.copy_(x), repeats))


def timed(step: Step, repeats: int) -> list[float]:
    """Seconds of each step."""
    marks = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    for _ in range(5):
        step()
    for start, stop in marks:
        torch.cuda.synchronize()
        start.record()
        step()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in marks]


def measure(name: str, shapes: list[tuple[int, ...]], repeats: int, copy: float) -> dict[str, Any]:
    """One row of the table."""
    make, moved = OPTIMIZERS[name]
    size = sum(torch.Size(s).numel() for s in shapes)
    params = parameters(shapes)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(make(params), repeats)
    low, median, high = statistics.quantiles(seconds, n=4)
    row: dict[str, Any] = {
        "optimizer": name,
        "milliseconds": round(1e3 * median, 4),
        "quartiles": [round(1e3 * low, 4), round(1e3 * high, 4)],
        "peak bytes per parameter": round((torch.cuda.max_memory_allocated() - before) / size, 2),
    }
    if moved:
        row["bytes moved"] = moved
        row["share of copy"] = round(moved * size / median / copy, 3)
    return row


def agreement() -> dict[str, float]:
    """Largest difference of means, relative to their size, after some steps on this GPU.

    Raises:
        SystemExit: If the kernel does not compute what plain torch computes.
    """

    def run(graph: bool = False, **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        params = parameters([(7,), (300, 1001), (64, 3, 7, 7), (5, 1024)])
        optimizer = ivon(params, hess_init=0.1, betas=(0.9, 0.99), **options)
        optimizer.train()
        # A recording takes three steps before it and none itself.
        step, steps = (recorded(optimizer.step), 7) if graph else (optimizer.step, 10)
        for _ in range(steps):
            step()
        optimizer.eval()
        return torch.cat([p.detach().double().flatten() for p in params])

    plain = run(fused=False)
    results = {"kernel": run(), "capturable": run(capturable=True)}
    results["recorded"] = run(graph=True, capturable=True)
    worst = {k: float((x - plain).abs().max() / plain.abs().max()) for k, x in results.items()}
    if not all(difference < 1e-5 for difference in worst.values()):
        raise SystemExit(f"the kernel differs from plain torch on this GPU: {worst}")
    return worst


def provenance() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    command = ["git", "rev-parse", "--short", "HEAD"]
    here = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    about = {"commit": here.stdout.strip() or "not a checkout"}
    about["command"] = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])
    about["date"] = _machine.datetime.date.today().isoformat()
    about["machine"] = f"{properties.name}, {properties.total_memory >> 30} GiB"
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return about | {"versions": versions, "CUDA": torch.version.cuda}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py measures on a GPU and there is none here: nothing was measured")
        return
    torch.manual_seed(0)
    differences, copy = agreement(), copy_bandwidth(options.repeats)
    print(f"copy {copy / 1e12:.2f} TB/s; differences from plain torch {differences}")
    tables: dict[str, list[dict[str, Any]]] = {}
    for model in options.models:
        print(model, flush=True)
        for name in OPTIMIZERS:
            try:
                row = measure(name, MODELS[model], options.repeats, copy)
            except (ImportError, torch.cuda.OutOfMemoryError) as error:
                row = {"optimizer": name, "not measured": type(error).__name__}
            tables.setdefault(model, []).append(row)
            print("  ", json.dumps(row, ensure_ascii=False), flush=True)
            torch.cuda.empty_cache()
    result = provenance() | {"copy, bytes per second": round(copy)}
    result |= {"differences from plain torch": differences, "models": tables}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

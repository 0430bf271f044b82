"""What the benchmarks share: times taken in turn, and where they were taken."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch


def best_of(f: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls."""
    return min(in_turn(repeats, f=f)["f"])


def in_turn(repeats: int, **functions: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each call, one of each function in every round, so that all meet the same load."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, f in functions.items():
            start = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(slow: list[float], fast: list[float]) -> dict[str, Any]:
    """Median and quartiles of the ratios of the rounds, and the ratio of the best times."""
    low, median, high = statistics.quantiles((a / b for a, b in zip(slow, fast, strict=True)), n=4)
    return {
        "median": round(median, 2),
        "quartiles": [round(low, 2), round(high, 2)],
        "of_best_times": round(min(slow) / min(fast), 2),
    }


def provenance(*modules: Any) -> dict[str, Any]:
    """Commit, date, machine and versions."""
    return {
        "command": "make benchmark",
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads",
        "versions": {m.__name__: m.__version__ for m in (torch, *modules)},
    }


def report(doc: str | None, measure: Callable[[], dict[str, Any]]) -> None:
    """Run `measure`, and print its results or, with --json, write them too."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--json", help="file to write the results to")
    args = parser.parse_args()
    text = json.dumps(measure(), indent=2)
    print(text)
    if args.json:
        with open(args.json, "w") as file:
            file.write(text + "\n")


def output(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    """The name of the processor."""
    with open("/proc/cpuinfo") as info:
        names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return names[0] if names else platform.machine()

"""One table from the results of several runs: optimizers in rows, means and errors over seeds.

    python experiments/compare.py runs/*.json --out book/results/NAME.json

Runs must be complete and alike in all but optimizer, its settings, and seed. The time of a step is
the median over the parts of a run between evaluations, without the first, which warms up; ratios
are to `--base`. Where other work went on beside the runs, only the CPU seconds say anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _common import mean_and_error, provenance, write_json
from _training import TIMES

SETTINGS = {
    "optimizer", "lr", "weight_decay", "betas", "ess", "hess_init", "clip_radius", "samples",
    "train_samples", "final_lr", "seed",
}  # fmt: skip
"""Options in which compared runs may differ."""
PLACES = {"out", "checkpoint", "cache", "resume", "quiet", "save_every", "compile", "device"}
"""Options that are no part of what was computed."""


def table(runs: Sequence[Mapping[str, Any]], base: str) -> dict[str, Any]:
    """The rows, by optimizer and by where the model was evaluated.

    Raises:
        ValueError: If a run is incomplete, two runs are not alike, or a seed occurs twice.
    """
    _check(runs)
    names = sorted({run["options"]["optimizer"] for run in runs}, key=lambda n: (n != base, n))
    if base not in names:
        raise ValueError(f"--base must be one of {', '.join(names)}, got {base}")
    rows, times = {}, {}
    for name in names:
        own = [run for run in runs if run["options"]["optimizer"] == name]
        for place in own[0]["final"]:
            finals = [run["final"][place] for run in own]
            scores = {s: mean_and_error([final[s] for final in finals]) for s in finals[0]}
            rows[f"{name}, {place}"] = scores
        times[name] = {kind: _seconds(own, kind) for kind in TIMES}
    ratios = {n: {k: x / times[base][k] for k, x in own.items()} for n, own in times.items()}
    return {"rows": rows, "times": times, f"times_relative_to_{base}": ratios}


def _seconds(runs: Iterable[Mapping[str, Any]], kind: str) -> float:
    """The median of a time over the parts of some runs, without the first part of each."""
    return statistics.median(
        row[kind] for run in runs for row in run["history"][1:] or run["history"]
    )


def _check(runs: Sequence[Mapping[str, Any]]) -> None:
    first = _alike(runs[0])
    seen = set()
    for run in runs:
        options = run["options"]
        who = f"the run of {options['optimizer']} with seed {options['seed']}"
        if not run["complete"]:
            raise ValueError(f"{who} is not complete; resume it with --resume")
        other = [n for n, value in _alike(run).items() if value != first.get(n)]
        if other:
            raise ValueError(f"{who} differs in {', '.join(sorted(other))}; compare like with like")
        if (options["optimizer"], options["seed"]) in seen:
            raise ValueError(f"{who} is there twice; pass each run once")
        seen.add((options["optimizer"], options["seed"]))


def _alike(run: Mapping[str, Any]) -> dict[str, Any]:
    skipped = SETTINGS | PLACES
    return {n: value for n, value in run["options"].items() if n not in skipped}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, and write their table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="results of images.py or language.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="adamw", help="the optimizer that times are relative to")
    parser.add_argument("--note", help="what a reader must know, such as what else ran")
    o = parser.parse_args(argv)
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in o.runs]
    seeds = sorted({run["options"]["seed"] for run in runs})
    about = provenance(seed=seeds)
    del about["options"]
    result = about | {"note": o.note, **table(runs, o.base), "runs": runs}
    write_json(o.out, result)


if __name__ == "__main__":
    main()

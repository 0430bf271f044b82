"""Does averaging over a posterior calibrate a network? AdamW, SGD and IVON at equal epochs.

    python experiments/calibration.py            # some two hours on one core
    python experiments/calibration.py --quick --work DIR --out FILE     # seconds: does it run?

Each optimizer gets the same number of configurations, six learning rates times six ways of holding
back, and keeps the one with the lowest log loss on a validation set, with seed 0. It is then
trained anew with other seeds, and these runs are tested. A seed stands for a split of the images,
initial weights, their order, and noise. IVON is read twice, at the mean and averaged over samples,
each with its own choice. Long trainings are run as they were chosen for the short one, and again
with the way of holding back chosen for the long one. What a run has found is kept in the folder
`--work`, so a second call goes on where the first one ended.

The tasks are FashionMNIST, five thousand images of it and a small convolutional network, and the
digits of 8×8 pixels with a network of two hidden layers: clean, with a fifth of the labels random,
with 200 examples, and without the images of eights and nines.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from _calibration import Task, make_tasks, shortened
from _common import generator, mean_and_error, provenance, set_lr, warmup_cosine, write_json
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F

import blr
from blr import metrics

BINS = 15
METHODS = {  # name: optimizer, way of reading it
    "AdamW": ("adamw", "mean"),
    "SGD": ("sgd", "mean"),
    "IVON, mean": ("ivon", "mean"),
    "IVON, averaged": ("ivon", "averaged"),
}
GRIDS: dict[str, dict[str, list[float]]] = {  # thirty-six configurations for each optimizer
    "adamw": {
        "lr": [1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3],
        "weight_decay": [0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
    },
    "sgd": {
        "lr": [0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
        "weight_decay": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    },
    "ivon": {
        "lr": [0.03, 0.1, 0.3, 1.0, 3.0, 10.0],
        "prior_precision": [1.0, 10.0],  # N times weight_decay
        "initial_precision": [100.0, 1e3, 1e4],  # N times hess_init
    },
}
FIXED = {"sgd": {"momentum": 0.9}, "adamw": {}, "ivon": {"betas": (0.9, 0.9999)}}
WARMUP = 0.05
"""Share of the steps in which the learning rate rises; then it falls along a cosine."""


# ---- training -----------------------------------------------------------------------------------


def make_optimizer(
    name: str, model: nn.Module, options: dict[str, float], num_train: int, seed: int
) -> torch.optim.Optimizer:
    """AdamW, SGD or IVON with these options."""
    fixed: dict[str, Any] = FIXED[name]
    if name == "ivon":
        N = num_train
        return blr.IVON(
            model.parameters(), options["lr"], N, options["initial_precision"] / N,
            weight_decay=options["prior_precision"] / N, seed=seed, **fixed,
        )  # fmt: skip
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
    return kind(model.parameters(), **options, **fixed)


def training(
    task: Task, name: str, options: dict[str, float], seed: int, epochs: int
) -> Iterator[tuple[int, nn.Module, torch.optim.Optimizer]]:
    """Train; epoch, network and optimizer after each epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.network()
    (X, y), size = task.train, task.batch
    optimizer = make_optimizer(name, model, options, len(y), seed)
    steps = len(y) // size
    total = epochs * steps
    for epoch in range(epochs):
        order = torch.randperm(len(y), generator=generator(seed, epoch))
        for step, chosen in enumerate(order[: steps * size].split(size)):
            now = epoch * steps + step
            factor = warmup_cosine(now, total, math.ceil(WARMUP * total))
            set_lr(optimizer, options["lr"] * factor)
            learn(model, optimizer, X[chosen], y[chosen])
        yield epoch + 1, model, optimizer


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, X: Tensor, y: Tensor) -> None:
    """One step on a minibatch; for a posterior, from one sample."""

    def backward() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()

    if isinstance(optimizer, blr.IVON):
        with optimizer.sampled_params(train=True):
            backward()
    else:
        backward()
    optimizer.step()


# ---- measuring ----------------------------------------------------------------------------------


def log_probabilities(
    model: nn.Module, optimizer: torch.optim.Optimizer, X: Tensor, how: str, samples: int
) -> Tensor:
    """log p(y | x), at the mean or averaged over samples, shape (N, K)."""
    if how == "averaged":
        assert isinstance(optimizer, blr.IVON)
        q = optimizer.posterior()
        return blr.predict(model, q, X, samples, logits=True, chunk=1, generator=generator(3))
    with torch.no_grad():
        return model(X).log_softmax(-1)


def ways(name: str) -> tuple[str, ...]:
    """How an optimizer's result can be read."""
    return ("mean", "averaged") if name == "ivon" else ("mean",)


def scores(log_p: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, log loss, calibration error, Brier score, share of mistakes that were certain."""
    certain = metrics.confidence(log_p, logits=True) > 0.99
    return {
        "accuracy": metrics.accuracy(log_p, y, logits=True),
        "nll": metrics.nll(log_p, y, logits=True),
        "ece": metrics.ece(log_p, y, num_bins=BINS, logits=True),
        "brier": metrics.brier(log_p, y, logits=True),
        "confident mistakes": (certain & (log_p.argmax(-1) != y)).double().mean().item(),
    }


def best_temperature(log_p: Tensor, y: Tensor) -> float:
    """The T for which softmax(log p / T) has the least log loss."""

    def loss(log_T: float) -> float:
        return metrics.nll(log_p / math.exp(log_T), y, logits=True)

    found = minimize_scalar(loss, bounds=(-3, 3), method="bounded")
    return math.exp(found.x)


def detection(inside: Tensor, outside: Tensor) -> float:
    """Area under the ROC curve of the entropy of the prediction."""
    familiar, other = (-metrics.entropy(x, logits=True) for x in (inside, outside))
    return metrics.auroc(familiar, other)


def bins(log_p: Tensor, y: Tensor) -> dict[str, list[float]]:
    """What a reliability diagram needs; sums, which can be added over seeds."""
    r = metrics.reliability(log_p, y, num_bins=BINS, logits=True)
    confidence, accuracy = ((r.count * x).nan_to_num().tolist() for x in (r.confidence, r.accuracy))
    return {"count": r.count.tolist(), "confidence": confidence, "accuracy": accuracy}


def tune(task: Task, name: str, options: dict[str, float], epochs: int) -> dict[str, Any]:
    """Scores on the validation set, with seed 0."""
    *_, (_, model, optimizer) = training(task, name, options, 0, epochs)
    if not all(p.isfinite().all() for p in model.parameters()):
        return {how: {"nll": math.inf} for how in ways(name)}
    X, y = task.validation
    samples, found = min(16, task.samples), {}
    for how in ways(name):
        log_p = log_probabilities(model, optimizer, X, how, samples)
        diverged = bool(log_p.isnan().any())
        found[how] = {"nll": math.inf} if diverged else scores(log_p, y)
    return found


def test(task: Task, name: str, options: dict[str, float], seed: int) -> dict[str, Any]:
    """All that is reported of one run; the predictions themselves go with it as a tensor."""
    *_, (_, model, optimizer) = training(task, name, options, seed, task.epochs)
    found: dict[str, Any] = {}
    for how in ways(name):

        def log_p(X: Tensor, how: str = how) -> Tensor:
            return log_probabilities(model, optimizer, X, how, task.samples)

        (X, y), (X_val, y_val) = task.test, task.validation
        inside = log_p(X)
        T = best_temperature(log_p(X_val), y_val)
        found[how] = {
            **scores(inside, y),
            "temperature": T,
            "scaled": scores((inside / T).log_softmax(-1), y),
            "auroc": {name: detection(inside, log_p(x)) for name, x in task.outside.items()},
            "bins": bins(inside, y),
            "predictions": inside,
        }
    return found


def follow(
    task: Task, name: str, options: dict[str, float], seed: int, epochs: int
) -> dict[str, Any]:
    """Log losses along a long training, of 1000 training and 2000 test examples."""
    every = max(1, epochs // 10)
    parts = {"train": [x[:1000] for x in task.train], "test": [x[:2000] for x in task.test]}
    found: dict[str, Any] = {}
    for epoch, model, optimizer in training(task, name, options, seed, epochs):
        if epoch % every and epoch < epochs:
            continue
        for how in ways(name):
            curve = found.setdefault(how, {"epoch": [], "train": [], "test": [], "ece": []})
            for part, (X, y) in parts.items():
                log_p = log_probabilities(model, optimizer, X, how, min(16, task.samples))
                curve[part].append(metrics.nll(log_p, y, logits=True))
                if part == "test":
                    curve["ece"].append(metrics.ece(log_p, y, num_bins=BINS, logits=True))
            curve["epoch"].append(epoch)
    return found


# ---- the whole ----------------------------------------------------------------------------------


class Runs:
    """Runs that are done, one file each in a folder.

    Args:
        folder: Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done, self.seconds = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(
        self, what: Callable[..., dict[str, Any]], task: Task, label: str, *args: Any
    ) -> dict[str, Any]:
        """What `what(task, *args)` returns, from the folder if it was computed before."""
        key = repr((what.__name__, label, task.identity(), FIXED, *args))
        place = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.pt"
        if place.exists():
            found = torch.load(place, weights_only=True)
        else:
            start = time.monotonic()
            found = {"result": what(task, *args), "seconds": time.monotonic() - start, "key": key}
            torch.save(found, part := place.with_suffix(".part"))
            part.replace(place)
            shown = " ".join(f"{x}" for x in args)
            print(f"{what.__name__} {label}: {shown}, {found['seconds']:.0f} s", flush=True)
        self.done, self.seconds = self.done + 1, self.seconds + found["seconds"]
        return found["result"]


Options = dict[str, float]


def configurations(name: str, **given: float) -> list[Options]:
    """All configurations of an optimizer that have the options given."""
    grid = GRIDS[name] | {option: [value] for option, value in given.items()}
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def choose(
    runs: Runs, task: Task, label: str, candidates: Mapping[str, list[Options]], epochs: int
) -> dict[str, Any]:
    """For each method the candidate with the lowest log loss on the validation set."""
    chosen = {}
    for method, (name, how) in METHODS.items():
        every = [
            {**c, "nll": runs(tune, task, label, name, c, epochs)[how]["nll"]}
            for c in candidates[method]
        ]
        best = min(every, key=lambda c: c["nll"])
        options = {option: best[option] for option in GRIDS[name]}
        grid = {option: {c[option] for c in every} for option in options}
        edge = [o for o, x in grid.items() if len(x) > 1 and best[o] in (min(x), max(x))]
        chosen[method] = {"options": options, "nll": best["nll"], "edge": edge, "tried": every}
    return chosen


def collect(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard errors over runs, and the values, as runs share splits; bins are added."""
    result: dict[str, Any] = {}
    for name, first in found[0].items():
        values = [run[name] for run in found]
        if name == "bins":
            result[name] = {
                k: [sum(x) for x in zip(*(v[k] for v in values), strict=True)] for k in first
            }
        elif isinstance(first, Mapping):
            result[name] = collect(values)
        elif isinstance(first, float):
            result[name] = {**mean_and_error(values), "values": values}
    return result


Splits = Callable[[int], Task]
"""A task on the split that belongs to a seed."""


def compare(runs: Runs, on: Splits, label: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """The table of one task: every method with its choice, over seeds 1, 2 and so on."""
    table = {}
    for method, (name, how) in METHODS.items():
        options = chosen[method]["options"]
        seeds = range(1, on(0).seeds + 1)
        table[method] = collect([runs(test, on(s), label, name, options, s)[how] for s in seeds])
    return table


def example(runs: Runs, on: Splits, label: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """Each method's most certain mistake of its first run, and what the others say of it."""
    p, task = {}, on(1)
    for method, (name, how) in METHODS.items():
        run = runs(test, task, label, name, chosen[method]["options"], 1)
        p[method] = run[how]["predictions"].exp()
    X, y = task.test
    result = {}
    for method, mine in p.items():
        wrong = mine.argmax(-1) != y
        i = int((mine.amax(-1) * wrong).argmax())
        x = (X[i, 0] - X[i].min()) / (X[i].max() - X[i].min()) * 255
        result[method] = {
            "index": i, "class": int(y[i]),
            "pixels": ["".join(f"{int(v):02x}" for v in row) for row in x.round()],
            "probabilities": {k: [round(v, 5) for v in q[i].tolist()] for k, q in p.items()},
        }  # fmt: skip
    return result


def long_training(
    runs: Runs, on: Splits, label: str, short: dict[str, Any], limit: int | None
) -> dict[str, Any]:
    """Curves of every method, with its choice for the short training and with one for this.

    The learning rate stays; ways of holding back are chosen among all six.
    """
    candidates = {
        method: configurations(name, lr=short[method]["options"]["lr"])[:limit]
        for method, (name, _) in METHODS.items()
    }
    task = on(0)
    tuned = choose(runs, task, label, candidates, task.long)
    found: dict[str, Any] = {"chosen": tuned}
    for which, chosen in (("same", short), ("tuned", tuned)):
        found[which] = {
            method: [
                runs(follow, on(seed), label, name, chosen[method]["options"], seed, task.long)[how]
                for seed in range(1, task.long_seeds + 1)
            ]
            for method, (name, how) in METHODS.items()
        }
    return found


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, and write everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("book/results/calibration.json"))
    parser.add_argument("--work", type=Path, default=Path("_build/calibration"))
    parser.add_argument("--train", type=int, default=5_000, help="images of FashionMNIST")
    parser.add_argument("--quick", action="store_true", help="a little of everything, in seconds")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    runs, limit = Runs(options.work), 2 if options.quick else None

    @lru_cache
    def tasks(split: int) -> dict[str, Task]:
        made = make_tasks(options.train, split)
        return {label: shortened(x) for label, x in made.items()} if options.quick else made

    candidates = {method: configurations(name)[:limit] for method, (name, _) in METHODS.items()}
    result: dict[str, Any] = {}
    for label, task in tasks(0).items():

        def on(seed: int, label: str = label) -> Task:
            return tasks(seed)[label]

        chosen = (
            result[task.like]["chosen"]
            if task.like
            else choose(runs, task, label, candidates, task.epochs)
        )
        table = compare(runs, on, label, chosen)
        result[label] = {"task": task.summary(), "chosen": chosen, "methods": table}
        if task.long:
            result[label]["long"] = long_training(runs, on, label, chosen, limit)
        if label == "fashion":
            result[label]["mistakes"] = example(runs, on, label, chosen)
    settings = {"grids": GRIDS, "fixed": FIXED, "bins": BINS, "warmup": WARMUP}
    about = provenance({**vars(options), **settings}, seed="0 to choose, 1 and on to test")
    spent = {"runs": runs.done, "seconds": round(runs.seconds)}
    write_json(options.out, {**about, "spent": spent, "tasks": result})


if __name__ == "__main__":
    main()

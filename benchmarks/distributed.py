"""Many processes and one: the largest differences, and what different noise does to the curvature.

    python benchmarks/distributed.py [--json book/results/distributed.json]

It starts two processes of itself, as `torchrun --standalone --nproc_per_node=2` does, which talk
by gloo; numbers are those of any run on such a machine, because everything in them is seeded. The
first table compares `DistributedDataParallel` and `fully_shard`, which has uneven shards here, with
one process that sees both halves of each batch. The second continues in one process what two have
saved. The third is a quadratic loss with known curvature h under three kinds of noise; the second
of them raises an error in use, which is put out of action here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from _machine import provenance, report
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import blr
from blr.optim import per_rank_noise

COMMAND = "python benchmarks/distributed.py --json book/results/distributed.json"
STYLES = ("contexts, two samples per step", "train() and eval()")
STEPS = 50
Engine = Callable[[nn.Sequential], nn.Module]


def batch() -> tuple[Tensor, Tensor]:
    """64 examples of a function of 7 inputs."""
    x = torch.randn(64, 7, generator=torch.Generator().manual_seed(1))
    return x, (x[:, :3] * x[:, 3:6]).sin()


def half() -> tuple[Tensor, Tensor]:
    """The examples of this process."""
    x, y = batch()
    return x[dist.get_rank() :: 2], y[dist.get_rank() :: 2]


def network(seed: int = 0) -> nn.Sequential:
    """Layers with odd numbers of rows, which two processes cannot share evenly."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 3)
    )


def sharded(model: nn.Sequential) -> nn.Module:
    """The model by FSDP2, layer by layer."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


ENGINES: dict[str, Engine] = {"DDP": DistributedDataParallel, "FSDP2": sharded}


def ivon(model: nn.Module) -> blr.IVON:
    """Large steps and a fast curvature, so that differences would grow."""
    return blr.IVON(model.parameters(), lr=0.1, ess=1000, hess_init=0.1, betas=(0.9, 0.99))


def train(
    model: nn.Module, optimizer: blr.IVON, data: tuple[Tensor, Tensor], style: str, steps: int
) -> None:
    """An ordinary loop, which ends at the mean."""
    x, y = data
    if style == STYLES[1]:
        optimizer.train()
    for _ in range(steps):
        if style == STYLES[1]:
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
        else:
            for _ in range(2):
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    (model(x) - y).square().mean().backward()
        optimizer.step()
    optimizer.eval()


def whole(x: Any) -> Tensor:
    """All rows of a tensor that may be sharded."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x.detach()


def difference(
    model: nn.Module, optimizer: blr.IVON, other: nn.Module, expected: blr.IVON
) -> dict[str, float]:
    """The largest differences of means and of curvatures."""
    means, curvatures = [], []
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        means.append((whole(p) - whole(q)).abs().max().item())
        h, g = whole(optimizer.state[p]["hess"]), whole(expected.state[q]["hess"])
        curvatures.append((h - g).abs().max().item())
    return {"mean": short(max(means)), "curvature": short(max(curvatures))}


def short(x: float) -> float:
    """Three digits."""
    return float(f"{x:.3g}")


def one_and_two() -> list[dict[str, Any]]:
    """Differences between one process and two after `STEPS` steps."""
    rows: list[dict[str, Any]] = []
    for style in STYLES:
        one = network()
        expected = ivon(one)
        train(one, expected, batch(), style, STEPS)
        for engine, wrap in ENGINES.items():
            model = wrap(network())
            optimizer = ivon(model)
            train(model, optimizer, half(), style, STEPS)
            row = {"engine": engine, "style": style, "steps": STEPS}
            rows.append(row | difference(model, optimizer, one, expected))
    return rows


def continued(folder: Path) -> list[dict[str, Any]]:
    """Differences between an uninterrupted run and one that went on in one process."""
    rows: list[dict[str, Any]] = []
    for style in STYLES:
        one = network()
        expected = ivon(one)
        train(one, expected, batch(), style, STEPS)
        for engine, wrap in ENGINES.items():
            path = folder / f"{engine} {STYLES.index(style)}"
            model = wrap(network())
            optimizer = ivon(model)
            train(model, optimizer, half(), style, STEPS // 2)
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
            alone = network(seed=1)
            resumed = ivon(alone)
            weights, state = get_state_dict(alone, resumed)
            dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path, no_dist=True)
            set_state_dict(alone, resumed, model_state_dict=weights, optim_state_dict=state)
            train(alone, resumed, batch(), style, STEPS - STEPS // 2)
            row = {"engine": engine, "style": style, "saved_at": STEPS // 2, "steps": STEPS}
            rows.append(row | difference(alone, resumed, one, expected))
    return rows


class Quadratic(nn.Module):
    """½ mean over ranks of Σ h(θ − b)², with b = 1 and b = −1: the curvature is h everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("h", torch.linspace(0.5, 2.0, 20_000))
        self.theta = nn.Parameter(torch.zeros(20_000))

    def forward(self, b: float) -> Tensor:
        """The loss of one rank."""
        return 0.5 * (self.h * (self.theta - b).square()).sum()


def noise(own: bool, averaged: bool, expected: float, beta: float = 0.98) -> dict[str, Any]:
    """The average of h/(its true value), and the largest difference of means between replicas.

    The expected ratio has, beyond 1 or ½, the ½(1 − β₂) var(ĥ)/h² that the retraction adds: the
    variances are 2h², ¾h², and (2 + Nh)h²/2 with Nh = 12.5 on average, at m = 0.
    """
    rank = dist.get_rank()
    model = DistributedDataParallel(Quadratic())
    optimizer = blr.IVON(
        model.parameters(), lr=0.02, ess=10, betas=(0.9, beta), weight_decay=0.0,
        seed=rank if own and not averaged else 0,
    )  # fmt: skip
    if own and averaged:
        per_rank_noise(optimizer, model)
    optimizer._agreement.due = lambda: False  # type: ignore[method-assign]  # which would raise
    quadratic, ratio = model.module, 0.0
    for step in range(600):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            model((-1.0) ** rank).backward()
        optimizer.step()
        if step >= 400:
            h = optimizer.state[quadratic.theta]["hess"]
            ratio += (h / quadratic.h).mean().item() / 200
    means = [torch.empty_like(quadratic.theta) for _ in range(2)]
    dist.all_gather(means, quadratic.theta.detach())
    return {
        "noise": "one for each rank" if own else "the same on all ranks",
        "averaged": "gradients and products" if averaged else "gradients",
        "curvature_ratio": round(ratio, 3),
        "expected": round(expected, 3),
        "refused": own and not averaged and refused(),
        "replicas_differ_by": short((means[0] - means[1]).abs().max().item()),
        "processes": 2,
        "beta2": beta,
    }


def refused() -> bool:
    """Whether averaged gradients with noise of one rank's own raise at the first step."""
    model = DistributedDataParallel(network())
    error = ""
    try:
        optimizer = blr.IVON(model.parameters(), lr=0.1, ess=1000, seed=dist.get_rank())
        train(model, optimizer, half(), STYLES[1], steps=1)
    except RuntimeError as e:
        error = str(e)
    errors: list[Any] = [None, None]
    dist.all_gather_object(errors, error)
    return any("gradients of different samples were averaged" in e for e in errors)


def measure() -> dict[str, Any]:
    """All tables; runs in each of two processes."""
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        went_on = continued(Path(folder[0]))
        dist.barrier()
    return {
        **provenance(blr),
        "command": COMMAND,
        "processes": "2, gloo, one thread each",
        "one_process_and_two": one_and_two(),
        "two_processes_continued_in_one": went_on,
        "noise": [
            noise(False, False, expected=1 + 0.01 * 2),
            noise(True, False, expected=0.5 * (1 + 0.01 * 3)),
            noise(True, True, expected=1 + 0.01 * (2 + 12.5) / 2),
        ],
    }


def main() -> None:
    """Start two processes, or be one of them."""
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        subprocess.run([*command, "--nproc_per_node=2", *sys.argv], check=True)
        return
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = measure()
    if dist.get_rank() == 0:
        report(__doc__, lambda: result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Squared gradients of single examples: activations × output gradients against vmap(grad).

    python benchmarks/squared_gradients.py [--json FILE]

`blr.gradients.squared_gradients` on a multilayer perceptron and on a small convolutional network,
128 examples at once, one thread, timed in turn. The same sums by `torch.func.vmap(grad)` are taken
at once and, because they need P numbers for each example, also in chunks of 16. `gradient` is one
ordinary gradient of the minibatch. Linear layers never form a gradient of one example. Layers with
positions, such as convolutions, must, as vmap(grad) does, and what is saved there is memory.
"""

from __future__ import annotations

from typing import Any

import torch
from _machine import in_turn, provenance, ratio, report
from torch import Tensor, nn
from torch.func import grad, vmap

from blr.gradients import squared_gradients
from blr.likelihoods import TotalLoss, from_module, softmax

EXAMPLES = 128
ROUNDS = 15


def perceptron() -> tuple[nn.Module, tuple[int, ...]]:
    """784-256-128-10 with ReLU, 235,146 parameters."""
    layers = (nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(*layers), (784,)


def convolutions() -> tuple[nn.Module, tuple[int, ...]]:
    """Three convolutions with strides and a linear layer, 29,066 parameters."""
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(576, 10),
    )
    return net, (1, 28, 28)


def by_vmap(loss: TotalLoss, theta: Tensor, chunk: int | None) -> Tensor:
    """The sum of squares as torch.func writes it."""

    def example(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return loss.per_example_loss(loss.model(t, x.unsqueeze(0)), y.unsqueeze(0))[0]

    per_example = vmap(grad(example), in_dims=(None, 0, 0))
    total = torch.zeros_like(theta)
    size = chunk or len(loss.inputs)
    for x, y in zip(loss.inputs.split(size), loss.targets.split(size), strict=True):
        total += per_example(theta, x, y).square().sum(0)
    return total


def compare(net: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Times, ratios and the largest difference, relative to the largest entry."""
    model, theta = from_module(net)
    x, y = torch.randn(EXAMPLES, *shape), torch.randint(10, (EXAMPLES,))
    loss = TotalLoss(model, softmax, x, y)
    times = in_turn(
        ROUNDS,
        fast=lambda: squared_gradients(loss, theta, theta),
        whole=lambda: by_vmap(loss, theta, None),
        chunks=lambda: by_vmap(loss, theta, 16),
        gradient=lambda: grad(loss)(theta),
    )
    expected = by_vmap(loss, theta, None)
    gap = (squared_gradients(loss, theta, theta) - expected).abs().max() / expected.max()
    return {
        "P": len(theta),
        "milliseconds": round(1e3 * min(times["fast"]), 2),
        "vmap_over_blr": ratio(times["whole"], times["fast"]),
        "chunked_vmap_over_blr": ratio(times["chunks"], times["fast"]),
        "blr_over_one_gradient": ratio(times["fast"], times["gradient"]),
        "largest_deviation": float(f"{gap:.1e}"),
    }


def measure() -> dict[str, Any]:
    """Both networks, on one thread, in single precision."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return {
        **provenance(),
        "examples": EXAMPLES,
        "perceptron": compare(*perceptron()),
        "convolutions": compare(*convolutions()),
    }


if __name__ == "__main__":
    report(__doc__, measure)

"""The tasks of `calibration.py`: images, networks, and how long to train.

FashionMNIST, and the digits of 8×8 pixels in four versions: clean, with random labels, with few
examples, and without two of the classes. Each split of the images is a task of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from _common import generator
from torch import Tensor, nn
from torch.nn import functional as F

from blr import data

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """Images, and how long to train on them.

    Args:
        train: Inputs and classes that are learned from, N of them.
        validation: Those that choose configurations and temperatures.
        test: Those that are reported.
        network: Makes the network.
        batch: Size of a minibatch.
        epochs: Passes through the training examples.
        long: Passes of the long training; 0 for none.
        outside: Inputs that are of no class, by name.
        like: The task whose configurations are taken over; its own are chosen if missing.
        seeds: Number of test runs of each method.
        long_seeds: Number of long runs of each method.
        samples: Samples of the posterior in a test.
    """

    train: Pair
    validation: Pair
    test: Pair
    network: Callable[[], nn.Module]
    batch: int
    epochs: int
    long: int = 0
    outside: dict[str, Tensor] = field(default_factory=dict)
    like: str = ""
    seeds: int = 3
    long_seeds: int = 3
    samples: int = 32

    def summary(self) -> dict[str, Any]:
        """What a table should say about it."""
        sizes = {name: len(getattr(self, name)[1]) for name in ("train", "validation", "test")}
        outside = {name: len(X) for name, X in self.outside.items()}
        model = self.network()
        return {
            **sizes, "outside": outside, "batch": self.batch, "epochs": self.epochs,
            "long": self.long, "seeds": self.seeds, "long_seeds": self.long_seeds,
            "samples": self.samples, "like": self.like,
            "parameters": sum(p.numel() for p in model.parameters()),
            "network": ", ".join(str(layer) for layer in model.children()),
        }  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What distinguishes its runs from those of other tasks."""
        numbers = ("seeds", "long", "long_seeds", "like")
        return {name: x for name, x in self.summary().items() if name not in numbers}


def convolutional() -> nn.Module:
    """Two convolutions and a hidden layer, for 28×28 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 49, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def perceptron() -> nn.Module:
    """Two hidden layers of 256 units, for 8×8 pixels."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, 10),
    )  # fmt: skip


def digits_data(split: int) -> Pair:
    """All digits in the order of a split; values between 0 and 1, shape (N, 1, 8, 8)."""
    digits = data.load("digits")
    order = torch.randperm(len(digits.X), generator=generator(0, split))
    X = torch.as_tensor(digits.X)[order].float() / 16
    return X.reshape(-1, 1, 8, 8), torch.as_tensor(digits.y)[order]


def clothes_data(name: str, chosen: Tensor | slice) -> Pair:
    """Some images of FashionMNIST; values between 0 and 1, shape (N, 1, 28, 28)."""
    images = data.load(name)
    X, y = torch.as_tensor(images.X)[chosen], torch.as_tensor(images.y)[chosen]
    return X.float().unsqueeze(1) / 255, y


def fashion(split: int, num_train: int, num_validation: int = 1500, num_test: int = 5000) -> Task:
    """FashionMNIST; outside are digits enlarged to 28×28, and test images lying on their side.

    A split draws images for training and validation; those for testing are always the same.
    """
    order = torch.randperm(60_000, generator=generator(0, split))
    X, y = clothes_data("fashion_mnist", order[: num_train + num_validation])
    X_test, y_test = clothes_data("fashion_mnist_test", slice(None))
    digits, _ = digits_data(split)
    large = F.interpolate(digits, size=20, mode="bilinear", align_corners=False)
    outside = {
        "digits": F.pad(large[:1000], (4, 4, 4, 4)),
        "rotated": X_test[-1000:].rot90(1, (2, 3)),
    }
    # Weights are drawn for inputs of mean 0 and variance 1.
    mean, std = X[:num_train].mean(), X[:num_train].std()
    X, X_test = (X - mean) / std, (X_test - mean) / std
    n = num_train
    return Task(
        (X[:n], y[:n]), (X[n:], y[n:]), (X_test[:num_test], y_test[:num_test]), convolutional,
        100, 15, 45,
        {name: (x - mean) / std for name, x in outside.items()},
    )  # fmt: skip


def digits(split: int) -> Task:
    """Digits; outside are clothes reduced to 8×8 pixels, and digits lying on their side."""
    X, y = digits_data(split)
    images, _ = clothes_data("fashion_mnist_test", slice(2000))
    clothes = F.interpolate(images, size=8, mode="area")
    outside = {"clothes": clothes, "rotated": X[:540].rot90(1, (2, 3))}
    return Task(
        (X[540:1540], y[540:1540]), (X[1540:], y[1540:]), (X[:540], y[:540]), perceptron, 50, 100,
        300, outside=outside, seeds=5, samples=64,
    )  # fmt: skip


def noisy(task: Task, split: int) -> Task:
    """A fifth of the labels drawn at random, in training and validation but not in the test."""

    def spoil(pair: Pair, place: int) -> Pair:
        X, y = pair
        chosen = torch.rand(len(y), generator=generator(1, split, place)) < 0.2
        labels = torch.randint(10, y.shape, generator=generator(2, split, place))
        return X, torch.where(chosen, labels, y)

    train, validation = spoil(task.train, 0), spoil(task.validation, 1)
    return replace(
        task, train=train, validation=validation, epochs=50, long=150, outside={}, seeds=3
    )


def few(task: Task, num_train: int = 200) -> Task:
    """The first examples only, for 1000 steps."""
    X, y = task.train
    return replace(
        task, train=(X[:num_train], y[:num_train]), epochs=250, long=0, outside={}, seeds=3
    )


def unseen(task: Task) -> Task:
    """Trained and tested on zeros to sevens; outside are the eights and nines of the test."""

    def known(pair: Pair) -> Pair:
        X, y = pair
        return X[y < 8], y[y < 8]

    outside = {"eights and nines": task.test[0][task.test[1] >= 8]}
    train, validation, test = map(known, (task.train, task.validation, task.test))
    return replace(
        task, train=train, validation=validation, test=test, long=0, outside=outside, seeds=3,
        like="digits",
    )  # fmt: skip


def make_tasks(num_train: int, split: int) -> dict[str, Task]:
    """All tasks by name, on one split of the images."""
    clean = digits(split)
    return {
        "digits": clean,
        "fashion": fashion(split, num_train),
        "digits, random labels": noisy(clean, split),
        "digits, 200 examples": few(clean),
        "digits, unseen classes": unseen(clean),
    }


def shortened(task: Task) -> Task:
    """The same with so little of everything that it runs in seconds."""

    def first(pair: Pair, n: int) -> Pair:
        return pair[0][:n], pair[1][:n]

    return replace(
        task, train=first(task.train, 200), validation=first(task.validation, 100),
        test=first(task.test, 100), epochs=2, seeds=2, samples=2,
        long=3 if task.long else 0, long_seeds=1,
        outside={name: x[:50] for name, x in task.outside.items()},
    )  # fmt: skip

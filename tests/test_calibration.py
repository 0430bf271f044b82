"""Claims about the comparison of chapter 11: its tasks, what it measures, what was written down."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import blr
from blr import data, metrics

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import _calibration as tasks  # noqa: E402
import calibration  # noqa: E402


def has_fashion() -> bool:
    try:
        data.load("fashion_mnist_test")
    except data.DataUnavailable:
        return False
    return True


@pytest.fixture
def clean(needs):
    needs(has_fashion(), "get FashionMNIST: see blr.data")
    return tasks.digits(1)


@pytest.fixture
def written():
    return json.loads((EXPERIMENTS.parent / "book/results/calibration.json").read_text())


def rows(*inputs):
    return {tuple(x.flatten().tolist()) for X in inputs for x in X}


def test_training_validation_and_test_share_no_image(clean):
    parts = [rows(getattr(clean, name)[0]) for name in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [1000, 257, 540]
    assert len(set.union(*parts)) == 1797


def test_splits_differ_and_clothes_are_tested_on_the_same_images(needs):
    needs(has_fashion(), "get FashionMNIST: see blr.data")
    one, other = (tasks.make_tasks(50, split) for split in (1, 2))
    for name in one:
        assert not torch.equal(one[name].train[0], other[name].train[0])
    # Pixels are standardised by the images for training.
    first, second = (one["fashion"].test[0][:9], other["fashion"].test[0][:9])
    scale = first.std() / second.std()
    torch.testing.assert_close(first - first.mean(), (second - second.mean()) * scale)
    assert torch.equal(one["fashion"].test[1], other["fashion"].test[1])


def test_random_labels_are_a_fifth_and_the_test_is_clean(clean):
    task = tasks.noisy(clean, 1)
    for name in ("train", "validation"):
        n = len(getattr(clean, name)[1])
        changed = (getattr(task, name)[1] != getattr(clean, name)[1]).double().mean().item()
        # A random label is the right one in a tenth of the cases.
        assert abs(changed - 0.18) < 3 * (0.18 * 0.82 / n) ** 0.5
    assert torch.equal(task.test[1], clean.test[1])


def test_unseen_classes_are_only_outside(clean):
    task = tasks.unseen(clean)
    assert all(getattr(task, n)[1].max() == 7 for n in ("train", "validation", "test"))
    (outside,) = task.outside.values()
    assert rows(outside) == rows(clean.test[0][clean.test[1] >= 8])
    assert rows(outside, task.test[0]) == rows(clean.test[0])


def test_each_optimizer_has_as_many_configurations():
    counts = {name: len(calibration.configurations(name)) for name in calibration.GRIDS}
    assert counts == {"adamw": 36, "sgd": 36, "ivon": 36}
    held_back = {name: len(calibration.configurations(name, lr=0.1)) for name in calibration.GRIDS}
    assert held_back == {"adamw": 6, "sgd": 6, "ivon": 6}


def test_the_temperature_that_spoilt_predictions_is_found():
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, 5, generator=g).mul(2).log_softmax(-1)
    y = torch.multinomial(truth.exp(), 1, generator=g).squeeze(-1)
    found = calibration.best_temperature((3.0 * truth).log_softmax(-1), y)
    # The standard error of τ is that of a maximum of the likelihood, from its curvature.
    steps = [metrics.nll(truth * (1 + d), y, logits=True) for d in (-0.05, 0.0, 0.05)]
    error = 3 / (4000 * np.diff(steps, 2)[0] / 0.05**2) ** 0.5
    assert abs(found - 3) < 4 * error < 0.5


def test_all_methods_see_the_same_minibatches_from_the_same_start(clean):
    task = calibration.shortened(clean)
    learn, seen = calibration.learn, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "learn", lambda m, o, X, y: (seen.append(X), learn(m, o, X, y)))
        for name in calibration.GRIDS:
            options = {option: 0.0 for option in calibration.GRIDS[name]}
            options |= {"initial_precision": 1.0} if name == "ivon" else {}
            *_, (_, model, _) = calibration.training(task, name, options, 5, 2)
            seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    first, second, third = np.array_split(np.arange(len(seen)), 3)
    for i, j, k in zip(first, second, third, strict=True):
        assert torch.equal(seen[i], seen[j]) and torch.equal(seen[i], seen[k])


def test_a_second_call_computes_nothing_and_writes_the_same(clean, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    given = ["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "found.json")]
    calibration.main(given)
    before = json.loads((tmp_path / "found.json").read_text())
    for what in ("tune", "test", "follow"):

        def fail(*args: object) -> None:
            raise AssertionError("computed again")

        fail.__name__ = what
        monkeypatch.setattr(calibration, what, fail)
    calibration.main(given)
    after = json.loads((tmp_path / "found.json").read_text())
    assert json.dumps(after) == json.dumps(before)


@pytest.mark.parametrize("label", ["fashion", "digits"])
def test_what_is_written_has_the_best_of_equal_grids_and_three_seeds(written, label):
    task, grids = written["tasks"][label], written["options"]["grids"].values()
    (budget,) = {math.prod(len(values) for values in grid.values()) for grid in grids}
    assert task["task"]["seeds"] >= 3
    for method, choice in task["chosen"].items():
        # A run that diverged has the loss "inf".
        tried = {
            json.dumps(c | {"nll": 0}, sort_keys=True): float(c["nll"]) for c in choice["tried"]
        }
        assert len(tried) == budget and choice["nll"] == min(tried.values())
        found = task["methods"][method]
        assert all(found[k]["standard_error"] >= 0 for k in ("accuracy", "nll", "ece", "brier"))
        seeds, n = task["task"]["seeds"], task["task"]["test"]
        assert sum(found["bins"]["count"]) == seeds * n
        accuracy = sum(found["bins"]["accuracy"]) / (seeds * n)
        np.testing.assert_allclose(accuracy, found["accuracy"]["mean"], rtol=1e-10)


def test_averaged_means_averaged_over_the_posterior(clean):
    task = calibration.shortened(clean)
    options = {"lr": 1.0, "prior_precision": 1.0, "initial_precision": 30.0}
    *_, (_, model, optimizer) = calibration.training(task, "ivon", options, 1, 2)
    X = task.test[0]
    at_mean, averaged = (
        calibration.log_probabilities(model, optimizer, X, how, 300) for how in ("mean", "averaged")
    )
    assert isinstance(optimizer, blr.IVON)
    g = torch.Generator().manual_seed(8)
    again = blr.predict(model, optimizer.posterior(), X, 300, generator=g)
    assert (averaged.exp() - again).abs().max() < 0.2 < (at_mean.exp() - again).abs().sum()

"""Every row of the table against its oracle: another implementation, or a known answer.

`TABLE` and `ORACLES` have the same rows, so no row is without its test.
"""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.special
import torch
from oracles import ORACLES, TOLERANCE
from oracles.problem import (
    BATCH,
    DELTA,
    LOSS,
    STEPS,
    P,
    X,
    Y,
    along,
    batches,
    diagonal_start,
    fixed_start,
    full_start,
    generator,
    gradient_and_hessian,
    minimum,
    relative,
    torch_optimizer,
)

import blr
from blr.likelihoods import TotalLoss, linear, logistic, softmax
from blr.recipes import TABLE


def test_every_row_has_an_oracle_and_every_oracle_a_row():
    names = [row.name for row in TABLE]
    assert len(set(names)) == len(names)
    assert set(ORACLES) == set(names)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_row_equals_its_oracle(row):
    assert ORACLES[row.name](row) <= TOLERANCE.get(row.name, 1e-10)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_row_says_what_it_is_made_of(row):
    for name in ("section", "gradient", "schedule", "oracle", "reference"):
        assert getattr(row, name)
    assert hasattr(row.build(), "posteriors")
    assert getattr(blr.recipes, row.build.__name__) is row.build


def test_the_page_shows_the_rows_as_they_are(root):
    tool = [sys.executable, root / "book/_tools/make_table.py", "--check"]
    done = subprocess.run(tool, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_row_has_its_equation_in_the_book(root):
    chapters = "\n".join(path.read_text() for path in (root / "book").glob("[0-9]*.md"))
    labels = set(re.findall(r"^\$\$ \((eq-[a-z0-9-]+)\)$", chapters, re.M))
    assert [row.name for row in TABLE if row.equation not in labels] == []


START = {
    blr.FixedGaussian: fixed_start,
    blr.Gaussian: full_start,
    blr.DiagonalGaussian: lambda: diagonal_start(50.0),
}


@pytest.mark.parametrize("row", [r for r in TABLE if r.family in START], ids=lambda row: row.name)
def test_every_row_runs_alike_and_learns(row):
    recipe = row.build(lr=1e-3) if "lr" in row.build.__code__.co_varnames else row.build()
    q0 = START[row.family]()
    path = list(blr.run(recipe, LOSS, q0, 12))
    assert [type(q) for q in path] == [row.family] * 12
    assert LOSS(path[-1].mean) < LOSS(q0.mean)


def odd(case: str) -> TotalLoss:
    """Seven examples with a column of zeros; only one of them; or all of a single class."""
    inputs, labels = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).double(), Y[:7]
    inputs[:, 1] = 0.0
    if case == "one class":
        one = lambda theta, x: (x @ theta)[:, None]  # noqa: E731
        return TotalLoss(one, softmax, inputs, torch.zeros(7, dtype=torch.long), DELTA)
    n = 1 if case == "one example" else 7
    return TotalLoss(linear, logistic, inputs[:n], torch.tensor(labels[:n]), DELTA)


@pytest.mark.parametrize("case", ["column of zeros", "one example", "one class"])
@pytest.mark.parametrize(
    "row",
    [r for r in TABLE if r.family in (blr.Gaussian, blr.DiagonalGaussian)],
    ids=lambda r: r.name,
)
def test_odd_data_leave_the_parameters_that_they_say_nothing_about(row, case):
    start = blr.Gaussian if row.family is blr.Gaussian else blr.DiagonalGaussian
    precision = torch.eye(3).double() if start is blr.Gaussian else torch.ones(3).double()
    q0 = start.from_moments(torch.zeros(3).double(), 9 * precision)
    recipe = row.build(lr=1e-3) if "lr" in row.build.__code__.co_varnames else row.build()
    *_, q = blr.run(recipe, odd(case), q0, 4)
    assert torch.isfinite(q.mean).all()
    # The prior alone speaks of the second parameter, and of all where there is nothing to choose.
    silent = slice(None) if case == "one class" else slice(1, 2)
    assert (q.mean[silent] == 0).all() or row.gradient.startswith("samples")
    assert q.mean.abs().max() > 0 or case == "one class"


# ---- what the rows are known for ----------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("batch", [None, BATCH])
def test_a_precision_kept_as_a_number_is_torchs_sgd_too(momentum, batch):
    make = lambda p: torch.optim.SGD(p, lr=2e-4 / 3, momentum=momentum)  # noqa: E731
    expected = torch_optimizer(make, STEPS, None if batch is None else batches(3))
    q0 = blr.FixedGaussian.from_moments(torch.zeros(P).double(), 3.0)
    recipe = blr.recipes.gradient_descent(lr=2e-4, momentum=momentum)
    path = blr.run(recipe, LOSS, q0, STEPS, batch=batch, generator=generator(3))
    assert along(path, expected) < 1e-12


def test_newton_squares_its_error_and_finds_the_minimum():
    path = blr.run(blr.recipes.newton(), LOSS, full_start(), 11)
    norms = [float(np.linalg.norm(gradient_and_hessian(q.mean.numpy())[0])) for q in path]
    assert norms[-1] < 1e-11
    assert norms[-3] < 1e-2 * norms[-4] and norms[-2] < 1e-4 * norms[-3]
    *_, q = blr.run(blr.recipes.newton(), LOSS, full_start(), 12)
    assert relative(q.mean, minimum()) < 1e-8
    assert abs(LOSS(q.mean).item() - 37.778226) < 5e-7


def test_laplace_has_the_evidence_of_the_expansion_at_the_minimum():
    *_, q = blr.run(blr.recipes.laplace(), LOSS, full_start(), 200, tolerance=1e-14)
    theta = minimum()
    p = scipy.special.expit(X @ theta)
    nll = -np.sum(Y * np.log(p) + (1 - Y) * np.log1p(-p)) + 0.5 * DELTA * theta @ theta
    H = gradient_and_hessian(theta)[1]
    expected = -nll + 0.5 * P * math.log(DELTA) - 0.5 * np.linalg.slogdet(H)[1]
    found = -LOSS(q.mean) + 0.5 * P * math.log(DELTA) - torch.linalg.slogdet(q.precision)[1] / 2
    assert abs(found.item() - expected) < 1e-9
    assert abs(expected - -55.63197) < 5e-6


def test_a_smaller_rate_is_not_damped_newton():
    # The precision remembers: half a step of the rule is not half a step of Newton.
    theta = np.zeros(P)
    for _ in range(5):
        g, H = gradient_and_hessian(theta)
        theta = theta - 0.5 * np.linalg.solve(H, g)
    *_, q = blr.run(blr.recipes.laplace(lr=0.5), LOSS, full_start(), 5)
    assert np.abs(q.mean.numpy() - theta).max() > 0.1


def test_keeping_the_decay_of_a_known_precision_would_be_weight_decay():
    # Without its base measure, gradient descent would shrink m by 1 − ρ at every step.
    expected = torch_optimizer(lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=1.0), 50)
    *_, q = blr.run(blr.recipes.gradient_descent(lr=1e-3), LOSS, fixed_start(), 50)
    assert 0.01 < (q.mean - expected[-1]).abs().max() < 0.02


def test_adam_gives_a_parameter_without_gradient_no_step_and_almost_no_precision():
    loss = lambda theta: (theta[0] - 1) ** 2  # noqa: E731
    start = blr.DiagonalGaussian.from_moments([0.0, 5.0], 1.0)
    *_, q = blr.run(blr.recipes.adam(), loss, start, 3)
    assert q.mean[1] == 5.0 and 0 < q.precision[1] < 1e-15
    with pytest.raises(ValueError, match=r"step 1: .* eps or a prior_precision"):
        list(blr.run(blr.recipes.adam(eps=0.0), loss, start, 3))

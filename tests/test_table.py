"""Every row of the table against its oracle: another implementation, or a known answer.

An oracle gets the row and returns the largest deviation that it finds, relative to the size of
what is compared. `TABLE` and `ORACLES` have the same rows, so no row is without its test.
"""

import math

import numpy as np
import pytest
import scipy.special
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression

import blr
from blr.likelihoods import TotalLoss, linear, logistic
from blr.recipes import TABLE

DELTA = 1.0
STEPS = 60
BATCH = 64


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    """Standardised columns and a constant one, shape (569, 31), and labels of 0 and 1."""
    data = load_breast_cancer()
    X = (data.data - data.data.mean(0)) / data.data.std(0)
    return np.column_stack([X, np.ones(len(X))]), data.target.astype(float)


X, Y = breast_cancer()
N, P = X.shape
LOSS = TotalLoss(linear, logistic, torch.tensor(X), torch.tensor(Y), prior_precision=DELTA)


def gradient_and_hessian(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the logistic loss with its prior, written out."""
    p = scipy.special.expit(X @ theta)
    return X.T @ (p - Y) + DELTA * theta, X.T @ (X * (p * (1 - p))[:, None]) + DELTA * np.eye(P)


def minimum() -> np.ndarray:
    """scikit-learn's; the constant column is penalised like the others."""
    model = LogisticRegression(
        C=1 / DELTA, fit_intercept=False, solver="newton-cholesky", tol=1e-13, max_iter=100
    )
    return model.fit(X, Y).coef_[0]


def batches(seed: int, steps: int = STEPS, batch: int = BATCH) -> list[torch.Tensor]:
    """Indices of minibatches: epochs in the orders that the generator gives."""
    generator, indices = torch.Generator().manual_seed(seed), []
    while len(indices) < steps:
        indices += torch.randperm(N, generator=generator).split(batch)
    return indices[:steps]


def torch_optimizer(make, steps: int, indices=None) -> list[torch.Tensor]:
    """θ after each step of an optimizer of torch on the (reweighted) total loss."""
    theta = torch.nn.Parameter(torch.zeros(P, dtype=torch.float64))
    optimizer, path = make([theta]), []
    for t in range(steps):
        B = slice(None) if indices is None else indices[t]
        x, y = torch.tensor(X)[B], torch.tensor(Y)[B]
        optimizer.zero_grad()
        nll = torch.nn.functional.binary_cross_entropy_with_logits(x @ theta, y, reduction="sum")
        (N / len(y) * nll + 0.5 * DELTA * theta.square().sum()).backward()
        optimizer.step()
        path.append(theta.detach().clone())
    return path


def relative(actual, expected) -> float:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def along(path, expected) -> float:
    """The largest deviation of the means along a path."""
    means = [q.mean for q in path]
    assert len(means) == len(expected)
    return max(relative(m, e) for m, e in zip(means, expected, strict=True))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fixed_start() -> blr.FixedGaussian:
    return blr.FixedGaussian.from_moments(torch.zeros(P).double(), torch.eye(P).double())


def diagonal_start(precision=1.0) -> blr.DiagonalGaussian:
    return blr.DiagonalGaussian.from_moments(torch.zeros(P).double(), precision)


def full_start(precision: float = 1.0) -> blr.Gaussian:
    eye = torch.eye(P).double()
    return blr.Gaussian.from_moments(torch.zeros(P).double(), precision * eye)


# ---- the oracles --------------------------------------------------------------------------------


def gradient_descent(row) -> float:
    expected = torch_optimizer(lambda p: torch.optim.SGD(p, lr=1e-3), STEPS)
    return along(blr.run(row.build(lr=1e-3), LOSS, fixed_start(), STEPS), expected)


def sgd(row) -> float:
    found = []
    for gamma in (0.0, 0.9):
        make = lambda p: torch.optim.SGD(p, lr=2e-4, momentum=gamma)  # noqa: B023, E731
        expected = torch_optimizer(make, STEPS, batches(3))
        recipe = row.build(lr=2e-4, momentum=gamma)
        path = blr.run(recipe, LOSS, fixed_start(), STEPS, batch=BATCH, generator=generator(3))
        found.append(along(path, expected))
    return max(found)


def newton(row) -> float:
    theta, expected, curvatures = np.zeros(P), [], []
    for _ in range(8):
        g, H = gradient_and_hessian(theta)
        theta = theta - np.linalg.solve(H, g)
        expected.append(theta)
        curvatures.append(H)
    found = []
    for precision in (1.0, 1e6):  # the step does not depend on the precision it starts from
        path = list(blr.run(row.build(), LOSS, full_start(precision), 8))
        found.append(along(path, expected))
        found += [relative(q.precision, H) for q, H in zip(path, curvatures, strict=True)]
    return max(found)


def laplace(row) -> float:
    *_, q = blr.run(row.build(), LOSS, full_start(), 200, tolerance=1e-14)
    theta = minimum()
    g, H = gradient_and_hessian(q.mean.numpy())
    assert np.abs(g).max() < 1e-9
    return max(relative(q.mean, theta), relative(q.precision, H))


def rmsprop(row) -> float:
    found = []
    for alpha, eps in ((0.99, 1e-8), (0.9, 1e-2)):
        make = lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=alpha, eps=eps)  # noqa: B023, E731
        expected = torch_optimizer(make, STEPS, batches(4))
        recipe = row.build(lr=0.01, alpha=alpha, eps=eps)
        path = blr.run(recipe, LOSS, diagonal_start(), STEPS, batch=BATCH, generator=generator(4))
        found.append(along(path, expected))
    return max(found)


def adam(row) -> float:
    found = []
    for betas, eps in (((0.9, 0.999), 1e-8), ((0.6, 0.95), 1e-2)):
        make = lambda p: torch.optim.Adam(p, lr=0.02, betas=betas, eps=eps)  # noqa: B023, E731
        expected = torch_optimizer(make, STEPS, batches(5))
        recipe = row.build(lr=0.02, betas=betas, eps=eps)
        path = blr.run(recipe, LOSS, diagonal_start(), STEPS, batch=BATCH, generator=generator(5))
        found.append(along(path, expected))
    return max(found)


def textbook_vogn(indices, lr, beta, momentum=0.0, noise=None) -> tuple[np.ndarray, np.ndarray]:
    """Means and precisions N(s + δ) in the scale of one example; noise None evaluates at m."""
    delta = DELTA / N
    m, s, ball = np.zeros(P), np.full(P, 0.2), np.zeros(P)
    means, precisions = [], []
    for t, B in enumerate(indices):
        thetas = [m] if noise is None else m + noise[t] / np.sqrt(N * (s + delta))
        g_hat, h_hat = np.zeros(P), np.zeros(P)
        for theta in thetas:
            G = X[B] * (scipy.special.expit(X[B] @ theta) - Y[B])[:, None]
            g_hat += G.mean(0) / len(thetas)
            h_hat += (G**2).mean(0) / len(thetas)
        ball = momentum * ball + g_hat + delta * m
        s = (1 - beta) * s + beta * h_hat
        m = m - lr * ball / (s + delta)
        means.append(m)
        precisions.append(N * (s + delta))
    return np.array(means), np.array(precisions)


def against_vogn(path, means, precisions) -> float:
    path = list(path)
    found = [along(path, means)]
    found += [relative(q.precision, s) for q, s in zip(path, precisions, strict=True)]
    return max(found)


def ogn(row) -> float:
    expected = textbook_vogn(batches(6), lr=0.05, beta=0.1)
    start = diagonal_start(N * 0.2 + DELTA)
    recipe = row.build(lr=0.05, beta=0.1)
    path = blr.run(recipe, LOSS, start, STEPS, batch=BATCH, generator=generator(6))
    return against_vogn(path, *expected)


def vogn(row) -> float:
    found = []
    for S, momentum in ((1, 0.0), (3, 0.8)):
        source = generator(8)
        noise = [torch.randn((S, P), dtype=torch.float64, generator=source) for _ in range(STEPS)]
        lr = 0.05 * (1 - momentum)  # the textbook's momentum adds gradients, ours averages them
        means = textbook_vogn(batches(7), lr, 0.1, momentum, [n.numpy() for n in noise])
        recipe = row.build(
            lr=0.05, beta=0.1, momentum=momentum, num_samples=S, generator=generator(8)
        )
        start = diagonal_start(N * 0.2 + DELTA)
        path = blr.run(recipe, LOSS, start, STEPS, batch=BATCH, generator=generator(7))
        found.append(against_vogn(path, *means))
    return max(found)


def conjugate_bayes(row) -> float:
    found = []

    def step(expected_loss, start):
        (q,) = blr.run(row.build(), expected_loss, start, 1)
        return q

    # Beta prior (1.5, 2.5), y ones in n trials: Beta(1.5 + y, 2.5 + n − y).
    q = step(
        lambda mu: -((0.5 + 9) * mu[0] + (1.5 + 4) * mu[1]), blr.Beta.from_concentrations(30.0, 0.1)
    )
    found.append(relative(torch.stack([q.a, q.b]), [1.5 + 9, 2.5 + 4]))
    # Gamma prior (2, 3), counts with rate θ: Gamma(2 + Σy, 3 + n).
    counts = [3.0, 0.0, 7.0, 2.0]
    q = step(
        lambda mu: -((2 - 1 + sum(counts)) * mu[0] - (3 + len(counts)) * mu[1]),
        blr.Gamma.from_shape_rate(50.0, 0.5),
    )
    found.append(relative(torch.stack([q.shape, q.rate]), [2 + sum(counts), 3.0 + len(counts)]))
    # Linear regression with prior N(0, 1/4) and noise variance 1/2: S = 4 + 2XᵀX, m = S⁻¹2XᵀY.
    x, y = torch.tensor(X[:40, :5]), torch.tensor(X[:40, 7])

    def expected_loss(mu):
        m, second = mu
        errors = y @ y - 2 * (x.T @ y) @ m + torch.trace(x.T @ x @ second)
        return 0.5 * errors / 0.5 + 0.5 * 4 * torch.trace(second)

    S = 4 * np.eye(5) + 2 * (x.T @ x).numpy()
    m = np.linalg.solve(S, 2 * (x.T @ y).numpy())
    start = blr.Gaussian.from_moments([3.0, -1.0, 2.0, 0.5, 9.0], 1e3 * torch.eye(5).double())
    q = step(expected_loss, start)
    return max(*found, relative(q.mean, m), relative(q.precision, S))


ORACLES = {
    "Gradient descent": gradient_descent,
    "Newton": newton,
    "SGD": sgd,
    "RMSprop": rmsprop,
    "Adam": adam,
    "OGN": ogn,
    "VOGN": vogn,
    "Laplace": laplace,
    "Conjugate Bayes": conjugate_bayes,
}
TOLERANCE = {"Laplace": 1e-8}  # scikit-learn's own stopping rule


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


# ---- what the rows are known for ----------------------------------------------------------------


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

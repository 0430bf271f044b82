"""Gradient descent, SGD, Newton, Laplace and conjugate Bayes."""

import numpy as np
import torch

import blr
from oracles.problem import (
    BATCH,
    LOSS,
    STEPS,
    P,
    X,
    along,
    batches,
    fixed_start,
    full_start,
    generator,
    gradient_and_hessian,
    minimum,
    relative,
    torch_optimizer,
)


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
    "SGD": sgd,
    "Newton": newton,
    "Laplace": laplace,
    "Conjugate Bayes": conjugate_bayes,
}
TOLERANCE = {"Laplace": 1e-8}  # scikit-learn's own stopping rule

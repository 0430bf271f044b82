"""Logistic regression on breast cancer, and what several oracles share.

An oracle gets a row of the table and returns the largest deviation that it finds, relative to the
size of what is compared.
"""

import numpy as np
import scipy.special
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression

import blr
from blr.likelihoods import TotalLoss, linear, logistic

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


def torch_optimizer(make, steps: int, indices=None, prior_precision=DELTA) -> list[torch.Tensor]:
    """θ after each step of an optimizer of torch on the (reweighted) total loss."""
    theta = torch.nn.Parameter(torch.zeros(P, dtype=torch.float64))
    optimizer, path = make([theta]), []
    for t in range(steps):
        B = slice(None) if indices is None else indices[t]
        x, y = torch.tensor(X)[B], torch.tensor(Y)[B]
        optimizer.zero_grad()
        nll = torch.nn.functional.binary_cross_entropy_with_logits(x @ theta, y, reduction="sum")
        (N / len(y) * nll + 0.5 * prior_precision * theta.square().sum()).backward()
        optimizer.step()
        path.append(theta.detach().clone())
    return path


def relative(actual, expected) -> float:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all(), "max() would pass over a NaN"
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

"""RMSprop and Adam against torch.optim; OGN and VOGN in their textbook form."""

import numpy as np
import scipy.special
import torch

import blr
from oracles.problem import (
    BATCH,
    DELTA,
    LOSS,
    STEPS,
    N,
    P,
    X,
    Y,
    along,
    batches,
    diagonal_start,
    generator,
    relative,
    torch_optimizer,
)


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


ORACLES = {
    "RMSprop": rmsprop,
    "Adam": adam,
    "OGN": ogn,
    "VOGN": vogn,
}
TOLERANCE: dict[str, float] = {}

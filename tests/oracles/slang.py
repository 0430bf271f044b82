"""SLANG against its recursion with dense matrices, step by step and with the same noise."""

import numpy as np
import scipy.linalg
import scipy.special
import torch

import blr
from blr.slang import gauss_newton_rows
from oracles.problem import BATCH, DELTA, LOSS, N, P, X, Y, batches, generator, relative


def dense(indices, noise, rank, lr, beta, momentum, newton) -> list[tuple[np.ndarray, np.ndarray]]:
    """Means and precisions; the low-rank part is cut by a full eigendecomposition."""
    m, low, d, ball, path = np.zeros(P), np.zeros((P, P)), np.full(P, 5.0), np.zeros(P), []
    for B, draws in zip(indices, noise, strict=True):
        w = N / len(B)
        scale = np.diag(d**-0.5)
        root = scale @ np.linalg.inv(scipy.linalg.sqrtm(np.eye(P) + scale @ low @ scale).real)
        g, outer = DELTA * m, np.zeros((P, P))
        for e in draws:
            p = scipy.special.expit(X[B] @ (m + root @ e))
            g = g + w / len(draws) * X[B].T @ (p - Y[B])
            c = p * (1 - p) if newton else (p - Y[B]) ** 2
            outer += w / len(draws) * X[B].T @ (X[B] * c[:, None])
        full = (1 - beta) * low + beta * outer
        values, vectors = np.linalg.eigh(full)
        top = vectors[:, P - rank :]
        low = (top * values[P - rank :]) @ top.T
        d = (1 - beta) * d + beta * DELTA + np.diag(full) - np.diag(low)
        ball = momentum * ball + (1 - momentum) * g
        m = m - lr * np.linalg.solve(low + np.diag(d), ball)
        path.append((m, low + np.diag(d)))
    return path


def slang(row) -> float:
    found = []
    for rank, S, momentum, newton in ((1, 1, 0.0, False), (4, 2, 0.8, False), (10, 1, 0.5, True)):
        source = generator(8)
        noise = [torch.randn((S, P), dtype=torch.float64, generator=source) for _ in range(40)]
        indices = batches(9, steps=40)
        expected = dense(indices, [e.numpy() for e in noise], rank, 0.03, 0.1, momentum, newton)
        settings = {"rows": gauss_newton_rows} if newton else {}
        recipe = row.build(
            rank,
            lr=0.03,
            beta=0.1,
            momentum=momentum,
            num_samples=S,
            generator=generator(8),
            **settings,
        )
        start = blr.LowRankGaussian.from_diagonal(torch.zeros(P).double(), 5.0)
        path = blr.run(recipe, LOSS, start, 40, batch=BATCH, generator=generator(9))
        for q, (m, precision) in zip(path, expected, strict=True):
            S_found = q.factor @ q.factor.T + torch.diag(q.diagonal)
            found += [relative(q.mean, m), relative(S_found, precision)]
    return max(found)


ORACLES = {"SLANG": slang}
TOLERANCE: dict[str, float] = {}

"""RMSprop and Adam against torch.optim, IVON against ivon-opt, the others as they are published."""

import dataclasses
import functools
import math
import unittest.mock

import ivon
import numpy as np
import scipy.special
import torch

import blr
from blr.gradients import at_mean, squared_batch_gradient
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


def published_vogn(
    indices, lr, beta, momentum=0.0, noise=None, temperature=1.0, damping=0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Osawa et al., algorithm 1: means, and precisions N(s + δ + γ), in the scale of one example.

    OGN is the same at m, where `noise` is missing.
    """
    delta = temperature * DELTA / N
    m, s, buffer = np.zeros(P), np.full(P, 0.2), np.zeros(P)
    means, precisions = [], []
    for t, B in enumerate(indices):
        sigma = 1 / np.sqrt(N * (s + delta + damping))
        thetas = [m] if noise is None else m + sigma * noise[t]
        g_hat, h_hat = np.zeros(P), np.zeros(P)
        for theta in thetas:
            G = X[B] * (scipy.special.expit(X[B] @ theta) - Y[B])[:, None]
            g_hat += G.mean(0) / len(thetas)
            h_hat += (G**2).mean(0) / len(thetas)
        buffer = momentum * buffer + g_hat + delta * m
        s = (1 - temperature * beta) * s + beta * h_hat
        m = m - lr * buffer / (s + delta + damping)
        means.append(m)
        precisions.append(N * (s + delta + damping))
    return np.array(means), np.array(precisions)


def along_both(path, means, precisions) -> float:
    """The largest deviation of the means and of the precisions along a path."""
    path = list(path)
    found = [along(path, means)]
    found += [relative(q.precision, s) for q, s in zip(path, precisions, strict=True)]
    return max(found)


def normals(seed: int, num_samples: int = 1) -> list[np.ndarray]:
    """What a posterior draws at each step from a generator with this seed."""
    source = generator(seed)
    draw = lambda: torch.randn((num_samples, P), dtype=torch.float64, generator=source)  # noqa: E731
    return [draw().numpy() for _ in range(STEPS)]


def ogn(row) -> float:
    expected = published_vogn(batches(6), lr=0.05, beta=0.1)
    start = diagonal_start(N * 0.2 + DELTA)
    recipe = row.build(lr=0.05, beta=0.1)
    path = blr.run(recipe, LOSS, start, STEPS, batch=BATCH, generator=generator(6))
    return along_both(path, *expected)


def vogn(row) -> float:
    found = []
    for S, momentum, T, gamma in ((1, 0.0, 1.0, 0.0), (3, 0.8, 1.0, 0.0), (2, 0.6, 0.3, 0.07)):
        lr = 0.05 * (1 - momentum)  # the published momentum adds gradients, ours averages them
        expected = published_vogn(batches(7), lr, 0.1, momentum, normals(8, S), T, gamma)
        recipe = row.build(0.05, 0.1, momentum, S, generator(8), T, N * gamma)
        loss = dataclasses.replace(LOSS, prior_precision=T * DELTA)
        start = diagonal_start(N * (0.2 + gamma) + T * DELTA)
        path = blr.run(recipe, loss, start, STEPS, batch=BATCH, generator=generator(7))
        found.append(along_both(path, *expected))
    return max(found)


def published_von(indices, lr, beta, noise) -> tuple[np.ndarray, np.ndarray]:
    """Khan et al., VON, in the scale of one example."""
    delta = DELTA / N
    m, s, means, precisions = np.zeros(P), np.full(P, 0.2), [], []
    for B, e in zip(indices, noise, strict=True):
        theta = m + e[0] / np.sqrt(N * (s + delta))
        p = scipy.special.expit(X[B] @ theta)
        g_hat = X[B].T @ (p - Y[B]) / len(B)
        s = (1 - beta) * s + beta * (p * (1 - p)) @ X[B] ** 2 / len(B)
        m = m - lr * (g_hat + delta * m) / (s + delta)
        means.append(m)
        precisions.append(N * (s + delta))
    return np.array(means), np.array(precisions)


def von(row) -> float:
    expected = published_von(batches(9), 0.05, 0.1, normals(10))
    recipe = row.build(lr=0.05, beta=0.1, generator=generator(10))
    start = diagonal_start(N * 0.2 + DELTA)
    path = blr.run(recipe, LOSS, start, STEPS, batch=BATCH, generator=generator(9))
    return along_both(path, *expected)


def published_vadam(indices, lr, betas, noise, debias=True) -> tuple[np.ndarray, np.ndarray]:
    """Khan et al., Vadam, in the scale of one example; Vprop has no momentum and no correction."""
    delta = DELTA / N
    m, s, average, means, precisions = np.zeros(P), np.zeros(P), np.zeros(P), [], []
    for t, (B, e) in enumerate(zip(indices, noise, strict=True), 1):
        theta = m + e[0] / np.sqrt(N * s + DELTA)
        g_hat = X[B].T @ (scipy.special.expit(X[B] @ theta) - Y[B]) / len(B)
        average = betas[0] * average + (1 - betas[0]) * (g_hat + delta * m)
        s = betas[1] * s + (1 - betas[1]) * g_hat**2
        first, second = (1 - betas[0] ** t, 1 - betas[1] ** t) if debias else (1, 1)
        m = m - lr * average / first / (np.sqrt(s / second) + delta)
        means.append(m)
        precisions.append(N * s + DELTA)
    return np.array(means), np.array(precisions)


def vprop(row) -> float:
    expected = published_vadam(batches(11), 0.01, (0.0, 0.9), normals(12), debias=False)
    recipe = row.build(lr=0.01, beta=0.1, generator=generator(12))
    start = diagonal_start(DELTA)
    path = blr.run(recipe, LOSS, start, STEPS, batch=BATCH, generator=generator(11))
    return along_both(path, *expected)


def vadam(row) -> float:
    found = []
    for betas in ((0.9, 0.999), (0.6, 0.95)):
        expected = published_vadam(batches(13), 0.02, betas, normals(14))
        recipe = row.build(lr=0.02, betas=betas, generator=generator(14))
        start = diagonal_start(DELTA)
        path = blr.run(recipe, LOSS, start, STEPS, batch=BATCH, generator=generator(13))
        found.append(along_both(path, *expected))
    return max(*found, vadam_without_noise(row))


def vadam_without_noise(row) -> float:
    """At the mean, and with no prior, Vadam must be Adam without ε."""
    flat = dataclasses.replace(LOSS, prior_precision=0.0)
    make = lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.9, 0.99), eps=0.0)  # noqa: E731
    expected = torch_optimizer(make, STEPS, batches(15), prior_precision=0.0)
    at_the_mean = functools.partial(at_mean, curvature=squared_batch_gradient)
    recipe = dataclasses.replace(row.build(0.02, (0.9, 0.99)), derivatives=at_the_mean)
    path = blr.run(recipe, flat, diagonal_start(), STEPS, batch=BATCH, generator=generator(15))
    return along(path, expected)


def public_ivon(indices, num_samples: int, rates, **options) -> tuple[list, list, list]:
    """Means, precisions and the noise of the package ivon-opt, which samples from torch's seed."""
    theta = torch.nn.Parameter(torch.zeros(P, dtype=torch.float64))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # the package keeps its state in the default dtype
    try:
        optimizer = ivon.IVON([theta], lr=1.0, mc_samples=num_samples, **options)
    finally:
        torch.set_default_dtype(default)
    group = optimizer.param_groups[0]
    means, precisions, noise = [], [], []
    with torch.random.fork_rng():
        for t, B in enumerate(indices):
            x, y = torch.tensor(X)[B], torch.tensor(Y)[B]
            group["lr"] = rates[t]
            noise.append([])
            for s in range(num_samples):
                torch.manual_seed(1000 * t + s)
                noise[-1].append(torch.randn(P, dtype=torch.float64))
                torch.manual_seed(1000 * t + s)
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    bce = torch.nn.functional.binary_cross_entropy_with_logits(x @ theta, y)
                    bce.backward()
            optimizer.step()
            means.append(theta.detach().clone())
            precisions.append(group["ess"] * (group["hess"] + group["weight_decay"]))
    return means, precisions, noise


IVON_OPTIONS = (
    {},
    {"S": 3, "wd": 0.02, "betas": (0.8, 0.95)},
    {"S": 2, "h0": 0.05, "clip_radius": 0.05, "betas": (0.9, 0.9), "schedule": True},
    {"debias": False, "rescale_lr": False, "betas": (0.5, 0.99), "h0": 0.7},
    {"ess": 4.0 * N, "S": 2, "betas": (0.0, 0.9), "rescale_lr": False, "lr": 0.05},
    {"wd": 0.0, "betas": (0.9, 0.999), "h0": 0.4, "clip_radius": 0.3, "lr": 2.0},
)


def ivon_with(
    row, lr=0.5, S=1, betas=(0.9, 0.99), wd=DELTA / N, h0=0.2, ess=float(N), schedule=False,
    rescale_lr=True, clip_radius=math.inf, debias=True,
) -> float:  # fmt: skip
    """The recipe with an option set of the package, whose scale is that of one example."""
    rates = [lr / (1 + 0.1 * t) if schedule else lr for t in range(STEPS)]
    means, precisions, noise = public_ivon(
        batches(16), S, rates, ess=ess, hess_init=h0, beta1=betas[0], beta2=betas[1],
        weight_decay=wd, clip_radius=clip_radius, debias=debias, rescale_lr=rescale_lr,
    )  # fmt: skip
    loss = dataclasses.replace(LOSS, prior_precision=ess * wd, num_data=int(ess))
    scale = h0 + wd if rescale_lr else 1.0
    recipe = row.build(lambda t: scale * rates[t - 1], betas, clip_radius, debias, S)
    draws = iter(noise)

    def derivatives(loss, q):
        """The recipe's own, on samples made of the noise that the package drew."""
        draw = lambda *_: q.mean + torch.stack(next(draws)) / q.precision.sqrt()  # noqa: E731
        with unittest.mock.patch.object(type(q), "sample", draw):
            return recipe.derivatives(loss, q)

    path = blr.run(
        dataclasses.replace(recipe, derivatives=derivatives),
        loss, diagonal_start(ess * (h0 + wd)), STEPS, batch=BATCH, generator=generator(16),
    )  # fmt: skip
    return along_both(path, means, precisions)


def ivon_public(row) -> float:
    return max(ivon_with(row, **options) for options in IVON_OPTIONS)


ORACLES = {
    "RMSprop": rmsprop,
    "Adam": adam,
    "OGN": ogn,
    "VOGN": vogn,
    "VON": von,
    "Vprop": vprop,
    "Vadam": vadam,
    "IVON": ivon_public,
}
TOLERANCE: dict[str, float] = {}

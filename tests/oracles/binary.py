"""STE against torch.optim.SGD on latent weights; BayesBiNN as its paper writes it, by NumPy."""

import numpy as np
import scipy.special
import torch

import blr
from blr.likelihoods import TotalLoss, linear, logistic
from oracles.problem import BATCH, STEPS, N, P, X, Y, batches, generator, relative

SCALED = X / np.sqrt(P)
LOSS = TotalLoss(linear, logistic, torch.tensor(SCALED), torch.tensor(Y))
START = (torch.arange(P).double() - P // 2) / P  # the middle one is zero


def start() -> blr.SignBernoulli:
    return blr.SignBernoulli(natural=START)


class Sign(torch.autograd.Function):
    """Signs forward, the identity backward."""

    @staticmethod
    def forward(ctx, x):
        return torch.where(x >= 0, 1.0, -1.0).double()

    @staticmethod
    def backward(ctx, slope):
        return slope


def latent_sgd(lr, weight_decay, momentum, indices) -> list[torch.Tensor]:
    latent = torch.nn.Parameter(START.clone())
    optimizer = torch.optim.SGD([latent], lr=lr, weight_decay=weight_decay, momentum=momentum)
    path = []
    for B in indices:
        optimizer.zero_grad()
        f, y = torch.tensor(SCALED)[B] @ Sign.apply(latent), torch.tensor(Y)[B]
        nll = torch.nn.functional.binary_cross_entropy_with_logits(f, y, reduction="sum")
        (N / len(y) * nll).backward()
        optimizer.step()
        path.append(latent.detach().clone())
    return path


def along(path, expected) -> float:
    path = list(path)
    assert len(path) == len(expected) and all(np.isfinite(np.asarray(e)).all() for e in expected)
    return max(relative(q.natural, lam) for q, lam in zip(path, expected, strict=True))


def ste(row) -> float:
    found = []
    for T, gamma in ((0.0, 0.0), (1.0, 0.0), (1.0, 0.9)):
        expected = latent_sgd(2e-3, T, gamma, batches(11))
        recipe = row.build(lr=2e-3, temperature=T, momentum=gamma)
        path = blr.run(recipe, LOSS, start(), STEPS, batch=BATCH, generator=generator(11))
        found.append(along(path, expected))
    return max(found)


def paper(indices, uniforms, rate, tau, beta, prior) -> list[np.ndarray]:
    """Meng, Bachmann & Khan: a mean over examples and samples, N times, momentum, correction."""
    lam, ball, path = START.numpy(), np.zeros(P), []
    for t, (B, u) in enumerate(zip(indices, uniforms, strict=True), 1):
        g = np.zeros(P)
        for u_s in u:
            w = np.tanh((lam + 0.5 * np.log(u_s / (1 - u_s))) / tau)
            scale = (1 - w**2) / (tau * (1 - np.tanh(lam) ** 2))
            g += scale * (SCALED[B].T @ (scipy.special.expit(SCALED[B] @ w) - Y[B])) / len(B)
        ball = beta * ball + (1 - beta) * (N * g / len(u) + lam - prior)
        lam = lam - rate(t) * ball / (1 - beta**t)
        path.append(lam)
    return path


def bayesbinn(row) -> float:
    found, earlier = [], np.sin(np.arange(P))
    for S, tau, beta, prior in ((1, 1.0, 0.0, None), (3, 0.5, 0.9, earlier), (2, 0.1, 0.6, None)):
        source = generator(12)
        u = [torch.rand((S, P), dtype=torch.float64, generator=source) for _ in range(STEPS)]
        u = [x.numpy() for x in u]
        rate = lambda t: 1e-3 / (1 + 0.1 * t)  # noqa: E731
        expected = paper(batches(13), u, rate, tau, beta, np.zeros(P) if prior is None else prior)
        recipe = row.build(
            lr=rate,
            relaxation=tau,
            num_samples=S,
            beta=beta,
            prior=None if prior is None else blr.SignBernoulli(natural=torch.tensor(prior)),
            generator=generator(12),
        )
        path = blr.run(recipe, LOSS, start(), STEPS, batch=BATCH, generator=generator(13))
        found.append(along(path, expected))
    return max(found)


ORACLES = {
    "STE": ste,
    "BayesBiNN": bayesbinn,
}
TOLERANCE: dict[str, float] = {}

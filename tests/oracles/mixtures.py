"""Multimodal optimisation, dropout, and mixtures as approximations of posteriors."""

import math

import numpy as np
import scipy.optimize
import scipy.special
import torch

import blr
from blr.likelihoods import TotalLoss, from_module, logistic
from oracles.problem import N, P, X, Y, batches, generator, relative

# ---- the mixture rule, written out in NumPy -----------------------------------------------------


def log_normals(theta, m, S):
    """log N(θ; m_k, S_k⁻¹) of points (n, D): shape (n, K)."""
    d = theta[:, None] - m
    quadratic = np.einsum("nki,kij,nkj->nk", d, S, d)
    return 0.5 * (np.linalg.slogdet(S)[1] - m.shape[-1] * math.log(2 * math.pi) - quadratic)


def log_mixture(theta, pi, m, S):
    """log q with its gradient and Hessian, at points (n, D), from responsibilities."""
    joint = np.log(pi) + log_normals(theta, m, S)
    log_q = scipy.special.logsumexp(joint, axis=1)
    r, pulls = np.exp(joint - log_q[:, None]), np.einsum("kij,nkj->nki", S, theta[:, None] - m)
    g = -np.einsum("nk,nki->ni", r, pulls)
    H = np.einsum("nk,nki,nkj->nij", r, pulls, pulls) - np.einsum("nk,kij->nij", r, S)
    return log_q, g, H - g[:, :, None] * g[:, None, :]


def step(pi, m, S, loss, thetas, rho, weight_rho, improved):
    """One step with the points `thetas`, (n, D) for each component; loss gives ℓ̄, ∇ℓ̄, ∇²ℓ̄."""
    new_m, new_S, c = np.empty_like(m), np.empty_like(S), np.empty(len(pi))
    for k, theta in enumerate(thetas):
        sums = [a + b for a, b in zip(loss(theta), log_mixture(theta, pi, m, S), strict=True)]
        c[k], g, H = (x.mean(0) for x in sums)
        if improved:
            A = S[k] + rho * H
            new_S[k] = 0.5 * (S[k] + A @ np.linalg.solve(S[k], A))
            new_m[k] = m[k] - rho * np.linalg.solve(S[k], g)
        else:
            new_S[k] = S[k] + rho * H
            new_m[k] = m[k] - rho * np.linalg.solve(new_S[k], g)
    log_pi = np.log(pi) - weight_rho * c
    return np.exp(log_pi - scipy.special.logsumexp(log_pi)), new_m, new_S


def deviation(q, pi, m, S) -> float:
    K, D = m.shape
    return max(
        relative(q.weights, pi),
        relative(q.components.mean, m),
        relative(q.components.precision.reshape(K, D, D), S),
    )


# ---- multimodal optimisation --------------------------------------------------------------------


def wells(theta: torch.Tensor) -> torch.Tensor:
    """Three wells in the first coordinate; the second follows it."""
    a, b = theta[..., 0], theta[..., 1]
    return 0.15 * a**2 - 2 * torch.cos(2 * a) + 0.2 * a + 1.5 * (b - 0.5 * a) ** 2


def wells_derivatives(theta):
    a, b = theta.T
    e = b - 0.5 * a
    value = 0.15 * a**2 - 2 * np.cos(2 * a) + 0.2 * a + 1.5 * e**2
    g = np.stack([0.3 * a + 4 * np.sin(2 * a) + 0.2 - 1.5 * e, 3 * e], 1)
    one = np.ones_like(a)
    H = np.array([[0.3 + 8 * np.cos(2 * a) + 0.75, -1.5 * one], [-1.5 * one, 3 * one]])
    return value, g, np.moveaxis(H, -1, 0)


def multimodal(row) -> float:
    m, pi = np.array([[-2.5, 0.4], [0.3, 0.7], [2.6, 0.2]]), np.array([0.5, 0.2, 0.3])
    S = np.stack([2.0 * np.eye(2)] * 3)
    start = blr.Mixture.from_components(blr.Gaussian.from_moments(m, S), pi)
    found = []
    for weight_rate in (0.0, 0.5):
        mine = pi, m, S
        for q in blr.run(row.build(lr=0.1, weight_rate=weight_rate), wells, start, 40):
            rho = 0.1, 0.1 * weight_rate
            mine = step(*mine, wells_derivatives, mine[1][:, None], *rho, improved=False)
            found.append(deviation(q, *mine))
    *_, q = blr.run(row.build(lr=0.2), wells, start, 400, tolerance=1e-14)
    slope = lambda a: 0.3 * a + 4 * math.sin(2 * a) + 0.2  # noqa: E731
    roots = [scipy.optimize.brentq(slope, a - 0.6, a + 0.6, xtol=1e-15) for a in (-3, 0, 3)]
    minima = np.array([[a, 0.5 * a] for a in roots])
    # So far apart, the components do not feel each other: each finds its own minimum.
    assert relative(q.components.mean, minima) < 1e-10
    assert relative(q.components.precision, wells_derivatives(minima)[2]) < 1e-10
    return max(found)


# ---- dropout ------------------------------------------------------------------------------------


class Shared(torch.nn.Module):
    """A network whose masks hold for all examples of a minibatch: dropout of ones, then times."""

    def __init__(self, dropped: bool) -> None:
        super().__init__()
        self.first = torch.nn.Linear(P, 5)
        self.second = torch.nn.Linear(5, 4)
        self.last = torch.nn.Linear(4, 1)
        self.drops = torch.nn.ModuleList([torch.nn.Dropout(0.3) for _ in range(2 * dropped)])

    def forward(self, x):
        keep = [d(torch.ones(n)) for d, n in zip(self.drops, (5, 4), strict=False)] or [1.0, 1.0]
        hidden = torch.tanh(self.first(x)) * keep[0]
        return self.last(torch.tanh(self.second(hidden)) * keep[1])


def usual(dropped: bool) -> torch.nn.Module:
    """The usual layers, where each example of a minibatch has a mask of its own."""
    drop = [torch.nn.Dropout(0.3)] * dropped
    return torch.nn.Sequential(torch.nn.Linear(P, 6), torch.nn.Tanh(), *drop, torch.nn.Linear(6, 1))


def units(net: torch.nn.Module) -> torch.Tensor:
    """The unit that each parameter leaves: columns of the weights behind a dropout, counted on."""
    index, count = [], 0
    for name, p in net.named_parameters():
        behind = p.ndim == 2 and name not in ("first.weight", "0.weight")
        each = torch.arange(p.shape[-1]) + count if behind else torch.tensor(-1)
        count += p.shape[-1] if behind else 0
        index.append(each.expand(p.shape).reshape(-1))
    return torch.cat(index)


def dropout(row) -> float:
    return max(against_torch(row, Shared, 64, 1e-3), against_torch(row, usual, 1, 1e-4))


def against_torch(row, build, batch: int, alpha: float) -> float:
    pi, steps = 0.7, 40
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            net = build(True)
            plain = build(False)
            # Names differ where a layer of dropout counts; the order does not.
            for mine, other in zip(plain.parameters(), net.parameters(), strict=True):
                mine.data.copy_(other.data)
            model, W = from_module(plain)
            path, masks = torch_dropout(net, batches(9, steps, batch), alpha)
    finally:
        torch.set_default_dtype(torch.float32)
    unit = units(plain)
    drops = unit >= 0
    # W = πm behind a dropout; α/π there is the rate, and α elsewhere.
    m, s = torch.where(drops, W / pi, W), torch.where(drops, torch.ones_like(W), 1 / pi)
    q = blr.SpikeAndSlab.from_moments(m, s, unit, keep=pi)
    loss = TotalLoss(model, logistic, torch.tensor(X), torch.tensor(Y))
    recipe = row.build(lr=alpha / pi, indicators=masks)
    found = blr.run(recipe, loss, q, steps, batch=batch, generator=generator(9))
    return max(relative(q.mean, w) for q, w in zip(found, path, strict=True))


def torch_dropout(net, indices, alpha: float):
    """Weights after each step of SGD, and the masks that nn.Dropout drew."""
    drawn: list[torch.Tensor] = []
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(
                lambda _, x, y: drawn.append((y != 0).double().reshape(-1))
            )
    optimizer, path, masks = torch.optim.SGD(net.parameters(), lr=alpha), [], []
    for B in indices:
        drawn.clear()
        optimizer.zero_grad()
        f, y = net(torch.tensor(X)[B]).squeeze(-1), torch.tensor(Y)[B]
        nll = torch.nn.functional.binary_cross_entropy_with_logits(f, y, reduction="sum")
        (N / len(B) * nll).backward()
        optimizer.step()
        path.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
        masks.append(torch.cat(drawn))
    return path, masks


# ---- mixtures as approximations -----------------------------------------------------------------


def product(theta: torch.Tensor) -> torch.Tensor:
    """−log posterior of y = θ₁θ₂ + noise with a Gaussian prior: two modes, from the signs."""
    return 0.5 * (1.5 - theta.prod(-1)) ** 2 / 0.09 + 0.5 * (theta**2).sum(-1)


def product_derivatives(theta):
    a, b = theta.T
    e, v = 1.5 - a * b, 0.09
    value = 0.5 * e**2 / v + 0.5 * (a**2 + b**2)
    off = (a * b - e) / v
    H = np.array([[b**2 / v + 1, off], [off, a**2 / v + 1]])
    return value, np.stack([a - e * b / v, b - e * a / v], 1), np.moveaxis(H, -1, 0)


def recursion(row) -> float:
    """The improved rule with the same noise, step by step."""
    m = np.array([[1.0, 0.8], [-0.9, -1.4], [0.4, 1.9]])
    S = np.stack([3.0 * np.eye(2) + 0.5 * k * np.ones((2, 2)) for k in range(3)])
    pi, found = np.array([0.2, 0.5, 0.3]), []
    start = blr.Mixture.from_components(blr.Gaussian.from_moments(m, S), pi)
    recipe = row.build(lr=0.05, weight_rate=0.4, num_samples=7, generator=generator(3))
    source = generator(3)
    for q in blr.run(recipe, product, start, 25):
        noise = torch.randn((7, 3, 2), dtype=torch.float64, generator=source).numpy()
        L = np.linalg.cholesky(S)
        thetas = [m[k] + np.linalg.solve(L[k].T, noise[:, k].T).T for k in range(3)]
        pi, m, S = step(pi, m, S, product_derivatives, thetas, 0.05, 0.05 * 0.4, improved=True)
        found.append(deviation(q, pi, m, S))
    return max(found)


def closed_form(row) -> float:
    """A prior that is a mixture, and a Gaussian likelihood: the posterior is a mixture as well."""
    x, y = 0.3 * X[:6, :2], 0.3 * X[:6, 7]
    w, m0 = np.array([0.8, 0.2]), np.array([[-2.5, 2.5], [2.5, -2.0]])
    S0 = np.array([[[2.0, 0.3], [0.3, 1.0]], [[1.0, -0.2], [-0.2, 3.0]]])
    S = S0 + x.T @ x
    m = np.stack([np.linalg.solve(S[k], S0[k] @ m0[k] + x.T @ y) for k in range(2)])
    cov = [np.eye(6) + x @ np.linalg.solve(S0[k], x.T) for k in range(2)]
    gaps = [y - x @ m0[k] for k in range(2)]
    log_w = np.log(w) - 0.5 * np.array(
        [
            np.linalg.slogdet(C)[1] + e @ np.linalg.solve(C, e)
            for C, e in zip(cov, gaps, strict=True)
        ]
    )
    pi = np.exp(log_w - scipy.special.logsumexp(log_w))
    prior = blr.Mixture.from_components(blr.Gaussian.from_moments(m0, S0), w)

    def loss(theta):
        e = torch.tensor(y) - torch.tensor(x) @ theta
        return 0.5 * e @ e - prior.log_prob(theta)

    recipe = row.build(lr=0.2, weight_rate=1.0, num_samples=10, generator=generator(0))
    *_, q = blr.run(recipe, loss, prior, 400, tolerance=1e-14)
    return deviation(q, pi, m, S)


def divergence_by_quadrature(loss, q, low=-4.5, high=4.5, nodes=901) -> float:
    """KL(q‖p) in two dimensions, p ∝ exp(−ℓ̄), on a fine grid."""
    a = np.linspace(low, high, nodes)
    grid = torch.tensor(np.stack(np.meshgrid(a, a, indexing="ij"), -1).reshape(-1, 2))
    cell = (a[1] - a[0]) ** 2
    value = loss(grid).numpy()
    log_Z = scipy.special.logsumexp(-value) + math.log(cell)
    log_q = q.log_prob(grid).numpy()
    assert abs(np.exp(log_q).sum() * cell - 1) < 1e-6
    return float((np.exp(log_q) * (log_q + value + log_Z)).sum() * cell)


def nonconjugate_vi(row) -> float:
    found = max(recursion(row), closed_form(row))
    # A posterior with two bent modes, which no mixture of Gaussians has: closer with more of them.
    divergences = []
    for K in (1, 2, 4):
        side = torch.tensor([1.0, -1.0, 1.0, -1.0])[:K, None].double()
        start = side * torch.tensor([[1.5, 1.0], [1.5, 1.0], [0.8, 1.7], [0.8, 1.7]]).double()[:K]
        q = blr.Mixture.from_components(
            blr.Gaussian.from_moments(start, 8 * torch.eye(2).double().expand(K, 2, 2))
        )
        recipe = row.build(lr=lambda t: 2 / (20 + t), num_samples=10, generator=generator(1))
        *_, q = blr.run(recipe, product, q, 200)
        divergences.append(divergence_by_quadrature(product, q))
    assert divergences[0] > math.log(2)  # one Gaussian covers one mode
    assert divergences[1] < divergences[0] - 0.9 * math.log(2)
    assert divergences[2] < 0.5 * divergences[1]
    return found


ORACLES = {
    "Multimodal optimisation": multimodal,
    "Dropout": dropout,
    "Non-conjugate VI": nonconjugate_vi,
}
TOLERANCE: dict[str, float] = {}

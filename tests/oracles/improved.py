"""The improved rule where losses are not convex: the paper's recursion, and SciPy's optimum.

Gaussians: regression with Cauchy noise and outliers. Gamma: the rate of Poisson counts with a
log-normal prior.
"""

import numpy as np
import scipy.optimize
import torch
from scipy.special import digamma, gammaln, polygamma

import blr
from blr.likelihoods import TotalLoss, linear
from oracles.problem import relative

DELTA = 0.1
rng = np.random.default_rng(0)
X = np.column_stack([np.ones(15), rng.normal(size=(15, 2))])
Y = X @ [0.5, 1.0, -2.0] + 0.3 * rng.normal(size=15)
Y[:4] += [7.0, -9.0, 8.0, 6.0]
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(100)
WEIGHTS /= WEIGHTS.sum()
LOSS = TotalLoss(
    linear,
    lambda f, y: torch.log1p((y - f) ** 2),
    torch.tensor(X),
    torch.tensor(Y),
    prior_precision=DELTA,
)


# ---- Gaussians ----------------------------------------------------------------------------------


def gradient_and_hessian(theta) -> tuple[np.ndarray, np.ndarray]:
    r = Y - X @ theta
    slope, bend = -2 * r / (1 + r**2), 2 * (1 - r**2) / (1 + r**2) ** 2
    return X.T @ slope + DELTA * theta, X.T @ (X * bend[:, None]) + DELTA * np.eye(3)


def recursion(m, S, rho: float, steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """S − ρG + ½ρ²GS⁻¹G and m − ρS⁻¹g with the old S, as the paper prints them."""
    path = []
    for _ in range(steps):
        g, H = gradient_and_hessian(m)
        if S.ndim == 2:
            G, inverse = S - H, np.linalg.inv(S)
            m, S = m - rho * inverse @ g, S - rho * G + 0.5 * rho**2 * G @ inverse @ G
        else:
            G = S - np.diag(H)
            m, S = m - rho * g / S, S - rho * G + 0.5 * rho**2 * G**2 / S
        path.append((m, S))
    return path


def negative_elbo(m, V) -> float:
    """E_q[ℓ̄] − H(q) by quadrature, up to a constant; each ℓᵢ depends on one Gaussian number."""
    f = (X @ m)[:, None] + np.sqrt(np.einsum("np,pq,nq->n", X, V, X))[:, None] * NODES
    prior = 0.5 * DELTA * (m @ m + np.trace(V))
    return (np.log1p((Y[:, None] - f) ** 2) @ WEIGHTS).sum() + prior - np.linalg.slogdet(V)[1] / 2


def expected_loss(full: bool):
    """E_q[ℓ̄] as a function of μ, for `exact`."""
    x, y, z, w = (torch.tensor(v) for v in (X, Y, NODES, WEIGHTS))

    def expected(mu):
        m, second = mu
        V = second - torch.outer(m, m) if full else torch.diag(second - m**2)
        f = (x @ m)[:, None] + ((x @ V) * x).sum(1).sqrt()[:, None] * z
        data = (torch.log1p((y[:, None] - f) ** 2) @ w).sum()
        return data + 0.5 * DELTA * (m @ m + torch.trace(V))

    return expected


def start(full: bool):
    m = torch.tensor([0.0, 0.5, -0.5]).double()
    if full:
        return blr.Gaussian.from_moments(m, 4 * torch.eye(3).double())
    return blr.DiagonalGaussian.from_moments(m, 4.0)


def gaussian(row, full: bool) -> float:
    found = []
    for rho in (0.2, 1.0, 3.0):
        q0, steps = start(full), 30 if rho < 1 else 3
        expected = recursion(q0.mean.numpy(), q0.precision.numpy(), rho, steps)
        for q, (m, S) in zip(blr.run(row.build(rho), LOSS, q0, steps), expected, strict=True):
            found += [relative(q.mean, m), relative(q.precision, S)]
    assert optimum_gap(row, full) < 1e-6
    return max(found)


def optimum_gap(row, full: bool) -> float:
    """How far the rule at rest is from SciPy's minimum of the negative ELBO."""
    recipe = row.build(lr=0.3, gradient=blr.gradients.exact)
    *_, q = blr.run(recipe, expected_loss(full), start(full), 500, tolerance=1e-11)
    V = q.covariance.numpy() if full else np.diag(q.variance.numpy())
    below = np.tril_indices(3) if full else np.diag_indices(3)

    def objective(p) -> float:
        L = np.zeros((3, 3))
        L[below] = p[3:]
        return negative_elbo(p[:3], L @ L.T)

    at = np.concatenate([q.mean.numpy() + 0.05, np.linalg.cholesky(V)[below] * 1.1])
    best = scipy.optimize.minimize(objective, at, options={"gtol": 1e-9, "maxiter": 500})
    assert abs(objective(best.x) - negative_elbo(q.mean.numpy(), V)) < 1e-9
    return relative(q.mean, best.x[:3])


# ---- gamma --------------------------------------------------------------------------------------

COUNTS = np.array([4.0, 0.0, 9.0])
SPREAD = 0.5


def gamma_objective(a: float, b: float) -> float:
    """E_q[ℓ̄] − H(q) for q = Gamma(a, b), in closed form: E log θ, E θ and E (log θ)² are known."""
    log_mean = digamma(a) - np.log(b)
    loss = len(COUNTS) * a / b - (COUNTS.sum() - 1) * log_mean
    loss += (polygamma(1, a) + log_mean**2) / (2 * SPREAD**2)
    return loss - (a - np.log(b) + gammaln(a) + (1 - a) * digamma(a))


def gamma_slopes(a: float, b: float) -> tuple[float, float]:
    """∂/∂a and ∂/∂b of the objective, by hand."""
    log_mean, psi1, psi2 = digamma(a) - np.log(b), polygamma(1, a), polygamma(2, a)
    by_log = -(COUNTS.sum() - 1) + log_mean / SPREAD**2
    by_a = len(COUNTS) / b + by_log * psi1 + psi2 / (2 * SPREAD**2) - (1 + (1 - a) * psi1)
    return by_a, -len(COUNTS) * a / b**2 - by_log / b + 1 / b


def gamma_step(a: float, b: float, rho: float) -> tuple[float, float]:
    """η ← η − ρF⁻¹∇ − ½ρ²Γ(F⁻¹∇)² in η = (a, b/a), where F is diagonal."""
    by_a, by_b = gamma_slopes(a, b)
    first, second = a, b / a
    n1 = (by_a + second * by_b) / (polygamma(1, a) - 1 / a)
    n2 = a * by_b / (a / second**2)
    gamma1 = (a * polygamma(2, a) + 1 / a) / (2 * (a * polygamma(1, a) - 1))
    first = first - rho * n1 - 0.5 * rho**2 * gamma1 * n1**2
    second = second - rho * n2 + 0.5 * rho**2 * n2**2 / second
    return first, first * second


def gamma_expected_loss(mu):
    """E_q[ℓ̄] as a function of μ = (E log θ, E θ)."""
    a = blr.Gamma.from_expectation(mu).shape
    squares = torch.polygamma(1, a) + mu[0] ** 2
    return len(COUNTS) * mu[1] - (COUNTS.sum() - 1) * mu[0] + squares / (2 * SPREAD**2)


def gamma_gradient(loss, q):
    """∇_μ of the same, by hand: torch differentiates digamma with nine digits only."""
    a, (mu1, mu2) = q.shape.numpy(), (mu.item() for mu in q.expectation())
    by_gap = polygamma(2, a) / (1 / a - polygamma(1, a))  # gap = log μ₂ − μ₁ = log a − ψ(a)
    by_mu1 = -(COUNTS.sum() - 1) + (2 * mu1 - by_gap) / (2 * SPREAD**2)
    by_mu2 = len(COUNTS) + by_gap / mu2 / (2 * SPREAD**2)
    return torch.tensor(by_mu1), torch.tensor(by_mu2)


def gamma(row) -> float:
    found = []
    q = blr.Gamma.from_shape_rate(1.5, 6.0)
    by_hand, automatic = gamma_gradient(None, q), blr.gradients.exact(gamma_expected_loss, q)
    assert relative(torch.stack(automatic), torch.stack(by_hand)) < 1e-8
    for rho, a, b, steps in ((0.1, 1.5, 6.0, 9), (0.5, 30.0, 2.0, 5), (5.0, 0.6, 0.3, 2)):
        q = blr.Gamma.from_shape_rate(a, b)
        path = blr.run(row.build(rho, gamma_gradient), None, q, steps)
        for q in path:
            a, b = gamma_step(a, b, rho)
            found.append(relative(torch.stack([q.shape, q.rate]), [a, b]))
    recipe = row.build(0.3, blr.gradients.exact)
    *_, q = blr.run(recipe, gamma_expected_loss, q, 500, tolerance=1e-13)
    best = scipy.optimize.minimize(
        lambda p: gamma_objective(*np.exp(p)), np.zeros(2), tol=1e-12, method="Nelder-Mead"
    )
    assert relative(torch.stack([q.shape, q.rate]), np.exp(best.x)) < 1e-5
    return max(found)


ORACLES = {
    "Improved rule, full covariance": lambda row: gaussian(row, full=True),
    "Improved rule, diagonal": lambda row: gaussian(row, full=False),
    "Improved rule, gamma": gamma,
}
TOLERANCE: dict[str, float] = {}

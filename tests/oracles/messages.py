"""EM, VMP, SVI and non-conjugate VMP, held against scikit-learn, NumPy and scipy's quadrature."""

import warnings

import numpy as np
import scipy.integrate
import scipy.optimize
import scipy.special
import torch
from sklearn.datasets import load_iris
from sklearn.decomposition import LatentDirichletAllocation
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture

import blr
from blr.expected import conjugate, expected_softplus, gaussian_mixture, topics
from oracles.problem import generator, relative

IRIS = load_iris().data
N, D = IRIS.shape
K = 3
ITERATIONS = 8
M_STEP = ("pi", "components")


def tensor(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x, dtype=float))


# ---- mixtures of Gaussians -----------------------------------------------------------------------


def mixture_start(means: np.ndarray, precision: np.ndarray) -> blr.Product:
    """Equal weights, and components whose modes are N(mean, precision⁻¹)."""
    components = blr.NormalWishart.from_parameters(means, 1.0, D + 1.0, precision)
    return blr.Product.from_factors(
        z=blr.Categorical(natural=torch.zeros(N, len(means) - 1).double()),
        pi=blr.Dirichlet.from_concentrations(torch.full((len(means),), 2.0).double()),
        components=components,
    )


def sklearn_em(means: np.ndarray, precision: np.ndarray, iterations: int) -> GaussianMixture:
    model = GaussianMixture(
        len(means),
        tol=0,
        reg_covar=0,
        max_iter=iterations,
        weights_init=np.full(len(means), 1 / len(means)),
        means_init=means,
        precisions_init=np.stack([precision] * len(means)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(IRIS)


def em(row) -> float:
    means = IRIS[np.random.default_rng(0).choice(N, K, False)]
    precision, found = np.linalg.inv(np.cov(IRIS.T)), []
    path = [mixture_start(means, precision)]
    path += blr.run(row.build(M_STEP), gaussian_mixture(IRIS, K), path[0], ITERATIONS)
    for n in range(1, ITERATIONS):
        model = sklearn_em(means, precision, n)
        m, Lambda = path[n]["components"].mode
        found += [
            relative(m, model.means_),
            relative(Lambda, model.precisions_),
            relative(path[n]["pi"].mode, model.weights_),
            relative(path[n + 1]["z"].probabilities, model.predict_proba(IRIS)),
        ]
    return max(*found, probabilistic_pca(row))


def pca_loss(X: np.ndarray, q: int, variance: float):
    """E_q[ℓ̄] of x = Wz + noise with z ~ N(0, I), W a point, of blocks z and W."""
    X = tensor(X)

    def expected_loss(mu):
        (z, zz), (w, _) = mu
        W = w.reshape(X.shape[1], q)
        fit = -2 * (X * (z @ W.T)).sum() + ((W.T @ W) * zz.sum(0)).sum()
        return 0.5 * fit / variance + 0.5 * torch.einsum("nii->", zz)

    return expected_loss


def probabilistic_pca(row, steps: int = 30) -> float:
    # The M-step is one step of Newton's method, which is exact: the loss is quadratic in W.
    X, q, variance = IRIS - IRIS.mean(0), 2, 0.05
    W = np.random.default_rng(1).normal(size=(D, q))
    eye = torch.eye(q).double()
    start = blr.Product.from_factors(
        z=blr.Gaussian.from_moments(torch.zeros(N, q).double(), eye.expand(N, q, q)),
        W=blr.Gaussian.from_moments(tensor(W).flatten(), torch.eye(D * q).double()),
    )
    recipe = row.build(("W",), gradients={"W": blr.gradients.delta})
    found = []
    for p in blr.run(recipe, pca_loss(X, q, variance), start, steps):
        M = W.T @ W + variance * np.eye(q)
        z = X @ W @ np.linalg.inv(M)
        zz = N * variance * np.linalg.inv(M) + z.T @ z
        W = X.T @ z @ np.linalg.inv(zz)
        found += [relative(p["W"].mean.reshape(D, q), W), relative(p["z"].mean, z)]
    return max(found)


PRIOR = {
    "weight_concentration_prior": 1.5,
    "mean_precision_prior": 0.7,
    "mean_prior": IRIS.mean(0),
    "degrees_of_freedom_prior": D + 1.5,
    "covariance_prior": 0.5 * np.eye(D),
}


def mixture_prior(classes: int = K) -> blr.Product:
    """The same prior as `PRIOR`; scikit-learn's covariance prior is W⁻¹."""
    pi = torch.full((classes,), PRIOR["weight_concentration_prior"]).double()
    return blr.Product.from_factors(
        pi=blr.Dirichlet.from_concentrations(pi),
        components=blr.NormalWishart.from_parameters(
            np.tile(PRIOR["mean_prior"], (classes, 1)),
            PRIOR["mean_precision_prior"],
            PRIOR["degrees_of_freedom_prior"],
            np.linalg.inv(PRIOR["covariance_prior"]),
        ),
    )


def sklearn_vb(iterations: int) -> BayesianGaussianMixture:
    model = BayesianGaussianMixture(
        n_components=K,
        weight_concentration_prior_type="dirichlet_distribution",
        tol=0,
        reg_covar=0,
        max_iter=iterations,
        init_params="random",
        random_state=3,
        **PRIOR,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(IRIS)


def left_out_of_the_bound() -> float:
    """What scikit-learn leaves out of its bound: constants of the model and of the prior."""
    alpha, kappa = PRIOR["weight_concentration_prior"], PRIOR["mean_precision_prior"]
    nu, V = PRIOR["degrees_of_freedom_prior"], PRIOR["covariance_prior"]
    log_gamma = scipy.special.gammaln
    log_dirichlet = K * log_gamma(alpha) - log_gamma(K * alpha)
    log_wishart = 0.5 * nu * (D * np.log(2) - np.linalg.slogdet(V)[1])
    log_wishart += log_gamma((nu - np.arange(D)) / 2).sum()
    # π^(D(D−1)/4) of Γ_D cancels between the prior and the posterior.
    log_components = K * (log_wishart - 0.5 * D * np.log(kappa))
    return -log_dirichlet - log_components - 0.5 * N * D * np.log(2 * np.pi)


def vb_start() -> tuple[blr.expected.ExpectedLoss, blr.Product]:
    """The loss, and the posterior from scikit-learn's random responsibilities."""
    R = np.random.RandomState(3).uniform(size=(N, K))
    prior = mixture_prior()
    start = blr.Product.from_factors(
        z=blr.Categorical.from_probabilities(R / R.sum(1, keepdims=True)),
        pi=prior["pi"],
        components=prior["components"],
    )
    loss = gaussian_mixture(IRIS, K, prior)
    (q,) = blr.run(blr.recipes.vmp((M_STEP,)), loss, start, 1)
    return loss, q


def vmp(row) -> float:
    loss, start = vb_start()
    path, found = list(blr.run(row.build(), loss, start, ITERATIONS)), []
    for n in range(1, ITERATIONS):
        model, q = sklearn_vb(n), path[n - 1]
        c, bound = q["components"], blr.messages.elbo(loss, q).numpy() - left_out_of_the_bound()
        found += [
            relative(c.mean, model.means_),
            relative(c.inverse_scale / c.dof[:, None, None], model.covariances_),
            relative(c.dof, model.degrees_of_freedom_),
            relative(c.mean_precision, model.mean_precision_),
            relative(q["pi"].concentrations, model.weight_concentration_),
            relative(path[n]["z"].probabilities, model.predict_proba(IRIS)),
            relative(bound, model.lower_bound_),
        ]
    return max(found)


# ---- topics --------------------------------------------------------------------------------------

TOPICS, WORDS, DOCUMENTS, BATCH, STEPS = 4, 60, 190, 50, 6
ALPHA, ETA, OFFSET, DECAY = 0.25, 0.1, 10.0, 0.7


def corpus() -> np.ndarray:
    rng = np.random.default_rng(0)
    beta = rng.dirichlet(np.full(WORDS, 0.1), TOPICS)
    documents = [rng.multinomial(80, rng.dirichlet(np.full(TOPICS, 0.3)) @ beta)]
    documents += [
        rng.multinomial(rng.integers(1, 120), rng.dirichlet(np.full(TOPICS, 0.3)) @ beta)
        for _ in range(DOCUMENTS - 1)
    ]
    return np.array(documents, dtype=float)


def topics_path(row) -> tuple[list[blr.Product], list[np.ndarray]]:
    """Our path from scikit-learn's random start, and the minibatches it has seen."""
    X, rng = corpus(), np.random.RandomState(0)
    beta = blr.Dirichlet.from_concentrations(rng.gamma(100.0, 0.01, (TOPICS, WORDS)))
    start = lambda n: blr.Dirichlet.from_concentrations(rng.gamma(100.0, 0.01, (n, TOPICS)))  # noqa: E731
    prior = blr.Dirichlet.from_concentrations(torch.full((TOPICS, WORDS), ETA, dtype=torch.float64))
    loss = topics(X, prior, ALPHA, start)
    recipe = row.build(blr.messages.robbins_monro(OFFSET, DECAY))
    q = blr.Product.from_factors(beta=beta)
    path = list(blr.run(recipe, loss, q, STEPS, batch=BATCH, generator=generator(4)))
    order, batches = generator(4), []
    while len(batches) < STEPS:
        batches += [X[B.numpy()] for B in torch.randperm(len(X), generator=order).split(BATCH)]
    return path, batches[:STEPS]


def svi(row) -> float:
    path, batches = topics_path(row)
    model = LatentDirichletAllocation(
        n_components=TOPICS,
        doc_topic_prior=ALPHA,
        topic_word_prior=ETA,
        learning_method="online",
        learning_offset=OFFSET,
        learning_decay=DECAY,
        batch_size=BATCH,
        total_samples=DOCUMENTS,
        random_state=0,
    )
    found = []
    for q, batch in zip(path, batches, strict=True):
        model.partial_fit(batch)
        found.append(relative(q["beta"].concentrations, model.components_))
    return max(found)


# ---- one logistic or Poisson observation ---------------------------------------------------------


def one_logistic(slope: float, variance: float):
    """E_q[ℓ̄] of one label 1 with logit aθ, θ ~ N(0, v)."""
    prior = conjugate(blr.Gaussian.from_moments([0.0], [[1 / variance]]))

    def expected_loss(mu):
        m, second = mu[0][0][0], mu[0][1][0, 0]
        return expected_softplus(-slope * m, slope**2 * (second - m**2)) + prior(mu[0])

    return expected_loss


def one_poisson(count: float):
    """E_q[ℓ̄] of one count with rate exp(θ), θ ~ N(0, 1)."""
    prior = conjugate(blr.Gaussian.from_moments([0.0], [[1.0]]))

    def expected_loss(mu):
        m, second = mu[0][0][0], mu[0][1][0, 0]
        return torch.exp(m + 0.5 * (second - m**2)) - count * m + prior(mu[0])

    return expected_loss


def start_1d(variance: float) -> blr.Product:
    return blr.Product.from_factors(theta=blr.Gaussian.from_moments([0.0], [[1 / variance]]))


def best_gaussian(expected, variance: float, start: float) -> np.ndarray:
    """(m, v) where E[ℓ′] + m/v₀ = 0 and 1/v = E[ℓ″] + 1/v₀, by a root finder on (m, log v).

    Args:
        expected: (E[ℓ′], E[ℓ″]) from (m, √v).
        variance: v₀ of the prior N(0, v₀).
        start: m to start from.
    """

    def gap(u):
        g, h = expected(u[0], np.exp(0.5 * u[1]))
        return [g + u[0] / variance, (h + 1 / variance) * np.exp(u[1]) - 1]

    found = scipy.optimize.root(gap, [start, np.log(variance) - 1], tol=1e-14)
    assert np.abs(gap(found.x)).max() < 1e-11
    return np.array([found.x[0], np.exp(found.x[1])])


def logistic_derivatives(a: float):
    """(E[ℓ′], E[ℓ″]) of ℓ(θ) = log(1 + exp(−aθ)), by Simpson's rule with many points."""
    noise = np.linspace(-12, 12, 20_001)
    density = np.exp(-0.5 * noise**2) / np.sqrt(2 * np.pi)

    def expected(m, s):
        p = scipy.special.expit(-a * (m + s * noise))
        values = np.stack([-a * p, a * a * p * (1 - p)]) * density
        return scipy.integrate.simpson(values, x=noise)

    return expected


def poisson_derivatives(count: float):
    return lambda m, s: (np.exp(m + s * s / 2) - count, np.exp(m + s * s / 2))


def ncvmp(row) -> float:
    found = []
    cases = [(2.0, 25.0, 4.0), (3.0, 25.0, 4.0), (5.0, 25.0, 4.0), (5.0, 100.0, 8.0)]
    for slope, variance, start in cases:
        loss = one_logistic(slope, variance)
        path = blr.run(row.build(lr=0.3), loss, start_1d(variance), 600, tolerance=1e-15)
        found.append(_gap(path, best_gaussian(logistic_derivatives(slope), variance, start)))
    for count in (1.0, 5.0, 100.0):
        path = blr.run(row.build(lr=0.1), one_poisson(count), start_1d(1.0), 900, tolerance=1e-15)
        found.append(_gap(path, best_gaussian(poisson_derivatives(count), 1.0, np.log(count))))
    return max(found)


def _gap(path, expected: np.ndarray) -> float:
    *_, q = path
    theta = q["theta"]
    return relative(torch.stack([theta.mean[0], theta.variance[0]]), expected)


ORACLES = {"EM": em, "VMP": vmp, "SVI": svi, "Non-conjugate VMP": ncvmp}
# scikit-learn approximates the digamma function, and stops each document by a threshold.
TOLERANCE = {"SVI": 1e-6}

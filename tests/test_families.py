"""Each family against scipy.stats, torch.distributions, quadrature and exact sums.

The laws that hold for every exponential family are in `test_laws.py`; here each family meets an
oracle that does not know that it is one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.integrate as integrate
import scipy.special as special
import scipy.stats as st
import torch

from blr import _tree
from blr.expfam import ExponentialFamily
from blr.families.bernoulli import Bernoulli
from blr.families.categorical import Categorical
from blr.families.dirichlet import Beta, Dirichlet
from blr.families.exponential import Exponential
from blr.families.fixed_gaussian import FixedGaussian
from blr.families.gamma import Gamma, InverseGamma
from blr.families.gaussian import DiagonalGaussian, Gaussian
from blr.families.normal_gamma import NormalGamma
from blr.families.normal_wishart import NormalWishart
from blr.families.poisson import Poisson
from blr.families.wishart import Wishart

M1, M2 = np.array([0.4, -0.2, 1.1]), np.array([-0.3, 0.5, 0.2])
S1 = np.array([[2.0, 0.5, -0.3], [0.5, 1.2, 0.1], [-0.3, 0.1, 0.8]])
S2 = np.array([[0.9, -0.2, 0.1], [-0.2, 1.5, 0.3], [0.1, 0.3, 2.2]])
POINTS = np.random.default_rng(3).normal(size=(5, 3))
MATRICES = st.wishart(6.0, S1).rvs(4, random_state=7)
SCALARS = np.array([1e-6, 0.02, 0.7, 3.3, 40.0])


def normal(m, S):
    return st.multivariate_normal(m, np.linalg.inv(S))


def gamma(a, b):
    return st.gamma(a, scale=1 / b)


def tensor_normal(m, S):
    return torch.distributions.MultivariateNormal(
        torch.as_tensor(m), precision_matrix=torch.as_tensor(S)
    )


def kl_of_normals(first, second) -> float:
    return torch.distributions.kl_divergence(tensor_normal(*first), tensor_normal(*second)).item()


def kl_by_quadrature(q, p, lower=0.0, upper=np.inf) -> float:
    middle = q.median()
    f = lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x))  # noqa: E731
    pieces = ((lower, middle), (middle, upper))
    return sum(integrate.quad(f, *ab, epsabs=1e-13, epsrel=1e-12, limit=400)[0] for ab in pieces)


def kl_by_sum(q: np.ndarray, p: np.ndarray) -> float:
    return math.fsum(q * np.log(q / p))


def expected(f: Callable[[float], float], a: float, b: float) -> float:
    """E[f(τ)] for τ ~ Gamma(a, b)."""
    g = lambda x: f(x) * gamma(a, b).pdf(x)  # noqa: E731
    return sum(integrate.quad(g, *ab, epsrel=1e-12, limit=400)[0] for ab in ((0, 1), (1, np.inf)))


def normal_gamma_kl(q, p) -> float:
    (m, S, a, b), (m2, R, c, d) = q, p
    given_tau = lambda t: kl_of_normals((m, t * S), (m2, t * R))  # noqa: E731
    return kl_by_quadrature(gamma(a, b), gamma(c, d)) + expected(given_tau, a, b)


def pmf(rate: float) -> np.ndarray:
    return st.poisson(rate).pmf(np.arange(80))


@dataclass
class Case:
    """A member q, another p, and what the oracles say about them."""

    q: ExponentialFamily
    p: ExponentialFamily
    rebuild: Callable[..., ExponentialFamily]
    theta: Any
    log_prob: np.ndarray
    entropy: float | None
    kl: float | None
    mean: Any = None
    variance: Any = None


def diagonal(m, s):
    return lambda x: st.norm(m, s**-0.5).logpdf(x).sum(-1)


S1D, S2D = np.array([2.0, 1.2, 0.8]), np.array([0.9, 1.5, 2.2])
PI1, PI2 = np.array([0.1, 0.25, 0.05, 0.6]), np.array([0.3, 0.3, 0.15, 0.25])
A1, A2 = np.array([1.3, 2.2, 0.7]), np.array([2.0, 1.0, 1.5])
SIMPLEX = np.array([[0.2, 0.3, 0.5], [0.9, 0.09, 0.01], [1e-8, 0.5, 0.5 - 1e-8]])
UNIT = np.array([1e-300, 1e-9, 0.3, 0.999, 1 - 1e-12])
NG1, NG2 = (M1, S1, 3.0, 1.5), (M2, S2, 2.0, 2.5)
TAUS = np.array([0.1, 0.7, 1.0, 2.0, 6.0])


def normal_gamma_log_prob(x, t):
    return normal(M1, t * S1).logpdf(x) + gamma(3.0, 1.5).logpdf(t)


def normal_wishart_log_prob(x, X):
    return normal(M1, 2.0 * X).logpdf(x) + st.wishart(6.5, S1).logpdf(X)


CASES = {
    "Gaussian": Case(
        Gaussian.from_moments(M1, S1),
        Gaussian.from_moments(M2, S2),
        Gaussian.from_moments,
        POINTS,
        normal(M1, S1).logpdf(POINTS),
        normal(M1, S1).entropy(),
        kl_of_normals((M1, S1), (M2, S2)),
        M1,
        np.diag(np.linalg.inv(S1)),
    ),
    "DiagonalGaussian": Case(
        DiagonalGaussian.from_moments(M1, S1D),
        DiagonalGaussian.from_moments(M2, S2D),
        DiagonalGaussian.from_moments,
        POINTS,
        diagonal(M1, S1D)(POINTS),
        st.norm(0, S1D**-0.5).entropy().sum(),
        kl_of_normals((M1, np.diag(S1D)), (M2, np.diag(S2D))),
        M1,
        1 / S1D,
    ),
    "FixedGaussian": Case(
        FixedGaussian.from_moments(M1, S1),
        FixedGaussian.from_moments(M2, S1),
        FixedGaussian.from_moments,
        POINTS,
        normal(M1, S1).logpdf(POINTS),
        normal(M1, S1).entropy(),
        kl_of_normals((M1, S1), (M2, S1)),
        M1,
        np.diag(np.linalg.inv(S1)),
    ),
    "Bernoulli": Case(
        Bernoulli.from_probability(0.3),
        Bernoulli.from_probability(0.85),
        Bernoulli.from_probability,
        np.array([0, 1]),
        st.bernoulli(0.3).logpmf([0, 1]),
        st.bernoulli(0.3).entropy(),
        kl_by_sum(np.array([0.7, 0.3]), np.array([0.15, 0.85])),
        0.3,
        0.21,
    ),
    "Categorical": Case(
        Categorical.from_probabilities(PI1),
        Categorical.from_probabilities(PI2),
        Categorical.from_probabilities,
        np.arange(4),
        np.log(PI1),
        st.entropy(PI1),
        kl_by_sum(PI1, PI2),
    ),
    "Dirichlet": Case(
        Dirichlet.from_concentrations(A1),
        Dirichlet.from_concentrations(A2),
        Dirichlet.from_concentrations,
        SIMPLEX,
        np.array([st.dirichlet(A1).logpdf(x) for x in SIMPLEX]),
        st.dirichlet(A1).entropy(),
        torch.distributions.kl_divergence(
            torch.distributions.Dirichlet(torch.as_tensor(A1)),
            torch.distributions.Dirichlet(torch.as_tensor(A2)),
        ).item(),
        st.dirichlet(A1).mean(),
        st.dirichlet(A1).var(),
    ),
    "Beta": Case(
        Beta.from_concentrations(2.3, 1.4),
        Beta.from_concentrations(1.2, 3.0),
        Beta.from_concentrations,
        UNIT,
        st.beta(2.3, 1.4).logpdf(UNIT),
        st.beta(2.3, 1.4).entropy(),
        kl_by_quadrature(st.beta(2.3, 1.4), st.beta(1.2, 3.0), 0, 1),
        st.beta(2.3, 1.4).mean(),
        st.beta(2.3, 1.4).var(),
    ),
    "Gamma": Case(
        Gamma.from_shape_rate(2.5, 1.7),
        Gamma.from_shape_rate(1.2, 0.6),
        Gamma.from_shape_rate,
        SCALARS,
        gamma(2.5, 1.7).logpdf(SCALARS),
        gamma(2.5, 1.7).entropy(),
        kl_by_quadrature(gamma(2.5, 1.7), gamma(1.2, 0.6)),
        gamma(2.5, 1.7).mean(),
        gamma(2.5, 1.7).var(),
    ),
    "InverseGamma": Case(
        InverseGamma.from_shape_scale(5.5, 1.7),
        InverseGamma.from_shape_scale(2.2, 0.6),
        InverseGamma.from_shape_scale,
        SCALARS,
        st.invgamma(5.5, scale=1.7).logpdf(SCALARS),
        st.invgamma(5.5, scale=1.7).entropy(),
        kl_by_quadrature(st.invgamma(5.5, scale=1.7), st.invgamma(2.2, scale=0.6)),
        st.invgamma(5.5, scale=1.7).mean(),
    ),
    "Poisson": Case(
        Poisson.from_rate(3.2),
        Poisson.from_rate(5.1),
        Poisson.from_rate,
        np.array([0, 1, 4, 60]),
        st.poisson(3.2).logpmf([0, 1, 4, 60]),
        st.poisson(3.2).entropy(),
        kl_by_sum(pmf(3.2), pmf(5.1)),
        3.2,
        3.2,
    ),
    "Exponential": Case(
        Exponential.from_rate(1.3),
        Exponential.from_rate(0.5),
        Exponential.from_rate,
        SCALARS,
        st.expon(scale=1 / 1.3).logpdf(SCALARS),
        st.expon(scale=1 / 1.3).entropy(),
        kl_by_quadrature(st.expon(scale=1 / 1.3), st.expon(scale=2.0)),
        1 / 1.3,
        1 / 1.69,
    ),
    "Wishart": Case(
        Wishart.from_dof_scale(6.5, S1),
        Wishart.from_dof_scale(4.2, S2),
        Wishart.from_dof_scale,
        MATRICES,
        np.array([st.wishart(6.5, S1).logpdf(X) for X in MATRICES]),
        st.wishart(6.5, S1).entropy(),
        None,
        st.wishart(6.5, S1).mean(),
    ),
    "Wishart of size one": Case(
        Wishart.from_dof_scale(5.0, [[0.7]]),
        Wishart.from_dof_scale(0.8, [[1.9]]),
        Wishart.from_dof_scale,
        SCALARS[:, None, None],
        gamma(2.5, 1 / 1.4).logpdf(SCALARS),
        gamma(2.5, 1 / 1.4).entropy(),
        kl_by_quadrature(gamma(2.5, 1 / 1.4), gamma(0.4, 1 / 3.8)),
        np.array([[3.5]]),
    ),
    "NormalGamma": Case(
        NormalGamma.from_parameters(*NG1),
        NormalGamma.from_parameters(*NG2),
        NormalGamma.from_parameters,
        (POINTS, TAUS),
        np.array([normal_gamma_log_prob(x, t) for x, t in zip(POINTS, TAUS, strict=True)]),
        gamma(3.0, 1.5).entropy() + expected(lambda t: normal(M1, t * S1).entropy(), 3.0, 1.5),
        normal_gamma_kl(NG1, NG2),
    ),
    "NormalWishart": Case(
        NormalWishart.from_parameters(M1, 2.0, 6.5, S1),
        NormalWishart.from_parameters(M2, 1.3, 4.2, S2),
        NormalWishart.from_parameters,
        (POINTS[:4], MATRICES),
        np.array([normal_wishart_log_prob(x, X) for x, X in zip(POINTS, MATRICES, strict=False)]),
        None,
        None,
    ),
}
SAMPLED = [name for name in CASES if CASES[name].mean is not None]
each_family = pytest.mark.parametrize("name", CASES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(q: ExponentialFamily, tree) -> torch.Tensor:
    return _tree.flatten(tree, q.natural_ndims)


def standard_errors(draws, expected) -> float:
    draws = np.asarray(draws)
    error = draws.std(0, ddof=1) / math.sqrt(len(draws))
    return (np.abs(draws.mean(0) - np.asarray(expected)) / (error + 1e-14)).max()


# ---- the oracles --------------------------------------------------------------------------------


@each_family
def test_log_density_is_that_of_scipy(name):
    case = CASES[name]
    np.testing.assert_allclose(case.q.log_prob(case.theta), case.log_prob, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].entropy is not None])
def test_entropy_is_that_of_scipy(name):
    np.testing.assert_allclose(CASES[name].q.entropy(), CASES[name].entropy, rtol=1e-10)


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].kl is not None])
def test_divergence_is_quadrature_an_exact_sum_or_that_of_torch(name):
    case = CASES[name]
    np.testing.assert_allclose(case.q.kl(case.p), case.kl, rtol=1e-9)


def test_wishart_divergence_is_the_mean_of_scipys_log_ratio():
    case = CASES["Wishart"]
    q, p = st.wishart(6.5, S1), st.wishart(4.2, S2)
    X = q.rvs(50_000, random_state=5)
    ratio = q.logpdf(np.moveaxis(X, 0, -1)) - p.logpdf(np.moveaxis(X, 0, -1))
    assert standard_errors(ratio, case.q.kl(case.p)) < 5


def test_normal_wishart_divergence_and_entropy_follow_the_chain_rule():
    q, p = CASES["NormalWishart"].q, CASES["NormalWishart"].p
    kl_wishart = CASES["Wishart"].q.kl(CASES["Wishart"].p).item()
    X = st.wishart(6.5, S1).rvs(20_000, random_state=6)
    log_det = np.linalg.slogdet(X)[1]
    d = M1 - M2
    # Given Λ: KL of N(M1, (2Λ)⁻¹) from N(M2, (1.3Λ)⁻¹); the log-determinants of Λ cancel.
    given = 0.5 * (3 * (1.3 / 2 - 1 - math.log(1.3 / 2)) + 1.3 * np.einsum("i,nij,j->n", d, X, d))
    assert standard_errors(kl_wishart + given, q.kl(p)) < 5
    np.testing.assert_allclose(
        kl_of_normals((M1, 2 * X[0]), (M2, 1.3 * X[0])), given[0], rtol=1e-10
    )
    entropy = st.wishart(6.5, S1).entropy() + 1.5 * math.log(math.pi * math.e) - 0.5 * log_det
    assert standard_errors(entropy, q.entropy()) < 5


def test_marginal_of_the_normal_gamma_is_a_student_t():
    m, S, a, b = NG1
    student = st.multivariate_t(m, np.linalg.inv(S) * b / a, df=2 * a)
    q = CASES["NormalGamma"].q
    np.testing.assert_allclose(q.marginal_log_prob(POINTS), student.logpdf(POINTS), rtol=1e-10)


@each_family
def test_usual_parameters_come_back_from_the_constructor(name):
    case = CASES[name]
    again = case.rebuild(*(getattr(case.q, parameter) for parameter in case.q.parameters))
    torch.testing.assert_close(again.natural, case.q.natural, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", SAMPLED)
def test_mean_and_variance_are_those_of_scipy(name):
    case = CASES[name]
    np.testing.assert_allclose(case.q.mean, case.mean, rtol=1e-12)
    if case.variance is not None and not isinstance(case.q, FixedGaussian):
        np.testing.assert_allclose(case.q.variance, case.variance, rtol=1e-12)


@pytest.mark.parametrize("name", SAMPLED)
def test_draws_have_the_mean_and_variance_of_scipy(name):
    case = CASES[name]
    draws = case.q.sample(20_000, generator())
    assert standard_errors(draws, case.mean) < 5
    if case.variance is not None:
        assert standard_errors((draws - torch.as_tensor(case.mean)) ** 2, case.variance) < 5


def test_draws_of_pairs_have_the_moments_of_scipy():
    theta, tau = CASES["NormalGamma"].q.sample(20_000, generator())
    assert standard_errors(tau, gamma(3.0, 1.5).mean()) < 5
    assert standard_errors(theta, M1) < 5
    outer = (theta - torch.as_tensor(M1)).unsqueeze(-1) * (theta - torch.as_tensor(M1)).unsqueeze(
        -2
    )
    assert standard_errors(tau[:, None, None] * outer, np.linalg.inv(S1)) < 5

    x, precision = CASES["NormalWishart"].q.sample(20_000, generator())
    d = x - torch.as_tensor(M1)
    assert standard_errors(precision, 6.5 * S1) < 5
    assert standard_errors(x, M1) < 5
    # √2 L(Λ)ᵀ(x − m) is standard normal given Λ: an affine image of the draw.
    white = math.sqrt(2) * (torch.linalg.cholesky(precision).mT @ d.unsqueeze(-1)).squeeze(-1)
    assert standard_errors(white.unsqueeze(-1) * white.unsqueeze(-2), np.eye(3)) < 5


def test_categorical_draws_are_indices_with_the_given_frequencies():
    draws = CASES["Categorical"].q.sample(20_000, generator())
    assert draws.dtype == torch.int64
    assert standard_errors(np.asarray(draws)[:, None] == np.arange(4), PI1) < 5


# ---- batches, types, randomness -----------------------------------------------------------------


@each_family
def test_a_batch_of_two_is_two_members(name):
    q, p, theta = CASES[name].q, CASES[name].p, CASES[name].theta
    both = q.at(_tree.tree_map(lambda a, b: torch.stack([a, b]), q.natural, p.natural))
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)  # noqa: E731
    assert both.batch_shape == (2,)
    for i, one in enumerate((q, p)):
        close(both.log_partition()[i], one.log_partition())
        close(both.entropy()[i], one.entropy())
        close(both.kl(q)[i], one.kl(q))
        close(both.fisher()[i], one.fisher())
        close(flat(q, both.expectation())[i], flat(q, one.expectation()))
        inverse = type(q).from_expectation(both.expectation(), q)
        close(flat(q, inverse.natural)[i], flat(q, one.natural))
        columns = _tree.tree_map(lambda x: torch.as_tensor(x).unsqueeze(1), theta)
        close(both.log_prob(columns)[:, i], one.log_prob(theta))
    draws, single = both.sample(5000, generator()), q.sample(5000, generator())
    for batch, alone in zip(_tree.leaves(draws), _tree.leaves(single), strict=True):
        assert batch.shape == (5000, 2, *alone.shape[1:])
    T, mu = both.sufficient_statistics(draws), both.expectation()
    assert standard_errors(flat(q, T), flat(q, mu)) < 5


@each_family
def test_float32_stays_float32(name):
    case = CASES[name]
    q = case.q.at(_tree.tree_map(lambda x: x.float(), case.q.natural))
    values = {
        "log_partition": (q.log_partition(), case.q.log_partition()),
        "entropy": (q.entropy(), case.q.entropy()),
        "expectation": (flat(q, q.expectation()), flat(q, case.q.expectation())),
        "fisher": (q.fisher(), case.q.fisher()),
        "λ(μ)": (
            flat(q, type(q).from_expectation(q.expectation(), q).natural),
            flat(q, case.q.natural),
        ),
    }
    for what, (single, double) in values.items():
        assert single.dtype == torch.float32, what
        assert (single - double).abs().max() < 2e-5 * (1 + double.abs().max()), what
    for draw in _tree.leaves(q.sample(3, generator())):
        assert draw.dtype in (torch.float32, torch.int64)
    assert q.log_prob(q.sample(3, generator())).dtype == torch.float32


@pytest.mark.parametrize("name", ["Bernoulli", "Categorical", "Poisson"])
def test_counts_given_as_integers_take_the_type_of_the_family(name):
    q = CASES[name].q.at(CASES[name].q.natural.float())
    assert q.log_prob([0, 1]).dtype == torch.float32


@each_family
def test_randomness_is_the_generator_and_nothing_else(name):
    q = CASES[name].q
    before = torch.get_rng_state()
    first, second = q.sample(4, generator(1)), q.sample(4, generator(1))
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(_tree.leaves(first), _tree.leaves(second), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name, theta",
    [
        ("Bernoulli", [0.5, 2, -1]),
        ("Categorical", [-1, 4, 0.5]),
        ("Poisson", [-1, 0.5, math.nan]),
        ("Dirichlet", [[0.5, 0.6, -0.1], [0.2, 0.2, 0.2]]),
        ("Beta", [-0.1, 1.1]),
        ("Gamma", [-1.0]),
        ("InverseGamma", [-1.0, 0.0]),
        ("Exponential", [-1e-9]),
        ("Wishart", [-S1, S1 + np.triu(S1, 1), np.diag([1.0, 1.0, -1.0])]),
        ("NormalGamma", (POINTS[:2], np.array([-1.0, 0.0]))),
        ("NormalWishart", (POINTS[:1], -S1[None])),
    ],
)
def test_log_density_is_minus_infinity_outside_the_support(name, theta):
    theta = theta if isinstance(theta, tuple) else np.array(theta)
    assert (CASES[name].q.log_prob(theta) == -torch.inf).all()


# ---- extreme parameters -------------------------------------------------------------------------


@pytest.mark.parametrize("logit", [-500.0, -40.0, -1e-9, 0.0, 3.0, 40.0, 500.0])
def test_bernoulli_is_exact_where_one_probability_is_lost_in_the_other(logit):
    q = Bernoulli(natural=torch.tensor(logit, dtype=torch.float64))
    log_p = special.log_expit(np.array([-logit, logit]))
    p = special.expit(np.array([-logit, logit]))
    np.testing.assert_allclose(q.log_prob([0, 1]), log_p, rtol=1e-14)
    np.testing.assert_allclose(q.entropy(), -(p * log_p).sum(), rtol=1e-13)
    np.testing.assert_allclose(q.fisher(), [[p.prod()]], rtol=1e-14)
    single = Bernoulli(natural=torch.tensor(max(min(logit, 80.0), -80.0), dtype=torch.float32))
    log_p = special.log_expit(np.array([-1, 1]) * single.logit.double().item())
    np.testing.assert_allclose(single.log_prob([0, 1]), log_p, rtol=1e-6)


@pytest.mark.parametrize("rate", [1e-6, 1e-3, 0.3, 7.0, 59.99, 60.01, 250.0, 1e4])
def test_poisson_entropy_is_the_sum_over_all_counts(rate):
    # Not scipy.stats.poisson(1e4).entropy(), whose own sum does not converge (off by 2.5e-3).
    x = np.arange(max(0, int(rate - 40 * rate**0.5)), int(rate + 40 * rate**0.5 + 40))
    log_p = special.xlogy(x, rate) - rate - special.gammaln(x + 1)
    q = Poisson.from_rate(rate)
    np.testing.assert_allclose(q.entropy(), -math.fsum(np.exp(log_p) * log_p), rtol=1e-10)
    log_factorial = math.fsum(np.exp(log_p) * special.gammaln(x + 1))
    np.testing.assert_allclose(-q.expected_log_base_measure(), log_factorial, rtol=1e-9, atol=1e-15)


def test_poisson_entropy_in_a_batch_mixes_sum_and_series():
    rates = [1e-3, 7.0, 1e4]
    together = Poisson.from_rate(rates).entropy()
    assert torch.equal(together, torch.stack([Poisson.from_rate(r).entropy() for r in rates]))


EXTREMES = [1e-3, 0.04, 1.0, 57.0, 1e4, 1e6]


@pytest.mark.parametrize("small", EXTREMES)
@pytest.mark.parametrize("large", EXTREMES)
def test_the_inverse_maps_hit_the_expectation_at_extreme_parameters(small, large):
    members = [
        Gamma.from_shape_rate(small, large),
        InverseGamma.from_shape_scale(small, large),
        Beta.from_concentrations(small, large),
        Dirichlet.from_concentrations([small, large, 1.0, small]),
        Wishart.from_dof_scale(2 + small, S1 * large),
        Wishart.from_dof_scale(small, [[large]]),
        # b beside ½mᵀSm and W⁻¹ beside κmmᵀ: far apart, their sum in λ would lose the smaller.
        NormalGamma.from_parameters(M1, S1 * large, small, large),
        NormalWishart.from_parameters(M1 / large**0.5, large, 2 + small, S1),
    ]
    for q in members:
        mu = flat(q, q.expectation())
        again = type(q).from_expectation(q.expectation())
        deviation = (flat(q, again.expectation()) - mu).abs() / (1 + mu.abs())
        assert deviation.max() < 1e-10, q
        # λ itself is as well determined as float64 allows: F⁻¹ times the rounding of μ.
        if max(small, large) <= 100:
            torch.testing.assert_close(again.natural, q.natural, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("p", [1, 2, 7, 30])
def test_fisher_and_log_partition_of_the_wishart_are_those_of_scipys_gamma_p(p):
    nu = p - 1 + 0.3
    q = Wishart.from_dof_scale(nu, np.eye(p))
    A = special.multigammaln(nu / 2, p) + nu * p / 2 * math.log(2)
    np.testing.assert_allclose(q.log_partition(), A, rtol=1e-12)
    if p < 5:
        # torch's trigamma is good to 5e-10 only.
        trigamma = special.polygamma(1, nu / 2 - np.arange(p) / 2).sum()
        np.testing.assert_allclose(q.fisher()[-1, -1], trigamma, rtol=2e-9)


@pytest.mark.parametrize("a", [1e-3, 0.5, 20.0, 1e5])
def test_fisher_of_beta_and_gamma_is_made_of_scipys_trigamma(a):
    trigamma = special.polygamma(1, [a, 3.0, a + 3.0])
    F = np.diag(trigamma[:2]) - trigamma[2]
    np.testing.assert_allclose(Beta.from_concentrations(a, 3.0).fisher(), F, rtol=2e-8)
    F = [[trigamma[0], 0.5], [0.5, a / 4]]
    np.testing.assert_allclose(Gamma.from_shape_rate(a, 2.0).fisher(), F, rtol=2e-9)


def test_dirichlet_draws_with_tiny_concentrations_stay_on_the_simplex():
    q = Dirichlet.from_concentrations([1e-3, 1e-3, 2e-3])
    theta = q.sample(20_000, generator())
    assert torch.isfinite(q.log_prob(theta)).all()
    assert standard_errors(theta, [0.25, 0.25, 0.5]) < 5
    theta = Beta.from_concentrations(1e-3, 1e-3).sample(20_000, generator())
    assert ((theta > 0) & (theta < 1)).all()
    assert standard_errors(theta, 0.5) < 5


@pytest.mark.parametrize("large", [1e5, 1e8])
def test_matrices_are_read_through_their_symmetric_part(large):
    skew = large * np.triu(np.ones((3, 3)), 1)
    skew = torch.as_tensor(skew - skew.T)
    for name, block in (("Gaussian", 1), ("Wishart", 0), ("NormalGamma", 3), ("NormalWishart", 1)):
        q = CASES[name].q
        lam = list(q.natural)
        lam[block] = lam[block] + skew
        torch.testing.assert_close(
            q.at(tuple(lam)).log_partition(), q.log_partition(), rtol=1e-6, atol=1e-6
        )


# ---- errors at the door -------------------------------------------------------------------------

BAD = [
    (lambda: Gaussian.from_moments(M1, -S1), "precision", "positive definite"),
    (lambda: Gaussian.from_moments(M1, S1[:2, :2]), "precision", "shape"),
    (lambda: Gaussian.from_moments([math.nan], [[1.0]]), "mean", "finite"),
    (lambda: DiagonalGaussian.from_moments(M1, [1, 0, 1]), "precision", "positive"),
    (lambda: FixedGaussian.from_moments(M1, S1 + np.triu(S1, 1)), "precision", "(X + Xᵀ)"),
    (lambda: Gamma.from_shape_rate(-1, 2), "shape", "-1"),
    (lambda: Gamma.from_shape_rate(1, 0), "rate", "1/scale"),
    (lambda: InverseGamma.from_shape_scale(1, math.inf), "scale", "finite"),
    (lambda: Gamma.from_expectation((1.0, 2.0)), "mu[1]", "Jensen"),
    (lambda: Bernoulli.from_probability(0), "probability", "infinite"),
    (lambda: Bernoulli.from_probability([0.5, 1.0]), "probability", "got 1"),
    (lambda: Bernoulli.from_probability(math.nan), "probability", "finite"),
    (lambda: Bernoulli.from_expectation(1.5), "mu", "between 0 and 1"),
    (lambda: Categorical.from_probabilities([0.5, 0.4]), "probabilities", "divide by the sum"),
    (lambda: Categorical.from_probabilities([1.0, 0.0]), "probabilities", "drop it"),
    (lambda: Categorical.from_probabilities([1.0]), "probabilities", "K >= 2"),
    (lambda: Categorical(natural=np.zeros(0)), "natural", "K >= 2"),
    (lambda: Categorical.from_expectation([0.6, 0.5]), "mu", "last class"),
    (lambda: Dirichlet.from_concentrations([1.0, -2.0]), "concentrations", "-2"),
    (lambda: Dirichlet.from_concentrations([1.0]), "natural", "Beta.from_concentrations"),
    (lambda: Dirichlet.from_expectation([-0.1, -0.1]), "mu", "Jensen"),
    (lambda: Beta.from_concentrations(0, 1), "a", "positive"),
    (lambda: Beta.from_concentrations(1, math.nan), "b", "finite"),
    (lambda: Poisson.from_rate(0), "rate", "log r"),
    (lambda: Poisson(natural=1e4), "rate", "finite"),
    (lambda: Poisson.from_expectation(-1), "mu", "mean of a count"),
    (lambda: Exponential.from_rate(-2), "rate", "1/mean"),
    (lambda: Wishart.from_dof_scale(2.0, S1), "dof", "greater than p − 1 = 2"),
    (lambda: Wishart.from_dof_scale(5, -S1), "scale", "positive definite"),
    (lambda: Wishart.from_dof_scale(5, S1 + np.triu(S1, 1)), "scale", "(X + Xᵀ)"),
    (lambda: Wishart.from_dof_scale(5, M1), "scale", "(3,)"),
    (lambda: Wishart.from_expectation((S1, 5.0)), "mu[1]", "Jensen"),
    (lambda: NormalGamma.from_parameters(M1, S1, 0, 1), "shape", "positive"),
    (lambda: NormalGamma.from_parameters(M1, S1, 1, -1), "rate", "1/scale"),
    (lambda: NormalGamma.from_parameters(M1, -S1, 1, 1), "precision", "positive definite"),
    (lambda: NormalGamma.from_parameters(1.0, S1, 1, 1), "mean", "list"),
    (lambda: NormalWishart.from_parameters(M1, 0, 5, S1), "mean_precision", "positive"),
    (lambda: NormalWishart.from_parameters(M1, 1, 2, S1), "dof", "D − 1 = 2"),
    (lambda: NormalWishart.from_parameters(M1, 1, 5, S1[:2]), "scale", "(2, 3)"),
]


@pytest.mark.parametrize("make, argument, said", BAD)
def test_a_bad_argument_is_named_with_its_remedy(make, argument, said):
    with pytest.raises(ValueError) as raised:
        make()
    assert argument in str(raised.value) and said in str(raised.value)
    assert ";" in str(raised.value), "the message has no remedy"


@pytest.mark.parametrize(
    "name, dual",
    [
        ("Gaussian", (0 * M1, S1)),
        ("Gamma", (4.0, 0.0)),
        ("Beta", (0.0, -5.0)),
        ("Exponential", 2.0),
        ("Wishart", (0 * S1, -9.0)),
        ("NormalGamma", (0.0, 40.0, 0 * M1, 0 * S1)),
        ("NormalWishart", (0.0, 0 * S1, 0 * M1, 3.0)),
    ],
)
def test_removing_and_adding_that_leaves_the_domain_is_an_error(name, dual):
    dual = _tree.tree_map(torch.as_tensor, dual)
    sign = -1.0 if name == "Gamma" else 1.0
    with pytest.raises(ValueError, match=r"positive|greater"):
        CASES[name].q.add(_tree.scale(sign, dual))
    with pytest.raises(ValueError, match="removing this dual"):
        CASES[name].q.remove(_tree.scale(-sign, dual))


@pytest.mark.parametrize("name", ["NormalGamma", "NormalWishart"])
def test_half_a_pair_is_refused(name):
    with pytest.raises(TypeError, match="pair"):
        CASES[name].q.log_prob(POINTS)

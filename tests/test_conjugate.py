"""Conjugate models against closed forms, scipy, brute-force refitting and numerical integration."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch

import blr
from blr import _tree
from blr.conjugate import ConjugateModel, as_groups, take_examples

rng = np.random.default_rng(7)
T = torch.as_tensor


def regression_data(n=23, d=4):
    X = rng.standard_normal((n, d))
    return T(X), T(X @ np.arange(1.0, d + 1) + 0.5 * rng.standard_normal(n))


X, y = regression_data()
SPD = np.array([[2.0, 0.4], [0.4, 1.0]])
MODELS = {
    "beta-bernoulli": (
        blr.BetaBernoulli(blr.Beta.from_concentrations(2.0, 3.0)),
        T(rng.integers(0, 2, 19)).double(),
    ),
    "dirichlet-multinomial": (
        blr.DirichletMultinomial(blr.Dirichlet.from_concentrations([0.7, 1.0, 2.0])),
        T(rng.multinomial(3, [0.2, 0.5, 0.3], 17)).double(),
    ),
    "gamma-poisson": (
        blr.GammaPoisson(blr.Gamma.from_shape_rate(3.0, 2.0)),
        (T(rng.poisson(4, 16)).double(), T(rng.uniform(0.5, 2, 16))),
    ),
    "gaussian mean": (
        blr.GaussianMean(blr.Gaussian.from_moments([0.5, -0.5], SPD), T(SPD) + torch.eye(2)),
        T(rng.standard_normal((18, 2))),
    ),
    "regression, known noise": (
        blr.GaussianRegression(blr.Gaussian.from_moments(np.ones(4), 0.3 * np.eye(4)), 0.7),
        (X, y),
    ),
    "regression, unknown noise": (
        blr.NormalGammaRegression(
            blr.NormalGamma.from_parameters(np.ones(4), 0.3 * np.eye(4), 2.0, 1.5)
        ),
        (X, y),
    ),
}


def same(q, p, rtol=1e-10):
    for a, b in zip(_tree.leaves(q.natural), _tree.leaves(p.natural), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


def size(data):
    return len(data[0]) if isinstance(data, tuple) else len(data)


def without(data, gone):
    kept = np.setdiff1d(np.arange(size(data)), gone)
    return take_examples(data, kept)


def test_every_model_is_here():
    models = {
        name
        for name in blr.__all__
        if isinstance(getattr(blr, name), type) and issubclass(getattr(blr, name), ConjugateModel)
    }
    assert models == {type(model).__name__ for model, _ in MODELS.values()}


@pytest.mark.parametrize("name", MODELS)
def test_dual_is_the_natural_gradient_of_the_expected_log_likelihood(name):
    # −ℓᵢ = ⟨λ̃ᵢ, T⟩ + log cᵢ: the log likelihood of draws is reproduced by the duals, draw by draw.
    model, data = MODELS[name]
    q = model.posterior(data)
    theta = q.sample(5, torch.Generator().manual_seed(0))
    stats = q.sufficient_statistics(theta)
    duals, log_c = model.duals(data), model.log_carrier(data)
    for i in range(3):
        ours = _tree.inner(_tree.take(duals, i), stats, q.natural_ndims) + log_c[i]
        np.testing.assert_allclose(ours, log_likelihood(name, data, i, theta), rtol=1e-9)


def log_likelihood(name, data, i, theta):
    """log p(yᵢ | θ) by scipy."""
    match name:
        case "beta-bernoulli":
            return scipy.stats.bernoulli(theta.numpy()).logpmf(data[i].numpy())
        case "dirichlet-multinomial":
            counts = data[i].numpy().astype(int)
            return [scipy.stats.multinomial(3, p / p.sum()).logpmf(counts) for p in theta.numpy()]
        case "gamma-poisson":
            return scipy.stats.poisson((theta * data[1][i]).numpy()).logpmf(data[0][i].numpy())
        case "gaussian mean":
            cov = np.linalg.inv(SPD + np.eye(2))
            return [scipy.stats.multivariate_normal(m, cov).logpdf(data[i]) for m in theta.numpy()]
        case "regression, known noise":
            return scipy.stats.norm((theta @ X[i]).numpy(), math.sqrt(0.7)).logpdf(y[i].item())
        case _:
            weights, tau = theta
            return scipy.stats.norm((weights @ X[i]).numpy(), tau.rsqrt().numpy()).logpdf(
                y[i].item()
            )


@pytest.mark.parametrize("name", MODELS)
def test_removal_is_refitting_for_singles_groups_and_labels(name):
    model, data = MODELS[name]
    q, n = model.posterior(data), size(data)
    singles = model.sensitivity(data)
    for i in (0, n // 2, n - 1):
        refit = model.posterior(without(data, [i]))
        same(model.remove(q, take_examples(data, [i])), refit)
        np.testing.assert_allclose(singles.mean_change[i], q_mean(q) - q_mean(refit), atol=1e-11)
        score = model.log_predictive(refit, take_examples(data, [i]))[0]
        np.testing.assert_allclose(singles.loo_log_score[i], score, rtol=1e-9)
    labels = torch.arange(n) % 3
    groups = model.sensitivity(data, labels)
    for g in range(3):
        gone = np.flatnonzero(labels == g)
        refit = model.posterior(without(data, gone))
        np.testing.assert_allclose(groups.mean_change[g], q_mean(q) - q_mean(refit), atol=1e-10)
        joint = model.log_evidence(data) - model.log_evidence(without(data, gone))
        np.testing.assert_allclose(groups.loo_log_score[g], joint, rtol=1e-9)


def q_mean(q):
    return q.mean


@pytest.mark.parametrize("name", MODELS)
def test_a_stream_is_a_refit_of_every_prefix(name):
    model, data = MODELS[name]
    posteriors = list(model.stream(data))
    assert len(posteriors) == size(data)
    for t, q in enumerate(posteriors, 1):
        same(q, model.posterior(take_examples(data, range(t))))


@pytest.mark.parametrize("name", MODELS)
def test_evidence_is_the_sum_of_prequential_scores_in_any_order(name):
    model, data = MODELS[name]
    order = np.random.default_rng(1).permutation(size(data))
    total, q = 0.0, model.prior
    for i in order:
        one = take_examples(data, [i])
        total += model.log_predictive(q, one)[0]
        q = q.add(model.total_dual(one))
    np.testing.assert_allclose(total, model.log_evidence(data), rtol=1e-10)


def test_evidence_of_beta_bernoulli_is_a_ratio_of_beta_functions():
    model, data = MODELS["beta-bernoulli"]
    k, n = data.sum().item(), len(data)
    expected = scipy.special.betaln(2 + k, 3 + n - k) - scipy.special.betaln(2, 3)
    np.testing.assert_allclose(model.log_evidence(data), expected, rtol=1e-12)


def test_evidence_of_gamma_poisson_is_its_integral():
    model, (counts, exposure) = MODELS["gamma-poisson"]
    centre = model.posterior((counts, exposure)).mean.item()

    def joint(rate):
        log_p = scipy.stats.poisson(rate * exposure.numpy()).logpmf(counts.numpy()).sum()
        return np.exp(log_p + scipy.stats.gamma(3, scale=0.5).logpdf(rate) + 40)

    value, _ = scipy.integrate.quad(joint, 0, 10 * centre, points=[centre], epsrel=1e-11)
    np.testing.assert_allclose(
        model.log_evidence((counts, exposure)), np.log(value) - 40, rtol=1e-8
    )


def test_evidence_of_regression_is_the_marginal_gaussian():
    model, data = MODELS["regression, known noise"]
    A = X.numpy()
    marginal = scipy.stats.multivariate_normal(A @ np.ones(4), 0.7 * np.eye(23) + A @ A.T / 0.3)
    np.testing.assert_allclose(model.log_evidence(data), marginal.logpdf(y), rtol=1e-11)


def test_evidence_with_unknown_noise_is_the_marginal_student_t():
    model, data = MODELS["regression, unknown noise"]
    A = X.numpy()
    shape = (np.eye(23) + A @ A.T / 0.3) * 1.5 / 2.0
    marginal = scipy.stats.multivariate_t(A @ np.ones(4), shape, df=4.0)
    np.testing.assert_allclose(model.log_evidence(data), marginal.logpdf(y), rtol=1e-11)


def test_leave_one_out_scores_with_unknown_noise_are_student_t():
    model, data = MODELS["regression, unknown noise"]
    s = model.sensitivity(data)
    for i in (0, 11):
        q = model.posterior(without(data, [i]))
        S, x = q.precision.numpy(), X[i].numpy()
        scale2 = q.rate.item() / q.shape.item() * (1 + x @ np.linalg.solve(S, x))
        student = scipy.stats.t(2 * q.shape.item(), x @ q.mean.numpy(), np.sqrt(scale2))
        np.testing.assert_allclose(s.loo_log_score[i], student.logpdf(y[i].item()), rtol=1e-10)
        np.testing.assert_allclose(
            model.log_predictive(q, (X[[i]], y[[i]]))[0], student.logpdf(y[i].item())
        )
        np.testing.assert_allclose(model.predictive_variance(q, X[[i]])[0], student.var())


def test_changes_of_predictions_are_variance_times_error():
    # E − E^{\i} = (yᵢ − E^{\i})/(a + b), and /b for counts.
    for name in ("beta-bernoulli", "gamma-poisson"):
        model, data = MODELS[name]
        data = data if name == "beta-bernoulli" else data[0]
        q, s = model.posterior(data), model.sensitivity(data)
        weight = q.a + q.b if name == "beta-bernoulli" else q.rate
        expected = (data - s.posteriors.mean) / weight
        np.testing.assert_allclose(s.prediction_change, expected, atol=1e-14)


def test_predictive_of_regression_is_the_textbook_formula():
    model, data = MODELS["regression, known noise"]
    q = model.posterior(data)
    new = T(rng.standard_normal((5, 4)))
    np.testing.assert_allclose(model.predictive_mean(q, new), new @ q.mean, rtol=1e-12)
    variance = 0.7 + ((new @ q.covariance) * new).sum(-1)
    np.testing.assert_allclose(model.predictive_variance(q, new), variance, rtol=1e-11)


def test_least_squares_is_a_flat_prior():
    flat = (torch.zeros(4).double(), torch.zeros(4, 4).double())
    q = blr.GaussianRegression(flat, 1.0).posterior((X, y))
    np.testing.assert_allclose(q.mean, np.linalg.lstsq(X, y, rcond=None)[0], rtol=1e-11)


FLAT = (torch.zeros(4).double(), torch.zeros(4, 4).double())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MODELS["beta-bernoulli"][0].posterior([0, 2.0]), "zeros and ones"),
        (lambda: MODELS["beta-bernoulli"][0].posterior([[0.0]]), r"shape \(N,\)"),
        (lambda: MODELS["gamma-poisson"][0].posterior([1.5]), "counts 0, 1, 2"),
        (lambda: MODELS["gamma-poisson"][0].posterior(([1, 2], [1, -1])), "exposure must be pos"),
        (lambda: MODELS["gamma-poisson"][0].posterior(([1, 2], [1, 1, 1])), "shape of the counts"),
        (lambda: MODELS["dirichlet-multinomial"][0].posterior([0, 1]), "one-hot"),
        (lambda: MODELS["gaussian mean"][0].posterior([1.0, 2.0]), r"y\[:, None\]"),
        (lambda: blr.GaussianMean(MODELS["gaussian mean"][0].prior, -np.eye(2)), "noise_precision"),
        (lambda: blr.GaussianRegression(FLAT, -1.0), "noise_variance must be positive"),
        (lambda: blr.GaussianRegression(FLAT, 1.0).posterior((X[:3], y[:3])), "improper"),
        (lambda: blr.GaussianRegression(FLAT, 1.0).posterior((X, y[:3])), "shapes"),
        (lambda: blr.GaussianRegression(FLAT, 1.0).posterior(X), "pair"),
        (lambda: blr.GaussianRegression(FLAT, 1.0).log_evidence((X, y)), "improper"),
        (lambda: next(blr.GaussianRegression(FLAT, 1.0).stream((X, y))), "improper"),
    ],
)
def test_errors_say_what_was_wrong_and_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_removing_what_was_never_added_raises():
    model, data = MODELS["beta-bernoulli"]
    q = model.posterior(data)
    with pytest.raises(ValueError, match="Remove only duals that were added"):
        model.remove(q, torch.ones(30).double())
    regression, _ = MODELS["regression, known noise"]
    posterior = regression.posterior((X, y))
    with pytest.raises(ValueError, match="positive definite"):
        regression.remove(posterior, (10 * X, y))


def test_removing_everything_from_a_flat_prior_leaves_only_rounding_errors_and_raises():
    model = blr.GaussianRegression(FLAT, 1.0)
    q = model.posterior((X, y))
    with pytest.raises(ValueError, match="positive definite"):
        model.remove(q, (X.flip(0), y.flip(0)))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([0, 1], "5 labels"),
        ([[0, 1], []], "at least one"),
        ([[0, 0]], "distinct"),
        ([[5]], "between 0 and 4"),
        ([[0.5]], "integers"),
        (np.zeros((2, 2)), "5 labels"),
    ],
)
def test_bad_groups_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        as_groups(groups, 5)


def test_groups_by_label_come_in_sorted_order():
    found = [g.tolist() for g in as_groups(np.array([2, 0, 2, 1, 0]), 5)]
    assert found == [[1, 4], [3], [0, 2]]
    assert [g.tolist() for g in as_groups([[4, 0], np.array([True, 0, 0, 0, 0], bool)], 5)] == [
        [4, 0],
        [0],
    ]

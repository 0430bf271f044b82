"""blr.LinearRegression against statsmodels, scikit-learn and brute-force refitting."""

import copy
import pickle

import numpy as np
import pytest
import scipy.stats
import statsmodels.api as sm
from sklearn.datasets import load_diabetes
from sklearn.linear_model import BayesianRidge, Ridge
from sklearn.utils.estimator_checks import check_estimator

import blr

RTOL = 1e-8


def close(actual, expected, rtol=RTOL):
    """Equal relative to the largest entry: entries near zero carry only rounding errors."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.fixture(scope="module")
def diabetes():
    X, y = load_diabetes(return_X_y=True)
    return X * np.sqrt(len(X)), y


@pytest.fixture(scope="module")
def least_squares(diabetes):
    return blr.LinearRegression(prior_precision=0).fit(*diabetes)


@pytest.fixture(scope="module")
def influence(diabetes):
    X, y = diabetes
    return sm.OLS(y, sm.add_constant(X)).fit().get_influence()


def test_passes_scikit_learns_own_checks():
    check_estimator(blr.LinearRegression())
    check_estimator(blr.LinearRegression(prior_precision=0.1, noise_variance=2.0))


def test_least_squares_is_statsmodels_ols(diabetes, least_squares):
    X, y = diabetes
    ols = sm.OLS(y, sm.add_constant(X)).fit()
    close(np.r_[least_squares.intercept_, least_squares.coef_], ols.params)
    close(least_squares.noise_variance_, ols.scale)
    close(least_squares.posterior_.covariance.numpy(), ols.cov_params())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("leverage", lambda inf: inf.hat_matrix_diag),
        ("cooks_distance", lambda inf: inf.cooks_distance[0]),
        ("loo_residual", lambda inf: inf.resid_press),
        ("dfbeta", lambda inf: inf.dfbeta),
        ("mean_change", lambda inf: inf.results.params - inf.params_not_obsi),
        ("dfbetas", lambda inf: inf.dfbetas),
    ],
)
def test_sensitivity_is_statsmodels_influence(least_squares, influence, ours, theirs):
    close(getattr(least_squares.sensitivity(), ours), theirs(influence))


@pytest.mark.parametrize("delta", [0.0, 0.3, 20.0])
@pytest.mark.parametrize("intercept", [True, False])
def test_single_removal_is_refitting(diabetes, delta, intercept):
    X, y = diabetes
    settings = {"prior_precision": delta, "noise_variance": 3000.0, "fit_intercept": intercept}
    full = blr.LinearRegression(**settings).fit(X, y)
    s = full.sensitivity()
    for i in (0, 123, 441):
        kept = np.arange(len(y)) != i
        refit = blr.LinearRegression(**settings).fit(X[kept], y[kept])
        change = full.posterior_.mean - refit.posterior_.mean
        close(s.mean_change[i], change, 1e-8)
        close(s.loo_residual[i], y[i] - refit.predict(X[[i]])[0])
        close(s.prediction_change[i], full.predict(X[[i]])[0] - refit.predict(X[[i]])[0])
        mean, std = refit.predict(X[[i]], return_std=True)
        close(s.loo_log_score[i], scipy.stats.norm(mean[0], std[0]).logpdf(y[i]))
        cook = change @ full.posterior_.precision @ change / len(change)
        close(s.cooks_distance[i], cook)
        removed = full.remove([i])
        close(removed.posterior_.mean, refit.posterior_.mean)
        close(removed.posterior_.precision, refit.posterior_.precision)


@pytest.mark.parametrize("delta", [0.0, 0.7])
def test_remove_estimates_the_noise_again_as_refitting_does(diabetes, delta):
    X, y = diabetes
    gone = np.r_[3, 100:180, 400]
    kept = np.setdiff1d(np.arange(len(y)), gone)
    removed = blr.LinearRegression(prior_precision=delta).fit(X, y).remove(gone)
    refit = blr.LinearRegression(prior_precision=delta).fit(X[kept], y[kept])
    close(removed.noise_variance_, refit.noise_variance_)
    close(removed.coef_, refit.coef_)
    close(removed.sensitivity().dfbetas, refit.sensitivity().dfbetas)


def test_loo_scores_with_estimated_noise_are_student_t(diabetes, least_squares):
    X, y = diabetes
    scores = least_squares.sensitivity().loo_log_score
    for i in (0, 200):
        kept = np.arange(len(y)) != i
        refit = blr.LinearRegression(prior_precision=0).fit(X[kept], y[kept])
        mean, std = refit.predict(X[[i]], return_std=True)
        close(scores[i], scipy.stats.t(441 - 11, mean[0], std[0]).logpdf(y[i]))


def test_groups_are_refitting_by_indices_and_by_labels(diabetes):
    X, y = diabetes
    settings = {"prior_precision": 0.5, "noise_variance": 2900.0}
    full = blr.LinearRegression(**settings).fit(X, y)
    names = np.where(X[:, 1] > 0, "second", "first")
    labels = (names == "second").astype(int)
    by_label = full.sensitivity(groups=tuple(names.tolist()))
    by_index = full.sensitivity(groups=[np.flatnonzero(labels == k) for k in (0, 1)])
    for g in (0, 1):
        gone = labels == g
        refit = blr.LinearRegression(**settings).fit(X[~gone], y[~gone])
        change = full.posterior_.mean - refit.posterior_.mean
        close(by_label.mean_change[g], change)
        close(by_index.mean_change[g], change)
        close(by_label.loo_residual[g], y[gone] - refit.predict(X[gone]))
        close(by_label.prediction_change[g], full.predict(X[gone]) - refit.predict(X[gone]))
        cook = change @ full.posterior_.precision @ change / len(change)
        close(by_label.cooks_distance[g], cook)
        close(by_label.dfbetas[g], change / full.posterior_.variance.sqrt())
        close(by_label.leverage[g], full.sensitivity().leverage[gone].sum())
        design = np.c_[np.ones(gone.sum()), X[gone]]
        covariance = 2900 * np.eye(gone.sum()) + design @ np.linalg.solve(
            refit.posterior_.precision.numpy(), design.T
        )
        joint = scipy.stats.multivariate_normal(refit.predict(X[gone]), covariance).logpdf(y[gone])
        close(by_label.loo_log_score[g], joint)


def test_ridge_is_scikit_learns_ridge(diabetes):
    X, y = diabetes
    ours = blr.LinearRegression(prior_precision=2.0, noise_variance=5.0).fit(X, y)
    ridge = Ridge(alpha=2.0 * 5.0, solver="cholesky", tol=1e-12).fit(X, y)
    close(ours.coef_, ridge.coef_)
    close(ours.intercept_, ridge.intercept_)


def test_posterior_is_scikit_learns_bayesian_ridge_at_its_hyperparameters(diabetes):
    X, y = diabetes
    theirs = BayesianRidge(fit_intercept=False, tol=1e-12).fit(X, y - y.mean())
    ours = blr.LinearRegression(
        prior_precision=theirs.lambda_, noise_variance=1 / theirs.alpha_, fit_intercept=False
    ).fit(X, y - y.mean())
    # coef_ of BayesianRidge lags its hyperparameters by one convergence step of size tol.
    close(ours.coef_, theirs.coef_, 1e-7)
    close(ours.posterior_.covariance, theirs.sigma_)
    close(ours.predict(X, return_std=True)[1], theirs.predict(X, return_std=True)[1])


def test_partial_fit_is_fit(diabetes):
    X, y = diabetes
    once = blr.LinearRegression().fit(X, y)
    stream = blr.LinearRegression()
    for rows in np.split(np.arange(len(y)), [30, 31, 200]):
        stream.partial_fit(X[rows], y[rows])
    close(stream.posterior_.mean, once.posterior_.mean)
    close(stream.noise_variance_, once.noise_variance_)
    close(stream.sensitivity().dfbetas, once.sensitivity().dfbetas)
    close(stream.dual_.total()[1], once.dual_.total()[1])


def test_duals_are_lazy_and_add_up(diabetes, least_squares):
    X, y = diabetes
    total = least_squares.dual_.total()
    close(total[0], least_squares.posterior_.natural[0])
    lam1, lam2 = least_squares.dual_[7]
    x = np.r_[1, X[7]]
    close(lam1, x * y[7] / least_squares.noise_variance_)
    close(lam2, -0.5 * np.outer(x, x) / least_squares.noise_variance_)
    assert least_squares.dual_[[1, 5, 9]][1].shape == (3, 11, 11)
    assert len(least_squares.dual_) == len(y)


def test_copies_and_pickles_predict_the_same(diabetes, least_squares):
    X, _ = diabetes
    for twin in (copy.deepcopy(least_squares), pickle.loads(pickle.dumps(least_squares))):
        np.testing.assert_array_equal(twin.predict(X), least_squares.predict(X))
        np.testing.assert_array_equal(
            twin.sensitivity().leverage, least_squares.sensitivity().leverage
        )


def test_a_perfect_fit_has_finite_sensitivities():
    X = np.arange(12.0).reshape(6, 2) ** 2
    model = blr.LinearRegression(prior_precision=0).fit(X, X @ [1.0, -2.0] + 3)
    np.testing.assert_allclose(model.coef_, [1, -2], rtol=1e-9)
    assert np.isfinite(model.sensitivity().dfbeta).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda X, y: blr.LinearRegression(prior_precision=-1).fit(X, y), "prior_precision must"),
        (lambda X, y: blr.LinearRegression(prior_precision=[1, 2]).fit(X, y), r"shape \(10,\)"),
        (lambda X, y: blr.LinearRegression(noise_variance=0).fit(X, y), "noise_variance must be"),
        (lambda X, y: blr.LinearRegression(0, 1.0).fit(X[:7], y[:7]), "improper.*prior"),
        (lambda X, y: blr.LinearRegression(0).fit(X[:11], y[:11]), "pass noise_variance"),
        (lambda X, y: blr.LinearRegression().fit(X, y).remove([442]), "never added"),
        (lambda X, y: blr.LinearRegression().fit(X, y).remove([-1]), "between 0 and 441"),
        (lambda X, y: blr.LinearRegression().fit(X, y).remove([3, 3]), "distinct"),
        (lambda X, y: blr.LinearRegression().fit(X, y).remove([]), "at least one"),
        (lambda X, y: blr.LinearRegression(0, 1.0).fit(X, y).remove(range(435)), "definite"),
        (lambda X, y: blr.LinearRegression(1, 1.0).fit(X, y).remove(range(442)), "definite"),
        (lambda X, y: blr.LinearRegression().fit(X, y).sensitivity(groups=[0, 1]), "442 labels"),
        (lambda X, y: blr.LinearRegression().fit(X, y).sensitivity([[0, 999]]), "between 0"),
    ],
)
def test_errors_say_what_was_wrong_and_what_to_do(diabetes, call, message):
    with pytest.raises(ValueError, match=message):
        call(*diabetes)


def test_a_failed_fit_leaves_the_model_as_it_was(diabetes):
    X, y = diabetes
    model = blr.LinearRegression(prior_precision=0).fit(X, y)
    before = model.coef_.copy()
    with pytest.raises(ValueError, match="NaN"):
        model.partial_fit(X[:2] * np.nan, y[:2])
    with pytest.raises(ValueError, match="pass noise_variance"):
        model.fit(X[:4, :3], y[:4])
    with pytest.raises(ValueError, match="definite"):
        model.remove(range(440))
    assert model.predict(X).shape == y.shape
    np.testing.assert_array_equal(model.coef_, before)


def test_an_example_with_leverage_one_is_named():
    X = np.c_[np.r_[1, np.zeros(9)], np.linspace(-1, 1, 10)]
    y = np.linspace(0, 3, 10) ** 2
    s = blr.LinearRegression(prior_precision=0, noise_variance=1.0).fit(X, y).sensitivity()
    assert s.leverage[0] == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="leverage must be below 1"):
        _ = s.loo_residual
    estimated = blr.LinearRegression(prior_precision=0).fit(X, y).sensitivity()
    assert estimated.leverage[0] == pytest.approx(1, abs=1e-12)

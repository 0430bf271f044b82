"""Low-rank plus diagonal Gaussians against dense matrices, and the rule projected on them."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.problem import DELTA, LOSS, P, X, Y, generator

import blr
from blr.likelihoods import TotalLoss, linear, logistic, softmax
from blr.per_example import example_gradients
from blr.slang import average, factored, gauss_newton_rows


def member(size=7, rank=3, seed=0):
    m, U, d = (
        torch.randn(*shape, dtype=torch.float64, generator=generator(seed))
        for shape in ((size,), (size, rank), (size,))
    )
    return blr.LowRankGaussian(m, 2 * U, d.exp())


def dense(q):
    return (q.factor @ q.factor.T + torch.diag(q.diagonal)).numpy()


# ---- the family ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 3, 7, 9])
def test_it_is_the_gaussian_with_that_precision(rank):
    q = member(rank=rank)
    S = dense(q)
    theta = torch.randn(4, 7, dtype=torch.float64, generator=generator(1))
    peer = scipy.stats.multivariate_normal(q.mean.numpy(), np.linalg.inv(S))
    np.testing.assert_allclose(q.log_prob(theta), peer.logpdf(theta.numpy()), rtol=1e-11)
    np.testing.assert_allclose(q.entropy(), peer.entropy(), rtol=1e-11)
    np.testing.assert_allclose(q.log_det(), np.linalg.slogdet(S)[1], rtol=1e-11)
    np.testing.assert_allclose(q.times(theta), theta.numpy() @ S, rtol=1e-11)
    np.testing.assert_allclose(q.solve(theta), np.linalg.solve(S, theta.numpy().T).T, rtol=1e-10)
    np.testing.assert_allclose(q.variance, np.diag(np.linalg.inv(S)), rtol=1e-11)
    np.testing.assert_allclose(q.precision_diagonal, np.diag(S), rtol=1e-13)


@pytest.mark.parametrize("rank", [0, 2, 9])
def test_samples_are_noise_times_a_root_of_the_covariance(rank):
    q = member(rank=rank)
    theta = q.sample(7, generator(2)) - q.mean
    noise = torch.randn((7, 7), dtype=torch.float64, generator=generator(2))
    R = torch.linalg.solve(noise, theta).T.numpy()
    np.testing.assert_allclose(R @ R.T @ dense(q), np.eye(7), atol=1e-11)


def test_kl_is_that_of_dense_gaussians():
    q, p = member(seed=0), member(rank=2, seed=1)
    S, R = dense(q), dense(p)
    r = (p.mean - q.mean).numpy()

    def expected(R):
        trace = np.trace(R @ np.linalg.inv(S))
        return 0.5 * (trace - 7 + r @ R @ r + np.linalg.slogdet(S)[1] - np.linalg.slogdet(R)[1])

    full = blr.Gaussian.from_moments(p.mean, torch.tensor(R))
    fixed = blr.FixedGaussian.from_moments(p.mean, torch.tensor(R))
    for other in (p, full, fixed):
        np.testing.assert_allclose(q.kl(other), expected(R), rtol=1e-10)
    for other in (
        blr.DiagonalGaussian.from_moments(p.mean, p.diagonal),
        blr.LowRankGaussian.from_diagonal(p.mean, p.diagonal),
    ):
        np.testing.assert_allclose(q.kl(other), expected(np.diag(p.diagonal.numpy())), rtol=1e-10)
    assert abs(q.kl(q)) < 1e-12


def test_ten_thousand_parameters_need_no_square_matrix():
    q = member(size=10_000, rank=5)
    b = torch.ones(10_000).double()
    np.testing.assert_allclose(q.times(q.solve(b)), b, rtol=1e-8)
    theta = q.sample(200, generator(3))
    z = (theta - q.mean) / q.variance.sqrt()
    assert abs((z**2).mean() - 1) < 4 * (2 / z.numel()) ** 0.5
    whitened = (q.times(theta - q.mean) * (theta - q.mean)).sum(1)
    assert abs(whitened.mean() - 10_000) < 4 * (2 * 10_000 / 200) ** 0.5


def test_huge_and_tiny_parts_keep_their_digits():
    U = torch.tensor([[1e4, 0.0], [1e4, 0.0], [0.0, 1e-9]]).double()
    q = blr.LowRankGaussian(torch.zeros(3), U, torch.tensor([1.0, 2.0, 1e-3], dtype=torch.float64))
    np.testing.assert_allclose(q.log_det(), np.log(2e-3) + np.log1p(1.5e8), rtol=1e-14)
    b = torch.tensor([1.0, -2.0, 3.0]).double()
    np.testing.assert_allclose(q.solve(b), np.linalg.solve(dense(q), b), rtol=1e-6)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (([0.0, 0.0], [[1.0]], [1.0, 1.0]), r"shapes \(P,\), \(P, L\)"),
        (([0.0, 0.0], [[1.0], [1.0]], [1.0, 0.0]), "diagonal must be positive"),
        (([0.0, 0.0], [[1.0], [np.nan]], [1.0, 1.0]), "factor must be finite"),
        (([0.0, np.inf], [[1.0], [1.0]], 1.0), "mean must be finite"),
    ],
)
def test_what_is_no_gaussian_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        blr.LowRankGaussian(*parts)


# ---- the projection -----------------------------------------------------------------------------


@given(st.floats(0.0, 1.0), st.integers(0, 12), st.integers(0, 2**20))
def test_the_projection_keeps_the_diagonal_and_the_largest_directions(rho, rank, seed):
    q = member(seed=seed)
    C = torch.randn(7, 4, dtype=torch.float64, generator=generator(seed + 1))
    after = average(q, C, 0.3, rank, rho)
    target = (1 - rho) * dense(q) + rho * (C @ C.T + 0.3 * torch.eye(7).double()).numpy()
    np.testing.assert_allclose(np.diag(dense(after)), np.diag(target), rtol=1e-10)
    assert after.rank <= rank
    if rank >= 7:
        np.testing.assert_allclose(dense(after), target, atol=1e-9)
    low = target - np.diag((1 - rho) * q.diagonal.numpy() + rho * 0.3)
    kept = np.linalg.eigvalsh(low)[7 - min(rank, 7) :].sum()
    np.testing.assert_allclose((after.factor**2).sum(), kept, atol=1e-9)


def test_the_prior_may_differ_between_parameters():
    q, delta = member(), torch.linspace(0.5, 2, 7).double()
    after = average(q, torch.zeros(7, 1).double(), delta, 3, 0.4)
    np.testing.assert_allclose(
        dense(after), 0.6 * dense(q) + 0.4 * np.diag(delta), rtol=1e-12, atol=1e-12
    )


def test_a_rate_above_one_is_refused_and_zero_gradients_are_not():
    q = member()
    with pytest.raises(ValueError, match=r"lr must be between 0 and 1, got 1\.5"):
        average(q, torch.zeros(7, 1).double(), 1.0, 3, 1.5)
    with pytest.raises(ValueError, match=r"step 1: .*diagonal must be positive"):
        recipe = blr.LowRankRule(lambda loss, q: (q.mean, q.mean[:, None] * 0, 0.0), 3, lr=1.0)
        list(blr.run(recipe, None, q, 2))
    after = average(q, torch.zeros(7, 2).double(), 1.0, 3, 0.5)
    np.testing.assert_allclose(dense(after), 0.5 * dense(q) + 0.5 * np.eye(7), atol=1e-12)


ZERO = torch.tensor([[1.0, 0.0], [-2.0, 0.0]]).double()
BARE = TotalLoss(linear, logistic, ZERO, torch.tensor([1.0, 1.0]).double())


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ({"rank": -1}, "rank must be at least zero, got -1"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": -1.0}, "lr must be positive, got -1.0"),
        ({"beta": 2.0}, "beta must be between 0 and 1, got 2.0"),
        ({"beta": -0.5}, "beta must be between 0 and 1, got -0.5"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_slang_refuses_what_is_out_of_range_by_the_names_it_has_there(argument, what):
    with pytest.raises(ValueError, match="^" + what):
        blr.recipes.slang(**argument)


@pytest.mark.parametrize(
    ("rates", "rows", "message"),
    [
        (
            {"lr": 1e3},
            example_gradients,
            r"the rates 0\.05 of .* 1000 of the mean lead .*Lower them",
        ),
        ({"lr": 1e200}, example_gradients, r"the rates 0\.05 of .* 1e\+200 of the mean lead"),
        (
            {"beta": lambda t: 1.0 + t},
            example_gradients,
            r"the rates 2 of .* between 0 and 1, got 2",
        ),
        ({"beta": 1.0}, example_gradients, r".*diagonal must be positive, got .* a prior_pr"),
        ({"lr": 1e3}, gauss_newton_rows, r"the rates 0\.05 of .* 1000 of the mean lead"),
    ],
)
def test_leaving_the_domain_names_both_rates_and_the_remedy(rates, rows, message):
    recipe = blr.recipes.slang(**rates, rows=rows, generator=generator(0))
    q0 = blr.LowRankGaussian.from_diagonal([0.0, 0.0], 1.0)
    loss = BARE if "beta" in rates else dataclasses.replace(BARE, prior_precision=1.0)
    with pytest.raises(ValueError, match=r"step \d+: " + message):
        list(blr.run(recipe, loss, q0, 2000))


def test_a_curvature_that_is_no_number_is_said():
    broken = dataclasses.replace(BARE, model=lambda theta, x: x @ theta * torch.inf)
    with pytest.raises(ValueError, match=r"curvature .* must be finite, got .*; lower the rates"):
        gauss_newton_rows(broken, torch.ones(2).double())


def test_another_family_and_a_loss_without_examples_are_refused():
    q0 = blr.LowRankGaussian.from_diagonal([0.0, 0.0], 1.0)
    with pytest.raises(TypeError, match="loss must be a TotalLoss, got builtin_function"):
        list(blr.run(blr.recipes.slang(), torch.sum, q0, 1))
    full = blr.Gaussian.from_moments([0.0, 0.0], torch.eye(2).double())
    with pytest.raises(TypeError, match="q must be a LowRankGaussian, got Gaussian; use LowRank"):
        list(blr.run(blr.recipes.slang(), BARE, full, 1))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        factored(BARE, q0, 0)


# ---- the derivatives ----------------------------------------------------------------------------


def test_gauss_newton_rows_are_a_factor_of_its_curvature():
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator(0))
    y = torch.tensor([0, 2, 1, 1, 0, 2])
    model = lambda theta, x: x @ theta.reshape(4, 3)  # noqa: E731
    loss = TotalLoss(model, softmax, x, y, num_data=12, prior_precision=0.5)
    theta = torch.randn(12, dtype=torch.float64, generator=generator(1))
    rows = gauss_newton_rows(loss, theta)
    H = 2 * rows.T @ rows + 0.5 * torch.eye(12)
    np.testing.assert_allclose(H, torch.func.hessian(loss)(theta), atol=1e-12)


@pytest.mark.parametrize("rows", [example_gradients, gauss_newton_rows])
def test_samples_of_the_factor_are_averaged(rows):
    S, N, M = 3, 12, 4
    x = torch.randn(M, 5, dtype=torch.float64, generator=generator(3))
    y = torch.tensor([1.0, 0.0, 0.0, 1.0]).double()
    loss = TotalLoss(linear, logistic, x, y, prior_precision=0.7, num_data=N)
    q = member(size=5, rank=2)
    g, C, delta = factored(loss, q, S, generator(4), rows)
    x, y, theta = x.numpy(), y.numpy(), q.sample(S, generator(4)).numpy()
    p = scipy.special.expit(theta @ x.T)
    weight = p * (1 - p) if rows is gauss_newton_rows else (p - y) ** 2
    H = N / M * np.einsum("sn,ni,nj->ij", weight, x, x) / S
    np.testing.assert_allclose(C @ C.T, H, rtol=1e-11)
    np.testing.assert_allclose(g, N / M * (p - y).mean(0) @ x + 0.7 * q.mean.numpy(), rtol=1e-11)
    assert delta == 0.7


def test_the_derivatives_are_unbiased_and_the_prior_is_not_sampled():
    q = member(size=P, rank=2)
    loss = dataclasses.replace(LOSS, inputs=LOSS.inputs[:0].new_zeros(5, P), targets=torch.zeros(5))
    g, C, delta = factored(loss, q, 3, generator(0))
    np.testing.assert_allclose(g, DELTA * q.mean, rtol=1e-13)
    assert delta == DELTA and not C.any() and C.shape == (P, 15)


# ---- what it is for -----------------------------------------------------------------------------


def negative_elbo(q, S):
    """E_q[ℓ̄] − H(q) + prior's normaliser, by quadrature: each ℓᵢ depends on one Gaussian number."""
    z, w = np.polynomial.hermite_e.hermegauss(32)
    m, V = q.mean.numpy(), np.linalg.inv(S)
    f = (X @ m)[:, None] + np.sqrt(((X @ V) * X).sum(1))[:, None] * z
    data = ((np.logaddexp(0, f) - Y[:, None] * f) @ (w / w.sum())).sum()
    prior = 0.5 * DELTA * (m @ m + np.trace(V)) - 0.5 * P * np.log(DELTA)
    return data + prior + 0.5 * np.linalg.slogdet(S)[1] - 0.5 * P


def test_the_bound_goes_from_diagonal_to_full_as_the_rank_grows():
    # Best diagonal Gaussian 67.464, best full one 55.465 (both found by quadrature).
    rate = lambda t: 5 / (10 + t)  # noqa: E731
    found = []
    for rank in (0, 2, 10, 31):
        recipe = blr.recipes.slang(rank, rate, rate, generator=generator(1), rows=gauss_newton_rows)
        start = blr.LowRankGaussian.from_diagonal(torch.zeros(P).double(), 5.0)
        *_, q = blr.run(recipe, LOSS, start, 100)
        found.append(negative_elbo(q, dense(q)))
    assert found == sorted(found, reverse=True)
    assert 67.46 < found[0] < 70 and 61 < found[1] < 65
    assert found[2] < 57.5 and 55.465 < found[3] < 56


def test_a_single_example_and_a_network_are_learned_too():
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    ).double()
    model, theta = blr.likelihoods.from_module(net)
    loss = TotalLoss(model, softmax, torch.ones(1, 3).double(), torch.tensor([1]), 1.0)
    q0 = blr.LowRankGaussian.from_diagonal(theta, 1.0)
    recipe = blr.LowRankRule(partial(factored, generator=generator(0)), 2, lr=0.1)
    *_, q = blr.run(recipe, loss, q0, 50)
    assert loss(q.mean) < loss(q0.mean) and q.rank == 2

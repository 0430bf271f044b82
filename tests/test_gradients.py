"""Estimates of ∇_μ E_q[ℓ̄]: exact where they should be, unbiased against quadrature elsewhere."""

import math
from functools import partial

import numpy as np
import pytest
import torch

import blr
from blr import _tree, gradients
from blr.gradients import (
    delta,
    exact,
    gauss_newton,
    hessian,
    hessian_diagonal,
    monte_carlo,
    price,
    squared_batch_gradient,
    squared_gradients,
    stein,
)
from blr.likelihoods import TotalLoss, from_module, linear, logistic, softmax, squared_error

X = torch.tensor([[1.3, -0.7], [0.4, 2.0], [-1.1, 0.3], [0.9, 0.8], [-0.2, -1.6]]).double()
Y = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]).double()
LOSS = TotalLoss(linear, logistic, X, Y, prior_precision=0.6)
FULL = blr.Gaussian.from_moments([0.4, -0.2], covariance=[[0.8, 0.3], [0.3, 0.5]])
DIAGONAL = blr.DiagonalGaussian.from_moments([0.4, -0.2], variance=[0.8, 0.5])
FIXED = blr.FixedGaussian.from_moments([0.4, -0.2], [[1.5, -0.4], [-0.4, 2.0]])


def by_quadrature(q):
    """∇_μ E_q[ℓ̄] from E∇ℓ̄ and E∇²ℓ̄ on a grid of 60 × 60 Gauss–Hermite nodes."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z = torch.cartesian_prod(torch.tensor(nodes), torch.tensor(nodes))
    w = torch.tensor(np.outer(weights, weights).ravel() / (2 * math.pi))
    V = torch.diag(q.variance) if isinstance(q, blr.DiagonalGaussian) else q.covariance
    theta = q.mean + z @ torch.linalg.cholesky(V).mT
    p = torch.sigmoid(theta @ X.mT)
    g = w @ ((p - Y) @ X + 0.6 * theta)
    H = torch.einsum("s,sn,np,nq->pq", w, p * (1 - p), X, X) + 0.6 * torch.eye(2).double()
    return q.natural_gradient(g, H.diagonal() if isinstance(q, blr.DiagonalGaussian) else H)


def flat(tree, q):
    return _tree.flatten(tree, q.natural_ndims)


def standard_errors(estimate, q, expected, repeats=400):
    draws = torch.stack([flat(estimate(), q) for _ in range(repeats)])
    error = draws.std(0) / math.sqrt(repeats)
    gap = (draws.mean(0) - flat(expected, q)).abs()
    return (gap / (error + 1e-12)).max().item()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def many(estimate, q, num_samples, repeats, monkeypatch):
    """As many estimates at once: the samples are drawn before, and handed out."""
    drawn = q.sample(repeats * num_samples, generator(1)).reshape(repeats, num_samples, -1)

    def one(theta):
        monkeypatch.setattr(type(q), "sample", lambda self, n, generator: theta[:n])
        return flat(estimate(q=q, num_samples=num_samples), q)

    return torch.vmap(one)(drawn)


def check_unbiased(draws, expected):
    """Within 4.5 standard errors, none of which is above a hundredth of what is estimated."""
    error = draws.std(0) / math.sqrt(len(draws))
    assert (error < 0.01 * expected.abs().clamp(min=0.5)).all()
    assert ((draws.mean(0) - expected).abs() < 4.5 * error).all()


@pytest.mark.parametrize("q", [FULL, DIAGONAL, FIXED], ids=lambda q: type(q).__name__)
@pytest.mark.parametrize("known", [True, False], ids=["known examples", "bare function"])
def test_price_is_unbiased(q, known, monkeypatch):
    loss, expected = LOSS if known else (lambda theta: LOSS(theta)), flat(by_quadrature(q), q)
    check_unbiased(many(partial(price, loss), q, 2, 20_000, monkeypatch), expected)


@pytest.mark.parametrize("q", [FULL, DIAGONAL], ids=lambda q: type(q).__name__)
@pytest.mark.parametrize("known", [True, False], ids=["known examples", "bare function"])
def test_steins_curvature_is_unbiased(q, known, monkeypatch):
    loss, expected = LOSS if known else (lambda theta: LOSS(theta)), flat(by_quadrature(q), q)
    check_unbiased(many(partial(stein, loss), q, 3, 100_000, monkeypatch), expected)


@pytest.mark.parametrize("q", [FULL, DIAGONAL], ids=lambda q: type(q).__name__)
def test_the_samples_are_those_of_the_generator(q):
    theta = q.sample(3, generator(7))
    g = torch.stack([torch.func.grad(lambda t: LOSS(t))(t) for t in theta]).mean(0)
    for estimate in (gradients.at_samples, gradients.reparametrized):
        found = estimate(lambda t: LOSS(t), q, 3, generator(7))[0]
        torch.testing.assert_close(found, g, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("q", [FULL, DIAGONAL, FIXED], ids=lambda q: type(q).__name__)
def test_monte_carlo_is_unbiased(q):
    estimate = partial(monte_carlo, LOSS, q, num_samples=20, generator=generator(3))
    assert standard_errors(estimate, q, by_quadrature(q), 200) < 4.5


def test_a_sampled_hessian_is_symmetric():
    H = gradients.reparametrized(LOSS, FULL, num_samples=3, generator=generator(6))[1]
    assert torch.equal(H, H.mT) and H[0, 1] != 0.0


def test_monte_carlo_needs_no_derivative():
    # A coin: ∇_μ E[f] = f(1) − f(0). A gamma: E[θ²] = a(a+1)/b², divided by Fisher.
    coin = blr.Bernoulli.from_probability(0.3)
    f = lambda theta: torch.where(theta > 0.5, 2.0, -1.5)  # noqa: E731
    estimate = partial(monte_carlo, f, coin, num_samples=9, generator=generator(4))
    assert standard_errors(estimate, coin, torch.tensor(3.5).double()) < 4.5
    gamma = blr.Gamma.from_shape_rate(2.5, 1.7)
    lam = torch.stack(gamma.natural)
    slope = torch.func.grad(lambda x: (x[0] + 1) * (x[0] + 2) / x[1] ** 2)(lam)
    expected = torch.linalg.solve(gamma.fisher(), slope)
    estimate = partial(monte_carlo, torch.square, gamma, num_samples=9, generator=generator(5))
    assert standard_errors(estimate, gamma, tuple(expected)) < 4.5


def test_exact_is_autodiff_in_mu_and_agrees_with_bonnet_and_price():
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z, w = torch.tensor(nodes), torch.tensor(weights / math.sqrt(2 * math.pi))

    def expected_loss(mu):
        m, second = mu
        V = second - torch.outer(m, m)
        f = (X @ m)[:, None] + torch.einsum("np,pq,nq->n", X, V, X).sqrt()[:, None] * z
        return (w * logistic(f, Y[:, None])).sum() + 0.3 * torch.trace(second)

    found = exact(expected_loss, FULL)
    torch.testing.assert_close(
        flat(found, FULL), flat(by_quadrature(FULL), FULL), rtol=1e-9, atol=0
    )


def test_delta_is_exact_for_quadratic_losses_and_differentiates_at_the_mean():
    quadratic = TotalLoss(linear, squared_error, X, Y, prior_precision=0.6)
    H = X.mT @ X + 0.6 * torch.eye(2).double()
    found = delta(quadratic, FULL)
    torch.testing.assert_close(found, (-X.mT @ Y, 0.5 * H), rtol=1e-12, atol=1e-12)
    p = torch.sigmoid(X @ FIXED.mean)
    g = X.mT @ (p - Y) + 0.6 * FIXED.mean
    torch.testing.assert_close(delta(LOSS, FIXED), g, rtol=1e-12, atol=1e-14)


def test_the_noise_of_a_known_prior_is_not_sampled():
    prior_only = TotalLoss(lambda theta, x: 0 * x @ theta, squared_error, X, 0 * Y, 0.6)
    exactly = DIAGONAL.natural_gradient(
        0.6 * DIAGONAL.mean, torch.full((2,), 0.6, dtype=torch.float64)
    )
    for estimate in (price, stein):
        found = estimate(prior_only, DIAGONAL, num_samples=1, generator=generator())
        torch.testing.assert_close(found, exactly, rtol=1e-12, atol=1e-12)


# ---- curvatures ---------------------------------------------------------------------------------


def at(curvature, loss, theta):
    return curvature(loss, theta, torch.func.grad(loss)(theta))


def network(theta, inputs):
    """2 – 3 – 1 with tanh, 13 parameters."""
    W, b, v, c = theta[:6].reshape(3, 2), theta[6:9], theta[9:12], theta[12]
    return torch.tanh(inputs @ W.mT + b) @ v + c


THETA = torch.linspace(-1.0, 1.2, 13, dtype=torch.float64)
NETWORK = TotalLoss(network, logistic, X, Y, prior_precision=0.1, num_data=40)


def test_the_diagonal_of_the_hessian_is_its_diagonal():
    torch.testing.assert_close(
        at(hessian_diagonal, NETWORK, THETA), at(hessian, NETWORK, THETA).diagonal()
    )


def test_gauss_newton_is_the_hessian_of_linear_models():
    loss = TotalLoss(linear, logistic, X, Y, prior_precision=0.6, num_data=20)
    theta = FULL.mean
    torch.testing.assert_close(at(gauss_newton, loss, theta), at(hessian, loss, theta))
    classes = torch.tensor([0, 2, 1, 2, 2])
    three = TotalLoss(lambda t, x: x @ t.reshape(2, 3), softmax, X, classes, 0.3)
    theta = torch.linspace(-1, 1, 6, dtype=torch.float64)
    torch.testing.assert_close(at(gauss_newton, three, theta), at(hessian, three, theta))


def test_gauss_newton_is_positive_where_the_hessian_is_not():
    H, G = at(hessian, NETWORK, THETA), at(gauss_newton, NETWORK, THETA)
    assert torch.linalg.eigvalsh(H).min() < -0.1
    assert torch.linalg.eigvalsh(G).min() > 0.1 - 1e-12


def test_gradients_are_squared_example_by_example():
    expected = torch.full_like(THETA, 0.1)
    for x, y in zip(X, Y, strict=True):
        one = TotalLoss(network, logistic, x[None], y[None])
        expected += 40 / 5 * torch.func.grad(one)(THETA) ** 2
    torch.testing.assert_close(at(squared_gradients, NETWORK, THETA), expected)


def test_the_squared_minibatch_gradient_mixes_gradient_and_curvature():
    # Over all batches of M from N: E[ĝ²] = w N h + (1 − w) g², w = (N − M)/(M(N − 1)), h = Σgᵢ².
    loss, theta, N, M = TotalLoss(linear, logistic, X, Y), FULL.mean, 5, 2
    pairs = torch.combinations(torch.arange(N), M)
    batches = [TotalLoss(linear, logistic, X[B], Y[B], num_data=N) for B in pairs]
    mean = torch.stack([at(squared_batch_gradient, b, theta) for b in batches]).mean(0)
    w = (N - M) / (M * (N - 1))
    g, h = torch.func.grad(loss)(theta), at(squared_gradients, loss, theta)
    torch.testing.assert_close(mean, w * N * h + (1 - w) * g**2)


# ---- losses -------------------------------------------------------------------------------------


def test_minibatches_of_an_epoch_add_up_to_the_loss():
    theta, whole = FULL.mean, []
    for _, part in zip(range(3), LOSS.minibatches(2, generator()), strict=False):
        assert part.num_data == 5 and part.prior_precision == 0.6
        whole.append(len(part.targets) / 5 * part(theta))
    assert [len(part.targets) for _, part in zip(range(3), LOSS.minibatches(2), strict=False)] == [
        2, 2, 1,
    ]  # fmt: skip
    torch.testing.assert_close(sum(whole), LOSS(theta))


def test_a_part_of_a_part_is_weighted_by_all_the_data():
    part = next(LOSS.minibatches(4, generator()))
    again = next(part.minibatches(2, generator()))
    assert again.num_data == 5 and again.weight == 2.5


def test_losses_of_examples_are_those_of_torch():
    f = torch.linspace(-60, 60, 41, dtype=torch.float64)
    y = (torch.arange(41) % 2).double()
    F = torch.nn.functional
    expected = F.binary_cross_entropy_with_logits(f, y, reduction="none")
    torch.testing.assert_close(logistic(f, y), expected, rtol=1e-12, atol=1e-13)
    slope = torch.func.grad(lambda f: logistic(f, y).sum())(f)
    torch.testing.assert_close(slope, torch.sigmoid(f) - y, rtol=0, atol=1e-14)
    outputs, classes = f[:39].reshape(13, 3), torch.arange(13) % 3
    expected = F.cross_entropy(outputs, classes, reduction="none")
    torch.testing.assert_close(softmax(outputs, classes), expected)
    torch.testing.assert_close(squared_error(f, y), 0.5 * (f - y) ** 2)


def perceptron() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layers = torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)
        return torch.nn.Sequential(*layers).double()


def test_a_module_is_a_model_of_its_parameters():
    module = perceptron()
    model, theta = from_module(module)
    assert theta.shape == (13,) and not theta.requires_grad
    torch.testing.assert_close(model(theta, X), module(X)[:, 0].detach())
    model(0 * theta, X)
    torch.testing.assert_close(from_module(module)[1], theta, rtol=0, atol=0)
    loss = TotalLoss(model, logistic, X, Y)
    logistic(module(X)[:, 0], Y).sum().backward()
    expected = torch.cat([p.grad.reshape(-1) for p in module.parameters()])
    torch.testing.assert_close(torch.func.grad(loss)(theta), expected)
    with pytest.raises(ValueError, match="Tanh has no parameters"):
        from_module(torch.nn.Tanh())


def test_adam_trains_a_module_as_torch_does():
    module = perceptron()
    model, theta = from_module(module)
    loss = TotalLoss(model, logistic, X, Y)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    q0 = blr.DiagonalGaussian.from_moments(theta, 1.0)
    for q in blr.run(blr.recipes.adam(lr=0.05), loss, q0, 40):
        optimizer.zero_grad()
        logistic(module(X)[:, 0], Y).sum().backward()
        optimizer.step()
        torch.testing.assert_close(q.mean, from_module(module)[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TotalLoss(linear, logistic, X, Y[:3]), ValueError, "got 5 and 3"),
        (lambda: TotalLoss(linear, logistic, X[:0], Y[:0]), ValueError, "at least one"),
        (lambda: TotalLoss(linear, logistic, X, Y, -1.0), ValueError, "prior_precision must be"),
        (lambda: next(LOSS.minibatches(0)), ValueError, "batch must be at least 1"),
        (lambda: monte_carlo(LOSS, FULL, 1), ValueError, "at least 2"),
        (lambda: price(LOSS, FULL, 0), ValueError, "num_samples must be at least 1, got 0"),
        (lambda: stein(LOSS, FULL, 0), ValueError, "num_samples must be at least 1, got 0"),
        (
            lambda: delta(torch.sum, FULL, gauss_newton),
            TypeError,
            "loss must be a TotalLoss, got builtin_function_or_method; pass one, which knows",
        ),
        (
            lambda: price(lambda t: t.sum(), DIAGONAL, curvature=squared_gradients),
            TypeError,
            "loss must be a TotalLoss, got function; pass one, which knows",
        ),
        (lambda: delta(LOSS, blr.Gamma.from_shape_rate(1, 1)), TypeError, "use exact or"),
        (
            lambda: delta(LOSS, blr.DiagonalGaussian.from_moments([[0.0], [1.0]], 1.0)),
            ValueError,
            "one Gaussian, got a batch",
        ),
    ],
)
def test_what_cannot_be_done_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_single_example_and_a_constant_feature_are_fine():
    one = TotalLoss(linear, logistic, torch.ones((1, 2)).double(), torch.ones(1).double(), 0.5)
    q = blr.Gaussian.from_moments([0.0, 0.0], torch.eye(2).double())
    *_, q = blr.run(blr.recipes.newton(), one, q, 30, tolerance=1e-12)
    assert torch.func.grad(one)(q.mean).abs().max() < 1e-12
    assert gradients.at_mean(one, q)[0].shape == (2,)

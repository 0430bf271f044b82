"""Signs: the family, the estimators of its natural gradient, and the two recipes made of them."""

import itertools
import math
from functools import partial

import pytest
import scipy.special
import torch
from oracles.binary import LOSS, start

import blr
from blr.gradients import delta, exact, monte_carlo, relaxed, straight_through, with_prior
from blr.likelihoods import TotalLoss, linear, logistic
from blr.recipes import bayesbinn, ste

D = 6
SIGNS = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=D))).double()


def numbers(*shape, seed):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=source)


J = numbers(D, D, seed=0)
J = 0.2 * (J + J.mT - torch.diag(2 * J.diagonal()))
A, B = numbers(D, seed=1), numbers(D, seed=2)
Q = blr.SignBernoulli(natural=0.6 * numbers(D, seed=3))


def multilinear(theta):
    return 0.5 * theta @ J @ theta + A @ theta


def crooked(theta):
    return multilinear(theta) + torch.tanh(0.7 * B @ theta) + 0.4 * torch.cos(B @ theta)


def expected(loss, mu):
    """E_q[ℓ̄] as the sum over all 2⁶ vectors of signs."""
    weights = ((1 + SIGNS * mu) / 2).prod(-1)
    return weights @ torch.stack([loss(theta) for theta in SIGNS])


def enumerated(loss, q):
    """∂/∂μⱼ E_q[ℓ̄] = ½ E[ℓ̄(θⱼ = 1) − ℓ̄(θⱼ = −1)], over the other signs."""
    mu, slopes = q.mean, []
    values = torch.stack([loss(theta) for theta in SIGNS])
    for j in range(D):
        others = torch.arange(D) != j
        weights = ((1 + SIGNS[:, others] * mu[others]) / 2).prod(-1)
        slopes.append(0.5 * (weights * values * SIGNS[:, j]).sum())
    return torch.stack(slopes)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(estimate, n):
    """Mean, its standard error, and the standard deviation of one estimate."""
    G = torch.stack([estimate() for _ in range(n)])
    return G.mean(0), G.std(0) / math.sqrt(n), G.std(0)


# ---- the family ---------------------------------------------------------------------------------


def test_probabilities_and_entropy_are_those_of_two_outcomes():
    p = torch.tensor([1e-9, 0.2, 0.5, 0.93]).double()
    q = blr.SignBernoulli.from_probability(p)
    torch.testing.assert_close(q.probability, p, rtol=1e-12, atol=0)
    torch.testing.assert_close(q.mean, 2 * p - 1, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(q.variance, 4 * p * (1 - p), rtol=1e-12, atol=0)
    H = scipy.special.entr(p.numpy()) + scipy.special.entr(1 - p.numpy())
    torch.testing.assert_close(q.entropy(), torch.tensor(H.sum()), rtol=1e-12, atol=0)
    total = torch.logsumexp(Q.log_prob(SIGNS), 0)
    assert abs(total.item()) < 1e-13
    zero_one = blr.Bernoulli.from_probability(p)
    torch.testing.assert_close(q.natural, 0.5 * zero_one.natural)


def test_far_from_zero_nothing_is_lost():
    q = blr.SignBernoulli(natural=torch.tensor([300.0, -40.0, 1e8]).double())
    assert torch.equal(q.log_partition(), q.natural.abs().sum())
    small = 4 * torch.exp(-2 * q.natural.abs())
    torch.testing.assert_close(q.variance, small, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        blr.SignBernoulli(natural=[40.0]).entropy(),
        torch.tensor(81 * math.exp(-80), dtype=torch.float64),
        rtol=1e-12,
        atol=0,
    )
    assert torch.equal(q.mode, torch.tensor([1.0, -1.0, 1.0]).double())


def test_what_is_no_vector_of_signs_has_no_probability():
    q = blr.SignBernoulli(natural=[0.3, -1.0])
    log_p = q.log_prob([[1.0, -1.0], [1.0, 0.5], [0.0, 1.0]])
    assert torch.isfinite(log_p[0]) and (log_p[1:] == -torch.inf).all()


def test_the_sign_of_zero_is_plus_one():
    q = blr.SignBernoulli(natural=[0.0, -0.0, 1e-300, -1e-300])
    assert q.mode.tolist() == [1.0, 1.0, 1.0, -1.0]
    assert straight_through(lambda theta: (theta**2).sum() / 2, q).tolist() == q.mode.tolist()


# ---- relaxed signs ------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [3.0, 1.0, 0.1, 1e-3, 1e-10])
def test_relaxed_draws_have_the_signs_of_the_draws(tau):
    theta, slope = Q.relaxed_sample(50, tau, generator(1))
    assert torch.equal(theta.sign(), Q.sample(50, generator(1)))
    assert theta.shape == slope.shape == (50, D) and (slope >= 0).all()


def test_the_slope_is_the_derivative_at_fixed_noise():
    def draw(mu):
        q = blr.SignBernoulli.from_expectation(mu)
        return q.relaxed_sample(1, 0.3, generator(2))[0][0]

    slope = Q.relaxed_sample(1, 0.3, generator(2))[1][0]
    jacobian = torch.autograd.functional.jacobian(draw, Q.mean)
    torch.testing.assert_close(torch.diag(slope), jacobian, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lam", [20.0, 300.0, -4e4])
def test_the_slope_needs_no_epsilon_where_both_its_parts_vanish(dtype, lam):
    # For |λ| → ∞ and τ = 1 the ratio is e^{∓2δ} = ((1 − u)/u)^{±1}.
    q = blr.SignBernoulli(natural=torch.full((1000,), lam, dtype=dtype))
    u = torch.rand((1, 1000), dtype=torch.float64, generator=generator(3))
    _, slope = q.relaxed_sample(1, 1.0, generator(3))
    odds = (1 - u) / u if lam > 0 else u / (1 - u)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(slope, odds.to(dtype), rtol=tolerance, atol=0)
    theta, slope = q.relaxed_sample(3, 1e-10, generator(4))
    assert (slope == 0).all() and torch.equal(theta, q.mode.expand(3, -1))


def test_a_slope_beyond_floating_numbers_is_said():
    q = blr.SignBernoulli(natural=torch.tensor([1.0, 900.0]).double())
    message = r"slope of a relaxed draw must be finite.*\|λ\| is up to 900: lower .*1 or less"
    with pytest.raises(ValueError, match=message):
        q.relaxed_sample(2, 4.0, generator())


def test_a_rate_at_which_bayesbinn_diverges_is_the_cause_that_is_named():
    # On a flat loss λ doubles at each step, until 2|λ| is no number: λ is 2¹⁰²³ at step 1024.
    q0 = blr.SignBernoulli(natural=[1.0, -1.0])
    recipe = bayesbinn(lr=3.0, relaxation=1.0, generator=generator())
    message = r"step 1024: slope .*\|λ\| is up to 8\.99e\+307: lower the learning rate$"
    with pytest.raises(ValueError, match=message):
        list(blr.run(recipe, lambda theta: 0 * theta.sum(), q0, 1100))


# ---- estimators of ∇_μ --------------------------------------------------------------------------


def test_exact_is_half_the_difference_that_a_sign_makes():
    found = exact(partial(expected, crooked), Q)
    torch.testing.assert_close(found, enumerated(crooked, Q), rtol=1e-12, atol=1e-13)


def test_delta_is_exact_for_multilinear_losses_only():
    torch.testing.assert_close(delta(multilinear, Q), enumerated(multilinear, Q))
    assert (delta(crooked, Q) - enumerated(crooked, Q)).abs().max() > 0.1
    bits = blr.Bernoulli(natural=2 * Q.natural)  # the same, as zeros and ones: θ = 2b − 1
    found = delta(lambda b: multilinear(2 * b - 1), bits)
    torch.testing.assert_close(found, 2 * enumerated(multilinear, Q))


def test_monte_carlo_is_unbiased_for_signs():
    estimate = partial(monte_carlo, crooked, Q, num_samples=30, generator=generator(5))
    mean, error, _ = draws(estimate, 400)
    assert ((mean - enumerated(crooked, Q)).abs() / error).max() < 4.5


def test_the_straight_through_estimator_is_a_derivative_elsewhere():
    found = straight_through(multilinear, Q)
    torch.testing.assert_close(found, J @ Q.natural.sign() + A)
    assert (found - enumerated(multilinear, Q)).abs().max() > 0.1
    torch.testing.assert_close(straight_through(lambda t: A @ t, Q), A)


@pytest.mark.parametrize("tau", [1.0, 0.4])
def test_relaxed_is_unbiased_for_the_relaxed_objective(tau):
    # E[ℓ̄(tanh((λ + δ)/τ))] by the trapezoidal rule in δ, whose density is ½ sech²δ.
    grid = torch.linspace(-18, 18, 721, dtype=torch.float64)
    density = 0.5 / torch.cosh(grid) ** 2 * (grid[1] - grid[0])
    w, q = density[:, None] * density, blr.SignBernoulli(natural=[0.4, -0.9])

    def loss(x, y):
        return torch.tanh(1.3 * x - 0.8 * y + 0.5) + x * y**2 + 0.3 * torch.cos(2 * x + y)

    def objective(mu):
        x, y = ((torch.atanh(mu)[k] + grid) / tau for k in range(2))
        return (w * loss(torch.tanh(x)[:, None], torch.tanh(y)[None])).sum()

    slope = torch.func.grad(objective)(q.mean)
    estimate = partial(relaxed, lambda t: loss(*t), q, tau, 40, generator(6))
    mean, error, _ = draws(estimate, 500)
    assert ((mean - slope).abs() / error).max() < 4.5
    assert error.max() < 0.05 * slope.abs().max()


def relaxed_moments(tau, n=200_000):
    q = blr.SignBernoulli(natural=Q.natural)
    theta, slope = q.relaxed_sample(n, tau, generator(7))
    G = slope * torch.func.vmap(torch.func.grad(crooked))(theta)
    return G.mean(0), G.std(0) / math.sqrt(n), G.var(0)


def test_the_bias_of_relaxed_vanishes_with_its_temperature_and_the_variance_grows():
    truth = enumerated(crooked, Q)
    biases = []
    for tau in (2.0, 1.0, 0.4):
        mean, error, _ = relaxed_moments(tau)
        biases.append((mean - truth).abs().max().item())
        assert biases[-1] > 10 * error.max()
    assert sorted(biases, reverse=True) == biases and biases[0] > 2 * biases[-1]
    mean, error, _ = relaxed_moments(0.005)
    assert ((mean - truth).abs() / error).max() < 4.5
    variances = torch.stack([tau * relaxed_moments(tau)[2] for tau in (0.04, 0.02, 0.01)])
    assert (variances / variances[0] - 1).abs().max() < 0.15


def test_samples_of_relaxed_are_averaged():
    theta, slope = Q.relaxed_sample(3, 0.5, generator(8))
    by_hand = sum(s * torch.func.grad(crooked)(t) for t, s in zip(theta, slope, strict=True)) / 3
    torch.testing.assert_close(relaxed(crooked, Q, 0.5, 3, generator(8)), by_hand)


# ---- the prior ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "prior"),
    [
        (Q, blr.SignBernoulli(natural=numbers(D, seed=9))),
        (blr.Poisson.from_rate(3.2), blr.Poisson.from_rate(7.0)),
        (
            blr.FixedGaussian.from_moments([1.0, -2.0], [[2.0, 0.3], [0.3, 1.0]]),
            blr.FixedGaussian.from_moments([0.5, 0.1], [[2.0, 0.3], [0.3, 1.0]]),
        ),
    ],
    ids=lambda q: type(q).__name__,
)
def test_a_prior_enters_by_its_natural_parameters(q, prior):
    nothing = lambda loss, q: torch.zeros_like(q.natural)  # noqa: E731
    gradient = with_prior(nothing, prior)

    def cross_entropy(mu):  # E_q[−log p₀] = KL(q‖p₀) + H(q)
        p = type(q).from_expectation(mu, q)
        return p.kl(prior) + p.entropy()

    mu = q.expectation().clone().requires_grad_()
    (slope,) = torch.autograd.grad(cross_entropy(mu), mu)
    torch.testing.assert_close(gradient(None, q), slope, rtol=1e-9, atol=1e-11)
    after = blr.learn(q, gradient(None, q), lr=1.0)
    torch.testing.assert_close(after.natural, prior.natural)


def test_the_posterior_of_one_task_is_the_prior_of_the_next():
    first, second = (lambda theta: A @ theta), (lambda theta: B @ theta)
    flat = blr.SignBernoulli(natural=torch.zeros(D).double())
    (q1,) = blr.run(blr.Rule(delta), first, flat, 1)
    (q2,) = blr.run(blr.Rule(with_prior(delta, q1)), second, q1, 1)
    torch.testing.assert_close(q2.natural, -A - B)
    recipe = bayesbinn(lr=1.0, relaxation=0.05, num_samples=500, prior=q1, generator=generator(9))
    (q3,) = blr.run(recipe, lambda theta: 0 * theta.sum(), flat, 1)
    torch.testing.assert_close(q3.natural, q1.natural)


# ---- the recipes --------------------------------------------------------------------------------


def test_at_rest_the_delta_method_solves_the_mean_field_equations():
    q0 = blr.SignBernoulli(natural=torch.zeros(D).double())
    *_, q = blr.run(blr.Rule(delta, lr=0.3), multilinear, q0, 500, tolerance=1e-13)
    torch.testing.assert_close(q.mean, torch.tanh(-(J @ q.mean + A)), rtol=1e-10, atol=1e-12)
    bound = multilinear(q.mean) - q.entropy()
    log_z = torch.logsumexp(-torch.stack([multilinear(theta) for theta in SIGNS]), 0)
    assert bound > -log_z and bound + log_z < 1.0


def test_weight_decay_of_latent_weights_only_changes_the_rate():
    # (1 − ρ)λ − ρg has the signs of λ − ρ(1 − ρ)^{−t}g: scale does not matter to a sign.
    rho, q0 = 0.01, start()
    decayed = list(blr.run(ste(lr=rho), LOSS, q0, 80))
    growing = blr.run(ste(lr=lambda t: rho * (1 - rho) ** -t, temperature=0.0), LOSS, q0, 80)
    for t, (a, b) in enumerate(zip(decayed, growing, strict=True), 1):
        assert torch.equal(a.mode, b.mode)
        torch.testing.assert_close(a.natural, (1 - rho) ** t * b.natural)


@pytest.mark.parametrize("recipe", [ste(lr=0.25), bayesbinn(lr=0.25, beta=0.5), ste(0.25, 0.0)])
def test_without_gradient_the_signs_are_forgotten_or_kept(recipe):
    q0 = blr.SignBernoulli(natural=torch.tensor([2.0, -1.0, 0.0]).double())
    (q,) = blr.run(recipe, lambda theta: 0 * theta.sum(), q0, 1)
    kept = 1 - 0.25 * recipe.temperature
    torch.testing.assert_close(q.natural, kept * q0.natural, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_recipes_learn_from_minibatches(dtype):
    loss = TotalLoss(linear, logistic, LOSS.inputs.to(dtype), LOSS.targets.to(dtype))
    q0 = blr.SignBernoulli(natural=start().natural.to(dtype))
    cooled = bayesbinn(lr=2e-3, num_samples=4, beta=0.9, generator=generator(10))
    for recipe in (ste(lr=1e-3), cooled):
        *_, q = blr.run(recipe, loss, q0, 200, batch=100, generator=generator(11))
        assert q.natural.dtype == dtype
        assert loss(q.mode) < 0.3 * loss(q0.mode)


def test_one_example_and_a_constant_feature_are_fine():
    one = TotalLoss(linear, logistic, torch.ones((1, 3)).double(), torch.ones(1).double())
    recipe = bayesbinn(lr=0.1, generator=generator(12))
    *_, q = blr.run(recipe, one, blr.SignBernoulli(natural=torch.zeros(3).double()), 100)
    assert torch.isfinite(q.natural).all() and (q.natural > 0).all()


def test_a_rate_that_overflows_is_named_with_its_step():
    q0 = blr.SignBernoulli(natural=torch.ones(D).double())
    with pytest.raises(ValueError, match=r"step 1: the learning rate inf leads out of .*SignB"):
        list(blr.run(ste(lr=math.inf), crooked, q0, 3))


GAUSSIAN = blr.Gaussian.from_moments([0.0], [[1.0]])
PENALISED = TotalLoss(linear, logistic, LOSS.inputs, LOSS.targets, prior_precision=0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: relaxed(crooked, Q, 0.0), ValueError, "relaxation must be positive"),
        (lambda: relaxed(crooked, Q, math.nan), ValueError, "relaxation must be positive"),
        (
            lambda: relaxed(crooked, Q, 1.0, 0),
            ValueError,
            "num_samples.* must be at least 1, got 0",
        ),
        (lambda: relaxed(crooked, GAUSSIAN), TypeError, "q must be SignBernoulli, got Gaussian"),
        (lambda: straight_through(crooked, GAUSSIAN), TypeError, "use delta or monte_carlo"),
        (
            lambda: straight_through(crooked, blr.SignBernoulli(natural=torch.zeros((2, D)))),
            ValueError,
            "one vector, got a batch",
        ),
        (lambda: straight_through(PENALISED, start()), ValueError, "use with_prior"),
        (lambda: delta(PENALISED, start()), ValueError, "prior_precision must be 0"),
        (lambda: blr.SignBernoulli.from_probability([0.5, 1.0]), ValueError, "strictly between"),
        (lambda: blr.SignBernoulli.from_expectation([0.5, -1.0]), ValueError, "artanh"),
        (lambda: blr.SignBernoulli(natural=0.5), ValueError, "wrap a single number in a list|fit"),
        (lambda: blr.SignBernoulli(natural=[math.nan]), ValueError, "finite"),
    ],
)
def test_what_cannot_be_done_with_signs_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()

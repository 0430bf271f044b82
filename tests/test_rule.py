"""The rule itself, and running it."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

import blr
from blr import _tree, gradients
from blr.likelihoods import TotalLoss, linear, logistic, squared_error

COVARIANCE = torch.tensor([[0.8, 0.3, 0.0], [0.3, 0.5, -0.1], [0.0, -0.1, 0.9]]).double()


def problem(n: int = 23, seed: int = 1) -> TotalLoss:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn((n, 3), dtype=torch.float64, generator=generator)
    y = (torch.rand(n, dtype=torch.float64, generator=generator) < 0.6).double()
    return TotalLoss(linear, logistic, X, y, prior_precision=0.7)


def start(precision=2.0) -> blr.Gaussian:
    return blr.Gaussian.from_moments([0.3, -0.2, 0.1], precision * torch.eye(3).double())


def close(a, b, rtol=1e-10, atol=1e-12):
    for x, y in zip(_tree.leaves(a), _tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


# ---- entropy in μ -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "q",
    [
        blr.Bernoulli.from_probability(0.3),
        blr.SignBernoulli.from_probability([0.3, 0.8]),
        blr.Categorical.from_probabilities([0.2, 0.5, 0.3]),
        blr.Exponential.from_rate(1.3),
        blr.Poisson.from_rate(3.2),
        blr.Poisson.from_rate(80.0),
        blr.Gaussian.from_moments([1.0, -2.0, 0.5], covariance=COVARIANCE),
        blr.DiagonalGaussian.from_moments([1.0, -2.0], [2.0, 0.3]),
        blr.FixedGaussian.from_moments([1.0, -2.0, 0.5], COVARIANCE),
    ],
    ids=lambda q: type(q).__name__,
)
def test_the_gradient_of_the_entropy_is_autodiff_in_expectation_parameters(q):
    leaves = tuple(x.clone().requires_grad_() for x in _tree.leaves(q.expectation()))
    mu = leaves if isinstance(q.natural, tuple) else leaves[0]
    H = type(q).from_expectation(mu, q).entropy()
    expected = torch.autograd.grad(H, leaves)
    ours = tuple(_tree.leaves(q.entropy_gradient()))
    close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rate", [1e-4, 0.3, 59.9, 60.1, 700.0])
def test_the_poisson_entropy_slope_is_an_expectation_by_scipy(rate):
    counts = np.arange(3000)
    expected = (scipy.stats.poisson(rate).pmf(counts) * np.log1p(counts)).sum() - np.log(rate)
    found = blr.Poisson.from_rate(rate).entropy_gradient().item()
    assert abs(found - expected) < 1e-12 * max(1, abs(np.log(rate)))


# ---- one step -----------------------------------------------------------------------------------


def test_with_unit_rates_what_was_there_is_forgotten_exactly():
    gradient = (torch.tensor([1.0, 2.0, 3.0]).double(), 0.5 * COVARIANCE)
    near, far = (blr.learn(start(S), gradient) for S in (1.0, 1e12))
    assert torch.equal(near.natural[1], far.natural[1])
    close(near.natural, _tree.scale(-1.0, gradient), rtol=0, atol=0)


def test_one_step_is_the_weighted_mean_of_old_and_new():
    q, gradient = start(), (torch.tensor([1.0, 2.0, 3.0]).double(), 0.5 * COVARIANCE)
    after = blr.learn(q, gradient, lr=0.3)
    mixed = _tree.add(_tree.scale(0.7, q.natural), _tree.scale(-0.3, gradient))
    close(after.natural, mixed)
    cold = blr.learn(q, gradient, lr=0.3, temperature=0.0)
    close(cold.natural, _tree.sub(q.natural, _tree.scale(0.3, gradient)))


@pytest.mark.parametrize(
    "q",
    [
        blr.DiagonalGaussian.from_moments([1.0, -2.0], [2.0, 0.3]),
        blr.FixedGaussian.from_moments([1.0, -2.0], 3.0),
        blr.Poisson.from_rate([3.2, 0.1]),
        blr.Product.from_factors(
            w=blr.FixedGaussian.from_moments([1.0, -2.0], 3.0),
            z=blr.Bernoulli.from_probability(0.4),
        ),
    ],
    ids=lambda q: type(q).__name__,
)
def test_a_step_leaves_what_it_was_given_as_it_was(q):
    gradient = _tree.tree_map(lambda x: 0.1 * x.cos(), q.natural)
    given = [*_tree.leaves(q.natural), *_tree.leaves(gradient)]
    before = [x.clone() for x in given]
    after = blr.learn(q, gradient, lr=0.3, temperature=0.5)
    assert all(map(torch.equal, given, before))
    trees = (after.natural, q.natural, q.entropy_gradient(), gradient)
    for new, lam, slope, g in zip(*map(_tree.leaves, trees), strict=True):
        close(new, lam + 0.15 * slope - 0.3 * g)


def test_a_batch_of_gradients_or_of_more_digits_gives_what_broadcasting_says():
    q = blr.DiagonalGaussian.from_moments(torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5]))
    g, h = torch.randn(5, 2).double(), torch.rand(5, 2).double()
    after = blr.learn(q, (g, h), lr=0.5)
    assert after.batch_shape == (5,)
    assert after.dtype == torch.float64
    for i in range(5):
        one = blr.learn(q.at(tuple(x.double() for x in q.natural)), (g[i], h[i]), lr=0.5)
        close(tuple(x[i] for x in after.natural), one.natural)


@pytest.mark.parametrize(
    ("q", "gradient"),
    [
        (blr.Gamma.from_shape_rate(2.5, 1.7), (torch.tensor(-0.4), torch.tensor(0.9))),
        (blr.Bernoulli.from_probability(0.3), torch.tensor(0.8)),
        (blr.Poisson.from_rate(3.2), torch.tensor(0.8)),
        (
            blr.DiagonalGaussian.from_moments([0.4, -1.0], [2.0, 3.0]),
            (torch.tensor([0.3, -2.0]), torch.tensor([0.7, 0.2])),
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_step_minimises_the_linearised_objective_plus_kl(q, gradient):
    # λ⁺ = argmin ⟨∇_μ(E[ℓ̄] − T H), μ⟩ + KL(q_μ‖q)/ρ: mirror descent, stationary in λ.
    rho, T, dims = 0.25, 0.6, q.natural_ndims
    gradient = _tree.tree_map(lambda x: x.double(), gradient)
    direction = _tree.sub(gradient, _tree.scale(T, q.entropy_gradient()))
    after = blr.learn(q, gradient, rho, T)

    def objective(flat):
        p = q._at(_tree.unflatten(flat, q.natural, dims))
        return _tree.inner(direction, p.expectation(), dims) + p.kl(q) / rho

    lam = _tree.flatten(after.natural, dims)
    slope = torch.func.grad(objective)(lam)
    assert slope.abs().max() < 1e-12 * (1 + torch.func.hessian(objective)(lam).abs().max())
    assert (torch.func.grad(objective)(_tree.flatten(q.natural, dims)).abs() > 1e-3).any()


def test_for_a_quadratic_loss_the_error_shrinks_by_one_minus_rho():
    data = problem()
    loss = TotalLoss(linear, squared_error, data.inputs, data.targets, prior_precision=0.7)
    X = data.inputs
    optimum = (X.mT @ data.targets, -0.5 * (X.mT @ X + 0.7 * torch.eye(3).double()))
    q, rho = start(), 0.2
    for t, after in enumerate(blr.run(blr.Rule(gradients.delta, lr=rho), loss, q, 15), 1):
        gap = _tree.sub(after.natural, optimum)
        close(gap, _tree.scale((1 - rho) ** t, _tree.sub(q.natural, optimum)), rtol=1e-9)


def test_momentum_is_the_heavy_ball_and_zero_is_the_rule():
    loss, q0, rho, gamma = problem(), start(30.0), 0.1, 0.4
    previous, q = q0, q0
    for found in blr.run(blr.Rule(gradients.delta, lr=rho, momentum=gamma), loss, q0, 6):
        step = blr.learn(q, gradients.delta(loss, q), rho)
        ball = _tree.scale(gamma, _tree.sub(q.natural, previous.natural))
        previous, q = q, step.add(ball)
        close(found.natural, q.natural)
    plain = blr.run(blr.Rule(gradients.delta, lr=rho, momentum=0.0), loss, q0, 6)
    q = q0
    for found in plain:
        q = blr.learn(q, gradients.delta(loss, q), rho)
        close(found.natural, q.natural, rtol=0, atol=0)


def test_the_average_is_of_the_whole_objective_and_zero_is_the_rule():
    loss, q0, rho, beta, T = problem(), start(30.0), 0.1, 0.7, 0.8
    recipe = blr.Rule(gradients.delta, lr=rho, temperature=T, average=beta)
    q, mean = q0, _tree.scale(0.0, q0.natural)
    for t, found in enumerate(blr.run(recipe, loss, q0, 6), 1):
        whole = _tree.add(gradients.delta(loss, q), _tree.scale(T, q.natural))
        mean = _tree.add(_tree.scale(beta, mean), _tree.scale(1 - beta, whole))
        q = q.at(_tree.sub(q.natural, _tree.scale(rho / (1 - beta**t), mean)))
        close(found.natural, q.natural)
    q = q0
    for found in blr.run(blr.Rule(gradients.delta, lr=rho, average=0.0), loss, q0, 6):
        q = blr.learn(q, gradients.delta(loss, q), rho)
        close(found.natural, q.natural, rtol=0, atol=0)


def test_the_rule_at_rest_is_the_best_gaussian():
    # One parameter, logistic loss: SciPy minimises E_q[ℓ̄] − H(q) over mean and log precision.
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    z, w = torch.tensor(nodes), torch.tensor(weights / np.sqrt(2 * np.pi))
    x, y = torch.tensor([1.5, -0.4, 2.2]).double(), torch.tensor([1.0, 0.0, 1.0]).double()

    def loss(theta):
        return logistic(theta[..., None] * x, y).sum(-1) + 0.5 * theta**2

    def expected_loss(mu):
        m, v = mu[0][0], mu[1][0, 0] - mu[0][0] ** 2
        return (w * loss(m + v.sqrt() * z)).sum()

    def objective(p):
        m, v = torch.tensor(p[0]), torch.tensor(np.exp(-p[1]))
        return ((w * loss(m + v.sqrt() * z)).sum() - 0.5 * v.log()).item()

    best = scipy.optimize.minimize(objective, [0.0, 0.0], tol=1e-12).x
    q0 = blr.Gaussian.from_moments([0.0], [[1.0]])
    recipe = blr.Rule(gradients.exact, lr=0.5)
    *_, q = blr.run(recipe, expected_loss, q0, 200, tolerance=1e-13)
    np.testing.assert_allclose([q.mean.item(), q.precision.log().item()], best, atol=1e-6)


# ---- leaving the domain, running ----------------------------------------------------------------


def test_leaving_the_domain_names_the_step_the_block_and_the_remedy():
    loss = lambda theta: (0.25 * theta**4 - 0.5 * theta**2).sum()  # noqa: E731
    q = blr.Gaussian.from_moments([0.1, 0.0], torch.eye(2).double())
    message = r"step 1: the learning rate 1 leads out.*precision S.*Lower lr"
    with pytest.raises(ValueError, match=message):
        list(blr.run(blr.Rule(gradients.delta), loss, q, 5))
    diagonal = blr.DiagonalGaussian.from_moments([0.1, 0.0], 1.0)
    recipe = blr.DiagonalRule(gradients.at_mean)
    with pytest.raises(ValueError, match=r"step 1: the rates lr = 1.*precision.*Lower lr"):
        list(blr.run(recipe, loss, diagonal, 5))
    recipe = blr.DiagonalRule(gradients.at_mean, lr=0.2, retraction=True)
    for kept in blr.run(recipe, loss, diagonal, 20):
        assert (kept.precision > 0).all()


CURVED = (
    "use a curvature that cannot be negative such as {}, or the improved rule, step=blr.improve"
)


@pytest.mark.parametrize(
    ("q", "remedy"),
    [
        (start(), ", " + CURVED.format("gauss_newton")),
        (
            blr.DiagonalGaussian.from_moments([1.0, -2.0], 2.0),
            ", " + CURVED.format("squared_gradients"),
        ),
        (blr.Gamma.from_shape_rate(2.0, 1.0), ", or use the improved rule, step=blr.improve"),
        (blr.FixedGaussian.from_moments([1.0, -2.0], 3.0), ""),
        (blr.SignBernoulli(natural=[0.3, -1.0]), ""),
        (blr.Dirichlet.from_concentrations([1.0, 2.0]), ""),
        (blr.SpikeAndSlab.from_moments([1.0], 1.0, torch.tensor([0]), 0.5), ""),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_remedy_is_one_that_the_family_has(q, remedy):
    beyond = _tree.tree_map(lambda x: torch.full_like(x, torch.inf), q.natural)
    with pytest.raises(ValueError) as caught:
        blr.learn(q, beyond, lr=0.25)
    family = type(q).__name__
    assert f"the learning rate 0.25 leads out of the domain of {family}: " in str(caught.value)
    assert str(caught.value).endswith(". Lower lr" + remedy)


def test_a_ball_that_leaves_the_domain_names_the_momentum():
    # s goes from 1 to 0.4, and the ball would take another 0.594.
    slopes = iter(torch.tensor([[-0.3], [0.0]]).double())
    gradient = lambda loss, q: (torch.zeros(1).double(), next(slopes))  # noqa: E731
    recipe = blr.Rule(gradient, temperature=0.0, momentum=0.99)
    with pytest.raises(ValueError, match=r"step 2: the learning rate 1 .*Lower lr or momentum$"):
        list(blr.run(recipe, None, blr.DiagonalGaussian.from_moments([0.0], 1.0), 2))


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": -1.0}, "lr must be positive, got -1.0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"temperature": -0.5}, "temperature must be at least zero, got -0.5"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\), got -0.1"),
        ({"average": 1.0}, r"average must be in \[0, 1\), got 1.0"),
        ({"average": -0.1}, r"average must be in \[0, 1\), got -0.1"),
    ],
)
def test_arguments_out_of_range_are_refused(argument, what):
    with pytest.raises(ValueError, match=what + "; "):
        blr.Rule(gradients.delta, **argument)


def test_a_number_of_steps_below_zero_is_refused_at_once():
    with pytest.raises(ValueError, match="steps must be at least zero, got -1"):
        blr.run(blr.recipes.newton(), problem(), start(), -1)


def test_a_run_stops_when_nothing_changes_and_keeps_its_history():
    history = list(blr.run(blr.recipes.newton(), problem(), start(), 50, tolerance=1e-12))
    assert 3 < len(history) < 12
    assert len(list(blr.run(blr.recipes.newton(), problem(), start(), 7))) == 7
    assert list(blr.run(blr.recipes.newton(), problem(), start(), 0)) == []


def test_a_run_can_be_left_and_calls_the_loss_no_more():
    calls = []

    def loss(theta):
        calls.append(1)
        return (theta**2).sum()

    q0 = blr.FixedGaussian.from_moments([1.0], [[1.0]])
    steps = blr.run(blr.recipes.gradient_descent(), loss, q0, 9)
    next(steps)
    steps.close()
    assert len(calls) == 1


def test_a_progress_bar_is_shown_on_request_only(capsys):
    list(blr.run(blr.recipes.newton(), problem(), start(), 3))
    assert capsys.readouterr().err == ""
    list(blr.run(blr.recipes.newton(), problem(), start(), 3, progress=True))
    assert "0/3" in capsys.readouterr().err


def test_a_schedule_is_a_function_of_the_step():
    seen = []

    def rate(t):
        seen.append(t)
        return 1 / (1 + t)

    list(blr.run(blr.Rule(gradients.delta, lr=rate), problem(), start(), 4))
    assert seen == [1, 2, 3, 4]


def test_minibatches_need_a_loss_that_knows_its_examples():
    with pytest.raises(TypeError, match="batch needs a TotalLoss, got function"):
        blr.run(blr.recipes.newton(), lambda theta: theta.sum(), start(), 3, batch=2)


def test_the_same_generator_gives_the_same_run():
    def path():
        generator = torch.Generator().manual_seed(3)
        q0 = blr.DiagonalGaussian.from_moments(torch.zeros(3).double(), 9.0)
        recipe = blr.recipes.vogn(generator=generator)
        return list(blr.run(recipe, problem(), q0, 5, batch=4, generator=generator))

    state = torch.get_rng_state()
    for a, b in zip(path(), path(), strict=True):
        assert torch.equal(a.natural[0], b.natural[0]) and torch.equal(a.natural[1], b.natural[1])
    assert torch.equal(state, torch.get_rng_state())

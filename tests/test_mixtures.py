"""Mixtures, Student's t, spike and slab: densities, gradients, and the rule."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.special import logsumexp

import blr
from blr import gradients, mixtures
from blr.likelihoods import TotalLoss, linear, logistic
from blr.mixtures import MixtureRule, at_means, at_nodes, at_samples, expectations

torch_eye = torch.eye(2, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close(actual, expected, rtol=1e-10, atol=1e-12):
    actual, expected = (torch.as_tensor(np.asarray(x)) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


PI, M, S = (
    np.array([0.3, 0.5, 0.2]),
    np.array([[-2.0, 0.1], [0.5, -0.4], [2.5, 0.3]]),
    np.array([[[2.0, 0.3], [0.3, 1.0]], [[1.0, -0.2], [-0.2, 3.0]], [[4.0, 1.0], [1.0, 2.0]]]),
)
Q = blr.Mixture.from_components(blr.Gaussian.from_moments(M, S), PI)
DIAGONAL = blr.Mixture.from_components(
    blr.DiagonalGaussian.from_moments(M, [[2.0, 1.0], [1.0, 3.0], [0.5, 4.0]]), PI
)
FIXED = blr.Mixture.from_components(blr.FixedGaussian.from_moments(M, S[0]), PI)
FIXED_DIAGONAL = blr.Mixture.from_components(blr.FixedGaussian.from_moments(M, [2.0, 1.0]), PI)
NUMBER = blr.Mixture.from_components(blr.FixedGaussian.from_moments(M, 1.5), PI)
KINDS = {
    "full": Q,
    "diagonal": DIAGONAL,
    "fixed": FIXED,
    "fixed diagonal": FIXED_DIAGONAL,
    "number": NUMBER,
}
PRECISIONS = {
    "full": S,
    "diagonal": np.stack([np.diag(s) for s in ([2.0, 1.0], [1.0, 3.0], [0.5, 4.0])]),
    "fixed": np.stack([S[0]] * 3),
    "fixed diagonal": np.stack([np.diag([2.0, 1.0])] * 3),
    "number": np.stack([1.5 * np.eye(2)] * 3),
}


def bent(theta):
    """A loss that is no polynomial."""
    return 0.3 * (theta**2).sum(-1) + torch.cos(2 * theta[..., 0] + theta[..., 1])


def wells(theta):
    """Two wells, at −2.0712 and 1.9203, with curvatures 4.435 and 3.531."""
    return ((theta[..., 0] ** 2 - 4) ** 2 / 8 + 0.3 * theta[..., 0]).squeeze()


def scalar(means, precisions=None, weights=None):
    K = len(means)
    s = torch.ones(K) if precisions is None else torch.as_tensor(precisions)
    family = blr.Gaussian.from_moments(np.array(means)[:, None], s.double().reshape(K, 1, 1))
    return blr.Mixture.from_components(family, weights)


# ---- the family ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_is_scipys(kind):
    theta = Q.sample(7, generator())
    normals = [
        scipy.stats.multivariate_normal(m, np.linalg.inv(s))
        for m, s in zip(M, PRECISIONS[kind], strict=True)
    ]
    joint = np.log(PI) + np.stack([n.logpdf(theta.numpy()) for n in normals], 1)
    q = KINDS[kind]
    close(q.log_prob(theta), logsumexp(joint, axis=1))
    r = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
    close(q.responsibilities(theta), r)
    close(q.log_responsibilities(theta), np.log(r))


@pytest.mark.parametrize("kind", KINDS)
def test_the_derivatives_of_the_density_are_those_of_autograd(kind):
    q, theta = KINDS[kind], Q.sample(5, generator(1))
    g, H = q.score(theta)
    close(g, torch.vmap(torch.func.grad(q.log_prob))(theta))
    expected = torch.vmap(torch.func.hessian(q.log_prob))(theta)
    close(H, expected.diagonal(dim1=-2, dim2=-1) if q.diagonal else expected)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_the_samples(kind):
    q, n = KINDS[kind], 200_000
    theta = q.sample(n, generator(2))
    error = theta.std(0) / math.sqrt(n)
    assert ((theta.mean(0) - q.mean).abs() < 5 * error).all()
    second = (theta - q.mean).unsqueeze(-1) * (theta - q.mean).unsqueeze(-2)
    error = second.std(0) / math.sqrt(n)
    assert ((second.mean(0) - q.covariance).abs() < 5 * error).all()


def test_far_from_the_origin_the_density_keeps_its_digits():
    shift = 1e7
    near = scalar([0.0, 1.0], [4.0, 1e4])
    far = scalar([shift, shift + 1], [4.0, 1e4])
    theta = torch.tensor([[0.25], [1.0], [3.0]]).double()
    close(far.log_prob(theta + shift), near.log_prob(theta), rtol=1e-6)


def test_responsibilities_that_underflow_have_logarithms():
    q = scalar([-50.0, 50.0])
    assert q.responsibilities(torch.tensor([50.0]).double())[0] == 0
    close(q.log_responsibilities(torch.tensor([50.0]).double())[0], torch.tensor(-5000.0).double())


def test_a_batch_of_mixtures_is_its_members():
    members = [
        Q,
        blr.Mixture.from_components(blr.Gaussian.from_moments(M + 1, 2 * S), [0.1, 0.2, 0.7]),
    ]
    family = blr.Gaussian.from_moments(np.stack([M, M + 1]), np.stack([S, 2 * S]))
    batch = blr.Mixture(torch.stack([q.log_odds for q in members]), family)
    theta = torch.randn(4, 2, 2, generator=generator(), dtype=torch.float64)
    assert batch.batch_shape == (2,) and batch.sample(6, generator()).shape == (6, 2, 2)
    for k, q in enumerate(members):
        for name in ("log_prob", "responsibilities"):
            close(getattr(batch, name)(theta)[:, k], getattr(q, name)(theta[:, k]))
        for name in ("mean", "covariance", "weights"):
            close(getattr(batch, name)[k], getattr(q, name))


def test_a_mixture_is_a_point():
    back = Q.at(Q.natural)
    close(back.weights, PI)
    close(back.components.precision, S)
    one = scalar([0.3])
    assert isinstance(one.natural[0], torch.Tensor) and one.weights.tolist() == [1.0]
    close(one.at(one.natural).mean, one.mean)
    float32 = blr.Mixture.from_components(
        blr.Gaussian.from_moments(torch.tensor(M).float(), torch.tensor(S).float())
    )
    assert float32.log_prob(float32.mean).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: blr.Mixture.from_components(blr.Gaussian.from_moments([0.0], [[1.0]])),
            "axis for the K",
        ),
        (lambda: blr.Mixture(torch.zeros(3), Q.components), r"log_odds must have shape \(2,\)"),
        (
            lambda: blr.Mixture(torch.tensor([0.0, torch.inf]), Q.components),
            "log_odds must be finite",
        ),
        (lambda: blr.Mixture.from_components(Q.components, [0.5, 0.5, 0.5]), "the sum of probabil"),
        (lambda: blr.Mixture.from_components(Q.components, [1.0, 0.0, 0.0]), "must be positive"),
        (lambda: scalar([0.0], weights=[0.4]), "single component must be one"),
    ],
)
def test_what_is_no_mixture_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- gradients ----------------------------------------------------------------------------------

GRID = np.linspace(-12, 12, 40_001)
P1, M1, S1 = np.array([0.3, 0.5, 0.2]), np.array([-2.0, 0.5, 2.5]), np.array([2.0, 1.0, 3.0])
bent1 = lambda t: 0.3 * t**2 + np.cos(2 * t) + 0.2 * t  # noqa: E731


def bent1_torch(theta):
    return (0.3 * theta**2 + torch.cos(2 * theta) + 0.2 * theta).sum(-1)


def objective(pi, m, s, temperature=1.0):
    """E_q[ℓ̄ + T log q] in one dimension, by a sum over a fine grid."""
    normals = np.sqrt(s / 2 / np.pi) * np.exp(-0.5 * s * (GRID[:, None] - m) ** 2)
    q = normals @ pi
    log_q = np.log(np.maximum(q, 1e-300))
    return ((bent1(GRID) + temperature * log_q) * q).sum() * (GRID[1] - GRID[0])


def slope(f, x, h=1e-5):
    eye = np.eye(len(x)) * h
    return np.array(
        [(8 * (f(x + e) - f(x - e)) - f(x + 2 * e) + f(x - 2 * e)) / (12 * h) for e in eye]
    )


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_expectations_are_the_gradient_in_the_expectation_parameters(temperature):
    # μ = (π_k m_k, π_k(1/s_k + m_k²)) with π fixed: the factor π_k cancels.
    def at(mu):
        m = mu[:3] / P1
        return objective(P1, m, 1 / (mu[3:] / P1 - m**2), temperature)

    by_quadrature = slope(at, np.r_[P1 * M1, P1 * (1 / S1 + M1**2)])
    q = scalar(M1, S1, P1)
    for control in (True, False):
        f, g, H = expectations(
            bent1_torch, q, partial(at_nodes, num_nodes=160), temperature, control=control
        )
        # log q is part of these; the rule adds the entropy of the components.
        lam1, lam2 = q.components.natural_gradient(g, H)
        own1, own2 = q.components.entropy_gradient()
        close((lam1 - temperature * own1).flatten(), by_quadrature[:3], rtol=1e-5)
        close((lam2 - temperature * own2).flatten(), by_quadrature[3:], rtol=1e-5)
        # The weights, components fixed.
        odds = slope(lambda w: objective(np.r_[w, 1 - w.sum()], M1, S1, temperature), P1[:2])
        c = f - temperature * q.components.entropy() + temperature * q.log_weights
        close(c[:2] - c[2], odds, rtol=1e-5)


def test_samples_are_unbiased_and_the_control_takes_noise_away():
    loss = lambda t: 0.2 * bent(t) - Q.log_prob(t)  # noqa: E731
    exact = expectations(loss, Q, partial(at_nodes, num_nodes=40))
    noise, n = {}, 120
    for control in (True, False):
        points = partial(at_samples, num_samples=5, generator=generator(1))
        many = [expectations(loss, Q, points, control=control) for _ in range(n)]
        for name, right in zip(("value", "gradient", "curvature"), exact, strict=True):
            found = torch.stack([getattr(e, name) for e in many])
            noise[name, control] = found.std(0).mean()
            assert ((found.mean(0) - right).abs() < 5 * found.std(0) / math.sqrt(n) + 1e-5).all()
    assert noise["gradient", True] < 0.5 * noise["gradient", False]
    assert noise["value", True] < 0.5 * noise["value", False]


@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize("T", [1.0, 0.4])
def test_at_the_posterior_samples_have_no_noise(kind, T):
    q = KINDS[kind]
    points = partial(at_samples, num_samples=2, generator=generator())
    f, g, H = expectations(lambda t: -T * q.log_prob(t), q, points, T)
    c = f / T - q.components.entropy() + q.log_weights
    close(c, torch.zeros(3).double(), atol=1e-12)
    close(g, torch.zeros(3, 2).double(), atol=1e-12)
    close(H, T * q.components.precision, atol=1e-12)
    rule = MixtureRule(partial(at_samples, num_samples=2, generator=generator()), lr=0.7)
    (after,) = blr.run(rule, lambda t: -q.log_prob(t), q, 1)
    close(after.weights, q.weights)
    close(after.components.mean, q.components.mean)


def test_both_coordinates_of_the_weights_agree_to_first_order_and_must_not_be_mixed():
    q = scalar(M1, S1, P1)
    points = partial(at_nodes, num_nodes=80)
    f, g, H = expectations(bent1_torch, q, points)
    whole = q.components.natural_gradient(g, H)
    whole = [a - b for a, b in zip(whole, q.components.entropy_gradient(), strict=True)]
    c = f - q.components.entropy() + q.log_weights
    mu = q.components.expectation()
    pairing = (whole[0] * mu[0]).sum(-1) + (whole[1] * mu[1]).sum((-2, -1))
    gaps, mixed = [], []
    for rho in (1e-2, 1e-3, 1e-4):
        (block,) = blr.run(MixtureRule(points, lr=rho), bent1_torch, q, 1)
        # The whole as one family: λ = (log π_k − A_k − …, λ_k), and the derivative in π_k at fixed
        # π_k μ_k is c_k − ⟨μ_k, ∇_k⟩.
        A, after = q.components.log_partition(), block.components.log_partition()
        joint = q.log_weights - A - rho * (c - pairing)
        log_odds = joint + after
        gaps.append((log_odds[:2] - log_odds[2] - block.log_odds).abs().max().item())
        wrong = q.log_weights - rho * (c - pairing)
        mixed.append((wrong[:2] - wrong[2] - block.log_odds).abs().max().item())
    assert 80 < gaps[0] / gaps[1] < 120 and 80 < gaps[1] / gaps[2] < 120
    assert mixed[2] > 1e3 * gaps[2] and 8 < mixed[0] / mixed[1] < 12


# ---- one component ------------------------------------------------------------------------------

DATA = torch.randn(40, 2, generator=generator(9), dtype=torch.float64)
LOGISTIC = TotalLoss(linear, logistic, DATA, (DATA[:, 0] > 0.3).double(), prior_precision=0.0)
ONE = {
    "full": blr.Gaussian.from_moments([[0.2, -0.1]], 5 * torch_eye[None]),
    "diagonal": blr.DiagonalGaussian.from_moments([[0.2, -0.1]], [[5.0, 4.0]]),
    "fixed": blr.FixedGaussian.from_moments([[0.2, -0.1]], 50 * torch_eye),
    "number": blr.FixedGaussian.from_moments([[0.2, -0.1]], 50.0),
}


@pytest.mark.parametrize("kind", ONE)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_one_component_is_the_rule_by_the_delta_method(kind, temperature):
    family = ONE[kind]
    alone = family.at(blr._tree.take(family.natural, 0))
    q = blr.Mixture.from_components(family)
    for step in (blr.learn, *([blr.improve] if kind in ("full", "diagonal") else [])):
        mine = blr.run(MixtureRule(lr=0.2, temperature=temperature, step=step), LOGISTIC, q, 9)
        rule = blr.Rule(gradients.delta, lr=0.2, temperature=temperature, step=step)
        for a, b in zip(mine, blr.run(rule, LOGISTIC, alone, 9), strict=True):
            close(a.components.mean[0], b.mean, rtol=1e-12)
            close(a.components.precision.reshape(b.precision.shape), b.precision, rtol=1e-12)


@pytest.mark.parametrize("kind", ONE)
def test_one_component_is_the_rule_by_samples(kind):
    family = ONE[kind]
    alone = family.at(blr._tree.take(family.natural, 0))
    points = partial(at_samples, num_samples=4, generator=generator(3))
    q = blr.Mixture.from_components(family)
    mine = blr.run(MixtureRule(points, lr=0.1, control=False), LOGISTIC, q, 9)
    price = partial(gradients.price, num_samples=4, generator=generator(3))
    for a, b in zip(mine, blr.run(blr.Rule(price, lr=0.1), LOGISTIC, alone, 9), strict=True):
        close(a.components.mean[0], b.mean, rtol=1e-12)
        close(a.components.precision.reshape(b.precision.shape), b.precision, rtol=1e-12)


def test_components_that_coincide_stay_together_and_are_the_rule():
    # Three of one kind are one: no responsibility can tell them apart.
    q = scalar([0.5] * 3, weights=[0.2, 0.3, 0.5])
    one = blr.Gaussian.from_moments([0.5], [[1.0]])
    mine = blr.run(MixtureRule(lr=0.1), wells, q, 30)
    for a, b in zip(mine, blr.run(blr.Rule(gradients.delta, lr=0.1), wells, one, 30), strict=True):
        close(a.components.mean, b.mean.expand(3, 1), rtol=1e-12)
        close(a.weights, [0.2, 0.3, 0.5])


def test_a_component_with_no_weight_runs_like_the_others():
    light = scalar([-1.0, 1.0], weights=[1e-6, 1 - 1e-6])
    *_, q = blr.run(MixtureRule(lr=0.2, weight_rate=0), wells, light, 120)
    close(q.components.mean.flatten(), [-2.0712, 1.9203], atol=1e-4, rtol=0)
    *_, q = blr.run(MixtureRule(lr=0.2), wells, light, 120)
    assert q.weights[0] > 0.7  # and its weight comes back


# ---- the rule -----------------------------------------------------------------------------------


def test_two_components_find_two_minima():
    *_, q = blr.run(blr.recipes.multimodal(), wells, scalar([-0.5, 0.5]), 200)
    close(q.components.mean.flatten(), [-2.0712, 1.9203], atol=5e-5, rtol=0)
    close(q.components.precision.flatten(), [4.435, 3.531], atol=5e-4, rtol=0)


def test_from_one_side_both_stay_there_held_apart_by_repulsion():
    *_, q = blr.run(blr.recipes.multimodal(), wells, scalar([1.0, 3.0]), 250)
    close(q.components.mean.flatten(), [1.4298, 2.0649], atol=1e-4, rtol=0)
    close(q.components.precision.flatten(), [3.27, 6.02], atol=1e-2, rtol=0)


def test_learned_weights_of_separate_components_are_laplaces_evidences():
    *_, q = blr.run(blr.recipes.multimodal(weight_rate=1.0), wells, scalar([-0.5, 0.5]), 250)
    heights = [wells(m).item() for m in q.components.mean]
    log_evidence = -np.array(heights) - 0.5 * np.log(q.components.precision.flatten().numpy())
    close(q.log_weights, log_evidence - logsumexp(log_evidence), rtol=1e-9)


def test_rates_may_follow_the_steps_and_runs_stop_when_nothing_changes():
    path = list(blr.run(MixtureRule(lr=lambda t: 0.3 / t), wells, scalar([-2.0, 2.0]), 3))
    again = scalar([-2.0, 2.0])
    for t, q in enumerate(path, 1):
        (again,) = blr.run(MixtureRule(lr=0.3 / t), wells, again, 1)
        close(q.weights, again.weights)
    for start in (scalar([-1.0, 1.0]), scalar([1.0])):
        assert len(list(blr.run(MixtureRule(lr=0.2), wells, start, 999, tolerance=1e-9))) < 300


def test_the_weights_may_have_a_rate_of_their_own():
    start = scalar([-2.0, 2.0])
    steps = []
    for rate in (1.0, 0.25, 0.0):
        (q,) = blr.run(MixtureRule(lr=0.1, weight_rate=rate), wells, start, 1)
        steps.append(q.log_odds.item())
        close(q.components.mean.flatten(), scalar([-2.0, 2.0]).components.mean.flatten(), atol=0.1)
    close(steps[1], 0.25 * steps[0])
    assert steps[0] > 0.1 and steps[2] == 0


@pytest.mark.parametrize("T", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_temperature_is_in_the_step_of_the_weights(kind, T):
    # λ_k ← λ_k − ρ((ℓ̄ + T log q)(m_k) − (ℓ̄ + T log q)(m_K)) by the delta method.
    rho = 0.3 * 0.5
    (q,) = blr.run(
        MixtureRule(lr=0.3, weight_rate=0.5, temperature=T, step=lambda q, *_: q),
        bent,
        KINDS[kind],
        1,
    )
    normals = [
        scipy.stats.multivariate_normal(m, np.linalg.inv(s))
        for m, s in zip(M, PRECISIONS[kind], strict=True)
    ]
    joint = np.log(PI) + np.stack([n.logpdf(M) for n in normals], 1)
    value = 0.3 * (M**2).sum(1) + np.cos(2 * M[:, 0] + M[:, 1]) + T * logsumexp(joint, axis=1)
    log_pi = np.log(PI) - rho * value
    close(q.log_weights, log_pi - logsumexp(log_pi))


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"weight_rate": -1.0}, "weight_rate must be at least zero, got -1.0"),
        ({"temperature": -0.5}, "temperature must be at least zero, got -0.5"),
    ],
)
def test_arguments_out_of_range_are_refused(argument, what):
    with pytest.raises(ValueError, match=what + "; "):
        MixtureRule(**argument)
    if "temperature" not in argument:
        for recipe in (blr.recipes.multimodal, blr.recipes.mixture_vi):
            with pytest.raises(ValueError, match=what + "; "):
                recipe(**argument)


def test_another_family_and_no_samples_are_refused():
    for recipe in (blr.recipes.multimodal(), blr.recipes.mixture_vi()):
        with pytest.raises(TypeError, match="q must be a Mixture, got Gaussian; use Mixture"):
            list(blr.run(recipe, bent, Q.components, 1))
    with pytest.raises(TypeError, match="q must be a SpikeAndSlab, got Gaussian; use SpikeAndS"):
        list(blr.run(blr.recipes.dropout(), bent, Q.components, 1))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        list(blr.run(blr.recipes.mixture_vi(num_samples=0), bent, Q, 1))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        mixtures.scale_mixture(bent, T2, 0)


def test_minibatches_and_curvatures_come_as_everywhere():
    q = blr.Mixture.from_components(
        blr.Gaussian.from_moments([[2.0, 0.0], [3.0, 1.0]], torch_eye.expand(2, 2, 2))
    )
    loss = TotalLoss(linear, logistic, LOGISTIC.inputs, LOGISTIC.targets, prior_precision=1.0)
    run = partial(blr.run, loss=loss, q=q, steps=5, batch=16)
    exact = list(run(MixtureRule(), generator=generator()))
    newton = list(run(MixtureRule(curvature=gradients.gauss_newton), generator=generator()))
    for a, b in zip(exact, newton, strict=True):
        close(a.components.precision, b.components.precision)
    diagonal = blr.Mixture.from_components(
        blr.DiagonalGaussian.from_moments(q.components.mean, torch.ones(2, 2))
    )
    squares = MixtureRule(curvature=gradients.squared_gradients)
    *_, after = blr.run(squares, loss, diagonal, 5, batch=16, generator=generator())
    assert (after.components.precision > 0).all()


def test_a_step_out_of_the_domain_says_which_block_and_what_to_do():
    hill = lambda t: torch.cos(5 * t).sum()  # noqa: E731
    with pytest.raises(
        ValueError, match=r"step 1: block components: the learning rate 1 .*improve"
    ):
        list(blr.run(MixtureRule(lr=1.0), hill, scalar([0.0, 3.0]), 2))
    *_, q = blr.run(MixtureRule(lr=1.0, step=blr.improve), hill, scalar([0.0, 3.0]), 2)
    assert (q.components.precision > 0).all()
    steep = lambda t: torch.where(t.sum() > 0, torch.inf, 0.0) + 0 * t.sum()  # noqa: E731
    with pytest.raises(ValueError, match="step 1: block log_odds"):
        list(blr.run(MixtureRule(), steep, scalar([-1.0, 3.0]), 1))


def test_a_batch_cannot_be_learned():
    family = blr.Gaussian.from_moments(np.stack([M, M]), np.stack([S, S]))
    with pytest.raises(ValueError, match="one mixture, got a batch"):
        expectations(bent, blr.Mixture.from_components(family))


def test_without_curvature_the_precision_fades_and_nothing_moves():
    flat = lambda t: 0.0 * t.sum()  # noqa: E731
    (q,) = blr.run(MixtureRule(lr=0.25), flat, scalar([0.7]), 1)
    close(q.components.precision.flatten(), [0.75])
    close(q.components.mean.flatten(), [0.7])


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_integrate_polynomials_exactly(kind):
    q = KINDS[kind]
    theta, weight = at_nodes(q, 3)
    assert theta.shape == (9, 3, 2)
    close(torch.tensordot(weight, theta, 1), q.components.mean)
    d = theta - q.components.mean
    covariance = torch.einsum("s,ski,skj->kij", weight, d, d)
    close(covariance, np.linalg.inv(PRECISIONS[kind]))


def test_points_of_the_delta_method_are_the_means():
    theta, weight = at_means(Q)
    close(theta[0], M)
    assert weight.tolist() == [1.0]


# ---- Student's t --------------------------------------------------------------------------------

T2 = blr.StudentT.from_parameters([0.3, -0.2], [[0.7, 0.2], [0.2, 0.5]], 6.0)


def test_the_density_of_students_t_is_scipys():
    theta = T2.sample(6, generator())
    expected = scipy.stats.multivariate_t([0.3, -0.2], [[0.7, 0.2], [0.2, 0.5]], 6.0)
    close(T2.log_prob(theta), expected.logpdf(theta.numpy()))
    one = blr.StudentT.from_parameters([1.2], [[0.6]], 3.0)
    x = torch.tensor([[-1e4], [0.0], [1.3]]).double()
    close(one.log_prob(x), scipy.stats.t(3.0, 1.2, math.sqrt(0.6)).logpdf(x.numpy()[:, 0]))


def test_samples_of_students_t_have_its_covariance_and_its_tails():
    theta = blr.StudentT.from_parameters([0.3, -0.2], [[0.7, 0.2], [0.2, 0.5]], 9.0).sample(
        200_000, generator(4)
    )
    d = theta - torch.tensor([0.3, -0.2])
    second = d.unsqueeze(-1) * d.unsqueeze(-2)
    error = second.std(0) / math.sqrt(len(theta))
    V = torch.tensor([[0.7, 0.2], [0.2, 0.5]]).double()
    assert ((second.mean(0) - V * 9 / 7).abs() < 5 * error).all()
    x = ((theta[:, 0] - 0.3) / math.sqrt(0.7)).numpy()
    assert scipy.stats.kstest(x, scipy.stats.t(9.0).cdf).pvalue > 1e-3
    assert blr.StudentT.from_parameters([0.0], [[1.0]], 2.0).covariance.isinf().all()


def test_the_expected_scale_is_that_of_the_hidden_variable():
    # E[w g(θ)] = E[u(θ) g(θ)], with w drawn here.
    a, n, rng = 3.0, 400_000, np.random.default_rng(0)
    w = a / rng.gamma(a, 1, n)
    noise = rng.normal(size=(n, 2)) @ np.linalg.cholesky([[0.7, 0.2], [0.2, 0.5]]).T
    theta = torch.tensor([0.3, -0.2]) + torch.tensor(np.sqrt(w)[:, None] * noise)
    for g in (torch.cos(theta[:, 0]), torch.exp(-(theta[:, 1] ** 2))):
        difference = (torch.tensor(w) - T2.expected_scale(theta)) * g
        assert difference.mean().abs() < 5 * difference.std() / math.sqrt(n)
    with pytest.raises(ValueError, match="dof must be above"):
        blr.StudentT.from_parameters([0.0], [[1.0]], 1.0).expected_scale(torch.zeros(1))


X = np.linspace(-400, 400, 400_001)


def t_logpdf(m, v, dof=3.0):
    return scipy.stats.t(dof, m, math.sqrt(v)).logpdf(X)


def test_the_gradient_of_students_t_is_that_of_quadrature():
    # In μ = (m, V + m²), of θ/w and θ²/w.
    loss = np.cos(2 * X) + 0.1 * np.sqrt(1 + X**2)

    def at(mu):
        v = mu[1] - mu[0] ** 2
        return (loss * np.exp(t_logpdf(mu[0], v, 7.0))).sum() * (X[1] - X[0])

    right = slope(at, np.array([0.4, 0.8 + 0.4**2]))
    q = blr.StudentT.from_parameters([0.4], [[0.8]], 7.0)
    f = lambda t: (torch.cos(2 * t) + 0.1 * torch.sqrt(1 + t**2)).sum()  # noqa: E731
    for control in (True, False):
        draws = [
            mixtures.scale_mixture(f, q, 2000, generator(s), control=control) for s in range(40)
        ]
        for block in (0, 1):
            found = torch.stack([d[block].squeeze() for d in draws])
            assert abs(found.mean() - right[block]) < 5 * found.std() / math.sqrt(40)


def test_the_entropy_gradient_of_students_t_is_that_of_its_density():
    def entropy(mu):
        log_q = t_logpdf(mu[0], mu[1] - mu[0] ** 2, 7.0)
        return -(np.exp(log_q) * log_q).sum() * (X[1] - X[0])

    q = blr.StudentT.from_parameters([0.4], [[0.8]], 7.0)
    expected = slope(entropy, np.array([0.4, 0.8 + 0.4**2]), 1e-4)
    close(torch.stack([x.squeeze() for x in q.entropy_gradient()]), expected, rtol=1e-6)


def test_students_t_finds_a_target_of_its_kind_exactly_and_a_gaussian_does_not():
    target = blr.StudentT.from_parameters([1.2], [[0.6]], 3.0)
    loss = lambda t: -target.log_prob(t)  # noqa: E731
    gradient = partial(mixtures.scale_mixture, num_samples=30, generator=generator(0))
    start = blr.StudentT.from_parameters([-1.0], [[3.0]], 3.0)
    *_, q = blr.run(blr.Rule(gradient, lr=0.1), loss, start, 300)
    assert abs(q.mean.item() - 1.2) < 1e-6 and abs(q.scale.item() - 0.6) < 1e-6
    # The best Gaussian, by quadrature: variance 0.953, and 0.0407 nats away.
    nodes, w = np.polynomial.hermite_e.hermegauss(120)
    w = torch.tensor(w / w.sum())

    def price(loss, q):
        theta = q.mean + torch.tensor(nodes)[:, None] * q.variance.sqrt()
        g = (w[:, None] * torch.vmap(torch.func.grad(loss))(theta)).sum(0)
        H = (w[:, None, None] * torch.vmap(torch.func.hessian(loss))(theta)).sum(0)
        return q.natural_gradient(g, H)

    start = blr.Gaussian.from_moments([0.0], [[1.0]])
    *_, best = blr.run(blr.Rule(price, lr=0.3), loss, start, 300, tolerance=1e-8)
    assert abs(best.variance.item() - 0.953) < 5e-4
    log_q = scipy.stats.norm(best.mean.item(), best.variance.sqrt().item()).logpdf(X)
    kl = (np.exp(log_q) * (log_q - t_logpdf(1.2, 0.6))).sum() * (X[1] - X[0])
    assert abs(kl - 0.0407) < 5e-5


def test_many_degrees_of_freedom_are_a_gaussian():
    q = blr.StudentT.from_parameters([0.4, 0.1], T2.scale, 1e8)
    g = blr.Gaussian.from_moments([0.4, 0.1], covariance=T2.scale)
    theta = g.sample(5, generator())
    close(q.log_prob(theta), g.log_prob(theta), rtol=1e-6)
    close(q.expected_scale(theta), torch.ones(5).double(), rtol=1e-6)


def test_students_t_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match="dof must be positive"):
        blr.StudentT.from_parameters([0.0], [[1.0]], 0.0)
    batch = blr.StudentT.from_parameters([[0.0], [1.0]], [[[1.0]], [[2.0]]], 4.0)
    assert batch.batch_shape == (2,) and batch.sample(3, generator()).shape == (3, 2, 1)
    with pytest.raises(ValueError, match="one Student's t, got a batch"):
        mixtures.scale_mixture(lambda t: t.sum(), batch)


# ---- spike and slab -----------------------------------------------------------------------------

UNIT = torch.tensor([0, -1, 1, 0, 1, -1, 2])
SLAB = torch.tensor([1.3, 0.4, -0.7, 0.2, 0.05, -2.0, 0.6]).double()
SPIKED = blr.SpikeAndSlab.from_moments(SLAB, torch.arange(1.0, 8.0), UNIT, 0.7, 100.0)


def test_the_density_of_spike_and_slab_is_the_product_over_units():
    theta = torch.tensor([0.1, 0.5, -0.6, 0.1, 0.0, -1.0, 0.02]).double()
    total, s = 0.0, np.arange(1.0, 8.0)
    for unit in (0, 1, 2):
        held = UNIT.numpy() == unit
        slab = (
            scipy.stats.norm(SLAB.numpy()[held], s[held] ** -0.5).logpdf(theta.numpy()[held]).sum()
        )
        spike = scipy.stats.norm(0, 0.1).logpdf(theta.numpy()[held]).sum()
        total += np.logaddexp(math.log(0.7) + slab, math.log(0.3) + spike)
    free = UNIT.numpy() < 0
    total += scipy.stats.norm(SLAB.numpy()[free], s[free] ** -0.5).logpdf(theta.numpy()[free]).sum()
    close(SPIKED.log_prob(theta), torch.tensor(total))


def test_moments_of_spike_and_slab_are_those_of_its_samples():
    n = 100_000
    theta = SPIKED.sample(n, generator(5))
    assert ((theta.mean(0) - SPIKED.mean).abs() < 5 * theta.std(0) / math.sqrt(n)).all()
    second = (theta - SPIKED.mean) ** 2
    assert ((second.mean(0) - SPIKED.variance).abs() < 5 * second.std(0) / math.sqrt(n)).all()
    # Weights of one unit come and go together, those of two units do not.
    held = (theta[:, [0, 3]] - theta[:, [0, 3]].mean(0)).prod(-1)
    assert held.mean() > 0.7 * 0.3 * 1.3 * 0.2 - 5 * held.std() / math.sqrt(n)


def test_the_force_away_from_the_spike_is_the_slope_of_the_density():
    score = torch.func.grad(SPIKED.log_prob)(SLAB)
    close(SPIKED.entropy_gradient(), -score, atol=1e-9)
    assert (SPIKED.entropy_gradient()[UNIT < 0] == 0).all()


def test_the_responsibility_is_one_outside_the_spike_and_not_inside():
    q = blr.SpikeAndSlab.from_moments([1.0, 1e-3], [1.0, 1.0], torch.tensor([0, 1]), 0.7, 1e6)
    r = q.responsibilities()
    assert r[0] > 1 - 1e-12 and abs(r[1] - 0.0038) < 5e-5


def test_the_gradient_of_dropout_is_unbiased_for_the_mean_over_the_masks():
    loss = lambda t: torch.tanh(t.sum()) + 0.1 * (t**2).sum() + t[0] * t[2]  # noqa: E731
    masks = [torch.tensor(z).double() for z in itertools.product([0, 1], repeat=3)]
    chance = [0.7 ** z.sum() * 0.3 ** (3 - z.sum()) for z in masks]
    found = sum(
        p * mixtures.dropped(loss, SPIKED, iter([z])) for p, z in zip(chance, masks, strict=True)
    )

    def expected(mean):
        m = mean / SPIKED.inclusion
        return sum(p * loss(SPIKED.expand(z) * m) for p, z in zip(chance, masks, strict=True))

    close(found, torch.func.grad(expected)(SPIKED.mean))


def test_masks_that_are_too_few_or_of_another_length_are_refused():
    def run(masks, steps):
        recipe = blr.recipes.dropout(indicators=masks)
        return list(blr.run(recipe, lambda t: (t**2).sum(), SPIKED, steps))

    assert len(run([torch.ones(3)] * 2, 2)) == 2
    with pytest.raises(ValueError, match="step 3: indicators are used up; pass as many"):
        run([torch.ones(3)] * 2, 3)
    for length in (1, 2, 4, 5):
        message = rf"step 1: indicators must have shape \(3,\).*, got \({length},\)"
        with pytest.raises(ValueError, match=message):
            run([torch.ones(length)], 1)


def test_masks_follow_the_generator_and_their_probability():
    draws = [SPIKED.indicators(4, generator(s)) for s in (1, 1)]
    assert torch.equal(*draws) and draws[0].shape == (4, 3)
    many = SPIKED.indicators(2000, generator(2))
    assert ((many.mean(0) - 0.7).abs() < 5 * math.sqrt(0.21 / 2000)).all()


def test_with_responsibilities_a_slab_does_not_enter_its_spike():
    # A loss whose minimum is zero: dropout lets the slab's mean go there, the rule does not.
    loss = lambda t: 0.5 * (t**2).sum()  # noqa: E731
    start = blr.SpikeAndSlab.from_moments([1.0], 1.0, torch.tensor([0]), 0.5, 400.0)
    ends = []
    for T in (0.0, 1.0):
        recipe = blr.recipes.dropout(0.01, generator=generator(), temperature=T)
        *_, q = blr.run(recipe, loss, start, 900)
        ends.append(q)
    assert ends[0].slab_mean < 1e-3 and ends[0].responsibilities() < 0.1
    assert ends[1].slab_mean > 0.1 and ends[1].responsibilities() > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 1.0}, "keep must be between"),
        ({"unit": torch.tensor([0, 1])}, "unit must hold one integer"),
        ({"unit": UNIT.double()}, "unit must hold one integer"),
        ({"spike_precision": 0.0}, "spike_precision must be positive"),
        ({"precision": -1.0}, "precision s of the slabs must be positive"),
    ],
)
def test_what_is_no_spike_and_slab_is_refused(change, message):
    parts = {"precision": 1.0, "unit": UNIT, "keep": 0.7, "spike_precision": 100.0} | change
    with pytest.raises(ValueError, match=message):
        blr.SpikeAndSlab(SLAB, **parts)


def test_names_are_shown():
    assert "0.3" in repr(Q) and "Gaussian" in repr(Q)
    assert "dof=6" in repr(T2)
    assert "3 units" in repr(SPIKED)

"""The rule on a product of factors: bounds, schedules, expected losses, and what goes wrong."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from oracles import messages as oracle
from oracles.messages import IRIS, M_STEP, D, K, N, one_logistic, one_poisson, start_1d, tensor
from oracles.problem import generator, relative

import blr
from blr import _tree
from blr.expected import ExpectedLoss, conjugate, expected_softplus, gaussian_mixture, topics
from blr.messages import Messages, elbo, robbins_monro
from blr.recipes import em, ncvmp, svi, vmp

ROWS = {row.name: row for row in blr.TABLE}


def flat(tree) -> torch.Tensor:
    return torch.cat([x.reshape(-1) for x in _tree.leaves(tree)])


def last(path):
    *_, q = path
    return q


# ---- products -----------------------------------------------------------------------------------


def product() -> blr.Product:
    return blr.Product.from_factors(
        z=blr.Categorical.from_probabilities([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]),
        theta=blr.Gaussian.from_moments([1.0, -2.0], [[2.0, 0.3], [0.3, 1.0]]),
    )


def test_a_product_is_independent_so_logs_add_up():
    q = product()
    z, theta = torch.tensor([[1, 2], [0, 0]]), torch.tensor([[0.3, 0.1], [1.0, -3.0]]).double()
    log_z = np.log([0.5 * 0.3, 0.2 * 0.6])
    normal = scipy.stats.multivariate_normal([1.0, -2.0], np.linalg.inv([[2.0, 0.3], [0.3, 1.0]]))
    assert relative(q.log_prob((z, theta)), log_z + normal.logpdf(theta.numpy())) < 1e-13
    entropy = scipy.stats.entropy([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]], axis=1).sum()
    assert abs(q.entropy().item() - entropy - normal.entropy()) < 1e-13
    assert q.log_prob((torch.tensor([[1, 3]]), theta[:1])).item() == -math.inf
    z, theta = q.sample(5, generator(0))
    assert z.shape == (5, 2) and theta.shape == (5, 2)


def test_blocks_have_names_and_can_be_exchanged():
    q = product()
    assert q.names == ("z", "theta") and q["z"] is q.factors[0]
    p = q.replace(theta=blr.Gaussian.from_moments([0.0, 0.0], torch.eye(2)))
    assert p["z"] is q["z"] and p["theta"].mean.abs().max() == 0
    assert q["theta"].mean.abs().max() > 1
    assert repr(q).startswith("Product(z=Categorical(probabilities=[[0.2, 0.5, 0.3], [0.6")
    with pytest.raises(ValueError, match="no block 'pi'; the blocks are z, theta"):
        q["pi"]
    with pytest.raises(ValueError, match="no block 'pi'"):
        q.replace(pi=q["z"])


def test_a_product_says_what_is_wrong():
    q = product()
    with pytest.raises(ValueError, match="at least one factor"):
        blr.Product.from_factors()
    with pytest.raises(TypeError, match="factor 'z' must be a member"):
        blr.Product.from_factors(z=torch.ones(3))
    with pytest.raises(ValueError, match="block 'theta': precision S must be positive definite"):
        q.at((q.natural[0], (q.natural[1][0], -q.natural[1][1])))
    with pytest.raises(ValueError, match="like must be a Product"):
        blr.Product.from_expectation(q.expectation())
    with pytest.raises(TypeError, match="a tuple of 2 blocks: z, theta"):
        q.log_prob(torch.zeros(2))
    with pytest.raises(ValueError, match="compare products of the same blocks"):
        q.kl(blr.Product.from_factors(z=q["z"], other=q["theta"]))


def test_the_modes_are_where_the_density_is_highest():
    for q in (
        blr.Dirichlet.from_concentrations([3.0, 1.5, 4.0]),
        blr.NormalWishart.from_parameters([0.5, -1.0], 2.0, 6.0, [[2.0, 0.3], [0.3, 1.0]]),
    ):
        # At the mode, ⟨λ, T(θ)⟩ is stationary: the draws nearest to it are no higher.
        peak = q.log_prob(q.mode)
        assert (q.log_prob(q.sample(20_000, generator(1))) < peak).all()
        for t in (1e-4, -1e-4):
            near = _shift(q.mode, t)
            assert 0 < peak - q.log_prob(near) < 1e-6
    with pytest.raises(ValueError, match="at least one, and not all one, for a mode"):
        blr.Dirichlet.from_concentrations([0.5, 2.0]).mode
    with pytest.raises(ValueError, match=r"dof − D must be positive"):
        blr.NormalWishart.from_parameters([0.0, 0.0], 1.0, 1.5, torch.eye(2)).mode


def _shift(theta, t: float):
    if isinstance(theta, tuple):
        return theta[0] + t, theta[1] * (1 + t)
    return theta + t * torch.tensor([1.0, -1.0, 0.0]).double()


# ---- the bound ----------------------------------------------------------------------------------


def test_the_bound_of_vmp_never_falls():
    loss, q = oracle.vb_start()
    bounds = [elbo(loss, p).item() for p in (q, *blr.run(vmp(), loss, q, 40))]
    assert np.diff(bounds).min() > -1e-9
    assert bounds[-1] - bounds[0] > 100


def test_the_bound_of_em_never_falls_and_is_the_likelihood_after_the_e_step():
    means = IRIS[np.random.default_rng(0).choice(N, K, False)]
    precision = np.linalg.inv(np.cov(IRIS.T))
    q, loss = oracle.mixture_start(means, precision), gaussian_mixture(IRIS, K)
    bounds, likelihoods = [], []
    for p in blr.run(em(M_STEP, order=(*["z"], M_STEP)), loss, q, 12):
        likelihoods.append(elbo(loss, q.replace(z=p["z"]), M_STEP).item())
        bounds += [likelihoods[-1], elbo(loss, p, M_STEP).item()]
        q = p
    assert np.diff(bounds).min() > -1e-9
    expected = N * np.array(oracle.sklearn_em(means, precision, 12).lower_bounds_)
    assert relative(likelihoods, expected) < 1e-12
    # A path of E- and M-steps written out elsewhere, from the same points.
    assert np.allclose(likelihoods[:4], [-511.498, -365.991, -362.265, -358.405], atol=5e-4)


def test_the_bound_of_one_component_is_the_evidence():
    # K = 1: neither z nor π, and a conjugate model.
    prior = oracle.mixture_prior()["components"]
    one = blr.Product.from_factors(components=prior.at(_tree.take(prior.natural, slice(0, 1))))
    loss = gaussian_mixture(IRIS, 1, one)
    (q,) = blr.run(vmp(), loss, one, 1)
    kappa, nu = oracle.PRIOR["mean_precision_prior"], oracle.PRIOR["degrees_of_freedom_prior"]
    V, S = oracle.PRIOR["covariance_prior"], N * np.cov(IRIS.T, bias=True)
    # Murphy (2012), equation 4.259; the prior mean is the mean of the data.
    gammas = scipy.special.multigammaln((nu + N) / 2, D) - scipy.special.multigammaln(nu / 2, D)
    log_dets = nu * np.linalg.slogdet(V)[1] - (nu + N) * np.linalg.slogdet(V + S)[1]
    expected = gammas + 0.5 * log_dets + 0.5 * D * np.log(kappa / (kappa + N))
    expected -= 0.5 * N * D * np.log(np.pi)
    assert abs(elbo(loss, q).item() / expected - 1) < 1e-12
    assert relative(q["components"].inverse_scale[0], V + S) < 1e-12


def test_one_component_without_prior_is_the_gaussian_of_most_likelihood():
    start = blr.Product.from_factors(
        components=blr.NormalWishart.from_parameters(np.zeros((1, D)), 1.0, D + 1.0, np.eye(D))
    )
    (q,) = blr.run(em(("components",)), gaussian_mixture(IRIS, 1), start, 1)
    m, Lambda = q["components"].mode
    assert relative(m[0], IRIS.mean(0)) < 1e-13
    assert relative(Lambda[0].inverse(), np.cov(IRIS.T, bias=True)) < 1e-11


def test_a_hidden_class_can_be_eliminated():
    # The gradient of −log Σ exp c_k are the responsibilities, so the path is the same.
    loss, q = oracle.vb_start()
    without = gaussian_mixture(IRIS, K, oracle.mixture_prior(), latent=False)
    globals_ = blr.Product.from_factors(pi=q["pi"], components=q["components"])
    for p, r in zip(
        blr.run(vmp(("z", M_STEP)), loss, q, 6),
        blr.run(vmp((M_STEP,)), without, globals_, 6),
        strict=True,
    ):
        for name in M_STEP:
            assert relative(flat(r[name].natural), flat(p[name].natural)) < 1e-12
    # After z has learned, its entropy and its part of the loss are what was eliminated.
    (z,) = blr.run(vmp(("z",)), loss, p, 1)
    assert abs(elbo(without, r).item() - elbo(loss, z).item()) < 1e-9


def test_unknown_mean_and_precision_meet_in_the_closed_form():
    # y ~ N(m, 1/τ), flat priors: 1/E[τ] = Σ(y − ȳ)²/(n − 1), Bishop (2006), equation 10.33.
    y = tensor(np.random.RandomState(0).normal(2.0, 1.5, 30))

    def expected_loss(mu):
        (m, second), (log_tau, tau) = mu
        squares = (y**2).sum() - 2 * y.sum() * m[0] + len(y) * second[0, 0]
        return 0.5 * tau * squares - 0.5 * len(y) * log_tau + log_tau  # 1/τ is the flat prior

    q = blr.Product.from_factors(
        m=blr.Gaussian.from_moments([0.0], [[1.0]]), tau=blr.Gamma.from_shape_rate(1.0, 1.0)
    )
    path = list(blr.run(vmp(), expected_loss, q, 200, tolerance=1e-15))
    assert len(path) < 60  # the early stop
    tau = path[-1]["tau"]
    assert abs(tau.rate / tau.shape / y.var(correction=1) - 1) < 1e-13
    assert abs(path[-1]["m"].mean[0] / y.mean() - 1) < 1e-14


# ---- schedules ----------------------------------------------------------------------------------

COUPLING = torch.full((3, 3), 0.9).double().fill_diagonal_(1.0)


def coupled(mu):
    """E_q[ℓ̄] of N(0, L⁻¹) for three blocks of one number each."""
    m = torch.cat([block[0] for block in mu])
    second = torch.stack([block[1][0, 0] for block in mu])
    return 0.5 * (m @ COUPLING @ m - COUPLING.diagonal() @ m**2 + COUPLING.diagonal() @ second)


def three_numbers() -> blr.Product:
    means = {"a": 1.0, "b": -1.0, "c": 0.5}
    blocks = {name: blr.Gaussian.from_moments([m], [[1.0]]) for name, m in means.items()}
    return blr.Product.from_factors(**blocks)


def size(q) -> float:
    return max(abs(f.mean.item()) for f in q.factors)


def test_blocks_that_learn_in_parallel_with_full_steps_diverge():
    together = (("a", "b", "c"),)
    parallel = last(blr.run(vmp(together), coupled, three_numbers(), 60))
    in_turn = last(blr.run(vmp(), coupled, three_numbers(), 60))
    damped = last(blr.run(ncvmp(0.5, together), coupled, three_numbers(), 60))
    # Jacobi's and Gauss and Seidel's iterations of the same linear equations.
    jacobi, seidel = np.array([1.0, -1.0, 0.5]), np.array([1.0, -1.0, 0.5])
    L = COUPLING.numpy()
    for _ in range(60):
        jacobi = -(L - np.eye(3)) @ jacobi
        for i in range(3):
            seidel[i] -= L[i] @ seidel
    assert relative([f.mean.item() for f in parallel.factors], jacobi) < 1e-10
    assert relative([f.mean.item() for f in in_turn.factors], seidel) < 1e-10
    assert size(parallel) > 1e14 and size(in_turn) < 1e-4 and 1e-2 < size(damped) < 0.1
    # Mean field: the variance is 1/L_ii, too small.
    assert all(abs(f.variance.item() - 1) < 1e-12 for f in in_turn.factors)
    assert np.linalg.inv(L).diagonal().min() > 6


def test_rates_are_numbers_or_schedules_of_all_blocks_or_of_each():
    seen = []

    def rate(t):
        seen.append(t)
        return 1 / t

    q = last(blr.run(ncvmp({"a": 0.0, "b": rate}), coupled, three_numbers(), 3))
    assert seen == [1, 2, 3]
    assert q["a"].mean.item() == 1.0 and q["b"].mean.item() != -1.0
    fixed = last(blr.run(ncvmp(1 / 3), coupled, q, 1))
    scheduled = last(blr.run(Messages(lr=lambda t: 1 / (t + 2)), coupled, q, 1))
    assert relative(flat(scheduled.natural), flat(fixed.natural)) < 1e-15


@pytest.mark.parametrize(
    ("slope", "variance", "low", "high"),
    [(2.0, 25.0, 3.9242, 3.9242), (3.0, 25.0, 2.34, 4.73), (5.0, 25.0, 0.25, 5.61)],
)
def test_full_steps_in_a_block_that_is_not_conjugate_may_cycle(slope, variance, low, high):
    path = list(blr.run(ncvmp(), one_logistic(slope, variance), start_1d(variance), 200))
    ends = sorted(q["theta"].mean.item() for q in path[-2:])
    assert np.allclose(ends, [low, high], atol=6e-3)


def test_half_steps_may_be_worse_than_whole_and_than_small_ones():
    # A count of 100 with rate e^θ: E[e^θ] = exp(m + v/2) overshoots.
    mean = lambda lr, steps: last(  # noqa: E731
        blr.run(ncvmp(lr), one_poisson(100.0), start_1d(1.0), steps)
    )["theta"].mean.item()
    assert abs(mean(1.0, 60) - 4.553383) < 1e-6
    assert abs(mean(0.1, 400) - 4.553383) < 1e-6
    assert abs(mean(0.5, 60) - 7.64) < 5e-3


def test_the_bound_at_rest_is_the_same_for_any_rate():
    loss = one_logistic(3.0, 25.0)
    best = [
        elbo(loss, last(blr.run(ncvmp(lr), loss, start_1d(25.0), 800))).item() for lr in (0.1, 0.4)
    ]
    assert abs(best[0] - best[1]) < 1e-10
    assert best[0] < math.log(0.5)  # the evidence of a symmetric prior


# ---- steps for blocks without an expected loss --------------------------------------------------


def test_an_m_step_by_newtons_method_needs_only_the_loss_of_theta():
    # Two Poisson rates e^θ, mixed equally: at rest, EM's own weighted means.
    y = tensor([0, 1, 2, 1, 0, 9, 12, 8, 11, 10, 1])

    def expected_loss(mu):
        z, (theta, _) = mu
        c = y[:, None] * theta - theta.exp()
        return -(z[:, 0] * c[:, 0] + (1 - z[:, 0]) * c[:, 1]).sum()

    start = blr.Product.from_factors(
        z=blr.Categorical(natural=torch.zeros(len(y), 1).double()),
        theta=blr.Gaussian.from_moments([0.0, 2.0], torch.eye(2).double()),
    )
    recipe = em(gradients={"theta": blr.gradients.delta})
    q = last(blr.run(recipe, expected_loss, start, 100, tolerance=1e-14))
    rates = np.array([1.0, 8.0])
    for _ in range(200):
        r = scipy.special.softmax(y.numpy()[:, None] * np.log(rates) - rates, axis=1)
        rates = (r * y.numpy()[:, None]).sum(0) / r.sum(0)
    assert relative(q["theta"].mean.exp(), rates) < 1e-12
    # The curvature is that of the expected loss: N_k e^θ_k.
    assert relative(q["theta"].precision.diagonal(), r.sum(0) * rates) < 1e-12


def test_a_block_can_learn_from_samples():
    # E_q[ℓ̄] as a function of θ_b alone: the exact message within the error of the samples.
    loss, q = coupled, three_numbers()
    noisy = partial(blr.gradients.monte_carlo, num_samples=200_000, generator=generator(0))
    sampled = last(blr.run(Messages(gradients={"b": noisy}), loss, q, 1))["b"]
    exact = last(blr.run(Messages(), loss, q, 1))["b"]
    assert 0 < abs(sampled.mean - exact.mean).item() < 0.02
    assert abs(sampled.precision - exact.precision).item() < 0.05


def test_the_improved_step_stays_in_the_domain():
    # −ℓ has curvature +1.5 at first: a full step would make the precision negative.
    loss = lambda mu: -0.75 * mu[0][1][0, 0]  # noqa: E731
    q = blr.Product.from_factors(theta=blr.Gaussian.from_moments([1.0], [[1.0]]))
    with pytest.raises(ValueError, match=r"step 1: block 'theta': the learning rate 1 leads out"):
        list(blr.run(vmp(), loss, q, 1))
    (q,) = blr.run(Messages(step=blr.improve, lr=0.5), loss, q, 1)
    assert q["theta"].precision.item() > 0


# ---- stochastic variational inference -----------------------------------------------------------


def test_svi_is_the_algorithm_of_its_paper():
    # Hoffman et al. (2013), with digamma functions that are exact; each document by itself.
    path, batches = oracle.topics_path(ROWS["SVI"])
    expected_log = lambda a: (  # noqa: E731
        scipy.special.digamma(a) - scipy.special.digamma(a.sum(-1, keepdims=True))
    )
    rng = np.random.RandomState(0)
    beta = rng.gamma(100.0, 0.01, (oracle.TOPICS, oracle.WORDS))
    for t, (q, batch) in enumerate(zip(path, batches, strict=True), 1):
        statistics = np.zeros_like(beta)
        weights = np.exp(expected_log(beta))
        starts = rng.gamma(100.0, 0.01, (len(batch), oracle.TOPICS))
        for n, gamma in zip(batch, starts, strict=True):
            for _ in range(100):
                r = np.exp(expected_log(gamma))[:, None] * weights
                r = n * r / r.sum(0)
                gamma, before = oracle.ALPHA + r.sum(1), gamma
                if np.abs(gamma - before).mean() < 1e-3:
                    break
            r = np.exp(expected_log(gamma))[:, None] * weights
            statistics += n * r / r.sum(0)
        rho = (oracle.OFFSET + t) ** -oracle.DECAY
        weight = oracle.DOCUMENTS / len(batch)
        beta = (1 - rho) * beta + rho * (oracle.ETA + weight * statistics)
        assert relative(q["beta"].concentrations, beta) < 1e-10


def topics_prior(*shape: int, eta: float = 0.1) -> blr.Dirichlet:
    return blr.Dirichlet.from_concentrations(torch.full(shape, eta, dtype=torch.float64))


def small_topics(**arguments):
    counts = oracle.corpus()[:23]
    prior = topics_prior(oracle.TOPICS, oracle.WORDS)
    rng = np.random.RandomState(5)
    beta = blr.Dirichlet.from_concentrations(rng.gamma(2.0, 1.0, (oracle.TOPICS, oracle.WORDS)))
    return topics(counts, prior, 0.25, **arguments), blr.Product.from_factors(beta=beta), counts


def test_the_slope_that_is_written_out_is_the_derivative():
    loss, q, _ = small_topics()
    c = loss.message(q.expectation(), loss.data)
    log_theta = loss.start(len(loss)).expectation() - torch.rand(23, 4, generator=generator(2))
    expected = torch.func.grad(lambda mu: loss.per_example(mu, c).sum())(log_theta)
    assert relative(loss.slope(log_theta, c), expected) < 1e-13


def test_the_expected_loss_of_topics_is_that_of_its_words():
    loss, q, counts = small_topics()
    log_theta, (log_beta,) = loss.start(23).expectation() - 0.3, q.expectation()
    c = log_theta.unsqueeze(-1) + log_beta
    prior = scipy.special.gammaln(0.25) * 4 - scipy.special.gammaln(1.0)
    words = -(tensor(counts) * torch.logsumexp(c, 1)).sum(1)
    expected = words + 0.75 * log_theta.sum(1) + prior
    assert relative(loss.examples((log_theta, log_beta)), expected) < 1e-13


def test_an_example_comes_to_rest_by_itself():
    # Documents settle at different steps; each as if it were alone.
    loss, q, _ = small_topics()
    together = svi().complete(loss, q)["local"].concentrations
    for i in (0, 7, 22):
        alone, _, _ = small_topics()
        alone = ExpectedLoss(
            alone.message,
            alone.per_example,
            tuple(x[i : i + 1] for x in loss.data),
            start=alone.start,
        )
        one = svi().complete(alone, q)["local"].concentrations  # here without the slope
        assert relative(one[0], together[i]) < 1e-12
    few = svi(local_steps=2).complete(loss, q)["local"].concentrations
    assert (few - together).abs().max() > 0.1


def test_local_steps_with_a_slope_that_lead_out_of_the_domain_are_found():
    loss, q, _ = small_topics()
    wrong = dataclasses.replace(loss, slope=lambda mu, c: torch.full_like(mu, 2.0))
    with pytest.raises(ValueError, match="concentrations must be positive"):
        svi().complete(wrong, q)


def test_svi_with_all_data_and_full_steps_is_vmp():
    loss, q, _ = small_topics()
    recipe = svi(lr=1.0, local_tolerance=0.0, local_steps=60)
    for p in blr.run(recipe, loss, q, 3):
        # β has learned from θ at rest; so has the block-by-block recipe, with θ first.
        start = blr.Product.from_factors(theta=loss.start(23), beta=q["beta"])
        theta = last(blr.run(vmp(("theta",)), loss, start, 60))
        (r,) = blr.run(vmp(("beta",)), loss, theta, 1)
        assert relative(p["beta"].natural, r["beta"].natural) < 1e-12
        q = p
    assert elbo(loss, recipe.complete(loss, p)).item() < 0


def test_topics_that_have_been_learned_predict_new_documents_better():
    X = oracle.corpus()
    prior = topics_prior(4, oracle.WORDS)
    train, test = topics(X[:150], prior, 0.25), topics(X[150:], prior, 0.25)
    rng = np.random.RandomState(1)
    q = blr.Product.from_factors(
        beta=blr.Dirichlet.from_concentrations(rng.gamma(100.0, 0.01, (4, oracle.WORDS)))
    )
    recipe = svi(robbins_monro(1.0, 0.7))

    def perplexity(q):
        p = recipe.complete(test, q)
        mu = p.expectation()
        bound = p["local"].entropy().sum() - test.examples(mu).sum()
        return math.exp(-bound / X[150:].sum())

    path = list(blr.run(recipe, train, q, 24, batch=50, generator=generator(0)))
    assert perplexity(q) > 55 and perplexity(path[-1]) < 32  # of 60 words


def test_minibatches_are_unbiased_and_the_prior_is_not_subsampled():
    loss, q, _ = small_topics()
    mu = (loss.start(23).expectation(), *q.expectation())
    rows = torch.randperm(23, generator=generator(3))
    batches = loss.minibatches(6, generator(3))
    found, total = 0.0, 0
    for B in rows.split(6):
        batch = next(batches)
        assert len(batch) == len(B) and batch.weight == 23 / len(B)
        found = found + len(B) / 23 * batch((mu[0][B], mu[1]))
        total += len(B)
    assert total == 23 and abs(found / loss(mu) - 1) < 1e-13
    with pytest.raises(ValueError, match="batch must be at least 1"):
        next(loss.minibatches(0))


def test_svi_without_local_blocks_steps_on_the_minibatches():
    prior = oracle.mixture_prior()
    loss = gaussian_mixture(IRIS, K, prior, latent=False)
    explicit = gaussian_mixture(IRIS, K, prior)
    means = IRIS[[0, 60, 120]]
    start = blr.Product.from_factors(
        pi=prior["pi"],
        components=blr.NormalWishart.from_parameters(means, 5.0, D + 5.0, np.eye(D)),
    )
    paths = [
        list(blr.run(svi(0.2), x, start, 12, batch=40, generator=generator(1)))
        for x in (loss, explicit)
    ]
    for a, b in zip(*paths, strict=True):
        assert relative(flat(a.natural), flat(b.natural)) < 1e-11
    with pytest.raises(ValueError, match="no local block, so q is complete"):
        svi().complete(loss, start)


def test_the_rates_of_robbins_and_monro():
    assert robbins_monro(10.0, 0.7)(1) == 11**-0.7
    for offset, decay in [(10.0, 0.5), (10.0, 1.1), (-1.0, 0.7)]:
        with pytest.raises(ValueError, match=r"decay must be in \(0.5, 1\] and offset"):
            robbins_monro(offset, decay)


# ---- expected losses ----------------------------------------------------------------------------


@pytest.mark.parametrize("d", [3, 30])
def test_the_expected_loss_of_a_mixture_is_that_of_its_examples(d):
    # In many dimensions the quadratic forms are of the examples, in few of their squares.
    rng = np.random.default_rng(3)
    X, r = rng.standard_normal((50, d)), rng.dirichlet(np.ones(2), 50)
    S = np.cov(rng.standard_normal((2 * d, d)).T)
    loss, means = gaussian_mixture(X, 2), rng.standard_normal((2, d))
    point = blr.NormalWishart.from_parameters(means, 1.0, d + 1.0, np.linalg.inv(S))
    pi = tensor([0.3, 0.7]).log()
    mu = (pi, point.sufficient_statistics(point.mode))
    normals = [scipy.stats.multivariate_normal(m, S).logpdf(X) for m in means]
    c = np.stack(normals, 1) + np.log([0.3, 0.7])
    assert relative(loss.message(mu, loss.data), c) < 1e-12
    z = tensor(r[:, :1])
    found = torch.func.grad(lambda mu: loss((z, *mu)))(mu)
    expected = torch.func.grad(lambda mu: loss.examples((z, *mu)).sum())(mu)
    assert abs(loss((z, *mu)) / -(r * c).sum() - 1) < 1e-12
    for a, b in zip(_tree.leaves(found), _tree.leaves(expected), strict=True):
        assert relative(a, b) < 1e-12
    second = -np.einsum("nk,ni,nj->kij", r, X, X) / 2
    assert relative(-(found[1][1] + found[1][1].mT) / 2, second) < 1e-12
    slope = torch.func.grad(lambda z: loss((z, *mu)))(z)
    assert relative(slope[:, 0], c[:, 1] - c[:, 0]) < 1e-12


@pytest.mark.parametrize("variance", [1e-8, 0.3, 1.0, 30.0, 1e3, 1e5])
def test_the_expected_softplus_is_that_of_quadrature(variance):
    s = math.sqrt(variance)
    for m in (-40.0, -2.0, 0.0, 3.0, 60.0):
        # max(f, 0) in closed form; what is left lives where |f| < 40.
        rectified = m * scipy.stats.norm.cdf(m / s) + s * scipy.stats.norm.pdf(m / s)
        rest = lambda f: math.log1p(math.exp(-abs(f))) * scipy.stats.norm.pdf(f, m, s)  # noqa: B023, E731
        lo, hi = max(-40.0, m - 12 * s), min(40.0, m + 12 * s)
        edges = [lo, *[x for x in (m - 3 * s, 0.0, m + 3 * s) if lo < x < hi], hi]
        total = rectified + sum(
            scipy.integrate.quad(rest, a, b, epsabs=1e-14, epsrel=1e-12, limit=300)[0]
            for a, b in zip(sorted(edges)[:-1], sorted(edges)[1:], strict=True)
            if b > a
        )
        found = expected_softplus(tensor(m), tensor(variance)).item()
        assert abs(found - total) < 1e-11 * max(1.0, total)


def test_the_expected_softplus_needs_a_variance():
    with pytest.raises(ValueError, match=r"variance must be positive, got -0.1"):
        expected_softplus(tensor([1.0, 2.0]), tensor([-0.1, 1.0]))


def test_gauss_hermite_quadrature_of_a_fixed_size_would_be_off():
    z, w = np.polynomial.hermite_e.hermegauss(48)
    coarse = (w / w.sum()) @ np.logaddexp(0, 40 * z)
    assert abs(coarse - expected_softplus(tensor(0.0), tensor(1600.0)).item()) > 0.05


def test_the_derivatives_of_the_expected_softplus_are_expectations():
    # Bonnet and Price: ∂m = E[σ(f)], ∂v = ½E[σ(f)(1 − σ(f))].
    m, v = tensor([-2.0, 0.5, 9.0]), tensor([0.2, 4.0, 60.0])
    z = np.linspace(-12, 12, 2001)
    w = scipy.stats.norm.pdf(z) * (z[1] - z[0])
    p = scipy.special.expit(m.numpy()[:, None] + np.sqrt(v.numpy())[:, None] * z)
    found = torch.func.grad(lambda m, v: expected_softplus(m, v).sum(), argnums=(0, 1))(m, v)
    assert relative(found[0], p @ w) < 1e-12
    assert relative(found[1], 0.5 * (p * (1 - p)) @ w) < 1e-11


def test_a_conjugate_prior_is_its_expected_log_density():
    prior = blr.Gamma.from_shape_rate(2.0, 3.0)
    q = blr.Gamma.from_shape_rate(4.0, 1.5)
    theta = scipy.stats.gamma(4.0, scale=1 / 1.5)
    expected = -theta.expect(scipy.stats.gamma(2.0, scale=1 / 3.0).logpdf)
    assert abs(conjugate(prior)(q.expectation()).item() - expected) < 1e-8
    # KL(q‖p₀) = E_q[−log p₀] − H(q).
    assert abs(conjugate(prior)(q.expectation()) - q.entropy() - q.kl(prior)) < 1e-12


# ---- what can go wrong --------------------------------------------------------------------------


def one_prior(classes: int, d: int, X) -> blr.Product:
    m = np.tile(np.mean(X, 0), (classes, 1))
    return blr.Product.from_factors(
        pi=blr.Dirichlet.from_concentrations(torch.full((classes,), 2.0).double()),
        components=blr.NormalWishart.from_parameters(m, 1.0, d + 1.0, np.eye(d)),
    )


def with_z(q: blr.Product, n: int) -> blr.Product:
    classes = q["components"].batch_shape[0]
    z = blr.Categorical(natural=torch.zeros(n, classes - 1).double())
    return blr.Product.from_factors(z=z, pi=q["pi"], components=q["components"])


def test_a_single_example_needs_a_proper_prior_and_is_told_so():
    X = IRIS[:1]
    q = with_z(one_prior(2, D, X), 1)
    with pytest.raises(ValueError, match=r"step 1: block 'components': .*a proper prior"):
        list(blr.run(em(M_STEP), gaussian_mixture(X, 2), q, 1))
    p = last(blr.run(vmp(), gaussian_mixture(X, 2, one_prior(2, D, X)), q, 5))
    assert abs(p["components"].mean_precision.sum() - 3) < 1e-12  # 1 + 1, and one example


def test_a_constant_feature_needs_a_proper_prior_and_is_told_so():
    X = np.column_stack([IRIS[:, 0], np.full(N, 2.0)])
    q = with_z(one_prior(2, 2, X), N)
    with pytest.raises(ValueError, match=r"block 'components': .*positive definite.*proper prior"):
        list(blr.run(em(M_STEP), gaussian_mixture(X, 2), q, 1))
    p = last(blr.run(vmp(), gaussian_mixture(X, 2, one_prior(2, 2, X)), q, 5))
    assert torch.isfinite(flat(p.natural)).all()


def test_a_component_that_loses_its_data_falls_back_to_the_prior():
    X = np.vstack([IRIS[:50], IRIS[:50] + 1e-3])
    prior = one_prior(2, D, X)
    far = blr.NormalWishart.from_parameters([X.mean(0), X.mean(0) + 1e3], 1.0, D + 1.0, np.eye(D))
    q = with_z(prior.replace(components=far), len(X))
    (p,) = blr.run(vmp(), gaussian_mixture(X, 2, prior), q, 1)
    assert relative(p["components"].mean[1], X.mean(0)) < 1e-10
    assert abs(p["components"].dof[1] - (D + 1)) < 1e-10
    with pytest.raises(ValueError, match="block"):
        list(blr.run(em(M_STEP), gaussian_mixture(X, 2), q, 3))


def test_documents_without_words_keep_their_prior():
    loss, q, counts = small_topics()
    counts[[3, 11]] = 0
    prior = topics_prior(4, oracle.WORDS)
    for some in (counts, np.zeros((2, oracle.WORDS))):
        loss = topics(some, prior, 0.25)
        p = svi().complete(loss, q)
        empty = p["local"].concentrations[some.sum(1) == 0]
        assert (empty - 0.25).abs().max() < 1e-15
    (p,) = blr.run(svi(lr=1.0), loss, q, 1)
    assert (p["beta"].concentrations - 0.1).abs().max() < 1e-15


def test_words_that_no_topic_expects_do_not_underflow():
    # E[log β] is about −10⁴ for a word that was never seen, with a prior of 10⁻⁴.
    prior = topics_prior(2, 3, eta=1e-4)
    q = blr.Product.from_factors(beta=prior.add(tensor([[9.0, 1.0, 0.0], [1.0, 7.0, 0.0]])))
    p = svi().complete(topics([[0.0, 0.0, 5.0]], prior, 0.25), q)
    assert torch.isfinite(p["local"].concentrations).all()
    assert abs(p["local"].concentrations.sum() - 5.5) < 1e-12


def test_losses_say_what_does_not_fit():
    prior = topics_prior(4, 60)
    with pytest.raises(ValueError, match="counts must be at least zero"):
        topics(-np.ones((2, 60)), prior)
    with pytest.raises(ValueError, match=r"counts must have shape \(N, V\) and the prior"):
        topics(np.ones((2, 59)), prior)
    with pytest.raises(ValueError, match=r"X must have shape \(N, D\)"):
        gaussian_mixture(IRIS[:, 0], 2)
    with pytest.raises(ValueError, match=r"must have batch \(2,\), got \(3,\)"):
        gaussian_mixture(IRIS, 2, oracle.mixture_prior())
    with pytest.raises(ValueError, match="X must be finite"):
        gaussian_mixture(np.where(IRIS > 7.5, np.nan, IRIS), 2)
    one_for_all = with_z(one_prior(2, D, IRIS), 1)
    with pytest.raises(ValueError, match=r"shape \(150, 1\), one member for each example, got"):
        list(blr.run(em(M_STEP), gaussian_mixture(IRIS, 2), one_for_all, 1))
    with pytest.raises(ValueError, match=r"shape \(150, 1\), one member for each example, got"):
        list(blr.run(em(M_STEP, (M_STEP,)), gaussian_mixture(IRIS, 2), one_for_all, 1))
    with pytest.raises(ValueError, match="as many examples, at least one, got"):
        ExpectedLoss(lambda mu, data: data, lambda c: c, (torch.ones(2), torch.ones(3)))


def test_recipes_say_what_does_not_fit():
    q = three_numbers()
    for recipe in (
        vmp(("a", "x")),
        em(("x",)),
        ncvmp({"x": 0.5}),
        Messages(gradients={"x": blr.gradients.delta}),
    ):
        with pytest.raises(ValueError, match="no block 'x'; the blocks are a, b, c"):
            list(blr.run(recipe, coupled, q, 1))
    with pytest.raises(TypeError, match=r"must be a number, got shape \(3,\); sum"):
        list(blr.run(vmp(), lambda mu: torch.cat([block[0] for block in mu]), q, 1))
    with pytest.raises(TypeError, match="got function; pass one, or an ExpectedLoss"):
        list(blr.run(vmp(), coupled, q, 1, batch=3))
    with pytest.raises(TypeError, match="minibatches need an ExpectedLoss, got function"):
        list(blr.run(svi(), coupled, q, 1))
    gamma = blr.Product.from_factors(tau=blr.Gamma.from_shape_rate(2.0, 1.0))
    with pytest.raises(TypeError, match="block 'tau': Gamma has no mode"):
        list(blr.run(em(("tau",)), lambda mu: -mu[0][0] + mu[0][1], gamma, 1))
    flat_pi = blr.Product.from_factors(pi=blr.Dirichlet.from_concentrations([1.0, 1.0]))
    with pytest.raises(ValueError, match="block 'pi' has no mode to show"):
        list(blr.run(em(("pi",)), lambda mu: -mu[0].sum(), flat_pi, 1))


def test_a_block_that_the_loss_does_not_see_becomes_its_prior():
    # No message: λ ← −∇(−H)… leaves what the base measure is, here the uniform Dirichlet.
    q = blr.Product.from_factors(
        a=blr.Dirichlet.from_concentrations([3.0, 4.0]),
        b=blr.Gaussian.from_moments([1.0], [[1.0]]),
    )
    (p,) = blr.run(vmp(("a",)), lambda mu: mu[1][1].sum(), q, 1)
    assert relative(p["a"].concentrations, [1.0, 1.0]) < 1e-15
    assert p["b"] is q["b"]


def test_learning_works_where_gradients_are_switched_off():
    with torch.no_grad():
        (q,) = blr.run(vmp(), coupled, three_numbers(), 1)
    (p,) = blr.run(vmp(), coupled, three_numbers(), 1)
    assert torch.equal(flat(q.natural), flat(p.natural))

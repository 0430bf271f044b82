"""The laws of exponential families, on every family, at ordinary and extreme parameters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import blr
from blr import _tree
from blr.expfam import ExponentialFamily
from blr.testing import check_family

SPD3 = [[2.0, 0.3, -0.5], [0.3, 1.0, 0.2], [-0.5, 0.2, 3.0]]
SPD2 = [[2.0, 0.3], [0.3, 1.0]]

ORDINARY = {
    "Bernoulli": (blr.Bernoulli.from_probability(0.3), blr.Bernoulli.from_probability(0.8)),
    "SignBernoulli": (
        blr.SignBernoulli.from_probability([0.3, 0.9, 0.55]),
        blr.SignBernoulli.from_probability([0.8, 0.6, 0.25]),
    ),
    "Categorical": (
        blr.Categorical.from_probabilities([0.2, 0.5, 0.3]),
        blr.Categorical.from_probabilities([0.6, 0.1, 0.3]),
    ),
    "Beta": (blr.Beta.from_concentrations(2.3, 1.4), blr.Beta.from_concentrations(1.2, 3.0)),
    "Dirichlet": (
        blr.Dirichlet.from_concentrations([1.3, 2.2, 0.7]),
        blr.Dirichlet.from_concentrations([2.0, 1.0, 1.5]),
    ),
    "Gamma": (blr.Gamma.from_shape_rate(2.5, 1.7), blr.Gamma.from_shape_rate(1.2, 0.6)),
    "InverseGamma": (
        blr.InverseGamma.from_shape_scale(9.5, 1.7),
        blr.InverseGamma.from_shape_scale(7.0, 2.6),
    ),
    "Exponential": (blr.Exponential.from_rate(1.3), blr.Exponential.from_rate(0.5)),
    "Poisson": (blr.Poisson.from_rate(3.2), blr.Poisson.from_rate(5.1)),
    "Gaussian": (
        blr.Gaussian.from_moments([1.0, -2.0, 0.5], SPD3),
        blr.Gaussian.from_moments([0.0, 1.0, 0.0], covariance=SPD3),
    ),
    "DiagonalGaussian": (
        blr.DiagonalGaussian.from_moments([1.0, -2.0], [2.0, 0.3]),
        blr.DiagonalGaussian.from_moments([0.0, 1.0], [1.0, 3.0]),
    ),
    "NamedGaussian": (
        blr.NamedGaussian.from_named(
            {"w": torch.tensor([[1.0], [-2.0]]).double(), "b": torch.tensor([0.5]).double()},
            {"w": torch.tensor([[2.0], [0.3]]).double(), "b": torch.tensor([7.0]).double()},
        ),
        blr.NamedGaussian.from_named(
            {"w": torch.tensor([[0.0], [1.0]]).double(), "b": torch.tensor([3.0]).double()},
            {"w": torch.tensor([[1.0], [3.0]]).double(), "b": torch.tensor([0.2]).double()},
        ),
    ),
    "FixedGaussian": (
        blr.FixedGaussian.from_moments([1.0, -2.0], SPD2),
        blr.FixedGaussian.from_moments([0.0, 1.0], SPD2),
    ),
    "FixedGaussian, diagonal": (
        blr.FixedGaussian.from_moments([1.0, -2.0], [2.0, 0.3]),
        blr.FixedGaussian.from_moments([0.0, 1.0], [2.0, 0.3]),
    ),
    "FixedGaussian, s·I": (
        blr.FixedGaussian.from_moments([1.0, -2.0], 1.7),
        blr.FixedGaussian.from_moments([0.0, 1.0], 1.7),
    ),
    "Wishart": (blr.Wishart.from_dof_scale(5.5, SPD3), blr.Wishart.from_dof_scale(7.0, SPD3)),
    "NormalGamma": (
        blr.NormalGamma.from_parameters([0.5, -1.0], SPD2, 5.0, 1.5),
        blr.NormalGamma.from_parameters([-0.2, 0.0], SPD2, 4.0, 2.5),
    ),
    "NormalWishart": (
        blr.NormalWishart.from_parameters([0.5, -1.0], 2.0, 6.0, SPD2),
        blr.NormalWishart.from_parameters([-0.2, 0.0], 1.0, 5.0, SPD2),
    ),
    "Product": (
        # A batch of two classes, a fixed part and two blocks of λ.
        blr.Product.from_factors(
            z=blr.Categorical.from_probabilities([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]),
            m=blr.FixedGaussian.from_moments([1.0, -2.0], SPD2),
            tau=blr.Gamma.from_shape_rate(2.5, 1.7),
        ),
        blr.Product.from_factors(
            z=blr.Categorical.from_probabilities([[0.3, 0.3, 0.4], [0.5, 0.4, 0.1]]),
            m=blr.FixedGaussian.from_moments([0.0, 1.0], SPD2),
            tau=blr.Gamma.from_shape_rate(1.2, 0.6),
        ),
    ),
}

EXTREME = {
    "Bernoulli, log-odds 30": blr.Bernoulli(natural=torch.tensor(30.0).double()),
    "Bernoulli, log-odds -40": blr.Bernoulli(natural=torch.tensor(-40.0).double()),
    "Bernoulli, p = 1e-9": blr.Bernoulli.from_probability(1e-9),
    "SignBernoulli, λ from -17 to 15": blr.SignBernoulli(natural=[-17.0, 15.0, 0.0, 1e-3]),
    "SignBernoulli, p = 1e-9": blr.SignBernoulli.from_probability([1e-9]),
    "Categorical, p = 1e-8": blr.Categorical.from_probabilities([1e-8, 0.4, 0.6 - 1e-8]),
    "Beta(1e-3, 1e-3)": blr.Beta.from_concentrations(1e-3, 1e-3),
    "Beta(1e5, 2)": blr.Beta.from_concentrations(1e5, 2.0),
    "Dirichlet, 1e-3 to 1e4": blr.Dirichlet.from_concentrations([1e-3, 1.0, 1e4]),
    "Gamma(1e-3, 1e3)": blr.Gamma.from_shape_rate(1e-3, 1e3),
    "Gamma(1e5, 1e-3)": blr.Gamma.from_shape_rate(1e5, 1e-3),
    "InverseGamma(1e4, 1e-4)": blr.InverseGamma.from_shape_scale(1e4, 1e-4),
    "Exponential(1e-8)": blr.Exponential.from_rate(1e-8),
    "Poisson(1e-6)": blr.Poisson.from_rate(1e-6),
    "Poisson(1e6)": blr.Poisson.from_rate(1e6),
    "Gaussian, condition 1e6": blr.Gaussian.from_moments([1.0, 1.0], [[1e3, 0.5], [0.5, 1e-3]]),
    "DiagonalGaussian, 1e-6 to 1e6": blr.DiagonalGaussian.from_moments([0.0, 3.0], [1e-6, 1e6]),
    "FixedGaussian, 1e6": blr.FixedGaussian.from_moments([1.0, 2.0], [[1e6, 0.0], [0.0, 1e-6]]),
    "FixedGaussian, 1e-6 to 1e6": blr.FixedGaussian.from_moments([1.0, 2.0], [1e6, 1e-6]),
    "FixedGaussian, 1e8·I": blr.FixedGaussian.from_moments([1.0, -2.0, 1e-3], 1e8),
    "Wishart, ν = p − 1 + 0.01": blr.Wishart.from_dof_scale(1.01, SPD2),
    "Wishart, ν = 1e5": blr.Wishart.from_dof_scale(1e5, SPD2),
    "NormalGamma, a = 1e4": blr.NormalGamma.from_parameters([0.0, 1e2], SPD2, 1e4, 1.0),
    "NormalWishart, κ = 1e-4": blr.NormalWishart.from_parameters([1.0, 2.0], 1e-4, 1e3, SPD2),
}


def test_every_exported_family_is_here():
    exported = {
        name
        for name in blr.__all__
        if isinstance(getattr(blr, name), type)
        and issubclass(getattr(blr, name), ExponentialFamily)
    }
    assert exported == {name.split(",")[0] for name in ORDINARY}


@pytest.mark.parametrize("name", ORDINARY)
def test_laws_at_ordinary_parameters(name):
    check_family(*ORDINARY[name], rtol=1e-10)


@pytest.mark.parametrize("name", EXTREME)
def test_identities_at_extreme_parameters(name):
    # μ carries λ to about (condition of F)·ε, so identities in μ are what can be asked for.
    check_family(EXTREME[name], rtol=1e-9, draws=0)


@pytest.mark.parametrize("name", ORDINARY)
def test_natural_parameters_come_back_from_expectations(name):
    for q in ORDINARY[name]:
        back = type(q).from_expectation(q.expectation(), q)
        for lam, again in zip(_tree.leaves(q.natural), _tree.leaves(back.natural), strict=True):
            torch.testing.assert_close(again, lam, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ORDINARY)
def test_float32_stays_float32_and_agrees(name):
    q = ORDINARY[name][0]
    low = q.at(_tree.tree_map(lambda x: x.float(), q.natural))
    if isinstance(q, blr.FixedGaussian):
        assert low.precision.dtype == torch.float32
    for value, expected in [
        (low.log_partition(), q.log_partition()),
        (low.entropy(), q.entropy()),
        (low.fisher(), q.fisher()),
        (
            _tree.flatten(low.expectation(), q.natural_ndims),
            _tree.flatten(q.expectation(), q.natural_ndims),
        ),
    ]:
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-5)
    back = type(q).from_expectation(low.expectation(), low)
    assert all(x.dtype == torch.float32 for x in _tree.leaves(back.natural))


@pytest.mark.parametrize("name", ORDINARY)
def test_a_batch_is_its_members(name):
    q, p = ORDINARY[name]
    both = q.at(_tree.tree_map(lambda a, b: torch.stack([a, b]), q.natural, p.natural))
    assert both.batch_shape == (2,)
    for k, one in enumerate((q, p)):
        torch.testing.assert_close(both.log_partition()[k], one.log_partition())
        torch.testing.assert_close(both.entropy()[k], one.entropy())
        torch.testing.assert_close(both.fisher()[k], one.fisher())
        torch.testing.assert_close(both.kl(p)[k], one.kl(p), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", ORDINARY)
def test_samples_follow_the_generator(name):
    q = ORDINARY[name][0]
    draw = lambda: q.sample(3, torch.Generator().manual_seed(5))  # noqa: E731
    state = torch.get_rng_state()
    first, second = draw(), draw()
    for a, b in zip(_tree.leaves(first), _tree.leaves(second), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(state, torch.get_rng_state()), "the global generator was touched"


@pytest.mark.parametrize("name", ORDINARY)
def test_gradients_flow_through_natural_parameters(name):
    q = ORDINARY[name][0]
    lam = _tree.flatten(q.natural, q.natural_ndims).clone().requires_grad_()
    member = q.at(_tree.unflatten(lam, q.natural, q.natural_ndims))
    (grad,) = torch.autograd.grad(member.log_partition(), lam)
    torch.testing.assert_close(grad, _tree.flatten(q.expectation(), q.natural_ndims))


# ---- Hypothesis: the input space is the point --------------------------------------------------

positive = st.floats(1e-2, 1e3)
real = st.floats(-30, 30)


@st.composite
def members(draw):
    """A member of a random family at random parameters."""
    kind = draw(st.sampled_from(sorted(ORDINARY)))
    d = draw(st.integers(1, 4))
    vector = lambda s, n=d: draw(st.lists(s, min_size=n, max_size=n))  # noqa: E731

    def spd():
        L = np.tril(np.array(vector(st.floats(-2, 2), d * d)).reshape(d, d), -1)
        return L @ L.T + np.diag(vector(st.floats(0.1, 10)))

    match kind:
        case "Bernoulli":
            return blr.Bernoulli(natural=draw(real))
        case "SignBernoulli":
            # Autodiff of A has 1e-16 of 1 as its error, which a smaller μ would not forgive.
            return blr.SignBernoulli(natural=np.round(vector(st.floats(-15, 15)), 6))
        case "Categorical":
            return blr.Categorical(natural=vector(st.floats(-15, 15)))
        case "Beta":
            return blr.Beta.from_concentrations(draw(positive), draw(positive))
        case "Dirichlet":
            return blr.Dirichlet.from_concentrations(vector(positive, d + 1))
        case "Gamma":
            return blr.Gamma.from_shape_rate(draw(positive), draw(positive))
        case "InverseGamma":
            return blr.InverseGamma.from_shape_scale(draw(positive), draw(positive))
        case "Exponential":
            return blr.Exponential.from_rate(draw(positive))
        case "Poisson":
            return blr.Poisson.from_rate(draw(positive))
        case "Gaussian":
            return blr.Gaussian.from_moments(vector(real), spd())
        case "DiagonalGaussian":
            return blr.DiagonalGaussian.from_moments(vector(real), vector(positive))
        case "NamedGaussian":
            m, s = (torch.tensor(vector(x), dtype=torch.float64) for x in (real, positive))
            return blr.NamedGaussian.from_named({"w": m}, {"w": s})
        case "FixedGaussian":
            return blr.FixedGaussian.from_moments(vector(real), spd())
        case "FixedGaussian, diagonal":
            return blr.FixedGaussian.from_moments(vector(real), vector(positive))
        case "FixedGaussian, s·I":
            return blr.FixedGaussian.from_moments(vector(real), draw(positive))
        case "Wishart":
            return blr.Wishart.from_dof_scale(d - 1 + draw(positive), spd())
        case "NormalGamma":
            return blr.NormalGamma.from_parameters(
                vector(st.floats(-3, 3)), spd(), draw(positive), draw(positive)
            )
        case "NormalWishart":
            dof = d - 1 + draw(positive)
            return blr.NormalWishart.from_parameters(
                vector(st.floats(-3, 3)), draw(positive), dof, spd()
            )
        case "Product":
            return blr.Product.from_factors(
                z=blr.Categorical(natural=[vector(st.floats(-15, 15)) for _ in range(2)]),
                beta=blr.Dirichlet.from_concentrations(vector(positive, d + 1)),
            )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(members())
def test_identities_anywhere_in_the_domain(q):
    # A mean of 30 with precision 100 leaves 1e-12 of E[θ²] for the variance, hence the tolerance.
    check_family(q, rtol=1e-7, draws=0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(members(), st.floats(0.05, 0.95))
def test_kl_is_not_negative_and_adding_then_removing_is_nothing(q, share):
    p = q.at(_tree.tree_map(lambda x: x.clone(), q.natural))
    half = _tree.scale(share, q.natural)
    try:
        p = q.remove(half)
    except ValueError:
        p = q.add(half)
    size = 1 + q.log_partition().abs() + p.log_partition().abs()
    assert q.kl(p) >= -1e-12 * size
    assert p.kl(q) >= -1e-12 * size
    back = p.add(_tree.sub(q.natural, p.natural))
    for a, b in zip(_tree.leaves(back.natural), _tree.leaves(q.natural), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * float(b.abs().max()))

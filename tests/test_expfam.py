"""The contract: a family that writes only its log-partition gets everything else."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import scipy.stats
import torch

import blr
from blr.expfam import ExponentialFamily
from blr.testing import check_family


@dataclass(frozen=True, eq=False, repr=False)
class Poisson(ExponentialFamily):
    """A(λ) = e^λ and nothing else: no closed form, no sampler."""

    def log_partition(self):
        """A(λ) = e^λ."""
        return self.natural.exp()


@dataclass(frozen=True, eq=False, repr=False)
class Exponential(ExponentialFamily):
    """A(λ) = −log(−λ), λ < 0: a domain that the family only knows through A."""

    def log_partition(self):
        """A(λ) = −log(−λ)."""
        return -(-self.natural).log()

    @classmethod
    def initial_natural(cls, mu):
        """Inside the domain."""
        return -torch.ones_like(mu)


@dataclass(frozen=True, eq=False, repr=False)
class Softmax(ExponentialFamily):
    """A vector family: A(λ) = log(1 + Σ e^λ)."""

    natural_ndims: ClassVar = 1

    def log_partition(self):
        """A(λ) = log(1 + Σ e^λ)."""
        return torch.logsumexp(
            torch.cat([self.natural, torch.zeros_like(self.natural[..., :1])], -1), -1
        )


@pytest.mark.parametrize(
    ("bare", "full"),
    [
        (Poisson(natural=0.7), blr.Poisson(natural=0.7)),
        (Poisson(natural=[-3.0, 4.0]), blr.Poisson(natural=[-3.0, 4.0])),
        (Exponential(natural=[-0.2, -30.0]), blr.Exponential(natural=[-0.2, -30.0])),
        (Softmax(natural=[0.3, -2.0]), blr.Categorical(natural=[0.3, -2.0])),
        (
            Softmax(natural=[[0.3, 5.0], [1.0, 1.0]]),
            blr.Categorical(natural=[[0.3, 5.0], [1.0, 1.0]]),
        ),
    ],
)
def test_defaults_agree_with_closed_forms(bare, full):
    torch.testing.assert_close(bare.expectation(), full.expectation(), rtol=1e-12, atol=0)
    torch.testing.assert_close(bare.fisher(), full.fisher(), rtol=1e-11, atol=1e-15)
    back = type(bare).from_expectation(full.expectation())
    torch.testing.assert_close(back.natural, full.natural, rtol=1e-10, atol=1e-10)
    if not bare.batch_shape:
        check_family(bare, rtol=1e-10)


def test_newton_reports_an_expectation_outside_the_mean_space():
    with pytest.raises(ValueError, match="no member of Poisson with expectation"):
        Poisson.from_expectation(torch.tensor(-1.0))


def test_outside_the_domain_the_log_partition_is_not_finite_and_says_so():
    with pytest.raises(ValueError, match="log_partition"):
        Exponential(natural=1.0)


def test_sampling_without_a_sampler_says_what_to_do():
    with pytest.raises(TypeError, match="override `sample`"):
        Poisson(natural=0.0).sample(1)


def test_kl_between_families_is_refused():
    with pytest.raises(TypeError, match="expected another Gamma"):
        blr.Gamma.from_shape_rate(1, 1).kl(blr.Exponential.from_rate(1))
    q = blr.FixedGaussian.from_moments([0.0], [[1.0]])
    with pytest.raises(ValueError, match="different known precisions"):
        q.kl(blr.FixedGaussian.from_moments([0.0], [[2.0]]))


def test_bonnet_and_price_give_the_gradient_in_mu():
    # ∇_μ E_q[ℓ] for ℓ(θ) = log(1 + e^{cᵀθ}), against autodiff through μ and Gauss–Hermite.
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    z, w = torch.tensor(nodes), torch.tensor(weights / math.sqrt(2 * math.pi))
    c = torch.tensor([1.3, -0.7]).double()
    q = blr.Gaussian.from_moments([0.4, -0.2], covariance=[[0.8, 0.3], [0.3, 0.5]])
    mu1, mu2 = (x.clone().requires_grad_() for x in q.expectation())

    def at_nodes(m, V, f):
        return (w * f(m @ c + torch.sqrt(c @ V @ c) * z)).sum()

    loss = at_nodes(mu1, mu2 - torch.outer(mu1, mu1), torch.nn.functional.softplus)
    expected = torch.autograd.grad(loss, (mu1, mu2))
    s = torch.sigmoid
    g = at_nodes(q.mean, q.covariance, s) * c
    H = at_nodes(q.mean, q.covariance, lambda f: s(f) * (1 - s(f))) * torch.outer(c, c)
    for ours, theirs in zip(q.natural_gradient(g, H), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    diagonal = blr.DiagonalGaussian.from_moments(q.mean, variance=q.variance)
    m1, m2 = (x.clone().requires_grad_() for x in diagonal.expectation())
    loss = at_nodes(m1, torch.diag(m2 - m1**2), torch.nn.functional.softplus)
    expected = torch.autograd.grad(loss, (m1, m2))
    V = torch.diag(diagonal.variance)
    h = at_nodes(diagonal.mean, V, lambda f: s(f) * (1 - s(f))) * c**2
    g = at_nodes(diagonal.mean, V, s) * c
    for ours, theirs in zip(diagonal.natural_gradient(g, h), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_natural_gradient_is_the_ordinary_one_divided_by_fisher():
    # F⁻¹∇_λ = ∇_μ for an arbitrary function of a gamma posterior.
    q = blr.Gamma.from_shape_rate(2.5, 1.7)
    mu = [x.clone().requires_grad_() for x in q.expectation()]
    again = blr.Gamma.from_expectation(tuple(mu))
    in_mu = torch.stack(torch.autograd.grad((again.shape * again.rate.log()).sum(), mu))
    lam = torch.stack(q.natural).requires_grad_()
    member = blr.Gamma(natural=tuple(lam))
    (in_lam,) = torch.autograd.grad(member.shape * member.rate.log(), lam)
    torch.testing.assert_close(torch.linalg.solve(q.fisher(), in_lam), in_mu, rtol=1e-8, atol=0)


def test_densities_at_the_edge_of_the_support_are_scipys():
    beta = blr.Beta.from_concentrations(1.0, 1.0)
    theta = [-0.1, 0.0, 0.5, 1.0, 1.1]
    np.testing.assert_array_equal(beta.log_prob(theta), scipy.stats.beta(1, 1).logpdf(theta))
    gamma = blr.Gamma.from_shape_rate(1.0, 2.0)
    np.testing.assert_allclose(
        gamma.log_prob([0.0, -1.0]), scipy.stats.gamma(1, scale=0.5).logpdf([0.0, -1.0])
    )
    assert torch.isnan(gamma.log_prob(float("nan")))


def test_natural_parameters_are_immutable_and_repr_is_readable():
    q = blr.Gaussian.from_moments([1.0, 2.0], [[2.0, 0.3], [0.3, 1.0]])
    with pytest.raises(AttributeError):
        q.natural = (0, 0)
    assert repr(q) == "Gaussian(mean=[1, 2], precision=[[2, 0.3], [0.3, 1]])"
    assert repr(blr.Beta.from_concentrations(1, 2.5)) == "Beta(a=1, b=2.5)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: blr.Gamma(natural=torch.tensor(1.0)), "do not fit together"),
        (lambda: blr.Gamma(natural=(torch.zeros(2), -torch.ones(3))), "do not fit together"),
        (lambda: blr.Gaussian(natural=(torch.zeros(2), -torch.eye(3))), r"\(\.\.\., 2, 2\)"),
        (lambda: blr.Gamma.from_shape_rate(1, 1).add(torch.tensor(1.0)), "structure"),
        (lambda: blr.Gamma.from_shape_rate(1, 1).remove((0.0, -3.0)), "leaves the domain of Gamma"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_removing_so_much_that_only_rounding_errors_remain_raises():
    rng = np.random.default_rng(0)
    S = rng.standard_normal((6, 5))
    S = torch.tensor(S.T @ S)
    q = blr.Gaussian(natural=(torch.zeros(5).double(), -0.5 * S))
    almost = -0.5 * (S - 1e-17 * torch.eye(5).double())
    with pytest.raises(ValueError, match="positive definite"):
        q.remove((torch.zeros(5).double(), almost * (1 - 1e-16)))


def test_check_family_notices_a_wrong_expectation_and_a_wrong_sampler():
    class Wrong(blr.Gamma):
        def expectation(self):
            mu1, mu2 = super().expectation()
            return mu1 + 1e-6, mu2

    with pytest.raises(AssertionError, match="∇A = μ"):
        check_family(Wrong.from_shape_rate(2.0, 3.0))

    class Biased(blr.Gamma):
        def sample(self, n, generator=None):
            return 1.05 * super().sample(n, generator)

    with pytest.raises(AssertionError, match="standard errors"):
        check_family(Biased.from_shape_rate(2.0, 3.0))


def test_a_number_does_not_promote_a_float32_array():
    q = blr.Gamma.from_shape_rate(torch.tensor([1.0, 2.0]), 1.5)
    assert q.dtype == torch.float32
    assert blr.Gamma.from_shape_rate([1, 2], 1.5).dtype == torch.float64


def test_arrays_on_different_devices_are_named():
    here, there = torch.ones(2), torch.ones(2, device="meta")
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        blr.DiagonalGaussian.from_moments(here, variance=there)

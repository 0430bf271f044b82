"""The improved rule: second order along geodesics, positive for every rate and every Hessian."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import polygamma

import blr
from blr import gradients
from blr.improved import gamma_christoffel, improve

RHO = st.floats(1e-3, 50)
ENTRY = st.floats(-20, 20)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def precision(seed=0, D=3):
    B = torch.randn(D, D + 2, dtype=torch.float64, generator=generator(seed))
    return B @ B.T + 0.5 * torch.eye(D).double()


def wells(theta):
    return (0.25 * theta**4 - 0.5 * theta**2).sum()


# ---- the domain ---------------------------------------------------------------------------------


@given(arrays(float, (3, 3), elements=ENTRY), arrays(float, 3, elements=ENTRY), RHO)
def test_a_full_precision_stays_positive_for_every_hessian_and_rate(H, g, rho):
    H, g = torch.tensor(H + H.T), torch.tensor(g)
    q = blr.Gaussian.from_moments([0.3, -0.1, 0.2], precision())
    after = improve(q, q.natural_gradient(g, H), lr=rho)
    half = torch.linalg.eigvalsh(after.precision - 0.5 * q.precision)
    assert half.min() > -1e-12 * half.abs().max()


@given(arrays(float, 4, elements=ENTRY), arrays(float, 4, elements=ENTRY), RHO)
def test_a_diagonal_precision_stays_at_least_half_of_what_it_was(h, g, rho):
    q = blr.DiagonalGaussian.from_moments([0.3, -0.1, 0.2, 9.0], [0.1, 1.0, 5.0, 100.0])
    after = improve(q, q.natural_gradient(torch.tensor(g), torch.tensor(h)), lr=rho)
    assert (after.precision >= 0.5 * q.precision * (1 - 1e-12)).all()


@given(st.floats(1e-3, 1e4), st.floats(1e-3, 1e3), ENTRY, ENTRY, RHO)
def test_a_gamma_stays_a_gamma_for_every_gradient_and_rate(a, b, g1, g2, rho):
    q = blr.Gamma.from_shape_rate(a, b)
    after = improve(q, (torch.tensor(g1).double(), torch.tensor(g2).double()), lr=rho)
    kept = 0.5 * (1 - 1e-9)
    assert after.shape >= kept * a and after.rate / after.shape >= kept * b / a


def test_the_plain_rule_leaves_the_domain_where_the_improved_one_converges():
    for q, curvature in (
        (blr.Gaussian.from_moments([0.1, -0.2], torch.eye(2).double()), torch.diag),
        (blr.DiagonalGaussian.from_moments([0.1, -0.2], 1.0), lambda v: v),
    ):
        with pytest.raises(ValueError, match=r"out of the domain.*blr\.improve"):
            list(blr.run(blr.Rule(gradients.delta), wells, q, 5))
        *_, q = blr.run(blr.recipes.improved(lr=0.3), wells, q, 200, tolerance=1e-13)
        np.testing.assert_allclose(q.mean, [1.0, -1.0], rtol=1e-10)
        np.testing.assert_allclose(q.precision, curvature(torch.tensor([2.0, 2.0])), rtol=1e-10)


def test_only_a_half_of_the_precision_is_lost_at_worst():
    q = blr.DiagonalGaussian.from_moments([0.0], 3.0)
    h = torch.tensor([3.0 - 3.0 / 0.4]).double()  # s − ρ(s − h) = 0
    after = improve(q, q.natural_gradient(torch.zeros(1).double(), h), lr=0.4)
    np.testing.assert_allclose(after.precision, [1.5], rtol=1e-14)


# ---- the second order ---------------------------------------------------------------------------


def second_order(move, rho=1e-2):
    """The second derivative in ρ of a step that is quadratic in ρ."""
    return (move(rho) - 2 * move(0.0) + move(-rho)) / rho**2


def christoffel(fisher, at, h=1e-4):
    """Γᵏᵢⱼ of a metric by central differences."""
    d = len(at)
    dF = np.stack([(fisher(at + h * e) - fisher(at - h * e)) / (2 * h) for e in np.eye(d)])
    lowered = 0.5 * (dF.transpose(2, 0, 1) + dF.transpose(2, 1, 0) - dF)  # [l, i, j]
    return np.einsum("kl,lij->kij", np.linalg.inv(fisher(at)), lowered)


def test_a_precision_moves_along_the_geodesic_to_second_order():
    basis = [np.diag([1.0, 0.0]), np.array([[0.0, 1.0], [1.0, 0.0]]), np.diag([0.0, 1.0])]

    def matrix(p):
        return sum(x * E for x, E in zip(p, basis, strict=True))

    def fisher(p):
        R = [np.linalg.solve(matrix(p), E) for E in basis]
        return np.array([[0.5 * np.trace(a @ b) for b in R] for a in R])

    S = np.array([2.0, 0.3, 0.7])
    H = np.array([[-1.0, 0.4], [0.4, 3.0]])
    q = blr.Gaussian.from_moments([0.0, 0.0], matrix(S))
    gradient = q.natural_gradient(torch.tensor([0.5, 1.0]).double(), torch.tensor(H))

    def move(rho):
        after = improve(q, gradient, lr=rho).precision.numpy()
        return np.array([after[0, 0], after[0, 1], after[1, 1]])

    G = (matrix(S) - H)[[0, 0, 1], [0, 1, 1]]
    expected = -np.einsum("kij,i,j->k", christoffel(fisher, S), G, G)
    np.testing.assert_allclose(second_order(move), expected, rtol=1e-6)


def test_a_gamma_moves_along_the_geodesics_of_its_blocks_to_second_order():
    def fisher(p):  # of (a, b/a), from that of (a, b)
        a, b = p[0], p[0] * p[1]
        J = np.array([[1.0, 0.0], [p[1], p[0]]])
        return J.T @ np.array([[polygamma(1, a), -1 / b], [-1 / b, a / b**2]]) @ J

    for a, b in ((2.3, 1.84), (0.4, 3.0)):
        at = np.array([a, b / a])
        assert abs(fisher(at)[0, 1]) < 1e-14
        G = christoffel(fisher, at, h=1e-5)
        q = blr.Gamma.from_shape_rate(a, b)
        gradient = torch.tensor(0.7).double(), torch.tensor(-0.4).double()

        def move(rho, q=q, gradient=gradient):
            after = improve(q, gradient, lr=rho)
            return torch.stack([after.shape, after.rate / after.shape]).numpy()

        n = -(move(1e-6) - move(-1e-6)) / 2e-6
        expected = [-G[0, 0, 0] * n[0] ** 2, -G[1, 1, 1] * n[1] ** 2]
        np.testing.assert_allclose(second_order(move, 0.1), expected, rtol=1e-5)


def test_the_geodesic_is_missed_by_the_third_power_of_the_rate():
    S, H = precision().numpy(), precision(1).numpy() - 4 * np.eye(3)
    q = blr.Gaussian.from_moments([0.0, 0.0, 0.0], S)
    gradient = q.natural_gradient(torch.zeros(3).double(), torch.tensor(H))
    root = scipy.linalg.sqrtm(S)
    inverse = np.linalg.inv(root)

    def gap(rho):
        exact = root @ scipy.linalg.expm(-rho * inverse @ (S - H) @ inverse) @ root
        return np.abs(improve(q, gradient, lr=rho).precision.numpy() - exact).max()

    assert 7.5 < gap(0.02) / gap(0.01) < 8.5


def test_to_first_order_it_is_the_rule():
    at = [0.3, -0.1, 0.2]
    full = blr.Gaussian.from_moments(at, precision())
    g, H = torch.tensor([1.0, -2.0, 0.5]).double(), precision(1) - 3 * torch.eye(3).double()
    diagonal = blr.DiagonalGaussian.from_moments(at, [0.5, 1.0, 2.0])
    gamma = blr.Gamma.from_shape_rate([2.3, 0.5], [1.7, 4.0])
    for q, gradient in (
        (full, full.natural_gradient(g, H)),
        (diagonal, diagonal.natural_gradient(g, H.diagonal())),
        (gamma, (g[:2], H.diagonal()[:2])),
    ):
        for T in (1.0, 0.3):
            slopes = []
            for step in (blr.learn, improve):
                ends = [step(q, gradient, rho, T).natural for rho in (1e-6, -1e-6)]
                slopes.append([(x - y) / 2e-6 for x, y in zip(*ends, strict=True)])
            for x, y in zip(*slopes, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-7)


def test_the_mean_takes_the_old_precision():
    q = blr.Gaussian.from_moments([0.3, -0.1, 0.2], precision())
    g, H = torch.tensor([1.0, -2.0, 0.5]).double(), precision(1)
    after = improve(q, q.natural_gradient(g, H), lr=0.7)
    np.testing.assert_allclose(after.mean, q.mean - 0.7 * q.covariance @ g, rtol=1e-11)


# ---- robustness ---------------------------------------------------------------------------------


def test_a_batch_is_improved_member_by_member():
    S = torch.stack([precision(k) for k in range(4)])
    m = torch.randn(4, 3, dtype=torch.float64, generator=generator())
    g, H = 2 * m + 1, torch.stack([precision(9 - k) - 5 * torch.eye(3).double() for k in range(4)])
    for make, s, h in (
        (blr.Gaussian.from_moments, S, H),
        (blr.DiagonalGaussian.from_moments, *(x.diagonal(dim1=-2, dim2=-1) for x in (S, H))),
    ):
        q = make(m, s)
        after = improve(q, q.natural_gradient(g, h), lr=0.9)
        for k in range(4):
            one = make(m[k], s[k])
            one = improve(one, one.natural_gradient(g[k], h[k]), lr=0.9)
            np.testing.assert_allclose(after.mean[k], one.mean, rtol=1e-12)
            np.testing.assert_allclose(after.precision[k], one.precision, rtol=1e-12)


def test_at_rest_nothing_moves():
    S = precision()
    q = blr.Gaussian.from_moments([0.3, -0.1, 0.2], S)
    after = improve(q, q.natural_gradient(torch.zeros(3).double(), S), lr=3.0)
    np.testing.assert_allclose(after.precision, S, rtol=1e-13)
    np.testing.assert_allclose(after.mean, q.mean, rtol=1e-12)


def test_an_ill_conditioned_precision_stays_positive_in_rounding():
    s = torch.tensor([1e-6, 1.0, 1e6]).double()
    q = blr.Gaussian.from_moments([0.0, 0.0, 0.0], torch.diag(s))
    for rho in (0.1, 1.0, 2.0):
        after = improve(q, q.natural_gradient(torch.zeros(3).double(), -torch.diag(s)), lr=rho)
        expected = s * (1 - 2 * rho + 2 * rho**2)
        np.testing.assert_allclose(after.precision.diagonal(), expected, rtol=1e-12)


def test_the_constant_of_the_gamma_keeps_its_digits_and_its_bound():
    a = torch.logspace(-6, 15, 60, dtype=torch.float64)
    assert (gamma_christoffel(a) * a <= -1 + 1e-7).all()
    a = a[(a > 1e-3) & (a < 1e3)]
    psi1, psi2 = (torch.tensor(polygamma(n, a.numpy())) for n in (1, 2))
    expected = 0.5 * (psi2 + 1 / a**2) / (psi1 - 1 / a)
    np.testing.assert_allclose(gamma_christoffel(a), expected, rtol=1e-9)
    single = gamma_christoffel(torch.tensor([0.5, 1e6], dtype=torch.float32))
    assert single.dtype == torch.float32 and abs(single[1] * 1e6 + 1) < 1e-5


def test_samples_of_a_gamma_give_its_gradient_by_implicit_reparametrisation():
    # θ ~ q is a differentiable function of μ, and that is all that `exact` needs.
    source = generator()

    def sampled(mu):
        theta = blr.Gamma.from_expectation(mu).sample(50, source)
        return (5 * theta - 12 * theta.log()).mean()  # conjugate to Gamma(13, 5)

    q = blr.Gamma.from_shape_rate(3.0, 1.5)
    draws = torch.stack([torch.stack(gradients.exact(sampled, q)) for _ in range(300)])
    error = draws.std(0) / 300**0.5
    assert ((draws.mean(0) - torch.tensor([-12.0, 5.0])).abs() < 4 * error).all()
    assert (error < 0.2).all()


@pytest.mark.parametrize(
    ("q", "gradient"),
    [
        (blr.Gaussian.from_moments([0.1, -0.2], torch.eye(2).double()), gradients.delta),
        (blr.DiagonalGaussian.from_moments([0.1, -0.2], 1.0), gradients.delta),
        (
            blr.Gamma.from_shape_rate(2.0, 1.0),
            lambda loss, q: (torch.tensor(-9.0).double(), torch.tensor(3.0).double() / q.mean),
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_rate_that_overflows_is_named_with_its_step(q, gradient):
    family = type(q).__name__
    message = (
        rf"step \d+: the learning rate 1e\+06 leads out of the domain of {family}: .*Lower lr$"
    )
    with pytest.raises(ValueError, match=message):
        list(blr.run(blr.recipes.improved(1e6, gradient), wells, q, 900))


def test_another_family_is_told_what_is_known():
    q = blr.Beta.from_concentrations(2.0, 3.0)
    with pytest.raises(TypeError, match=r"Gaussian, DiagonalGaussian and Gamma, got Beta"):
        improve(q, q.natural)

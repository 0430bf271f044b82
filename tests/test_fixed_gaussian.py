"""Gaussians with known precision: a number, a diagonal and a matrix are one family."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import blr
from blr import gradients

D = 4
S = {"number": 1.7, "diagonal": [2.0, 0.3, 1e-3, 5e2]}
M, OTHER = [1.0, -2.0, 0.5, 3.0], [[0.0, 1.0, -0.7, 2.0], [5.0, 0.1, 0.2, -1.0]]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def pair(kind, mean):
    """The same member or batch, with a precision kept as a vector and as a matrix."""
    dense = torch.diag(torch.tensor(S[kind], dtype=torch.float64).expand(D))
    make = blr.FixedGaussian.from_moments
    return make(mean, S[kind]), make(mean, dense)


@pytest.mark.parametrize("mean", [M, OTHER], ids=["one", "batch"])
@pytest.mark.parametrize("kind", S)
def test_everything_is_as_in_the_dense_form(kind, mean):
    q, dense = pair(kind, mean)
    p, dense_p = pair(kind, [0.3, 0.0, -1.0, 2.0])
    theta = torch.linspace(-1, 1, 3 * D).double().reshape(3, *[1] * (np.ndim(mean) - 1), D)
    assert (q.dim, q.batch_shape) == (dense.dim, dense.batch_shape)
    for name in ("mean", "natural", "covariance", "variance"):
        close(getattr(q, name), getattr(dense, name))
    for method in (
        lambda q, p: q.log_partition(),
        lambda q, p: q.expectation(),
        lambda q, p: q.entropy(),
        lambda q, p: q.entropy_gradient(),
        lambda q, p: q.fisher(),
        lambda q, p: q.kl(p),
        lambda q, p: q.log_prob(theta),
        lambda q, p: q.expected_log_base_measure(),
        lambda q, p: q.at(2 * q.natural).mean,
        lambda q, p: type(q).from_expectation(p.mean, q).natural,
        lambda q, p: q.natural_gradient(theta[0]),
        lambda q, p: q.sample(5, torch.Generator().manual_seed(0)),
    ):
        close(method(q, p), method(dense, dense_p))


@pytest.mark.parametrize("kind", S)
def test_the_forms_are_members_of_one_family(kind):
    (q, dense), (p, dense_p) = pair(kind, M), pair(kind, OTHER[0])
    close(q.kl(dense_p), dense.kl(p))
    with pytest.raises(ValueError, match="different known precisions"):
        q.kl(blr.FixedGaussian.from_moments(M, 1.8))


@pytest.mark.parametrize("kind", S)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_rule_takes_the_same_steps_with_every_form(kind, momentum):
    A = torch.linspace(-1, 1, 6 * D).double().reshape(6, D)
    loss = lambda theta: 0.5 * ((A @ theta - 1) ** 2).sum()  # noqa: E731
    recipe = blr.recipes.gradient_descent(lr=1e-4, momentum=momentum)
    paths = [blr.run(recipe, loss, q, 9) for q in pair(kind, M)]
    for q, dense in zip(*paths, strict=True):
        close(q.mean, dense.mean)
        assert q.precision.shape == (D,) and dense.precision.shape == (D, D)


def test_a_number_follows_the_mean_and_takes_no_memory():
    q = blr.FixedGaussian.from_moments(torch.zeros(1000), 2.0)
    assert q.precision.dtype == torch.float32 and q.precision.shape == (1000,)
    assert q.precision.untyped_storage().nbytes() == 4
    assert q.at(q.natural + 1).precision is q.precision
    again = blr.FixedGaussian(q.natural.double(), q.precision)
    assert again.precision.dtype == torch.float64


@pytest.mark.parametrize("form", [2.0, [2.0, 1.0], [[2.0, 0.3], [0.3, 1.0]]])
def test_another_lambda_is_checked_and_another_precision_too(form):
    q = blr.FixedGaussian.from_moments([1.0, 2.0], form)
    with pytest.raises(ValueError, match="natural = S₀m must be finite"):
        q.at([1.0, float("nan")])
    if np.ndim(form):
        with pytest.raises(ValueError, match=r"precision must .*have shape .*3.*got \(2,"):
            q.at([1.0, 2.0, 3.0])
    low = q.at(q.natural.float())
    assert low.precision.dtype == low.mean.dtype == low.cholesky.dtype == torch.float32
    torch.testing.assert_close(low.mean.double(), q.mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("precision", "what"),
    [
        (0.0, "positive, got 0; pass a positive number"),
        (-1.0, "positive, got -1"),
        (float("inf"), "finite"),
        ([1.0, 0.0], "positive, got 0"),
        ([1.0], r"a number or have shape \(2,\) or \(2, 2\), got \(1,\); share one"),
        ([1.0, 2.0, 3.0], r"got \(3,\)"),
        ([[1.0, 2.0]], r"shape \(\.\.\., 2, 2\), got \(1, 2\)"),
        (np.ones((3, 2, 2)), r"got \(3, 2, 2\); share one"),
        ([[1.0, 2.0], [2.0, 1.0]], "positive definite"),
    ],
)
def test_a_precision_that_is_none_is_refused(precision, what):
    with pytest.raises(ValueError, match=f"precision must .*{what}"):
        blr.FixedGaussian.from_moments([0.0, 1.0], precision)
    with pytest.raises(ValueError, match=f"precision must .*{what}"):
        blr.FixedGaussian(torch.tensor([0.0, 1.0]).double(), torch.as_tensor(precision).double())


class LargestTensor(TorchDispatchMode):
    """Entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.numel())
        return out


@pytest.mark.parametrize("vector", [False, True], ids=["number", "diagonal"])
def test_a_million_parameters_take_a_few_vectors_of_memory(vector):
    P = 10**6
    a = torch.linspace(-1, 1, P).double()
    loss = lambda theta: 0.5 * ((theta - a) ** 2).sum()  # noqa: E731
    with LargestTensor() as largest:
        precision = torch.full((P,), 2.0).double() if vector else 2.0
        q0 = blr.FixedGaussian.from_moments(torch.zeros(P).double(), precision)
        *_, q = blr.run(blr.recipes.gradient_descent(lr=0.5, momentum=0.5), loss, q0, 3)
        found = q.kl(q0), q.entropy(), q.log_prob(a), q.sample(1, torch.Generator().manual_seed(0))
        gradient = gradients.price(loss, q, generator=torch.Generator().manual_seed(0))
    assert largest.entries == P
    # m ← m − ¼(m − a) + ½(m − m_previous), by hand: steps of ¼a, 5a/16, 17a/64
    close(q.mean, (0.25 + 0.3125 + 0.265625) * a)
    close(found[0], 0.5 * 2 * (q.mean @ q.mean))
    assert abs(found[1].item() / (0.5 * P * np.log(2 * np.pi * np.e / 2)) - 1) < 1e-9
    assert found[3].shape == (1, P) and gradient.shape == (P,)

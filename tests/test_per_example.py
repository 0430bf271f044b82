"""Squared gradients of single examples: activations × output gradients against vmap(grad)."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from blr import gradients, per_example
from blr.likelihoods import TotalLoss, from_module, softmax, squared_error
from blr.per_example import example_gradients, jacobian_and_curvature, sum_of_squares


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(net, *shape, N=6, classes=3, dtype=torch.float64, **settings):
    """A total loss of a network, and a θ away from the module's own parameters."""
    model, theta = from_module(net.to(dtype))
    x = torch.randn(N, *shape, dtype=dtype, generator=generator())
    y = torch.randint(classes, (N,), generator=generator(1))
    theta = theta + 0.1 * torch.randn(theta.shape, dtype=dtype, generator=generator(2))
    return TotalLoss(model, softmax, x, y, **settings), theta


def by_vmap(loss, theta):
    def example(t, x, y):
        return loss.per_example_loss(loss.model(t, x[None]), y[None])[0]

    return vmap(grad(example), in_dims=(None, 0, 0))(theta, loss.inputs, loss.targets)


def is_fast(loss, theta):
    return per_example._layers(loss, theta) is not None


def assert_equal(loss, theta, fast=True, tolerance=1e-12):
    assert is_fast(loss, theta) == fast
    G = by_vmap(loss, theta)
    for found, expected in (
        (example_gradients(loss, theta), G),
        (sum_of_squares(loss, theta), (G**2).sum(0)),
    ):
        assert found.shape == expected.shape and found.dtype == theta.dtype
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# ---- equal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(bias, dtype):
    net = nn.Sequential(nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 3, bias=bias))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert_equal(*problem(net, 5, dtype=dtype), tolerance=tolerance)


class Words(nn.Module):
    """Linear layers over the positions of a sequence, then their mean."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)).mean(1))


@pytest.mark.parametrize("length", [1, 6, 8])
def test_positions_are_added_before_they_are_squared(length):
    assert_equal(*problem(Words(), length, 5))


OPTIONS = itertools.product((1, 2, 3), (1, 2), (0, 2, "same", "valid"), (1, 2), (1, 2))


@pytest.mark.parametrize(("d", "stride", "padding", "dilation", "groups"), OPTIONS)
def test_convolutions(d, stride, padding, dilation, groups):
    if padding == "same" and stride > 1:
        pytest.skip("torch has no same-padding with strides")
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
    kernel, size = ((3,), (3, 2), (2, 3, 2))[d - 1], ((9,), (8, 7), (6, 7, 5))[d - 1]
    net = nn.Sequential(
        conv(4, 6, kernel, stride, padding, dilation, groups, bias=(stride + dilation) % 2 == 0),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.LazyLinear(3),
    )
    net(torch.zeros(1, 4, *size))
    assert_equal(*problem(net, 4, *size, N=3))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(2, 1), "same"])
def test_padding_modes(mode, padding):
    net = nn.Sequential(
        nn.Conv2d(2, 3, (4, 3), padding=padding, padding_mode=mode),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    assert_equal(*problem(net, 2, 6, 5))


def test_a_network_with_pools_and_depthwise_convolutions_in_single_precision():
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.SiLU(),
        nn.Conv2d(8, 16, 1, stride=2),
        nn.Flatten(),
        nn.Linear(144, 3),
    )
    assert_equal(*problem(net, 1, 16, 16, N=17, dtype=torch.float32), tolerance=1e-6)


def test_chunks_do_not_change_the_sum(monkeypatch):
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    loss, theta = problem(net, 2, 6, N=7)
    whole = sum_of_squares(loss, theta)
    slow = TotalLoss(lambda t, x: loss.model(t, x), softmax, loss.inputs, loss.targets)
    for numbers in (1, 200, 500):
        monkeypatch.setattr(per_example, "NUMBERS", numbers)
        torch.testing.assert_close(sum_of_squares(loss, theta), whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(sum_of_squares(slow, theta), whole, rtol=1e-10, atol=1e-15)


def test_squared_gradients_take_the_fast_form_with_weight_and_prior():
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    model, theta = from_module(net.double())
    x = torch.randn(6, 5, dtype=torch.float64, generator=generator())
    loss = TotalLoss(model, squared_error, x, x[:, 0], 0.3, num_data=24)
    assert is_fast(loss, theta)
    expected = 4 * (by_vmap(loss, theta) ** 2).sum(0) + 0.3
    found = gradients.squared_gradients(loss, theta, theta)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)


# ---- what the fast form is not for --------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Elsewhere(nn.Module):
    """Uses the weight of a layer a second time, unseen by hooks."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.a(x)) @ self.a.weight.T


class PositionsFirst(nn.Module):
    """As many positions as examples, and the wrong one first."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.layer(x.transpose(0, 1))).mean(0))


class Merged(nn.Module):
    """Examples and positions on one axis."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return torch.tanh(self.layer(x.reshape(-1, 5))).reshape(len(x), -1, 3).sum(1)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        self.b(x)
        return self.a(x)


OTHERS = [
    (Twice(), (5,)),
    (Tied(), (3,)),
    (Elsewhere(), (3,)),
    (PositionsFirst(), (6, 5)),
    (Merged(), (6, 5)),
    (Unused(), (3,)),
    (nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)), (5,)),
    (nn.Sequential(nn.Linear(5, 4), nn.PReLU(), nn.Linear(4, 3)), (5,)),
    (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False).eval(), nn.Linear(4, 3)), (5,)),
    (nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), (5,)),
    (nn.ConvTranspose1d(2, 3, 1), (2, 1)),
]


@pytest.mark.parametrize(("net", "shape"), OTHERS, ids=lambda v: type(v).__name__)
def test_everything_else_goes_the_general_way(net, shape):
    if isinstance(net, nn.ConvTranspose1d):
        net = nn.Sequential(net, nn.Flatten())
    batchnorm = any(isinstance(m, nn.BatchNorm1d) for m in net.modules())
    assert_equal(*problem(net, *shape), fast=batchnorm)


def test_batch_statistics_are_left_to_the_general_way_before_anything_runs():
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))
    loss, theta = problem(net, 5)
    assert not is_fast(loss, theta)
    assert not net[1].running_mean.any()


def test_it_can_be_traced_and_differentiated():
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    loss, theta = problem(net, 5)
    batch = torch.stack([theta, 2 * theta])
    expected = torch.stack([sum_of_squares(loss, t) for t in batch])
    found = vmap(lambda t: sum_of_squares(loss, t))(batch)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-16)
    slope = grad(lambda t: sum_of_squares(loss, t).sum())(theta)
    leaf = theta.clone().requires_grad_()
    sum_of_squares(loss, leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, slope, rtol=1e-11, atol=1e-16)
    assert slope.abs().max() > 1e-3


def test_hooks_are_removed_and_parameters_stay():
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    loss, theta = problem(net, 5)
    before = [p.detach().clone() for p in net.parameters()]
    with torch.no_grad():
        sum_of_squares(loss, theta)
    broken = TotalLoss(loss.model, lambda f, y: 1 / 0, loss.inputs, loss.targets)
    with pytest.raises(ZeroDivisionError):
        sum_of_squares(broken, theta)
    assert not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("N", [1, 2])
def test_a_single_example_and_zero_gradients(N):
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    loss, theta = problem(net, 5, N=N)
    assert_equal(loss, theta)
    dead = TotalLoss(loss.model, lambda f, y: 0 * f.sum(1), loss.inputs, loss.targets)
    assert not sum_of_squares(dead, theta).any()


def test_the_jacobian_and_the_curvature_in_f():
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    loss, theta = problem(net, 5)
    J, curvature = jacobian_and_curvature(loss, theta)
    expected = torch.func.jacrev(lambda t: loss.model(t, loss.inputs))(theta)
    torch.testing.assert_close(J, expected, rtol=1e-12, atol=1e-15)
    p = torch.softmax(loss.model(theta, loss.inputs), -1)
    by_hand = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    torch.testing.assert_close(curvature, by_hand, rtol=1e-11, atol=1e-15)

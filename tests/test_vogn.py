"""Claims about VOGN: a textbook in NumPy, and squares of single examples."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import blr
from blr.optim import _noise

X = torch.linspace(-1, 2, 33, dtype=torch.float64).reshape(11, 3)
Y = (X.sum(1, keepdim=True) * 1.7).sin()


def half_square(outputs, targets):
    return 0.5 * (outputs - targets).square().sum(-1)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def learn(model, optimizer, steps=1, samples=1, **options):
    for _ in range(steps):
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                optimizer.backward(model, half_square, X, Y, **options)
        optimizer.step()


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("debias", [True, False])
def test_vogn_equals_the_textbook_on_a_linear_model(samples, debias):
    model = nn.Linear(3, 1, bias=False).double()
    m0, s0 = np.array([0.3, -1.0, 0.2]), np.array([2.0, 5.0, 1.0])
    N, lr, h0, b1, b2, gamma = 60.0, 0.2, 0.7, 0.8, 0.95, 0.1
    optimizer = blr.VOGN(
        model.parameters(), lr=lr, ess=N, hess_init=h0, betas=(b1, b2), damping=gamma,
        debias=debias, seed=4, prior=blr.DiagonalGaussian.from_moments(m0, s0),
    )  # fmt: skip
    m = model.weight.detach().numpy()[0].copy()
    h, mom, delta, x, y = np.full(3, h0), np.zeros(3), s0 / N, X.numpy(), Y.numpy()[:, 0]
    for t in range(20):
        g, squares = np.zeros(3), np.zeros(3)
        for k in range(samples):
            noise = _noise.normal(0, 3, (4, t, 0, k), torch.device("cpu")).double().numpy()
            theta = m + noise / np.sqrt(N * (h + delta))
            g_i = (x @ theta - y)[:, None] * x
            g, squares = g + g_i.mean(0) / samples, squares + (g_i**2).mean(0) / samples
        mom = b1 * mom + (1 - b1) * (g + delta * (m - m0))
        h = b2 * h + (1 - b2) * squares
        m = m - lr * mom / (1 - b1 ** (t + 1) if debias else 1.0) / (h + delta + gamma)
    learn(model, optimizer, 20, samples, chunk_size=4)
    np.testing.assert_allclose(model.weight.detach().numpy()[0], m, rtol=1e-10)
    q = optimizer.posterior()
    np.testing.assert_allclose(q.precision, N * h + s0, rtol=1e-10)


def test_backward_leaves_the_gradient_of_the_mean_loss_and_returns_that_loss():
    model = network()
    optimizer = blr.VOGN(model.parameters(), lr=0.1, ess=11)
    value = optimizer.backward(model, half_square, X, Y, chunk_size=3)
    expected = half_square(model(X), Y).mean()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    for p, g in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-14)


def test_parts_of_a_batch_add_up_to_it():
    whole, parts = network(), network()
    one, two = (blr.VOGN(m.parameters(), lr=0.1, ess=11) for m in (whole, parts))
    learn(whole, one)
    with two.sampled_params(train=True):
        for a, b in ((0, 4), (4, 11)):
            two.backward(parts, half_square, X[a:b], Y[a:b], weight=(b - a) / 11)
    two.step()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-14)
    a, b = one.posterior().precision, two.posterior().precision
    torch.testing.assert_close(a, b, rtol=1e-10, atol=0)


def test_samples_that_are_left_to_accumulate_add_up():
    """Two halves of the loss, each at its own sample, are the average of the samples."""
    model, reference = network(), network()
    halves, averaged = (blr.VOGN(m.parameters(), lr=0.1, ess=11) for m in (model, reference))
    for _ in range(2):
        with halves.sampled_params(train=True):
            halves.backward(model, half_square, X, Y, weight=0.5)
    halves.step()
    learn(reference, averaged, samples=2)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-14)
    a, b = halves.posterior().precision, averaged.posterior().precision
    torch.testing.assert_close(a, b, rtol=1e-10, atol=0)


def test_an_unchanged_loop_in_train_mode_equals_contexts():
    model, reference = network(), network()
    optimizer, contexts = (blr.VOGN(m.parameters(), lr=0.1, ess=11) for m in (model, reference))
    optimizer.train()
    for _ in range(4):
        optimizer.zero_grad()
        optimizer.backward(model, half_square, X, Y)
        optimizer.step()
    optimizer.eval()
    learn(reference, contexts, 4)
    assert all(map(torch.equal, model.parameters(), reference.parameters()))


def test_resuming_is_exact_and_an_exception_restores_the_mean():
    model = network()
    optimizer = blr.VOGN(model.parameters(), lr=0.1, ess=11)
    learn(model, optimizer, 2)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError), optimizer.sampled_params(train=True):
        optimizer.backward(model, half_square, X, Y)
        raise ValueError
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.zero_grad()
    assert {*optimizer.state_dict()["state"][0]} == {"momentum", "hess"}
    other = copy.deepcopy(model)
    resumed = blr.VOGN(other.parameters(), lr=9.0, ess=1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, resumed)):
        learn(m, o, 3)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_gradients_without_squares_are_refused():
    model = network()
    optimizer = blr.VOGN(model.parameters(), lr=0.1, ess=11)
    with optimizer.sampled_params(train=True):
        half_square(model(X), Y).mean().backward()
    with pytest.raises(RuntimeError, match=r"optimizer.backward\(model, per_example_loss"):
        optimizer.step()
    with pytest.raises(ValueError, match="damping must be at least 0, got -1"):
        blr.VOGN(model.parameters(), lr=0.1, ess=1, damping=-1)


def test_a_layer_that_is_used_twice_has_one_gradient_and_stays_a_parameter():
    torch.manual_seed(0)
    shared = torch.nn.Linear(3, 3).double()
    model = torch.nn.Sequential(shared, torch.nn.Tanh(), shared)
    own, Z = dict(model.named_parameters()), torch.randn(4, 3).double()
    optimizer = blr.VOGN(model.parameters(), lr=0.1, ess=4)
    optimizer.backward(model, half_square, Z, Z)
    assert all(p is own[name] for name, p in model.named_parameters())
    found = shared.weight.grad.clone()
    optimizer.zero_grad()
    torch.stack([half_square(model(z[None]), z[None]).sum() for z in Z]).mean().backward()
    torch.testing.assert_close(found, shared.weight.grad)

"""Claims about BayesBiNN: a textbook in NumPy, signs, and scales that float32 can bear."""

import copy

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from torch import nn

import blr
from blr.optim import _functional, _noise

A = torch.tensor([0.5, -1.0, 2.0, 0.3, -0.7], dtype=torch.float64)


def start():
    return nn.Parameter(torch.tensor([0.2, -0.1, 0.0, 3.0, -2.0], dtype=torch.float64))


def loss(theta):
    return (A * theta).sin().sum() + (theta * theta.roll(1)).mean()


@pytest.mark.parametrize("samples", [1, 2])
def test_bayesbinn_equals_the_textbook(samples):
    p, lam0 = start(), np.linspace(-0.4, 0.6, 5)
    N, lr, tau, beta, T = 3.0, 0.02, 0.8, 0.9, 0.7  # mild: the formula loses digits beyond
    optimizer = blr.BayesBiNN(
        [p], lr=lr, ess=N, natural_init=0.6, relaxation=tau, beta=beta, temperature=T, seed=2,
        prior=torch.tensor(lam0),
    )  # fmt: skip
    lam, mom = 0.6 * np.array([1, -1, 1, 1, -1.0]), np.zeros(5)
    for t in range(25):
        g = np.zeros(5)
        for k in range(samples):
            noise = _noise.normal(0, 5, (2, t, 0, k), torch.device("cpu")).double().numpy()
            u = ndtr(noise)
            theta = np.tanh((lam + 0.5 * np.log(u / (1 - u))) / tau)
            q = torch.tensor(theta, requires_grad=True)
            (grad,) = torch.autograd.grad(loss(q), q)
            s = (1 - theta**2) / (tau * (1 - np.tanh(lam) ** 2))
            g += N * s * grad.numpy() / samples
            with optimizer.sampled_params(train=True):
                np.testing.assert_allclose(p.detach(), theta, rtol=1e-9)
                optimizer.zero_grad()
                loss(p).backward()
        mom = beta * mom + (1 - beta) * (g + T * lam - lam0)
        lam = lam - lr * mom / (1 - beta ** (t + 1))
        optimizer.step()
        np.testing.assert_allclose(optimizer.state[p]["mean"], lam, rtol=1e-8)
    assert torch.equal(p.detach(), torch.where(torch.tensor(lam) >= 0, 1.0, -1.0).double())
    np.testing.assert_allclose(optimizer.posterior().natural, 2 * lam, rtol=1e-8)


def test_weights_at_rest_and_samples_that_are_looked_at_are_signs():
    p = nn.Parameter(torch.linspace(-1, 1, 40_000))
    optimizer = blr.BayesBiNN([p], lr=0.1, ess=10, natural_init=0.4)
    assert torch.equal(p.detach(), torch.linspace(-1, 1, 40_000).sign())
    signs = p.detach().clone()
    with optimizer.sampled_params():
        assert torch.equal(p.detach().abs(), torch.ones(40_000))
        kept = (p.detach() == signs).double().mean()
    probability = torch.sigmoid(torch.tensor(0.8)).double()
    assert abs(kept - probability) < 5 * (probability * (1 - probability) / 40_000) ** 0.5
    assert torch.equal(p.detach(), signs)


def test_scales_of_confident_weights_do_not_vanish_in_float32():
    lam = torch.tensor([0.3, -2.0, 10.0, -30.0, 200.0], dtype=torch.float64)
    x = lam + torch.tensor([0.1, 1.5, -0.7, 2.0, 1.0], dtype=torch.float64)
    short = _functional.binary_scale(lam.float(), x.float(), 1.0)
    exact = torch.exp(2 * (torch.logaddexp(lam, -lam) - torch.logaddexp(x, -x)))
    torch.testing.assert_close(short.double(), exact, rtol=1e-4, atol=0)
    mild = slice(0, 2)
    naive = (1 - x.tanh() ** 2) / (1 - lam.tanh() ** 2)
    torch.testing.assert_close(exact[mild], naive[mild], rtol=1e-10, atol=0)


def test_prior_is_the_stationary_point_where_the_loss_is_flat():
    p, lam0 = start(), torch.tensor([0.5, -0.2, 0.1, 1.0, -1.0], dtype=torch.float64)
    optimizer = blr.BayesBiNN([p], lr=0.5, ess=1, natural_init=1, beta=0.0, prior=lam0)
    for _ in range(60):
        with optimizer.sampled_params(train=True):
            p.grad = torch.zeros_like(p)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["mean"], lam0, rtol=1e-10, atol=0)


def test_resuming_is_exact_and_weights_that_are_loaded_are_taken_over():
    p = start()
    optimizer = blr.BayesBiNN([p], lr=0.05, ess=10, natural_init=0.5)

    def learn(p, optimizer, steps):
        for _ in range(steps):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss(p).backward()
            optimizer.step()

    learn(p, optimizer, 3)
    other = nn.Parameter(p.detach().clone())
    resumed = blr.BayesBiNN([other], lr=1, ess=1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    learn(p, optimizer, 3)
    learn(other, resumed, 3)
    assert torch.equal(resumed.state[other]["mean"], optimizer.state[p]["mean"])
    with torch.no_grad():
        p.neg_()
    signs = p.detach().clone()
    with optimizer.sampled_params():
        pass
    assert torch.equal(p.detach(), signs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relaxation": 0}, "relaxation must be greater than 0, got 0; pass"),
        ({"natural_init": -1}, "natural_init must be greater than 0, got -1; pass"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\), got 1.0; pass"),
        ({"temperature": -1}, "temperature must be at least 0, got -1; pass"),
        ({"prior": torch.zeros(3)}, "prior must have one entry for each of 5 weights"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        blr.BayesBiNN([start()], **({"lr": 0.1, "ess": 1} | options))

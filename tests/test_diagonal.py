"""The diagonal rule: without liberties it is the rule, and each liberty does what it says."""

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import blr
from blr.diagonal import DiagonalRule
from blr.gradients import at_mean, at_samples, delta, price
from blr.likelihoods import TotalLoss, linear, logistic

G = torch.Generator().manual_seed(4)
X = torch.randn((17, 4), dtype=torch.float64, generator=G)
Y = (torch.rand(17, dtype=torch.float64, generator=G) < 0.5).double()
LOSS = TotalLoss(linear, logistic, X, Y, prior_precision=0.3)
START = blr.DiagonalGaussian.from_moments([0.5, -0.3, 0.0, 1.0], [3.0, 2.0, 5.0, 1.0])


def same(recipe, other, steps=12, rtol=1e-12):
    pairs = zip(
        blr.run(recipe, LOSS, START, steps), blr.run(other, LOSS, START, steps), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a.mean, b.mean, rtol=rtol, atol=1e-13)
        torch.testing.assert_close(a.precision, b.precision, rtol=rtol, atol=0)


@pytest.mark.parametrize(("lr", "temperature"), [(1.0, 1.0), (0.3, 1.0), (0.2, 0.5), (0.1, 0.0)])
def test_without_liberties_it_is_the_rule(lr, temperature):
    same(DiagonalRule(at_mean, lr, temperature), blr.Rule(delta, lr, temperature))


def test_without_liberties_it_is_the_rule_with_samples_too():
    source = lambda: torch.Generator().manual_seed(9)  # noqa: E731
    same(
        DiagonalRule(partial(at_samples, num_samples=2, generator=source()), 0.2),
        blr.Rule(partial(price, num_samples=2, generator=source()), 0.2),
    )


NEUTRAL = {
    "temperature": 1.0,
    "lr_mean": 0.3,
    "momentum": 0.0,
    "initial": None,
    "debias": True,  # no average started at zero, so there is nothing to correct
    "root": False,
    "eps": 0.0,
    "retraction": False,
}


def test_every_liberty_has_a_neutral_value():
    liberties = {field.name for field in dataclasses.fields(DiagonalRule)}
    assert liberties - {"derivatives", "lr"} == set(NEUTRAL)


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_liberty_changes_nothing(name):
    liberty = {name: NEUTRAL[name]}
    same(DiagonalRule(at_mean, 0.3, **liberty), DiagonalRule(at_mean, 0.3), rtol=0)


@pytest.mark.parametrize(
    "liberty",
    [
        {"temperature": 0.5},
        {"lr_mean": 0.1},
        {"momentum": 0.5},
        {"initial": 4.0},
        {"root": True},
        {"eps": 0.1},
        {"retraction": True},
    ],
    ids=lambda liberty: next(iter(liberty)),
)
def test_a_liberty_taken_is_a_departure(liberty):
    with pytest.raises(AssertionError):
        same(DiagonalRule(at_mean, 0.3, **liberty), DiagonalRule(at_mean, 0.3))


def test_bias_correction_makes_the_first_step_that_of_the_rule_at_rate_one():
    corrected = DiagonalRule(at_mean, 0.01, lr_mean=1.0, momentum=0.9, initial=0.0, debias=True)
    same(corrected, DiagonalRule(at_mean, 1.0), steps=1)


@given(st.floats(1e-3, 1e3), st.floats(-1e3, 1e3), st.floats(1e-3, 1.0))
def test_the_retraction_keeps_half_of_the_precision_whatever_the_curvature(s, h, rho):
    q = blr.DiagonalGaussian.from_moments([0.0], [s])
    curvature = lambda loss, q: (torch.zeros(1).double(), torch.tensor([h], dtype=torch.float64))  # noqa: E731
    (after,) = blr.run(DiagonalRule(curvature, rho, retraction=True), None, q, 1)
    s_new = after.precision.item()
    expected = 0.5 * (s + (s - rho * (s - h)) ** 2 / s)
    assert abs(s_new - expected) <= 1e-10 * max(s, rho * abs(h), expected)
    assert s_new >= s / 2 * (1 - 1e-9)


@pytest.mark.parametrize("liberty", [{"temperature": 0.5}, {"initial": 0.0}])
def test_a_retraction_from_nothing_is_refused(liberty):
    with pytest.raises(ValueError, match="retraction needs temperature = 1"):
        DiagonalRule(at_mean, retraction=True, **liberty)

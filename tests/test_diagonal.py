"""The diagonal rule: without liberties it is the rule, and each liberty does what it says."""

import dataclasses
import itertools
import math
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
    "clip_radius": math.inf,
    "prior_in_momentum": True,
    "prior_in_average": True,
    "precision": None,
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
        {"clip_radius": 0.01},
        {"momentum": 0.5, "prior_in_momentum": False},
        {"initial": 4.0, "precision": lambda s, loss: s},
        {"lr": lambda t: 0.3 / t},
    ],
    ids=lambda liberty: next(iter(liberty)),
)
def test_a_liberty_taken_is_a_departure(liberty):
    with pytest.raises(AssertionError):
        same(DiagonalRule(at_mean, **{"lr": 0.3, **liberty}), DiagonalRule(at_mean, 0.3))


def test_bias_correction_makes_the_first_step_that_of_the_rule_at_rate_one():
    corrected = DiagonalRule(at_mean, 0.01, lr_mean=1.0, momentum=0.9, initial=0.0, debias=True)
    same(corrected, DiagonalRule(at_mean, 1.0), steps=1)


def test_bias_correction_divides_by_the_weight_gathered_under_a_schedule_and_a_temperature():
    T, rho = 0.4, lambda t: 0.2 / t
    seen = []

    def derivatives(loss, q):
        seen.append(torch.tensor([1.0 + len(seen)], dtype=torch.float64))
        return torch.zeros(1).double(), seen[-1]

    q0 = blr.DiagonalGaussian.from_moments([0.0], [1.0])
    recipe = DiagonalRule(derivatives, rho, temperature=T, initial=0.0, debias=True)
    for t, q in enumerate(blr.run(recipe, None, q0, 9), 1):
        # the weights of what was seen, those of 1/T times an average
        kept = [math.prod(1 - T * rho(j) for j in range(i + 1, t + 1)) for i in range(1, t + 1)]
        weights = [T * rho(i) * k for i, k in zip(range(1, t + 1), kept, strict=True)]
        average = sum(w * h.item() for w, h in zip(weights, seen, strict=True)) / sum(weights)
        assert abs(q.precision.item() * T / average - 1) < 1e-12


@pytest.mark.parametrize("retraction", [False, True])
def test_a_step_changes_neither_the_start_nor_earlier_posteriors_nor_the_derivatives(retraction):
    g, h = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 0.5]).double()
    q0 = blr.DiagonalGaussian.from_moments([0.5, -1.0], [2.0, 4.0])
    recipe = DiagonalRule(lambda loss, q: (g, h), 0.5, momentum=0.3, retraction=retraction)
    path, seen = [], []
    runs = blr.run(recipe, None, q0, 1), blr.run(recipe, None, q0, 5)
    for q in itertools.chain([q0], *runs):
        path.append(q)
        seen.append((q.mean.clone(), q.precision.clone()))
    for q, (mean, precision) in zip(path, seen, strict=True):
        assert torch.equal(q.mean, mean) and torch.equal(q.precision, precision)
    assert torch.equal(path[1].mean, path[2].mean) and path[1].mean.ne(path[3].mean).all()
    assert q0.mean.tolist() == [0.5, -1.0] and q0.precision.tolist() == [2.0, 4.0]
    assert g.tolist() == [1.0, 2.0] and h.tolist() == [3.0, 0.5]


# ---- schedules ----------------------------------------------------------------------------------


def test_a_schedule_of_the_rate_is_that_of_the_rule():
    schedule = lambda t: t**-0.7  # noqa: E731
    same(DiagonalRule(at_mean, schedule), blr.Rule(delta, schedule))


def test_a_constant_schedule_changes_nothing():
    constant = DiagonalRule(at_mean, lambda t: 0.3, lr_mean=lambda t: 0.2, momentum=0.5)
    same(constant, DiagonalRule(at_mean, 0.3, lr_mean=0.2, momentum=0.5), rtol=0)


def test_the_steps_of_a_schedule_are_counted_from_one():
    asked = {"lr": [], "lr_mean": []}
    rates = {k: lambda t, k=k: asked[k].append(t) or 0.1 for k in asked}
    assert len(list(blr.run(DiagonalRule(at_mean, **rates), LOSS, START, 3))) == 3
    assert asked == {"lr": [1, 2, 3], "lr_mean": [1, 2, 3]}


# ---- where the prior goes -----------------------------------------------------------------------


@pytest.mark.parametrize("T", [1.0, 0.5])
def test_a_prior_outside_of_nothing_is_the_prior_inside(T):
    # without momentum there is no average of the gradient
    same(
        DiagonalRule(at_mean, 0.3, T, prior_in_momentum=False),
        DiagonalRule(at_mean, 0.3, T),
    )


def test_a_prior_outside_the_average_of_the_curvature_matters_for_tempering_only():
    same(DiagonalRule(at_mean, 0.3, prior_in_average=False), DiagonalRule(at_mean, 0.3))
    # at rest the data's part is divided by T, and with it the prior's only if it is inside
    T, H = 0.5, LOSS.prior_precision
    inside, outside = (
        list(blr.run(DiagonalRule(at_mean, 0.3, T, prior_in_average=b), LOSS, START, 300))[-1]
        for b in (True, False)
    )
    torch.testing.assert_close(inside.mean, outside.mean, rtol=1e-10, atol=1e-12)
    h = at_mean(LOSS, inside)[1]
    torch.testing.assert_close(inside.precision, h / T, rtol=1e-10, atol=0)
    torch.testing.assert_close(outside.precision, (h - H) / T + H, rtol=1e-10, atol=0)


@pytest.mark.parametrize("where", [{"prior_in_momentum": False}, {"prior_in_average": False}])
def test_a_loss_that_does_not_know_its_prior_is_averaged_whole(where):
    plain = lambda theta: LOSS(theta)  # noqa: E731
    one = blr.run(DiagonalRule(at_mean, 0.3, momentum=0.5, **where), plain, START, 5)
    other = blr.run(DiagonalRule(at_mean, 0.3, momentum=0.5), LOSS, START, 5)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-13)


def test_the_prior_may_differ_between_parameters():
    loss = dataclasses.replace(LOSS, prior_precision=torch.tensor([0.1, 2.0, 30.0, 0.0]))
    recipes = [
        DiagonalRule(at_mean, 0.3, prior_in_average=inside, prior_in_momentum=inside)
        for inside in (True, False)
    ]
    one, other = (list(blr.run(recipe, loss, START, 5))[-1] for recipe in recipes)
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.precision, other.precision, rtol=1e-12, atol=0)


# ---- what keeps the precision positive, and the step short --------------------------------------


def test_a_step_is_clipped_before_its_rate():
    g = torch.tensor([1e3, -1e3, 1.0, 0.0], dtype=torch.float64)
    derivatives = lambda loss, q: (g, torch.full((4,), 2.0).double())  # noqa: E731
    q0 = blr.DiagonalGaussian.from_moments([0.0] * 4, 2.0)
    recipe = DiagonalRule(derivatives, 0.5, lr_mean=0.1, clip_radius=0.75)
    (q,) = blr.run(recipe, None, q0, 1)
    assert q.mean.tolist() == [-0.1 * 0.75, 0.1 * 0.75, -0.1 * 0.5, 0.0]


@given(st.floats(1e-3, 1e3), st.floats(0, 1e3), st.floats(-1e3, 1e3), st.floats(1e-3, 1.0))
def test_the_retraction_minds_the_prior_that_is_kept_outside(h0, delta, h, rho):
    # IVON's form, with h alone averaged: h may be negative, h + δ never is
    loss = TotalLoss(linear, logistic, X[:1, :1], Y[:1], prior_precision=delta)
    curvature = lambda loss, q: (  # noqa: E731
        torch.zeros(1).double(),
        torch.tensor([h + loss.prior_precision], dtype=torch.float64),
    )
    q0 = blr.DiagonalGaussian.from_moments([0.0], [h0 + delta])
    both = [
        next(blr.run(recipe, loss, q0, 1)).precision.item()
        for recipe in (
            DiagonalRule(curvature, rho, retraction=True, prior_in_average=inside)
            for inside in (True, False)
        )
    ]
    size = max(abs(h), h0) + delta
    assert abs(both[0] - both[1]) <= 1e-9 * max(size, rho**2 * size**2 / (h0 + delta))
    assert min(both) >= (h0 + delta) / 2 * (1 - 1e-9)


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


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr_mean": -1.0}, "lr_mean must be positive, got -1.0"),
        ({"temperature": -0.5}, "temperature must be at least zero, got -0.5"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"initial": -2.0}, "initial must be at least zero, got -2.0"),
        ({"eps": -1e-8}, "eps must be at least zero, got -1e-08"),
        ({"clip_radius": 0.0}, "clip_radius must be positive, got 0.0"),
        ({"clip_radius": math.nan}, "clip_radius must be positive, got nan"),
        ({"precision": lambda s, loss: s}, "precision needs initial"),
        ({"debias": True, "initial": 0.0, "temperature": 0.0}, "debias needs a temperature"),
    ],
)
def test_arguments_out_of_range_are_refused(argument, what):
    with pytest.raises(ValueError, match=what + ".*; "):
        DiagonalRule(at_mean, **argument)


FULL = blr.Gaussian.from_moments(START.mean, torch.diag(START.precision))


@pytest.mark.parametrize(
    "name", ["rmsprop", "adam", "ogn", "vogn", "von", "vprop", "vadam", "ivon"]
)
@pytest.mark.parametrize("q", [FULL, blr.Gamma.from_shape_rate(2.0, 1.0)], ids=["full", "gamma"])
def test_another_family_is_refused(name, q):
    message = f"q must be a DiagonalGaussian, got {type(q).__name__}; use DiagonalGaussian"
    with pytest.raises(TypeError, match=message):
        list(blr.run(getattr(blr.recipes, name)(), LOSS, q, 1))


@pytest.mark.parametrize("name", ["ogn", "vogn", "vprop", "vadam"])
def test_a_loss_that_does_not_know_its_examples_is_refused(name):
    with pytest.raises(TypeError, match=r"loss must be a TotalLoss, got function; pass one"):
        list(blr.run(getattr(blr.recipes, name)(), lambda theta: theta @ theta, START, 1))


@pytest.mark.parametrize("name", ["vogn", "von", "ivon"])
def test_no_samples_are_refused(name):
    recipe = getattr(blr.recipes, name)(num_samples=0)
    with pytest.raises(ValueError, match=r"num_samples must be at least 1, got 0"):
        list(blr.run(recipe, LOSS, START, 1))


def test_leaving_the_domain_says_which_rate_is_whose():
    hill = lambda theta: -(theta @ theta)  # noqa: E731
    message = r"step 1: .* lr = 0\.9 of the precision and lr_mean = 0\.2 of the mean lead out"
    with pytest.raises(ValueError, match=message):
        list(blr.run(DiagonalRule(at_mean, 0.9, lr_mean=0.2), hill, START, 1))


# ---- what the recipes are known for -------------------------------------------------------------


def test_ivon_starts_like_gradient_descent_and_survives_any_curvature():
    recipe = blr.recipes.ivon(lr=0.1, betas=(0.9, 0.999))
    g = torch.tensor([3.0, -2.0, 0.0, 1.0], dtype=torch.float64)
    wild = lambda loss, q: (g, -1e6 * torch.ones(4).double())  # noqa: E731
    q0 = blr.DiagonalGaussian.from_moments([0.0] * 4, 5.0)
    recipe = dataclasses.replace(recipe, derivatives=wild)
    path = list(blr.run(recipe, None, q0, 50))
    torch.testing.assert_close(path[0].mean, -0.1 * g / path[0].precision)
    assert all((q.precision > 0).all() for q in path)


@pytest.mark.parametrize("name", ["vprop", "vadam", "ivon", "von", "vogn", "ogn"])
def test_a_parameter_without_gradient_keeps_its_prior(name):
    # one example, a constant feature of zero: the data say nothing about that parameter
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    loss = TotalLoss(linear, logistic, x, torch.ones(1).double(), prior_precision=2.0)
    generator = {} if name == "ogn" else {"generator": torch.Generator().manual_seed(3)}
    q = blr.DiagonalGaussian.from_moments([0.0, 0.0], 2.0)
    *_, q = blr.run(getattr(blr.recipes, name)(**generator), loss, q, 20)
    assert q.mean[1] == 0.0 and q.mean[0] > 0
    assert abs(q.precision[1].item() - 2.0) < 1e-12


@pytest.mark.parametrize("name", ["vprop", "vadam"])
def test_without_prior_a_gradient_is_enough(name):
    loss = dataclasses.replace(LOSS, prior_precision=0.0)
    *_, q = blr.run(getattr(blr.recipes, name)(generator=G), loss, START, 20)
    assert (q.precision > 0).all()


@pytest.mark.parametrize("name", ["vprop", "vadam"])
def test_without_prior_and_gradient_the_error_says_what_to_add(name):
    loss = TotalLoss(linear, logistic, torch.zeros(3, 4).double(), Y[:3])
    with pytest.raises(ValueError, match=r"step 1: .* a prior_precision keeps"):
        list(blr.run(getattr(blr.recipes, name)(), loss, START, 1))

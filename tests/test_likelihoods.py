"""What a total loss takes, what it refuses, and networks as functions of θ."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import grad

import blr
from blr import per_example, recipes
from blr.gradients import gauss_newton, squared_gradients
from blr.likelihoods import TotalLoss, from_module, linear, logistic, softmax, squared_error


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


N = 7
X = randn(N, 3)
Y = randn(N, seed=1)
LABELS = (X[:, 0] > 0).double()
CLASSES = torch.arange(N) % 3
THETA = randn(3, seed=2)


# ---- networks that use something twice ----------------------------------------------------------


def one_module_twice():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def one_module_thrice_and_deeper():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Sequential(nn.Tanh(), nn.ModuleDict({"a": layer})["a"]), layer)


def one_parameter_in_two_modules():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


class TwoNames(nn.Module):
    """One parameter under two names of one module, which is used twice."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return torch.tanh(x @ self.a) @ self.b


def two_names_twice():
    inner = TwoNames()
    return nn.Sequential(inner, nn.Tanh(), inner)


TWICE = (
    one_module_twice,
    one_module_thrice_and_deeper,
    one_parameter_in_two_modules,
    two_names_twice,
)


@pytest.mark.parametrize("build", TWICE)
def test_what_is_used_twice_is_learned_as_one_and_the_network_stays_as_it_is(build):
    torch.manual_seed(0)
    net = build().double()
    parameters, trained = list(net.parameters()), copy.deepcopy(net)
    before = [p.detach().clone() for p in parameters]
    model, theta = from_module(net)
    loss = TotalLoss(model, softmax, X, CLASSES, 1.0)
    q0 = blr.FixedGaussian.from_moments(theta, 1.0)
    path = list(blr.run(recipes.gradient_descent(1e-2), loss, q0, 5))
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-2, weight_decay=1.0)
    for q in path:
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(X), CLASSES, reduction="sum").backward()
        optimizer.step()
        expected = torch.cat([p.detach().reshape(-1) for p in trained.parameters()])
        torch.testing.assert_close(q.mean, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("build", TWICE)
def test_squares_of_what_is_used_twice_are_those_of_backward(build):
    net = build().double()
    model, theta = from_module(net)
    loss = TotalLoss(model, softmax, X, CLASSES)
    expected = torch.zeros_like(theta)
    for x, y in zip(X, CLASSES, strict=True):
        slopes = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), list(net.parameters()))
        expected += torch.cat([g.reshape(-1) for g in slopes]) ** 2
    found = per_example.sum_of_squares(loss, theta)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)


def test_a_network_that_fails_keeps_its_parameters():
    net = nn.Sequential(one_module_twice(), nn.Linear(2, 2)).double()
    before = list(net.parameters())
    model, theta = from_module(net)
    with pytest.raises(RuntimeError, match="shapes"):
        model(theta, X)
    assert all(a is b for a, b in zip(net.parameters(), before, strict=True))


# ---- one loss for each example ------------------------------------------------------------------


def column(theta, x):
    return (x @ theta)[:, None]


@pytest.mark.parametrize(("per_example_loss", "y"), [(squared_error, Y), (logistic, LABELS)])
@pytest.mark.parametrize("model", [linear, column])
def test_a_column_means_the_numbers_in_it(model, per_example_loss, y):
    plain = TotalLoss(linear, per_example_loss, X, y, 0.3)
    expected = {
        "value": plain(THETA),
        "slope": grad(plain)(THETA),
        "squares": squared_gradients(plain, THETA, THETA),
        "curvature": gauss_newton(plain, THETA, THETA),
    }
    for targets in (y, y[:, None]):
        loss = TotalLoss(model, per_example_loss, X, targets, 0.3)
        assert torch.equal(loss.examples(THETA), plain.examples(THETA))
        found = {
            "value": loss(THETA),
            "slope": grad(loss)(THETA),
            "squares": squared_gradients(loss, THETA, THETA),
            "curvature": gauss_newton(loss, THETA, THETA),
        }
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
        one = TotalLoss(model, per_example_loss, X[:1], targets[:1])
        assert torch.equal(one.examples(THETA), plain.examples(THETA)[:1])


def test_a_network_with_one_output_fits_a_column_of_targets():
    net = nn.Linear(3, 1).double()
    model, theta = from_module(net)
    q0 = blr.Gaussian.from_moments(theta, torch.eye(4).double())
    *_, q = blr.run(recipes.newton(), TotalLoss(model, squared_error, X, Y[:, None]), q0, 2)
    design = np.concatenate([X.numpy(), np.ones((N, 1))], 1)
    expected = np.linalg.lstsq(design, Y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(q.mean.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("per_example_loss", [squared_error, lambda f, y: 0.5 * (y - f) ** 2])
def test_the_loss_of_many_outputs_is_their_sum(per_example_loss):
    targets = randn(N, 2, seed=3)
    model, theta = from_module(nn.Linear(3, 2).double())
    loss = TotalLoss(model, per_example_loss, X, targets, 0.3, num_data=2 * N)
    errors = targets - model(theta, X)
    torch.testing.assert_close(loss.examples(theta), 0.5 * (errors**2).sum(1), rtol=1e-12, atol=0)
    expected = (errors**2).sum() + 0.15 * (theta**2).sum()
    torch.testing.assert_close(loss(theta), expected, rtol=1e-12, atol=0)
    # ∂ℓᵢ/∂W = −eᵢxᵢᵀ and ∂ℓᵢ/∂c = −eᵢ.
    G = torch.cat([-(errors[:, :, None] * X[:, None]).flatten(1), -errors], 1)
    torch.testing.assert_close(per_example.example_gradients(loss, theta), G)
    torch.testing.assert_close(per_example.sum_of_squares(loss, theta), (G**2).sum(0))
    A = torch.cat([X, torch.ones(N, 1).double()], 1)
    blocks = 2 * A.mT @ A + 0.3 * torch.eye(4).double()
    order = torch.tensor([[0, 1, 2, 6], [3, 4, 5, 7]])
    H = torch.zeros(8, 8).double()
    for own in order:
        H[own[:, None], own] = blocks
    torch.testing.assert_close(gauss_newton(loss, theta, theta), H, rtol=1e-12, atol=1e-13)


def test_classes_at_many_positions_are_added():
    classes = torch.stack([CLASSES, CLASSES.flip(0)], 1)
    model = lambda theta, x: torch.stack([x * theta, 2 * x * theta], 1)  # noqa: E731
    f = model(THETA, X)
    expected = sum(
        nn.functional.cross_entropy(f[:, t], classes[:, t], reduction="none") for t in (0, 1)
    )
    torch.testing.assert_close(TotalLoss(model, softmax, X, classes).examples(THETA), expected)


def wide(theta, x):
    return x * theta


MISFITS = {
    "one output, three targets": (linear, squared_error, X[:, :3], r"\(7,\) and targets.*\(7, 3\)"),
    "three outputs, one target": (wide, squared_error, Y, r"\(7, 3\) and targets.*\(7,\)"),
    "three outputs, a column": (wide, logistic, LABELS[:, None], r"\(7, 3\) and targets.*\(7,\)"),
    "as many outputs as examples": (
        lambda theta, x: torch.outer(x @ theta, torch.arange(7.0).double()),
        squared_error,
        Y,
        r"squared_error .* \(7, 7\) and targets.*\(7,\)",
    ),
    "a loss of one's own, a column": (
        linear,
        lambda f, y: (y - f) ** 2,
        Y[:, None],
        r"\(7,\), got \(7, 7\) from outputs of shape \(7,\) and targets of shape \(7, 1\)",
    ),
    "their sum": (linear, lambda f, y: ((y - f) ** 2).sum(), Y, r"\(7,\), got \(\)"),
    "classes in a column": (wide, softmax, CLASSES[:, None], r"\(7, 3\) and.*\(7, 1\)"),
    "classes as indicators": (wide, softmax, nn.functional.one_hot(CLASSES), r"\(7, 3\) and.*"),
    "classes as numbers": (wide, softmax, CLASSES.double(), "torch.float64"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_outputs_and_targets_that_do_not_fit_are_refused(case):
    model, per_example_loss, targets, message = MISFITS[case]
    loss = TotalLoss(model, per_example_loss, X, targets)
    with pytest.raises(ValueError, match=message):
        loss(THETA)
    with pytest.raises(ValueError, match="targets"):
        per_example.sum_of_squares(loss, THETA)


# ---- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [2 * LABELS - 1, LABELS + 1, CLASSES, LABELS / 0])
def test_logistic_labels_are_zero_or_one(bad):
    with pytest.raises(ValueError, match=r"targets of logistic must be 0 or 1.*got .*\(y \+ 1\)/2"):
        TotalLoss(linear, logistic, X, bad)


def test_logistic_labels_may_be_probabilities_integers_and_truths():
    soft = TotalLoss(linear, logistic, X, 0.1 + 0.8 * LABELS).examples(THETA)
    hard = [TotalLoss(linear, logistic, X, y).examples(THETA) for y in (LABELS, 1 - LABELS)]
    torch.testing.assert_close(soft, 0.9 * hard[0] + 0.1 * hard[1], rtol=1e-12, atol=0)
    for other in (LABELS.long(), LABELS.bool()):
        assert torch.equal(TotalLoss(linear, logistic, X, other).examples(THETA), hard[0])


def test_minibatches_are_of_what_was_checked_and_are_not_checked_again(monkeypatch):
    loss = TotalLoss(linear, logistic, X, LABELS, 0.3, num_data=20)
    monkeypatch.setattr(TotalLoss, "__post_init__", lambda self: pytest.fail("checked again"))
    part = next(loss.minibatches(3, torch.Generator().manual_seed(0)))
    B = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:3]
    assert torch.equal(part.inputs, X[B]) and torch.equal(part.targets, LABELS[B])
    assert (part.num_data, part.prior_precision, part.weight) == (20, 0.3, 20 / 3)
    assert loss.inputs is X and loss.weight == 20 / N


def test_one_class_is_certain():
    for model, theta in (from_module(nn.Linear(3, 1).double()), (column, THETA)):
        loss = TotalLoss(model, softmax, X, torch.zeros(N, dtype=torch.long))
        assert not loss.examples(theta).any() and loss.examples(theta).shape == (N,)
        assert not grad(loss)(theta).any()
        assert not per_example.sum_of_squares(loss, theta).any()
        assert not gauss_newton(loss, theta, theta).any()


@pytest.mark.parametrize("label", [-1, 3])
def test_classes_are_counted_from_zero(label):
    loss = TotalLoss(wide, softmax, X, torch.where(CLASSES == 1, label, CLASSES))
    for call in (loss, grad(loss), lambda theta: per_example.sum_of_squares(loss, theta)):
        with pytest.raises(ValueError, match=rf"targets of softmax must be classes 0 … 2.*{label}"):
            call(THETA)
    model, theta = from_module(nn.Linear(3, 1).double())
    with pytest.raises(ValueError, match=r"0 … 0.*logistic"):
        TotalLoss(model, softmax, X, LABELS.long())(theta)


# ---- the number of data, the prior --------------------------------------------------------------


@pytest.mark.parametrize("bad", [-3, 0, math.nan])
def test_the_number_of_data_is_at_least_one(bad):
    with pytest.raises(ValueError, match=f"num_data must be at least 1, got {bad}"):
        TotalLoss(linear, squared_error, X, Y, num_data=bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (-0.5, "at least zero and finite, got -0.5"),
        (math.nan, "at least zero and finite, got nan"),
        (math.inf, "at least zero and finite, got inf"),
        (torch.tensor([1.0, math.nan, 2.0]), "at least zero and finite, got nan"),
        (torch.tensor([1.0, -2.0, math.inf]), r"at least zero and finite, got \[-2, inf\]"),
        (torch.ones(3, 1), r"a number or of shape \(P,\), got shape \(3, 1\)"),
        (torch.eye(3), r"a number or of shape \(P,\), got shape \(3, 3\)"),
    ],
)
def test_a_prior_has_one_positive_precision_or_one_for_each_parameter(bad, message):
    with pytest.raises(ValueError, match=f"prior_precision must be {message}"):
        TotalLoss(linear, squared_error, X, Y, bad)


@pytest.mark.parametrize("P", [1, 3])
def test_a_prior_of_another_length_is_refused(P):
    loss = TotalLoss(linear, squared_error, X[:, :P], Y, torch.ones(2))
    with pytest.raises(ValueError, match=rf"prior_precision .* {P} parameters, got 2"):
        loss(THETA[:P])


# ---- modules in training mode -------------------------------------------------------------------


UNSTEADY = [
    nn.BatchNorm1d(3),
    nn.BatchNorm1d(3, affine=False),
    nn.Dropout(0.5),
    nn.AlphaDropout(0.1),
]


@pytest.mark.parametrize("layer", UNSTEADY, ids=lambda layer: type(layer).__name__)
def test_a_module_in_training_mode_that_is_no_function_of_theta_says_eval(layer):
    net = nn.Sequential(nn.Linear(3, 3), copy.deepcopy(layer), nn.Linear(3, 3)).double()
    buffers = [b.clone() for b in net.buffers()]
    model, theta = from_module(net)
    loss = TotalLoss(model, softmax, X, CLASSES)
    start = blr.DiagonalGaussian.from_moments(theta, 1.0)
    for recipe in (recipes.adam(), recipes.vadam()):
        with pytest.raises(
            ValueError, match=rf"'1', {type(layer).__name__}.*call module\.eval\(\)"
        ):
            next(blr.run(recipe, loss, start, 1))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), buffers, strict=True))
    net.eval()
    next(blr.run(recipes.vadam(), loss, start, 1))
    torch.testing.assert_close(model(theta, X), net(X).detach())


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(3, 3, 2, dropout=0.5),
        nn.MultiheadAttention(3, 1, 0.1),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_recurrent_layers_attention_and_other_norms_say_eval_too(layer):
    model, theta = from_module(layer)
    with pytest.raises(ValueError, match=rf"{type(layer).__name__}.*call module\.eval\(\)"):
        model(theta, torch.zeros(2, 4, 3))


def test_what_draws_nothing_and_keeps_nothing_may_be_in_training_mode():
    layers = nn.Dropout(0.0), nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3)
    net = nn.Sequential(nn.Linear(3, 3), *layers).double().train()
    model, theta = from_module(net)
    torch.testing.assert_close(model(theta, X), net(X).detach())

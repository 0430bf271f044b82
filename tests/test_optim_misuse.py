"""Claims about parts of models, and about what is refused."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import blr
from blr.predict import prediction_variance, sample_outputs

N, D, K = 24, 4, 3
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
Y = X[:, :K].argmax(1)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two layers of equal shapes, in which samples can go astray unnoticed, and a last one."""
    torch.manual_seed(0)
    layers = nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, K)
    return nn.Sequential(*layers).to(dtype)


def half(model: nn.Module) -> nn.Module:
    """The model with its first layer frozen."""
    model[0].requires_grad_(False)
    return model


def learn(model: nn.Module, optimizer: blr.IVON, steps: int = 1) -> None:
    x = X.to(next(model.parameters()).dtype)
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            cross_entropy(model(x), Y).backward()
        optimizer.step()


def free(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def close(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


# ---- a posterior over a part of a model ---------------------------------------------------------


def parts(model: nn.Sequential) -> dict[str, list]:
    """What an optimizer may be given without names, with the names of what it should become."""
    every = list(model.parameters())
    return {
        "what is not frozen": free(half(model)),
        "all, of which some are frozen": every,
        "the middle": list(model[2].parameters()),
        "all in another order": every[::-1],
        "layers that changed places": [
            {"params": model[2].parameters(), "ess": 80},
            {"params": model[0].parameters()},
        ],
    }


PARTS = list(parts(network()))


@pytest.mark.parametrize("part", PARTS)
def test_samples_of_parameters_without_names_go_where_the_parameters_are(part):
    model = network(torch.float64)
    q = blr.IVON(parts(model)[part], lr=0.1, ess=50).posterior()
    names = {id(p): name for name, p in model.named_parameters()}
    given = [g["params"] if isinstance(g, dict) else [g] for g in parts(model)[part]]
    own = [names[id(p)] for some in given for p in some if p.requires_grad]
    named = blr.NamedGaussian(q.natural, dict(zip(own, q.shapes.values(), strict=True)))
    for mean, name in zip(q.named(q.mean).values(), own, strict=True):
        close(mean, model.get_parameter(name).detach())
    x = X.double()
    for ask in (blr.predict, sample_outputs):
        asked = (ask(model, each, x, 5, generator=seeded()) for each in (q, named))
        assert torch.equal(*asked)
    assert torch.equal(*(prediction_variance(model, each, x) for each in (q, named)))
    drawn = seeded()
    for outputs in sample_outputs(model, q, x, 5, generator=seeded()):
        theta = named.named(q.sample(1, drawn)[0])
        close(outputs, functional_call(model, theta, (x,)).detach())


@pytest.mark.parametrize("part", PARTS[:3])
def test_in_another_model_a_part_without_names_is_refused(part):
    model = network()
    q = blr.IVON(parts(model)[part], lr=0.1, ess=50).posterior()
    for it, posterior in ((copy.deepcopy(model), q), (model, pickle.loads(pickle.dumps(q)))):
        for ask in (blr.predict, sample_outputs, prediction_variance):
            with pytest.raises(ValueError, match=r"without names.*model\.named_parameters\(\)"):
                ask(it, posterior, X)


def test_numbers_are_no_names_where_names_are_numbers():
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in "01":
                self.register_parameter(name, nn.Parameter(torch.eye(D) + int(name)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.parameters()
            return (x @ first).tanh() @ second

    model = Stack()
    q = blr.IVON(list(model.parameters())[1:], lr=0.1, ess=1e12).posterior()
    close(blr.predict(model, q, X, 2), model(X).softmax(-1).detach(), rtol=1e-4)
    with pytest.raises(ValueError, match="without names"):
        blr.predict(copy.deepcopy(model), q, X)


def test_in_another_model_all_parameters_without_names_are_in_its_order():
    model = network(torch.float64)
    q = blr.IVON(model.parameters(), lr=0.1, ess=50).posterior()
    expected = blr.predict(model, q, X.double(), generator=seeded())
    for it, posterior in ((copy.deepcopy(model), q), (model, pickle.loads(pickle.dumps(q)))):
        close(blr.predict(it, posterior, X.double(), generator=seeded()), expected)


def test_where_parameters_are_is_known_after_adding_and_removing():
    model = network(torch.float64)
    q = blr.IVON(model[2].parameters(), lr=0.1, ess=50).posterior()
    expected = blr.predict(model, q, X.double(), generator=seeded())
    again = q.add(q.natural).remove(q.natural)
    close(blr.predict(model, again, X.double(), generator=seeded()), expected)


# ---- parameters of no dimension -----------------------------------------------------------------


class Scaled(nn.Module):
    """f(x) = c·(Wx + b)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(D, K)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.layer(x)


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_a_parameter_may_be_a_number(chunk):
    model, x = Scaled().double(), X.double()
    q = blr.IVON(model.named_parameters(), lr=0.1, ess=30).posterior()
    drawn, expected = seeded(), []
    for _ in range(3):
        theta = q.named(q.sample(1, drawn)[0])
        f = theta["scale"] * (x @ theta["layer.weight"].T + theta["layer.bias"])
        expected.append(f.softmax(-1))
    found = blr.predict(model, q, x, 3, generator=seeded(), chunk=chunk)
    close(found, torch.stack(expected).mean(0))
    v, c = 1 / q.precision[0], model.scale.detach()
    f = model.layer(x).detach()
    own = v * c**2 * (x.square().sum(1) + 1)
    expected = own[:, None, None] * torch.eye(K) + v * f[:, :, None] * f[:, None, :]
    close(prediction_variance(model, q, x, chunk=chunk), expected)


# ---- the posterior of one task as the prior of the next -----------------------------------------

OPTIONS = {"lr": 0.1, "ess": 40, "hess_init": 0.5, "weight_decay": 0.25}


@pytest.mark.parametrize("kind", [blr.IVON, blr.VOGN])
@pytest.mark.parametrize("again", ["the same model", "a copy"])
@pytest.mark.parametrize("names", [True, False], ids=["names", "no names"])
def test_with_frozen_layers_a_posterior_is_the_prior_of_the_next_task(kind, again, names):
    model = half(network(torch.float64))
    given = nn.Module.named_parameters if names else nn.Module.parameters
    q = kind(given(model), **OPTIONS).posterior()
    later = model if again == "the same model" else copy.deepcopy(model)
    found = kind(given(later), prior=q, **OPTIONS).posterior()
    close(found.precision, 40 * 0.5 + q.precision)
    close(found.mean, q.mean)
    flat = kind(given(later), prior=blr.DiagonalGaussian(natural=q.natural), **OPTIONS)
    close(flat.posterior().precision, found.precision)


@pytest.mark.parametrize("fused", [None, False])
def test_parameters_that_a_prior_does_not_have_keep_weight_decay(fused):
    """As with a prior over all that is weight decay there; a layer that thaws is no exception."""
    model = half(network(torch.float64))
    learn(model, first := blr.IVON(model.named_parameters(), **OPTIONS), 2)
    q = first.posterior()
    wide, later = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        shapes = {name: p.shape for name, p in wide.named_parameters()}
        mean = {n: q.named(q.mean).get(n, torch.zeros(s)).double() for n, s in shapes.items()}
        decay = {n: torch.full(s, 40 * 0.25).double() for n, s in shapes.items()}
    whole = blr.NamedGaussian.from_named(mean, decay | q.named(q.precision))
    optimizer, oracle = (
        blr.IVON(m.named_parameters(), prior=prior, fused=fused, **OPTIONS)
        for m, prior in ((later, q), (wide, whole))
    )
    for thawed in (False, True):
        later[0].requires_grad_(thawed)
        wide[0].requires_grad_(thawed)
        learn(later, optimizer, 3)
        learn(wide, oracle, 3)
        for p, expected in zip(later.parameters(), wide.parameters(), strict=True):
            close(p.detach(), expected.detach())
        close(optimizer.posterior().precision, oracle.posterior().precision)
    resumed = blr.IVON(wide.named_parameters(), **OPTIONS)
    resumed.load_state_dict(optimizer.state_dict())
    close(resumed.posterior().precision, optimizer.posterior().precision)


def test_a_prior_on_other_layers_with_names_covers_those():
    model = network(torch.float64)
    q = blr.IVON(list(model[2].named_parameters(prefix="2")), **OPTIONS).posterior()
    found = blr.IVON(model.named_parameters(), prior=q, **OPTIONS).posterior()
    for name, s in found.named(found.precision).items():
        delta = 40 * (0.5 + 0.25) if name.startswith("2.") else 40 * 0.25
        close(s, torch.full_like(s, 40 * 0.5 + delta))


def test_a_prior_that_could_mean_other_parameters_is_refused():
    model = network()
    q = blr.IVON(list(model[2].parameters()), **OPTIONS).posterior()
    with pytest.raises(ValueError, match=r"prior must .*named_parameters\(\)"):
        blr.IVON(half(copy.deepcopy(model)).parameters(), prior=q, **OPTIONS)
    first = copy.deepcopy(model)
    first[2:].requires_grad_(False)  # what is free has the same numbers, 0 and 1, and shapes
    with pytest.raises(ValueError, match=r"prior must .*named_parameters\(\)"):
        blr.IVON(first.parameters(), prior=q, **OPTIONS)
    both = blr.IVON(model[2].parameters(), **OPTIONS).posterior()
    with pytest.raises(ValueError, match=r"prior must .*got shape \(2, 20\)"):
        blr.IVON(
            model[2].parameters(),
            prior=both.at((both.natural[0].expand(2, -1), both.natural[1].expand(2, -1))),
            **OPTIONS,
        )
    other = blr.IVON(model[2].named_parameters(), **OPTIONS).posterior()  # "weight", not "2.weight"
    with pytest.raises(ValueError, match=r"prior must .*'weight'.*named_parameters\(\)"):
        blr.IVON(model.named_parameters(), prior=other, **OPTIONS)
    size = sum(p.numel() for p in free(half(model)))
    short = blr.DiagonalGaussian.from_moments(torch.zeros(size - 1), torch.ones(size - 1))
    with pytest.raises(ValueError, match=rf"one entry for each of 55 .* or of the {size} that"):
        blr.IVON(model.parameters(), prior=short, **OPTIONS)


def test_signs_have_a_prior_over_what_is_not_frozen():
    model = half(network(torch.float64))
    options = dict(lr=0.1, ess=40, natural_init=2.0)
    q = blr.BayesBiNN(model.parameters(), **options).posterior()
    lam0 = q.natural / 2 + 0.5
    whole = torch.cat([torch.zeros(D * D + D).double(), lam0])
    wide, later = copy.deepcopy(model), copy.deepcopy(model)
    pair = [
        (m, blr.BayesBiNN(m.parameters(), prior=prior, **options))
        for m, prior in ((later, lam0), (wide, whole))
    ]
    for thawed in (False, True):
        for m, optimizer in pair:
            m[0].requires_grad_(thawed)
            learn(m, optimizer, 3)
        close(*(optimizer.posterior().natural for _, optimizer in pair))


# ---- hooks of loading ---------------------------------------------------------------------------


class Twins(nn.Module):
    """Two layers of equal shapes, made in the order of their names."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(D, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).tanh() + self.b(x)


def by_name(optimizer: torch.optim.Optimizer, saved: dict) -> dict:
    """The state under the same name, as the documentation of torch proposes."""
    (mine,), (theirs,) = optimizer.state_dict()["param_groups"], saved["param_groups"]
    known = dict(zip(theirs["param_names"], theirs["params"], strict=True))
    own = dict(zip(mine["params"], mine["param_names"], strict=True))
    state = {i: saved["state"][known[name]] for i, name in own.items()}
    group = theirs | {key: mine[key] for key in ("params", "param_names")}
    return {"state": state, "param_groups": [group]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [blr.IVON, blr.BayesBiNN])
def test_what_a_hook_of_loading_returns_is_loaded_in_full_precision(kind, dtype):
    torch.manual_seed(0)
    first, second = Twins("ab").to(dtype), Twins("ba").to(dtype)
    options = {"lr": 0.1, "ess": 64}
    one = kind(first.named_parameters(), **options)
    learn(first, one, 5)
    other = kind(second.named_parameters(), **options)
    second.load_state_dict(first.state_dict())
    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for name, p in first.named_parameters():
        a, b = one.state[p], other.state[second.get_parameter(name)]
        kept = {"momentum", *one.state_dict()["state"][0]}
        assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in kept)


# ---- parameters that are no real numbers --------------------------------------------------------


@pytest.mark.parametrize("kind", [blr.IVON, blr.BayesBiNN])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_frozen_parameters_of_any_type_are_left_alone(kind, dtype):
    models = network(), network()
    table = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
    before = table.detach().clone()
    options = {"lr": 0.1, "ess": 40}
    plain, optimizer = (
        kind([*m.parameters(), *more], **options)
        for m, more in zip(models, ([], [table]), strict=True)
    )
    learn(models[0], plain, 2)
    learn(models[1], optimizer, 2)
    resumed = kind([*models[1].parameters(), table], **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    learn(models[0], plain, 2)
    learn(models[1], resumed, 2)
    assert same(*models) and torch.equal(table, before) and not resumed.state.get(table)


def test_a_complex_parameter_that_asks_for_a_gradient_is_refused_then():
    model = network()
    table = nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False)
    optimizer = blr.IVON([*model.parameters(), table], lr=0.1, ess=40)
    before = copy.deepcopy(model)
    table.requires_grad_(True)
    with pytest.raises(TypeError, match=r"real floating-point.*complex64; freeze"):
        learn(model, optimizer)
    table.requires_grad_(False)
    learn(model, optimizer)
    learn(before, blr.IVON(before.parameters(), lr=0.1, ess=40))
    assert same(model, before)


# ---- VOGN ---------------------------------------------------------------------------------------


def per_example(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(outputs, targets, reduction="none")


def test_vogn_on_the_last_layer_leaves_to_others_the_gradients_of_the_rest():
    models = network(torch.float64), network(torch.float64)
    models[1][:4].requires_grad_(False)
    optimizers = [blr.VOGN(m[4].parameters(), lr=0.1, ess=40) for m in models]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.zero_grad()
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                optimizer.backward(model, per_example, X.double(), Y, chunk_size=7)
                if model is models[0]:
                    found = [p.grad.clone() for p in model.parameters()]
                    inputs = list(model.parameters())
                    loss = cross_entropy(model(X.double()), Y)
                    for g, expected in zip(found, torch.autograd.grad(loss, inputs), strict=True):
                        close(g, expected)
            optimizer.step()
            assert len(optimizer.state_dict()["state"]) == len(optimizer.state) == 2
    assert same(*models)


def test_vogn_says_what_is_wrong_with_an_empty_batch():
    model = network()
    optimizer = blr.VOGN(model.parameters(), lr=0.1, ess=40)
    with pytest.raises(ValueError, match=r"at least one example, got shape \(0, 4\); skip"):
        optimizer.backward(model, per_example, X[:0], Y[:0])


# ---- what is refused, and how -------------------------------------------------------------------


def test_the_state_of_another_optimizer_is_refused_before_anything_changes():
    model = network()
    optimizer = blr.IVON(model.parameters(), lr=0.1, ess=40)
    learn(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    others = torch.optim.AdamW(model.parameters()), blr.VOGN(model.parameters(), lr=0.1, ess=40)
    for other in others:
        with pytest.raises(ValueError, match=r"that of another IVON, .*'clip_radius'.*; load"):
            optimizer.load_state_dict(other.state_dict())
    for kind in (blr.VOGN, blr.BayesBiNN):
        with pytest.raises(ValueError, match=f"that of another {kind.__name__}, got"):
            kind(model.parameters(), lr=0.1, ess=40).load_state_dict(others[0].state_dict())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    learn(model, optimizer)
    for own in (optimizer, pickle.loads(pickle.dumps(optimizer))):
        own.load_state_dict(before)
        assert own.state_dict()["param_groups"] == before["param_groups"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((blr.IVON, n) for n in ("lr", "ess", "hess_init", "weight_decay", "clip_radius")),
        *((blr.VOGN, n) for n in ("lr", "ess", "hess_init", "weight_decay", "damping")),
        *((blr.BayesBiNN, n) for n in ("lr", "ess", "natural_init", "relaxation", "temperature")),
        (blr.BayesBiNN, "beta"),
    ],
    ids=lambda it: getattr(it, "__name__", it),
)
@pytest.mark.parametrize("value", ["0.5", None, [0.5], torch.ones(2)], ids=repr)
def test_every_number_must_be_one(kind, name, value):
    with pytest.raises(TypeError, match=rf"{name} must be a number, got .*; pass"):
        kind(network().parameters(), **({"lr": 0.1, "ess": 40} | {name: value}))


@pytest.mark.parametrize("kind", [blr.IVON, blr.VOGN])
@pytest.mark.parametrize("betas", [("0.9", 0.99), (0.9, None)], ids=repr)
def test_every_decay_must_be_a_number(kind, betas):
    with pytest.raises(TypeError, match=r"betas must be a pair of numbers, got .*; pass"):
        kind(network().parameters(), lr=0.1, ess=40, betas=betas)


@pytest.mark.parametrize("kind", [blr.IVON, blr.VOGN, blr.BayesBiNN])
def test_where_all_is_frozen_there_is_no_posterior(kind):
    model = network().requires_grad_(False)
    optimizer = kind(model.parameters(), lr=0.1, ess=40)
    with pytest.raises(ValueError, match=r"posterior\(\) needs .* all 6 are frozen; "):
        optimizer.posterior()


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_sparse_gradients_are_refused_however_many_samples_there_are(samples):
    layer = nn.Embedding(10, 3, sparse=True)
    optimizer = blr.IVON(layer.parameters(), lr=0.1, ess=40)
    with pytest.raises(TypeError, match=r"gradients must be dense.*sparse=False"):
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                layer(torch.tensor([1, 2])).sum().backward()
        optimizer.step()


# ---- what the docstrings say of parts -----------------------------------------------------------


def test_two_optimizers_with_one_seed_count_joint_curvature_as_each_ones_own():
    """For ℓ = θ₁θ₂ of one pair of weights both curvatures are 0 and the joint one is 1."""
    P = 40_000
    for seeds, expected in (((0, 0), 1.0), ((0, 1), 0.0)):
        pair = [nn.Parameter(torch.zeros(P, dtype=torch.float64)) for _ in seeds]
        optimizers = [
            blr.IVON([p], lr=0.0, ess=10, betas=(0.9, 0.999), weight_decay=0.0, seed=seed)
            for p, seed in zip(pair, seeds, strict=True)
        ]
        with optimizers[0].sampled_params(train=True), optimizers[1].sampled_params(train=True):
            (pair[0] * pair[1]).sum().backward()
        for p, optimizer in zip(pair, optimizers, strict=True):
            optimizer.step()
            found = (optimizer.state[p]["hess"] - 1).mean() / 0.001 + 1  # ρ(ĥ − h) on average
            assert abs(found - expected) < 5 * math.sqrt(2 / P) + 0.002


def test_a_parameter_that_joins_later_is_debiased_by_the_steps_of_its_group():
    early, late = (nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))
    late.requires_grad_(False)
    optimizer = blr.IVON(
        [early, late], lr=0.1, ess=1e6, betas=(0.9, 1 - 1e-12), weight_decay=0.0, rescale_lr=False
    )
    for _ in range(4):
        optimizer.step(lambda: (optimizer.zero_grad(), early.backward()))
    late.requires_grad_(True)
    before = late.item()
    optimizer.step(lambda: (optimizer.zero_grad(), (early + late).backward()))
    close(late.detach(), torch.tensor(before - 0.1 * 0.1 / (1 - 0.9**5)).double(), rtol=1e-5)

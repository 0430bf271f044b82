"""Claims about what users do to a model and an optimizer between steps."""

import copy
import pickle
import shutil
import warnings

import pytest
import torch
import torch.distributed as dist
from test_optim_triton import there  # noqa: F401
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import blr
from blr.optim import _compiled, _noise

X = torch.linspace(-2, 2, 24).reshape(12, 2)
Y = (X[:, :1] * X[:, 1:]).sin()


@pytest.fixture(params=["plain torch", "compiled", "the kernel"])
def engine(request, needs):
    """Run a function of `fused` in plain torch, in compiled code, and in the interpreted kernel."""
    if request.param == "the kernel":
        run = request.getfixturevalue("there")
        return lambda f, *args: run(f, None, *args)
    if request.param == "compiled":
        found = shutil.which("g++") or shutil.which("clang++")
        needs(found, "install a C++ compiler: apt install g++")
    return lambda f, *args: f(request.param == "compiled", *args)


@pytest.fixture
def alone():
    """The only process of a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 41), nn.Tanh(), nn.Linear(41, 1)).to(dtype)


def make(model: nn.Module, **options) -> blr.IVON:
    settings = {"lr": 0.2, "ess": 100, "hess_init": 0.5, "betas": (0.9, 0.99)} | options
    return blr.IVON(model.parameters(), **settings)


def backward(model: nn.Module) -> None:
    kind = next(model.parameters()).dtype
    (model(X.to(kind)) - Y.to(kind)).square().mean().backward()


def learn(model: nn.Module, optimizer: blr.IVON, steps: int = 1) -> None:
    """An unchanged loop after train(), or contexts."""
    for _ in range(steps):
        if optimizer.training:
            optimizer.zero_grad()
            backward(model)
        else:
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                backward(model)
        optimizer.step()


def pull(optimizer: blr.IVON) -> None:
    """A gradient for each parameter that is not frozen, of no other parameter."""
    for p in (p for g in optimizer.param_groups for p in g["params"]):
        p.grad = 0.7 * p.detach() + (1.3 * p.detach()).sin() if p.requires_grad else None


def everything(model: nn.Module, optimizer: blr.IVON) -> list[torch.Tensor]:
    """Means and averages."""
    optimizer.eval()
    states = [optimizer.state[p] for p in model.parameters()]
    averages = [s[name].clone() for s in states for name in ("hess", "momentum") if name in s]
    return [p.detach().clone() for p in model.parameters()] + averages


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# ---- freezing and thawing between train() and eval() --------------------------------------------


def train_again_equals_contexts(fused) -> None:
    results = []
    for style in ("contexts", "train()"):
        model = network()
        model[0].requires_grad_(False)
        optimizer = make(model, fused=fused)
        for thawed in (False, True, False, True):
            model[0].requires_grad_(thawed)
            if style == "train()":
                optimizer.train()
            learn(model, optimizer, 2)
        results.append(everything(model, optimizer))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_train_called_again_gives_samples_to_what_is_not_frozen_then(engine):
    engine(train_again_equals_contexts)


def test_the_posterior_has_the_weights_of_a_layer_thawed_since_the_last_step():
    model = network()
    optimizer = make(model)
    learn(model, optimizer)
    model[0].requires_grad_(False)
    optimizer.train()
    with torch.no_grad():
        model[0].weight.mul_(2)  # it is frozen and holds no sample
    written = model[0].weight.detach().clone()
    model[0].requires_grad_(True)
    q = optimizer.posterior()
    torch.testing.assert_close(q.named(q.mean)["0"], written)


def test_parameters_that_cannot_be_placed_leave_the_others_at_the_mean():
    real = nn.Parameter(torch.ones(3))
    other = nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
    optimizer = blr.IVON([real, other], lr=0.1, ess=10)
    other.requires_grad_(True)
    with pytest.raises(TypeError, match="complex"):
        optimizer.train()
    assert torch.equal(real, torch.ones(3)) and not optimizer.training
    other.requires_grad_(False)
    with optimizer.sampled_params():
        assert not torch.equal(real, torch.ones(3))
    assert torch.equal(real, torch.ones(3))


def steps_settle_who_holds_a_sample(fused) -> None:
    results = []
    for style in ("contexts", "train()"):
        model = network()
        frozen = model[0]
        frozen.requires_grad_(False)
        optimizer = make(model, fused=fused)
        if style == "train()":
            optimizer.train()
        results.append([])
        for t in range(9):
            # Between train() and eval(), what thaws has its first sample after the next step.
            if t in ((3, 8) if style == "contexts" else (2, 7)):
                frozen.requires_grad_(True)
            if t == 5:
                frozen.requires_grad_(False)
            if style == "contexts":
                with optimizer.sampled_params(train=True):
                    pull(optimizer)
            else:
                pull(optimizer)
            optimizer.step()
            if t in (5, 6):
                results[-1].append(frozen.weight.detach().clone())
        results[-1] += everything(model, optimizer)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_gives_the_next_sample_to_what_is_not_frozen_then(engine):
    engine(steps_settle_who_holds_a_sample)


def test_thawing_and_freezing_are_exact_to_the_bit_in_plain_torch():
    results = []
    for style in ("contexts", "train()"):
        model = network(torch.bfloat16)
        optimizer = make(model)
        for thawed in (True, False, True):
            model[0].requires_grad_(thawed)
            if style == "train()":
                optimizer.train()
            learn(model, optimizer, 2)
        results.append(everything(model, optimizer))
    assert same(*results)


def test_a_frozen_parameter_with_a_gradient_of_zeros_is_left_alone():
    model = network()
    optimizer = make(model)
    optimizer.train()
    learn(model, optimizer, 3)
    with optimizer.mean_params():
        before = model[0].weight.detach().clone()
    h = optimizer.state[model[0].weight]["hess"].clone()
    model[0].requires_grad_(False)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        backward(model)
        optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert torch.equal(optimizer.state[model[0].weight]["hess"], h)


def test_looking_at_samples_does_not_move_the_sample_that_a_gradient_waits_for():
    results = []
    for look in (False, True):
        model = network()
        model[0].requires_grad_(False)
        optimizer = make(model)
        optimizer.train()
        optimizer.zero_grad()
        model[0].requires_grad_(True)
        backward(model)
        if look:
            with optimizer.sampled_params():
                pass
        optimizer.step()
        results.append(everything(model, optimizer))
    assert same(*results)


def test_a_frozen_layer_is_saved_and_resumed_between_train_and_eval():
    model = network()
    optimizer = make(model)
    learn(model, optimizer, 2)  # so that the place of the mean has held a sample
    optimizer.train()
    learn(model, optimizer)
    model[0].requires_grad_(False)
    learn(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = network()
    resumed = make(other)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert same(everything(other, resumed), everything(model, optimizer))


# ---- options that change under a waiting sample -------------------------------------------------


CHANGES = [{"ess": 9e4}, {"weight_decay": 40.0}, {"ess": 2.0, "weight_decay": 0.1, "seed": 7}]
MOMENTS = ["train()", "train(), then a look", "in the context", "after the context", "two samples"]


def curvature_has_the_width_that_was_drawn(fused, when, change, dtype) -> None:
    """For the loss ½w² at mean 0, h learns ε², whatever the width of the samples."""
    results = []
    for changes in (False, True):
        w = nn.Parameter(torch.zeros(100, dtype=dtype))
        optimizer = make(nn.ParameterList([w]), lr=0.0, fused=fused)
        (group,) = optimizer.param_groups

        def change_it(changes=changes, group=group):
            group.update(change if changes else {})

        if when.startswith("train()"):
            optimizer.train()
            w.grad = w.detach().clone()
            change_it()
            if "look" in when:
                with optimizer.sampled_params():
                    pass
        else:
            for k in range(2 if when == "two samples" else 1):
                with optimizer.sampled_params(train=True):
                    if k or when == "in the context":
                        change_it()
                    optimizer.zero_grad()
                    w.grad = w.detach().clone()
            if when == "after the context":
                change_it()
        optimizer.step()
        h = optimizer.state[w]["hess"]
        with optimizer.sampled_params() if not optimizer.training else warnings.catch_warnings():
            # The next sample has the options of now; other seeds have other noise.
            width = (group["ess"] * (h + group["weight_decay"])).rsqrt()
            noise = w.detach().to(h.dtype) / width if "seed" not in change else h
            results.append((h.clone(), noise))
    for a, b in zip(*results, strict=True):
        rtol = 2e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(a, b, rtol=rtol, atol=0.1 * rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("when", MOMENTS)
def test_curvature_is_learned_with_the_width_that_the_sample_was_drawn_with(
    engine, when, change, dtype
):
    engine(curvature_has_the_width_that_was_drawn, when, change, dtype)


def test_a_schedule_of_ess_acts_on_train_a_step_later_than_on_contexts():
    results = []
    for style in ("contexts", "train()"):
        model = network()
        optimizer = make(model)
        if style == "train()":
            optimizer.train()
        for t in range(6):
            if style == "train()":
                optimizer.zero_grad()
                backward(model)
                optimizer.param_groups[0]["ess"] = 100 * 2 ** (t + 1)
                optimizer.step()
            else:
                optimizer.param_groups[0]["ess"] = 100 * 2**t
                learn(model, optimizer)
        results.append(everything(model, optimizer))
    assert same(*results)


def test_an_added_group_leaves_the_width_that_others_wait_with():
    results = []
    for ess in (100, 1e6):
        w, v = (nn.Parameter(torch.zeros(50, dtype=torch.float64)) for _ in range(2))
        optimizer = make(nn.ParameterList([w]), lr=0.0)
        optimizer.train()
        w.grad = w.detach().clone()
        optimizer.param_groups[0]["ess"] = ess
        optimizer.add_param_group({"params": [v], "ess": 30.0})
        v.grad = v.detach().clone()
        optimizer.step()
        results.append([optimizer.state[p]["hess"].clone() for p in (w, v)])
    assert same(*results)


# ---- gradients that are cleared by others -------------------------------------------------------


def zero_foreach(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1, foreach=True).zero_grad(set_to_none=False)


CLEAR = {
    "optimizer, in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, _: model.zero_grad(),
    "model, in place": lambda model, _: model.zero_grad(set_to_none=False),
    "another optimizer, in place": lambda model, _: zero_foreach(model),
}


def averaged(model: nn.Module, clear, samples: int = 4) -> list[torch.Tensor]:
    optimizer = make(model)
    for _ in range(3):
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                clear(model, optimizer)
                backward(model)
        optimizer.step()
    return everything(model, optimizer)


@pytest.mark.parametrize("how", CLEAR)
def test_samples_are_averaged_whoever_clears_the_gradients(how):
    expected = averaged(network(), lambda _, optimizer: optimizer.zero_grad())
    assert same(averaged(network(), CLEAR[how]), expected)


@pytest.mark.parametrize("how", CLEAR)
@pytest.mark.parametrize("kind", ["DDP", "DDP with views of its buckets", "FSDP2"])
def test_samples_of_distributed_models_are_averaged_whoever_clears(alone, kind, how):
    def build() -> nn.Module:
        if kind == "FSDP2":
            return fully_shard(network())
        return DDP(network(), gradient_as_bucket_view="views" in kind)

    if kind == "FSDP2" and how == "another optimizer, in place":
        return  # such writes leave the version of a shard as it is
    if how == "model" and "views" in kind:
        with pytest.raises(RuntimeError, match=r"buckets of DDP.*optimizer.zero_grad\(\)"):
            averaged(build(), CLEAR[how])
        return
    expected = averaged(network(), lambda _, optimizer: optimizer.zero_grad())
    for a, b in zip(averaged(build(), CLEAR[how]), expected, strict=True):
        a = a.full_tensor() if hasattr(a, "full_tensor") else a
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_that_are_not_cleared_add_up_though_they_are_clipped_inside(
    alone, sharded, passes
):
    results = []
    for clipped in (False, True):
        model = fully_shard(network()) if sharded else network()
        optimizer = make(model)
        for _ in range(3):
            with optimizer.sampled_params(train=True):
                for _ in range(passes):
                    backward(model)
                if clipped:  # written to in place, and left as they are
                    nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()
        results.append(everything(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_sample_that_some_parameters_do_not_see_is_averaged_too():
    results = []
    for how in ("model", "model, in place"):
        model = nn.ModuleList([nn.Linear(1, 1).double(), nn.Linear(1, 2).double()])
        for p in model.parameters():
            nn.init.constant_(p, 0.5)
        optimizer = make(model)
        for used in (model[0], model[1], model[0], model[1]):
            with optimizer.sampled_params(train=True):
                CLEAR[how](model, optimizer)
                used(torch.ones(1, 1, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        results.append(everything(model, optimizer))
    assert same(*results)


def test_layers_may_be_frozen_between_the_samples_of_a_step():
    model = network()
    optimizer = make(model)
    h = []
    for frozen in (False, True, True):
        model.requires_grad_(not frozen)
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            if not frozen:
                backward(model)
        h.append(optimizer.state[model[0].weight]["hess"].clone())
    optimizer.step()
    assert torch.equal(optimizer.state[model[0].weight]["hess"], h[0])
    model.requires_grad_(True)
    learn(model, optimizer)
    assert not torch.equal(optimizer.state[model[0].weight]["hess"], h[0])


# ---- weights that are written by others ---------------------------------------------------------


def load(model: nn.Module) -> None:
    model.load_state_dict({name: x + 1 for name, x in model.state_dict().items()})


@torch.no_grad()
def clamp(model: nn.Module) -> None:
    for p in model.parameters():
        p.clamp_(-0.1, 0.1)


def writes_are_told_once(fused, write, until) -> None:
    model, plain = network(), network()
    optimizer, expected = make(model, fused=fused), make(plain, fused=fused)
    for m, o in ((model, optimizer), (plain, expected)):
        o.train()
        learn(m, o, 3)
    optimizer.zero_grad()
    backward(model)
    write(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if until == "mean_params":
            with optimizer.mean_params():
                pass
        else:
            getattr(optimizer, until)()
        optimizer.train()
        learn(model, optimizer, 2)
        write(model)
        optimizer.eval()
    assert [w.category for w in told] == [RuntimeWarning]
    assert "eval() before writing weights and optimizer.train() after" in str(told[0].message)
    if until == "eval":  # nothing else has happened
        learn(plain, expected, 2)
        for a, b in zip(everything(model, optimizer), everything(plain, expected), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("until", ["eval", "step", "mean_params"])
@pytest.mark.parametrize("write", [load, clamp])
def test_weights_written_into_a_sample_are_told_of_once(engine, write, until):
    engine(writes_are_told_once, write, until)


def usual_loops_are_silent(fused) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network()
        optimizer = make(model, fused=fused)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer.train()
        for t in range(12):
            model[0].requires_grad_(t % 4 != 2)
            optimizer.zero_grad()
            scaler.scale((model(X) - Y).square().mean()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            if t == 3:
                with optimizer.mean_params():
                    clamp(model)  # the mean may be written
                with optimizer.sampled_params():
                    model(X)
            if t == 5:
                model, optimizer = copy.deepcopy((model, optimizer))
                optimizer.param_groups[0]["ess"] = 200
            if t == 7:
                model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
            if t == 9:
                optimizer.eval()
                load(model)
                optimizer.train()
        for first in ("model", "optimizer"):
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model = network()
            optimizer = make(model, fused=fused)
            if first == "model":
                model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            if first == "optimizer":
                model.load_state_dict(saved[0])
            learn(model, optimizer, 2)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        learn(model, optimizer, 2)
        model.to(torch.float64)
        learn(model, optimizer, 2)
        everything(model, optimizer)


def test_nothing_is_told_where_nothing_is_lost(engine):
    engine(usual_loops_are_silent)


@pytest.mark.parametrize("kind", ["DDP", "FSDP2", "compiled"])
def test_nothing_is_told_of_what_engines_do_to_models(alone, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = network()
        wrap = {"DDP": DDP, "FSDP2": fully_shard}.get(kind)
        whole = torch.compile(model, backend="eager") if wrap is None else wrap(model)
        optimizer = make(whole)
        optimizer.train()
        learn(whole, optimizer, 3)
        with optimizer.mean_params():
            whole(X)
        learn(whole, optimizer, 2)
    with pytest.warns(RuntimeWarning, match="hold a sample were written"):
        clamp(model)
        optimizer.step()


# ---- modes of torch -----------------------------------------------------------------------------


def noise_has_a_type_of_its_own(fused) -> None:
    results = []
    for default in (torch.bfloat16, torch.float64, torch.float32):
        _noise._scalar.cache_clear()
        _compiled._program.cache_clear()
        torch.set_default_dtype(default)
        try:
            p = nn.Parameter(torch.zeros(3000, dtype=torch.float32))
            optimizer = make(nn.ParameterList([p]), fused=fused)
            with optimizer.sampled_params(train=True):
                theta = p.detach().clone()
                p.grad = theta.sin()
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([theta, *everything(nn.ParameterList([p]), optimizer)])
        with optimizer.sampled_params():  # what was cached is not of the other type
            results[-1].append(p.detach().clone())
    assert same(results[0], results[2])
    assert same(results[1], results[2])


def test_noise_does_not_depend_on_the_default_type(engine):
    engine(noise_has_a_type_of_its_own)


def inference_mode_changes_nothing(fused, when) -> None:
    results = []
    for mode in (False, True):
        model = network()
        model[0].requires_grad_(False)
        with torch.inference_mode(mode and when == "making"):
            optimizer = make(model, fused=fused)
        model[0].requires_grad_(True)
        if when == "after a resume":
            learn(model, optimizer)
            with torch.inference_mode(mode):
                optimizer.load_state_dict(optimizer.state_dict())
        with torch.inference_mode(mode):
            if when == "train() and eval()":
                optimizer.train()
                model(X)
                optimizer.eval()
            if when == "posterior":
                optimizer.posterior()
            with optimizer.sampled_params():
                results.append([model(X).clone()])
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                backward(model)
            with torch.inference_mode(mode), optimizer.sampled_params(), optimizer.mean_params():
                model(X)
        with torch.inference_mode(mode and when == "step"):
            optimizer.step()
        optimizer.train()
        learn(model, optimizer)
        results[-1] += everything(model, optimizer)
        state = [x for s in optimizer.state.values() for x in s.values()]
        assert not any(x.is_inference() for x in state)
    assert same(*results)


@pytest.mark.parametrize(
    "when",
    ["making", "before training", "after a resume", "train() and eval()", "posterior", "step"],
)
def test_inference_mode_around_a_context_changes_nothing(engine, when):
    engine(inference_mode_changes_nothing, when)

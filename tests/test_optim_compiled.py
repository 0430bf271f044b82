"""Claims about IVON in compiled code: it is IVON to rounding, and few programs are compiled."""

import contextlib
import copy
import io
import pickle
import shutil

import pytest
import torch
from torch import nn

import blr
from blr.optim import _compiled, _functional, _noise, _options, _pieces

SHAPES = (190, 180), (7,), (40, 3)  # one tensor that is worked on in place, two that are gathered
P = 190 * 180 + 7 + 120
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def compiler(request, needs):
    needs(shutil.which("g++") or shutil.which("clang++"), "install a C++ compiler: apt install g++")


def start(dtype: torch.dtype = torch.float64, shapes=SHAPES) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes
    ]


def make(params, fused: bool | None = True, **options) -> blr.IVON:
    settings = {"lr": 0.2, "ess": 50.0, "hess_init": 0.5, "betas": (0.9, 0.97)} | options
    return blr.IVON(params, fused=fused, **settings)


def gradients(params: list[nn.Parameter], t: int = 0) -> None:
    """The gradient of a smooth function, which is not convex and changes from step to step."""
    for p in params:
        p.grad = 0.7 * p.detach() + (1.3 * p.detach() + 0.1 * t).sin()


def learn(params, optimizer, steps: int = 4, style: str = "contexts", samples: int = 1) -> None:
    if style == "train()":
        optimizer.train()
    for t in range(steps):
        for _ in range(samples if style == "contexts" else 0):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                gradients(params, t)
        if style == "train()":
            gradients(params, t)
        optimizer.step((lambda t=t: gradients(params, t)) if style == "closure" else None)


def everything(params: list[nn.Parameter], optimizer: blr.IVON) -> list[torch.Tensor]:
    optimizer.eval()
    states = [optimizer.state[p][name] for p in params for name in ("hess", "momentum")]
    return [x.detach().clone() for x in (*params, *states)]


def compiled_noise(start: int, stop: int, name: tuple[int, ...], device: torch.device):
    """ε as the compiled sample of N(0, 1) has it."""
    b = _pieces.Slice((), (), start, stop, 0)
    numbers = torch.tensor([1.0, *8 * [0.0]]), None, None
    out, zeros, ones = (torch.full((stop - start,), x) for x in (9.0, 0.0, 1.0))
    _compiled._run(_compiled.draw_, out, zeros, ones, numbers, *_compiled._key(b, name))
    return out


# ---- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 511, 1023, 70_001, (1 << 33) - 50_001, 5 << 33])
def test_compiled_noise_is_that_of_plain_torch_to_the_last_digits(first):
    for size in (2, 17, 1000, 40_960):
        expected = _noise.normal(first, first + size, (5, 7, 0, 1), CPU)
        # A radius is below 6.6 and has half a digit from log and root each; one digit is 2⁻²¹.
        noise = compiled_noise(first, first + size, (5, 7, 0, 1), CPU)
        torch.testing.assert_close(noise, expected, rtol=0, atol=3 * 2**-21)


OPTIONS = [
    ("contexts", 1, {}),
    ("contexts", 3, {}),
    ("train()", 1, {}),
    ("closure", 1, {}),
    ("contexts", 1, {"clip_radius": 0.3}),
    ("train()", 1, {"clip_radius": 0.3, "rescale_lr": False}),
    ("contexts", 1, {"debias": False, "weight_decay": 0.0}),
    ("contexts", 3, {"weight_decay": 0.3, "ess": 7.0}),
    ("train()", 1, {"betas": (0.0, 0.5), "seed": 3}),
    ("contexts", 1, {"prior": True}),
    ("contexts", 1, {"prior": True, "rescale_lr": False, "clip_radius": 0.3}),
]


@pytest.mark.parametrize(("style", "samples", "options"), OPTIONS, ids=str)
def test_compiled_steps_equal_those_of_plain_torch_with_the_same_noise(
    style, samples, options, monkeypatch
):
    if "prior" in options:
        mean, precision = torch.linspace(-1, 1, P), torch.linspace(1, 9, P)
        prior = blr.DiagonalGaussian.from_moments(mean.double(), precision.double())
        options = options | {"prior": prior}
    results = []
    for fused in (True, None):
        if not fused:
            monkeypatch.setattr(_noise, "normal", compiled_noise)
        params = start()
        optimizer = make(params, fused, **options)
        learn(params, optimizer, 6, style, samples)
        results.append(everything(params, optimizer))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_steps_equal_those_of_plain_torch_to_rounding(dtype):
    results = []
    for fused in (True, False):
        params = start(dtype)
        optimizer = make(params, fused)
        learn(params, optimizer)
        assert optimizer.state[params[0]]["hess"].dtype == torch.float32
        results.append(everything(params, optimizer))
    # Samples differ by the last digit of ε; in 16 bits a few are then rounded another way.
    largest, average = (5e-5, 1e-6) if dtype == torch.float32 else (5e-2, 2e-4)
    for ours, plain in zip(*results, strict=True):
        difference = (ours - plain).double().abs()
        assert difference.max() < largest and difference.mean() < average


@pytest.mark.parametrize("clip", [float("inf"), 0.2])
def test_the_functional_step_is_the_step_in_place(clip):
    g = torch.Generator().manual_seed(1)
    m, gbar, gradient, product = torch.randn(4, 9, generator=g, dtype=torch.float64)
    h, delta, shift = torch.rand(3, 9, generator=g, dtype=torch.float64)
    prior, b1, b2 = _functional.Prior(delta, shift), 0.9, 0.6
    same = dict(ess=3.0, gathered=0.4, clip_radius=clip)
    new = _functional.ivon_step(
        m, gbar, h, gradient, product, prior, lr=0.3, rates=(1 - b1, 1 - b2), **same
    )
    _functional.ivon_step_(m, gbar, h, gradient, product, prior, lr=0.3, betas=(b1, b2), **same)
    for ours, theirs in zip(new, (m, gbar, h), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_groups_and_kinds_of_work_mix():
    results = []
    for fused in (True, None):
        params = start()
        groups = [
            {"params": params[:1], "fused": fused, "weight_decay": 0.3, "lr": 0.1},
            {"params": params[1:], "fused": None},
        ]
        optimizer = make(groups, None)
        learn(params, optimizer)
        results.append(everything(params, optimizer))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("style", ["contexts", "train()"])
def test_every_option_is_that_of_the_group(style):
    """A group learns as it does where all have its options, which leaves the noise as it is."""
    options = (
        {"lr": 0.3, "ess": 9.0, "hess_init": 1.5, "betas": (0.5, 0.9), "weight_decay": 0.02,
         "clip_radius": 0.1, "debias": False, "rescale_lr": True, "seed": 8},
        {"lr": 0.1, "ess": 40.0, "hess_init": 0.3, "betas": (0.8, 0.95), "weight_decay": 0.2,
         "clip_radius": 0.5, "debias": True, "rescale_lr": False, "seed": 3},
    )  # fmt: skip

    def trained(alike=None):
        params = start(shapes=((7,), (40, 3), (190, 180)))
        parts = zip((params[:2], params[2:]), options, strict=True)
        groups = [{"params": some} | chosen for some, chosen in parts]
        optimizer = make(params if alike else groups, **(alike or {}))
        learn(params, optimizer, 4, style)
        return everything(params, optimizer)

    mixed = trained()
    alike = [trained(chosen) for chosen in options]
    for i, x in enumerate(mixed):
        mine = i in (2, 7, 8)  # the large tensor, and its two averages
        torch.testing.assert_close(x, alike[mine][i], rtol=1e-10, atol=1e-12)
        assert not torch.equal(x, alike[not mine][i])


def test_the_result_does_not_depend_on_how_parameters_are_cut_into_pieces(monkeypatch):
    results = []
    for window in (1 << 19, 5_000, 1_000):
        monkeypatch.setitem(_compiled.WINDOW, "cpu", window)
        params = start()
        optimizer = make(params)
        learn(params, optimizer)
        results.append(everything(params, optimizer))
    for other in results[1:]:
        for ours, whole in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-14)


def test_a_sample_that_is_made_again_is_the_sample_that_was_kept():
    results = []
    for look in (False, True):
        params = start()
        optimizer = make(params)
        for t in range(3):
            with optimizer.sampled_params(train=True):
                gradients(params, t)
            if look:
                with optimizer.sampled_params():
                    pass
            optimizer.step()
        results.append(everything(params, optimizer))
    assert all(map(torch.equal, *results))


# ---- a handful of programs ----------------------------------------------------------------------


def test_nothing_is_compiled_again_for_other_sizes_steps_or_settings():
    warm = start()
    for style in ("contexts", "train()"):
        learn(warm, make(warm), 2, style)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n, style in (
            (2, "contexts"),
            (3, "train()"),
            (40_000, "contexts"),
            (100_003, "train()"),
        ):
            params = start(shapes=((n,), (5, 1, 3, 2), (210, 200)))
            optimizer = make(params, seed=n, ess=n, clip_radius=float(n), weight_decay=1 / n)
            learn(params, optimizer, 3, style)
            optimizer.param_groups[0].update(lr=0.01, betas=(0.5, 0.9), debias=False)
            learn(params, optimizer, 2, style)


# ---- the contract -------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_a_context_restores_the_mean_bit_by_bit_also_after_an_exception(train):
    params = start()
    optimizer = make(params)
    before = [p.detach().clone() for p in params]
    with pytest.raises(KeyboardInterrupt), optimizer.sampled_params(train=train):
        assert not any(map(torch.equal, params, before))
        raise KeyboardInterrupt
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("fail_before", [True, False])
def test_the_mean_is_restored_when_the_sampling_itself_is_interrupted(fail_before, monkeypatch):
    monkeypatch.setitem(_compiled.WINDOW, "cpu", 5_000)
    params = start()
    optimizer = make(params)
    before = [p.detach().clone() for p in params]
    run, calls = _compiled._run, []

    def interrupted(f, *arguments):
        calls.append(f)
        if len(calls) == 4:
            if not fail_before:
                run(f, *arguments)
            raise KeyboardInterrupt
        run(f, *arguments)

    monkeypatch.setattr(_compiled, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt), optimizer.sampled_params():
        raise AssertionError("not reached")
    assert len(calls) == 4 and all(map(torch.equal, params, before))


@pytest.mark.parametrize("style", ["contexts", "train()"])
def test_resuming_from_the_state_dict_is_exact_to_the_bit(style):
    params = start()
    optimizer = make(params)
    learn(params, optimizer, 3, style)
    file = io.BytesIO()
    torch.save([[p.detach() for p in params], optimizer.state_dict()], file)
    learn(params, optimizer, 3, style)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    others = [nn.Parameter(w) for w in weights]
    resumed = make(others, lr=0.9, seed=5)
    resumed.load_state_dict(state)
    learn(others, resumed, 3, style)
    assert all(map(torch.equal, everything(params, optimizer), everything(others, resumed)))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_continue_alike(clone):
    params = start()
    optimizer = make(params)
    learn(params, optimizer, 2, "train()")
    others, twin = clone((params, optimizer))
    learn(params, optimizer, 2, "train()")
    learn(others, twin, 2, "train()")
    assert all(map(torch.equal, everything(params, optimizer), everything(others, twin)))


@pytest.mark.parametrize(
    "layout",
    {
        "transposed": lambda: torch.randn(210, 200).t(),
        "channels_last": lambda: torch.randn(50, 90, 3, 3).to(memory_format=torch.channels_last),
        "with gaps": lambda: torch.randn(200, 400)[:, ::2],
        "a row of a buffer": lambda: torch.randn(3, 40_001)[1],
        "one entry": lambda: torch.randn(()),
        "empty": lambda: torch.randn(0, 3),
    }.items(),
    ids=lambda item: item[0],
)
def test_layout_storage_and_address_are_kept(layout):
    torch.manual_seed(0)
    begin = layout[1]().double()
    p, q = nn.Parameter(begin), nn.Parameter(begin.clone(memory_format=torch.contiguous_format))
    where = p.data_ptr(), p.stride(), p.untyped_storage().data_ptr()
    results = []
    for x, fused in ((p, True), (q, None)):
        # Without noise, so that the order of elements in memory does not matter.
        optimizer = make([x], fused, ess=1e60)
        learn([x], optimizer, 3, "train()")
        optimizer.eval()
        learn([x], optimizer, 2)
        results.append(x.detach())
    assert (p.data_ptr(), p.stride(), p.untyped_storage().data_ptr()) == where
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_gradients_that_are_not_finite_leave_all_as_it_was():
    params = start()
    optimizer = make(params)
    learn(params, optimizer, 2)
    before = everything(params, optimizer)
    with optimizer.sampled_params(train=True):
        gradients(params)
        params[1].grad[3] = torch.inf
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step()
    assert all(map(torch.equal, before, everything(params, optimizer)))


def test_parameters_without_gradients_and_frozen_ones_stay():
    params = start()
    params[2].requires_grad_(False)
    optimizer = make(params)
    before = [p.detach().clone() for p in params]
    with optimizer.sampled_params(train=True):
        gradients(params[:1])
    optimizer.step()
    assert [torch.equal(p, old) for p, old in zip(params, before, strict=True)] == [
        False,
        True,
        True,
    ]


def test_compiled_models_see_samples_and_steps():
    """As in the contract, which asks it of torch.compile without inductor; for both spellings."""
    results = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        optimizer = make(model.parameters(), None)
        run = torch.compile(model) if compiled else model
        x = torch.randn(12, 2, dtype=torch.float64)
        for t in range(6):
            with optimizer.sampled_params(train=True) if t < 3 else contextlib.nullcontext():
                optimizer.zero_grad()
                (run(x) - x.sin()).square().mean().backward()
            optimizer.step()
            optimizer.train(t >= 2)
        results.append(everything([*model.parameters()], optimizer))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused", [True, None])
def test_a_backward_pass_through_weights_that_a_step_has_changed_is_refused(fused):
    params = start(shapes=((200, 200),))
    optimizer = make(params, fused)
    optimizer.train()
    loss = params[0].sin().sum()
    gradients(params)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_random_numbers_of_others_are_not_touched():
    params = start()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    learn(params, make(params), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_compiler_the_remedy_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = (
        "fused=True compiles.*needs the C.. compiler no-such-compiler.*install it.*leave fused"
    )
    with pytest.raises(RuntimeError, match=message):
        make(start())
    make(start(), None)
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setattr(_options.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(RuntimeError, match=r"needs Python\.h.*install python3-dev"):
        make(start())

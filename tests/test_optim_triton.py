"""Claims about IVON's kernel, without a GPU: interpreted against plain torch, and compiled for two.

What the kernel computes is run by Triton's interpreter in a process of its own, because Triton
must know of it when it is imported. A claim that ends in `_there` runs in that process.
"""

import copy
import multiprocessing
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import blr
from blr.optim import _launch, _noise, _pieces, _table
from blr.optim._pieces import Slice

ROOT = Path(__file__).resolve().parents[1]
SHAPES = (5,), (41, 53)  # one that is gathered with others, and one of three chunks, unaligned


# ---- in the interpreter -------------------------------------------------------------------------


def _interpret() -> None:
    torch.set_num_threads(1)
    from triton.runtime import interpreter

    truncating = interpreter._convert_float

    def rounding(x, kind, into, mode):
        """The interpreter cuts bfloat16 off, where a GPU rounds to the nearest."""
        if str(into) != "bf16" or str(kind) != "fp32":
            return truncating(x, kind, into, mode)
        bits = torch.from_numpy(x.copy()).bfloat16().view(torch.int16)
        return bits.numpy().view("uint16").reshape(x.shape)

    interpreter._convert_float = rounding
    _launch.DEVICES.add("cpu")
    _pieces.SMALL = 64


@pytest.fixture(scope="module")
def there(needs):
    """Run a function in a process whose Triton interprets, and where the CPU counts as a GPU."""
    needs(find_spec("triton"), "install Triton: pip install triton")
    needs(not _launch.lacking(), f"install what the kernel needs: {_launch.lacking()}")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(_interpret).result()
        yield lambda f, *args: pool.submit(f, *args).result()


def start(dtype=torch.float32, shapes=SHAPES) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]


def loss(params, t: int, k: int = 0) -> torch.Tensor:
    """A smooth function of each parameter that changes with step t and sample k."""
    return sum((1.3 * p + 0.1 * (t + k)).cos().mul(0.4 * i - 1).sum() for i, p in enumerate(params))


def run(params, style: str, steps: int = 2, **options) -> list[torch.Tensor]:
    """Means, averages of gradients and curvatures after some steps, and the samples seen."""
    settings = {"lr": 0.1, "ess": 50.0, "hess_init": 0.5, "betas": (0.9, 0.95)} | options
    optimizer, seen = blr.IVON(params, **settings), []
    if style == "train()":
        optimizer.train()
    for t in range(steps):
        if style == "contexts":
            for k in range(2 if t else 1):
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    loss(params, t, k).backward()
                    seen += [p.detach().clone() for p in params]
        else:
            optimizer.zero_grad()
            loss(params, t).backward()
            seen += [p.detach().clone() for p in params]
        optimizer.step()
    optimizer.eval()
    state = [optimizer.state[p][name] for p in params for name in ("momentum", "hess")]
    return seen + [p.detach() for p in params] + state


def fused(optimizer: blr.IVON) -> bool:
    """Whether the kernel does all of the work."""
    return all(isinstance(w, _launch.Fused) for w in optimizer._works(optimizer._free()))


def assert_as_exact(ours, eager, exact) -> None:
    """Errors of float32 arithmetic: against float64, at most four times those of plain torch."""
    for x, y, z in zip(ours, eager, exact, strict=True):
        error, usual = ((a.double() - z).abs().max() for a in (x, y))
        assert error <= 4 * usual + 4 * 2.0**-24 * z.abs().max(), (error, usual)


PRIOR = "a Gaussian for each parameter"
OPTIONS = [
    {},
    {"prior": PRIOR, "clip_radius": 0.3},
    {"prior": PRIOR, "rescale_lr": False, "debias": False, "lr": 0.02},
    {"clip_radius": 0.1, "weight_decay": 0.3, "seed": -7},
    {"betas": (0.0, 0.5), "weight_decay": 0.0, "seed": 1 << 40},
]


def equals_plain_torch_there(style, options) -> None:
    options = dict(options)
    size = sum(torch.Size(s).numel() for s in SHAPES)
    if options.get("prior") == PRIOR:
        precision = torch.linspace(1, 9, size, dtype=torch.float64)
        options["prior"] = blr.DiagonalGaussian.from_moments(precision.sin(), precision)
    assert fused(blr.IVON(start(), lr=0.1, ess=50.0))
    ours = run(start(), style, **options)
    eager = run(start(), style, **options, fused=False)
    exact = run([nn.Parameter(p.detach().double()) for p in start()], style, **options)
    assert_as_exact(ours, eager, exact)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("style", ["contexts", "train()"])
def test_the_kernel_equals_plain_torch_with_every_option(there, style, options):
    there(equals_plain_torch_there, style, options)


def short_types_there(dtype, style) -> None:
    ours = run(start(dtype), style)
    eager = run(start(dtype), style, fused=False)
    for x, y in zip(ours, eager, strict=True):
        if x.dtype == torch.float32:
            # A sample that is rounded to a neighbour has another gradient: bound what that does.
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
            assert (x - y).abs().mean() < 1e-4
        else:
            unit = torch.finfo(dtype).eps * y.float().abs()
            difference = (x.float() - y.float()).abs()
            assert (difference <= unit + 2 * torch.finfo(dtype).smallest_normal).all()
            assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("style", ["contexts", "train()"])
def test_parameters_of_16_bits_have_float32_state_and_round_as_plain_torch_does(
    there, dtype, style
):
    there(short_types_there, dtype, style)


def work_on(x: torch.Tensor, first: int) -> tuple[_launch.Fused, blr.IVON]:
    """Work on a vector whose first element has this global index, with σ = 1."""
    optimizer = blr.IVON([nn.Parameter(x)], lr=0.1, ess=1.0, weight_decay=0.25, hess_init=0.75)
    (p,), (group,) = optimizer.param_groups[0]["params"], optimizer.param_groups
    optimizer._works([p])
    piece = Slice((p,), (optimizer.state[p],), first, first + p.numel(), 0)
    optimizer._at = (0, 3)
    return _launch.Fused(((piece, group),)), optimizer


def noise_there(first: int, size: int) -> None:
    x = torch.zeros(size)
    work, optimizer = work_on(x, first)
    work.place(optimizer, fresh=True)
    name = optimizer._name(optimizer.param_groups[0], (0, 3))
    exact, cut = [], 1 << 33
    for a, b in ((first, min(first + size, cut)), (max(first, cut), first + size)):
        if a < b:
            exact.append(_noise.normal(a, b, name, x.device))
    exact = torch.cat(exact)
    # Integers are exact; then come roundings of a radius, which is at most √(2 log 2³²) = 6.7.
    assert (x - exact).abs().max() <= 2 * 2.0**-21
    assert (x == exact).float().mean() > 0.5


@pytest.mark.parametrize(
    ("first", "size"), [(0, 2048), (3, 2500), (1016, 1100), ((1 << 33) - 1500, 3000)]
)
def test_the_noise_inside_is_that_of_every_other_path(there, first, size):
    there(noise_there, first, size)


def shards_there() -> None:
    whole = torch.zeros(3001)
    parts = whole[:1237].clone(), whole[1237:].clone()
    for x, first in ((whole, 11), (parts[0], 11), (parts[1], 11 + 1237)):
        work, optimizer = work_on(x, first)
        work.place(optimizer, fresh=True)
    assert torch.equal(torch.cat(parts), whole) and whole.std() > 0.9


def test_uneven_shards_draw_their_own_slices_of_the_noise_bit_by_bit(there):
    there(shards_there)


def test_addresses_and_noise_reach_beyond_two_to_the_31():
    p, first = nn.Parameter(torch.zeros(64)), (1 << 33) - 24
    state = {"mean": torch.zeros(64)}
    piece = Slice((p,), (state,), first, first + 64, (1 << 31) + 8)
    (batch,) = _table.batches([(piece, {})], 2048, gradients=False)
    lines = batch.table(("parameter", "mean"))[0].tolist()
    assert [line[8:11] for line in lines] == [[24, first, 0], [40, 1 << 33, 1]]
    assert [high for _, high in batch.groups] == [0, 1]
    for line, skipped in zip(lines, (0, 24), strict=True):
        assert line[0] == p.data_ptr() + 4 * ((1 << 31) + 8 + skipped)
        assert line[2] == state["mean"].data_ptr() + 4 * ((1 << 31) + 8 + skipped)


@pytest.mark.parametrize(
    ("start", "first", "wide"), [(0, 0, 1), (16, 4, 1), (4, 0, 0), (0, 2, 0), (8, 1, 0)]
)
def test_four_elements_are_read_at_a_time_only_where_blocks_and_addresses_are_aligned(
    start, first, wide
):
    p = nn.Parameter(torch.zeros(64))
    assert p.data_ptr() % 16 == 0
    piece = Slice((p,), ({"mean": torch.zeros(64)},), start, start + 32, first)
    (batch,) = _table.batches([(piece, {})], 2048, gradients=False)
    assert batch.table(("parameter", "mean"))[0][0, -1] == wide


def layouts_there() -> None:
    x = torch.randn(6, 5, 7, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for options in ({}, {"fused": False}):
        p = nn.Parameter(x.clone(memory_format=torch.channels_last))
        optimizer = blr.IVON([p], lr=0.1, ess=50.0, betas=(0.9, 0.9), **options)
        optimizer.train()
        for gradient in (p.detach().sin(), p.detach().sin().contiguous()):
            p.grad = gradient.clone()
            optimizer.step()
        optimizer.eval()
        assert p.is_contiguous(memory_format=torch.channels_last)
        results.append([p.detach(), optimizer.state[p]["hess"]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    # State that lies otherwise, as after model.to(memory_format=…), follows its parameter.
    p.data = p.data.contiguous()
    optimizer = blr.IVON([p], lr=0.1, ess=50.0)
    optimizer.state[p]["hess"] = (
        torch.linspace(1, 2, p.numel()).view_as(p).contiguous(memory_format=torch.channels_last)
    )
    before = optimizer.state[p]["hess"].clone()
    with optimizer.sampled_params(train=True):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    hess = optimizer.state[p]["hess"]
    assert hess.stride() == p.stride()
    expected = before - 1e-5 * before + 0.5e-10 * before**2 / (before + 1e-4)
    torch.testing.assert_close(hess, expected, rtol=1e-6, atol=0)


def test_channels_last_and_gradients_that_lie_otherwise_are_worked_on_in_their_order(there):
    there(layouts_there)


# ---- the contract -------------------------------------------------------------------------------


def everything(optimizer) -> list[torch.Tensor]:
    state = [optimizer.state[p] for g in optimizer.param_groups for p in g["params"]]
    tensors = [p.detach() for g in optimizer.param_groups for p in g["params"]]
    tensors += [s[name] for s in state for name in ("momentum", "hess") if name in s]
    return [x.clone() for x in tensors]


def same(a, b) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def contexts_there() -> None:
    params = start()
    optimizer = blr.IVON(params, lr=0.1, ess=50.0)
    before = everything(optimizer)
    for train, error in ((False, None), (True, ValueError)):
        try:
            with optimizer.sampled_params(train=train):
                assert not any(torch.equal(p, m) for p, m in zip(params, before, strict=False))
                with optimizer.mean_params():
                    assert same(everything(optimizer), before)
                if error:
                    raise error
        except ValueError:
            pass
        assert same(everything(optimizer), before)


def test_contexts_hold_a_sample_and_restore_the_mean_bit_by_bit_whatever_happens(there):
    there(contexts_there)


def interrupt_there() -> None:
    params = [*start(), *start(torch.bfloat16, [(6,)])]  # of two types, so two launches
    optimizer = blr.IVON(params, lr=0.1, ess=50.0)
    before = everything(optimizer)
    assert fused(optimizer)
    kernels = _launch._kernels()
    step, launches = kernels.step, []

    class Interrupted:
        def __getitem__(self, grid):
            def launch(*args, **flags):
                launches.append(grid)
                if len(launches) == stop:
                    raise KeyboardInterrupt
                step[grid](*args, **flags)

            return launch

    # Before the first and before the second launch of the sample, and of the return to the mean.
    for stop in (1, 2, 3, 4, 1):
        for p in params[:2]:
            optimizer.state[p]["mean"].fill_(9.0)  # what may be there while parameters rest
        kernels.step, _ = Interrupted(), launches.clear()
        with pytest.raises(KeyboardInterrupt), optimizer.sampled_params():
            pass
        kernels.step = step
        optimizer._at = (1, 1)
        optimizer._rest()
        assert same(everything(optimizer), before), stop


def test_an_interrupt_before_any_launch_can_be_undone(there):
    there(interrupt_there)


def unused_there() -> None:
    results = []
    for options in ({}, {"fused": False}):
        params = start()
        params.append(nn.Parameter(torch.ones(6), requires_grad=False))
        params.append(nn.Parameter(torch.ones(4, 2, dtype=torch.float64)))
        optimizer = blr.IVON(
            [{"params": params[:1], "lr": 0.3, "ess": 20.0}, {"params": params[1:]}],
            lr=0.1, ess=50.0, **options,
        )  # fmt: skip
        optimizer.train()
        seen = []
        for _ in range(2):
            optimizer.zero_grad()
            (params[0].sin().sum() + params[3].cos().sum()).backward()
            optimizer.step()
            seen.append(params[1].detach().clone())
        optimizer.eval()
        assert not torch.equal(*seen), "an unused parameter holds the next sample too"
        results.append([*seen, *everything(optimizer)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert torch.equal(params[1], start()[1]) and torch.equal(params[2], torch.ones(6))


def test_groups_unused_frozen_and_float64_parameters_may_be_mixed(there):
    there(unused_there)


def not_finite_there(bad, capturable) -> None:
    params = start()
    optimizer = blr.IVON(params, lr=0.1, ess=50.0, capturable=capturable)
    optimizer.train()
    loss(params, 0).backward()
    optimizer.step()
    before = everything(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            params[1].grad.view(-1)[-1] = bad
            optimizer.step()
            assert same(everything(optimizer), before)
        assert optimizer.state_dict()["param_groups"][0]["step"] == 1
    assert sum(str(w.message).startswith("step() was skipped") for w in caught) == 1
    params[1].grad.fill_(1.0)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["step"] == 2
    assert not same(everything(optimizer), before)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_gradient_that_is_not_finite_leaves_all_untouched_and_is_told_once(
    there, bad, capturable
):
    there(not_finite_there, bad, capturable)


def resume_there(capturable) -> None:
    params = start()
    optimizer = blr.IVON(params, lr=0.1, ess=50.0, seed=4, capturable=capturable)
    optimizer.train()
    loss(params, 0).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert all(type(group["step"]) is int for group in saved["param_groups"])
    results = []
    for options in ({"capturable": capturable}, {}, {"fused": False}):
        again = [nn.Parameter(p.detach().clone()) for p in params]
        other = blr.IVON(again, lr=7.0, ess=1.0, **options)
        other.load_state_dict(copy.deepcopy(saved))
        assert other.param_groups[0]["capturable"] == options.get("capturable", False)
        assert fused(other) == options.get("fused", True)
        loss(again, 1).backward()
        other.step()
        other.eval()
        results.append(everything(other))
    optimizer.zero_grad()
    loss(params, 1).backward()
    optimizer.step()
    optimizer.eval()
    assert same(results[0], everything(optimizer))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("capturable", [False, True])
def test_training_resumes_bit_by_bit_and_on_any_other_path(there, capturable):
    there(resume_there, capturable)


# ---- recorded steps -----------------------------------------------------------------------------


def capturable_there(style) -> None:
    options = {"debias": True, "weight_decay": 0.2}
    ours = run(start(), style, steps=3, **options, lr=torch.tensor(0.1), capturable=True)
    eager = run(start(), style, steps=3, **options, fused=False)
    exact = run([nn.Parameter(p.detach().double()) for p in start()], style, steps=3, **options)
    assert_as_exact(ours, eager, exact)


@pytest.mark.parametrize("style", ["contexts", "train()"])
def test_step_rate_debiasing_and_noise_on_the_device_equal_those_of_plain_torch(there, style):
    there(capturable_there, style)


def prepared_there() -> None:
    params = start()
    lr = torch.tensor(0.25)
    optimizer = blr.IVON(params, lr=lr, ess=50.0, seed=-3, betas=(0.999, 0.9), capturable=True)
    (group,), at = optimizer.param_groups, (1, 5)
    (work,) = optimizer._works(params)
    (batch,) = work._batches(gradients=False)
    batch.groups[0] = group, 6
    for step in (0, 1, 1000, (1 << 40) + 5):
        group["step"] = torch.tensor(step)
        optimizer._at = at
        numbers, keys = _launch._scalars(optimizer, batch, 2, 1)
        expected = _noise.key(-3, step, 0, 2, 6) + _noise.key(-3, step + 1, *at, 6)
        assert keys[0].tolist() == list(expected)
        assert numbers[0, 9] == lr
        gathered = torch.tensor(1 / (1 - 0.999 ** (step + 1)), dtype=torch.float32)
        torch.testing.assert_close(numbers[0, 10], gathered, rtol=2e-7, atol=0)
    optimizer._at = None


def test_what_changes_with_the_step_is_made_on_the_device_bit_by_bit(there):
    there(prepared_there)


def recording_there() -> None:
    """Replays a step as a graph would: the same launches, with tensors where they were then."""
    params = start()
    optimizer = blr.IVON(params, lr=0.1, ess=50.0, capturable=True)
    optimizer.train()
    for p in params:
        p.grad = p.detach().sin()
    optimizer.step()
    _table._recording = lambda device: True
    try:
        elsewhere = [p.detach().cos() for p in params]
        for p, gradient in zip(params, elsewhere, strict=True):
            p.grad = gradient
        reference = copy.deepcopy(optimizer)
        (work,) = optimizer._works(params)
        (batch,) = work._batches(gradients=True)
        old = {name: x for name, (_, x) in batch.sent.items() if name not in ("numbers", "keys")}
        sent = {name: x.clone() for name, x in old.items()}
        optimizer.step()
        assert all(torch.equal(x, sent[name]) for name, x in old.items()), "eager steps read them"
        assert batch.sent["words"][1] is old["words"]
        assert {id(x) for _, x in batch.sent.values()} <= {id(x) for x in batch.kept}
        fresh = start()
        other = blr.IVON(fresh, lr=0.1, ess=50.0, capturable=True)
        with pytest.raises(RuntimeError, match="side stream before recording"):
            other.train()
    finally:
        _table._recording = lambda device: False
    theirs = [p for group in reference.param_groups for p in group["params"]]
    for p, gradient in zip(theirs, elsewhere, strict=True):
        p.grad = gradient.clone()
    reference.step()
    optimizer.eval()
    reference.eval()
    assert same(everything(optimizer), everything(reference))


def test_recording_sends_nothing_changes_addresses_by_launches_and_keeps_what_it_reads(there):
    there(recording_there)


# ---- compiled ahead of time ---------------------------------------------------------------------

FLAGS = dict.fromkeys(("HELD", "PRIOR", "UPDATE", "SEVERAL", "ADD", "SAMPLE", "GATED"), False)
TRAIN = {"HELD": True, "UPDATE": True, "SAMPLE": True}
# What is launched, and how many tensors it reads and writes.
LAUNCHES = {
    "train()": (TRAIN, 4, 4),
    "sample": ({"SAMPLE": True}, 2, 2),
    "rest": ({"HELD": True, "GATED": True}, 1, 1),
    "update": ({"UPDATE": True, "GATED": True}, 4, 3),
    "update with a prior": ({"UPDATE": True, "PRIOR": True}, 6, 3),
    "add a product": ({"ADD": True}, 4, 1),
    "update from several": ({"UPDATE": True, "SEVERAL": True}, 5, 3),
}
POINTERS = {"table": "*i64", "chunks": "*i32", "numbers": "*fp32", "keys": "*i32", "words": "*i64"}
POINTERS |= {"gate": "*i32", "mark": "*i32", "weight": "fp32"}


def assembled(kernel, constants, capability, **options):
    """Assembly (PTX) and machine code of a kernel, by the compiler and assembler of Triton."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: POINTERS.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    options |= {"enable_fp_fusion": True}
    asm = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
    assert len(asm["cubin"]) > 1000
    return asm["ptx"], asm["cubin"]


def wide(ptx: str, what: str, values: int = 4) -> int:
    """How many instructions load or store so many values of 32 bits at a time."""
    return len(re.findall(rf"{what}\.global[\w.:]*\.v{values}\.", ptx))


def instructions(cubin: bytes, where: Path) -> list[str]:
    """The names of the machine instructions."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    where.write_bytes(cubin)
    command = [str(tool), "-sass", str(where)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)", text)
    return [name for name in names if name != "NOP"]


@pytest.fixture(scope="module")
def kernels(needs):
    needs(find_spec("triton"), "install Triton: pip install triton")
    from blr.optim import _triton

    return _triton


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_launch_moves_each_tensor_once_128_bits_at_a_time(kernels, launch, capability):
    flags, reads, writes = LAUNCHES[launch]
    constants = FLAGS | flags | {"ROWS": _launch.ROWS, "P": kernels.tl.float32}
    constants |= {"G": kernels.tl.float32}
    ptx, _ = assembled(kernels.step, constants, capability, num_warps=_launch.WARPS)
    # A thread has four elements of the lower and four of the upper halves of blocks.
    assert (wide(ptx, "ld"), wide(ptx, "st")) == (2 * reads, 2 * writes)
    assert not re.search(r"(ld|st)\.local", ptx), "registers do not suffice"


def test_16_bits_are_read_and_written_four_at_a_time(kernels):
    constants = FLAGS | TRAIN | {"ROWS": _launch.ROWS}
    constants |= {"P": kernels.tl.bfloat16, "G": kernels.tl.bfloat16}
    ptx, _ = assembled(kernels.step, constants, 80, num_warps=_launch.WARPS)
    assert (wide(ptx, "ld"), wide(ptx, "ld", 2)) == (6, 2)
    assert (wide(ptx, "st"), wide(ptx, "st", 2)) == (6, 2)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_check_of_gradients_and_the_numbers_of_a_recorded_step_compile(kernels, capability):
    constants = {"G": kernels.tl.float32, "ROWS": _launch.ROWS}
    ptx, _ = assembled(kernels.finite, constants, capability, num_warps=_launch.WARPS)
    assert wide(ptx, "ld") == 2
    assembled(kernels.prepare, {}, capability, num_warps=1)


WHOLE_CHUNK = """
from blr.optim import _triton as k

tl = k.tl

@k.triton.jit
def whole_chunk(table, chunks, numbers, keys, P: tl.constexpr, ROWS: tl.constexpr):
    program = tl.program_id(0)
    row = table + tl.load(chunks + 2 * program) * k.COLUMNS
    group = tl.load(row + k.SET)
    pair, base, _ = k._place(row, tl.load(chunks + 2 * program + 1).to(tl.int64), ROWS)
    k._both(row, numbers + group * k.NUMBERS, keys + group * 6, base, pair.to(tl.uint32), 0.0,
            P, P, True, True, False, True, False, False, True, ROWS)
"""


def test_a_step_and_two_noises_have_fewer_instructions_than_one_philox_for_each(
    kernels, tmp_path, monkeypatch
):
    """On sm_90, static, for one element: two draws of `tl.randn` and the update have 405."""
    (tmp_path / "whole_chunk.py").write_text(WHOLE_CHUNK)
    monkeypatch.syspath_prepend(tmp_path)
    import whole_chunk  # type: ignore[import-not-found]

    constants = {"P": kernels.tl.float32, "ROWS": _launch.ROWS}
    _, cubin = assembled(whole_chunk.whole_chunk, constants, 90, num_warps=_launch.WARPS)
    assert 40 < len(instructions(cubin, tmp_path / "step.cubin")) / 8 < 140


# ---- at the door --------------------------------------------------------------------------------


def test_capturable_is_refused_where_nothing_can_be_recorded():
    model = nn.Linear(3, 2)
    with pytest.raises(
        ValueError, match=r"capturable=True is for .* got a tensor of torch\.float32"
    ):
        blr.IVON(model.parameters(), lr=0.1, ess=10, capturable=True)
    with pytest.raises(ValueError, match="got fused=False"):
        blr.IVON(model.parameters(), lr=0.1, ess=10, capturable=True, fused=False)
    with pytest.raises(TypeError, match="capturable must be True or False, got 1"):
        blr.IVON(model.parameters(), lr=0.1, ess=10, capturable=1)


def test_on_a_gpu_without_triton_fused_says_what_to_install_and_the_default_is_plain_torch(
    monkeypatch,
):
    missing = "Triton, which is not installed; run: pip install triton"
    monkeypatch.setattr(_launch, "DEVICES", {"meta"})
    monkeypatch.setattr(_launch, "lacking", lambda: missing)
    params = [nn.Parameter(torch.zeros(3, device="meta"))]
    group = {"params": params, "fused": True, "capturable": False, "lr": 0.1}
    with pytest.raises(RuntimeError, match=r"fused=True on a GPU needs Triton.* pip install"):
        _launch.check(group)
    _launch.check(group | {"fused": None})
    piece = Slice((params[0],), ({},), 0, 3, 0)
    jobs = [(piece, group | {"fused": None})]
    assert _launch.divide(jobs) == ([], jobs)
    monkeypatch.setattr(_launch, "lacking", lambda: "")
    (work,), left = _launch.divide(jobs)
    assert isinstance(work, _launch.Fused) and not left
    assert _launch.divide([(piece, group | {"fused": False})])[0] == []


def test_a_learning_rate_elsewhere_cannot_be_recorded(monkeypatch):
    monkeypatch.setattr(_launch, "DEVICES", {"meta"})
    params = [nn.Parameter(torch.zeros(3, device="meta"))]
    group = {"params": params, "fused": None, "capturable": True, "lr": torch.tensor(0.1)}
    with pytest.raises(ValueError, match="lr must be a float32 tensor on meta if capturable=True"):
        _launch.check(group)


def test_the_library_imports_triton_only_for_a_gpu():
    """Torch's own optimizers import it when they are built."""
    code = "import sys, torch, blr; assert 'triton' not in sys.modules;"
    code += "blr.IVON([torch.nn.Parameter(torch.zeros(3))], lr=1, ess=1).train();"
    code += "assert 'blr.optim._triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- memory -------------------------------------------------------------------------------------


def bytes_there() -> dict[str, float]:
    shape, result = (64, 1024), {}
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = blr.IVON([p], lr=0.1, ess=50.0)
        p.grad = torch.ones_like(p)
        optimizer.train()
        optimizer.step()
        tensors = [p, *(x for x in optimizer.state[p].values())]
        (work,) = optimizer._works([p])
        for batch in (b for some in work.known.values() for b in some):
            tensors += [batch.chunks, *(x for _, x in batch.sent.values())]
        result[str(dtype)] = sum(x.numel() * x.element_size() for x in tensors) / p.numel()
    return result


def test_the_state_takes_16_bytes_with_the_parameter_and_tables_next_to_nothing(there):
    measured = there(bytes_there)
    assert 16 <= measured["torch.float32"] < 16.05
    assert 14 <= measured["torch.bfloat16"] < 14.05


def test_a_mean_recovered_from_the_sample_drifts_no_more_than_updates_round_but_looks_change_it():
    """The choice of 16 bytes: the drift of 12 is harmless, but no context would leave the mean."""
    g = torch.Generator().manual_seed(0)
    draw = lambda scale: scale * torch.randn(1024, generator=g)  # noqa: E731
    kept = recovered = 0.02 * torch.randn(1024, generator=g)
    exact = kept.double()
    for step in range(10_000):
        noise = draw(1e-2)
        looked = (recovered + noise) - noise
        if not step:
            assert 0.1 < (looked != recovered).float().mean() < 0.5
        update = draw(1e-6)
        recovered, kept, exact = looked - update, kept - update, exact - update.double()
    drift, usual = ((x - exact).square().mean().sqrt().item() for x in (recovered, kept))
    assert usual < drift < 3 * usual < 3e-7


# ---- the benchmark ------------------------------------------------------------------------------


def test_the_benchmark_for_gpus_says_that_there_is_none_and_estimates_nothing(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--json", str(tmp_path / "gpu.json")]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "there is none here: nothing was measured" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_benchmark_counts_parameters_and_the_bytes_of_every_launch(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu  # type: ignore[import-not-found]

    sizes = [sum(torch.Size(s).numel() for s in shapes) for shapes in gpu.MODELS.values()]
    assert sizes == [124_439_808, 774_030_080, 25_557_032]
    moved = {name: 4 * (reads + writes) for name, (_, reads, writes) in LAUNCHES.items()}
    check = 4
    assert gpu.OPTIMIZERS["blr.IVON train(), launch alone"][1] == moved["train()"]
    assert gpu.OPTIMIZERS["blr.IVON train()"][1] == moved["train()"] + check
    contexts = moved["sample"] + moved["rest"] + moved["update"] + check
    assert gpu.OPTIMIZERS["blr.IVON contexts"][1] == contexts

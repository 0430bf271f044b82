"""Claims about checkpoints: training continues as if it had not stopped, on other processes too.

They are written and read by `torch.distributed.checkpoint`, as its users do. This file is also the
program of two processes, which write and read in a folder that they are given.
"""

import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_optim_distributed import (
    X,
    Y,
    assert_same,
    learn,
    loss_of,
    make,
    mine,
    network,
    shard,
    torchrun,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel as DDP

import blr

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

STYLES = ("contexts", "train()")


def save(model, optimizer, path: Path, options: StateDictOptions | None = None) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)


def load(model, optimizer, path: Path, options: StateDictOptions | None = None) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
        options=options,
    )


def other(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A network with other weights."""
    model = network(dtype)
    for p in model.parameters():
        nn.init.constant_(p, 0.3)
    return model


def uninterrupted(style: str) -> tuple[nn.Module, blr.IVON]:
    model = network()
    optimizer = make(model)
    learn(model, optimizer, X, Y, style, steps=6)
    optimizer.eval()
    return model, optimizer


def bits(model, optimizer) -> list[torch.Tensor]:
    state = [x for p in model.parameters() for x in optimizer.state[p].values()]
    return [x.detach().clone() for x in (*model.parameters(), *state)]


# ---- in one process ----------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("when", ["eval()", "mean_params()", "as it is"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_continues_to_the_bit(style, when, flat, dtype, tmp_path):
    x, y = X.to(dtype), Y.to(dtype)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    one, model, resumed = network(dtype), network(dtype), other(dtype)
    expected, optimizer = make(one), make(model)
    fresh = make(resumed, lr=0.9, ess=7, seed=5)
    learn(one, expected, x, y, style, steps=6)
    learn(model, optimizer, x, y, style, steps=3)
    if when == "eval()":
        optimizer.eval()
    if when == "mean_params()":
        with optimizer.mean_params():
            save(model, optimizer, tmp_path, options)
    else:
        save(model, optimizer, tmp_path, options)
    if when == "as it is" and style == "train()":
        fresh.train()
    load(resumed, fresh, tmp_path, options)
    if when != "as it is":
        assert not fresh.training
    learn(resumed, fresh, x, y, style, steps=3)
    for o in (expected, fresh):
        o.eval()
    pairs = itertools.zip_longest(bits(one, expected), bits(resumed, fresh))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert fresh.param_groups[0]["step"] == 6 and fresh.param_groups[0]["seed"] == 0


def test_the_model_that_is_saved_at_rest_is_the_mean(tmp_path):
    model = network()
    optimizer = make(model)
    learn(model, optimizer, X, Y, "train()", steps=3)
    with optimizer.mean_params():
        save(model, optimizer, tmp_path)
        state, _ = get_state_dict(network(), ())
        dcp.load({"model": state}, checkpoint_id=tmp_path)
    optimizer.eval()
    assert all(torch.equal(x, p) for x, p in zip(state.values(), model.parameters(), strict=True))


def test_a_sample_without_its_mean_is_refused(tmp_path):
    """A fresh optimizer has no place for means, so they are not read; the model has the sample."""
    model, resumed = network(), other()
    optimizer, fresh = make(model), make(resumed)
    learn(model, optimizer, X, Y, "train()", steps=3)
    save(model, optimizer, tmp_path)
    with pytest.raises(ValueError, match=r"held a sample.*mean_params\(\).*optimizer.train\(\)"):
        load(resumed, fresh, tmp_path)


def test_what_was_saved_at_rest_does_not_learn_at_the_mean():
    """It must be told to train() again; it never takes the mean for a sample."""
    model, resumed = network(), network()
    optimizer, fresh = make(model), make(resumed)
    learn(model, optimizer, X, Y, "train()", steps=2)
    with optimizer.mean_params():
        resumed.load_state_dict(model.state_dict())
        state = optimizer.state_dict()
    assert optimizer.training
    fresh.load_state_dict(state)
    loss_of(resumed).backward()
    with pytest.raises(RuntimeError, match="no sample at which they were computed"):
        fresh.step()


def test_a_gathered_checkpoint_is_an_ordinary_one():
    """`full_state_dict` gives names and whole tensors, which one process loads as it is."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    one, expected = uninterrupted("contexts")
    model, resumed = network(), other()
    optimizer, fresh = make(model), make(resumed)
    learn(model, optimizer, X, Y, steps=3)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    set_state_dict(
        resumed,
        fresh,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
        options=options,
    )
    learn(resumed, fresh, X, Y, steps=3)
    assert_same(resumed, fresh, one, expected, tolerance=0.0)


# ---- from two processes to one, and back -------------------------------------------------------

ENGINES = {"ddp": DDP, "fsdp2": shard}


def two_processes(folder: Path) -> None:
    """Writes checkpoints of two processes and continues those of one."""
    for engine, style in itertools.product(ENGINES, STYLES):
        model = ENGINES[engine](network())
        optimizer = make(model)
        learn(model, optimizer, *mine(), style, steps=3)
        with optimizer.mean_params():
            save(model, optimizer, folder / f"{engine} {style}")
        save(model, optimizer, folder / f"{engine} {style} as it is")
    sources = ("one", *ENGINES)
    for source, engine, style in itertools.product(sources, ENGINES, STYLES):
        one, expected = uninterrupted(style)
        model = ENGINES[engine](other())
        optimizer = make(model, lr=0.9)
        load(model, optimizer, folder / f"{source} {style}")
        learn(model, optimizer, *mine(), style, steps=3)
        assert_same(model, optimizer, one, expected)
    print("continued", flush=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints by one process and by two, each after three steps."""
    path = tmp_path_factory.mktemp("checkpoints")
    for style in STYLES:
        model = network()
        optimizer = make(model)
        learn(model, optimizer, X, Y, style, steps=3)
        with optimizer.mean_params():
            save(model, optimizer, path / f"one {style}")
    output, errors = torchrun(__file__, str(path))
    (path / "said").write_text(output + errors[-4000:])
    return path


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("when", ["at rest", "as it is"])
def test_one_process_continues_the_checkpoint_of_two(engine, style, when, folder):
    one, expected = uninterrupted(style)
    model = other()
    optimizer = make(model, lr=0.9)
    if when == "as it is" and style == "train()":
        optimizer.train()
    load(model, optimizer, folder / f"{engine} {style}{' as it is' * (when == 'as it is')}")
    learn(model, optimizer, X, Y, style, steps=3)
    assert_same(model, optimizer, one, expected)


def test_two_processes_continue_the_checkpoints_of_one_and_of_each_other(folder):
    said = (folder / "said").read_text()
    assert said.count("continued") == 2, said


if __name__ == "__main__":
    dist.init_process_group("gloo")
    two_processes(Path(sys.argv[1]))
    dist.destroy_process_group()

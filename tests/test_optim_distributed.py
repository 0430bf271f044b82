"""Claims about many processes: the result is that of one, on engines of torch, with no option.

This file is also the program of each of two processes, which check the claims one after the other
and say which hold; the tests read what was said.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import blr
from blr.optim import per_rank_noise

X = torch.linspace(-2, 2, 24).reshape(12, 2)
Y = (X[:, :1] * X[:, 1:]).sin()


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def make(model: nn.Module, **options) -> blr.IVON:
    settings = {"lr": 0.2, "ess": 100, "hess_init": 0.5, "betas": (0.9, 0.99)} | options
    return blr.IVON(model.parameters(), **settings)


def shard(model: nn.Sequential, mesh=None, **options) -> nn.Sequential:
    """5 rows and 1 row on two processes: uneven."""
    mesh = mesh or init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def loss_of(model: nn.Module, x: torch.Tensor = X, y: torch.Tensor = Y) -> torch.Tensor:
    return (model(x) - y).square().mean()


def mine() -> tuple[torch.Tensor, torch.Tensor]:
    """The examples of this process."""
    return X[dist.get_rank() :: 2], Y[dist.get_rank() :: 2]


def learn(model, optimizer, x, y, style="contexts", steps=5, samples=2, clip=0.3) -> None:
    """An ordinary loop; in `contexts` with several samples for each step."""
    if style == "train()":
        optimizer.train()
    for _ in range(steps):
        for _ in range(samples if style == "contexts" else 1):
            if style == "contexts":
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    loss_of(model, x, y).backward()
            else:
                optimizer.zero_grad()
                loss_of(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x.detach()


def assert_same(model, optimizer, reference, expected, tolerance=1e-6) -> None:
    """Means, curvatures and averages of gradients are equal."""
    optimizer.eval()
    expected.eval()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(p), whole(q), rtol=0, atol=tolerance)
        for name in ("hess", "momentum"):
            ours, theirs = (whole(o.state[r][name]) for o, r in ((optimizer, p), (expected, q)))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def assert_replicas_are_equal(model, optimizer) -> None:
    """To the bit."""
    optimizer.eval()
    for p in model.parameters():
        for x in (p.detach(), optimizer.state[p]["hess"], optimizer.state[p]["momentum"]):
            both = [torch.empty_like(x), torch.empty_like(x)]
            dist.all_gather(both, x)
            assert torch.equal(*both)


def torchrun(file: str, *arguments: str) -> tuple[str, str]:
    """What two processes of this program write, once both are done."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, file, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.stdout, done.stderr


# ---- one process and two -----------------------------------------------------------------------


def two_processes_equal_one_by_ddp_and_by_fsdp2_with_uneven_shards():
    for style in ("contexts", "train()"):
        one = network()
        expected = make(one)
        learn(one, expected, X, Y, style)
        for model in (DDP(network()), shard(network())):
            optimizer = make(model)
            learn(model, optimizer, *mine(), style)
            assert_same(model, optimizer, one, expected)


def replicas_of_shards_equal_one():
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        one, model = network(), shard(network(), mesh)
        expected, optimizer = make(one), make(model)
        learn(one, expected, X, Y)
        learn(model, optimizer, *mine())
        assert_same(model, optimizer, one, expected)


def ddp_may_keep_gradients_in_its_buckets():
    one, model = network(), DDP(network(), gradient_as_bucket_view=True)
    expected, optimizer = make(one), make(model)
    learn(one, expected, X, Y, samples=3)
    learn(model, optimizer, *mine(), samples=3)
    assert_same(model, optimizer, one, expected)
    with optimizer.sampled_params(train=True):
        optimizer.zero_grad()
        loss_of(model).backward()
    fresh = DDP(network(), gradient_as_bucket_view=True)
    optimizer = make(fresh)
    with pytest.raises(RuntimeError, match=r"buckets of DDP.*optimizer.zero_grad\(\)"):
        for _ in range(2):  # whether they add up or are averaged cannot be seen
            with optimizer.sampled_params(train=True):
                loss_of(fresh).backward()


def micro_batches_that_are_averaged_once_equal_the_batch():
    """Accumulation under no_sync: one sample for all micro-batches of a step."""
    for style in ("contexts", "train()"):
        one = network()
        expected = make(one)
        learn(one, expected, X, Y, style, samples=1)
        for model in (DDP(network()), shard(network())):
            optimizer = make(model)
            if style == "train()":
                optimizer.train()
            for _ in range(5):
                optimizer.zero_grad()
                if style == "train()":
                    accumulate(model)
                else:
                    with optimizer.sampled_params(train=True):
                        accumulate(model)
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
            assert_same(model, optimizer, one, expected)


def accumulate(model: nn.Module) -> None:
    """Three micro-batches, of which the last one averages."""
    parts = list(zip(*(t.split(2) for t in mine()), strict=True))
    for i, (x, y) in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(model, DDP):
            model.require_backward_grad_sync = last
        else:
            model.set_requires_gradient_sync(last)
        (loss_of(model, x, y) / len(parts)).backward()


def fsdp2_forgets_whole_weights_when_samples_come_and_go():
    """Its outermost module keeps them after a forward pass without gradients."""
    one, model = network(), network()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    expected, optimizer = make(one), make(model)
    for o in (expected, optimizer):
        o.step()
    with torch.no_grad():
        resting = model(X).clone()
        with optimizer.sampled_params(), expected.sampled_params():
            assert (model(X) - resting).abs().max() > 1e-3
            torch.testing.assert_close(model(X), one(X))
        torch.testing.assert_close(model(X), resting)
    model.set_reshard_after_backward(False)
    learn(one, expected, X, Y, samples=3)
    learn(model, optimizer, *mine(), samples=3)
    with torch.no_grad():
        torch.testing.assert_close(model(X), one(X))
    model.reshard()
    assert_same(model, optimizer, one, expected)


def fsdp2_may_compute_in_sixteen_bits():
    """Weights, means and curvatures stay in float32; the difference is that of the gradients."""
    one = network()
    model = shard(network(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    expected, optimizer = make(one), make(model)
    learn(one, expected, X, Y)
    learn(model, optimizer, *mine())
    assert {x.dtype for state in optimizer.state.values() for x in state.values()} == {torch.float}
    assert_same(model, optimizer, one, expected, tolerance=0.05)


def a_gradient_that_is_not_finite_in_one_shard_is_not_a_step_in_any():
    model = shard(network())
    optimizer = make(model)
    for samples in (1, 2):
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                loss_of(model).backward()
            if dist.get_rank() == 0:
                model[0].weight.grad.to_local().fill_(torch.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        assert optimizer.param_groups[0]["step"] == 0
        optimizer.zero_grad()
    # A sample that overflowed in one shard is forgotten by all: the next one takes its number.
    reference = shard(network())
    expected = make(reference)
    for number in range(2):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            loss_of(model).backward()
        if dist.get_rank() == 0 and number == 0:
            model[0].weight.grad.to_local().fill_(torch.inf)
    optimizer.step()
    learn(reference, expected, X, Y, steps=1, samples=1, clip=torch.inf)
    assert_same(model, optimizer, reference, expected, tolerance=0.0)


# ---- noise that differs ------------------------------------------------------------------------

CURVATURE = torch.linspace(0.5, 2.0, 20_000)


class Quadratic(nn.Module):
    """½ Σ h(θ − b)², whose curvature is h everywhere."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(20_000))

    def forward(self, shift: float) -> torch.Tensor:
        return 0.5 * (CURVATURE * (self.theta - shift).square()).sum()


def curvature(own: bool = False, seed: int = 0, guard: bool = True) -> float:
    """The average of h/(its true value) at m = 0, where ranks have b = 1 and b = −1; ρ = 0.02."""
    model = DDP(Quadratic())
    optimizer = make(model, lr=0.0, ess=10, betas=(0.9, 0.98), weight_decay=0.0, seed=seed)
    if own:
        per_rank_noise(optimizer, model)
    state = optimizer.state[model.module.theta]
    state["hess"].copy_(CURVATURE)
    if not guard:
        optimizer._agreement.due = lambda: False
    total = 0.0
    for step in range(350):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            model((-1.0) ** dist.get_rank()).backward()
        optimizer.step()
        if step >= 250:
            total += (state["hess"] / CURVATURE).mean().item() / 100
    if guard:
        assert_replicas_are_equal(model, optimizer)
    return total


def noise_of_their_own_gives_the_right_curvature():
    """The retraction adds ½ρ var(ĥ)/h to h; the standard error is 0.4/√(20000·2) at most.

    Shared: ĥ = hε², with variance 2h². Of their own: the mean of h(εᵣ² ± εᵣ√(Nh)) over two ranks,
    with variance (2 + Nh)h²/2. Averaged gradients with the noise of one rank: h(ε₁² + ε₁ε₂)/2, with
    mean h/2 and variance ¾h². Nh is 12.5 on average.
    """
    assert abs(curvature() - 1.02) < 0.01
    assert abs(curvature(own=True) - (1 + 0.01 * (2 + 12.5) / 2)) < 0.01
    assert abs(curvature(seed=dist.get_rank(), guard=False) - 0.5 * (1 + 0.01 * 3)) < 0.01


def noise_of_their_own_averages_products_of_ranks_and_of_samples():
    """Two processes with one sample each are one process with those two samples."""
    for samples in (1, 2):
        model, one = DDP(network(torch.float64)), network(torch.float64)
        optimizer, expected = make(model), make(one)
        per_rank_noise(optimizer, model)
        for _ in range(4):
            total = 0.0
            for _ in range(samples):
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    loss_of(model, *(t.double() for t in mine())).backward()
                    theirs = [[torch.empty_like(p) for _ in range(2)] for p in one.parameters()]
                    for both, p in zip(theirs, model.parameters(), strict=True):
                        dist.all_gather(both, p.detach())
                # The same samples, in one process: products by hand.
                for rank in range(2):
                    means = [p.detach().clone() for p in one.parameters()]
                    with torch.no_grad():
                        for p, both in zip(one.parameters(), theirs, strict=True):
                            p.copy_(both[rank])
                    one.zero_grad()
                    loss_of(one, X[rank::2].double(), Y[rank::2].double()).backward()
                    total = total + torch.cat(
                        [
                            torch.stack([p.grad, p.grad * (p.detach() - m)]).flatten(1)
                            for p, m in zip(one.parameters(), means, strict=True)
                        ],
                        1,
                    )
                    with torch.no_grad():
                        for p, m in zip(one.parameters(), means, strict=True):
                            p.copy_(m)
            total = total / (2 * samples)
            with expected.sampled_params(train=True):
                pass
            sizes = [p.numel() for p in one.parameters()]
            parts = zip(one.parameters(), total.split(sizes, 1), strict=True)
            for p, (g, product) in parts:
                p.grad = g.reshape(p.shape)
                expected.state[p]["product"] = product.reshape(p.shape)
            expected._samples.count = 2
            expected.step()
            optimizer.step()
        assert_replicas_are_equal(model, optimizer)
        assert_same(model, optimizer, one, expected, tolerance=1e-12)


def noise_of_their_own_survives_scaling_clipping_and_accumulation():
    for style in ("contexts", "train()"):
        results = []
        for change in ("nothing", "scaled", "scaled and accumulated"):
            model = DDP(network(torch.float64))
            optimizer = make(model)
            per_rank_noise(optimizer, model)
            scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=change != "nothing")
            if style == "train()":
                optimizer.train()
            x, y = (t.double() for t in mine())
            for _ in range(4):
                optimizer.zero_grad()
                with optimizer.sampled_params(train=True) if style == "contexts" else nothing():
                    if "accumulated" in change:
                        with model.no_sync():
                            for i in (slice(0, 2), slice(2, 4)):
                                (scaler.scale(loss_of(model, x[i], y[i])) / 3).backward()
                        (scaler.scale(loss_of(model, x[4:], y[4:])) / 3).backward()
                    else:
                        scaler.scale(loss_of(model, x, y)).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                scaler.step(optimizer)
                scaler.update()
            assert_replicas_are_equal(model, optimizer)
            results.append((model, optimizer))
        for model, optimizer in results[1:]:
            assert_same(model, optimizer, *results[0], tolerance=1e-12)


def nothing():
    return warnings.catch_warnings()


def noise_of_their_own_without_its_average_is_refused():
    model = DDP(network())
    optimizer = make(model)
    per_rank_noise(optimizer, model)
    with pytest.raises(RuntimeError, match=r"did not average.*no_sync\(\)"):
        with optimizer.sampled_params(train=True), model.no_sync():
            loss_of(model).backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"second backward.*optimizer.zero_grad\(\)"):
        with optimizer.sampled_params(train=True):
            loss_of(model).backward()
            loss_of(model).backward()


def noise_of_their_own_forgets_what_is_cleared_or_fails():
    """A pass that is cleared counts for nothing, and nor does a sample that raised."""
    results = []
    for trouble in (False, True):
        model = DDP(network(torch.float64))
        optimizer = make(model)
        per_rank_noise(optimizer, model)
        x, y = (t.double() for t in mine())
        for _ in range(3):
            for _ in range(2):
                with optimizer.sampled_params(train=True):
                    if trouble:
                        optimizer.zero_grad()
                        loss_of(model, y.repeat(1, 2), y).backward()
                    optimizer.zero_grad()
                    loss_of(model, x, y).backward()
                if trouble:
                    with pytest.raises(KeyError), optimizer.sampled_params(train=True):
                        optimizer.zero_grad()
                        loss_of(model, y.repeat(1, 2), y).backward()
                        raise KeyError
            optimizer.step()
        results.append((model, optimizer))
    assert_same(*results[0], *results[1], tolerance=1e-14)
    assert_replicas_are_equal(*results[1])


def noise_of_their_own_is_refused_where_it_cannot_be():
    with pytest.raises(TypeError, match=r"model must be DistributedDataParallel.*one sample"):
        model = shard(network())
        per_rank_noise(make(model), model)
    model = DDP(network())
    with pytest.raises(TypeError, match=r"optimizer must be a blr\.IVON, got VOGN"):
        per_rank_noise(blr.VOGN(model.parameters(), lr=0.1, ess=10), model)
    with pytest.raises(TypeError, match=r"32 bits or more, got torch\.bfloat16"):
        short = DDP(network(torch.bfloat16))
        per_rank_noise(make(short), short)
    with pytest.raises(RuntimeError, match=r"per_rank_noise\(\) was called after train\(\)"):
        optimizer = make(model)
        optimizer.train()
        per_rank_noise(optimizer, model)


# ---- what would be wrong in silence ------------------------------------------------------------


def raised(message: str, act: Callable[[], object]) -> None:
    """The later one of the two ranks raises; the other could not know yet."""
    error = ""
    try:
        act()
    except RuntimeError as e:
        error = str(e)
    both: list = [None, None]
    dist.all_gather_object(both, error)
    assert any(message in e for e in both), both


def different_noise_with_averaged_gradients_raises():
    rank = dist.get_rank()
    for options in ({"seed": rank}, {"hess_init": 0.5 + rank}, {"weight_decay": 0.1 * rank}):
        for style in ("contexts", "train()"):
            model = DDP(network())
            optimizer = make(model, **options)
            raised(
                "the gradients of different samples were averaged",
                lambda m=model, o=optimizer, s=style: learn(m, o, *mine(), s, steps=1),
            )
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = shard(network(), mesh)
    optimizer = make(model, seed=rank)
    raised(
        "the gradients of different samples were averaged",
        lambda: learn(model, optimizer, *mine(), steps=1),
    )


def a_rank_that_loads_alone_is_found_out():
    model = DDP(network())
    optimizer = make(model)
    before = optimizer.state_dict()
    learn(model, optimizer, *mine(), steps=2)
    if dist.get_rank() == 0:
        optimizer.load_state_dict(before)
    raised(
        "the gradients of different samples were averaged",
        lambda: learn(model, optimizer, *mine(), steps=2),
    )


def samples_of_which_some_are_averaged_raise():
    model = DDP(network())
    optimizer = make(model)

    def act() -> None:
        x, y = mine()
        with model.no_sync(), optimizer.sampled_params(train=True):
            loss_of(model, x, y).backward()
        with optimizer.sampled_params(train=True):
            loss_of(model, x, y).backward()
        optimizer.step()

    raised("of some samples of this step were averaged", act)


def ranks_that_train_models_of_their_own_are_left_alone():
    for options in ({"seed": dist.get_rank()}, {"lr": 0.1 + dist.get_rank()}, {}):
        for data in (mine(), (X, Y)):
            model = network()
            learn(model, make(model, **options), *data, steps=5)
    if dist.get_rank() == 0:  # nobody waits for the other rank
        model = network()
        learn(model, make(model), X, Y, "train()", steps=5)


def engines_that_do_not_fit_say_so():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    flattened = network()
    flattened[0].weight._fsdp_flattened = True  # as FullyShardedDataParallel marks its shards
    with pytest.raises(TypeError, match=r"fully_shard \(FSDP2\)"):
        make(flattened)
    # Each rank of ZeRO has the curvature of some tensors only, so no rank could make a sample.
    model = DDP(network())
    parted = ZeroRedundancyOptimizer(model.parameters(), blr.IVON, lr=0.1, ess=100)
    with pytest.raises(AttributeError):
        parted.sampled_params(train=True)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="no sample at which they were computed"):
        parted.step()


CLAIMS = (
    two_processes_equal_one_by_ddp_and_by_fsdp2_with_uneven_shards,
    replicas_of_shards_equal_one,
    ddp_may_keep_gradients_in_its_buckets,
    micro_batches_that_are_averaged_once_equal_the_batch,
    fsdp2_forgets_whole_weights_when_samples_come_and_go,
    fsdp2_may_compute_in_sixteen_bits,
    a_gradient_that_is_not_finite_in_one_shard_is_not_a_step_in_any,
    noise_of_their_own_gives_the_right_curvature,
    noise_of_their_own_averages_products_of_ranks_and_of_samples,
    noise_of_their_own_survives_scaling_clipping_and_accumulation,
    noise_of_their_own_without_its_average_is_refused,
    noise_of_their_own_forgets_what_is_cleared_or_fails,
    noise_of_their_own_is_refused_where_it_cannot_be,
    different_noise_with_averaged_gradients_raises,
    a_rank_that_loads_alone_is_found_out,
    samples_of_which_some_are_averaged_raise,
    engines_that_do_not_fit_say_so,
    ranks_that_train_models_of_their_own_are_left_alone,
)


@pytest.fixture(scope="module")
def said() -> tuple[str, str]:
    return torchrun(__file__)


@pytest.mark.parametrize("claim", [claim.__name__ for claim in CLAIMS])
def test_in_two_processes(claim, said):
    output, errors = said
    assert output.count(f"{claim} holds") == 2, errors[-4000:]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for claim in CLAIMS:
        if len(sys.argv) < 2 or sys.argv[1] in claim.__name__:
            claim()
            print(f"{claim.__name__} holds", flush=True)
    dist.destroy_process_group()

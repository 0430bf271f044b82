"""Claims about many processes: the result is that of one, on engines of torch, with no option."""

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch import nn

import blr

X = torch.linspace(-2, 2, 24).reshape(12, 2)
Y = (X[:, :1] * X[:, 1:]).sin()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))


def trained(model: nn.Module, x: torch.Tensor, y: torch.Tensor, style: str) -> blr.IVON:
    optimizer = blr.IVON(model.parameters(), lr=0.2, ess=100, hess_init=0.5, betas=(0.9, 0.99))
    if style == "train()":
        optimizer.train()
    for _ in range(5):
        for _ in range(2 if style == "contexts" else 1):
            if style == "contexts":
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    (model(x) - y).square().mean().backward()
            else:
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    optimizer.eval()
    return optimizer


def compare(style: str) -> None:
    """Runs in each of two processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    x, y = X[rank::2], Y[rank::2]
    one = network()
    expected = trained(one, X, Y, style)
    replica = DistributedDataParallel(network())
    ddp = trained(replica, x, y, style)
    sharded = network()
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer, mesh=mesh)  # 5 rows and 1 row on two processes: uneven
    fully_shard(sharded, mesh=mesh)
    fsdp = trained(sharded, x, y, style)
    for p, q, r in zip(one.parameters(), replica.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-6)
        torch.testing.assert_close(r.full_tensor(), p, rtol=0, atol=1e-6)
        h = expected.state[p]["hess"]
        torch.testing.assert_close(ddp.state[q]["hess"], h, rtol=0, atol=1e-6)
        torch.testing.assert_close(fsdp.state[r]["hess"].full_tensor(), h, rtol=0, atol=1e-6)


def skip_together() -> None:
    """A gradient that is not finite in one shard is not a step in any."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = blr.IVON(model.parameters(), lr=0.2, ess=100)
    with optimizer.sampled_params(train=True):
        (model(X) - Y).square().mean().backward()
    if dist.get_rank() == 0:
        model[0].weight.grad.to_local().fill_(torch.nan)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 0


def test_two_processes_equal_one():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node=2", __file__],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("as one") == 2


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for style in ("contexts", "train()"):
        compare(style)
    skip_together()
    print("as one", flush=True)
    dist.destroy_process_group()

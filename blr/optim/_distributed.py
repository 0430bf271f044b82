"""Many processes: noise of their own for the ranks of DDP, and what must not happen in silence.

    ĝ = mean over ranks of gᵣ      product = mean over ranks of gᵣ(θᵣ − m), not ĝ(θᵣ − m)

By default all ranks make the same noise, because it is a function of seed, step and place, and DDP
and FSDP2 need nothing from here. If the ranks of DDP are to make noise of their own, the products
must be averaged as the gradients are: that of an averaged gradient with the noise of one rank is
h/R on average, and another on each rank, so that replicas drift apart without a word. The first is
`per_rank_noise`; the second is what `Agreement` finds out.

References: Li et al. (2020), PyTorch distributed: experiences on accelerating data parallel
training.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future, collect_all
from torch.nn import Module

from blr.optim._pieces import States, local, sharded
from blr.optim._state import short
from blr.optim._work import TRAINING

NOT_AVERAGED = (
    "per_rank_noise found a gradient that DDP did not average with its noise; with no_sync(), put "
    "all micro-batches of a step into one sample, the last of them outside of no_sync(), and give "
    "the optimizer only parameters of the model"
)
AVERAGED_TWICE = (
    "per_rank_noise met a second backward pass that averages gradients of the same sample; call "
    "optimizer.zero_grad() before it, or accumulate under no_sync() and average in the last pass"
)
SAMPLES_DIFFER = (
    "the gradients of different samples were averaged: this rank ({}) and another have the same "
    "gradients but other parameters, so curvature is divided by the number of ranks and replicas "
    "drift apart; give all ranks the same seed, options, weights and state, or ask for noise of "
    "their own by blr.optim.per_rank_noise(optimizer, ddp_model)"
)
SOME_AVERAGED = (
    "the gradients of some samples of this step were averaged over the ranks and those of others "
    "were not; with no_sync(), put all micro-batches of a step into one sampled_params(train=True)"
)

_RUNS = itertools.count()


def per_rank_noise(optimizer: Any, model: Module) -> None:
    """Let each rank of DDP learn from a sample of its own: R samples for the price of one.

    Call it once, after both are made and before the first backward pass. A communication hook then
    averages the products of gradients with noise beside the gradients, in the same buckets, which
    doubles the bytes that are sent. Rank 0 has the noise that all have otherwise, so the result
    depends on the number of processes. It is not part of a checkpoint: call it again after
    resuming. Several samples between steps work as on one rank; accumulation under `no_sync()`
    belongs into one sample. Gradients may be scaled and clipped by their norm.

    Args:
        optimizer: A `blr.IVON` over parameters of the model, at rest.
        model: The `DistributedDataParallel` model, which has no other communication hook.

    Raises:
        TypeError: If the optimizer's products do not average so; if the model is not DDP: with
            FSDP2 all ranks gather one sample, of which each holds a part; or if parameters have
            16 bits.
        RuntimeError: If the parameters hold a sample; later, from a backward pass, context or
            step, if gradients were averaged without their noise, or twice.
    """
    from torch.nn.parallel import DistributedDataParallel

    from blr.optim.ivon import IVON

    if not isinstance(optimizer, IVON):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be a blr.IVON, got {kind}; others share their noise")
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"model must be DistributedDataParallel, got {type(model).__name__}; with fully_shard "
            "the ranks gather one sample, of which each holds a part, so they share their noise"
        )
    few = {str(p.dtype) for p in optimizer._free() if short(p.dtype)}
    if few:
        raise TypeError(
            f"per_rank_noise needs parameters of 32 bits or more, got {', '.join(few)}; keep them "
            "in float32 and use autocast"
        )
    optimizer._outside("per_rank_noise()")
    if optimizer.training:
        raise RuntimeError("per_rank_noise() was called after train(); call it before")
    averaging = optimizer._averaging or Averaging()
    model.register_comm_hook(Hook(optimizer, averaging, model.process_group), _send)
    optimizer._averaging, optimizer._rank = averaging, dist.get_rank(model.process_group)


class Averaging:
    """Products that were averaged over ranks, each with the norm of its averaged gradient."""

    def __init__(self) -> None:
        self._products: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._earlier = self._products

    def receive(self, p: Tensor, product: Tensor, norm: Tensor) -> None:
        """A product of the sample that is held now."""
        self._products[p] = product, norm

    def known(self, p: Tensor) -> bool:
        """Whether a product has come since the sample was drawn, or the gradients cleared."""
        return p in self._products

    def clear(self) -> None:
        """Forget what has come."""
        self._products = {}

    def begin(self) -> None:
        """A context opens."""
        self._earlier, self._products = self._products, {}

    def abandon(self) -> None:
        """The context failed: as if it had not been opened."""
        self._products = self._earlier

    def check(self, parameters: Iterable[Tensor]) -> None:
        """Refuse gradients that were not averaged with their noise.

        Raises:
            RuntimeError: If there is one.
        """
        for p in parameters:
            if p.grad is not None and p not in self._products and bool(p.grad.any()):
                raise RuntimeError(NOT_AVERAGED)

    def add(self, parameters: Iterable[Tensor], states: States, weight: float) -> None:
        """Add the products to those of earlier samples, scaled as the gradients were since."""
        for p in parameters:
            if p in self._products:
                assert p.grad is not None
                product, norm = self._products[p]
                scale = torch.where(norm > 0, p.grad.norm() / norm, 1.0)
                states[p]["product"].add_(product * scale, alpha=weight)

    def fill(self, parameters: Iterable[Tensor], states: States) -> None:
        """The products of the only sample."""
        for p in parameters:
            states[p]["product"] = torch.zeros_like(states[p]["mean"])
        self.add(parameters, states, 1.0)


class Hook:
    """A communication hook of DDP: averages g and g(θ − m), bucket by bucket."""

    def __init__(self, optimizer: Any, averaging: Averaging, group: Any) -> None:
        self._optimizer, self._averaging, self._group = optimizer, averaging, group

    @torch.no_grad()
    def send(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Send a bucket; its products arrive with it."""
        gradient, gradients = bucket.buffer(), bucket.gradients()
        sent = [gradient]
        own = self._own(bucket.parameters())
        if own:
            sent.append(torch.zeros_like(gradient))
        parts = sent[-1].split([g.numel() for g in gradients])
        products = [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)]
        for i, p in own.items():
            mean = self._optimizer.state[p]["mean"]
            torch.sub(p.detach(), mean, out=products[i]).mul_(gradients[i])
        norms = gradient.new_zeros(len(gradients))
        world = dist.get_world_size(self._group)
        futures = []
        for x in sent:
            work = dist.all_reduce(x.div_(world), group=self._group, async_op=True)
            assert work is not None  # as async_op is True
            futures.append(work.get_future())

        @torch.no_grad()
        def receive(_: Any) -> Tensor:
            torch.stack(torch._foreach_norm(gradients), out=norms)
            for i, p in own.items():
                self._averaging.receive(p, products[i], norms[i])
            return gradient

        return collect_all(futures).then(receive)

    def _own(self, parameters: list[Tensor]) -> dict[int, Tensor]:
        """The parameters that hold a sample which is learned from, by their place in the bucket."""
        at = self._optimizer._at
        held = self._optimizer._held if at is not None and at[0] == TRAINING else ()
        own = {i: p for i, p in enumerate(parameters) if p in held}
        if any(self._averaging.known(p) for p in own.values()):
            raise RuntimeError(AVERAGED_TWICE)
        return own


def _send(hook, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations as objects
    return hook.send(bucket)


class Agreement:
    """Finds averaged gradients of different samples, without a collective operation.

    Gradients that are equal to the bit on two ranks were averaged, for samples differ where
    parameters do; then the parameters at which they were computed must be equal as well. Each rank
    writes its digests into the store by which the processes met, where the later one of two finds
    those of the earlier. No rank waits for another, so an optimizer may live on some ranks only,
    and ranks that train models of their own are left alone. It looks at steps 1, 2, 4, 8, …
    """

    def __init__(self) -> None:
        self._run = next(_RUNS)  # two runs in one program may meet the same gradients
        self._step = 1
        self._noted: dict[int, tuple[str, str]] = {}  # digests of gradients and parameters

    def due(self) -> bool:
        """Whether this step is looked at."""
        if self._step & (self._step - 1) or not (dist.is_available() and dist.is_initialized()):
            return False
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        return dist.get_world_size() > 1 and not capturing

    @torch.no_grad()
    def note(self, number: int, parameters: Iterable[Tensor]) -> None:
        """Sample `number` is held, and the gradients of its parameters, in their order, are there.

        A sparse gradient is left to the check that refuses it.
        """
        if self.due():
            some = [p for p in parameters if p.grad is not None and not p.grad.is_sparse]
            self._noted[number] = digest(p.grad for p in some), digest(some)

    def check(self, count: int) -> None:
        """The step has come; of `count` samples, or of the one that is held if that is 0.

        Raises:
            RuntimeError: If gradients of different samples were averaged.
        """
        try:
            noted = [self._noted[k] for k in sorted(self._noted) if k < max(1, count)]
            _compare(f"blr/{self._run}/{self._step}", noted)
        finally:
            self._noted.clear()
            self._step += 1


def _compare(name: str, noted: list[tuple[str, str]]) -> None:
    gradients = [g for g, _ in noted]
    for g, theta in noted:
        mine = {"parameters": theta, "gradients": gradients}
        theirs = _first(f"{name}/{g}", mine) if g else mine
        if theirs["parameters"] != theta:
            raise RuntimeError(SAMPLES_DIFFER.format(dist.get_rank()))
        if theirs != mine:
            raise RuntimeError(SOME_AVERAGED)


def _first(key: str, value: dict[str, Any]) -> dict[str, Any]:
    """What was first written under this name in the store of the processes, maybe by us."""
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return json.loads(_get_default_store().compare_set(key, "", json.dumps(value)))
    except (dist.DistError, NotImplementedError):  # a store without it, or already closed
        return value


def digest(tensors: Iterable[Any]) -> str:
    """A name for the bits of tensors, which does not depend on the machine; "" if all are zero."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for x in map(local, tensors):
        x = x.detach()
        # Sums of integers do not depend on their order.
        sums.append(x.view(integers[x.element_size()]).sum(dtype=torch.int64).cpu())
    words = torch.stack(sums).tolist() if sums else []
    return hashlib.sha256(repr(words).encode()).hexdigest()[:32] if any(words) else ""


def drop_copies(parameters: Iterable[Tensor]) -> None:
    """Drop copies of weights that others keep, and that would outlive a swap.

    Autocast keeps them in short types. FSDP2 keeps whole ones: those of the outermost module after
    a forward pass without gradients, all if it was told not to reshard.
    """
    torch.clear_autocast_cache()
    if any(map(sharded, parameters)):
        from torch.distributed._composable_state import _module_state_mapping

        for module in list(_module_state_mapping):
            reshard = getattr(module, "reshard", None)
            if callable(reshard):
                reshard()

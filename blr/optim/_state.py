"""The state of an optimizer with a posterior: its precision, its prior, saving and loading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from blr.families.gaussian import DiagonalGaussian
from blr.optim import _pieces
from blr.optim._pieces import dense, sharded
from blr.optim.posterior import NamedGaussian


def short(kind: torch.dtype) -> bool:
    """Whether a type has 16 bits or fewer: too few for averages that move by 1 − β₂."""
    return torch.finfo(kind).bits <= 16


def dtype(p: Tensor) -> torch.dtype:
    """The type of a parameter's state: its own, or float32 if that is short."""
    return torch.float32 if short(p.dtype) else p.dtype


def check(p: Tensor) -> None:
    """Refuse parameters that have no posterior here.

    Raises:
        TypeError: If the parameter is not real, or a shard of the first kind of FSDP.
    """
    if getattr(p, "_fsdp_flattened", False):
        raise TypeError(
            "params must be whole tensors or those of fully_shard, got shards of "
            "FullyShardedDataParallel, which do not know their place; use fully_shard (FSDP2)"
        )
    if not p.is_floating_point():
        raise TypeError(
            f"params must be real floating-point tensors, got dtype {p.dtype}; "
            "freeze the others, or split a complex one into its real and imaginary parts"
        )


NOT_FINITE = (
    "step() was skipped because a gradient is NaN or infinite; parameters and state are as they "
    "were. Later skips are silent. If it happens often, lower lr or raise hess_init or ess"
)


def check_gradients(groups: list[dict[str, Any]], sampled: bool) -> None:
    """Refuse gradients that do not belong to a sample, or are sparse: a posterior moves all.

    Raises:
        RuntimeError: If there are gradients but no sample.
        TypeError: If one is sparse.
    """
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if gradients and not sampled:
        raise RuntimeError(
            "step() found gradients but no sample at which they were computed; put forward and "
            "backward into `with optimizer.sampled_params(train=True):`, call optimizer.train() "
            "before the loop, or pass a closure"
        )
    for g in gradients:
        if g.is_sparse:
            raise TypeError(
                f"gradients must be dense, got a sparse one of shape {tuple(g.shape)}; "
                "build the embedding with sparse=False"
            )


def finite(gradients: Iterable[Tensor]) -> bool:
    """Whether nothing is NaN or infinite."""
    gradients = list(gradients)
    sums: dict[torch.device, list[Tensor]] = {}
    for g in gradients:
        sums.setdefault(g.device, []).append(g.sum(dtype=dtype(g)))
    if all(bool(torch.stack(x).isfinite().all()) for x in sums.values()):
        return True
    # A sum may overflow where no entry does.
    return all(bool(g.isfinite().all()) for g in gradients)


def agreed(ok: bool, parameters: Iterable[Tensor]) -> bool:
    """Whether all processes that hold parts of the parameters say so."""
    meshes = dict.fromkeys(p.device_mesh for p in parameters if sharded(p))  # type: ignore[attr-defined]
    for mesh in meshes:
        flag = torch.tensor(float(ok), device=mesh.device_type)
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group)
        ok = bool(flag)
    return ok


def fit(state: dict[str, Any], p: Tensor) -> None:
    """Follow a parameter that was moved to another device, float type or memory format."""
    for name, value in state.items():
        if isinstance(value, Tensor) and (value.device, value.dtype) != (p.device, dtype(p)):
            state[name] = value = value.to(p.device, dtype(p))
        if isinstance(value, Tensor) and not sharded(p) and value.stride() != p.stride():
            # Large ones are worked on as they lie; small ones are gathered and keep their layout.
            if p.numel() >= _pieces.SMALL and dense(p):
                state[name] = torch.empty_like(p, dtype=dtype(p), requires_grad=False).copy_(value)


def saved(whole: dict[str, Any], spare: set[tuple[str, int]], held: bool) -> dict[str, Any]:
    """A state_dict without the (name, number of the parameter) that need not be saved.

    Its option "training" says whether the parameters hold a sample at this moment.
    """
    state = {
        i: {name: x for name, x in entries.items() if (name, i) not in spare}
        for i, entries in whole["state"].items()
    }
    groups = [group | {"training": held} for group in whole["param_groups"]]
    return whole | {"state": state, "param_groups": groups}


def loaded(saved: dict[str, Any]) -> dict[str, Any]:
    """A state_dict as it was saved; torch.distributed.checkpoint puts {} for what was not.

    Raises:
        ValueError: If it belongs to a sample and its mean is missing.
    """
    state = {
        i: {name: x for name, x in entries.items() if isinstance(x, Tensor)}
        for i, entries in saved["state"].items()
    }
    training = any(group.get("training", False) for group in saved["param_groups"])
    if training and not all("mean" in entries for entries in state.values() if entries):
        raise ValueError(
            "state_dict was saved while the parameters held a sample, and their means are not in "
            "it; save inside of `with optimizer.mean_params():`, or call optimizer.train() before "
            "get_state_dict() makes the place into which the checkpoint is loaded"
        )
    return saved | {"state": state}


def reload(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Undo the cast of `Optimizer.load_state_dict` to the type of the parameter."""
    numbers = (i for group in saved["param_groups"] for i in group["params"])
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    for i, p in zip(numbers, parameters, strict=True):
        for name, value in saved["state"].get(i, {}).items():
            if isinstance(value, Tensor) and short(p.dtype):
                optimizer.state[p][name] = value.detach().to(p.device, dtype(p), copy=True)


def names(groups: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter) in order; parameters given without names are called by their numbers."""
    number = 0
    for group in groups:
        known = group.get("param_names")
        for i, p in enumerate(group["params"]):
            yield (known[i] if known else str(number)), p
            number += 1


def priors(
    prior: DiagonalGaussian, groups: list[dict[str, Any]]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(parameter, λ₁, s) of a prior, for each parameter in the order of the optimizer.

    Raises:
        TypeError: If the prior is not a diagonal Gaussian.
        ValueError: If its names or its size do not fit.
    """
    if not isinstance(prior, DiagonalGaussian):
        raise TypeError(
            f"prior must be a DiagonalGaussian, got {type(prior).__name__}; "
            "pass the posterior() of an optimizer, or DiagonalGaussian.from_moments(…)"
        )
    shapes = {name: p.shape for name, p in names(groups)}
    size = sum(shape.numel() for shape in shapes.values())
    if prior.natural[0].shape != (size,):
        raise ValueError(
            f"prior must have one entry for each of {size} parameters, got shape "
            f"{tuple(prior.natural[0].shape)}; pass vectors in the order of the parameters"
        )
    theirs = getattr(prior, "shapes", shapes)
    if list(theirs.values()) != list(shapes.values()) and theirs != shapes:
        raise ValueError(f"prior must have the shapes {shapes}, got {theirs}; check their order")
    q = NamedGaussian(prior.natural, theirs if theirs.keys() == shapes.keys() else shapes)
    lam1, s = q.named(q.natural[0]), q.named(q.precision)
    yield from ((p, lam1[name], s[name]) for name, p in names(groups))

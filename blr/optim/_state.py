"""The state of an optimizer with a posterior: its precision, its prior, saving and loading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    return kind.itemsize <= 2


def dtype(p: Tensor) -> torch.dtype:
    """The type of a parameter's state: its own, or float32 if that is short."""
    return torch.float32 if short(p.dtype) else p.dtype


def check(p: Tensor) -> None:
    """Refuse parameters that have no posterior here; those that are frozen need none.

    Raises:
        TypeError: If the parameter is not real, or a shard of the first kind of FSDP.
    """
    if getattr(p, "_fsdp_flattened", False):
        raise TypeError(
            "params must be whole tensors or those of fully_shard, got shards of "
            "FullyShardedDataParallel, which do not know their place; use fully_shard (FSDP2)"
        )
    if p.requires_grad and not p.is_floating_point():
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
    check_dense(gradients)


def check_dense(gradients: Iterable[Tensor]) -> None:
    """Refuse sparse gradients.

    Raises:
        TypeError: If one is sparse.
    """
    for g in gradients:
        if g.is_sparse:
            raise TypeError(
                f"gradients must be dense, got a sparse one of shape {tuple(g.shape)}; "
                "build the embedding with sparse=False"
            )


def finite(gradients: Iterable[Tensor]) -> bool:
    """Whether nothing is NaN or infinite.

    Raises:
        TypeError: If a gradient is sparse.
    """
    gradients = list(gradients)
    check_dense(gradients)
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


@contextmanager
def loading(optimizer: Optimizer) -> Iterator[list[dict[str, Any]]]:
    """Around `load_state_dict`: a list that will have what the last of its hooks leaves.

    Raises:
        ValueError: If that is the state of another kind of optimizer.
    """

    def note(_: Optimizer, saved: dict[str, Any]) -> None:
        # Unpickling adds to the defaults, and not to the groups, what only other optimizers have.
        needed = {*optimizer.defaults, "step"}.intersection(*optimizer.param_groups)
        missing = {name for g in saved["param_groups"] for name in needed if name not in g}
        if missing:
            raise ValueError(
                f"state_dict must be that of another {type(optimizer).__name__}, got one without "
                f"{sorted(missing)}; load what such an optimizer has saved, or begin without"
            )
        hooked.append(saved)

    hooked: list[dict[str, Any]] = []
    handle = optimizer.register_load_state_dict_pre_hook(note)
    try:
        yield hooked
    finally:
        handle.remove()


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


def free(groups: list[dict[str, Any]]) -> list[Tensor]:
    """The parameters of a posterior: those that are not frozen.

    Raises:
        ValueError: If there are none.
    """
    every = [p for group in groups for p in group["params"]]
    some = [p for p in every if p.requires_grad]
    if not some:
        raise ValueError(
            f"posterior() needs a parameter that is not frozen, and all {len(every)} are frozen; "
            "ask before you freeze them, or call requires_grad_(True)"
        )
    return some


def priors(
    prior: DiagonalGaussian, groups: list[dict[str, Any]]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(parameter, λ₁, s) of a prior, for each parameter that it has, in its order.

    Raises:
        TypeError: If the prior is not a diagonal Gaussian.
        ValueError: If its names, shapes or size do not fit.
    """
    if not isinstance(prior, DiagonalGaussian):
        raise TypeError(
            f"prior must be a DiagonalGaussian, got {type(prior).__name__}; "
            "pass the posterior() of an optimizer, or DiagonalGaussian.from_moments(…)"
        )
    every = [p for group in groups for p in group["params"]]
    named = isinstance(prior, NamedGaussian)
    params = counted(prior.natural[0], _covered(prior, groups) if named else every)
    sizes = [p.numel() for p in params]
    vectors = zip(params, prior.natural[0].split(sizes), prior.precision.split(sizes), strict=True)
    yield from ((p, lam1.reshape(p.shape), s.reshape(p.shape)) for p, lam1, s in vectors)


def counted(vector: Tensor, params: list[Tensor], what: str = "parameters") -> list[Tensor]:
    """The parameters for whose entries a vector has the size: all, or those that are not frozen.

    Raises:
        ValueError: If it has neither.
    """
    frees = [p for p in params if p.requires_grad]
    sizes = [sum(p.numel() for p in some) for some in (params, frees)]
    if vector.ndim != 1 or len(vector) not in sizes:
        or_free = f", or of the {sizes[1]} that are not frozen" if len(frees) < len(params) else ""
        raise ValueError(
            f"prior must have one entry for each of {sizes[0]} {what}{or_free}, got shape "
            f"{tuple(vector.shape)}; pass vectors in the order of the parameters"
        )
    return params if len(vector) == sizes[0] else frees


def _covered(prior: NamedGaussian, groups: list[dict[str, Any]]) -> list[Tensor]:
    """The parameters that a prior has: those same tensors, or of its names, or of its numbers."""
    own = dict(names(groups))
    told = any("param_names" in group for group in groups) or prior.shapes.keys() == own.keys()
    numbered = {str(i): p for i, p in enumerate(own.values()) if p.requires_grad}
    ids = {id(p): p for p in own.values()}
    found = [ids[id(p)] for p in map(prior.tensors.get, prior.shapes) if id(p) in ids]
    if len(found) < len(prior.shapes):
        if told and prior.shapes.keys() <= own.keys():
            found = [own[name] for name in prior.shapes]
        # Numbers from 0 on may be those of a part of a model, which need not be the part here.
        elif list(prior.shapes) == list(numbered) != [str(i) for i in range(len(numbered))]:
            found = list(numbered.values())
        else:
            found = list(own.values())
    if [p.shape for p in found] != list(prior.shapes.values()):
        fits = {name for name, p in own.items() if told and p.shape == prior.shapes.get(name)}
        wrong = [repr(name) for name in prior.shapes if name not in fits]
        raise ValueError(
            "prior must be over parameters of the optimizer, got "
            f"{', '.join(wrong[:4])}{', …' * (len(wrong) > 4)}, which it does not have, or in "
            "other shapes, or without a name; give model.named_parameters() to both optimizers"
        )
    return found

"""A network as a function f(θ, x) of its parameters, which stay what they are.

    placing(model, q)          from vectors θ of shape (*batch, P) to tensors by name
    call(model, tensors, x)    f(θ, x): the tensors in the place of the model's own
    evaluating(model)          as in `eval()`, and afterwards what it was
    statistics(model, …)       what BatchNorm remembers of the data at θ

For whatever asks a network about many θ at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from blr._modules import call_with
from blr.expfam import ExponentialFamily
from blr.optim.posterior import NamedGaussian

Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a model is called with: one tensor, a tuple of arguments, or arguments by name."""

REMEDY = "pass the model that was trained, and its named_parameters() to the optimizer"
BUFFERS = "running_mean", "running_var", "num_batches_tracked"


def bare(model: Module) -> Module:
    """The model inside of `torch.compile` and of data parallelism, which `vmap` cannot enter."""
    if isinstance(inner := getattr(model, "_orig_mod", None), Module):
        return bare(inner)
    wrappers = torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel
    return bare(model.module) if isinstance(model, wrappers) else model


def placing(model: Module, q: ExponentialFamily) -> Callable[[Tensor], dict[str, Tensor]]:
    """From vectors θ of q, shape (*batch, P), to tensors by name, of the types of the parameters.

    Raises:
        ValueError: If q has other names or shapes than the model, or, without names, another P; or
            if it is not known where parameters without names belong.
    """
    own = dict(model.named_parameters())
    if isinstance(q, NamedGaussian):
        shapes = _shapes(q, own)
    else:
        shapes = {name: p.shape for name, p in own.items()}
    for name, shape in shapes.items():
        if shape != own[name].shape:
            raise ValueError(
                f"q must have the shapes of the model, got {tuple(shape)} for {name!r} of shape "
                f"{tuple(own[name].shape)}; {REMEDY}"
            )
    sizes = [shape.numel() for shape in shapes.values()]

    def place(theta: Tensor) -> dict[str, Tensor]:
        if theta.shape[-1] != sum(sizes):
            raise ValueError(
                f"q must have one entry for each of the model's {sum(sizes)} parameters, "
                f"got {theta.shape[-1]}; pass vectors in the order of model.parameters()"
            )
        parts = zip(shapes.items(), theta.split(sizes, -1), strict=True)
        return {
            name: part.reshape((*theta.shape[:-1], *shape)).to(own[name])
            for (name, shape), part in parts
        }

    return place


def _shapes(q: NamedGaussian, own: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes of q under the model's names of its parameters."""
    names = {id(p): name for name, p in own.items()}
    found = [names.get(id(q.tensors.get(theirs))) for theirs in q.shapes]
    if None in found:  # names, or numbers of tensors that are not the model's
        found = [_name(theirs, own) for theirs in q.shapes] if _named(q, own) else list(own)
    return dict(zip(found, q.shapes.values(), strict=True))  # type: ignore[arg-type]


def _named(q: NamedGaussian, own: Mapping[str, Tensor]) -> bool:
    """Whether q has names, and not the numbers of all parameters of a model.

    Raises:
        ValueError: If q has numbers of something else.
    """
    if not q.tensors and not all(name.isdigit() and name not in own for name in q.shapes):
        return True
    if list(q.shapes) != [str(i) for i in range(len(own))]:
        raise ValueError(
            f"q has {len(q.shapes)} parameters without names, which are not all {len(own)} "
            "parameters of the model in their order; give names to the optimizer: "
            "model.named_parameters(), or those of them that it is to have"
        )
    return False


def _name(theirs: str, own: Mapping[str, Tensor]) -> str:
    """The model's name of a parameter: the same, or that without a wrapper's."""
    inner = re.sub(r"^(?:_orig_mod\.|module\.)+", "", theirs)
    if theirs in own or inner in own:
        return theirs if theirs in own else inner
    raise ValueError(f"q has a parameter {theirs!r}, and the model has none of that name; {REMEDY}")


def call(model: Module, tensors: dict[str, Tensor], x: Any) -> Tensor:
    """f(θ, x), with `tensors` in the place of the model's parameters and buffers of these names.

    Raises:
        TypeError: If x is not what a model is called with, or the model does not return a tensor.
    """
    if not isinstance(x, Tensor | tuple | Mapping):
        raise TypeError(
            "inputs must be a tensor, a tuple of arguments or a mapping of arguments by name, "
            f"got {type(x).__name__}; of a batch of inputs and targets pass the inputs"
        )
    by_name = isinstance(x, Mapping)
    args = () if by_name else x if isinstance(x, tuple) else (x,)
    f = call_with(model, tensors, args, dict(x) if by_name else {})
    if not isinstance(f, Tensor):
        raise TypeError(
            f"the model must return a tensor, got {type(f).__name__}; "
            "wrap it in a module that returns its logits"
        )
    return f


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """As in `eval()`; afterwards, whatever happened, every module in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        # Not eval(): some modules merge or freeze weights there.
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def statistics(
    model: Module, tensors: dict[str, Tensor], batches: Iterable[Inputs]
) -> dict[str, Tensor]:
    """BatchNorm's running means and variances at one θ, averaged over the batches, by name.

    Raises:
        ValueError: If there is no batch.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    found = {
        f"{name}.{buffer}".removeprefix("."): torch.zeros_like(getattr(module, buffer))
        for name, module in norms.items()
        for buffer in BUFFERS
    }
    empty = True
    with evaluating(model), _averaging(norms.values()):
        for x in batches:
            call(model, tensors | found, x)  # writes into `found`
            empty = False
    if empty:
        raise ValueError("statistics must have at least one batch, got none; pass training inputs")
    return found


@contextmanager
def _averaging(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """BatchNorm as in training, with a plain average over the batches; modes are not restored."""
    momenta = {module: module.momentum for module in norms}
    try:
        for module in momenta:
            module.training, module.momentum = True, None
        yield
    finally:
        for module, momentum in momenta.items():
            module.momentum = momentum

"""Calling a network with other tensors in the place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.func import functional_call
from torch.nn import Module


def call_with(
    module: Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Any = None
) -> Any:
    """The module called with `tensors` for its parameters and buffers of these names.

    Each place is named once: `functional_call` would tie the other names of a module that is used
    twice, swap its parameters twice, and leave the tensors in it (torch 2.13).
    """
    own: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
    own.update(module.named_parameters(remove_duplicate=False))
    instead = {own[name]: x for name, x in tensors.items()}
    values = {
        f"{path}.{name}".removeprefix("."): instead[p]
        for path, layer in module.named_modules()
        for name, p in (*layer._parameters.items(), *layer._buffers.items())
        if p is not None and p in instead
    }
    return functional_call(module, values, args, kwargs, tie_weights=False)

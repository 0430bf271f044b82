"""Errors at the door: each check names the argument, its value or shape, and the remedy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_float(name: str, value: Any) -> Tensor:
    """`value` as a floating-point tensor: tensors and arrays keep their float type, device, graph.

    Python numbers, lists and integers become float64.

    Raises:
        TypeError: If `value` is not a real number, array or tensor.
    """
    try:
        x = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be a number, an array or a tensor, got {type(value).__name__}"
        ) from error
    if x.is_complex():
        raise TypeError(f"{name} must be real, got dtype {x.dtype}")
    return x if x.is_floating_point() else x.to(torch.float64)


def common(*tensors: Tensor) -> list[Tensor]:
    """The tensors in their common floating type and on one device; a number follows the arrays.

    Raises:
        ValueError: If arrays are on different devices.
    """
    deciding = [x for x in tensors if x.ndim] or tensors
    devices = {str(x.device): x.device for x in deciding}
    if len(devices) > 1:
        raise ValueError(f"arguments must be on one device, got {' and '.join(devices)}; move one")
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in deciding))
    return [x.to(deciding[0].device, dtype) for x in tensors]


def require(ok: Tensor | bool, name: str, what: str, value: Tensor, remedy: str) -> None:
    """Raise a ValueError that names the argument, its value and the remedy, unless all `ok`."""
    ok = torch.as_tensor(ok)
    if bool(ok.all()):
        return
    bad = value.detach()
    if ok.shape == bad.shape and bad.ndim:
        bad = bad[~ok]
    got = f"{bad.reshape(-1)[0].item():.6g}" if bad.numel() == 1 else summary(bad)
    raise ValueError(f"{name} must be {what}, got {got}; {remedy}")


def number(name: str, value: Any, holds: Callable[[Any], bool], what: str) -> None:
    """Refuse a number that is out of its range; a schedule is not looked into."""
    if value is not None and not callable(value) and not holds(value):
        raise ValueError(f"{name} must be {what}, got {value}; pass another number")


def instance(name: str, value: Any, kind: type, remedy: str) -> None:
    """Refuse a value of another type."""
    if not isinstance(value, kind):
        got = type(value).__name__
        raise TypeError(f"{name} must be a {kind.__name__}, got {got}; {remedy}")


def summary(x: Tensor) -> str:
    """A few words for an array in a message."""
    if x.numel() > 4:
        few = ", ".join(f"{v:.4g}" for v in x.reshape(-1)[:3].tolist())
        return f"{x.numel()} values of shape {tuple(x.shape)}: {few}, …"
    return "[" + ", ".join(f"{v:.6g}" for v in x.reshape(-1).tolist()) + "]"


def finite(name: str, x: Tensor) -> Tensor:
    """Check that nothing is NaN or infinite."""
    # A finite sum is proof in one pass; an infinite one may be mere overflow.
    if bool(torch.isfinite(x.detach().sum())):
        return x
    require(torch.isfinite(x.detach()), name, "finite", x, "look for NaN or inf in what was passed")
    return x


def positive(name: str, x: Tensor, remedy: str = "pass a positive number") -> Tensor:
    """Check that every entry is finite and greater than zero."""
    finite(name, x)
    # The least entry tells it faster than a comparison of every one, and `amin` faster than `min`.
    if not (x.numel() and bool(x.detach().amin() > 0)):
        require(x.detach() > 0, name, "positive", x, remedy)
    return x


def vector(name: str, x: Tensor) -> Tensor:
    """Check that there is at least one axis, of length one or more."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{name} must have shape (..., D) with D >= 1, got {tuple(x.shape)}; "
            "wrap a single number in a list"
        )
    return x


def square(name: str, x: Tensor, size: int | None = None) -> Tensor:
    """Check that the last two axes are a square matrix, of the given size."""
    if x.ndim < 2 or x.shape[-1] != x.shape[-2] or (size is not None and x.shape[-1] != size):
        want = f"(..., {size}, {size})" if size is not None else "(..., D, D)"
        raise ValueError(
            f"{name} must have shape {want}, got {tuple(x.shape)}; pass a square matrix that fits"
        )
    return x


def symmetric(name: str, x: Tensor) -> Tensor:
    """Check that the matrices are finite and equal to their transposes up to rounding."""
    finite(name, x)
    gap = (x - x.mT).detach().abs().amax((-2, -1))
    tolerance = 100 * torch.finfo(x.dtype).eps * x.detach().abs().amax((-2, -1))
    require(gap <= tolerance, f"{name} minus its transpose", "zero", gap, "pass ½(X + Xᵀ)")
    return x


def positive_definite(
    name: str, x: Tensor, remedy: str = "check its eigenvalues, or add prior precision"
) -> Tensor:
    """Check that the matrices are finite and positive definite; returns the Cholesky factor L.

    A pivot below D·ε of its diagonal entry is no longer positive beyond rounding.
    """
    finite(name, x)
    L, info = torch.linalg.cholesky_ex(x)
    pivots = L.detach().diagonal(dim1=-2, dim2=-1) ** 2
    floor = x.shape[-1] * torch.finfo(x.dtype).eps * x.detach().diagonal(dim1=-2, dim2=-1)
    if bool((info == 0).all()) and bool((pivots > floor).all()):
        return L
    lowest = torch.linalg.eigvalsh(x.detach()).min().item()
    raise ValueError(
        f"{name} must be positive definite, got a matrix of shape {tuple(x.shape)} "
        f"with smallest eigenvalue {lowest:.6g}; {remedy}"
    )

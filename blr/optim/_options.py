"""Options at the door: each check names the argument, its value and the remedy."""

from __future__ import annotations

import math
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def number(
    options: dict[str, Any], name: str, low: float, remedy: str, *, closed: bool = False,
    infinite: bool = False,
) -> None:  # fmt: skip
    """Check that an option is a number above `low`; `closed` admits `low`, `infinite` infinity.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of range.
    """
    value = options[name]
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}; {remedy}")
    value = float(value)
    above = value >= low if closed else value > low
    if not above or math.isnan(value) or (math.isinf(value) and not infinite):
        what = f"at least {low:g}" if closed else f"greater than {low:g}"
        raise ValueError(f"{name} must be {what}, got {options[name]!r}; {remedy}")


def is_number(value: Any) -> bool:
    """Whether that is a real number, of Python, NumPy or torch, and not the text of one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, int | float | np.integer | np.floating)


def check_common(options: dict[str, Any]) -> None:
    """Check what all optimizers with a posterior have: lr, ess, seed."""
    number(options, "lr", 0, "pass a learning rate such as 0.1", closed=True)
    number(options, "ess", 0, "pass the number of training examples, or of tokens")
    if not isinstance(options["seed"], int) or isinstance(options["seed"], bool):
        raise TypeError(f"seed must be an integer, got {options['seed']!r}; pass one such as 0")


def check_gaussian(options: dict[str, Any]) -> None:
    """Check what Gaussian posteriors have beyond that: betas, weight_decay, hess_init."""
    betas = options["betas"]
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(map(is_number, betas))):
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}; pass (0.9, 0.99999)")
    if not all(0 <= b < 1 for b in betas):
        raise ValueError(f"betas must be in [0, 1), got {betas!r}; pass such as (0.9, 0.99999)")
    number(options, "weight_decay", 0, "pass 0 for a flat prior", closed=True)
    number(options, "hess_init", 0, "pass a curvature such as 1.0, 0.1 or 0.01")


def check_clipping(options: dict[str, Any]) -> None:
    """Check the largest step: clip_radius."""
    remedy = "pass float('inf') for no clipping"
    number(options, "clip_radius", 0, remedy, infinite=True)


def check_device(options: dict[str, Any]) -> None:
    """Check `fused` and `capturable`, and what compiled code needs on the CPU.

    Raises:
        TypeError: If `fused` is not True, False or None, or `capturable` not True or False.
        RuntimeError: If there is nothing to compile with for parameters on the CPU.
    """
    fused = options["fused"]
    if not (fused is None or isinstance(fused, bool)):
        raise TypeError(f"fused must be True, False or None, got {fused!r}; leave fused out")
    if not isinstance(options["capturable"], bool):
        value = options["capturable"]
        raise TypeError(f"capturable must be True or False, got {value!r}; leave capturable out")
    if fused and any(p.device.type == "cpu" for p in options["params"]):
        check_compiler()


def check_compiler() -> None:
    """Refuse to compile for the CPU where there is nothing to compile with.

    Raises:
        RuntimeError: If there is no C++ compiler, or no headers of Python.
    """
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    header = Path(sysconfig.get_path("include"), "Python.h")
    for what, found, remedy in (
        (f"the C++ compiler {name}", shutil.which(name), "install it, or set CXX to another"),
        (f"Python.h, expected in {header.parent}", header.exists(), "install python3-dev"),
    ):
        if not found:
            raise RuntimeError(
                f"fused=True compiles the step for the CPU, which needs {what}, and there is none; "
                f"{remedy}, or leave fused out for a step in plain torch"
            )

"""IVON on the CPU in compiled code: a sample or a step is a pass over memory, noise included.

    draw:  θ ← m + ε/√(N(h + δ))        learn:  m, ḡ, h ← ivon_step(m, ḡ, h, ĝ, ĝ(θ − m))

Plain torch reads and writes its temporaries some thirty times in the cache. `torch.compile` makes
loops of the same equations. What changes from step to step is passed in small tensors and sizes
are symbols, so a program is compiled once for each type of parameters, with or without a prior.

The noise is that of `_noise`, exactly as far as it is made of integers. Elements that share a pair
are 512 places apart, so whole blocks are made and the part that is wanted is cut out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from blr.optim import _functional, _noise
from blr.optim._equations import Equations
from blr.optim._functional import Prior
from blr.optim._gaussian import gathered
from blr.optim._noise import BLOCK, HALF
from blr.optim._pieces import Job, Piece
from blr.optim._work import Eager, Work

WINDOW = {"cpu": 1 << 19}
"""Elements of a piece. Little has to stay in the cache here, and each call takes time to begin."""


@dataclass
class Compiled(Eager):
    """One piece, in compiled code; what is rare is as in plain torch."""

    def update(self, opt: Equations, several: bool) -> None:
        """See `Work`."""
        ((b, group),) = self.jobs
        where, numbers = self._where(opt), _numbers(b, group)
        mean, *state = (b.read(name) for name in (where, "momentum", "hess"))
        state = mean, *state, b.read("gradient").to(mean.dtype)
        at = None if several or opt._apart(b.dtype) else opt._at
        if at is not None:
            theta = b.read("parameter")
            _run(renew_, theta, *state, numbers, *_key(b, opt._name(group, at, ahead=1)))
            self._write("parameter", theta)
        elif several:
            _run(learn_from_, *state, b.read("product"), numbers)
        else:
            _run(learn_, *state, self._sample(opt, mean, 0), numbers)
        for name, value in zip((where, "momentum", "hess"), state, strict=False):
            self._write(name, value)
        if at is None:
            self._follow(opt, mean)

    def _show(self, opt: Equations, mean: Tensor, ahead: int = 0) -> None:
        ((b, _),) = self.jobs
        assert opt._at is not None
        out = torch.empty_like(mean) if opt._apart(b.dtype) else b.read("parameter")
        self._write("parameter", self._made(opt, mean, opt._at, ahead, out))

    def _made(
        self, opt: Equations, mean: Tensor, at: tuple[int, int], ahead: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        ((b, group),) = self.jobs
        out = torch.empty_like(mean) if out is None else out
        key = _key(b, opt._name(group, at, ahead))
        _run(draw_, out, mean, b.read("hess"), _numbers(b, group), *key)
        return out

    def _write(self, name: str, value: Tensor) -> None:
        ((b, _),) = self.jobs
        b.write(name, value)
        if name == "parameter":
            # Programs write without a word; a backward pass through old weights must not go unseen.
            torch.autograd.graph.increment_version(b.parameters)


Numbers = tuple[Tensor, Tensor | None, Tensor | None]
"""What may change from step to step: a vector of settings, and s and λ₁ of a prior, if any."""


def draw_(
    out: Tensor, mean: Tensor, hess: Tensor, numbers: Numbers, key: Tensor, skip: int
) -> None:
    """θ = m + ε/√(N(h + δ)), into `out`."""
    ess, noise = numbers[0][0], normal(mean.shape[0], key, skip)
    out.copy_(mean + noise * torch.rsqrt((hess + _prior(numbers).delta) * ess))


def learn_(
    mean: Tensor, momentum: Tensor, hess: Tensor, gradient: Tensor, theta: Tensor, numbers: Numbers
) -> None:
    """A step from the gradient at a sample θ."""
    learn_from_(mean, momentum, hess, gradient, gradient * (theta - mean), numbers)


def learn_from_(
    mean: Tensor, momentum: Tensor, hess: Tensor, gradient: Tensor, product: Tensor,
    numbers: Numbers,
) -> None:  # fmt: skip
    """A step from a gradient and a product, averages of several samples."""
    ess, _, lr, h0, rescale, rho1, rho, weight, clip_radius = numbers[0].unbind()
    prior = _prior(numbers)
    new = _functional.ivon_step(
        mean, momentum, hess, gradient, product, prior,
        lr=lr * (h0 + rescale * prior.delta),
        rates=(rho1, rho),
        ess=ess,
        gathered=weight,
        clip_radius=clip_radius,
    )  # fmt: skip
    for old, value in zip((mean, momentum, hess), new, strict=True):
        old.copy_(value)


def renew_(
    theta: Tensor, mean: Tensor, momentum: Tensor, hess: Tensor, gradient: Tensor,
    numbers: Numbers, key: Tensor, skip: int,
) -> None:  # fmt: skip
    """A step from the gradient at θ, and the next sample in its place."""
    learn_(mean, momentum, hess, gradient, theta, numbers)
    draw_(theta, mean, hess, numbers, key, skip)


def normal(size: int, key: Tensor, skip: int) -> Tensor:
    """ε ~ N(0, 1), float32, as `_noise.normal`.

    Args:
        size: How many.
        key: Three keys, and the number of the first pair of the first block, shape (4,).
        skip: How many entries of the first block are not wanted, plus 2: to a compiler 0 and 1 are
            numbers of their own.
    """
    blocks = size // BLOCK + 2
    k0, k1, k2, first = key.unbind()
    x = torch.arange(blocks * HALF, dtype=torch.int32, device=key.device).view(blocks, HALF)
    radius, t = _noise.polar(x + first, (k0, k1, k2))
    u = t * t
    pairs = radius * _polynomial(_cos(), u), radius * (_polynomial(_sin(), u) * t)
    return torch.stack(pairs, 1).view(-1).narrow(0, skip - 2, size)


def _polynomial(coefficients: tuple[float, ...], u: Tensor) -> Tensor:
    *rest, second, highest = coefficients
    value = second + highest * u
    for c in reversed(rest):
        value = c + value * u
    return value


def _cos() -> tuple[float, ...]:
    return _noise.COS


def _sin() -> tuple[float, ...]:
    return _noise.SIN


def divide(jobs: list[Job]) -> list[Work]:
    """A unit of work for each piece: in compiled code where that was asked for, else eager."""
    return [(Compiled if _suits(*job) else Eager)((job,)) for job in jobs]


def _suits(b: Piece, group: dict[str, Any]) -> bool:
    if not group["fused"] or b.device.type != "cpu":
        return False
    # A vector of one entry would need a program of its own, shards may leave gaps in the index, and
    # the reach of a key may end.
    whole = b.start // _noise.REACH == (b.stop - 1) // _noise.REACH
    return whole and 1 < b.read("hess").numel() == b.stop - b.start


def _prior(numbers: Numbers) -> Prior:
    settings, precision, shift = numbers
    if precision is None or shift is None:
        return Prior(settings[1])
    return Prior(precision / settings[0], shift / settings[0])


def _numbers(b: Piece, group: dict[str, Any]) -> Numbers:
    lr, (b1, b2) = float(group["lr"]), group["betas"]
    scale = (group["hess_init"], 1.0) if group["rescale_lr"] else (1.0, 0.0)
    settings = group["ess"], group["weight_decay"], lr, *scale, 1 - b1, 1 - b2, gathered(group)
    vector = torch.tensor((*settings, group["clip_radius"]), dtype=b.states[0]["hess"].dtype)
    if "prior_precision" not in b.states[0]:
        return vector, None, None
    return vector, b.read("prior_precision").data, b.read("prior_shift").data


def _key(b: Piece, name: tuple[int, ...]) -> tuple[Tensor, int]:
    """What `normal` needs to know to make the noise of a piece."""
    first = b.start // BLOCK
    words = *_noise.key(*name, first * HALF >> 32), _noise.signed(first * HALF)
    return torch.tensor(words, dtype=torch.int32), b.start - first * BLOCK + 2


def _run(f: Callable[..., None], *arguments: Any) -> None:
    # Of a view, a compiler asks what it is a view of, and would compile again for other shapes.
    _program(f)(*(x.data if isinstance(x, Tensor) else x for x in arguments))


@lru_cache
def _program(f: Callable[..., None]) -> Callable[..., None]:
    # Else a compiler takes the coefficients for numbers that change. To mark them imports it.
    for coefficients in (_cos, _sin):
        torch.compiler.assume_constant_result(coefficients)
    from torch import _inductor

    # A hash uses each word twice, and its last one, written out in terms of the first, is an
    # expression of exponential length. Naming what is in between compiles four times as fast.
    options: dict[str, Any] = {"realize_opcount_threshold": 8}
    known = options.keys() <= set(_inductor.list_options())
    return torch.compile(f, dynamic=True, options=options if known else None)

"""Noise without a state: ε is a function of (seed, step, sample) and of where the parameter stands.

    ε_e, ε_{e+512} = ±√(−2 log u) (cos φ, sin φ)      ±, u, φ from two hashes of the pair's number

A generator that is drawn from in turn ties the result to the number of processes, to the order of
the draws and to a hidden state. Here any process can make any slice of the noise again: replicas
agree without a message, a shard draws its own rows, a checkpoint holds two integers, and the random
numbers of dropout and of the data loader are not touched.

The hash is three rounds of multiply and shift on 32-bit integers (Wellons' triple32), keyed before
and between the rounds. Integers are exact everywhere, so CPU, compiled code and a GPU kernel agree
up to the last digit of a logarithm and a root. It costs about what `torch.randn` costs on one
thread, unlike which it runs on all of them and inside compiled code; Philox in eager torch costs
a hundred times as much. Element e of 1024·k + [0, 1024) pairs with e ± 512, so that the halves of
a block are contiguous.

References: Salmon et al. (2011), Parallel random numbers: as easy as 1, 2, 3; Box & Muller (1958).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

HALF = 512
BLOCK = 2 * HALF
REACH = HALF << 24
"""Elements whose pairs are counted in 32 bits; the count of these reaches is part of the key."""

# cos(πt/2) and sin(πt/2)/t as polynomials of t², to half a digit of float32 for |t| ≤ 1; the sign
# of the radius adds the other half of the circle. They cost a third of cos and sin.
COS = (0.9999999532476085, -1.2336982076549114, 0.25365070955391583, -0.020810571376274553,
       0.0008581625433590614)  # fmt: skip
SIN = (1.570796320065354, -0.6459637604384924, 0.07968992260047904, -0.004674150668942739,
       0.00015167511780040296)  # fmt: skip


def key(*words: int) -> tuple[int, int, int]:
    """Three 32-bit keys, as signed integers, from any number of integers (splitmix64)."""
    state = 0
    for word in words:
        state = _scramble(state + word)
    mixed = (_scramble(state + i) for i in (1, 2, 3))
    return tuple(signed(x >> 32) for x in mixed)  # type: ignore[return-value]


def normal(start: int, stop: int, name: tuple[int, ...], device: torch.device) -> Tensor:
    """ε ~ N(0, 1) for the elements [start, stop) of the global index, float32.

    Args:
        start: Global index of the first element.
        stop: One past the last.
        name: Integers that say which noise: (seed, step, stream, sample).
        device: Where the noise is wanted.
    """
    if within := stop % REACH if start // REACH < (stop - 1) // REACH else 0:
        parts = (start, stop - within), (stop - within, stop)
        return torch.cat([normal(*part, name, device) for part in parts])
    first, last = start // BLOCK, -(-stop // BLOCK)
    x = _pairs((last - first) * HALF, device) + signed(first * HALF)
    radius, t = polar(x.view(-1, HALF), key(*name, first * HALF >> 32))
    u = t * t
    noise = torch.empty((last - first, 2, HALF), dtype=torch.float32, device=device)
    torch.mul(radius, _polynomial(COS, u), out=noise[:, 0])
    torch.mul(radius, _polynomial(SIN, u).mul_(t), out=noise[:, 1])
    return noise.view(-1)[start - first * BLOCK : stop - first * BLOCK]


def _polynomial(coefficients: tuple[float, ...], u: Tensor) -> Tensor:
    """Horner's scheme, one operation for each coefficient."""
    *rest, highest = coefficients
    *rest, value = (_scalar(c, u.device) for c in rest)
    value = torch.add(value, u, alpha=highest)
    for c in reversed(rest):
        value = torch.addcmul(c, value, u)
    return value


@lru_cache(maxsize=64)
def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


def polar(x: Tensor, keys: Sequence[int | Tensor]) -> tuple[Tensor, Tensor]:
    """±√(−2 log u) and t = φ/(π/2) for each counter; overwrites x."""
    word, angle = (w.float() for w in _words(x, keys))
    # A small |word| has a fine resolution, and the tails of ε come from there.
    radius = word.abs().clamp_(min=0.5).mul_(2.0**-31).log_().mul_(-2).sqrt_().copysign_(word)
    return radius, angle.mul_(2.0**-31)


def _words(x: Tensor, keys: Sequence[int | Tensor]) -> tuple[Tensor, Tensor]:
    """Two uniform words for each counter; overwrites x."""
    k0, k1, k2 = keys
    x = _fold(x.bitwise_xor_(k0), 17).mul_(signed(0xED5AD4BB))
    x = _fold(_fold(x, 11).bitwise_xor_(k1).mul_(signed(0xAC4C1B51)), 15)
    x = _fold(x.mul_(0x31848BAB), 14)
    return x, _fold((x ^ k2).mul_(signed(0x9E3779B1)), 15).mul_(0x2C1B3C6D)


def _fold(x: Tensor, shift: int) -> Tensor:
    """x ^= x >>> shift, in place; the mask makes the shift of a signed integer logical."""
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))


@lru_cache(maxsize=8)
def _pairs(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


def _scramble(x: int) -> int:
    """The output function of splitmix64."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


def signed(x: int) -> int:
    """The low 32 bits of x as a signed integer."""
    return ((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000

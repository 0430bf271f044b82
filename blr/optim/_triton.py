"""IVON's step in one kernel: learn from the gradient, draw the next sample, for all tensors.

    m, ḡ, h ← learn(m, ḡ, h, ĝ, ĝ(θ − m))     θ ← m + ε/√(N(h + δ))     one read, one write each

A table of addresses tells the kernel where the tensors lie, so a network of hundreds of them costs
one launch. Noise is made inside, from the number of the element (`_noise`): no tensor of it exists,
and what was drawn in one launch is made again in the next. A program works on whole blocks of the
noise, of which the lower and the upper half share their hashes, their logarithm and their root. A
step with two noises takes 126 instructions for an element on sm_90, where AdamW takes 29 and a step
with two draws of Triton's own generator 405: by count it is bound by memory. `benchmarks/gpu.py`
times it.

Bytes per parameter in float32: 16 are kept, parameter, m, ḡ and h, where AdamW keeps 12. A launch
between `train()` and `eval()` moves 32 (reads ĝ, m, ḡ, h; writes m, ḡ, h, θ), and the check of the
gradients before it reads 4; fused AdamW moves 28 and checks nothing. Keeping no mean, but taking
m = θ − σε from the sample, saves 4 of both. The drift is harmless: after 10,000 steps with σ = 10⁻²
an rms of 8.3e-8 for weights of 0.02, where the rounding of the updates alone gives 5.2e-8. But one
look at a sample changes a quarter of these means by a unit in the last place, so validation would
change training and no context could restore the mean bit by bit; and 16 bits could not hold it. So
it is kept.

The kernel is compiled for a GPU, or runs in Triton's interpreter, which needs none
(TRITON_INTERPRET=1 before anything imports Triton). Only `_launch` imports this module, when it is
needed; the package does not require Triton.
"""

# A kernel is Triton's language in Python's syntax: its constants are not Python's, and what is not
# assigned on one side of an `if` is not used on it.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blr.optim import _noise, _table

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = None

AVAILABLE: bool = triton is not None


def _jit(f: Any) -> Any:
    return triton.jit(f) if AVAILABLE else f


def _constant(x: Any) -> Any:
    return tl.constexpr(x) if AVAILABLE else x


# Columns of the table, a row for each tensor, int64: see `_table`.
COLUMNS = _constant(_table.COLUMNS)
PARAMETER, GRADIENT, MEAN, MOMENTUM = map(_constant, range(4))
HESS, PRODUCT, PRECISION, SHIFT = map(_constant, range(4, 8))
SIZE, FIRST, SET, ALIGNED = map(_constant, range(8, 12))

# Columns of the numbers, a row for each group, float32: options, and what changes with the step.
NUMBERS = _constant(11)
DELTA, ESS, SCALE, TILT, DECAY, ENTERS = map(_constant, range(6))
FORGETS, CURVES, CLIP, LR, UNBIAS = map(_constant, range(6, 11))

# Columns of the words, a row for each group, int64: from which `prepare` makes keys on the device.
WORDS = _constant(6)
STEP_AT, LR_AT, SEED, HIGH, BETA, DEBIAS = map(_constant, range(6))

HALF = _constant(_noise.HALF)
BLOCK = _constant(_noise.BLOCK)
C0, C1, C2, C3, C4 = map(_constant, _noise.COS)
S0, S1, S2, S3, S4 = map(_constant, _noise.SIN)
UNIT = _constant(2.0**-31)


# ---- noise --------------------------------------------------------------------------------------


@_jit
def _fold(x, shift: tl.constexpr):
    return x ^ (x >> shift)


@_jit
def _normals(pair, key):
    """ε of the lower and of the upper element of pairs, as `_noise.normal` makes them."""
    k0 = tl.load(key).to(tl.uint32, bitcast=True)
    k1 = tl.load(key + 1).to(tl.uint32, bitcast=True)
    k2 = tl.load(key + 2).to(tl.uint32, bitcast=True)
    x = _fold(pair ^ k0, 17) * 0xED5AD4BB
    x = _fold((_fold(x, 11) ^ k1) * 0xAC4C1B51, 15)
    x = _fold(x * 0x31848BAB, 14)
    y = _fold((x ^ k2) * 0x9E3779B1, 15) * 0x2C1B3C6D
    word = x.to(tl.int32, bitcast=True).to(tl.float32)
    t = y.to(tl.int32, bitcast=True).to(tl.float32) * UNIT
    radius = tl.sqrt(-2 * tl.log(tl.maximum(tl.abs(word), 0.5) * UNIT))
    radius = tl.where(word < 0, -radius, radius)
    u = t * t
    cos = C0 + u * (C1 + u * (C2 + u * (C3 + u * C4)))
    sin = t * (S0 + u * (S1 + u * (S2 + u * (S3 + u * S4))))
    return radius * cos, radius * sin


@_jit
def _scramble(x):
    """The output function of splitmix64."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@_jit
def _write_key(key, seed, step, stream, number, high):
    """The three keys of `_noise.key(seed, step, stream, number, high)`."""
    state = _scramble(seed.to(tl.uint64))
    state = _scramble(state + step.to(tl.uint64))
    state = _scramble(state + stream.to(tl.uint64))
    state = _scramble(state + number.to(tl.uint64))
    state = _scramble(state + high.to(tl.uint64))
    for i in tl.static_range(3):
        word = (_scramble(state + (i + 1)) >> 32).to(tl.uint32)
        tl.store(key + i, word.to(tl.int32, bitcast=True))


@_jit
def prepare(words, numbers, keys, learned, stream, number, ahead):
    """What changes with the step, made on the device: learning rate, debiasing and keys of noise.

    One program for each group. A CUDA graph that recorded it counts on by itself.

    Args:
        words: Where the step and the learning rate are, and integers, `WORDS` for each group.
        numbers: Options, of which two are written.
        keys: Written: of the noise to learn from, and of the next sample.
        learned: Number of the sample to learn from.
        stream: Stream of the next sample.
        number: Number of the next sample.
        ahead: 1 if the next sample belongs to the next step, else 0.
    """
    group = tl.program_id(0)
    words += group * WORDS
    numbers += group * NUMBERS
    keys += group * 6
    step = tl.load(tl.load(words + STEP_AT).to(tl.pointer_type(tl.int64)))
    seed, high = tl.load(words + SEED), tl.load(words + HIGH)
    zero = step * 0
    _write_key(keys, seed, step, zero, zero + learned, high)
    _write_key(keys + 3, seed, step + ahead, zero + stream, zero + number, high)
    lr = tl.load(words + LR_AT)
    if lr != 0:
        tl.store(numbers + LR, tl.load(lr.to(tl.pointer_type(tl.float32))))
    if tl.load(words + DEBIAS) != 0:
        beta = tl.load(words + BETA).to(tl.float64, bitcast=True)
        power = tl.exp(tl.log(beta) * (step + 1).to(tl.float64))
        tl.store(numbers + UNBIAS, (1 / (1 - power)).to(tl.float32))


# ---- tensors ------------------------------------------------------------------------------------


@_jit
def _read(row, column: tl.constexpr, kind: tl.constexpr, base, lanes, inside, FULL: tl.constexpr):
    """Elements base + lanes of a tensor as float32; where FULL, four at a time."""
    at = tl.load(row + column).to(tl.pointer_type(kind)) + base
    if FULL:
        return tl.load(tl.multiple_of(at, 16) + lanes).to(tl.float32)
    return tl.load(at + lanes, mask=inside, other=1.0).to(tl.float32)


@_jit
def _write(
    row, column: tl.constexpr, kind: tl.constexpr, base, lanes, inside, FULL: tl.constexpr, value
):
    at = tl.load(row + column).to(tl.pointer_type(kind)) + base
    if FULL:
        tl.store(tl.multiple_of(at, 16) + lanes, value.to(kind))
    else:
        tl.store(at + lanes, value.to(kind), mask=inside)


@_jit
def _learn(numbers, m, gbar, h, g, product, delta, shift, PRIOR: tl.constexpr):
    """m, ḡ and h after a step: `_functional.ivon_step_`."""
    s = h + delta
    r = h - tl.load(numbers + ESS) * s * product
    h += tl.load(numbers + FORGETS) * r + tl.load(numbers + CURVES) * (r * r / s)
    gbar = tl.load(numbers + DECAY) * gbar + tl.load(numbers + ENTERS) * g
    u = (m * delta + tl.load(numbers + UNBIAS) * gbar - shift) / (h + delta)
    clip = tl.load(numbers + CLIP)
    u = tl.where(u > clip, clip, tl.where(u < -clip, -clip, u))
    rate = tl.load(numbers + SCALE)
    if PRIOR:
        rate += tl.load(numbers + TILT) * delta
    return m - tl.load(numbers + LR) * rate * u, gbar, h


@_jit
def _half(
    row, numbers, base, lanes, inside, weight, noise, fresh,
    P: tl.constexpr, G: tl.constexpr, FULL: tl.constexpr, HELD: tl.constexpr, PRIOR: tl.constexpr,
    UPDATE: tl.constexpr, SEVERAL: tl.constexpr, ADD: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """What is done to one half of the blocks: `step` with noise, old and fresh."""
    short: tl.constexpr = P != tl.float32
    if HELD or short:
        m = _read(row, MEAN, tl.float32, base, lanes, inside, FULL)
    else:
        m = _read(row, PARAMETER, P, base, lanes, inside, FULL)
    if short and SAMPLE and not HELD:
        # Others may have changed the parameter while it showed the mean.
        shown = _read(row, PARAMETER, P, base, lanes, inside, FULL)
        m = tl.where(m.to(P).to(tl.float32) == shown, m, shown)
    if UPDATE or ADD or SAMPLE:
        h = _read(row, HESS, tl.float32, base, lanes, inside, FULL)
        ess = tl.load(numbers + ESS)
        delta = tl.load(numbers + DELTA)
        shift = 0.0
        if PRIOR:
            delta = _read(row, PRECISION, tl.float32, base, lanes, inside, FULL) / ess
            shift = _read(row, SHIFT, tl.float32, base, lanes, inside, FULL) / ess
    if UPDATE or ADD:
        g = _read(row, GRADIENT, G, base, lanes, inside, FULL)
        if SEVERAL:
            product = _read(row, PRODUCT, tl.float32, base, lanes, inside, FULL)
        else:
            # The sample had been rounded to float32 too.
            product = ((m + noise * tl.rsqrt(ess * (h + delta))) - m) * g
    if ADD:
        product = _read(row, PRODUCT, tl.float32, base, lanes, inside, FULL) + weight * product
        _write(row, PRODUCT, tl.float32, base, lanes, inside, FULL, product)
    if UPDATE:
        gbar = _read(row, MOMENTUM, tl.float32, base, lanes, inside, FULL)
        m, gbar, h = _learn(numbers, m, gbar, h, g, product, delta, shift, PRIOR)
        _write(row, MOMENTUM, tl.float32, base, lanes, inside, FULL, gbar)
        _write(row, HESS, tl.float32, base, lanes, inside, FULL, h)
    if (UPDATE and (HELD or short)) or (SAMPLE and not HELD):
        _write(row, MEAN, tl.float32, base, lanes, inside, FULL, m)
    if SAMPLE:
        theta = m + fresh * tl.rsqrt(ess * (h + delta))
        _write(row, PARAMETER, P, base, lanes, inside, FULL, theta)
    elif not ADD:
        _write(row, PARAMETER, P, base, lanes, inside, FULL, m)


@_jit
def _both(
    row, numbers, keys, base, pair, weight,
    P: tl.constexpr, G: tl.constexpr, FULL: tl.constexpr, HELD: tl.constexpr, PRIOR: tl.constexpr,
    UPDATE: tl.constexpr, SEVERAL: tl.constexpr, ADD: tl.constexpr, SAMPLE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The lower and the upper half of `ROWS` blocks, and their noise."""
    i = tl.arange(0, ROWS * HALF)
    lower, upper = 0.0, 0.0
    if ADD or (UPDATE and not SEVERAL):
        lower, upper = _normals(pair + i.to(tl.uint32), keys)
    low, high = 0.0, 0.0
    if SAMPLE:
        low, high = _normals(pair + i.to(tl.uint32), keys + 3)
    lanes = i // HALF * BLOCK + i % HALF
    size = tl.load(row + SIZE)
    inside = (base + lanes >= 0) & (base + lanes < size)
    _half(
        row, numbers, base, lanes, inside, weight, lower, low,
        P, G, FULL, HELD, PRIOR, UPDATE, SEVERAL, ADD, SAMPLE,
    )  # fmt: skip
    lanes += HALF
    inside = (base + lanes >= 0) & (base + lanes < size)
    _half(
        row, numbers, base, lanes, inside, weight, upper, high,
        P, G, FULL, HELD, PRIOR, UPDATE, SEVERAL, ADD, SAMPLE,
    )  # fmt: skip


@_jit
def _place(row, chunk, ROWS: tl.constexpr):
    """(number of the first pair, its first element in the tensor, whether all are inside)."""
    first = tl.load(row + FIRST)
    span = ROWS * BLOCK
    start = (first // span + chunk) * span
    base = start - first
    full = (base >= 0) & (base + span <= tl.load(row + SIZE)) & (tl.load(row + ALIGNED) != 0)
    return start // 2, base, full


@_jit
def step(
    table, chunks, numbers, keys, gate, mark, weight,
    P: tl.constexpr, G: tl.constexpr, HELD: tl.constexpr, PRIOR: tl.constexpr,
    UPDATE: tl.constexpr, SEVERAL: tl.constexpr, ADD: tl.constexpr, SAMPLE: tl.constexpr,
    GATED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program for `ROWS` blocks of a tensor: learn, and then show a sample or the mean.

    Args:
        table: Addresses and places of the tensors, int64, `COLUMNS` for each.
        chunks: (tensor, which of its chunks) for each program, int32.
        numbers: Options, float32, `NUMBERS` for each group.
        keys: Keys of the noise to learn from and of the next sample, int32, six for each group.
        gate: Where 0 and GATED, nothing is done.
        mark: Set to 1 by a sample that is placed where the mean was.
        weight: Of the product that is added.
        P: Type of the parameters.
        G: Type of the gradients.
        HELD: Whether the parameters hold a sample and the mean is in the state.
        PRIOR: Whether each element has its own prior.
        UPDATE: Learn from the gradients.
        SEVERAL: From the product in the state, not from that of one sample.
        ADD: Only add the product of a sample to that in the state.
        SAMPLE: Show a fresh sample afterwards; the mean otherwise.
        GATED: Whether the gate is read.
        ROWS: Blocks of a program, a power of 2.
    """
    program = tl.program_id(0)
    if SAMPLE and not HELD:
        if program == 0:
            tl.store(mark, 1)
    go = True
    if GATED:
        go = tl.load(gate) != 0
    if go:
        row = table + tl.load(chunks + 2 * program) * COLUMNS
        group = tl.load(row + SET)
        numbers += group * NUMBERS
        keys += group * 6
        pair, base, full = _place(row, tl.load(chunks + 2 * program + 1).to(tl.int64), ROWS)
        pair = pair.to(tl.uint32)
        if full:
            _both(
                row, numbers, keys, base, pair, weight,
                P, G, True, HELD, PRIOR, UPDATE, SEVERAL, ADD, SAMPLE, ROWS,
            )  # fmt: skip
        else:
            _both(
                row, numbers, keys, base, pair, weight,
                P, G, False, HELD, PRIOR, UPDATE, SEVERAL, ADD, SAMPLE, ROWS,
            )  # fmt: skip


@_jit
def finite(table, chunks, gate, G: tl.constexpr, ROWS: tl.constexpr):
    """Set the gate to 0 if a gradient is NaN or infinite."""
    program = tl.program_id(0)
    row = table + tl.load(chunks + 2 * program) * COLUMNS
    _, base, full = _place(row, tl.load(chunks + 2 * program + 1).to(tl.int64), ROWS)
    lanes = tl.arange(0, ROWS * BLOCK)
    if full:
        g = _read(row, GRADIENT, G, base, lanes, True, True)
    else:
        inside = (base + lanes >= 0) & (base + lanes < tl.load(row + SIZE))
        g = _read(row, GRADIENT, G, base, lanes, inside, False)
    # Zero times anything finite is zero; the rest is NaN, and spreads.
    if tl.sum(g * 0, axis=0) != 0:
        tl.store(gate, 0)

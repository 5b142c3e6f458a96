"""What the kernels share: tiles of rows in memory, numbers m * 2^e, and the sizes of tiles.

Only block sizes and flags are constexpr, and no integer is specialised, so that another batch or
another number of frames never compiles anything. What vectorised loads must know of a stride is in
UNIT, a power of two that divides every stride and the number of classes.
"""

import contextlib
import functools
import math
import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Elements of a tile, chains of a program. The interpreter runs a program as a few numpy calls: the
# larger the tile the better.
TILE = 1 << 16 if INTERPRETED else 1 << 10
LARGEST_ROW = 1 << 13  # classes of a row that is held on chip
GROUP = 16 if INTERPRETED else 1

INF = tl.constexpr(math.inf)
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))

# Exponents: that of a state with probability 0, and of a symbol with probability 0. Between two
# normalisations four of the latter may be added to the former without overflow.
ZERO_STATE = tl.constexpr(-(1 << 27))
ZERO_SYMBOL = tl.constexpr(-(1 << 25))
# A likelihood below 2^ZERO_LIKELIHOOD passed through a symbol with probability 0.
ZERO_LIKELIHOOD = tl.constexpr(-(1 << 24))

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def tl_dtype(dtype):
    return _TYPES[dtype]


def on_its_device(function):
    """Triton launches on the current device: make that the one of the first argument."""

    @functools.wraps(function)
    def run(first, *rest):
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            return function(first, *rest)

    return run


def jit(function):
    """triton.jit without specialisation on the values of integers."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    flags = [name for name, kind in function.__annotations__.items() if kind is tl.constexpr]
    plain = [name for name in names if name not in flags and not name.endswith("_ptr")]
    return triton.jit(do_not_specialize=plain)(function)


def as_bytes(x):
    """bool as uint8: what a kernel can load."""
    return x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x


def unit_of(C, *tensors):
    """The power of two, at most 16 bytes of the narrowest, that divides C and all strides."""
    tensors = [x for x in tensors if x is not None]
    unit = 16 // min(x.element_size() for x in tensors)
    sizes = [C] + [n for x in tensors for n in x.stride()[:-1]]
    return math.gcd(unit, *sizes)


def tile_of(rows, C, largest=LARGEST_ROW):
    """(rows of a tile, classes of a tile, warps), of a tensor of `rows` rows."""
    block = min(triton.next_power_of_2(C), largest)
    few = triton.next_power_of_2(rows) if INTERPRETED else TILE
    rows = max(1, min(TILE // block, few))
    return rows, block, min(16, max(4, rows * block // 512)) if not INTERPRETED else 1


@triton.jit
def power_of_two(n, FLOAT: tl.constexpr):
    """2^n; 0 where that would be subnormal."""
    if FLOAT == tl.float64:
        return (tl.maximum(n + 1023, 0).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    else:
        return (tl.maximum(n + 127, 0) << 23).to(tl.float32, bitcast=True)


@triton.jit
def normalised(m, e, FLOAT: tl.constexpr):
    """m * 2^e with m in [1, 2)."""
    if FLOAT == tl.float64:
        bits = m.to(tl.int64, bitcast=True)
        m = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
        shift = (bits >> 52).to(tl.int32) - 1023
    else:
        bits = m.to(tl.int32, bitcast=True)
        m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        shift = (bits >> 23) - 127
    return m, tl.maximum(e + shift, ZERO_STATE)


@triton.jit
def add(m, e, m2, e2, FLOAT: tl.constexpr):
    top = tl.maximum(e, e2)
    return m * power_of_two(e - top, FLOAT) + m2 * power_of_two(e2 - top, FLOAT), top


@triton.jit
def scalar(x, FLOAT: tl.constexpr):
    """A number as a tile of one element."""
    return tl.full([1, 1], x, FLOAT)


@triton.jit
def widened(x, FLOAT: tl.constexpr):
    return x.to(tl.float32).to(FLOAT) if x.dtype == tl.bfloat16 else x.to(FLOAT)


@triton.jit
def narrowed(x, ptr):
    """`x` as it is stored at `ptr`: to half precision from float32."""
    return x if ptr.dtype.scalar.element_ty == tl.float64 else x.to(tl.float32)


@triton.jit
def row_sum(x):
    return tl.sum(x, 1, keep_dims=True)


@triton.jit
def row_max(x):
    return tl.max(x, 1, keep_dims=True)


@triton.jit
def difference(a, b):
    """a - b as two: rounded, and what the rounding lost."""
    d = a - b
    minus_b = d - a
    return d, (a - (d - minus_b)) - (b + minus_b)


@triton.jit
def exp_scaled(x, scale, FLOAT: tl.constexpr):
    """e^(x scale)"""
    if FLOAT == tl.float64:
        return tl.exp(x * scale)
    return tl.exp2(x * (scale * LOG2E))


@triton.jit
def softmax_begin(ROWS: tl.constexpr, FLOAT: tl.constexpr):
    """(largest logit, sum of the exponentials without one of the largest)"""
    return tl.full([ROWS, 1], -INF, FLOAT), tl.full([ROWS, 1], -1, FLOAT)


@triton.jit
def softmax_tile(x, scale, FLOAT: tl.constexpr):
    """The same of one tile, and its exponentials. The largest is not summed but counted, since a
    certain row has almost nothing else, and what there is must not be rounded to it."""
    top = row_max(x)
    largest = x == top
    e = exp_scaled(x - top, scale, FLOAT)
    rest = row_sum(tl.where(largest, 0.0, e)) + (row_sum(largest.to(tl.int32)) - 1).to(FLOAT)
    return top, rest, e


@triton.jit
def softmax_merge(top, rest, here, here_rest, scale, FLOAT: tl.constexpr):
    """The same of what two were made of."""
    above = rest + (here_rest + 1) * exp_scaled(here - top, scale, FLOAT)
    below = here_rest + (rest + 1) * exp_scaled(top - here, scale, FLOAT)
    joined = tl.where(top > here, above, tl.where(top < here, below, rest + here_rest + 1))
    return tl.maximum(top, here), joined


@triton.jit
def softmax_join(top, rest, x, scale, FLOAT: tl.constexpr):
    """Takes a tile along."""
    here, here_rest, _ = softmax_tile(x, scale, FLOAT)
    return softmax_merge(top, rest, here, here_rest, scale, FLOAT)


@triton.jit
def softmax_end(top, rest):
    """nan where the row is not a distribution."""
    return tl.where(tl.abs(top) < INF, rest, float("nan"))

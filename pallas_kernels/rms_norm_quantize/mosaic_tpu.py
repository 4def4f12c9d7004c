"""RMSNorm and quantisation as a Pallas TPU kernel: reads each row once from memory, and twice from VMEM.

The first look at a row sums its squares and finds its largest weighted magnitude; both need no normalised value,
because 1 / rms is one number a row. The second multiplies by weight / (rms scale) and rounds.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, interpret
from pallas_kernels.rms_norm_quantize.xla import LEVELS, SMALLEST
from pallas_kernels.tiles import LANES, VMEM_BYTES

DTYPES = ("float32", "bfloat16")
GROUP = 32  # rows of one register of int8
MAX_ROWS = 256
# Added to a number below 2^22, it leaves the nearest integer (half to even) in the low bits.
ROUND, ROUND_BITS = 1.5 * 2.0**23, 0x4B400000


def block_rows(rows: int, width: int) -> int | None:
    """Rows of a block: all of a few, else a power of two of them that fits VMEM; None when 32 do not."""
    size = MAX_ROWS
    while size * width * 10 > VMEM_BYTES:  # x of 4 bytes and int8, twice each
        size //= 2
    if size < GROUP:
        return None
    return rows if rows < GROUP else min(size, pl.cdiv(rows, GROUP) * GROUP)


def supports(x, weight, *, eps: float) -> None:
    """Raises UnsupportedError where `forward` does not honour an argument."""
    del eps
    for name, array in (("x", x), ("weight", weight)):
        if array is not None and jnp.dtype(array.dtype).name not in DTYPES:
            raise dispatch.UnsupportedError(
                f"rms_norm_quantize: mosaic_tpu does not read {array.dtype}: {name} must be one of {DTYPES}"
            )
    if block_rows(*x.shape) is None:
        raise dispatch.UnsupportedError(f"rms_norm_quantize: mosaic_tpu does not hold rows of D={x.shape[1]} in VMEM")


def forward(x, weight, *, eps: float):
    """Returns (q int8 [M, D], scale float32 [M]); arguments as in `rms_norm_quantize`."""
    rows, width = x.shape
    size = block_rows(rows, width)
    assert size is not None  # `supports` was asked
    row_block = pl.BlockSpec((size, width), lambda i: (i, 0))
    operands, specs = [x], [row_block]
    if weight is not None:
        operands.append(weight[None].astype(jnp.float32))
        specs.append(pl.BlockSpec((1, width), lambda i: (0, 0)))
    q, scale = pl.pallas_call(
        functools.partial(_kernel, eps=eps),
        grid=(pl.cdiv(rows, size),),
        in_specs=specs,
        out_specs=[row_block, pl.BlockSpec((size, 1), lambda i: (i, 0))],
        out_shape=[jax.ShapeDtypeStruct((rows, width), jnp.int8), jax.ShapeDtypeStruct((rows, 1), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret.parameters(),
        name="rms_norm_quantize",
    )(*operands)
    return q, scale[:, 0]


def _kernel(x_ref, *refs, eps: float):
    *weight_ref, q_ref, scale_ref = refs
    width = x_ref.shape[1]
    chunks = [slice(start, min(start + LANES, width)) for start in range(0, width, LANES)]

    def load(rows, columns):
        x = x_ref[rows, columns].astype(jnp.float32)
        return x, x * weight_ref[0][:, columns] if weight_ref else x

    size = min(GROUP, x_ref.shape[0])
    # A maximum may pass over NaN, a sum does not.
    usable = jnp.sum(jnp.abs(weight_ref[0][...]), axis=1, keepdims=True) < jnp.inf if weight_ref else True

    def group(i, carry):
        rows = pl.ds(pl.multiple_of(i * size, size), size)
        square, largest = _look(functools.partial(load, rows), chunks)
        mean_square = square / width
        rstd = lax.rsqrt(mean_square + eps)
        largest = rstd * largest
        finite = (mean_square < jnp.inf) & (largest < jnp.inf) & usable
        largest = jnp.maximum(largest, SMALLEST)
        scale_ref[rows, :] = jnp.where(finite, largest / LEVELS, jnp.nan)
        factor = rstd * (LEVELS / largest)
        for columns in chunks:
            rounded = load(rows, columns)[1] * factor + ROUND
            q = jnp.where(finite, lax.bitcast_convert_type(rounded, jnp.int32) - ROUND_BITS, 0)
            q_ref[rows, columns] = q.astype(jnp.int8)
        return carry

    lax.fori_loop(0, x_ref.shape[0] // size, group, 0)


def _look(load, chunks):
    """(sum of squares, largest weighted magnitude) [rows, 1]; lanes meet once, those of a narrower last chunk apart."""
    full = [columns for columns in chunks if columns.stop - columns.start == LANES]
    squares, magnitudes = [], []
    for columns in full:
        x, y = load(columns)
        squares = [squares[0] + x * x] if squares else [x * x]
        magnitudes = [jnp.maximum(magnitudes[0], jnp.abs(y))] if magnitudes else [jnp.abs(y)]
    for columns in chunks[len(full) :]:
        x, y = load(columns)
        squares.append(x * x)
        magnitudes.append(jnp.abs(y))
    square = sum(jnp.sum(v, axis=1, keepdims=True) for v in squares)
    return square, functools.reduce(jnp.maximum, [jnp.max(v, axis=1, keepdims=True) for v in magnitudes])

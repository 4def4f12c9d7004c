"""Ternary products as a Pallas TPU kernel: weights stay packed in HBM and are unpacked once per block of outputs.

Of the layouts, `i2_s_columns` is the one of the TPU's registers: a register of int8 holds 32 rows of 128 lanes, and the
four codes of a byte are weights 32 rows apart, so that one register of bytes becomes, by shifts and masks alone, four
registers: the 128 x 128 tile of weights that the matrix unit takes next.

The grid runs over blocks of outputs in parallel and over blocks of rows in order. The first block of rows unpacks the
weights of its outputs into VMEM, all of K; the others reuse them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, interpret
from pallas_kernels.tiles import LANES, VMEM_BYTES

LAYOUT = "i2_s_columns"
DTYPES = ("int32", "float32", "bfloat16")
CHUNK = 512  # inputs per step of the product
MAX_ROWS, MAX_OUTPUTS = 256, 512


def block_sizes(rows: int, inputs: int, outputs: int) -> tuple[int, int] | None:
    """(rows, outputs) of a block of the result, the largest that fit VMEM; None when none does."""
    return min(rows, MAX_ROWS), min(outputs, MAX_OUTPUTS)


def supports(x, w, x_scale, w_scale, *, layout: str, dtype: str) -> None:
    """Raises UnsupportedError where `forward` does not honour an argument."""


def forward(x, w, x_scale, w_scale, *, layout: str, dtype: str):
    (rows, inputs), outputs = x.shape, w.shape[1]
    block_rows, block_outputs = block_sizes(rows, inputs, outputs)
    scales, scale_specs = [], []
    if x_scale is not None:
        per_output = w_scale.ndim == 1
        scales = [x_scale[:, None], w_scale[None]] if per_output else [(x_scale * w_scale)[:, None]]
        scale_specs = [
            pl.BlockSpec((block_rows, 1), lambda j, i: (i, 0)),
            pl.BlockSpec((1, block_outputs), lambda j, i: (0, j)),
        ]
    return pl.pallas_call(
        _kernel,
        grid=(pl.cdiv(outputs, block_outputs), pl.cdiv(rows, block_rows)),
        in_specs=[
            pl.BlockSpec((block_rows, inputs), lambda j, i: (i, 0)),
            pl.BlockSpec((inputs // 4, block_outputs), lambda j, i: (0, j)),
            *scale_specs[: len(scales)],
        ],
        out_specs=pl.BlockSpec((block_rows, block_outputs), lambda j, i: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), dtype),
        scratch_shapes=[
            pltpu.VMEM((inputs, block_outputs), jnp.int8),
            pltpu.VMEM((block_rows, block_outputs), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret.parameters(),
        name="ternary_matmul",
    )(x, w, *scales)


def _kernel(x_ref, packed_ref, *refs):
    *scale_refs, out_ref, w_ref, total_ref = refs
    inputs = x_ref.shape[1]

    @pl.when(pl.program_id(1) == 0)
    def _():
        def tile(b, _):
            words = pltpu.bitcast(packed_ref[pl.ds(pl.multiple_of(b * 32, 32), 32), :], jnp.int32)
            for i in range(4):
                codes = lax.shift_right_logical(words, 6 - 2 * i) & 0x03030303
                signed = ((codes | -0x7F7F7F80) - 0x01010101) ^ -0x7F7F7F80
                w_ref[pl.ds(pl.multiple_of(b * 128 + 32 * i, 32), 32), :] = pltpu.bitcast(signed, jnp.int8)
            return 0
        lax.fori_loop(0, inputs // 128, tile, 0)

    def dot(start, size):
        where = pl.ds(pl.multiple_of(start, LANES), size)
        return jnp.dot(x_ref[:, where], w_ref[where, :], preferred_element_type=jnp.int32)

    full, tail = divmod(inputs, CHUNK)
    total_ref[...] = dot(full * CHUNK, tail) if tail else jnp.zeros_like(total_ref)

    def step(c, _):
        total_ref[...] += dot(c * CHUNK, CHUNK)
        return 0

    lax.fori_loop(0, full, step, 0)
    total = total_ref[...]
    if scale_refs:
        scale = scale_refs[0][...]
        if len(scale_refs) == 2:
            scale = scale * scale_refs[1][...]
        total = total.astype(jnp.float32) * scale
    out_ref[...] = total.astype(out_ref.dtype)

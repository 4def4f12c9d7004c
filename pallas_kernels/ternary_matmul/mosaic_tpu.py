"""Ternary products as Pallas TPU kernels: weights stay packed in HBM and are unpacked once per block of outputs.

Of the layouts, `i2_s_columns` is the one of the TPU's registers: a register of int8 holds 32 rows of 128 lanes, and the
four codes of a byte are weights 32 rows apart, so that one register of bytes becomes, by shifts and masks alone, four
registers: the 128 x 128 tile of weights that the matrix unit takes next. The other layouts would shuffle lanes or
transpose in every call; `packing.repack` does it once.

A few rows (decoding) are bound by the bytes of the weights: one kernel unpacks in registers on the way to the matrix
unit. Many rows are bound by the matrix unit: the grid runs over blocks of outputs in parallel and over blocks of rows in
order, the first block of rows unpacks the weights of its outputs into VMEM, all of K, and the others reuse them.
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
FEW_ROWS = 32  # whose sums stay in registers
MAX_ROWS, MAX_OUTPUTS = 256, 1024
SUB_OUTPUTS = 256  # outputs of one product: its sums of 256 rows fill the registers
UNROLL, UNROLL_STORES = 20, 4  # blocks of 128 inputs per step of a loop
_LOW_BITS, _HIGH_BITS = 0x01010101, -0x7F7F7F80  # of every byte: 0x01 and 0x80


def block_sizes(rows: int, inputs: int, outputs: int) -> tuple[int, int] | None:
    """(rows, outputs) of a block of the result: fits VMEM, few blocks, little padding; None when K is too large.

    Args:
      rows: M.
      inputs: K.
      outputs: N.
    """
    few = rows <= FEW_ROWS
    blocks = pl.cdiv(rows, MAX_ROWS)
    block_rows = rows if few else pl.cdiv(pl.cdiv(rows, blocks), 32) * 32
    while True:
        # Twice what comes and goes: bytes of weights, activations, results; unpacked weights once.
        space = VMEM_BYTES - 2 * max(block_rows, 32) * inputs
        per_output = inputs // 2 + 8 * max(block_rows, 32) + (0 if few else inputs)
        limit = min(MAX_OUTPUTS, space // per_output // LANES * LANES)
        if limit >= LANES:
            widths = range(min(limit, pl.cdiv(outputs, LANES) * LANES), 0, -LANES)
            # A block costs about as much again as half a register of outputs.
            return block_rows, min(widths, key=lambda width: pl.cdiv(outputs, width) * (width + LANES // 2))
        if few or block_rows <= 32:
            return None
        block_rows = pl.cdiv(block_rows // 2, 32) * 32


def supports(x, w, x_scale, w_scale, *, layout: str, dtype: str) -> None:
    """Raises UnsupportedError where `forward` does not honour an argument."""
    del x_scale, w_scale
    if layout != LAYOUT:
        raise dispatch.UnsupportedError(
            f"ternary_matmul: mosaic_tpu does not read layout={layout!r}: bring w to {LAYOUT!r} once, with "
            f"repack(w, {layout!r}, {LAYOUT!r})"
        )
    if dtype not in DTYPES:
        raise dispatch.UnsupportedError(
            f"ternary_matmul: mosaic_tpu does not write dtype={dtype}; it writes {', '.join(DTYPES)}"
        )
    if block_sizes(*x.shape, w.shape[1]) is None:
        raise dispatch.UnsupportedError(
            f"ternary_matmul: mosaic_tpu does not hold K={x.shape[1]} inputs of x in VMEM; split the sum"
        )


def forward(x, w, x_scale, w_scale, *, layout: str, dtype: str):
    """Returns [M, N]: int32 accumulators where the scales are None; arguments as in `ternary_matmul`."""
    del layout
    (rows, inputs), outputs = x.shape, w.shape[1]
    sizes = block_sizes(rows, inputs, outputs)
    assert sizes is not None  # `supports` was asked
    block_rows, block_outputs = sizes
    few = rows <= FEW_ROWS
    operands = [x, w]
    specs = [
        pl.BlockSpec((block_rows, inputs), lambda j, i: (i, 0)),
        pl.BlockSpec((inputs // 4, block_outputs), lambda j, i: (0, j)),
    ]
    if x_scale is not None:
        per_output = w_scale.ndim == 1
        operands.append(x_scale[:, None] if per_output else (x_scale * w_scale)[:, None])
        specs.append(pl.BlockSpec((block_rows, 1), lambda j, i: (i, 0)))
        if per_output:
            operands.append(w_scale[None])
            specs.append(pl.BlockSpec((1, block_outputs), lambda j, i: (0, j)))
    return pl.pallas_call(
        _few_rows_kernel if few else _kernel,
        grid=(pl.cdiv(outputs, block_outputs), pl.cdiv(rows, block_rows)),
        in_specs=specs,
        out_specs=pl.BlockSpec((block_rows, block_outputs), lambda j, i: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), dtype),
        scratch_shapes=[] if few else [pltpu.VMEM((inputs, block_outputs), jnp.int8)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inputs * outputs,
            bytes_accessed=w.size + x.size + rows * outputs * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret.parameters(),
        name="ternary_matmul",
    )(*operands)


def _few_rows_kernel(x_ref, packed_ref, *refs):
    """One block of rows: sums in registers, weights from bytes to the matrix unit."""
    *scale_refs, out_ref = refs

    def add(block, total):
        x = x_ref[:, pl.ds(pl.multiple_of(block * LANES, LANES), LANES)]
        return total + jnp.dot(x, _unpack(packed_ref, block), preferred_element_type=jnp.int32)

    total = _loop(x_ref.shape[1] // LANES, UNROLL, add, jnp.zeros(out_ref.shape, jnp.int32))
    _write(out_ref, slice(None), total, scale_refs)


def _kernel(x_ref, packed_ref, *refs):
    """One block of many: the first unpacks the weights of its outputs for all."""
    *scale_refs, out_ref, w_ref = refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        def store(block, carry):
            w_ref[pl.ds(pl.multiple_of(block * LANES, LANES), LANES), :] = _unpack(packed_ref, block)
            return carry

        _loop(x_ref.shape[1] // LANES, UNROLL_STORES, store, 0)

    width = SUB_OUTPUTS if out_ref.shape[1] % SUB_OUTPUTS == 0 else LANES

    def product(n, carry):
        columns = pl.ds(pl.multiple_of(n * width, width), width)
        total = jnp.dot(x_ref[...], w_ref[:, columns], preferred_element_type=jnp.int32)
        _write(out_ref, columns, total, scale_refs)
        return carry

    lax.fori_loop(0, out_ref.shape[1] // width, product, 0)


def _unpack(packed_ref, block):
    """int8 weights [128, outputs] of a block of 128 inputs."""
    words = pltpu.bitcast(packed_ref[pl.ds(pl.multiple_of(block * 32, 32), 32), :], jnp.int32)
    parts = []
    for shift in (6, 4, 2, 0):
        codes = lax.shift_right_logical(words, shift) & (3 * _LOW_BITS)
        # code - 1 in every byte; the high bits keep the bytes from borrowing of each other.
        parts.append(pltpu.bitcast(((codes | _HIGH_BITS) - _LOW_BITS) ^ _HIGH_BITS, jnp.int8))
    return jnp.concatenate(parts, axis=0)


def _write(out_ref, columns, total, scale_refs) -> None:
    """Scales the sums; `scale_refs` are none, that of the rows, or those of rows and of outputs."""
    if scale_refs:
        scale = scale_refs[0][...]
        if len(scale_refs) == 2:
            scale = scale * scale_refs[1][:, columns]
        total = total.astype(jnp.float32) * scale
    out_ref[:, columns] = total.astype(out_ref.dtype)


def _loop(trips: int, limit: int, body, carry):
    """carry = body(i, carry) for i < trips, at most `limit` of them per step of the loop."""
    unroll = pl.cdiv(trips, pl.cdiv(trips, limit))

    def step(i, carry):
        for u in range(unroll):
            carry = body(i * unroll + u, carry)
        return carry

    carry = lax.fori_loop(0, trips // unroll, step, carry)
    return functools.reduce(lambda carry, i: body(i, carry), range(trips // unroll * unroll, trips), carry)

"""Ternary products as Pallas TPU kernels: weights stay packed in HBM and are unpacked once per block of outputs.

Of the layouts, `i2_s_columns` is the one of the TPU's registers: a register of int8 holds 32 rows of 128 lanes, and the
four codes of a byte are weights 32 rows apart, so that one register of bytes becomes, by shifts and masks alone, four
registers: the 128 x 128 tile of weights that the matrix unit takes next. The other layouts would shuffle lanes or
transpose in every call; `packing.repack` does it once.

Decoding is bound by the bytes of the weights: where one block holds all rows, weights are unpacked in registers on the
way to the matrix unit. Prefilling is bound by the matrix unit: the grid runs over blocks of outputs in parallel and
over blocks of rows in order, the first block of rows unpacks the weights of its outputs into VMEM, all of K, and the
others reuse them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, interpret
from pallas_kernels.tiles import LANES, VMEM_BYTES

LAYOUT = "i2_s_columns"
DTYPES = ("int32", "float32", "bfloat16")
MAX_ROWS, MAX_OUTPUTS = 256, 1024
UNIT = 256  # outputs of one product, whose sums over 256 rows fill the registers; width of the widest matrix unit
BLOCK = 128  # inputs of one register of bytes
STEP = 2  # blocks that are multiplied together: the depth of the deepest matrix unit
UNROLL, UNROLL_STORES = 10, 2  # steps per iteration of a loop
_LOW_BITS = 0x55555555  # of every code
_TOP_CODES = -0x3F3F3F40  # 0xC0C0C0C0: the first code of every byte
_SHIFT = 6  # the matrix unit sees weights times 64


def block_sizes(rows: int, inputs: int, outputs: int) -> tuple[int, int] | None:
    """(rows, outputs) of a block of the result: fits VMEM, few blocks, little padding; None when K is too large.

    Args:
      rows: M.
      inputs: K.
      outputs: N.
    """
    block_rows = rows if rows <= MAX_ROWS else _whole_tiles(rows, pl.cdiv(rows, MAX_ROWS))
    while True:
        held = max(block_rows, 32)
        # Held twice: activations, bytes of weights, results; once: sums, unpacked weights for further blocks of rows.
        per_output = inputs // 2 + 12 * held + (inputs if block_rows < rows else 0)
        limit = min(MAX_OUTPUTS, (VMEM_BYTES - 2 * held * inputs) // per_output)
        unit = UNIT if limit >= UNIT else LANES
        if limit >= unit:
            widths = range(min(limit // unit, pl.cdiv(outputs, unit)) * unit, 0, -unit)
            # A block costs about as much again as half a register of outputs.
            return block_rows, min(widths, key=lambda width: pl.cdiv(outputs, width) * (width + LANES // 2))
        if block_rows <= 32:
            return None
        block_rows = _whole_tiles(block_rows, 2)


def _whole_tiles(rows: int, blocks: int) -> int:
    """Rows of each of some blocks: whole registers of int8."""
    return pl.cdiv(pl.cdiv(rows, blocks), 32) * 32


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
    if block_sizes(x.shape[0], x.shape[1], w.shape[1]) is None:
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
    together = rows == block_rows
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
        _decode_kernel if together else _prefill_kernel,
        grid=(pl.cdiv(outputs, block_outputs), pl.cdiv(rows, block_rows)),
        in_specs=specs,
        out_specs=pl.BlockSpec((block_rows, block_outputs), lambda j, i: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), dtype),
        scratch_shapes=[] if together else [pltpu.VMEM((inputs, block_outputs), jnp.int8)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inputs * outputs,
            bytes_accessed=w.size + x.size + rows * outputs * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret.parameters(),
        name="ternary_matmul",
    )(*operands)


def _decode_kernel(x_ref, packed_ref, *refs):
    """All rows in one block: weights go from bytes to the matrix unit."""
    *scale_refs, out_ref = refs

    def add(block, count, total):
        x = x_ref[:, pl.ds(pl.multiple_of(block * BLOCK, BLOCK), count * BLOCK)]
        return total + jnp.dot(x, _unpack(packed_ref, block, count), preferred_element_type=jnp.int32)

    total = _loop(x_ref.shape[1] // BLOCK, UNROLL, add, jnp.zeros(out_ref.shape, jnp.int32))
    _write(out_ref, slice(None), total, scale_refs)


def _prefill_kernel(x_ref, packed_ref, *refs):
    """One block of rows of several: the first unpacks the weights of its outputs for all."""
    *scale_refs, out_ref, w_ref = refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        def store(block, count, carry):
            w_ref[pl.ds(pl.multiple_of(block * BLOCK, BLOCK), count * BLOCK), :] = _unpack(packed_ref, block, count)
            return carry

        _loop(x_ref.shape[1] // BLOCK, UNROLL_STORES, store, 0)

    unit = min(UNIT, out_ref.shape[1])
    for start in range(0, out_ref.shape[1], unit):
        columns = slice(start, start + unit)
        total = jnp.dot(x_ref[...], w_ref[:, columns], preferred_element_type=jnp.int32)
        _write(out_ref, columns, total, scale_refs)


def _unpack(packed_ref, block, count: int):
    """int8 64 w [128 count, outputs] of some blocks of inputs."""
    rows = BLOCK // 4
    words = ~pltpu.bitcast(packed_ref[pl.ds(pl.multiple_of(block * rows, rows), count * rows), :], jnp.int32)
    # w + 1 -> w in two bits, all sixteen codes of a word at once: 0, 1, 2 -> 0b11, 0b00, 0b01.
    words &= (words << 1) | _LOW_BITS
    parts = []
    for start in range(0, count * 8, 8):
        for shift in (0, 2, 4, 6):  # at the top of a byte, two bits are 64 w: no sign to extend
            parts.append(pltpu.bitcast((words[start : start + 8] << shift) & _TOP_CODES, jnp.int8))
    return jnp.concatenate(parts, axis=0)


def _write(out_ref, columns, total, scale_refs) -> None:
    """Scales the sums; `scale_refs` are none, that of the rows, or those of rows and of outputs."""
    # 64 a fits int32: VMEM holds fewer inputs than 2^31 / (64 * 128).
    total = lax.shift_right_arithmetic(total, _SHIFT)
    if scale_refs:
        scale = scale_refs[0][...]
        if len(scale_refs) == 2:
            scale = scale * scale_refs[1][:, columns]
        total = total.astype(jnp.float32) * scale
    out_ref[:, columns] = total.astype(out_ref.dtype)


def _loop(blocks: int, limit: int, body, carry):
    """carry = body(block, count, carry) over STEP blocks at a time, the last may be fewer."""
    steps = blocks // STEP
    unroll = pl.cdiv(steps, max(pl.cdiv(steps, limit), 1))

    def iteration(i, carry):
        for u in range(unroll):
            carry = body((i * unroll + u) * STEP, STEP, carry)
        return carry

    iterations = steps // unroll if unroll else 0
    carry = lax.fori_loop(0, iterations, iteration, carry)
    for block in range(iterations * unroll * STEP, blocks, STEP):
        carry = body(block, min(STEP, blocks - block), carry)
    return carry

"""Gated linear attention as Mosaic GPU kernels for Hopper: the forward pass without decay and with one per head.

Never run on a GPU: interpreted, lowered and compiled only.

A warpgroup walks over steps of 64 tokens with the float32 state of 64 columns of a head's values in its registers; the
next step's queries, keys, values and decays come by asynchronous copies meanwhile. Every (head, 64 columns) is a block
of threads of its own, so that the blocks share nothing.

Token i of a step sees token j through exp(g_{j+1} + ... + g_i), g the log decays. These sums are a matrix product too:
of the log decays up to i with ones behind j. The log decays are split in three numbers of 8 bits of mantissa, whose
products with ones are exact, so nothing cancels and nothing overflows. A reset is a log decay of `LOWEST`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention import mosaic_gpu_channel, xla
from pallas_kernels.gated_linear_attention.mosaic_gpu_layout import (
    AFTER,
    DECAYS,
    HIGH,
    LOW,
    MIDDLE,
    STEP,
    UNTIL,
    WHOLE,
    Layout,
    check_support,
    decayed,
    kernel,
    layout,
    load_state,
    multiply_transposed,
    slots,
)
from pallas_kernels.warpgroup import walk
from pallas_kernels.wgmma import (
    COLUMNS,
    MATRIX,
    ROWS,
    across,
    full,
    indices,
    join,
    load,
    matrix_ref,
    multiply,
    multiply_parts,
    split,
    split_array,
    split_ref,
    store,
)


def fill_ones(ref: Any) -> None:
    """Writes ones where the row is after the column, [64, 64], zeros elsewhere."""
    after = indices(ref.shape, 0) > indices(ref.shape, 1)
    ref[...] = jnp.where(after, full(ref.shape, 1.0, MATRIX), 0.0).astype(ref.dtype)


def weights(decays: Any, ones: Any) -> jax.Array:
    """[64, 64]: the decay from token j to token i, 0 unless j <= i; `ones` as of `fill_ones`."""
    shape = (STEP, STEP)
    seen = indices(shape, 1) <= indices(shape, 0)
    exponent = None
    for row in (HIGH, MIDDLE, LOW):
        part = across(load(decays.at[row], COLUMNS), shape, 1)
        exponent = multiply(jnp.where(seen, part, 0.0).astype(ones.dtype), ones, exponent)
    return jnp.where(seen, jnp.exp(exponent), 0.0)


def _forward_kernel(lay: Layout, scale: float, carried: bool, save: bool, shared: bool, *refs):
    *refs, q_smem, k_smem, v_smem, decays_smem, s_smem, ones, barrier = refs
    q_ref, k_ref, v_ref, decays_ref, *refs = refs
    state_ref = refs.pop(0) if carried else None
    y_ref, new_state_ref, *boundary_ref = refs
    b, g, h, unit, columns = lay.indices()
    in_place = v_smem.shape[0] > 1

    def leaving(slot):
        """Where y lies in shared memory: in the place of the values, or where these are about to come, of the state."""
        return v_smem.at[slot] if in_place else s_smem.at[:STEP]

    def fetch(step, slot):
        rows = pl.ds(step * STEP, STEP)
        arrived = barrier.at[slot]
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, g], q_smem.at[slot], arrived)
        plgpu.copy_gmem_to_smem(k_ref.at[b, rows, g], k_smem.at[slot], arrived)
        plgpu.copy_gmem_to_smem(v_ref.at[b, rows, unit], v_smem.at[slot], arrived)
        plgpu.copy_gmem_to_smem(decays_ref.at[0 if shared else b, h, step], decays_smem.at[slot], arrived)

    def body(step, slot, s):
        if save:

            @pl.when(jax.lax.rem(step, jnp.int32(lay.saves)) == 0)
            def _():
                boundary_ref[0].at[b, jax.lax.div(step, jnp.int32(lay.saves)), g, :, columns][...] = s

        decays = decays_smem.at[slot]
        q, k, v = (split_ref(ref.at[slot], lay.parts) for ref in (q_smem, k_smem, v_smem))
        state = split_ref(s_smem, lay.parts)
        store(state, s)
        plgpu.commit_smem()
        scores = multiply_parts(q, k, transpose=True) * weights(decays, ones)
        y = decayed(load(decays.at[UNTIL], ROWS), multiply_parts(q, state), 0)
        y = multiply_parts(split_array(scores, lay.parts, v_smem.dtype), v, y) * scale
        # What enters the state takes the place of the values.
        store(v, join(v, MATRIX) * across(load(decays.at[AFTER], ROWS), y.shape, 0))
        plgpu.commit_smem()
        s = multiply_transposed(k, v, decayed(load(decays.at[WHOLE], COLUMNS), s, 1))
        store(split_ref(leaving(slot), lay.parts), y)
        return s

    def write_out(step, slot):
        plgpu.copy_smem_to_gmem(leaving(slot), y_ref.at[b, pl.ds(step * STEP, STEP), unit], commit_group=False)

    fill_ones(ones)
    start = full((lay.key, STEP), 0.0, MATRIX) if state_ref is None else load_state(state_ref.at[b, g, :, columns])
    s = walk(lay.steps, v_smem.shape[0], barrier, fetch, body, write_out, start, in_place=in_place)
    new_state_ref.at[b, g, :, columns][...] = s


def scratch(lay: Layout, count: int) -> list[Any]:
    """Buffers for `count` steps."""
    rows, width = (count, STEP, lay.parts * lay.key), lay.parts * STEP
    return [
        *[matrix_ref(rows, jnp.bfloat16)] * 2,
        matrix_ref((count, STEP, width), jnp.bfloat16),
        plgpu.SMEM((count, DECAYS, STEP), jnp.float32),
        matrix_ref((lay.key, width), jnp.bfloat16),
        matrix_ref((STEP, STEP), jnp.bfloat16),
        plgpu.Barrier(num_arrivals=4, num_barriers=count),
    ]


def supports(q, k, v, log_decay, state, reset, valid, *, scale: float, chunk_size: int, save: bool) -> None:
    """Raises UnsupportedError where `forward` does not serve an argument."""
    by_channel = log_decay is not None and log_decay.ndim == 4
    check_support(q, k, v, chunk_size, mosaic_gpu_channel.forward_scratch if by_channel else scratch)


def forward(q, k, v, log_decay, state, reset, valid, *, scale: float, chunk_size: int, save: bool):
    """Returns (y, new_state, boundaries) as `xla.forward` does."""
    if q.shape[1] == 1:  # one token is bound by the state's traffic: XLA fuses it into one pass
        return xla.forward(q, k, v, log_decay, state, reset, valid, scale=scale, chunk_size=chunk_size, save=save)
    if log_decay is not None and log_decay.ndim == 4:
        arrays = (q, k, v, log_decay, state, reset, valid)
        return mosaic_gpu_channel.forward(*arrays, scale=scale, chunk_size=chunk_size, save=save)
    lay, batch = layout(q, v, chunk_size), q.shape[0]
    decays = lay.decays(log_decay, reset, valid)
    arrays = [split(x) for x in (lay.tokens(q, valid), lay.tokens(k, valid), lay.columns(v, valid))] + [decays]
    if state is not None:
        arrays.append(xla.flat(state, lay.groups))
    buffers = scratch(lay, slots(functools.partial(scratch, lay)))
    body = functools.partial(_forward_kernel, lay, scale, state is not None, save, decays.shape[0] == 1)
    grid, out_type = {"unit": lay.units, "batch": batch}, lay.outputs(batch, save)
    return lay.results(*kernel("forward", body, out_type, buffers, grid)(*arrays), valid=valid)

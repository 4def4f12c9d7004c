"""Gated linear attention as Mosaic GPU kernels: the backward pass with a decay per channel of the key.

Never run on a GPU: interpreted, lowered and compiled only.

The forward pass's kernel makes scores and decayed queries and keys again, and XLA the states before every step, as with
a decay per head. One kernel walks from the last step to the first with the gradient of the state of 64 columns of a
head's values in registers, and writes it out after every step in the parts of q. From both kinds of states, y's
gradients and values XLA makes, in products for all steps at once, the gradients of scores and of decayed queries and
keys. Another kernel, with a block of threads for every step, brings these back to queries, keys and log decays.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention import xla
from pallas_kernels.gated_linear_attention.mosaic_gpu_channel import (
    LEVELS,
    SQUARE,
    Blocks,
    Tokens,
    decay,
    decays,
    half,
    prepare,
    write_rows,
)
from pallas_kernels.gated_linear_attention.mosaic_gpu_layout import (
    SLOTS,
    STEP,
    Layout,
    decayed,
    kernel,
    layout,
    load_state,
    multiply_transposed,
    product,
    slots,
    states_before,
    where_it_moves,
)
from pallas_kernels.warpgroup import walk
from pallas_kernels.wgmma import (
    COLUMNS,
    MATRIX,
    ROWS,
    across,
    full,
    join,
    load,
    matrix_ref,
    multiply,
    multiply_parts,
    split,
    split_ref,
    store,
)


def _kernel(lay: Layout, scale: float, *refs):
    q_ref, k_ref, dy_ref, scores_ref, whole_ref, states_ref, dstate_ref, *refs = refs
    dv_ref, dstates_ref, passing_ref, dbefore_ref, *refs = refs
    *buffers, dv_smem, ds_smem, barrier = refs
    b, g, _, unit, columns = lay.indices()
    blocks = [slice(start, start + STEP) for start in range(0, lay.key, STEP)]

    def fetch(index, slot):
        step = lay.steps - 1 - index
        rows = pl.ds(step * STEP, STEP)
        sources = (
            q_ref.at[b, rows, g],
            k_ref.at[b, rows, g],
            dy_ref.at[b, rows, unit],
            scores_ref.at[b, g, step],
            whole_ref.at[b, g, step],
            states_ref.at[b, step, g, :, lay.in_parts(columns)],
        )
        for source, buffer in zip(sources, buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], barrier.at[slot])

    def body(index, slot, carry):
        q, k, dy, within, whole, s = (buffer.at[slot] for buffer in buffers)
        q, k, dy, within, s = (split_ref(ref, lay.parts) for ref in (q, k, dy, within, s))
        after, dv = (split_ref(ref.at[slot], lay.parts) for ref in (ds_smem, dv_smem))
        for at, ds in zip(blocks, carry, strict=True):
            store([part.at[at] for part in after], ds)
        plgpu.commit_smem()
        store(dv, multiply_parts(k, after, multiply_transposed(within, dy) * scale))
        before = []
        for at, ds in zip(blocks, carry, strict=True):
            factor = load(whole.at[at], ROWS)
            passing = jnp.sum(decayed(factor, join([part.at[at] for part in s], MATRIX) * ds, 0), axis=1)
            passing_ref.at[b, unit, lay.steps - 1 - index, at][...] = passing
            added = multiply_transposed([part.at[:, at] for part in q], dy)
            before.append(ds * across(factor, ds.shape, 0) + added * scale)
        return tuple(before)

    def write_out(index, slot):
        step = lay.steps - 1 - index
        rows = pl.ds(step * STEP, STEP)
        destination = dstates_ref.at[b, step, g, :, lay.in_parts(columns)]
        plgpu.copy_smem_to_gmem(dv_smem.at[slot], dv_ref.at[b, rows, unit], commit_group=False)
        plgpu.copy_smem_to_gmem(ds_smem.at[slot], destination, commit_group=False)

    start = tuple(load_state(dstate_ref.at[b, g, at, columns]) for at in blocks)
    ds = walk(lay.steps, dv_smem.shape[0], barrier, fetch, body, write_out, start)
    for at, block in zip(blocks, ds, strict=True):
        dbefore_ref.at[b, g, at, columns][...] = block


def scratch(lay: Layout, count: int) -> list[Any]:
    """Buffers of the pass over time for `count` steps."""
    rows, tile = (count, STEP, lay.parts * lay.key), (count, STEP, lay.parts * STEP)
    state = (count, lay.key, lay.parts * STEP)
    return [
        *[matrix_ref(shape, jnp.bfloat16) for shape in (rows, rows, tile, tile)],
        plgpu.SMEM((count, lay.key), jnp.float32),
        *[matrix_ref(shape, jnp.bfloat16) for shape in (state, tile, state)],
        plgpu.Barrier(num_arrivals=6, num_barriers=count),
    ]


def _over_time(lay: Layout, q, k, dy, within, whole, states, dstate, scale: float):
    """Gradients of v, of the states after every step, by channel of what passes through it, and of the first state.

    In this order as `dy`, as `states`, float32 [B, G, steps, K], and as `dstate`, [B, G, K, R * V]; all but the last
    two and `whole` and `dstate` in parts.
    """
    batch = q.shape[0]
    out_type = [
        jax.ShapeDtypeStruct(dy.shape, dy.dtype),
        jax.ShapeDtypeStruct(states.shape, states.dtype),
        jax.ShapeDtypeStruct((batch, lay.units, lay.steps, lay.key), jnp.float32),
        jax.ShapeDtypeStruct(dstate.shape, jnp.float32),
    ]
    buffers = scratch(lay, slots(functools.partial(scratch, lay)))
    body, grid = functools.partial(_kernel, lay, scale), {"unit": lay.units, "batch": batch}
    run = kernel("channel_backward", body, out_type, buffers, grid)
    dv, dstates, passing, dbefore = run(q, k, dy, within, whole, states, dstate)
    passing = passing.reshape(batch, lay.groups, -1, *passing.shape[2:]).sum(axis=2)
    return dv, dstates, passing, dbefore


def _sum_over(taken: jax.Array, x: jax.Array, ref) -> jax.Array:
    """Sums of x [64, 64] over the rows that are taken, right to 2^-17 of what they add up; `ref` is overwritten."""
    total = full(SQUARE, 0.0, MATRIX)
    ones = jnp.where(taken, total + 1.0, total).astype(ref.dtype)
    for _ in range(2):  # the first 8 bits, and what they leave over
        ref[...] = x.astype(ref.dtype)
        plgpu.commit_smem()
        total, x = multiply(ones, ref, total), x - load(ref, MATRIX).astype(jnp.float32)
    return total


def _scores_kernel(lay: Layout, *refs):
    *sources, dscores_ref, until_ref, after_ref, documents_ref, dq_ref, dk_ref, dg_ref = refs[:11]
    *buffers, barrier, dscores_smem, x_smem, flow, documents, arrived = refs[11:]
    blocks = Blocks(lay, sources, buffers, barrier)
    b, g, step, rows = blocks.b, blocks.g, blocks.step, blocks.rows
    tokens, dscores, x = Tokens(), *(split_ref(ref, lay.parts) for ref in (dscores_smem, x_smem))
    plgpu.copy_gmem_to_smem(dscores_ref.at[b, g, step], dscores_smem, arrived)
    plgpu.copy_gmem_to_smem(documents_ref.at[b, step], documents, arrived)
    plgpu.barrier_wait(arrived)
    # What cancels behind the end of a document would leave rounding errors.
    together = across(load(documents, ROWS), SQUARE, 0) == across(load(documents, COLUMNS), SQUARE, 1)
    itself = jnp.sum(jnp.where(tokens.differ == 0, join(dscores, MATRIX), 0.0), axis=1)

    def body(block, slot, carry):
        q_smem, k_smem, high, low = blocks.take(slot)

        def across_middles(level, grads):
            n = half(level)
            factor = decay(high, low, tokens.to_middle(n))
            write_rows(x, tokens.right(n), q_smem, k_smem, factor)
            # The products of x_n are symmetric, and so are the gradients of the scores.
            meeting = [jnp.where(tokens.meet(n), join([part], MATRIX), 0.0).astype(flow.dtype) for part in dscores]
            dx = factor * multiply_parts(meeting, x)
            dq, dk = grads
            return dq + jnp.where(tokens.right(n), dx, 0.0), dk + jnp.where(tokens.right(n), 0.0, dx)

        dq, dk = jax.lax.fori_loop(0, LEVELS, across_middles, (full(SQUARE, 0.0, MATRIX),) * 2)
        columns = pl.ds(block * STEP, STEP)
        dq += decay(high, low, tokens.upto) * load_state(until_ref.at[b, g, rows, columns])
        departing = decay(high, low, ~tokens.upto) * load_state(after_ref.at[b, g, rows, columns])
        q, k = join(q_smem, MATRIX), join(k_smem, MATRIX)
        dg = _sum_over((tokens.j >= tokens.i) & together, q * dq - k * dk, flow)
        dg_ref.at[b, g, rows, columns][...] = dg + _sum_over(tokens.j < tokens.i, k * departing, flow)
        diagonal = across(itself, SQUARE, 0)
        store(q_smem, dq + diagonal * k)
        store(k_smem, dk + departing + diagonal * q)
        return carry

    def write_out(block, slot):
        blocks.write_out(block, slot, dq_ref, dk_ref)

    walk(lay.key // STEP, SLOTS, barrier, blocks.fetch, body, write_out, None, in_place=True)


def _through_scores(lay: Layout, q, k, high, low, dscores, until, after, documents):
    """Gradients of q, k [B, time, G, K], in parts, and, but for what passes through steps, of log decays.

    The last are float32 [B, G, time, K].

    Args:
      q, k, high, low: as of `prepare`.
      dscores: [B, G, steps, 64, 64] gradients of the scores, symmetric, in parts.
      until, after: float32 [B, G, time, K] gradients of the decayed queries and keys.
      documents: as of `Layout.documents`.
    """
    scratch = [
        *Blocks.scratch(lay),
        *[matrix_ref((STEP, lay.parts * STEP), q.dtype)] * 2,
        matrix_ref(SQUARE, jnp.bfloat16),
        plgpu.SMEM((STEP,), jnp.float32),
        plgpu.Barrier(num_arrivals=2),
    ]
    out_type = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, until)]
    grid = {"step": lay.steps, "group": lay.groups, "batch": q.shape[0]}
    run = kernel("channel_scores_backward", functools.partial(_scores_kernel, lay), out_type, scratch, grid)
    return run(q, k, high, low, dscores, until, after, documents)


def _products(lay: Layout, dy, v, states, dstates, seen, scale: float):
    """Gradients of the scores, as `_through_scores` takes them, and of decayed queries and keys.

    Args:
      dy, v: [B, time, units, 64].
      states, dstates: [B, steps, G, K, R * V], before every step, and gradients of those after it.
      seen: as of `decays`.
    """
    dy, v = (x.reshape(x.shape[0], lay.steps, STEP, lay.groups, -1) for x in (dy, v))
    dscores = scale * product("bsigv,bsjgv->bgsij", dy, v)
    dscores = jnp.where(jnp.tri(STEP, dtype=bool), dscores, jnp.swapaxes(dscores, 3, 4)).astype(v.dtype)
    until = scale * product("bsigv,bsgkv->bgsik", dy, states)
    until = jnp.where(seen[:, None, ..., None] == 0.0, 0.0, until)
    after = product("bsjgv,bsgkv->bgsjk", v, dstates)
    return dscores, *(x.reshape(*x.shape[:2], -1, lay.key) for x in (until, after))


def backward(q, k, v, log_decay, state, reset, valid, boundaries, dy, dstate, *, scale: float, chunk_size: int):
    """Returns the gradients of (q, k, v, log_decay, state) as `xla.backward` does."""
    lay, batch = layout(q, v, chunk_size), q.shape[0]
    high, low, whole, seen = decays(lay, log_decay, reset, valid)
    queries, keys, values = split(lay.tokens(q, valid)), split(lay.tokens(k, valid)), lay.columns(v, valid)
    dy = lay.columns(dy.astype(v.dtype), valid)
    within, until, after = prepare(lay, queries, keys, high, low)
    states = states_before(lay, lay.join(after), values, jnp.swapaxes(whole, 1, 2)[..., None], boundaries)
    arrays = (until, after, split(dy), within, whole, lay.split_states(states), xla.flat(dstate, lay.groups))
    dv, dstates, passing, dbefore = _over_time(lay, *arrays, scale)
    dscores, duntil, dafter = _products(lay, dy, values, states, lay.join_states(dstates), seen, scale)
    arrays = (split(dscores), duntil, dafter, lay.documents(reset, batch))
    dq, dk, dg = _through_scores(lay, queries, keys, high, low, *arrays)
    dg = dg.reshape(batch, lay.groups, lay.steps, STEP, lay.key) + passing[:, :, :, None]
    dg = jnp.swapaxes(dg.reshape(batch, lay.groups, -1, lay.key), 1, 2)[:, : lay.length]
    dbefore = None if state is None else xla.unflat(dbefore, lay.heads // lay.groups)
    dq, dk = (lay.join(x)[:, : lay.length] for x in (dq, dk))
    return dq, dk, lay.from_columns(dv), where_it_moves(dg, reset, valid).astype(log_decay.dtype), dbefore

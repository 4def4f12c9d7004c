"""Gated linear attention as Mosaic GPU kernels: the backward pass without decay and with one per head.

Never run on a GPU: interpreted, lowered and compiled only.

XLA makes the states before every step of 64 tokens from those that were saved, a product for all of them at once. One
kernel then walks from the last step to the first, with the gradient of the state of 64 columns of a head's values in
registers, block by block of 64 rows of it. What these columns add to the gradients of queries and keys is summed
outside, in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention import mosaic_gpu_channel_backward, xla
from pallas_kernels.gated_linear_attention.mosaic_gpu import fill_ones, weights
from pallas_kernels.gated_linear_attention.mosaic_gpu_layout import (
    AFTER,
    DECAYS,
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
    refuse,
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
    multiply_parts,
    split,
    split_ref,
    store,
)

MAX_DISTANCE = 128  # tokens between two saved states
ARRIVING, LEAVING, DEPARTING, PASSING = range(4)  # rows of the flows through the decays, see `_decay_gradient`


def scratch(lay: Layout, count: int) -> list[Any]:
    """Buffers for `count` steps."""
    rows, state = (STEP, lay.parts * lay.key), (lay.key, lay.parts * STEP)
    tile = (STEP, lay.parts * STEP)
    return [
        *[matrix_ref((count, *shape), jnp.bfloat16) for shape in (rows, rows, tile, tile)],
        plgpu.SMEM((count, DECAYS, STEP), jnp.float32),
        *[matrix_ref((count, *shape), jnp.bfloat16) for shape in (state, tile)],
        *[matrix_ref(shape, jnp.bfloat16) for shape in (state, tile, tile, (STEP, STEP))],
        plgpu.Barrier(num_arrivals=6, num_barriers=count),
    ]


def supports(q, k, v, log_decay, state, reset, valid, boundaries, dy, dstate, *, scale: float, chunk_size: int) -> None:
    """Raises UnsupportedError where `backward` does not serve an argument."""
    by_channel = log_decay is not None and log_decay.ndim == 4
    check_support(q, k, v, chunk_size, mosaic_gpu_channel_backward.scratch if by_channel else scratch)
    if chunk_size > MAX_DISTANCE:
        refuse(f"chunk_size={chunk_size} backward: it starts from states at most {MAX_DISTANCE} tokens apart")


def _kernel(lay: Layout, scale: float, shared: bool, *refs):
    q_ref, k_ref, v_ref, dy_ref, decays_ref, states_ref, dstate_ref, *refs = refs
    dq_ref, dk_ref, dv_ref, flows_ref, dbefore_ref, *refs = refs
    q_smem, k_smem, v_smem, dy_smem, decays_smem, s_smem, dv_smem, *refs = refs
    ds_smem, scores_smem, dscores_smem, ones, barrier = refs
    b, g, h, unit, columns = lay.indices()
    blocks = [slice(start, start + STEP) for start in range(0, lay.key, STEP)]

    def fetch(index, slot):
        step = lay.steps - 1 - index
        rows, arrived = pl.ds(step * STEP, STEP), barrier.at[slot]
        for source, destination in (
            (q_ref.at[b, rows, g], q_smem),
            (k_ref.at[b, rows, g], k_smem),
            (v_ref.at[b, rows, unit], v_smem),
            (dy_ref.at[b, rows, unit], dy_smem),
            (decays_ref.at[0 if shared else b, h, step], decays_smem),
            (states_ref.at[b, step, g, :, lay.in_parts(columns)], s_smem),
        ):
            plgpu.copy_gmem_to_smem(source, destination.at[slot], arrived)

    def body(index, slot, carry):
        step = lay.steps - 1 - index
        rows = pl.ds(step * STEP, STEP)
        decays = decays_smem.at[slot]
        buffers = (r.at[slot] for r in (q_smem, k_smem, v_smem, dy_smem, s_smem, dv_smem))
        q, k, v, dy, s, dv = (split_ref(r, lay.parts) for r in buffers)
        after_step, scores, dscores = (split_ref(r, lay.parts) for r in (ds_smem, scores_smem, dscores_smem))
        added = dv  # what enters the state has the place of dv until all is known
        seen = v  # what the step sees of dy, that of the values once these are known
        shape = (STEP, STEP)
        until, after, whole = (
            load(decays.at[UNTIL], ROWS),
            load(decays.at[AFTER], ROWS),
            load(decays.at[WHOLE], COLUMNS),
        )
        for at, ds in zip(blocks, carry, strict=True):
            store([part.at[at] for part in after_step], ds)
        weight = weights(decays, ones) * scale
        store(scores, multiply_parts(q, k, transpose=True) * weight)
        store(dscores, multiply_parts(dy, v, transpose=True) * weight)
        store(added, join(v, MATRIX) * across(after, shape, 0))
        store(seen, join(dy, MATRIX) * across(until * scale, shape, 0))
        plgpu.commit_smem()
        arriving, leaving, departing, passing = [full((STEP,), 0.0, ROWS) for _ in range(4)]
        before_step = []
        for at, ds in zip(blocks, carry, strict=True):
            q_at, k_at = ([part.at[:, at] for part in x] for x in (q, k))
            s_at, after_at = ([part.at[at] for part in x] for x in (s, after_step))
            dq = multiply_parts(seen, s_at, transpose=True)
            dq = jnp.where(across(until, shape, 0) == 0.0, 0.0, dq)
            dq = multiply_parts(dscores, k_at, dq)
            arriving += jnp.sum(join(q_at, MATRIX) * dq, axis=1)
            dq_ref.at[b, unit, rows, at][...] = dq
            dk_in = multiply_transposed(dscores, q_at)
            leaving += jnp.sum(join(k_at, MATRIX) * dk_in, axis=1)
            dk_out = multiply_parts(added, after_at, transpose=True)
            departing += jnp.sum(join(k_at, MATRIX) * dk_out, axis=1)
            dk_ref.at[b, unit, rows, at][...] = dk_in + dk_out
            passing += jnp.sum(decayed(whole, join(s_at, MATRIX) * ds, 1), axis=1)
            before_step.append(multiply_transposed(q_at, seen, ds * across(whole, shape, 1)))
        store(dv, multiply_transposed(scores, dy, multiply_parts(k, after_step) * across(after, shape, 0)))
        for row, flow in enumerate((arriving, leaving, departing, passing)):
            flows_ref.at[b, unit, step, row][...] = flow
        return tuple(before_step)

    def write_out(index, slot):
        rows = pl.ds((lay.steps - 1 - index) * STEP, STEP)
        plgpu.copy_smem_to_gmem(dv_smem.at[slot], dv_ref.at[b, rows, unit], commit_group=False)

    fill_ones(ones)
    start = tuple(load_state(dstate_ref.at[b, g, at, columns]) for at in blocks)
    ds = walk(lay.steps, v_smem.shape[0], barrier, fetch, body, write_out, start)
    for at, block in zip(blocks, ds, strict=True):
        dbefore_ref.at[b, g, at, columns][...] = block


def _decay_gradient(lay: Layout, flows, log_decay, reset, valid) -> jax.Array:
    """The gradient of the log decays from flows [B, units, steps, 4, 64].

    The gradient at a token is the sum over all pairs of a source before and a target at or after it of what the source
    contributes to the loss through the target: of targets and sources within the step less sources at or after
    the token, which leave it; of sources before the token that depart to the state after the step; and of what passes
    through the step from state to state. Targets and sources are summed up to the end of the document: what cancels
    behind it would leave rounding errors.
    """
    flows = flows.reshape(flows.shape[0], lay.heads, lay.blocks, lay.steps, 4, STEP).sum(axis=2)
    within = flows[..., ARRIVING, :] - flows[..., LEAVING, :]
    departing = flows[..., DEPARTING, :]
    before = jnp.concatenate([jnp.zeros_like(departing[..., :1]), departing[..., :-1]], axis=-1)
    index = lay.documents(reset, flows.shape[0])
    follows = jnp.tri(STEP, dtype=bool).T & (index[..., :, None] == index[..., None, :])
    within = jnp.where(follows[:, None], within[..., None, :], 0.0).sum(axis=-1)
    grad = within + jnp.cumsum(before, axis=-1)
    grad = grad + flows[..., PASSING, :].sum(axis=-1, keepdims=True)
    grad = jnp.swapaxes(grad.reshape(*grad.shape[:2], -1), 1, 2)[:, : lay.length]
    grad = where_it_moves(grad, reset, valid)
    return (grad.sum(axis=(0, 1)) if log_decay.ndim == 1 else grad).astype(log_decay.dtype)


def backward(q, k, v, log_decay, state, reset, valid, boundaries, dy, dstate, *, scale: float, chunk_size: int):
    """Returns the gradients of (q, k, v, log_decay, state) as `xla.backward` does."""
    if q.shape[1] == 1:
        arrays = (q, k, v, log_decay, state, reset, valid, boundaries, dy, dstate)
        return xla.backward(*arrays, scale=scale, chunk_size=chunk_size)
    if log_decay is not None and log_decay.ndim == 4:
        arrays = (q, k, v, log_decay, state, reset, valid, boundaries, dy, dstate)
        return mosaic_gpu_channel_backward.backward(*arrays, scale=scale, chunk_size=chunk_size)
    lay, batch = layout(q, v, chunk_size), q.shape[0]
    decays = lay.decays(log_decay, reset, valid)
    keys, values = lay.tokens(k, valid), lay.columns(v, valid)
    after = jnp.moveaxis(decays[:, :, :, AFTER], 1, -1).reshape(-1, lay.steps * STEP, lay.heads)
    whole = jnp.repeat(jnp.swapaxes(decays[:, :, :, WHOLE, 0], 1, 2), lay.value, axis=-1)
    whole = whole.reshape(-1, lay.steps, lay.groups, 1, lay.state[2])
    added = (values * jnp.repeat(after, lay.blocks, axis=-1)[..., None]).astype(v.dtype)
    states = states_before(lay, keys, added, whole, boundaries)
    tokens = (lay.tokens(q, valid), keys, values, lay.columns(dy.astype(v.dtype), valid))
    q_parts, k_parts, v_parts, dy_parts = (split(x) for x in tokens)
    time = lay.steps * STEP
    out_type = [
        *[jax.ShapeDtypeStruct((batch, lay.units, time, lay.key), jnp.float32)] * 2,
        jax.ShapeDtypeStruct(v_parts.shape, v_parts.dtype),
        jax.ShapeDtypeStruct((batch, lay.units, lay.steps, 4, STEP), jnp.float32),
        jax.ShapeDtypeStruct((batch, *lay.state), jnp.float32),
    ]
    buffers = scratch(lay, slots(functools.partial(scratch, lay)))
    body = functools.partial(_kernel, lay, scale, decays.shape[0] == 1)
    run = kernel("backward", body, out_type, buffers, {"unit": lay.units, "batch": batch})
    states, dstate = lay.split_states(states), xla.flat(dstate, lay.groups)
    dq, dk, dv, flows, dbefore = run(q_parts, k_parts, v_parts, dy_parts, decays, states, dstate)
    dq, dk = (x.reshape(batch, lay.groups, -1, time, lay.key).sum(axis=2) for x in (dq, dk))
    dq, dk = (jnp.swapaxes(x, 1, 2)[:, : lay.length] for x in (dq, dk))
    dlog_decay = None if log_decay is None else _decay_gradient(lay, flows, log_decay, reset, valid)
    dbefore = None if state is None else xla.unflat(dbefore, lay.heads // lay.groups)
    return dq.astype(q.dtype), dk.astype(k.dtype), lay.from_columns(dv), dlog_decay, dbefore

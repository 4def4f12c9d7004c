"""Gated linear attention as Mosaic GPU kernels: the backward pass without decay and with one per head.

Never run on a GPU: interpreted, lowered and compiled only.

XLA makes the states before every step of 64 tokens from those that were saved, a product for all of them at once. One
kernel then walks from the last step to the first, with the gradient of the state of 64 columns of a head's values in
registers, block by block of 64 rows of it. What these columns add to the gradients of queries and keys is summed
outside, in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention import mosaic_gpu_channel_backward, xla
from pallas_kernels.gated_linear_attention.mosaic_gpu import fill_ones, weights
from pallas_kernels.gated_linear_attention.mosaic_gpu_layout import (
    AFTER,
    STEP,
    UNTIL,
    WHOLE,
    Layout,
    backward_slots,
    check_support,
    decayed,
    kernel,
    layout,
    load_state,
    multiply_transposed,
    refuse,
    states_before,
    where_it_moves,
    wide,
)
from pallas_kernels.warpgroup import walk
from pallas_kernels.wgmma import COLUMNS, ROWS, across, full, load, matrix_ref, multiply

MAX_DISTANCE = 128  # tokens between two saved states
ARRIVING, LEAVING, DEPARTING, PASSING = range(4)  # rows of the flows through the decays, see `_decay_gradient`


def supports(q, k, v, log_decay, state, reset, valid, boundaries, dy, dstate, *, scale: float, chunk_size: int) -> None:
    """Raises UnsupportedError where `backward` does not serve an argument."""
    check_support(q, k, v, chunk_size)
    if chunk_size > MAX_DISTANCE:
        refuse(f"chunk_size={chunk_size} backward: it starts from states at most {MAX_DISTANCE} tokens apart")


def _kernel(lay: Layout, scale: float, shared: bool, *refs):
    q_ref, k_ref, v_ref, dy_ref, decays_ref, states_ref, dstate_ref, *refs = refs
    dq_ref, dk_ref, dv_ref, flows_ref, dbefore_ref, *refs = refs
    q_smem, k_smem, v_smem, dy_smem, decays_smem, s_smem, dv_smem, *refs = refs
    ds_smem, seen_smem, scores_smem, dscores_smem, ones, barrier = refs
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
            (states_ref.at[b, step, g, :, columns], s_smem),
        ):
            plgpu.copy_gmem_to_smem(source, destination.at[slot], arrived)

    def body(index, slot, carry):
        step = lay.steps - 1 - index
        rows = pl.ds(step * STEP, STEP)
        q, k, v, dy, decays, s = (r.at[slot] for r in (q_smem, k_smem, v_smem, dy_smem, decays_smem, s_smem))
        dv = added = dv_smem.at[slot]  # what enters the state has the place of dv until all is known
        dtype, shape = q_ref.dtype, (STEP, STEP)
        until, after, whole = (
            load(decays.at[UNTIL], ROWS),
            load(decays.at[AFTER], ROWS),
            load(decays.at[WHOLE], COLUMNS),
        )
        for at, ds in zip(blocks, carry, strict=True):
            ds_smem.at[at][...] = ds.astype(dtype)
        weight = weights(decays, ones) * scale
        scores_smem[...] = (multiply(q, k, transpose=True) * weight).astype(dtype)
        dscores_smem[...] = (multiply(dy, v, transpose=True) * weight).astype(dtype)
        seen_smem[...] = (wide(dy) * across(until * scale, shape, 0)).astype(dtype)
        added[...] = (wide(v) * across(after, shape, 0)).astype(dtype)
        plgpu.commit_smem()
        arriving, leaving, departing, passing = [full((STEP,), 0.0, ROWS) for _ in range(4)]
        before_step = []
        for at, ds in zip(blocks, carry, strict=True):
            q_at, k_at, s_at = q.at[:, at], k.at[:, at], s.at[at]
            dq = multiply(seen_smem, s_at, transpose=True)
            dq = jnp.where(across(until, shape, 0) == 0.0, 0.0, dq)
            dq = multiply(dscores_smem, k_at, dq)
            arriving += jnp.sum(wide(q_at) * dq, axis=1)
            dq_ref.at[b, unit, rows, at][...] = dq
            dk_in = multiply_transposed(dscores_smem, q_at)
            leaving += jnp.sum(wide(k_at) * dk_in, axis=1)
            dk_out = multiply(added, ds_smem.at[at], transpose=True)
            departing += jnp.sum(wide(k_at) * dk_out, axis=1)
            dk_ref.at[b, unit, rows, at][...] = dk_in + dk_out
            passing += jnp.sum(decayed(whole, wide(s_at) * ds, 1), axis=1)
            before_step.append(multiply_transposed(q_at, seen_smem, ds * across(whole, shape, 1)))
        total = multiply_transposed(scores_smem, dy, multiply(k, ds_smem) * across(after, shape, 0))
        dv[...] = total.astype(dtype)
        for row, flow in enumerate((arriving, leaving, departing, passing)):
            flows_ref.at[b, unit, step, row][...] = flow
        return tuple(before_step)

    def store(index, slot):
        rows = pl.ds((lay.steps - 1 - index) * STEP, STEP)
        plgpu.copy_smem_to_gmem(dv_smem.at[slot], dv_ref.at[b, rows, unit], commit_group=False)

    fill_ones(ones)
    start = tuple(load_state(dstate_ref.at[b, g, at, columns]) for at in blocks)
    ds = walk(lay.steps, backward_slots(lay.key), barrier, fetch, body, store, start)
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
    flows = flows.reshape(flows.shape[0], lay.heads, lay.parts, lay.steps, 4, STEP).sum(axis=2)
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
    added = (values * jnp.repeat(after, lay.parts, axis=-1)[..., None]).astype(v.dtype)
    states = states_before(lay, keys, added, whole, boundaries)
    arrays = (lay.tokens(q, valid), keys, values, lay.columns(dy.astype(v.dtype), valid), decays, states)
    time, count = lay.steps * STEP, backward_slots(lay.key)
    out_type = [
        *[jax.ShapeDtypeStruct((batch, lay.units, time, lay.key), jnp.float32)] * 2,
        jax.ShapeDtypeStruct(values.shape, v.dtype),
        jax.ShapeDtypeStruct((batch, lay.units, lay.steps, 4, STEP), jnp.float32),
        jax.ShapeDtypeStruct((batch, *lay.state), jnp.float32),
    ]
    tile, rows = (count, STEP, STEP), (count, STEP, lay.key)
    scratch = [
        *[matrix_ref(shape, q.dtype) for shape in (rows, rows, tile, tile)],
        plgpu.SMEM((count, *decays.shape[3:]), jnp.float32),
        *[matrix_ref(shape, q.dtype) for shape in ((count, lay.key, STEP), tile, (lay.key, STEP))],
        *[matrix_ref((STEP, STEP), q.dtype)] * 3,
        matrix_ref((STEP, STEP), jnp.bfloat16),
        plgpu.Barrier(num_arrivals=6, num_barriers=count),
    ]
    body = functools.partial(_kernel, lay, scale, decays.shape[0] == 1)
    arrays = (*arrays, xla.flat(dstate, lay.groups))
    dq, dk, dv, flows, dbefore = kernel("backward", body, out_type, scratch, {"unit": lay.units, "batch": batch})(
        *arrays
    )
    dq, dk = (x.reshape(batch, lay.groups, -1, time, lay.key).sum(axis=2) for x in (dq, dk))
    dq, dk = (jnp.swapaxes(x, 1, 2)[:, : lay.length] for x in (dq, dk))
    dlog_decay = None if log_decay is None else _decay_gradient(lay, flows, log_decay, reset, valid)
    dbefore = None if state is None else xla.unflat(dbefore, lay.heads // lay.groups)
    return dq.astype(q.dtype), dk.astype(k.dtype), lay.from_columns(dv), dlog_decay, dbefore

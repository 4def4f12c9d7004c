"""Gated linear attention as Mosaic GPU kernels: the backward pass.

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

from pallas_kernels.gated_linear_attention import xla
from pallas_kernels.gated_linear_attention.mosaic_gpu import (
    AFTER,
    STEP,
    UNTIL,
    WHOLE,
    Layout,
    check_support,
    decayed,
    fill_ones,
    kernel,
    layout,
    load_state,
    multiply_transposed,
    refuse,
    weights,
)
from pallas_kernels.warpgroup import walk
from pallas_kernels.wgmma import COLUMNS, MATRIX, ROWS, across, full, load, matrix_ref, multiply

MAX_DISTANCE = 128  # tokens between two saved states
ARRIVING, LEAVING, DEPARTING, PASSING = range(4)  # rows of the flows through the decays, see `_decay_gradient`


def supports(q, k, v, log_decay, state, reset, valid, boundaries, dy, dstate, *, scale: float, chunk_size: int) -> None:
    """Raises UnsupportedError where `backward` does not serve an argument."""
    check_support(q, k, v, log_decay, chunk_size)
    if chunk_size > MAX_DISTANCE:
        refuse(f"chunk_size={chunk_size} backward: it starts from states at most {MAX_DISTANCE} tokens apart")


def slots(key: int) -> int:
    """Steps in shared memory: two where they fit."""
    return 2 if key <= 128 else 1


def _kernel(lay: Layout, scale: float, shared: bool, *refs):
    q_ref, k_ref, v_ref, dy_ref, decays_ref, states_ref, dstate_ref, *refs = refs
    dq_ref, dk_ref, dv_ref, flows_ref, dbefore_ref, *refs = refs
    q_smem, k_smem, v_smem, dy_smem, decays_smem, s_smem, dv_smem, *refs = refs
    ds_smem, seen_smem, scores_smem, dscores_smem, ones, barrier = refs
    b, g, h, unit = lay.indices()
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
            (states_ref.at[b, step, unit], s_smem),
        ):
            plgpu.copy_gmem_to_smem(source, destination.at[slot], arrived)

    def body(index, slot, carry):
        step = lay.steps - 1 - index
        rows = pl.ds(step * STEP, STEP)
        q, k, v, dy, decays, s = (r.at[slot] for r in (q_smem, k_smem, v_smem, dy_smem, decays_smem, s_smem))
        dtype, shape = q_ref.dtype, (STEP, STEP)
        until, after, whole = load(decays.at[UNTIL], ROWS), load(decays.at[AFTER], ROWS), load(decays.at[WHOLE], COLUMNS)
        for rows_of, ds in zip(blocks, carry, strict=True):
            ds_smem.at[rows_of][...] = ds.astype(dtype)
        weight = weights(decays, ones) * scale
        scores_smem[...] = (multiply(q, k, transpose=True) * weight).astype(dtype)
        dscores = (multiply(dy, v, transpose=True) * weight).astype(dtype)
        dscores_smem[...] = dscores
        seen = (load(dy, MATRIX).astype(jnp.float32) * across(until * scale, shape, 0)).astype(dtype)
        seen_smem[...] = seen
        added = (load(v, MATRIX).astype(jnp.float32) * across(after, shape, 0)).astype(dtype)
        plgpu.commit_smem()
        visible = jnp.where(until == 0.0, 0.0, 1.0)
        arriving, leaving, departing, passing = [full((STEP,), 0.0, ROWS) for _ in range(4)]
        after_step = []
        for at, ds in zip(blocks, carry, strict=True):
            q_at, k_at = q.at[:, at], k.at[:, at]
            q_here, k_here, s_here = (load(x, MATRIX).astype(jnp.float32) for x in (q_at, k_at, s.at[at]))
            dq = decayed(visible, multiply(seen, s.at[at], transpose=True), 0)
            dq = multiply(dscores, k_at, dq)
            arriving += jnp.sum(q_here * dq, axis=1)
            dq_ref.at[b, unit, rows, at][...] = dq
            dk_in = multiply_transposed(dscores_smem, q_at)
            leaving += jnp.sum(k_here * dk_in, axis=1)
            dk_out = multiply(added, ds_smem.at[at], transpose=True)
            departing += jnp.sum(k_here * dk_out, axis=1)
            dk_ref.at[b, unit, rows, at][...] = dk_in + dk_out
            kept = across(whole, shape, 1) * ds
            passing += jnp.sum(decayed(whole, s_here * ds, 1), axis=1)
            after_step.append(multiply_transposed(q_at, seen_smem, kept))
        dv = multiply(k, ds_smem) * across(after, shape, 0)
        dv_smem.at[slot][...] = multiply_transposed(scores_smem, dy, dv).astype(dtype)
        for row, flow in enumerate((arriving, leaving, departing, passing)):
            flows_ref.at[b, unit, step, row][...] = flow
        return tuple(after_step)

    def store(index, slot):
        rows = pl.ds((lay.steps - 1 - index) * STEP, STEP)
        plgpu.copy_smem_to_gmem(dv_smem.at[slot], dv_ref.at[b, rows, unit], commit_group=False)

    fill_ones(ones)
    start = tuple(load_state(dstate_ref.at[b, unit, at]) for at in blocks)
    ds = walk(lay.steps, slots(lay.key), barrier, fetch, body, store, start)
    for at, block in zip(blocks, ds, strict=True):
        dbefore_ref.at[b, unit, at][...] = block


def _states(lay: Layout, k, v, decays, boundaries) -> jax.Array:
    """The states before every step, in the dtype of k, [B, steps, units, K, 64].

    Args:
      k: [B, time, G, K], zero at padding.
      v: [B, time, units, 64], zero at padding.
      decays: as of `Layout.decays`.
      boundaries: float32 [B, N, G, K, R * V].
    """
    batch, count, saves = k.shape[0], lay.boundaries, lay.saves
    saved = xla.unflat(boundaries.reshape(-1, *boundaries.shape[2:]), lay.heads // lay.groups)
    states = [lay.states(saved.reshape(batch, count, *saved.shape[1:]))]
    pads = [(0, count * saves - lay.steps)]
    decays = jnp.repeat(decays, lay.parts, axis=1)  # by unit
    decays = jnp.pad(decays, [(0, 0)] * 2 + pads + [(0, 0)] * 2)
    decays = decays.reshape(*decays.shape[:2], count, saves, *decays.shape[3:])
    k, v = (x.reshape(batch, lay.steps, STEP, *x.shape[2:]) for x in (k, v))
    k, v = (jnp.pad(x, [(0, 0)] + pads + [(0, 0)] * 3).reshape(batch, count, saves, *x.shape[2:]) for x in (k, v))
    for step in range(saves - 1):
        after, whole = (jnp.moveaxis(decays[:, :, :, step, row], 1, 2) for row in (AFTER, WHOLE))  # [B, N, units, 64]
        added = (v[:, :, step] * jnp.swapaxes(after, 2, 3)[..., None]).astype(v.dtype)
        added = added.reshape(*added.shape[:3], lay.groups, -1, STEP)
        new = jnp.einsum("bntgk,bntguv->bngukv", k[:, :, step], added, preferred_element_type=jnp.float32)
        whole = whole[..., None, :]
        kept = jnp.where(whole == 0.0, 0.0, whole * states[-1])
        states.append(kept + new.reshape(kept.shape))
    states = jnp.stack(states, axis=2).astype(k.dtype)
    return states.reshape(batch, count * saves, *states.shape[3:])[:, : lay.steps]


def _decay_gradient(lay: Layout, flows, log_decay, reset, valid) -> jax.Array:
    """The gradient of the log decays from flows [B, units, steps, 4, 64].

    The gradient at a token is the sum over all pairs of a source before and a target at or after it of what the source
    contributes to the loss through the target: of targets and sources within the step less sources at or after
    the token, which leave it; of sources before the token that depart to the state after the step; and of what passes
    through the step from state to state.
    """
    flows = flows.reshape(flows.shape[0], lay.heads, lay.parts, lay.steps, 4, STEP).sum(axis=2)
    within = flows[..., ARRIVING, :] - flows[..., LEAVING, :]
    departing = flows[..., DEPARTING, :]
    before = jnp.concatenate([jnp.zeros_like(departing[..., :1]), departing[..., :-1]], axis=-1)
    grad = jax.lax.cumsum(within, axis=within.ndim - 1, reverse=True) + jnp.cumsum(before, axis=-1)
    grad = grad + flows[..., PASSING, :].sum(axis=-1, keepdims=True)
    grad = jnp.swapaxes(grad.reshape(*grad.shape[:2], -1), 1, 2)[:, : lay.length]
    for mask in (None if reset is None else ~reset, valid):  # elsewhere the log decay has no effect
        grad = grad if mask is None else jnp.where(mask[..., None], grad, 0.0)
    return (grad.sum(axis=(0, 1)) if log_decay.ndim == 1 else grad).astype(log_decay.dtype)


def backward(q, k, v, log_decay, state, reset, valid, boundaries, dy, dstate, *, scale: float, chunk_size: int):
    """Returns the gradients of (q, k, v, log_decay, state) as `xla.backward` does."""
    if q.shape[1] == 1:
        arrays = (q, k, v, log_decay, state, reset, valid, boundaries, dy, dstate)
        return xla.backward(*arrays, scale=scale, chunk_size=chunk_size)
    lay, batch = layout(q, v, chunk_size), q.shape[0]
    decays = lay.decays(log_decay, reset, valid)
    keys, values = lay.tokens(k, valid), lay.columns(v, valid)
    states = _states(lay, keys, values, decays, boundaries)
    arrays = (lay.tokens(q, valid), keys, values, lay.columns(dy.astype(v.dtype), valid), decays, states)
    time, count = lay.steps * STEP, slots(lay.key)
    out_type = [
        *[jax.ShapeDtypeStruct((batch, lay.units, time, lay.key), jnp.float32)] * 2,
        jax.ShapeDtypeStruct(values.shape, v.dtype),
        jax.ShapeDtypeStruct((batch, lay.units, lay.steps, 4, STEP), jnp.float32),
        jax.ShapeDtypeStruct((batch, lay.units, lay.key, STEP), jnp.float32),
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
    dq, dk, dv, flows, dbefore = kernel("backward", body, out_type, scratch, lay, batch)(*arrays, lay.states(dstate))
    dq, dk = (x.reshape(batch, lay.groups, -1, time, lay.key).sum(axis=2) for x in (dq, dk))
    dq, dk = (jnp.swapaxes(x, 1, 2)[:, : lay.length] for x in (dq, dk))
    dlog_decay = None if log_decay is None else _decay_gradient(lay, flows, log_decay, reset, valid)
    dbefore = None if state is None else lay.from_states(dbefore)
    return dq.astype(q.dtype), dk.astype(k.dtype), lay.from_columns(dv), dlog_decay, dbefore

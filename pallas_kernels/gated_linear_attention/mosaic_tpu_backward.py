"""Gated linear attention as Pallas TPU kernels: the backward pass.

Chunks of 128 tokens from the last to the first, each from the state saved before it; the gradient of the state stays in
VMEM scratch for all heads of a group, so that the gradients of q and k are summed over them in place.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.gated_linear_attention import mosaic_tpu_channel, xla
from pallas_kernels.gated_linear_attention.mosaic_tpu import for_heads, unrolled
from pallas_kernels.gated_linear_attention.mosaic_tpu_decay import HeadDecay, join
from pallas_kernels.gated_linear_attention.mosaic_tpu_layout import (
    BLOCK,
    CHUNK,
    LANES,
    VMEM_LIMIT,
    Layout,
    block_specs,
    check_support,
    compute_dtype,
    contract,
    cumulate,
    decayed,
    layout,
    refuse,
    widen,
)

UNROLL = 4  # pairs of heads


def supports(q, k, v, log_decay, state, reset, valid, boundaries, dy, dstate, *, scale: float, chunk_size: int) -> None:
    """Raises UnsupportedError where `backward` does not honour an argument."""
    check_support(q, k, v, log_decay, chunk_size)
    if chunk_size > CHUNK:
        refuse(f"chunk_size={chunk_size} backward: it starts from the states before every {CHUNK} tokens")


def _one_head(x, head: int, count: int) -> jax.Array:
    """x [n, lanes of `count` heads] with zeros in the lanes of the other head."""
    if count == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lane >> 6) == head, x, 0.0)


def _head_sums(x, count: int) -> jax.Array:
    """x [n, lanes of `count` heads] summed over the lanes of each: [8, n], head by head, the tokens in the lanes."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK, x.shape[1]), axis) for axis in (0, 1))
    return contract(jnp.where(row == (lane >> 6 if count == 2 else 0), 1.0, 0.0).astype(x.dtype), x, 1, 1)


def _within(decay, heads: list, slot: int, refs, until_lanes: slice, dtype) -> list[jax.Array]:
    """Pairs of tokens of the chunk: writes scores and their flow through the decays, adds to the product's gradient.

    Returns the flow by its target less that by its source, [1, 128] for each head.
    """
    products_ref, dproducts_ref, dscores_ref, scores_ref, high_ref, low_ref, until_ref = refs
    leaving = [jnp.zeros((BLOCK, LANES), jnp.float32) for _ in heads]
    shape = (2 * BLOCK, LANES)
    distance = jax.lax.broadcasted_iota(jnp.int32, shape, 0) - jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    for rows, weights, until in decay.blocks(heads):
        until_ref[rows, until_lanes] = until
        dproducts = dproducts_ref[rows, :]
        for n, weight in enumerate(weights):
            scores, dscores = weight * products_ref[rows, :], dscores_ref[slot + n, rows, :]
            scores_ref[slot + n, rows, :] = scores.astype(dtype)
            dproducts = dproducts + weight * dscores
            # A token does not decay what it adds itself.
            flow = jnp.where(distance == -rows.start, 0.0, scores * dscores)
            leaving[n] = leaving[n] + (flow[:BLOCK] + flow[BLOCK:])
            high_ref[slot + n, rows, :] = flow.astype(dtype)
            if dtype != jnp.float32:  # targets and sources nearly cancel: both parts of the number are summed
                low_ref[slot + n, rows, :] = (flow - flow.astype(dtype).astype(jnp.float32)).astype(dtype)
        dproducts_ref[rows, :] = dproducts
    out = []
    for n, source in enumerate(leaving):
        target = _head_sums(high_ref[slot + n], 1)
        target = target if dtype == jnp.float32 else target + _head_sums(low_ref[slot + n], 1)
        out.append(target[:1] - jnp.sum(source, axis=0, keepdims=True))
    return out


def _head_kernel(*refs, lay: Layout, scale: float, dtype, resets: bool):
    q_ref, k_ref, v_ref, g_ref, s_ref, dy_ref, dstate_ref, *refs = refs
    dq_ref, dk_ref, dv_ref, dg_ref, dbefore_ref, *refs = refs
    ds_ref, dq_sum, dk_sum, dq_in, arriving, departing, passing, transposed_ref, *refs = refs
    pair_refs, tables = refs[:7], refs[7:]
    products_ref, dproducts_ref, dscores_ref, scores_ref, _, _, until_ref = pair_refs
    t, h = pl.program_id(2), pl.program_id(3)

    @pl.when(t == 0)
    def _():
        ds_ref[h] = dstate_ref[...]

    @pl.when(h == 0)
    def _():
        dq_sum[...] = jnp.zeros(dq_sum.shape, jnp.float32)
        dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)

    for ref in (arriving, departing, passing, dproducts_ref, dq_in):
        ref[...] = jnp.zeros(ref.shape, jnp.float32)
    decay = HeadDecay(g_ref[...], scale, tables)
    q, k = q_ref[...].astype(dtype), k_ref[...].astype(dtype)
    products_ref[...], transposed_ref[...] = scale * contract(q, k, 1, 1), q.T

    def body(heads, lanes, slot):
        width, count = lanes.size, len(heads)
        slot, until_lanes = slot * count, slice(slot * LANES, (slot + 1) * LANES)
        v, dy = (ref[:, lanes].astype(jnp.float32) for ref in (v_ref, dy_ref))
        v_half, dy_half = v.astype(dtype), dy.astype(dtype)
        s, ds = s_ref[:, lanes], ds_ref[h, :, lanes]
        s_half, ds_half = s.astype(dtype), ds.astype(dtype)
        for n in range(count):
            dscores_ref[slot + n] = contract(_one_head(dy, n, count).astype(dtype), v_half, 1, 1)
        flows = _within(decay, heads, slot, pair_refs, until_lanes, dtype)
        dv = join([contract(scores_ref[slot + n], dy_half, 0, 0) for n in range(count)])
        # From the state before the chunk, and to the state after it.
        until, after = widen(until_ref[:, until_lanes], width), widen(decay.after(heads), width)
        whole = decay.whole(heads, s.shape)
        seen, added = dy * until, (after * v).astype(dtype)
        dq_in[...] += contract(seen.astype(dtype), s_half, 1, 1)
        dk_sum[...] += contract(added, ds_half, 1, 1)
        dv_out = after * contract(k_ref[...].astype(dtype), ds_half, 1, 0)
        dv_ref[:, lanes] = (dv + dv_out).astype(dv_ref.dtype)
        ds_ref[h, :, lanes] = whole * ds + contract(transposed_ref[...], seen.astype(dtype), 1, 0)
        # What flows through the decays.
        y_in = contract(q_ref[...].astype(dtype), s_half, 1, 0)
        seen = _head_sums(decayed(until, dy * y_in, resets).astype(dtype), count)
        out = _head_sums((v * dv_out).astype(dtype), count)
        through = _head_sums(decayed(whole, s * ds, resets).astype(dtype), count)
        through = jnp.broadcast_to(jnp.sum(through, axis=1, keepdims=True), out.shape)
        for n, head in enumerate(heads):
            row = pl.ds(head, 1)
            arriving[row, :] = flows[n] + seen[n : n + 1]
            departing[row, :], passing[row, :] = out[n : n + 1], through[n : n + 1]

    for_heads(lay, unrolled(lay, UNROLL), body)
    dproducts = (scale * dproducts_ref[...]).astype(dtype)
    from_state = dq_in[...]
    if resets:
        from_state = jnp.where(widen(decay.seen(), lay.keys) > 0.0, from_state, 0.0)
    dq_sum[...] += from_state + contract(dproducts, k, 1, 0)
    dk_sum[...] += contract(dproducts, q, 0, 0)
    out = departing[...]
    dg_ref[...] = cumulate(arriving[...], 1, reverse=True) + (cumulate(out, 1, reverse=False) - out) + passing[...]

    @pl.when(h == pl.num_programs(3) - 1)
    def _():
        dq_ref[...] = dq_sum[...].astype(dq_ref.dtype)
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)

    @pl.when(t == pl.num_programs(2) - 1)
    def _():
        dbefore_ref[...] = ds_ref[h]


def _by_head(q, k, v, g, boundaries, dy, dstate, lay: Layout, *, scale: float, resets: bool):
    batch = v.shape[0]
    specs = block_specs(lay, lambda b, n, t, h: (b, n, h, lay.chunks - 1 - t))
    decay = "shared_rows" if g.shape[0] == 1 else "rows"
    dtype = compute_dtype(q, k, v)
    kernel = functools.partial(_head_kernel, lay=lay, scale=scale, dtype=dtype, resets=resets)
    rows = pltpu.VMEM((lay.rows, LANES), jnp.float32)
    count = unrolled(lay, UNROLL) * paired(lay)
    return pl.pallas_call(
        kernel,
        grid=(batch, lay.groups, lay.chunks, lay.blocks),
        in_specs=[specs[n] for n in ("keys", "keys", "values", decay, "boundary", "values", "state_in")],
        out_specs=[specs[n] for n in ("keys", "keys", "values", "rows", "state_out")],
        out_shape=[
            *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, k, v)),
            jax.ShapeDtypeStruct((batch, *g.shape[1:]), jnp.float32),
            jax.ShapeDtypeStruct(dstate.shape, jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((lay.blocks, lay.keys, lay.lanes), jnp.float32),
            *[pltpu.VMEM((CHUNK, lay.keys), jnp.float32)] * 3,
            *[rows] * 3,
            pltpu.VMEM((lay.keys, CHUNK), dtype),
            *[pltpu.VMEM((CHUNK, CHUNK), jnp.float32)] * 2,
            pltpu.VMEM((count, CHUNK, CHUNK), jnp.float32),
            *[pltpu.VMEM((count, CHUNK, CHUNK), dtype)] * 3,
            pltpu.VMEM((CHUNK, unrolled(lay, UNROLL) * LANES), jnp.float32),
            *HeadDecay.tables(lay.rows),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret.parameters(),
        name="gated_linear_attention_backward",
    )(q, k, v, g, boundaries, dy, dstate)


def backward(q, k, v, log_decay, state, reset, valid, boundaries, dy, dstate, *, scale: float, chunk_size: int):
    """Returns the gradients of (q, k, v, log_decay, state) as `xla.backward` does."""
    if q.shape[1] == 1:
        arrays = (q, k, v, log_decay, state, reset, valid, boundaries, dy, dstate)
        return xla.backward(*arrays, scale=scale, chunk_size=chunk_size)
    lay = layout(q, v, chunk_size)
    per_channel = log_decay is not None and log_decay.ndim == 4
    decay = (lay.channels if per_channel else lay.head_rows)(log_decay, reset, valid)
    dq, dk, dv, dg, dbefore = (mosaic_tpu_channel.backward if per_channel else _by_head)(
        lay.tokens(q, valid, lay.keys),
        lay.tokens(k, valid, lay.keys),
        lay.tokens(v, valid, lay.values),
        decay,
        lay.states(boundaries),
        lay.tokens(dy, valid, lay.values),
        lay.states(xla.flat(dstate, lay.groups)),
        lay,
        scale=scale,
        resets=reset is not None,
    )
    dlog_decay = None
    if log_decay is not None:
        dg = lay.from_tokens(dg, lay.groups, lay.key) if per_channel else lay.from_head_rows(dg)
        dlog_decay = _where_it_moves(dg, reset, valid)
        dlog_decay = jnp.sum(dlog_decay, axis=(0, 1)) if log_decay.ndim == 1 else dlog_decay
        dlog_decay = dlog_decay.astype(log_decay.dtype)
    dq, dk = (lay.from_tokens(x, lay.groups, lay.key) for x in (dq, dk))
    dbefore = None if state is None else xla.unflat(lay.from_states(dbefore), lay.ratio)
    return dq, dk, lay.from_tokens(dv, v.shape[2], lay.value), dlog_decay, dbefore


def _where_it_moves(dg, reset, valid):
    """Zeros at padding and at resets, where the log decay has no effect."""
    for mask in (None if reset is None else ~reset, valid):
        dg = dg if mask is None else jnp.where(mask.reshape(*mask.shape, *(1,) * (dg.ndim - 2)), dg, 0.0)
    return dg

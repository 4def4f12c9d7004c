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
from pallas_kernels.gated_linear_attention.mosaic_tpu import for_heads, heads_of, unrolled
from pallas_kernels.gated_linear_attention.mosaic_tpu_decay import HeadDecay, apart, join
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
    numbered,
    refuse,
    widen,
)

UNROLL = 10  # pairs of heads; more are a little faster, and take much longer to compile
WIDE = 2  # times the forward pass's lanes: what heads share is made, and the sums over them are added, once


def supports(q, k, v, log_decay, state, reset, valid, boundaries, dy, dstate, *, scale: float, chunk_size: int) -> None:
    """Raises UnsupportedError where `backward` does not honour an argument."""
    check_support(q, k, v, log_decay, chunk_size)
    if chunk_size > CHUNK:
        refuse(f"chunk_size={chunk_size} backward: it starts from the states before every {CHUNK} tokens")


def _head_sums(x, count: int) -> jax.Array:
    """x [n, lanes of `count` heads] summed over the lanes of each: [8, n], head by head, the tokens in the lanes."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK, x.shape[1]), axis) for axis in (0, 1))
    return contract(jnp.where(row == (lane >> 6 if count == 2 else 0), 1.0, 0.0).astype(x.dtype), x, 1, 1)


def _exact_head_sums(x, count: int, dtype) -> jax.Array:
    """`_head_sums` of float32 [n, 128] where sums nearly cancel: in bfloat16, both halves of a number are summed."""
    if dtype == jnp.float32:
        return _head_sums(x, count)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -(1 << 16)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return _head_sums(high.astype(dtype), count) + _head_sums((x - high).astype(dtype), count)


def _fold(x) -> jax.Array:
    """[n, width] summed to [8, 128], eight rows and 128 lanes at a time."""
    x = functools.reduce(jnp.add, [x[i : i + BLOCK] for i in range(0, x.shape[0], BLOCK)])
    return functools.reduce(jnp.add, [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)])


def _within(decay, p, n: int, dscores, refs, dtype) -> tuple[jax.Array, jax.Array]:
    """Pairs of tokens of a span, sources in the rows: adds to the gradient of their products.

    Returns their scores, none of a token with itself, and how they flow through the decays.
    """
    products_ref, dproducts_ref = refs
    span, scores, flows = decay.span, [], []
    for rows, weight, _ in decay.blocks(p, n):
        at = slice(n * span + rows.start, n * span + rows.stop)
        dproducts_ref[at, :] += weight * dscores[rows]
        scores.append((weight * products_ref[at, :]).astype(dtype))
        # Of the rounded scores, as the values' gradient is: their sums over targets and over sources cancel.
        flows.append(scores[-1].astype(jnp.float32) * dscores[rows])
    return jnp.concatenate(scores, axis=0), jnp.concatenate(flows, axis=0)


def _head_kernel(*refs, lay: Layout, scale: float, dtype, resets: bool):
    q_ref, k_ref, v_ref, g_ref, s_ref, dy_ref, dstate_ref, *refs = refs
    dq_ref, dk_ref, dv_ref, dg_ref, dbefore_ref, *refs = refs
    ds_ref, dq_sum, dk_sum, dq_in, transposed_ref, *refs = refs
    seen_ref, added_ref, ds_half_ref, dv_part_ref, same_ref, *refs = refs
    product_refs, between_refs, flow_refs, tables = refs[:2], refs[2:5], refs[5:8], refs[8:]
    products_ref, dproducts_ref = product_refs
    between_ref, half_ref, dbetween_ref = between_refs
    arriving, departing, onward = flow_refs
    t, h, count, steps = pl.program_id(2), pl.program_id(3), lay.pair, unrolled(lay, UNROLL)
    spans = [slice(start, start + CHUNK // count) for start in range(0, CHUNK, CHUNK // count)]

    # The gradient of the state by steps of the loop: within one, every address is known to the compiler.
    shares = [(i, slice(i * ds_ref.shape[3], (i + 1) * ds_ref.shape[3])) for i in range(ds_ref.shape[1])]

    @pl.when(t == 0)
    def _():
        for i, lanes in shares:
            ds_ref[h, i] = dstate_ref[:, lanes]

    @pl.when(h == 0)
    def _():
        dq_sum[...] = jnp.zeros(dq_sum.shape, jnp.float32)
        dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)

    used = [*([dq_in] if resets else []), dproducts_ref, *([dbetween_ref] if count == 2 else [])]
    for ref in used + (list(flow_refs) if lay.rows > lay.heads else []):
        ref[...] = jnp.zeros(ref.shape, jnp.float32)
    decay = HeadDecay(g_ref, scale, tables, count, mirrored=True)
    q, k = q_ref[...].astype(dtype), k_ref[...].astype(dtype)
    transposed_ref[...] = q.T
    # No decay lies between a token and itself: it is left out of what flows through them, exactly.
    same = scale * jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=1, keepdims=True)
    same_ref[...] = jnp.broadcast_to(same, same_ref.shape)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (decay.span, LANES), axis) for axis in (0, 1))
    for span in spans:
        products = scale * contract(k[span], jnp.concatenate([q[span]] * count, axis=0), 1, 1)
        products_ref[span, :] = jnp.where((lane & (decay.span - 1)) == row, 0.0, products)
    if count == 2:
        between_ref[...] = contract(k[spans[0]], jnp.concatenate([q[spans[1]]] * count, axis=0), 1, 1)
        half_ref[...] = between_ref[:, : lay.values].astype(dtype)

    def body(heads):
        p, lanes, step, slot = heads
        width = lanes.size
        own = (h, step, slice(None), slice(slot * width, (slot + 1) * width))
        wholes = [widen(w, width) for w in decay.whole(p)]

        def load(ref, span=slice(None)):
            return ref[span, lanes].astype(jnp.float32)

        def keep(n, flow):
            start = (n * decay.rows + p) * BLOCK
            onward[pl.ds(start if isinstance(p, int) else pl.multiple_of(start, BLOCK), BLOCK), :] = _fold(flow)

        # The products that wait for none other. Rows decayed to the edges of the chunk, and between its spans.
        until = widen(decay.other(p), width)
        outs = [widen(decay.edges(p, n), width) for n in range(count)]
        seen = [until[span] * load(dy_ref, span) for span in spans]
        added = [out * load(v_ref, span) for out, span in zip(outs, spans, strict=True)]
        if count == 2:
            leaving, entering = added[0].astype(dtype), seen[1].astype(dtype)
            seen[1], added[0] = seen[1] * wholes[0], added[0] * wholes[1]
        for span, x, y in zip(spans, seen, added, strict=True):
            seen_ref[slot, span], added_ref[slot, span] = x.astype(dtype), y.astype(dtype)
        all_scores = []
        for n, span in enumerate(spans):
            by_head = apart(load(dy_ref, span).astype(dtype), count)
            dscores = contract(load(v_ref, span).astype(dtype), by_head, 1, 1)
            scores, flow = _within(decay, p, n, dscores, product_refs, dtype)
            keep(n, flow)
            all_scores.append(scores)
        if count == 2:
            # From the first span to the second: through the edge between them.
            dbetween = contract(leaving, apart(entering, count), 1, 1)
            dbetween_ref[...] += dbetween
            keep(2, between_ref[...] * dbetween)
        ds_half_ref[slot] = ds_ref[own].astype(dtype)
        for n, span in enumerate(spans):
            dv_out = contract(k_ref[span, :].astype(dtype), ds_half_ref[slot], 1, 0)
            if n < count - 1:
                keep(3, added_ref[slot, span].astype(jnp.float32) * dv_out)
                dv_out = wholes[1] * dv_out + contract(half_ref[...], entering, 1, 0)
            dv_part_ref[slot, span] = outs[n] * dv_out
        y_in = contract(q_ref[...].astype(dtype), load(s_ref).astype(dtype), 1, 0)
        seen = decayed(seen_ref[slot].astype(jnp.float32), y_in, resets).astype(dtype)
        yield
        # The gradients of the values, and of the state before the chunk.
        left = []
        for n, span in enumerate(spans):
            by_head = apart(load(dy_ref, span).astype(dtype), count)
            dv = contract(all_scores[n], by_head, 1, 0) + dv_part_ref[slot, span]
            dv_ref[span, lanes] = (dv + widen(same_ref[span, :], width) * load(dy_ref, span)).astype(dv_ref.dtype)
            left.append(load(v_ref, span) * dv)
        left = jnp.concatenate(left, axis=0)
        whole = functools.reduce(jnp.multiply, wholes)
        flow = _fold(ds_ref[own] * load(s_ref))
        keep(4 if count == 2 else 1, decayed(jnp.broadcast_to(whole[:, :LANES], flow.shape), flow, resets))
        ds = jnp.broadcast_to(whole, (lay.keys, width)) * ds_ref[own]
        ds_ref[own] = ds + contract(transposed_ref[...], seen_ref[slot], 1, 0)
        yield
        # What flows through the decays.
        seen = _head_sums(seen, count)
        left = _exact_head_sums(left, count, dtype)
        for n in range(count):
            row = pl.ds(n * decay.rows + p, 1)
            arriving[row, :], departing[row, :] = seen[n : n + 1], left[n : n + 1]

    def end(step):
        # From the state before the chunk, and to the state after it.
        own = heads_of(lay, steps, step)
        dq_to = dq_in if resets else dq_sum
        dq = dq_to[...]
        for heads in own:
            dq += contract(seen_ref[heads.slot], s_ref[:, heads.lanes].astype(dtype), 1, 1)
        dq_to[...] = dq
        yield
        dk = dk_sum[...]
        for heads in own:
            dk += contract(added_ref[heads.slot], ds_half_ref[heads.slot], 1, 1)
        dk_sum[...] = dk

    for_heads(lay, steps, body, end)
    if resets:
        dq_sum[...] += jnp.where(widen(decay.seen(), lay.keys) > 0.0, dq_in[...], 0.0)
    dproducts = scale * dproducts_ref[...]
    if count == 2:
        # Of both heads, and all sources beside all targets.
        within, between = dproducts + pltpu.roll(dproducts, decay.span, 1), dbetween_ref[...]
        between = between + pltpu.roll(between, decay.span, 1)
        first = jax.lax.broadcasted_iota(jnp.int32, between.shape, 1) < decay.span
        rows = jnp.where(first, within[spans[0]], between), jnp.where(first, 0.0, within[spans[1]])
        dproducts = jnp.concatenate(rows, axis=0)
    dk_sum[...] += contract(dproducts.astype(dtype), q_ref[...].astype(dtype), 1, 0)
    dq_sum[...] += contract(dproducts.T.astype(dtype), k_ref[...].astype(dtype), 1, 0)
    documents = None
    if resets:
        g = jnp.broadcast_to(jnp.max(g_ref[...], axis=0, keepdims=True), (BLOCK, LANES))
        documents = numbered(g, 1)
    _write_decay(dg_ref, flow_refs, decay, documents)

    @pl.when(h == pl.num_programs(3) - 1)
    def _():
        dq_ref[...] = dq_sum[...].astype(dq_ref.dtype)
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)

    @pl.when(t == pl.num_programs(2) - 1)
    def _():
        for i, lanes in shares:
            dbefore_ref[:, lanes] = ds_ref[h, i]


def _write_decay(dg_ref, flow_refs, decay, documents) -> None:
    """Gradients of the log decays: what reaches a later token, or the end, from an earlier one, or the start.

    Within a span that is what later tokens receive from before it, and what earlier ones give to all that follows less
    what they receive within it. Those sums end with the document: what cancels leaves rounding errors.
    """
    arriving, departing, onward = flow_refs
    count, rows, span = decay.count, decay.rows, decay.span
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)

    def folded(n: int) -> jax.Array:
        parts = [onward[pl.ds(n * rows * BLOCK + r, rows, stride=BLOCK), :] for r in range(BLOCK)]
        return functools.reduce(jnp.add, parts)

    def only(x, n: int) -> jax.Array:
        return jnp.where((lane >= n * span) & (lane < (n + 1) * span), x, 0.0)

    inside = decay.by_head([folded(n) for n in range(count)])
    crossing = [only(x, 1) for x in (pltpu.roll(folded(2), span, 1), folded(2))] if count == 2 else [0.0]
    through, across = (folded(4), folded(3)) if count == 2 else (folded(1), None)
    for n in range(count):
        seen, left = (ref[n * rows : (n + 1) * rows, :] for ref in (arriving, departing))
        left = left - inside[n]
        past = [only(through, n)] * count
        if count == 2:  # the second span's targets see the start through all of the first, whose sources see the end
            past = [past[0] + only(seen, 1), past[1] + only(across, n)]
        past = [jnp.sum(x, axis=1, keepdims=True) for x in past]
        onto = cumulate(crossing[n] + seen, 1, reverse=True, span=span)
        away = cumulate(left, 1, reverse=False, span=span, documents=documents) - left
        past = join([jnp.broadcast_to(x, seen.shape) for x in past])
        dg_ref[pl.ds(n, rows, stride=count), :] = onto + away + past


def _by_head(q, k, v, g, boundaries, dy, dstate, lay: Layout, *, scale: float, resets: bool):
    batch = v.shape[0]
    specs = block_specs(lay, lambda b, n, t, h: (b, n, h, lay.chunks - 1 - t))
    decay = "shared_rows" if g.shape[0] == 1 else "rows"
    dtype = compute_dtype(q, k, v)
    kernel = functools.partial(_head_kernel, lay=lay, scale=scale, dtype=dtype, resets=resets)
    count, steps = lay.pair, unrolled(lay, UNROLL)
    rows, span = pltpu.VMEM((lay.rows, LANES), jnp.float32), CHUNK // count
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
            pltpu.VMEM((lay.blocks, lay.heads // (steps * count), lay.keys, steps * count * lay.values), jnp.float32),
            *[pltpu.VMEM((CHUNK, lay.keys), jnp.float32)] * 3,
            pltpu.VMEM((lay.keys, CHUNK), dtype),
            *[pltpu.VMEM((steps, CHUNK, count * lay.values), dtype)] * 2,
            pltpu.VMEM((steps, lay.keys, count * lay.values), dtype),
            pltpu.VMEM((steps, CHUNK, count * lay.values), jnp.float32),
            *[pltpu.VMEM((CHUNK, LANES), jnp.float32)] * 3,
            pltpu.VMEM((span, LANES), jnp.float32),
            pltpu.VMEM((span, span), dtype),
            pltpu.VMEM((span, LANES), jnp.float32),
            *[rows] * 2,
            pltpu.VMEM(((5 if count == 2 else 2) * lay.rows // count * BLOCK, LANES), jnp.float32),
            *HeadDecay.scratch(lay),
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
    lay = layout(q, v, chunk_size, WIDE)
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

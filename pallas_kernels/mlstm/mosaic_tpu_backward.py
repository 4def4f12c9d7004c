"""The mLSTM cell as a TPU kernel: the backward pass.

The chunks are walked from the last to the first, the cotangents of C and n in VMEM scratch. A chunk's weights and
scores are made again from the saved state before it. What the gates' gradients need comes out as six rows per chunk,
with a token per lane; `gates.pull` sums them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mlstm import gates, xla
from pallas_kernels.mlstm.mosaic_tpu import (
    DOCUMENT,
    INTER,
    LANES,
    OUTER,
    ROWS,
    Numbers,
    Plan,
    Specs,
    _supports,
    blocks,
    by_token,
    call,
    dot,
    from_by_token,
    padded_state,
    plan,
    rows,
    state_shapes,
    total,
)


def supports(
    q, k, v, i, f, C, n, m, reset, valid, boundaries, y, dy, dC, dn, dm, *, scale, eps, chunk_size: int
) -> None:
    """Raises UnsupportedError where `backward` does not honour an argument."""
    _supports(q, k, v, i, f, chunk_size)


def _as_rows(columns, chunk: int):
    """[8, C] whose first rows are the columns [C, 1]."""
    lane = lax.broadcasted_iota(jnp.int32, (chunk, LANES), 1)
    wide = jnp.zeros((chunk, LANES), jnp.float32)
    for i, column in enumerate(columns):
        wide = jnp.where(lane == i, column, wide)
    return wide.T[:ROWS]


def _add(old, new, stop: int):
    """Adds what concerns the tokens up to `stop` to a list of blocks of 128 of them."""
    pieces = [new[start : start + LANES] for start in range(0, stop, LANES)]
    return [a if b is None else a + b for a, b in zip(pieces, old + [None] * (len(pieces) - len(old)), strict=True)]


def _kernel(*refs, p: Plan, scale: float, eps: float):
    gates_ref, q_ref, k_ref, v_ref, y_ref, dy_ref, C_ref, n_ref, dC_last_ref, dn_last_ref, *refs = refs
    dq_ref, dk_ref, dv_ref, flows_ref, dC_first_ref, dn_first_ref, dC_ref, dn_ref = refs
    step = pl.program_id(2)  # from the last chunk to the first

    @pl.when(step == 0)
    def _():
        dC_ref[...] = dC_last_ref[...]
        dn_ref[...] = dn_last_ref[...]

    g = Numbers(gates_ref, p)
    n, dn = n_ref[...], dn_ref[...]
    dk, dv, dnumerators, ddenominators, crossings, dms = [], [], [], [], [], []
    leaving, between = (jnp.zeros((1, p.chunk), jnp.float32) for _ in range(2))
    for block in blocks(p):
        stop, inter = block.stop, g.column(INTER, block)
        seen, q, dy = slice(0, stop), g.load(q_ref, block), g.load(dy_ref, block).astype(jnp.float32)
        weights = g.weights(block)
        scores = weights * dot(q, g.load(k_ref, seen), (1, 1))
        factor, sign = g.normaliser(scores, q, n, block, scale, eps)
        delta = total(dy * y_ref[block, :].astype(jnp.float32))
        if p.masked:
            delta = jnp.where(g.column(DOCUMENT, block) >= 0, delta, 0.0)
        dfactor = -factor * delta
        dnumerator = (dy * (scale * factor)).astype(p.dtype)
        ddenominator = scale * dfactor * sign
        dscores = dot(dnumerator, g.load(v_ref, seen), (1, 1)) + ddenominator
        flow = scores * dscores
        token = lax.broadcasted_iota(jnp.int32, flow.shape, 0) + block.start
        apart = jnp.where(token == lax.broadcasted_iota(jnp.int32, flow.shape, 1), 0.0, flow)
        dproducts = (weights * dscores).astype(p.dtype)
        dq_in = g.carried(inter, dot(dnumerator, C_ref[...].astype(p.dtype), (1, 1)) + ddenominator * n)
        dq_ref[block, :] = (dot(dproducts, g.load(k_ref, seen)) + dq_in).astype(dq_ref.dtype)
        dk = _add(dk, dot(dproducts, q, (0, 0)), stop)
        dv = _add(dv, dot(scores.astype(p.dtype), dnumerator, (0, 0)), stop)
        crossings.append(total(apart) + total(q.astype(jnp.float32) * dq_in))
        dms.append(eps * dfactor)
        dnumerators.append(dnumerator)
        ddenominators.append(ddenominator)
        pad = [jnp.zeros((1, p.chunk - stop), jnp.float32)] * (stop < p.chunk)
        leaving, between = (
            row + jnp.concatenate([jnp.sum(x, axis=0, keepdims=True), *pad], axis=1)
            for row, x in ((leaving, flow), (between, apart))
        )
    outer = g.column(OUTER)
    dk_out = outer * (dot(g.load(v_ref), dC_ref[...].astype(p.dtype), (1, 1)) + dn)
    dk_ref[...] = (jnp.concatenate(dk, axis=0) + dk_out).astype(dk_ref.dtype)
    departing = total(g.load(k_ref).astype(jnp.float32) * dk_out)
    dv_out = outer * dot(g.load(k_ref), dC_ref[...].astype(p.dtype))
    dv_ref[...] = (jnp.concatenate(dv, axis=0) + dv_out).astype(dv_ref.dtype)
    carried = total(jnp.sum(C_ref[...] * dC_ref[...], axis=0, keepdims=True)) + total(n * dn)
    passing = jnp.broadcast_to(g.carried(g.decay, carried), (1, p.chunk))
    columns = _as_rows([jnp.concatenate(crossings, axis=0), departing, jnp.concatenate(dms, axis=0)], p.chunk)
    row = lax.broadcasted_iota(jnp.int32, columns.shape, 0)
    for i, extra in ((3, leaving), (4, between), (5, passing)):
        columns = jnp.where(row == i, extra, columns)
    flows_ref[...] = columns
    reads = g.load(q_ref).astype(jnp.float32) * g.column(INTER)
    dn_ref[...] = g.decay * dn + jnp.sum(reads * jnp.concatenate(ddenominators, axis=0), axis=0, keepdims=True)
    dC_ref[...] = g.decay * dC_ref[...] + dot(reads.astype(p.dtype), jnp.concatenate(dnumerators, axis=0), (0, 0))

    @pl.when(step == p.chunks - 1)
    def _():
        dC_first_ref[...] = dC_ref[...]
        dn_first_ref[...] = dn_ref[...]


def backward(
    q, k, v, i, f, C, n, m, reset, valid, boundaries, y, dy, dC, dn, dm, *, scale: float, eps: float, chunk_size: int
):
    """Returns the gradients of (q, k, v, i, f, C, n, m) as `xla.backward` does."""
    static = {"scale": scale, "eps": eps}
    if q.shape[1] == 1:
        operands = (q, k, v, i, f, C, n, m, reset, valid, boundaries, y, dy, dC, dn, dm)
        return xla.backward(*operands, **static, chunk_size=chunk_size)
    p = plan(q, k, v, reset, valid, chunk_size)
    key, value = q.shape[-1], v.shape[-1]
    m_first = jnp.zeros((p.batch, p.heads), jnp.float32) if m is None else m
    g = gates.prepare(i, f, m_first, reset, valid, p.chunk)
    specs = Specs(p, reverse=True)
    keys, values = specs.tokens(p.key), specs.tokens(p.value)
    tokens = (by_token(x, p) for x in (q, k, v, y, dy))
    operands = [rows(g, valid, p), *tokens, *padded_state(boundaries[0], boundaries[1], p), *padded_state(dC, dn, p)]
    in_specs = [specs.rows, keys, keys, values, values, values, *specs.boundaries, *specs.state]
    out_shape = [
        jax.ShapeDtypeStruct((p.batch, p.length, p.heads * width), x.dtype)
        for x, width in ((q, p.key), (k, p.key), (v, p.value))
    ]
    out_shape.append(jax.ShapeDtypeStruct((p.batch, p.heads, p.chunks, ROWS, p.chunk), jnp.float32))
    out_shape += state_shapes(p, boundaries=False)
    out_specs = [keys, keys, values, specs.rows, *specs.state]
    kernel = functools.partial(_kernel, p=p, **static)
    dq, dk, dv, flows, dC, dn = call(kernel, p, "mlstm_backward", operands, in_specs, out_shape, out_specs, 4)
    out = [from_by_token(x, p, width) for x, width in ((dq, key), (dk, key), (dv, value))]
    crossing, departing, direct, leaving, between, passing = (flows[:, :, :, r] for r in range(6))
    flows = (departing + leaving, crossing - between, departing, direct, passing[..., 0])
    di, df, dm = gates.pull(i, f, m_first, reset, valid, p.chunk, flows, dm)
    if C is None:
        return *out, di, df, None, None, None
    dC, dn = dC[..., :key, :value], dn[..., 0, :key]
    return *out, di, df, dC, dn, dm + xla.unit(C, dC) + xla.unit(n[..., None], dn[..., None])

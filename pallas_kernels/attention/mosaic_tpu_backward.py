"""Self-attention as Pallas TPU kernels: the backward pass.

It recomputes the weights p = exp(s - lse) chunk by chunk. One kernel walks the band over queries for a block of keys,
its matrices transposed, and adds up dk and dv; dq of the queries that the block meets stays in VMEM, in a ring, until
their last block of keys has passed. That takes five products per chunk. Where the ring is too large, as for many
query heads per key head over a long window, a second kernel computes dq over keys for a block of queries, as the
forward kernel walks: seven products.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.attention.mosaic_tpu import (
    VMEM_LIMIT,
    Band,
    Blocks,
    Layout,
    Scores,
    document_specs,
    for_row_chunks,
    layout,
    query_specs,
    widen,
)
from pallas_kernels.tiles import LANES, as_column, contract

# Of VMEM, beside what v5e grants a kernel by default; v5e and v6e have 128 MiB, v5p has 64.
RING_LIMIT = 16 * 2**20


def ring_bytes(band: Band, ratio: int, key: int) -> int:
    """Size of a float32 dq of all the queries that one block of keys meets."""
    return band.q_steps() * ratio * band.blocks.q * 4 * LANES * -(-key // LANES)


def _score_grad(scores: Scores, s, p, dp, delta):
    """The gradient of q . k^T without the factor `scale`."""
    ds = p * (dp - delta)
    return ds if scores.soft_cap is None else ds * (1.0 - jnp.square(s / scores.soft_cap))


def _dq_kernel(scores: Scores, *refs):
    columns = None
    if scores.documents:
        *refs, columns = refs
    *documents, q_ref, k_ref, v_ref, dy_ref, lse_ref, delta_ref, dq_ref, lse_columns, delta_columns, acc_ref = refs
    band, blocks = scores.band, scores.band.blocks
    i, step = pl.program_id(2), pl.program_id(3)
    first, last = band.kv_range(i)
    j = first + step

    @pl.when(step == 0)
    def _():
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
        for head in range(blocks.heads):
            lse_columns[head] = as_column(lse_ref[0, 0, pl.ds(head, 1)], blocks.lanes)
            delta_columns[head] = as_column(delta_ref[0, 0, pl.ds(head, 1)], blocks.lanes)
        if columns is not None:
            columns[...] = as_column(documents[0][0], blocks.lanes)

    def row_chunk(head, row):
        rows = pl.ds(row, blocks.q_chunk)
        q_start = i * blocks.q + row

        def chunk(c, masked):
            column = pl.multiple_of(c * blocks.kv_chunk, blocks.kv_chunk)
            keys = pl.ds(column, blocks.kv_chunk)

            @scores.where_documents_meet(documents, q_start, j * blocks.kv + column)
            def _():
                k = k_ref[0, 0, keys]
                s = shown = scores.scores(q_ref[0, 0, head, rows], k)
                if masked:
                    marks = (0, 0)
                    if columns is not None:
                        marks = (widen(columns[rows], s.shape[1]), documents[1][0, :, keys])
                    shown = scores.hide(s, q_start, j * blocks.kv + column, *marks, q_axis=0)
                p = jnp.exp(shown - widen(lse_columns[head, rows], s.shape[1]))
                dp = contract(dy_ref[0, 0, head, rows], v_ref[0, 0, keys], 1, 1)
                ds = _score_grad(scores, s, p, dp, widen(delta_columns[head, rows], s.shape[1]))
                acc_ref[head, rows] += contract(ds.astype(k.dtype), k, 1, 0)

        scores.loop(band.kv_chunks(q_start, j * blocks.kv), chunk)

    @pl.when(j <= last)
    def _():
        for_row_chunks(blocks, row_chunk)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq_ref[0, 0] = (acc_ref[...] * scores.scale).astype(dq_ref.dtype)


def _dkv_kernel(scores: Scores, with_dq: bool, *refs):
    refs = list(refs)
    columns = refs.pop() if scores.documents else None
    ring = refs.pop() if with_dq else None
    *refs, dk_ref, dv_ref, dk_acc, dv_acc = refs
    dq_ref = refs.pop() if with_dq else None
    *documents, q_ref, k_ref, v_ref, dy_ref, lse_ref, delta_ref = refs
    band, blocks = scores.band, scores.band.blocks
    j, turn, step = pl.program_id(2), pl.program_id(3), pl.program_id(4)
    first, last = band.q_range(j)
    i = first + step
    met_first, met_last = band.kv_range(i)
    slot, turn_heads = jax.lax.rem(i, band.q_steps()), pl.ds(turn * blocks.heads, blocks.heads)

    @pl.when((turn == 0) & (step == 0))
    def _():
        dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
        dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)
        if columns is not None:
            columns[...] = as_column(documents[1][0], blocks.lanes)

    if ring is not None:

        @pl.when((j == met_first) & (i <= last))
        def _():
            ring[slot, turn_heads] = jnp.zeros((blocks.heads, *ring.shape[2:]), jnp.float32)

    def key_chunk(column, head):
        keys = pl.ds(column, blocks.kv_chunk)
        kv_start = j * blocks.kv + column

        def chunk(c, masked):
            row = pl.multiple_of(c * blocks.q_chunk, blocks.q_chunk)
            rows = pl.ds(row, blocks.q_chunk)

            @scores.where_documents_meet(documents, i * blocks.q + row, kv_start)
            def _():
                q, dy = q_ref[0, 0, head, rows], dy_ref[0, 0, head, rows]
                k = k_ref[0, 0, keys]
                s = shown = scores.scores(k, q)
                if masked:
                    marks = (0, 0)
                    if columns is not None:
                        marks = (documents[0][0, :, rows], widen(columns[keys], s.shape[1]))
                    shown = scores.hide(s, i * blocks.q + row, kv_start, *marks, q_axis=1)
                p = jnp.exp(shown - lse_ref[0, 0, pl.ds(head, 1), rows])
                dp = contract(v_ref[0, 0, keys], dy, 1, 1)
                ds = _score_grad(scores, s, p, dp, delta_ref[0, 0, pl.ds(head, 1), rows])
                dv_acc[keys] += contract(p.astype(dy.dtype), dy, 1, 0)
                dk_acc[keys] += contract(ds.astype(q.dtype), q, 1, 0)
                if ring is not None:
                    ring[slot, turn * blocks.heads + head, rows] += contract(ds.astype(k.dtype), k, 0, 0)

        scores.loop(band.q_chunks(kv_start, i * blocks.q), chunk)

    @pl.when(i <= last)
    def _():
        def step(c, _):
            column = pl.multiple_of(jax.lax.div(c, blocks.heads) * blocks.kv_chunk, blocks.kv_chunk)
            key_chunk(column, jax.lax.rem(c, blocks.heads))

        jax.lax.fori_loop(0, blocks.kv // blocks.kv_chunk * blocks.heads, step, None)

    if ring is not None and dq_ref is not None:

        @pl.when((j == met_last) & (i <= last))
        def _():
            dq_ref[0, 0] = (ring[slot, turn_heads] * scores.scale).astype(dq_ref.dtype)

    @pl.when((turn == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1))
    def _():
        dk_ref[0, 0] = (dk_acc[...] * scores.scale).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_acc[...].astype(dv_ref.dtype)


def _dq(at: Layout, ratio: int, q, k, v, dy, lse, delta):
    band, blocks = at.band, at.band.blocks
    key, value = q.shape[-1], v.shape[-1]
    q_spec, kv_spec, documents = query_specs(at, ratio)
    lanes = pltpu.VMEM((blocks.heads, blocks.q, blocks.lanes), jnp.float32)
    scratch = [lanes, lanes, pltpu.VMEM((blocks.heads, blocks.q, key), jnp.float32)]
    if at.documents:
        scratch.append(pltpu.VMEM((blocks.q, blocks.lanes), jnp.int32))
    return pl.pallas_call(
        functools.partial(_dq_kernel, at.scores),
        grid=(*q.shape[:2], band.q_blocks, band.kv_steps()),
        in_specs=[*documents, q_spec(key), kv_spec(key), kv_spec(value), q_spec(value), q_spec(), q_spec()],
        out_specs=q_spec(key),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret.parameters(),
        name="attention_dq",
    )(*at.documents, q, k, v, dy, lse, delta)


def _dkv(at: Layout, ratio: int, with_dq: bool, q, k, v, dy, lse, delta):
    """[dk, dv], or [dq, dk, dv]."""
    band, blocks = at.band, at.band.blocks
    key, value = q.shape[-1], v.shape[-1]
    q_steps, turns = band.q_steps(), ratio // blocks.heads  # every query head of a key head adds to its gradient

    def q_index(j, step):
        first, last = band.q_range(j)
        return jnp.minimum(first + step, last)

    def dq_index(j, step):  # a block is written once it has met its own keys: those are its last
        return jnp.minimum(q_index(j, step), band.q_diagonal(j))

    def q_spec(*width, index=q_index):
        zeros = (0,) * len(width)
        return pl.BlockSpec(
            (1, 1, blocks.heads, blocks.q, *width),
            lambda b, g, j, turn, step: (b, g * turns + turn, 0, index(j, step), *zeros),
        )

    def kv_spec(width):
        return pl.BlockSpec((1, 1, blocks.kv, width), lambda b, g, j, turn, step: (b, g, j, 0))

    outputs = [(k, kv_spec(key)), (v, kv_spec(value))]
    scratch = [pltpu.VMEM((blocks.kv, width), jnp.float32) for width in (key, value)]
    if with_dq:
        outputs = [(q, q_spec(key, index=dq_index)), *outputs]
        scratch.append(pltpu.VMEM((q_steps, ratio, blocks.q, key), jnp.float32))
    if at.documents:
        scratch.append(pltpu.VMEM((blocks.kv, blocks.lanes), jnp.int32))
    return pl.pallas_call(
        functools.partial(_dkv_kernel, at.scores, with_dq),
        grid=(*k.shape[:2], band.kv_blocks, turns, q_steps),
        in_specs=[
            *document_specs(at, q_index, lambda j, step: j),
            *(q_spec(key), kv_spec(key), kv_spec(value), q_spec(value), q_spec(), q_spec()),
        ],
        out_specs=[spec for _, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT + (ring_bytes(band, ratio, key) if with_dq else 0),
        ),
        interpret=interpret.parameters(),
        name="attention_backward" if with_dq else "attention_dkv",
    )(*at.documents, q, k, v, dy, lse, delta)


def backward(
    q,
    k,
    v,
    q_positions,
    kv_positions,
    q_documents,
    kv_documents,
    y,
    lse,
    dy,
    dlse,
    *,
    window,
    scale,
    soft_cap,
    blocks: Blocks | None = None,
):
    """Gradients (dq, dk, dv), in the dtypes of q, k, v, from the cotangents of y and lse.

    With p = exp(s - lse) and delta = sum_v(dy * y) - dlse:  ds = p * (dy @ v^T - delta).
    """
    at = layout(q, k, v, q_documents, kv_documents, window=window, scale=scale, soft_cap=soft_cap, blocks=blocks)
    sees = lse > -jnp.inf
    dy = jnp.where(sees[..., None], dy, 0)  # y is the constant 0 where nothing is seen
    delta = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1) - jnp.where(sees, dlse, 0.0)
    arrays = (
        at.queries(q, q_documents),
        at.keys(k, kv_documents),
        at.keys(v, kv_documents),
        at.queries(dy, q_documents),
        at.rows(jnp.where(sees, lse, 0.0)),
        at.rows(delta),
    )
    ratio = q.shape[2] // k.shape[2]
    if ring_bytes(at.band, ratio, q.shape[3]) <= RING_LIMIT:
        dq, dk, dv = _dkv(at, ratio, True, *arrays)
    else:
        dq, (dk, dv) = _dq(at, ratio, *arrays), _dkv(at, ratio, False, *arrays)
    return at.from_queries(dq), at.from_keys(dk), at.from_keys(dv)

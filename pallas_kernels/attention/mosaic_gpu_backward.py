"""Self-attention as Mosaic GPU kernels: the backward pass, one kernel for dq and one for dk and dv.

Never run on a GPU: interpreted and lowered only.

Both recompute the weights p = exp(s - lse) step by step and walk the band of the forward kernel: the first streams
keys past a tile of queries, the second streams the queries of every head of a group past a tile of keys, with its
score matrices transposed, so that every product takes its left factor from registers. The second runs twice where
dk and dv are too wide for registers together, once for each.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.mosaic_gpu import (
    CONSUMERS,
    LOG2_E,
    Blocks,
    Scores,
    choose_blocks,
    copy_all,
    kernel,
    layout,
    roles,
    stream_barriers,
    write,
)
from pallas_kernels.wgmma import (
    COLUMNS,
    MATRIX,
    ROWS,
    Stream,
    across,
    full,
    load,
    matrix_ref,
    multiply_parts,
    parts,
    split_array,
    split_ref,
)

TOGETHER = 128  # of 16-bit numbers: up to it a warpgroup's 64 rows of dk and of dv stay in registers together
_STATISTICS = 12  # bytes of the log-sum-exp, of delta and of the document of a query


def dq_blocks(key: int, value: int, size: int = 2) -> Blocks:
    """Blocks of the kernel of dq for numbers of `size` bytes and these widths."""
    held = size * (key + value) + _STATISTICS  # queries, whose place 16-bit dq takes, and dy
    return choose_blocks(held, size * (key + value) + 4, 128 if size * max(key, value) <= 128 else 64)


def dkv_blocks(key: int, value: int, size: int = 2) -> Blocks:
    """Blocks of the kernel of dk and dv for numbers of `size` bytes and these widths."""
    return choose_blocks(size * (key + value) + 4, size * (key + value) + _STATISTICS, 64)


def _dq_kernel(scores: Scores, ratio: int, *refs):
    *inputs, dq_ref, q_smem, dy_smem, statistics, k_smem, v_smem, marks, held, full_, free = refs
    q_ref, k_ref, v_ref, dy_ref, lse_ref, delta_ref, *documents = inputs
    band, blocks, count = scores.band, scores.band.blocks, parts(dq_ref.dtype)
    stream = Stream(full_, free, blocks.slots)
    b, h = jax.lax.axis_index("batch"), jax.lax.axis_index("head")
    tile = band.length // blocks.tile - 1 - jax.lax.axis_index("tile")  # those with the most steps first
    bounds = scores.narrow(band.of_queries(tile * blocks.tile), documents, b, tile)
    first, stop = bounds[0], bounds[3]

    def produce():
        g = jax.lax.div(h, jnp.int32(ratio))

        def copy(step, slot, barrier):
            keys = pl.ds((first + step) * blocks.step, blocks.step)
            pairs = [(k_ref.at[b, keys, g], k_smem.at[slot]), (v_ref.at[b, keys, g], v_smem.at[slot])]
            if documents:
                pairs.append((documents[1].at[b, keys], marks[1].at[slot]))
            copy_all(pairs, barrier)

        stream.produce(stop - first, copy)

    def consume(index):
        q_start = tile * blocks.tile + index * blocks.rows
        rows = pl.ds(q_start, blocks.rows)
        q, dy = q_smem.at[index], dy_smem.at[index]
        pairs = [(q_ref.at[b, rows, h], q), (dy_ref.at[b, rows, h], dy)]
        pairs += [(x.at[b, h, rows], y.at[index]) for x, y in zip((lse_ref, delta_ref), statistics, strict=True)]
        if documents:
            pairs.append((documents[0].at[b, rows], marks[0].at[index]))
        copy_all(pairs, held.at[index])
        plgpu.barrier_wait(held.at[index])
        lse, delta = (load(x.at[index], ROWS) for x in statistics)
        q_marks = load(marks[0].at[index], ROWS) if documents else None

        def update(step, acc, *, masked):
            slot = stream.take(step - first)
            k, v = split_ref(k_smem.at[slot], count), split_ref(v_smem.at[slot], count)
            s, tanh = scores.scores(multiply_parts(split_ref(q, count), k, transpose=True))
            if masked:
                kv_marks = load(marks[1].at[slot], COLUMNS) if documents else None
                s = scores.hide(s, q_start, step * blocks.step, q_marks, kv_marks, q_axis=0)
            p = jnp.exp2(s - across(lse, s.shape, 0))
            dp = multiply_parts(split_ref(dy, count), v, transpose=True)
            ds = scores.score_grad(p, dp, across(delta, s.shape, 0), tanh)
            acc = multiply_parts(split_array(ds, count, k_ref.dtype), k, acc)
            stream.release(slot)
            return acc

        acc = scores.loop(bounds, update, full((blocks.rows, dq_ref.shape[3]), 0.0, MATRIX))
        write((acc * scores.scale, dq_ref.at[b, rows, h], q if count == 1 else None))

    roles(consume, produce)


def _dkv_kernel(scores: Scores, ratio: int, wants: tuple[str, ...], *refs):
    *refs, k_smem, v_smem, q_smem, dy_smem, statistics, marks, held, full_, free = refs
    inputs, outputs = refs[: -len(wants)], dict(zip(wants, refs[-len(wants) :], strict=True))
    q_ref, k_ref, v_ref, dy_ref, lse_ref, delta_ref, *documents = inputs
    band, blocks, count = scores.band, scores.band.blocks, parts(refs[-1].dtype)
    stream = Stream(full_, free, blocks.slots)
    b, g, tile = (jax.lax.axis_index(name) for name in ("batch", "head", "tile"))
    bounds = scores.narrow(band.of_keys(tile * blocks.tile), documents, b, tile)
    first, turn = bounds[0], bounds[3] - bounds[0]  # steps of one head

    def produce():
        def copy(step, slot, barrier):
            h = g * ratio + jax.lax.div(step, turn)
            rows = pl.ds((first + jax.lax.rem(step, turn)) * blocks.step, blocks.step)
            pairs = [(q_ref.at[b, rows, h], q_smem.at[slot]), (dy_ref.at[b, rows, h], dy_smem.at[slot])]
            pairs += [(x.at[b, h, rows], y.at[slot]) for x, y in zip((lse_ref, delta_ref), statistics, strict=True)]
            if documents:
                pairs.append((documents[0].at[b, rows], marks[0].at[slot]))
            copy_all(pairs, barrier)

        stream.produce(ratio * turn, copy)

    def consume(index):
        kv_start = tile * blocks.tile + index * blocks.rows
        keys = pl.ds(kv_start, blocks.rows)
        k, v = k_smem.at[index], v_smem.at[index]
        pairs = [(k_ref.at[b, keys, g], k), (v_ref.at[b, keys, g], v)]
        if documents:
            pairs.append((documents[1].at[b, keys], marks[1].at[index]))
        copy_all(pairs, held.at[index])
        plgpu.barrier_wait(held.at[index])
        kv_marks = load(marks[1].at[index], ROWS) if documents else None

        def update(step, carry, *, masked, before):
            grads = dict(carry)
            slot = stream.take(before + step - first)
            q, dy = split_ref(q_smem.at[slot], count), split_ref(dy_smem.at[slot], count)
            s, tanh = scores.scores(multiply_parts(split_ref(k, count), q, transpose=True))
            if masked:
                q_marks = load(marks[0].at[slot], COLUMNS) if documents else None
                s = scores.hide(s, step * blocks.step, kv_start, q_marks, kv_marks, q_axis=1)
            lse, delta = (load(x.at[slot], COLUMNS) for x in statistics)
            p = jnp.exp2(s - across(lse, s.shape, 1))
            if "dv" in grads:
                grads["dv"] = multiply_parts(split_array(p, count, v_ref.dtype), dy, grads["dv"])
            if "dk" in grads:
                dp = multiply_parts(split_ref(v, count), dy, transpose=True)
                ds = scores.score_grad(p, dp, across(delta, s.shape, 1), tanh)
                grads["dk"] = multiply_parts(split_array(ds, count, k_ref.dtype), q, grads["dk"])
            stream.release(slot)
            return grads

        def head(n, carry):
            return scores.loop(bounds, functools.partial(update, before=n * turn), carry)

        start = {name: full((blocks.rows, x.shape[3]), 0.0, MATRIX) for name, x in outputs.items()}
        grads = jax.lax.fori_loop(0, ratio, head, start)
        places = {"dk": k, "dv": v} if count == 1 else {}  # of what is read no more
        if "dk" in grads:
            grads["dk"] *= scores.scale
        write(*((x, outputs[name].at[b, keys, g], places.get(name)) for name, x in grads.items()))

    roles(consume, produce)


def _call(wants: tuple[str, ...], q, k, v, dy, lse, delta, q_documents, kv_documents, **options) -> list[jax.Array]:
    """The gradients `wants`, ("dq",) or some of ("dk", "dv"), of arrays as `backward` has them."""
    by_query = wants == ("dq",)
    (batch, time, heads, key), (groups, value) = q.shape, v.shape[2:]
    blocks = (dq_blocks if by_query else dkv_blocks)(key, value, q.dtype.itemsize)
    at = layout(time, q_documents, kv_documents, blocks, **options)
    length, extra = at.scores.band.length, len(at.documents) // 2
    tile, ring = (CONSUMERS, blocks.rows), (blocks.slots, blocks.step)
    of_q, of_kv = (tile, ring) if by_query else (ring, tile)
    arrays = (at.rows(q, q_documents), at.rows(k, kv_documents), at.rows(v, kv_documents), at.rows(dy, q_documents))
    statistics = (plgpu.SMEM(of_q, jnp.float32),) * 2
    q_side, kv_side = ([matrix_ref((*of, x.shape[3]), x.dtype) for x in arrays[1:3]] for of in (of_q, of_kv))
    q_side.append(statistics)
    copies = (4 + extra, 2 + extra)
    held, streamed = copies if by_query else copies[::-1]
    scratch = [
        *(q_side + kv_side if by_query else kv_side + q_side),
        (plgpu.SMEM(of_q, jnp.int32), plgpu.SMEM(of_kv, jnp.int32)) if extra else None,
        plgpu.Barrier(num_arrivals=held, num_barriers=CONSUMERS),
        *stream_barriers(blocks.slots, streamed),
    ]
    shapes = {"dq": (heads, key), "dk": (groups, key), "dv": (groups, value)}
    out_type = [jax.ShapeDtypeStruct((batch, length, *shapes[name]), q.dtype) for name in wants]
    body = functools.partial(_dq_kernel, at.scores, heads // groups)
    if not by_query:
        body = functools.partial(_dkv_kernel, at.scores, heads // groups, wants)
    grid = {"head": heads if by_query else groups, "tile": length // blocks.tile, "batch": batch}
    results = kernel("attention_" + "_".join(wants), body, out_type, scratch, grid)(
        *arrays, at.statistic(lse), at.statistic(delta), *at.documents, *at.spans(by_query=by_query)
    )
    return [x[:, :time] for x in results]


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
):
    """Gradients (dq, dk, dv), in the dtypes of q, k, v, from the cotangents of y and lse.

    With p = exp(s - lse) and delta = sum_v(dy * y) - dlse:  ds = p * (dy @ v^T - delta).
    """
    sees = lse > -jnp.inf
    dy = jnp.where(sees[..., None], dy, 0)  # y is the constant 0 where nothing is seen
    delta = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1) - jnp.where(sees, dlse, 0.0)
    arrays = (q, k, v, dy, jnp.where(sees, lse, 0.0) * LOG2_E, delta, q_documents, kv_documents)
    options = {"window": window, "scale": scale, "soft_cap": soft_cap}
    together = max(q.shape[3], v.shape[3]) <= TOGETHER // parts(q.dtype)
    kernels = (("dq",), ("dk", "dv")) if together else (("dq",), ("dk",), ("dv",))
    return tuple(grad for wants in kernels for grad in _call(wants, *arrays, **options))

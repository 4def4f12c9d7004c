"""Gated linear attention as Pallas TPU kernels for a decay per channel of the key: forward and backward.

All heads of a group share the scores. Let n be the power of two for which tokens i > j lie in the right and the left
half of one block of 2 n tokens. Their decay is that from the middle of the block to i times that from j to the middle,
so for every n the scores are products of the rows x_n: queries in right halves and keys in left halves, each decayed
to the middle. Seven products of 128 x 128 make the scores of a chunk; every exponent is a sum of non-positive numbers.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.gated_linear_attention.mosaic_tpu_layout import (
    BLOCK,
    CHUNK,
    LANES,
    VMEM_LIMIT,
    Layout,
    block_specs,
    compute_dtype,
    contract,
    cumulate,
    decayed,
    numbered,
    widen,
)

LEVELS = CHUNK.bit_length() - 1


class ChannelDecay:
    """Sums of the log decays g [128, K] of a chunk, all non-positive, [128, K].

    Attributes:
      middle: for n = 1, 2, 4 .. 64, between the token and the middle of its block of 2 n tokens.
      until: from the chunk's first token to this one.
      after: from the next token to the chunk's last.
      total: of the whole chunk, in every row.
    """

    def __init__(self, g):
        shape = (CHUNK // BLOCK, BLOCK, g.shape[1])
        until = total = g.reshape(shape)
        after = jnp.zeros(shape, jnp.float32)
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        middle = []
        for n in (1, 2, 4):  # within a register of eight tokens
            right = (row & n) != 0
            middle.append(jnp.where(right, until, after).reshape(g.shape))
            other = jnp.where(right, pltpu.roll(total, n, 1), pltpu.roll(total, BLOCK - n, 1))
            until, after = until + jnp.where(right, other, 0.0), after + jnp.where(right, 0.0, other)
            total = total + other
        for n in (8, 16, 32, 64):
            halves = (CHUNK // (2 * n), 2, n // BLOCK, *shape[1:])
            (ul, ur), (al, ar), (tl, tr) = (_halves(x.reshape(halves)) for x in (until, after, total))
            middle.append(_joined(al, ur).reshape(g.shape))
            until, after = _joined(ul, ur + tl).reshape(shape), _joined(al + tr, ar).reshape(shape)
            total = _joined(tl + tr, tl + tr).reshape(shape)
        self.middle = middle
        self.until, self.after, self.total = (x.reshape(g.shape) for x in (until, after, total))

    def levels(self, q, k, dtype) -> Iterator[tuple[int, jax.Array, jax.Array, jax.Array]]:
        """(level, right, decay, x_n): which rows are queries, their float32 decay, the decayed rows."""
        row = jax.lax.broadcasted_iota(jnp.int32, q.shape, 0)
        for level, middle in enumerate(self.middle):
            right, decay = ((row >> level) & 1) == 1, jnp.exp(middle)
            yield level, right, decay, (jnp.where(right, q, k) * decay).astype(dtype)

    def seen(self, resets: bool):
        """bool [128, 1], whether the token sees the state before the chunk; None without resets."""
        return jnp.max(self.until, axis=1, keepdims=True) > -jnp.inf if resets else None

    def whole(self) -> jax.Array:
        """exp(sum over the chunk), [K, 128]: the channels in the sublanes, the same in every lane."""
        return jnp.exp(self.total).T


def _halves(x):
    return x[:, 0], x[:, 1]


def _joined(left, right):
    return jnp.concatenate([left[:, None], right[:, None]], axis=1)


def _differ() -> tuple[jax.Array, jax.Array, jax.Array]:
    """int32 [128, 128]: i, j and the bits in which they differ."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
    return i, j, i ^ j


def _where(mask, x):
    return x if mask is None else jnp.where(mask, x, 0.0)


def _kernel(*refs, lay: Layout, scale: float, dtype, carried: bool, save: bool, resets: bool):
    refs = list(refs)
    q_ref, k_ref, v_ref, g_ref = (refs.pop(0) for _ in range(4))
    state_ref = refs.pop(0) if carried else None
    y_ref, new_state_ref = refs.pop(0), refs.pop(0)
    boundary_ref = refs.pop(0) if save else None
    (s_ref,) = refs
    t = pl.program_id(3)

    @pl.when(t == 0)
    def _():
        s_ref[...] = jnp.zeros(s_ref.shape, jnp.float32) if state_ref is None else state_ref[...]

    if boundary_ref is not None:

        @pl.when(jax.lax.rem(t, lay.saves) == 0)
        def _():
            boundary_ref[...] = s_ref[...]

    decay = ChannelDecay(g_ref[...])
    q, k = scale * q_ref[...].astype(jnp.float32), k_ref[...].astype(jnp.float32)
    v, s = v_ref[...].astype(dtype), s_ref[...]
    i, j, differ = _differ()
    scores = contract(q.astype(dtype), k.astype(dtype), 1, 1)  # of a token with itself
    for level, *_rest, x in decay.levels(q, k, dtype):
        scores = jnp.where((differ >> level) == 1, contract(x, x, 1, 1), scores)
    scores = jnp.where(i >= j, scores, 0.0).astype(dtype)
    y = _where(decay.seen(resets), contract((q * jnp.exp(decay.until)).astype(dtype), s.astype(dtype), 1, 0))
    y_ref[...] = (y + contract(scores, v, 1, 0)).astype(y_ref.dtype)
    added = contract((k * jnp.exp(decay.after)).astype(dtype), v, 0, 0)
    s_ref[...] = decayed(widen(decay.whole(), lay.lanes), s, resets) + added

    @pl.when(t == pl.num_programs(3) - 1)
    def _():
        new_state_ref[...] = s_ref[...]


def forward(q, k, v, g, state, lay: Layout, *, scale: float, save: bool, resets: bool):
    """(y, new_state, boundaries if `save`) from arrays in the layout of the kernels, g [B, time, G * keys]."""
    batch = v.shape[0]
    specs = block_specs(lay, lambda *ids: ids)
    out_shape = [
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        jax.ShapeDtypeStruct((batch, lay.groups, lay.keys, lay.ratio * lay.values), jnp.float32),
    ]
    if save:
        out_shape.append(jax.ShapeDtypeStruct((batch, lay.boundaries, *out_shape[1].shape[1:]), jnp.float32))
    options = {"carried": state is not None, "save": save, "resets": resets}
    names = ("keys", "keys", "values", "keys") + (("state",) if state is not None else ())
    return pl.pallas_call(
        functools.partial(_kernel, lay=lay, scale=scale, dtype=compute_dtype(q, k, v), **options),
        grid=(batch, lay.groups, lay.blocks, lay.chunks),
        in_specs=[specs[name] for name in names],
        out_specs=[specs[name] for name in ("values", "state", "boundary")[: len(out_shape)]],
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((lay.keys, lay.lanes), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret.parameters(),
        name="gated_linear_attention_channel_forward",
    )(*(a for a in (q, k, v, g, state) if a is not None))


def _backward_kernel(*refs, lay: Layout, scale: float, dtype, resets: bool):
    q_ref, k_ref, v_ref, g_ref, s_ref, dy_ref, dstate_ref, *refs = refs
    dq_ref, dk_ref, dv_ref, dg_ref, dbefore_ref, ds_ref, dq_sum, dk_sum, out_sum, passing, itself = refs
    t, h = pl.program_id(2), pl.program_id(3)

    @pl.when(t == 0)
    def _():
        ds_ref[h] = dstate_ref[...]

    @pl.when(h == 0)
    def _():
        for ref in (dq_sum, dk_sum, out_sum, passing, itself):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    decay = ChannelDecay(g_ref[...])
    q, k = scale * q_ref[...].astype(jnp.float32), k_ref[...].astype(jnp.float32)
    v, dy, s, ds = v_ref[...].astype(dtype), dy_ref[...].astype(dtype), s_ref[...], ds_ref[h]
    i, j, differ = _differ()
    # Within the chunk: the products of x_n are symmetric, and so are the cotangents of pairs of tokens.
    dscores = jnp.where(i >= j, contract(dy, v, 1, 1), contract(v, dy, 1, 1))
    scores = contract(k.astype(dtype), q.astype(dtype), 1, 1)
    dq, dk = jnp.zeros(q.shape, jnp.float32), jnp.zeros(q.shape, jnp.float32)
    for level, right, factor, x in decay.levels(q, k, dtype):
        pairs = (differ >> level) == 1
        scores = jnp.where(pairs, contract(x, x, 1, 1), scores)
        dx = factor * contract(jnp.where(pairs, dscores, 0.0).astype(dtype), x, 1, 0)
        dq, dk = dq + jnp.where(right, dx, 0.0), dk + jnp.where(right, 0.0, dx)
    scores = jnp.where(i <= j, scores, 0.0).astype(dtype)  # transposed
    itself[...] += jnp.where(i == j, dscores, 0.0)
    # From the state before the chunk, and to the state after it.
    until, after, whole = jnp.exp(decay.until), jnp.exp(decay.after), widen(decay.whole(), lay.lanes)
    dq_in = until * _where(decay.seen(resets), contract(dy, s.astype(dtype), 1, 1))
    dv = contract((k * after).astype(dtype), ds.astype(dtype), 1, 0) + contract(scores, dy, 1, 0)
    dv_ref[...] = dv.astype(dv_ref.dtype)
    dq_sum[...] += dq + dq_in
    dk_sum[...] += dk
    out_sum[...] += after * contract(v, ds.astype(dtype), 1, 1)
    through = decayed(whole, s * ds, resets).astype(dtype)
    passing[...] += contract(jnp.ones((BLOCK, lay.lanes), dtype), through, 1, 1)
    ds_ref[h] = whole * ds + contract((q * until).astype(dtype), dy, 0, 0)

    @pl.when(h == pl.num_programs(3) - 1)
    def _():
        dq, dk, out, diagonal = dq_sum[...], dk_sum[...], out_sum[...], itself[...].astype(dtype)
        departing = k * out
        documents = None
        if resets:
            documents = numbered(jnp.broadcast_to(jnp.max(g_ref[...], axis=1, keepdims=True), (CHUNK, LANES)), 0)
        total = cumulate(q * dq - k * dk, 0, reverse=True, documents=documents) + (
            cumulate(departing, 0, reverse=False) - departing
        )
        dg_ref[...] = total + passing[:1, :]
        dq_ref[...] = (scale * (dq + contract(diagonal, k.astype(dtype), 1, 0))).astype(dq_ref.dtype)
        dk_ref[...] = (dk + out + contract(diagonal, q.astype(dtype), 1, 0)).astype(dk_ref.dtype)

    @pl.when(t == pl.num_programs(2) - 1)
    def _():
        dbefore_ref[...] = ds_ref[h]


def backward(q, k, v, g, boundaries, dy, dstate, lay: Layout, *, scale: float, resets: bool):
    """(dq, dk, dv, dg, state's gradient) from arrays in the layout of the kernels, g [B, time, G * keys]."""
    batch = v.shape[0]
    specs = block_specs(lay, lambda b, n, t, h: (b, n, h, lay.chunks - 1 - t))
    sums = pltpu.VMEM((CHUNK, lay.keys), jnp.float32)
    return pl.pallas_call(
        functools.partial(_backward_kernel, lay=lay, scale=scale, dtype=compute_dtype(q, k, v), resets=resets),
        grid=(batch, lay.groups, lay.chunks, lay.blocks),
        in_specs=[specs[n] for n in ("keys", "keys", "values", "keys", "boundary", "values", "state_in")],
        out_specs=[specs[n] for n in ("keys", "keys", "values", "keys", "state_out")],
        out_shape=[
            *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, k, v, g)),
            jax.ShapeDtypeStruct(dstate.shape, jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((lay.blocks, lay.keys, lay.lanes), jnp.float32),
            *[sums] * 3,
            pltpu.VMEM((BLOCK, lay.keys), jnp.float32),
            pltpu.VMEM((CHUNK, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret.parameters(),
        name="gated_linear_attention_channel_backward",
    )(q, k, v, g, boundaries, dy, dstate)

"""Gated linear attention as a loop over chunks of matrix products, with a hand-written backward pass.

A chunk is C tokens, filled up to a power of two by tokens of zeros. Token i sees token j < i through
exp(g_{j+1} + ... + g_i), g the log decays. Neither exp(G_i) exp(-G_j) (which overflows) nor exp(G_i - G_j)
(which cancels, G the cumulative sum) is formed. Instead, let n be the power of two for which j lies in the left
and i in the right half of one block of 2 n tokens: the sum is that from the middle of the block to i, plus that
from j to the middle. Both are sums of non-positive numbers, made by doubling, and for every n the scores are a
plain product of decayed queries with decayed keys.

Only the states at the chunk boundaries survive for the backward pass, which recomputes the rest by chunk.

Layout within a chunk, R = H // G heads to a group: q, k [B, G, C, K]; v, y [B, G, C, R, V]; state [B, G, K, R, V];
log decay [B or 1, G, C, X] with X = R (per head, a factor of v) or X = K (per channel, a factor of q and k).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.chunks import opaque, over_chunks

# Scores across less than this many tokens are computed in blocks of this many: smaller products are slower.
LEAF = 16


class Documents(NamedTuple):
    """Which tokens of a chunk belong together, when there are resets."""

    index: jax.Array  # int32 [B, C], number of resets in the chunk up to the token
    carried: jax.Array  # bool [B, 1, C, 1, 1], the token sees the state before the chunk
    kept: jax.Array  # bool [B, 1, C, 1, 1], the state after the chunk sees the token
    through: jax.Array  # bool [B, 1, 1, 1, 1], the state after the chunk sees that before it


class Decay(NamedTuple):
    """Sums of the log decays of a chunk, each of them non-positive, [B or 1, G, C, X]."""

    per_head: bool  # X = R rather than X = K
    middle: tuple[jax.Array, ...]  # for n = 1, 2, 4 ..: between the token and the middle of its block of 2 n
    until: jax.Array  # from the chunk's first token to this one
    after: jax.Array  # from the next token to the chunk's last


class Chunk(NamedTuple):
    """A chunk of the inputs in float32, with zeros at padding; q is multiplied by the scale."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    decay: Decay | None
    documents: Documents | None
    moves: jax.Array | None  # bool [B, C], False where the log decay has no effect: padding and resets


_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _doubled(log_decay) -> tuple[tuple, jax.Array, jax.Array]:
    """The sums of `Decay` from log decays [B, G, C, X]."""
    shape = log_decay.shape
    until, after, middle, n = log_decay, jnp.zeros_like(log_decay), [], 1
    while n < shape[2]:  # here they are sums within blocks of n tokens
        u, a = (s.reshape(*shape[:2], -1, 2, n, shape[3]) for s in (until, after))
        left, right = (a[:, :, :, :1], u[:, :, :, :1]), (a[:, :, :, 1:], u[:, :, :, 1:])
        middle.append(jnp.concatenate([left[0], right[1]], axis=3).reshape(shape))
        until = jnp.concatenate([left[1], right[1] + left[1][:, :, :, :, -1:]], axis=3).reshape(shape)
        after = jnp.concatenate([left[0] + right[1][:, :, :, :, -1:], right[0]], axis=3).reshape(shape)
        n *= 2
    return tuple(middle), until, after


def _pairs(size: int, n: int) -> np.ndarray:
    """bool [size, size]: i in the right and j in the left half of one block of 2 n; i == j for n = 0."""
    i, j = np.arange(size)[:, None], np.arange(size)
    if n == 0:
        return i == j
    return (i // (2 * n) == j // (2 * n)) & (i // n % 2 == 1) & (j // n % 2 == 0)


def _blocks(size: int) -> list[tuple[int, list[int]]]:
    """(w, the n whose scores are computed in blocks of w tokens); together they are all pairs i >= j."""
    leaf, blocks = min(LEAF, size), [0]
    blocks += [1 << e for e in range(size.bit_length() - 1)]
    return [(leaf, [n for n in blocks if 2 * n <= leaf])] + [(2 * n, [n]) for n in blocks if 2 * n > leaf]


def _fold(x, w: int):
    """[B, G, C, ...] -> [B, G, C / w, w, ...]."""
    return x.reshape(*x.shape[:2], -1, w, *x.shape[3:])


def _take(x, start, size: int, padded: int):
    x = lax.dynamic_slice_in_dim(x, start, size, axis=1)
    return jnp.pad(x, [(0, padded - size if axis == 1 else 0) for axis in range(x.ndim)])


def _heads(x, groups: int):
    """[B, C, H, V] -> [B, G, C, R, V]."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], groups, -1, x.shape[-1]), 1, 2)


def _load(start, size: int, q, k, v, log_decay, reset, valid, scale: float) -> Chunk:
    padded = 1 << (size - 1).bit_length()
    groups, heads = q.shape[2], v.shape[2]
    take = functools.partial(_take, start=start, size=size, padded=padded)
    mask = None if valid is None else take(valid)

    def load(x):
        x = x.astype(jnp.float32)
        return x if mask is None else jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0.0)

    decay, documents, resets = None, None, None
    if log_decay is not None:
        if log_decay.ndim == 1:
            log_decay = jnp.broadcast_to(log_decay, (1, size, heads))
            log_decay = load(_take(log_decay, 0, size, padded))
        else:
            log_decay = load(take(log_decay))
        per_head = log_decay.ndim == 3
        if per_head:
            log_decay = log_decay.reshape(*log_decay.shape[:2], groups, -1)
        decay = Decay(per_head, *_doubled(jnp.swapaxes(log_decay, 1, 2)))
    if reset is not None:
        resets = take(reset)
        index = jnp.cumsum(resets, axis=1, dtype=jnp.int32)
        last = index[:, -1:]
        masks = (m[:, None, :, None, None] for m in (index == 0, index == last, last == 0))
        documents = Documents(index, *masks)
    moves = mask if resets is None else ~resets if mask is None else mask & ~resets
    q, k = jnp.swapaxes(load(take(q)) * scale, 1, 2), jnp.swapaxes(load(take(k)), 1, 2)
    return Chunk(q, k, _heads(load(take(v)), groups), decay, documents, moves)


def _where(mask, x):
    return x if mask is None else jnp.where(mask, x, 0.0)


def _masks(documents: Documents | None):
    return (None, None, None) if documents is None else documents[1:]


def _head_weights(t: Chunk):
    """[B or 1, G or 1, R or 1, C, C] factors of q_i . k_j: the decay between the two, 0 unless i sees j."""
    size = t.q.shape[2]
    exponent = jnp.zeros((1, 1, 1, size, size), jnp.float32)
    if t.decay is not None:
        for level, middle in enumerate(t.decay.middle):
            middle = jnp.swapaxes(middle, 2, 3)
            exponent = jnp.where(_pairs(size, 1 << level), middle[..., :, None] + middle[..., None, :], exponent)
    sees = np.tri(size, dtype=bool)
    if t.documents is not None:
        index = t.documents.index[:, None, None]
        sees = sees & (index[..., :, None] == index[..., None, :])
    return jnp.where(sees, jnp.exp(exponent), 0.0)


def _mix(weights, v, *, transpose: bool = False):
    """sum_j weights[i, j] v_j, or sum_i weights[i, j] v_i, for weights [B, G, R or 1, C, C]."""
    source, result = ("i", "j") if transpose else ("j", "i")
    if weights.shape[2] == 1:
        return _einsum(f"bgij,bg{source}rv->bg{result}rv", weights[:, :, 0], v)
    return _einsum(f"bgrij,bg{source}rv->bg{result}rv", weights, v)


def _by_head(t: Chunk):
    scores = _head_weights(t) * _einsum("bgik,bgjk->bgij", t.q, t.k)[:, :, None]
    return _mix(scores, t.v)


def _by_head_backward(t: Chunk, dy):
    """Cotangents of q, k, v within the chunk, and (arriving, leaving) [B, G, C, R], see `_decay_gradient`."""
    weights = _head_weights(t)
    products = _einsum("bgik,bgjk->bgij", t.q, t.k)[:, :, None]
    scores = weights * products
    if weights.shape[2] == 1:
        dscores = _einsum("bgirv,bgjrv->bgij", dy, t.v)[:, :, None]
    else:
        dscores = _einsum("bgirv,bgjrv->bgrij", dy, t.v)
    dv = _mix(scores, dy, transpose=True)
    dproducts = jnp.sum(weights * dscores, axis=2)
    dq = _einsum("bgij,bgjk->bgik", dproducts, t.k)
    dk = _einsum("bgij,bgik->bgjk", dproducts, t.q)
    flow = jnp.where(np.eye(scores.shape[-1], dtype=bool), 0.0, scores * dscores)
    arriving, leaving = (jnp.swapaxes(jnp.sum(flow, axis=axis), 2, 3) for axis in (4, 3))
    return dq, dk, dv, arriving, leaving


def _decayed(t: Chunk, n: int):
    """Queries and keys whose products are the scores across the middles of blocks of 2 n, and their decay."""
    if n == 0 or t.decay is None:
        return t.q, t.k, None
    decay = jnp.exp(t.decay.middle[n.bit_length() - 1])
    return t.q * decay, t.k * decay, decay


def _channel_mask(t: Chunk, w: int, n: int):
    pairs = _pairs(w, n)
    if t.documents is None:
        return pairs
    index = _fold(t.documents.index[:, None], w)
    return pairs & (index[..., :, None] == index[..., None, :])


def _by_channel(t: Chunk):
    y = 0.0
    for w, halves in _blocks(t.q.shape[2]):
        scores = 0.0
        for n in halves:
            q, k, _ = _decayed(t, n)
            products = _einsum("bgnik,bgnjk->bgnij", _fold(q, w), _fold(k, w))
            scores = jnp.where(_channel_mask(t, w, n), products, scores)
        y = y + _einsum("bgnij,bgnjrv->bgnirv", scores, _fold(t.v, w)).reshape(t.v.shape)
    return y


def _by_channel_backward(t: Chunk, dy):
    """As `_by_head_backward`, with (arriving, leaving) [B, G, C, K]."""
    dq, dk, dv = 0.0, 0.0, 0.0
    for w, halves in _blocks(t.q.shape[2]):
        dscores = _einsum("bgnirv,bgnjrv->bgnij", _fold(dy, w), _fold(t.v, w))
        scores = jnp.zeros_like(dscores)
        for n in halves:
            q, k, decay = _decayed(t, n)
            q, k, mask = _fold(q, w), _fold(k, w), _channel_mask(t, w, n)
            scores = jnp.where(mask, _einsum("bgnik,bgnjk->bgnij", q, k), scores)
            if decay is None:
                continue
            masked = jnp.where(mask, dscores, 0.0)
            dq = dq + decay * _einsum("bgnij,bgnjk->bgnik", masked, k).reshape(t.q.shape)
            dk = dk + decay * _einsum("bgnij,bgnik->bgnjk", masked, q).reshape(t.k.shape)
        dv = dv + _einsum("bgnij,bgnirv->bgnjrv", scores, _fold(dy, w)).reshape(t.v.shape)
    arriving, leaving = t.q * dq, t.k * dk  # a token does not decay what it adds itself
    diagonal = jnp.sum(dy * t.v, axis=(3, 4))[..., None]
    return dq + diagonal * t.k, dk + diagonal * t.q, dv, arriving, leaving


def _factors(decay: Decay | None):
    """exp(until), exp(after) and exp(whole chunk): each as a factor of q and k, then of v, then of the state."""
    one = jnp.ones((), jnp.float32)
    if decay is None:
        return (one, one), (one, one), one
    until, after = jnp.exp(decay.until), jnp.exp(decay.after)
    if decay.per_head:
        return (one, until[..., None]), (one, after[..., None]), until[:, :, -1:, :, None]
    return (until, one), (after, one), jnp.swapaxes(until[:, :, -1:], 2, 3)[..., None]


def _outputs(t: Chunk, state):
    """[B, G, C, R, V]."""
    carried, _, _ = _masks(t.documents)
    (until_q, until_v), _, _ = _factors(t.decay)
    y = until_v * _einsum("bgik,bgkrv->bgirv", t.q * until_q, state)
    within = _by_channel if t.decay is not None and not t.decay.per_head else _by_head
    return _where(carried, y) + within(t)


def _next_state(t: Chunk, state):
    _, kept, through = _masks(t.documents)
    _, (after_k, after_v), whole = _factors(t.decay)
    added = _einsum("bgjk,bgjrv->bgkrv", t.k * after_k, _where(kept, t.v * after_v))
    return _where(through, whole * state) + added


def _chunk_backward(t: Chunk, state, dy, dstate):
    """Cotangents of q, k, v, the log decay [B, G, C, X] (None without) and the state before the chunk."""
    carried, kept, through = _masks(t.documents)
    (until_q, until_v), (after_k, after_v), whole = _factors(t.decay)
    per_channel = t.decay is not None and not t.decay.per_head
    within = _by_channel_backward if per_channel else _by_head_backward
    dq, dk, dv, arriving, leaving = within(t, dy)
    # What comes from the state before the chunk.
    dy = _where(carried, dy * until_v)
    dq_in = until_q * _where(None if carried is None else carried[..., 0], _einsum("bgirv,bgkrv->bgik", dy, state))
    # What goes to the state after the chunk.
    k, v = t.k * after_k, _where(kept, t.v * after_v)
    dk_out = after_k * _einsum("bgjrv,bgkrv->bgjk", v, dstate)
    dv_out = _where(kept, after_v * _einsum("bgjk,bgkrv->bgjrv", k, dstate))
    dbefore = _where(through, whole * dstate) + _einsum("bgik,bgirv->bgkrv", t.q * until_q, dy)
    dlog_decay = None
    if t.decay is not None:
        passing = _where(through, whole * state * dstate)
        if per_channel:
            arriving, departing = arriving + t.q * dq_in, t.k * dk_out
            passing = jnp.sum(passing, axis=(3, 4))[:, :, None]
        else:
            y_in = _where(carried, _einsum("bgik,bgkrv->bgirv", t.q, state))
            arriving, departing = arriving + jnp.sum(dy * y_in, axis=-1), jnp.sum(t.v * dv_out, axis=-1)
            passing = jnp.sum(passing, axis=(2, 4))[:, :, None]
        dlog_decay = _decay_gradient(arriving, leaving, departing, passing, t)
    return dq + dq_in, dk + dk_out, dv + dv_out, dlog_decay, dbefore


def _decay_gradient(arriving, leaving, departing, passing, t: Chunk):
    """The cotangent of the log decays [B, G, C, X], without another pass over the states.

    It is, at t, the sum over all pairs of a source before t and a target at or after t of what the source
    contributes to the loss through the target. What has both ends at or after t is added as arriving and
    subtracted as leaving, so suffix sums do; they end with the document, because what cancels leaves rounding errors.

    Args:
      arriving: contributions by their target in the chunk.
      leaving: contributions by their source, between tokens of the chunk.
      departing: contributions to the state after the chunk by their source.
      passing: [B, G, 1, X], contribution of the state before to the state after the chunk.
      t: the chunk.
    """
    size = arriving.shape[2]
    suffix = np.tri(size, dtype=np.float32).T
    if t.documents is None:
        total = _einsum("ts,bgsx->bgtx", suffix, arriving - leaving)
    else:
        index = t.documents.index
        suffix = jnp.where(index[:, :, None] == index[:, None, :], suffix, 0.0)
        total = _einsum("bts,bgsx->bgtx", suffix, arriving - leaving)
    total = total + _einsum("ts,bgsx->bgtx", np.tri(size, k=-1, dtype=np.float32), departing) + passing
    return _where(None if t.moves is None else t.moves[:, None, :, None], total)


def flat(state, groups: int):
    """[B, H, K, V] -> [B, G, K, R * V], the heads of a group side by side: how states are saved."""
    state = _grouped(state, groups)
    return state.reshape(*state.shape[:3], -1)


def unflat(state, ratio: int):
    """The inverse of `flat` for R = `ratio`."""
    return _ungrouped(state.reshape(*state.shape[:3], ratio, -1))


def _grouped(state, groups: int):
    """[B, H, K, V] -> [B, G, K, R, V]."""
    return jnp.swapaxes(state.reshape(state.shape[0], groups, -1, *state.shape[2:]), 2, 3)


def _ungrouped(state):
    """[B, G, K, R, V] -> [B, H, K, V]."""
    batch, _, key, _, value = state.shape
    return jnp.swapaxes(state, 2, 3).reshape(batch, -1, key, value)


def _write(buffer, value, start, size: int):
    """Puts `value` [B, G, C, ...] into `buffer` [B, T, ...] without the tokens it was filled up with."""
    value = jnp.swapaxes(value, 1, 2)[:, :size]
    value = value.reshape(*value.shape[:2], *buffer.shape[2:])
    return lax.dynamic_update_slice_in_dim(buffer, value.astype(buffer.dtype), start, axis=1)


def _one_step(q, k, v, log_decay, state, reset, valid, scale):
    """Decoding: a single fused step in the layout of the state."""
    batch, _, groups, key = q.shape
    heads, value = v.shape[2:]
    split = (batch, groups, heads // groups)

    def load(x):
        x = x.reshape(-1, *x.shape[-2:]).astype(jnp.float32)
        return x if valid is None else jnp.where(valid[..., None], x, 0.0)

    q, k, v = load(q) * scale, load(k), load(v).reshape(*split, value)
    new = k[:, :, None, :, None] * v[..., None, :]
    if state is not None:
        old = state.reshape(*split, key, value)
        if reset is not None:
            old = jnp.where(reset[:, :, None, None, None], 0.0, old)
        if log_decay is not None:
            per_channel = log_decay.ndim == 4
            log_decay = load(log_decay if per_channel else jnp.broadcast_to(log_decay, (batch, 1, heads)))
            shape = (batch, groups, 1, key, 1) if per_channel else (*split, 1, 1)
            old = jnp.exp(log_decay.reshape(shape)) * old
        new = old + new
    y = _einsum("bgk,bgrkv->bgrv", q, new)
    y = y if valid is None else jnp.where(valid[:, :, None, None], y, 0.0)
    return y.reshape(batch, 1, heads, value), new.reshape(batch, heads, key, value)


def forward(q, k, v, log_decay, state, reset, valid, *, scale: float, chunk_size: int, save: bool):
    """Returns (y [B, T, H, V], new_state [B, H, K, V], boundaries), arguments as in `gated_linear_attention`.

    `boundaries` is float32 [B, ceil(T / chunk_size), G, K, R * V], the state before each chunk; None unless `save`.
    """
    batch, length, groups, key = q.shape
    heads, value = v.shape[2:]
    before = jnp.zeros((batch, heads, key, value), jnp.float32) if state is None else state
    if length == 1:
        y, new_state = _one_step(q, k, v, log_decay, state, reset, valid, scale)
        return y.astype(v.dtype), new_state, flat(before, groups)[:, None] if save else None

    def body(index, start, size, carry):
        state, y, boundaries = carry
        if save:
            saved = state.reshape(*state.shape[:3], -1)
            boundaries = lax.dynamic_update_index_in_dim(boundaries, saved, index, axis=1)
        t = _load(start, size, q, k, v, log_decay, reset, valid, scale)
        return _next_state(t, state), _write(y, _outputs(t, state), start, size), boundaries

    saved = (batch, -(-length // chunk_size), groups, key, heads // groups * value)
    boundaries = jnp.zeros(saved, jnp.float32) if save else None
    carry = (opaque(_grouped(before, groups)), jnp.zeros_like(v), boundaries)
    new_state, y, boundaries = over_chunks(length, chunk_size, body, carry)
    if valid is not None:  # a state that is not finite must not show at padding
        y = jnp.where(valid[..., None, None], y, 0)
    return y, _ungrouped(new_state), boundaries


def backward(q, k, v, log_decay, state, reset, valid, boundaries, dy, dstate, *, scale: float, chunk_size: int):
    """Returns the gradients of (q, k, v, log_decay, state), None where the argument was None.

    Args are those of `forward`, its `boundaries`, and the cotangents dy [B, T, H, V] and dstate [B, H, K, V].
    """
    length, groups, heads = q.shape[1], q.shape[2], v.shape[2]

    def body(index, start, size, carry):
        dstate, sums, out = carry
        t = _load(start, size, q, k, v, log_decay, reset, valid, scale)
        before = lax.dynamic_index_in_dim(boundaries, index, axis=1, keepdims=False)
        before = before.reshape(*before.shape[:3], heads // groups, -1)
        g = _take(dy, start, size, t.q.shape[2])
        if valid is not None:
            g = jnp.where(_take(valid, start, size, t.q.shape[2])[..., None, None], g, 0.0)
        g = _heads(g.astype(jnp.float32), groups)
        dq, dk, dv, dlog_decay, dstate = _chunk_backward(t, before, g, dstate)
        if dlog_decay is not None and sums is not None:
            sums = sums + jnp.sum(dlog_decay[:, :, :size], axis=(0, 2)).reshape(heads)
        new = {"q": dq * scale, "k": dk, "v": dv, "log_decay": dlog_decay}
        return dstate, sums, {name: _write(buffer, new[name], start, size) for name, buffer in out.items()}

    out = {name: jnp.zeros_like(x) for name, x in (("q", q), ("k", k), ("v", v))}
    sums = None
    if log_decay is not None and log_decay.ndim == 1:
        sums = jnp.zeros((heads,), jnp.float32)
    elif log_decay is not None:
        out["log_decay"] = jnp.zeros_like(log_decay)
    carry = (opaque(_grouped(dstate, groups)), sums, out)
    dstate, sums, out = over_chunks(length, chunk_size, body, carry, reverse=True)
    dlog_decay = out.get("log_decay") if log_decay is None or sums is None else sums.astype(log_decay.dtype)
    return out["q"], out["k"], out["v"], dlog_decay, None if state is None else _ungrouped(dstate)

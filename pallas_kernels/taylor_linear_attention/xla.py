"""Taylor linear attention as a loop over chunks of matrix products, with a hand-written backward pass.

Inside a chunk the weights are the polynomial 1 + s + s^2 / 2 of the scores; what came before it is the state, which
meets the features of queries and keys one turn of `features` (K products) at a time, so they never exist as an array.
Only the states at the chunk boundaries and the denominators survive for the backward pass.

Layout within a chunk: q, k [B, H, C, K], multiplied by sqrt(scale); u [B, H, C, U], the values and a column of ones
(zeros at padding), so that the last column of every sum over u is the normaliser; state [B, H, F, U].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.chunks import opaque, over_chunks
from pallas_kernels.taylor_linear_attention import features
from pallas_kernels.taylor_linear_attention.reference import expand


class Documents(NamedTuple):
    """Which tokens of a chunk belong together, when there are resets."""

    index: jax.Array  # int32 [B, C], number of resets in the chunk up to the token
    carried: jax.Array  # bool [B, 1, C, 1], the token sees the state before the chunk
    kept: jax.Array  # bool [B, 1, C, 1], the state after the chunk sees the token
    through: jax.Array  # bool [B, 1, 1, 1], the state after the chunk sees that before it


class Chunk(NamedTuple):
    """A chunk of the inputs in float32, with zeros at padding."""

    q: jax.Array
    k: jax.Array
    u: jax.Array
    valid: jax.Array | None  # bool [B, 1, C, 1]
    documents: Documents | None


_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _where(mask, x):
    return x if mask is None else jnp.where(mask, x, 0.0)


def _masks(documents: Documents | None):
    return (None, None, None) if documents is None else documents[1:]


def _take(x, start, size: int):
    return lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _load(start, size: int, q, k, v, reset, valid, scale: float) -> Chunk:
    mask = None if valid is None else _take(valid, start, size)[:, None, :, None]

    def load(x):
        return _where(mask, jnp.swapaxes(_take(x, start, size).astype(jnp.float32), 1, 2))

    q, k, v, documents = load(q) * scale**0.5, load(k) * scale**0.5, load(v), None
    ones = jnp.ones_like(v[..., :1])
    u = jnp.concatenate([v, _where(mask, ones)], axis=-1)
    if reset is not None:
        index = jnp.cumsum(_take(reset, start, size), axis=1, dtype=jnp.int32)
        last = index[:, -1:]
        masks = (m[:, None, :, None] for m in (index == 0, index == last, last == 0))
        documents = Documents(index, *masks)
    return Chunk(q, k, u, mask, documents)


def _scores(t: Chunk):
    """The scores s [B, H, C, C], and which of them count."""
    size = t.q.shape[2]
    sees = np.tri(size, dtype=bool)
    if t.documents is not None:
        index = t.documents.index[:, None]
        sees = sees & (index[..., :, None] == index[..., None, :])
    return _einsum("bhik,bhjk->bhij", t.q, t.k), sees


def _turned(x, turn: int, rows: int):
    """The products of one turn, [..., C, rows]."""
    factor = features.HALF if turn == 0 else 1.0
    return (factor * x * jnp.roll(x, -turn, axis=-1))[..., :rows]


def _contract(x, state):
    """phi(x) @ state: [B, H, C, U]."""
    key, first = x.shape[-1], features.products(x.shape[-1])
    out = _einsum("bhik,bhku->bhiu", x, state[:, :, first : first + key]) + state[:, :, -1:]
    for turn, start, rows in features.turns(key):
        out += _einsum("bhik,bhku->bhiu", _turned(x, turn, rows), state[:, :, start : start + rows])
    return out


def _sum_outer(x, u):
    """sum_i phi(x_i) u_i^T: [B, H, F, U]."""
    products = [_turned(x, turn, rows) for turn, _, rows in features.turns(x.shape[-1])]
    parts = [_einsum("bhik,bhiu->bhku", part, u) for part in (*products, x)]
    return jnp.concatenate([*parts, jnp.sum(u, axis=2, keepdims=True)], axis=2)


def _pull(x, state, du):
    """The gradient of x from du, the cotangent of `_contract(x, state)`."""
    key, first = x.shape[-1], features.products(x.shape[-1])
    dx = _einsum("bhiu,bhku->bhik", du, state[:, :, first : first + key])
    for turn, start, rows in features.turns(key):
        g = _einsum("bhiu,bhku->bhik", du, state[:, :, start : start + rows])
        g = jnp.pad(g, ((0, 0), (0, 0), (0, 0), (0, key - rows))) * (features.HALF if turn == 0 else 1.0)
        dx += g * jnp.roll(x, -turn, axis=-1) + jnp.roll(g * x, turn, axis=-1)
    return dx


def _outputs(t: Chunk, state, eps: float):
    """y [B, H, C, V] and the denominators [B, H, C], 1 at padding."""
    s, sees = _scores(t)
    carried, _, _ = _masks(t.documents)
    sums = _einsum("bhij,bhju->bhiu", jnp.where(sees, 1.0 + s * (1.0 + 0.5 * s), 0.0), t.u)
    sums = sums + _where(carried, _contract(t.q, state))
    denominators = sums[..., -1:] + eps
    y = sums[..., :-1]
    if t.valid is not None:  # a state that is not finite must not show at padding
        denominators, y = jnp.where(t.valid, denominators, 1.0), jnp.where(t.valid, y, 0.0)
    return y / denominators, denominators[..., 0]


def _next_state(t: Chunk, state):
    _, kept, through = _masks(t.documents)
    return _where(through, state) + _sum_outer(t.k, _where(kept, t.u))


def _chunk_backward(t: Chunk, state, dsums, dstate):
    """Cotangents of q, k, u of the chunk and of the state before it, from that of sum_j w_ij u_j."""
    carried, kept, through = _masks(t.documents)
    s, sees = _scores(t)
    ds = jnp.where(sees, (1.0 + s) * _einsum("bhiu,bhju->bhij", dsums, t.u), 0.0)
    dq = _einsum("bhij,bhjk->bhik", ds, t.k)
    dk = _einsum("bhij,bhik->bhjk", ds, t.q)
    du = _einsum("bhij,bhiu->bhju", jnp.where(sees, 1.0 + s * (1.0 + 0.5 * s), 0.0), dsums)
    # What comes from the state before the chunk, and what goes to the state after it.
    arriving = _where(carried, dsums)
    dq += _where(carried, _pull(t.q, state, arriving))
    dk += _pull(t.k, dstate, _where(kept, t.u))
    du += _where(kept, _contract(t.k, dstate))
    du = _where(t.valid, du)  # the features of a key of zeros are not all zero
    return dq, dk, du, _where(through, dstate) + _sum_outer(t.q, arriving)


def _write(buffer, value, start):
    """Puts `value` [B, H, C, ...] into `buffer` [B, T, H, ...]."""
    value = jnp.swapaxes(value, 1, 2).astype(buffer.dtype)
    return lax.dynamic_update_slice_in_dim(buffer, value, start, axis=1)


def _one_step(q, k, v, state, reset, valid, scale: float, eps: float):
    """Decoding: the state is read and written once. Returns (y [B, H, V], denominators [B, H], new_state)."""
    q, k, v = (x[:, 0].astype(jnp.float32) for x in (q, k, v))
    u = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    if valid is not None:
        q, k, u = (jnp.where(valid[..., None], x, 0.0) for x in (q, k, u))
    new = expand(k, scale)[..., None] * u[..., None, :]
    if state is not None:
        new = new + (state if reset is None else jnp.where(reset[:, :, None, None], 0.0, state))
    sums = _einsum("bhf,bhfu->bhu", expand(q, scale), new)
    y, denominators = sums[..., :-1], sums[..., -1:] + eps
    if valid is not None:
        y, denominators = jnp.where(valid[..., None], y, 0.0), jnp.where(valid[..., None], denominators, 1.0)
    return y / denominators, denominators[..., 0], new


def forward(q, k, v, state, reset, valid, *, scale: float, eps: float, chunk_size: int, save: bool):
    """Returns (y [B, T, H, V], new_state [B, H, F, V + 1], residuals), arguments as in `taylor_linear_attention`.

    `residuals` is None unless `save`, else the pair of float32 arrays [B, ceil(T / chunk_size), H, F, V + 1], the
    state before each chunk, and [B, H, T], the denominators (with eps; 1 at padding).
    """
    batch, length, heads, key = q.shape
    before = jnp.zeros((batch, heads, features.count(key), v.shape[-1] + 1), jnp.float32) if state is None else state
    if length == 1:
        y, denominators, new_state = _one_step(q, k, v, state, reset, valid, scale, eps)
        return y[:, None].astype(v.dtype), new_state, (before[:, None], denominators[..., None]) if save else None

    def body(index, start, size, carry):
        state, y, residuals = carry
        t = _load(start, size, q, k, v, reset, valid, scale)
        values, denominators = _outputs(t, state, eps)
        if save:
            boundaries = lax.dynamic_update_index_in_dim(residuals[0], state, index, axis=1)
            residuals = boundaries, lax.dynamic_update_slice_in_dim(residuals[1], denominators, start, axis=2)
        return _next_state(t, state), _write(y, values, start), residuals

    residuals = None
    if save:
        boundaries = jnp.zeros((batch, -(-length // chunk_size), *before.shape[1:]), jnp.float32)
        residuals = boundaries, jnp.zeros((batch, heads, length), jnp.float32)
    new_state, y, residuals = over_chunks(length, chunk_size, body, (opaque(before), jnp.zeros_like(v), residuals))
    return y, new_state, residuals


def sums_cotangent(dy, y, denominators):
    """Cotangents of numerators and normaliser where y = numerators / denominators, as [..., V] and [..., 1]."""
    dy = dy.astype(jnp.float32) / denominators
    return dy, -jnp.sum(dy * y.astype(jnp.float32), axis=-1, keepdims=True)


def backward(q, k, v, state, reset, valid, y, residuals, dy, dstate, *, scale: float, chunk_size: int):
    """Returns the gradients of (q, k, v, state), None where the state was None.

    Args are those of `forward`, its y and `residuals`, and the cotangents dy [B, T, H, V] and dstate.
    """
    boundaries, denominators = residuals

    def body(index, start, size, carry):
        dstate, out = carry
        t = _load(start, size, q, k, v, reset, valid, scale)
        before = lax.dynamic_index_in_dim(boundaries, index, axis=1, keepdims=False)
        dy_t, y_t = (_where(t.valid, jnp.swapaxes(_take(x, start, size), 1, 2)) for x in (dy, y))
        d = lax.dynamic_slice_in_dim(denominators, start, size, axis=2)[..., None]
        dsums = jnp.concatenate(sums_cotangent(dy_t, y_t, d), axis=-1)
        dq, dk, du, dstate = _chunk_backward(t, before, dsums, dstate)
        new = (dq * scale**0.5, dk * scale**0.5, du[..., :-1])
        return dstate, tuple(_write(buffer, x, start) for buffer, x in zip(out, new, strict=True))

    carry = (opaque(dstate), tuple(jnp.zeros_like(x) for x in (q, k, v)))
    dstate, out = over_chunks(q.shape[1], chunk_size, body, carry, reverse=True)
    return *out, None if state is None else dstate

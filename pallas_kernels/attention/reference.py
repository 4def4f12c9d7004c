"""Attention as one dense float32 softmax: slow, obvious, differentiated by JAX."""

import jax
import jax.numpy as jnp


def visible(q_positions, kv_positions, q_documents, kv_documents, window: int | None) -> jax.Array:
    """bool[B, T, S]: which keys each query sees (the batch axis is 1 where all rows agree)."""
    query, key = q_positions[:, :, None], kv_positions[:, None, :]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    if q_documents is None:
        return mask & (key >= 0)
    document = kv_documents[:, None, :]
    return mask & (document == q_documents[:, :, None]) & (document >= 0)


def attend(q, k, v, q_positions, kv_positions, q_documents, kv_documents, *, window, scale, soft_cap):
    """Arguments as in `attention`, all given; returns (y [B, T, H, V] in q.dtype, lse float32[B, T, H])."""
    dtype, (batch, time, heads, _) = q.dtype, q.shape
    if q_positions is None:
        q_positions = kv_positions = jnp.arange(time, dtype=jnp.int32)[None]
    q_real = q_positions >= 0 if q_documents is None else q_documents >= 0
    kv_real = kv_positions >= 0 if kv_documents is None else kv_documents >= 0
    q = jnp.where(q_real[:, :, None, None], q, 0).astype(jnp.float32)
    k = jnp.where(kv_real[:, :, None, None], k, 0).astype(jnp.float32)
    v = jnp.where(kv_real[:, :, None, None], v, 0).astype(jnp.float32)
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))

    s = jnp.einsum("bthk,bshk->bhts", q, k, precision="highest") * scale
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    mask = visible(q_positions, kv_positions, q_documents, kv_documents, window)[:, None]
    s = jnp.where(mask, s, -jnp.inf)
    sees = jnp.broadcast_to(jnp.any(mask, axis=-1), (batch, heads, time))
    peak = jax.lax.stop_gradient(jnp.where(sees, jnp.max(s, axis=-1), 0.0))
    e = jnp.exp(s - peak[..., None])
    total = jnp.where(sees, jnp.sum(e, axis=-1), 1.0)
    y = jnp.einsum("bhts,bshv->bthv", e / total[..., None], v, precision="highest")
    lse = jnp.where(sees, peak + jnp.log(total), -jnp.inf)
    y = jnp.where(sees.transpose(0, 2, 1)[..., None], y, 0.0)  # stops cotangents at padding, NaN included
    return y.astype(dtype), lse.transpose(0, 2, 1)

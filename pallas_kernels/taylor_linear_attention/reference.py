"""Taylor linear attention, one token at a time with its features written out: differentiated by JAX itself."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.taylor_linear_attention import features


def expand(x, scale: float):
    """phi(x), [..., K] -> [..., F]."""
    x = x * scale**0.5
    a, b = features.pairs(x.shape[-1])
    products = x[..., a] * x[..., b] * np.where(a == b, features.HALF, 1.0).astype(np.float32)
    return jnp.concatenate([products, x, jnp.ones_like(x[..., :1])], axis=-1)


def forward(q, k, v, state, reset, valid, *, scale: float, eps: float):
    """Runs the recurrence in float32 and returns (y, new_state); arguments as in `taylor_linear_attention`."""
    dtype = v.dtype
    batch, length, heads, key = q.shape
    valid = jnp.ones((batch, length), bool) if valid is None else valid
    reset = jnp.zeros((batch, length), bool) if reset is None else reset & valid
    # Padding may hold anything, NaN included: it is replaced before it is used, so gradients stay finite too.
    q, k, v = (jnp.where(valid[..., None, None], x.astype(jnp.float32), 0.0) for x in (q, k, v))
    ones = jnp.broadcast_to(valid[..., None, None], (*v.shape[:3], 1)).astype(jnp.float32)
    v = jnp.concatenate([v, ones], axis=-1)

    def step(s, token):
        q_t, k_t, v_t, reset_t, valid_t = token
        s = jnp.where(reset_t[:, None, None, None], 0.0, s)
        s = s + expand(k_t, scale)[..., None] * v_t[..., None, :]
        sums = jnp.sum(expand(q_t, scale)[..., None] * s, axis=-2)
        sums = jnp.where(valid_t[:, None, None], sums, 1.0)
        return s, sums[..., :-1] / (sums[..., -1:] + eps)

    if state is None:
        state = jnp.zeros((batch, heads, features.count(key), v.shape[-1]), jnp.float32)
    tokens = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (q, k, v, reset, valid))
    new_state, y = jax.lax.scan(step, state, tokens)
    y = jnp.swapaxes(y, 0, 1)
    return jnp.where(valid[..., None, None], y, 0.0).astype(dtype), new_state

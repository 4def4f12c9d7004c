"""The mLSTM cell, one token at a time: the oracle, differentiated by JAX itself."""

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm.gates import MIN_LOG_FORGET, NEVER


def forward(q, k, v, i, f, C, n, m, reset, valid, *, scale: float, eps: float):
    """Runs the recurrence in float32 and returns (y, C, n, m); arguments as in `mlstm`."""
    dtype = v.dtype
    batch, length, heads, key = q.shape
    valid = jnp.ones((batch, length), bool) if valid is None else valid
    reset = jnp.zeros((batch, length), bool) if reset is None else reset & valid

    def load(x, otherwise=0.0):
        # Padding may hold anything, NaN included: it is replaced before it is used, so gradients stay finite too.
        mask = valid.reshape(batch, length, *(1,) * (x.ndim - 2))
        return jnp.where(mask, x.astype(jnp.float32), otherwise)

    log_forget = load(jnp.maximum(jax.nn.log_sigmoid(load(f)), MIN_LOG_FORGET))

    def step(state, token):
        q_t, k_t, v_t, i_t, lf_t, reset_t = token
        C, n, m = (jnp.where(reset_t.reshape(-1, *(1,) * (s.ndim - 1)), 0.0, s) for s in state)
        new_m = jnp.maximum(lf_t + m, i_t)
        forget, write = jnp.exp(lf_t + m - new_m)[..., None], jnp.exp(i_t - new_m)[..., None]
        C = forget[..., None] * C + write[..., None] * k_t[..., None] * v_t[..., None, :]
        n = forget * n + write * k_t
        numerator = scale * jnp.sum(q_t[..., None] * C, axis=-2)
        denominator = scale * jnp.sum(q_t * n, axis=-1)
        # numerator / (max(|denominator|, exp(-m)) + eps), both times exp(min(m, 0)), so that nothing overflows.
        unit, least = jnp.exp(jnp.minimum(new_m, 0.0)), jnp.exp(-jnp.maximum(new_m, 0.0))
        total = jnp.maximum(jnp.abs(denominator) * unit, least) + eps * unit
        return (C, n, new_m), numerator * (unit / total)[..., None]

    if C is None:
        C = jnp.zeros((batch, heads, key, v.shape[-1]), jnp.float32)
        n, m = jnp.zeros((batch, heads, key), jnp.float32), jnp.zeros((batch, heads), jnp.float32)
    tokens = (load(q), load(k), load(v), load(i, NEVER), log_forget, reset)
    state, y = jax.lax.scan(step, (C, n, m), jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tokens))
    y = jnp.swapaxes(y, 0, 1)
    return jnp.where(valid[..., None, None], y, 0.0).astype(dtype), *state

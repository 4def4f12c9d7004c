"""Gated linear attention, one token at a time: the oracle, differentiated by JAX itself."""

import jax
import jax.numpy as jnp


def forward(q, k, v, log_decay, state, reset, valid, *, scale: float):
    """Runs the recurrence in float32 and returns (y, new_state); arguments as in `gated_linear_attention`."""
    dtype = v.dtype
    batch, length, groups, key = q.shape
    heads, value = v.shape[2:]
    valid = jnp.ones((batch, length), bool) if valid is None else valid
    reset = jnp.zeros((batch, length), bool) if reset is None else reset & valid

    def load(a):
        # Padding may hold anything, NaN included: it is replaced before it is used, so gradients stay finite too.
        mask = valid.reshape(batch, length, *(1,) * (a.ndim - 2))
        return jnp.where(mask, a.astype(jnp.float32), 0.0)

    if log_decay is None:
        log_decay = jnp.zeros((heads,), jnp.float32)
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (batch, length, heads))
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]  # one number for all channels of a head
    else:
        log_decay = jnp.repeat(log_decay, heads // groups, axis=2)
    q, k = (jnp.repeat(load(a), heads // groups, axis=2) for a in (q, k))
    v, decay = load(v), jnp.exp(load(log_decay))  # padding: k v^T = 0 and decay = 1 leave the state as it is

    def step(s, token):
        q_t, k_t, v_t, decay_t, reset_t = token
        s = jnp.where(reset_t[:, None, None, None], 0.0, s)
        s = decay_t[..., None] * s + k_t[..., None] * v_t[..., None, :]
        return s, scale * jnp.sum(q_t[..., None] * s, axis=-2)

    if state is None:
        state = jnp.zeros((batch, heads, key, value), jnp.float32)
    tokens = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (q, k, v, decay, reset))
    new_state, y = jax.lax.scan(step, state, tokens)
    y = jnp.swapaxes(y, 0, 1)
    return jnp.where(valid[..., None, None], y, 0.0).astype(dtype), new_state

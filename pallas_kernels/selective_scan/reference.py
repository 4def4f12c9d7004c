"""Selective scan, one token at a time: the oracle, differentiated by JAX itself."""

import jax
import jax.numpy as jnp


def forward(x, dt, A, B, C, D, z, dt_bias, state, reset, valid, *, dt_softplus: bool):
    """Runs the recurrence in float32 and returns (y, new_state); arguments as in `selective_scan`."""
    dtype = x.dtype
    batch, length, channels = x.shape
    valid = jnp.ones((batch, length), bool) if valid is None else valid
    reset = jnp.zeros((batch, length), bool) if reset is None else reset & valid
    # Padding may hold anything, NaN included: it is replaced before it is used, so gradients stay finite too.
    x, dt, B, C = (jnp.where(valid[..., None], v.astype(jnp.float32), 0.0) for v in (x, dt, B, C))
    A = A.astype(jnp.float32)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(jnp.float32)
    if dt_softplus:
        dt = jax.nn.softplus(dt)
    dt = jnp.where(valid[..., None], dt, 0.0)  # a step of zero leaves the state as it is

    def step(h, token):
        x_t, dt_t, b_t, c_t, reset_t = token
        h = jnp.where(reset_t[:, None, None], 0.0, h)
        h = jnp.exp(dt_t[..., None] * A) * h + (dt_t * x_t)[..., None] * b_t[:, None, :]
        return h, jnp.sum(h * c_t[:, None, :], axis=-1)

    if state is None:
        state = jnp.zeros((batch, channels, A.shape[1]), jnp.float32)
    tokens = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), (x, dt, B, C, reset))
    new_state, y = jax.lax.scan(step, state, tokens)
    y = jnp.swapaxes(y, 0, 1)
    if D is not None:
        y = y + D.astype(jnp.float32) * x
    if z is not None:
        y = y * jax.nn.silu(jnp.where(valid[..., None], z.astype(jnp.float32), 0.0))
    return jnp.where(valid[..., None], y, 0.0).astype(dtype), new_state

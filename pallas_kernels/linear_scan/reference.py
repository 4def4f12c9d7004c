"""Linear recurrence, one token at a time: the oracle, differentiated by JAX itself."""

import jax
import jax.numpy as jnp


def forward(a, b, state, reset, valid):
    """Runs the recurrence in float32 and returns (h, new_state); arguments as in `linear_scan`."""
    batch, length, channels = a.shape
    valid = jnp.ones((batch, length), bool) if valid is None else valid
    reset = jnp.zeros((batch, length), bool) if reset is None else reset & valid
    # Padding may hold anything, NaN included: it is replaced before it is used, so gradients stay finite too.
    decay = jnp.where(valid[..., None], a.astype(jnp.float32), 1.0)
    inputs = jnp.where(valid[..., None], b.astype(jnp.float32), 0.0)

    def step(h, token):
        a_t, b_t, reset_t = token
        h = a_t * jnp.where(reset_t[:, None], 0.0, h) + b_t
        return h, h

    if state is None:
        state = jnp.zeros((batch, channels), jnp.float32)
    tokens = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), (decay, inputs, reset))
    new_state, h = jax.lax.scan(step, state, tokens)
    return jnp.where(valid[..., None], jnp.swapaxes(h, 0, 1), 0.0).astype(b.dtype), new_state

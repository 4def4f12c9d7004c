"""Causal depthwise convolution, one token at a time: the oracle, differentiated by JAX itself."""

import jax
import jax.numpy as jnp


def forward(x, weight, bias, state, reset, valid, *, activation: str | None):
    """Slides a window of W inputs in float32 and returns (y, new_state); arguments as in `causal_conv1d`."""
    batch, length, channels = x.shape
    width = weight.shape[0]
    valid = jnp.ones((batch, length), bool) if valid is None else valid
    reset = jnp.zeros((batch, length), bool) if reset is None else reset
    inputs = jnp.where(valid[..., None], x.astype(jnp.float32), 0.0)
    weight = weight.astype(jnp.float32)

    def step(window, token):
        x_t, reset_t, valid_t = token
        past = jnp.where(reset_t[:, None, None], 0.0, window)
        taps = jnp.concatenate([past, x_t[:, None]], axis=1)
        return jnp.where(valid_t[:, None, None], taps[:, 1:], window), jnp.sum(taps * weight, axis=1)

    if state is None:
        state = jnp.zeros((batch, width - 1, channels), jnp.float32)
    tokens = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), (inputs, reset, valid))
    new_state, y = jax.lax.scan(step, state, tokens)
    y = jnp.swapaxes(y, 0, 1)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if activation == "silu":
        y = jax.nn.silu(y)
    return jnp.where(valid[..., None], y, 0.0).astype(x.dtype), new_state

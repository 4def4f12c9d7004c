"""Softmax and top-k by XLA's own reductions: two reads or more, on every platform."""

import jax
import jax.numpy as jnp


def forward(logits, *, k: int):
    """Returns (total [N], values [N, k], indices [N, k]): total = sum exp(x - max), 0 for a row of nothing but -inf."""
    maximum = jnp.max(logits, axis=-1, keepdims=True).astype(jnp.float32)
    # inf - inf is NaN: where the maximum is not a number, the sum is 0, inf or NaN relative to anything.
    maximum = jnp.where(jnp.isfinite(maximum), maximum, 0.0)
    total = jnp.sum(jnp.exp(logits.astype(jnp.float32) - maximum), axis=-1)
    # lax.top_k orders 0.0 before -0.0, and NaN before all.
    values, indices = jax.lax.top_k(jnp.where(logits == 0, 0, logits), k)
    spoiled = jnp.isnan(total)[:, None]
    return total, jnp.where(spoiled, jnp.nan, values.astype(jnp.float32)), jnp.where(spoiled, -1, indices)

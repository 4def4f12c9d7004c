"""RMSNorm, then quantisation by the largest magnitude, step by step: the oracle."""

import jax.numpy as jnp


def forward(x, weight, *, eps: float):
    """Returns (q int8 [M, D], scale float32 [M]); arguments as in `rms_norm_quantize`."""
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    y = x / jnp.sqrt(mean_square + eps)
    finite = jnp.isfinite(mean_square)
    if weight is not None:
        y = y * weight.astype(jnp.float32)
        finite = finite & jnp.all(jnp.isfinite(weight))
    scale = jnp.maximum(jnp.max(jnp.abs(y), axis=-1, keepdims=True), 1e-5) / 127.0
    q = jnp.clip(jnp.round(y / scale), -128.0, 127.0)
    finite = finite & jnp.isfinite(scale)
    q = jnp.where(finite, q, 0.0).astype(jnp.int8)
    return q, jnp.where(finite, scale, jnp.nan)[:, 0]

"""RMSNorm and quantisation as XLA fuses them, on every platform."""

import jax.numpy as jnp
from jax import lax

SMALLEST = 1e-5  # the largest magnitude of a row counts as at least this
LEVELS = 127.0


def forward(x, weight, *, eps: float):
    """Returns (q int8 [M, D], scale float32 [M]); arguments as in `rms_norm_quantize`."""
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    rstd = lax.rsqrt(mean_square + eps)
    finite = mean_square < jnp.inf  # no row that holds NaN either; a maximum may pass over NaN
    weighted = x
    if weight is not None:
        weighted = x * weight.astype(jnp.float32)
        finite = finite & jnp.all(jnp.isfinite(weight))
    # rstd is one number a row: it need not be multiplied into every element before the maximum.
    largest = rstd * jnp.max(jnp.abs(weighted), axis=-1, keepdims=True)
    finite = finite & (largest < jnp.inf)
    largest = jnp.maximum(largest, SMALLEST)
    q = jnp.where(finite, jnp.round(weighted * (rstd * (LEVELS / largest))), 0.0)
    return q.astype(jnp.int8), jnp.where(finite, largest / LEVELS, jnp.nan)[:, 0]

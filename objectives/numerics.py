"""Functions of log-probabilities that stay exact and finite at their ends."""

import math

import jax
import jax.numpy as jnp

MAX_EXPONENT = 80.0  # of exponentials of log-ratios: e^80 and its gradient are finite in float32
LEAST_LOSS = 1e-6  # nats per token, below which a response counts as having this loss: log-odds stay finite


def box_cox(log_u: jax.Array, power: jax.Array | float) -> jax.Array:
    """(u^power - 1) / power for u = e^log_u, which is log u at power 0; u^power ends at e^MAX_EXPONENT.

    Args:
      log_u: any shape.
      power: scalar, may be traced.
    """
    power = jnp.asarray(power, log_u.dtype)
    nonzero = jnp.where(power == 0, 1.0, power)
    curved = jnp.expm1(jnp.minimum(nonzero * log_u, MAX_EXPONENT)) / nonzero
    return jnp.where(power == 0, log_u, curved)


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - e^x) for x < 0, exact near 0 and far from it.

    Args:
      x: any shape, below 0.
    """
    near = x > -math.log(2.0)
    small, large = jnp.where(near, x, -1.0), jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))


def log_odds(log_p: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of log p, which is taken to be at most -LEAST_LOSS.

    Args:
      log_p: any shape.
    """
    log_p = jnp.minimum(log_p, -LEAST_LOSS)
    return log_p - log1mexp(log_p)

"""What every objective returns, and its sums over examples."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class LossOutput:
    """Sums, never means: the trainer adds them over microbatches and devices and divides once.

    Attributes:
      loss_sum: float32 scalar, summed loss.
      weight: float32 scalar, what to divide by (for language models: the summed loss mask).
      metrics: float32 scalars by name, each a sum over the same weight.
    """

    loss_sum: jax.Array
    weight: jax.Array
    metrics: dict[str, Any] = flax.struct.field(default_factory=dict)


def reduce_examples(loss: jax.Array, valid: jax.Array, metrics: dict[str, jax.Array]) -> LossOutput:
    """Sums over the valid examples; weight = their number.

    Args:
      loss: [B].
      valid: bool[B].
      metrics: by name, [B] or scalar each, a scalar being that of every example; they get no gradient.
    """

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid, x, 0.0), dtype=jnp.promote_types(x.dtype, jnp.float32))

    sums = {name: jax.lax.stop_gradient(total(x)) for name, x in metrics.items()}
    return LossOutput(total(loss), jnp.sum(valid, dtype=jnp.float32), sums)

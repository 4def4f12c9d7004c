"""What every objective returns."""

from typing import Any

import flax.struct
import jax


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

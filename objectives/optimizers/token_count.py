"""The learning rate that goes with batches of varying numbers of counted tokens."""

import jax
import jax.numpy as jnp
import optax

from objectives.checks import check_positive


def scale_by_token_count(reference: float) -> optax.GradientTransformationExtraArgs:
    """Scales updates by sqrt(T / reference), T the counted tokens of the step: the adaptive learning rate of Bielik.

    ALR = LR sqrt(T / BS), with T the tokens of the batch and BS a baseline batch's (arXiv:2410.18565, equation 1).
    It follows what makes updates independent of the gradient's scale, and precedes the learning rate:

      optax.chain(optax.scale_by_adam(), scale_by_token_count(2**17), optax.scale_by_learning_rate(1e-5))

    A step without counted tokens has an update of 0.

    Args:
      reference: BS, above 0.

    Returns:
      A transformation whose update takes `num_tokens`, T: `LossOutput.weight`, summed.

    Raises:
      ValueError: reference is not above 0; `update` without num_tokens raises TypeError.
    """
    check_positive(reference=reference)

    def update(updates, state, params=None, *, num_tokens, **extra):
        del params, extra
        factor = jnp.sqrt(jnp.asarray(num_tokens, jnp.float32) / reference)
        return jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)  # pyright: ignore[reportArgumentType]

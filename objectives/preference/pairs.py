"""The reduction that all objectives of pairs share, with its metrics."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from objectives.output import LossOutput, reduce_examples
from objectives.statistics import LogProbs, has_tokens


def reduce_pairs(
    loss: jax.Array,
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    reward_chosen: jax.Array,
    reward_rejected: jax.Array,
    *,
    also: Sequence[LogProbs] = (),
    **metrics: jax.Array,
) -> LossOutput:
    """Sums of losses and metrics over the pairs; one without counted tokens, as padding of a batch, takes no part.

    Args:
      loss: [B].
      policy_chosen: of the chosen responses.
      policy_rejected: of the rejected ones.
      reward_chosen: [B], implicit rewards.
      reward_rejected: [B].
      also: further responses that a pair must have.
      **metrics: further ones, [B].

    Returns:
      LossOutput: weight = number of pairs; metrics reward_chosen, reward_rejected, margin, accuracy (of margin > 0),
      logp_chosen, logp_rejected (sums over tokens), logp_mean_chosen, logp_mean_rejected, tokens_chosen and
      tokens_rejected, and those given.
    """
    margin = reward_chosen - reward_rejected
    metrics = {
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "margin": margin,
        "accuracy": (margin > 0).astype(jnp.float32),
        "logp_chosen": policy_chosen.sum,
        "logp_rejected": policy_rejected.sum,
        "logp_mean_chosen": policy_chosen.mean,
        "logp_mean_rejected": policy_rejected.mean,
        "tokens_chosen": policy_chosen.count,
        "tokens_rejected": policy_rejected.count,
        **metrics,
    }
    return reduce_examples(loss, has_tokens(policy_chosen, policy_rejected, *also), metrics)

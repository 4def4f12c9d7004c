"""DPO weighted towards the pairs that the policy itself would write. Letters as in `objectives.preference.dpo`."""

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_shape, check_unpacked
from objectives.numerics import MAX_EXPONENT
from objectives.output import LossOutput
from objectives.preference.dpo import log_ratios
from objectives.preference.pairs import reduce_pairs
from objectives.registry import register
from objectives.statistics import LogProbs


@register("wpo", category="preference", papers=("2406.11827",), proof="test_trl_live.py::test_weighting")
def wpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    collision_chosen: jax.Array,
    collision_rejected: jax.Array,
    *,
    beta: float = 0.1,
    max_weight: float = 1.0,
) -> LossOutput:
    """Weighted preference optimisation (arXiv:2406.11827, equation 2): DPO of pairs as if the policy had written them.

      c_t = log sum_z pi(z | x, y_<t)^2
      v = exp(mean_t (log pi(y_t | x, y_<t) - c_t)) of either response, without gradient
      loss = min(v_w v_l, max_weight) sp(-beta d)

    c_t brings the likelihood of a response to that of one that is sampled, which has v near 1.

    Args:
      policy_chosen: as in `dpo`, of one row per response.
      policy_rejected: likewise.
      ref_chosen: as in `dpo`.
      ref_rejected: as in `dpo`.
      collision_chosen: float[B, T], c_t of the policy as `log_collision` returns it.
      collision_rejected: likewise.
      beta: strength of the pull to the reference, above 0.
      max_weight: bound of a pair's weight; 1 as in TRL's versions before 1, infinity as in later ones.

    Returns:
      LossOutput: weight = number of pairs; metrics as `dpo`, and pair_weight.

    Raises:
      ValueError: as `dpo`; statistics of packed rows, or collision of another shape than the tokens.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_unpacked(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    check_shape(policy_chosen.mask.shape, collision_chosen=collision_chosen)
    check_shape(policy_rejected.mask.shape, collision_rejected=collision_rejected)
    check_positive(beta=beta)
    check_positive(finite=False, max_weight=max_weight)
    sides = ((policy_chosen, collision_chosen), (policy_rejected, collision_rejected))
    log_weight = sum(_mean_alignment(side, collision) for side, collision in sides)
    weight = jnp.minimum(jnp.exp(jnp.minimum(jax.lax.stop_gradient(log_weight), MAX_EXPONENT)), max_weight)
    loss = weight * jax.nn.softplus(-beta * (h_w - h_l))
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l, pair_weight=weight)


def _mean_alignment(side: LogProbs, collision: jax.Array) -> jax.Array:
    total = jnp.sum(jnp.where(side.mask != 0, side.per_token - collision, 0.0), axis=-1)
    return total / jnp.maximum(side.count, 1.0)

"""DPO with a coefficient for each token."""

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range, check_statistics
from objectives.output import LossOutput
from objectives.preference.pairs import reduce_pairs
from objectives.registry import register
from objectives.statistics import LogProbs


@register("tgdpo", category="preference", papers=("2506.14574",), proof="test_token_level.py::test_is_its_definition")
def tgdpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    guide_chosen: LogProbs,
    guide_rejected: LogProbs,
    *,
    beta: float = 0.1,
    guidance: float = 0.5,
) -> LossOutput:
    """DPO guided by the token rewards of a model that DPO has trained before (TGDPO, arXiv:2506.14574).

      r_w = sum_t beta (1 + a beta g_wt) h_wt,   r_l = sum_t beta (1 - a beta g_lt) h_lt,   a = guidance
      loss = sp(-(r_w - r_l)),   h_t = log-ratio of the policy to the reference, g_t = that of the guide

    As in the authors' code. A token that the guide prefers counts more in a chosen response and less in a rejected one.
    Neither guide nor reference has a gradient; coefficients may be below 0 where the guide is far from the reference.

    Args:
      policy_chosen: with per_token, not of packed rows; all six alike.
      guide_chosen: of the frozen guide.
      guide_rejected: likewise.
      beta: strength of the pull to the reference, above 0.
      guidance: a, at least 0; 0 is DPO.

    Returns:
      LossOutput: as `dpo`, with rewards r_w and r_l.
    """
    check_statistics(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        guide_chosen=guide_chosen,
        guide_rejected=guide_rejected,
    )
    check_positive(beta=beta)
    check_range(0.0, float("inf"), guidance=guidance)
    r_w = beta * _guided_sum(policy_chosen, ref_chosen, guide_chosen, guidance * beta)
    r_l = beta * _guided_sum(policy_rejected, ref_rejected, guide_rejected, -guidance * beta)
    return reduce_pairs(jax.nn.softplus(r_l - r_w), policy_chosen, policy_rejected, r_w, r_l)


def _guided_sum(policy: LogProbs, ref: LogProbs, guide: LogProbs, scale: jax.Array | float) -> jax.Array:
    """sum_t (1 + scale g_t) h_t over counted tokens."""
    shapes = [x.per_token.shape for x in (policy, ref, guide)]
    if policy.packed or len(set(shapes)) != 1:
        raise ValueError(
            f"tgdpo needs per_token of policy, reference and guide as rows [B, T] of one response each, got {shapes} "
            f"for {policy.sum.shape[0]} responses"
        )
    reference = jax.lax.stop_gradient(ref.per_token)
    ratio, guided = policy.per_token - reference, jax.lax.stop_gradient(guide.per_token) - reference
    return jnp.sum(policy.mask * (1.0 + scale * guided) * ratio, axis=-1)

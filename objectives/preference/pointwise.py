"""Losses that give each response of a pair a target of its own, so that both cannot sink together.

Letters and conventions as in `objectives.preference.dpo`; all return the metrics of `dpo`, rewards beta h.
"""

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_shape, check_values_in
from objectives.output import LossOutput
from objectives.preference.dpo import PROOF, log_ratios
from objectives.preference.pairs import reduce_pairs
from objectives.registry import register
from objectives.statistics import LogProbs


@register("bco_pair", category="preference", papers=("2404.04656",), proof=PROOF)
def bco_pair(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    reward_mean: jax.Array | None = None,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """Binary classifier optimisation of pairs with its reward shift (arXiv:2404.04656).

      loss = sp(-(beta h_w - c)) + sp(beta h_l - c)

    c = `reward_mean` is the caller's running mean of the rewards of both sides, e.g. of
    (reward_chosen + reward_rejected) / 2 in the metrics. It has no gradient.

    Args:
      policy_chosen: as in `dpo`.
      policy_rejected: as in `dpo`.
      ref_chosen: as in `dpo`.
      ref_rejected: as in `dpo`.
      reward_mean: scalar c; None: 0, as TRL has it since its version 1.
      beta: strength of the pull to the reference, above 0.

    Raises:
      ValueError: as `dpo`, and a `reward_mean` that is no scalar.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    shift = reward_shift(reward_mean)
    r_w, r_l = beta * h_w, beta * h_l
    loss = jax.nn.softplus(shift - r_w) + jax.nn.softplus(r_l - shift)
    return reduce_pairs(loss, policy_chosen, policy_rejected, r_w, r_l)


def reward_shift(reward_mean: jax.Array | None) -> jax.Array | float:
    """The scalar c of BCO without gradient; 0 for None."""
    if reward_mean is None:
        return 0.0
    check_shape((), reward_mean=reward_mean)
    return jax.lax.stop_gradient(reward_mean)


@register("apo_zero", category="preference", papers=("2408.06266",), proof=PROOF)
def apo_zero(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """Anchored preference optimisation, zero (arXiv:2408.06266, equation 7): chosen up, rejected down.

      loss = 1 - sigma(beta h_w) + sigma(beta h_l)

    For chosen responses that are better than what the model says by itself.

    Args:
      policy_chosen: as in `dpo`.
      policy_rejected: as in `dpo`.
      ref_chosen: as in `dpo`.
      ref_rejected: as in `dpo`.
      beta: strength of the pull to the reference, above 0.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    r_w, r_l = beta * h_w, beta * h_l
    loss = jax.nn.sigmoid(-r_w) + jax.nn.sigmoid(r_l)
    return reduce_pairs(loss, policy_chosen, policy_rejected, r_w, r_l)


@register("apo_down", category="preference", papers=("2408.06266",), proof=PROOF)
def apo_down(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """Anchored preference optimisation, down (arXiv:2408.06266, equation 8): both down, rejected more.

      loss = sigma(beta h_w) + 1 - sigma(beta d)

    For chosen responses that are worse than what the model says by itself.

    Args:
      policy_chosen: as in `dpo`.
      policy_rejected: as in `dpo`.
      ref_chosen: as in `dpo`.
      ref_rejected: as in `dpo`.
      beta: strength of the pull to the reference, above 0.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    r_w, r_l = beta * h_w, beta * h_l
    loss = jax.nn.sigmoid(r_w) + jax.nn.sigmoid(r_l - r_w)
    return reduce_pairs(loss, policy_chosen, policy_rejected, r_w, r_l)


@register("sppo", category="preference", papers=("2405.00675",), proof=PROOF)
def sppo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    prob_chosen: jax.Array | None = None,
    prob_rejected: jax.Array | None = None,
    *,
    beta: float = 1e-3,
) -> LossOutput:
    """Self-play preference optimisation (arXiv:2405.00675, equation 4.7); the reference is the previous iterate.

      loss = (h_w - (P_w - 1/2) / beta)^2 + (h_l - (P_l - 1/2) / beta)^2

    P is how often a response wins against those of the previous iterate. Without estimates of it (sppo_hard of TRL)
    P_w = 1 and P_l = 0.

    Args:
      policy_chosen: as in `dpo`.
      policy_rejected: as in `dpo`.
      ref_chosen: of the previous iterate.
      ref_rejected: likewise.
      prob_chosen: [B], P_w in [0, 1].
      prob_rejected: [B], P_l, if P_w is given.
      beta: 1 over the paper's eta, above 0.

    Raises:
      ValueError: as `dpo`; one probability without the other, outside [0, 1] or not [B].
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    if (prob_chosen is None) != (prob_rejected is None):
        raise ValueError("prob_chosen and prob_rejected go together: estimates of both, or neither for 1 and 0")
    if prob_chosen is not None:
        check_shape(h_w.shape, prob_chosen=prob_chosen, prob_rejected=prob_rejected)
        check_values_in(0.0, 1.0, prob_chosen=prob_chosen, prob_rejected=prob_rejected)
    target_w = 0.5 / beta if prob_chosen is None else (prob_chosen - 0.5) / beta
    target_l = -0.5 / beta if prob_rejected is None else (prob_rejected - 0.5) / beta
    loss = jnp.square(h_w - target_w) + jnp.square(h_l - target_l)
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l)

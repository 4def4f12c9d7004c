"""DPO that does not reward length for its own sake.

Letters as in `objectives.preference.dpo`; n is the number of counted tokens of a response.
"""

import math

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range, check_statistics, check_unpacked
from objectives.output import LossOutput
from objectives.preference.dpo import log_ratios
from objectives.preference.pairs import reduce_pairs
from objectives.registry import register
from objectives.statistics import LogProbs


def discount_tails(chosen: LogProbs, rejected: LogProbs, alpha: jax.Array | float) -> tuple[LogProbs, LogProbs]:
    """Both responses with the tokens past the length of the shorter one weighted by alpha (arXiv:2409.06411).

    Args:
      chosen: of one row per response.
      rejected: likewise.
      alpha: weight of the tail.

    Returns:
      LogProbs whose per_token, sum and mean are so weighted; count and mask are as they were.
    """
    shared = jnp.minimum(chosen.count, rejected.count)[:, None]

    def discount(side: LogProbs) -> LogProbs:
        position = jnp.cumsum(side.mask, axis=-1)
        per_token = side.per_token * side.mask * jnp.where(position <= shared, 1.0, alpha)
        total = jnp.sum(per_token, axis=-1)
        return LogProbs(total, total / jnp.maximum(side.count, 1.0), side.count, per_token, side.mask)

    return discount(chosen), discount(rejected)


@register("ld_dpo", category="preference", papers=("2409.06411",), proof="test_trl_live.py::test_length_desensitised")
def ld_dpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
) -> LossOutput:
    """Length-desensitised DPO (arXiv:2409.06411): tokens past the shorter response's length count alpha.

      s = sum of the first min(n_w, n_l) tokens + alpha sum of the others, of policy and reference
      loss = sp(-beta d) of these s

    Args:
      policy_chosen: as in `dpo`, of one row per response.
      policy_rejected: likewise.
      ref_chosen: likewise; their log-probabilities by token are read.
      ref_rejected: likewise.
      beta: strength of the pull to the reference, above 0.
      alpha: in [0, 1]; 1 is DPO.

    Returns:
      LossOutput: as `dpo`; rewards of the weighted sums, logp of all tokens.

    Raises:
      ValueError: as `dpo`; statistics of packed rows.
    """
    statistics = {
        "policy_chosen": policy_chosen,
        "policy_rejected": policy_rejected,
        "ref_chosen": ref_chosen,
        "ref_rejected": ref_rejected,
    }
    check_statistics(**statistics)
    check_unpacked(**statistics)
    check_positive(beta=beta)
    check_range(0.0, 1.0, alpha=alpha)
    policy = discount_tails(policy_chosen, policy_rejected, alpha)
    h_w, h_l = log_ratios(*policy, *discount_tails(ref_chosen, ref_rejected, alpha))
    loss = jax.nn.softplus(-beta * (h_w - h_l))
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l)


@register("r_dpo", category="preference", papers=("2403.19159", "2406.11817"), proof="test_identities.py::test_r_dpo")
def r_dpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
    alpha: float = 0.05,
) -> LossOutput:
    """DPO under a cost of alpha per token (R-DPO, arXiv:2403.19159; with new iterates iLR-DPO, arXiv:2406.11817).

      loss = sp(-(beta d + alpha (n_w - n_l)))

    The papers subtract alpha n from the reward. The sign is derived from that, as the loss is quoted with either: the
    policy that is best for the reward less alpha n has the reward beta h + alpha n up to a constant of the prompt. A
    pair whose chosen response is the longer one is explained by length in part, and teaches less. The default alpha is
    that of R-DPO's run of Phi-2 on UltraFeedback, with this beta; its run on dialogues has 0.1.

    Args:
      policy_chosen: as in `dpo`.
      policy_rejected: as in `dpo`.
      ref_chosen: as in `dpo`; for iLR-DPO of the first or of the previous iterate.
      ref_rejected: as in `dpo`.
      beta: strength of the pull to the reference, above 0.
      alpha: cost of a token, at least 0.

    Returns:
      LossOutput: as `dpo`; rewards beta h, without the lengths.

    Raises:
      ValueError: as `dpo`.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    check_range(0.0, math.inf, alpha=alpha)
    longer = policy_chosen.count - policy_rejected.count
    loss = jax.nn.softplus(-(beta * (h_w - h_l) + alpha * longer))
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l)

"""Losses of pairs that push a rejected response down the less, the nearer a reward model finds it to the chosen one.

Maximum a posteriori preference optimisation (MaPPO, arXiv:2507.21183, version 5), a calibration that goes with DPO
(equation 8) and with other losses (appendix B.2): D takes the log-probabilities of the rejected response to the power

  D = score_w - score_l, clipped to [0, 1]

under the policy and the reference alike. The paper takes scores in [0, 1], of which the chosen one is the greater: the
logistic function of what a reward model says (appendix D.2.4). Give scores of that kind; clipping what lies outside is
ours. D has no gradient. Letters as in `objectives.preference.dpo`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from objectives.checks import check_shape, check_statistics
from objectives.output import LossOutput, reduce_examples
from objectives.preference.dpo import dpo, ipo
from objectives.preference.reference_free import cpo, simpo
from objectives.registry import Objective, register
from objectives.statistics import LogProbs, has_tokens

PROOF = "test_calibrated.py::test_is_its_definition"


def score_gap(score_chosen: jax.Array, score_rejected: jax.Array) -> jax.Array:
    """D, float32 [B], without gradient."""
    gap = jnp.asarray(score_chosen, jnp.float32) - jnp.asarray(score_rejected, jnp.float32)
    return jax.lax.stop_gradient(jnp.clip(gap, 0.0, 1.0))


def calibrated(
    loss: Objective, statistics: dict[str, LogProbs], score_chosen: jax.Array, score_rejected: jax.Array, **options
) -> LossOutput:
    """`loss` with the log-probabilities of rejected responses times D.

    Args:
      loss: of pairs, that takes `statistics`.
      statistics: by argument name, policy_chosen and policy_rejected among them.
      score_chosen: [B].
      score_rejected: [B].
      **options: of the loss.

    Returns:
      LossOutput: as of the loss, with reward_rejected and the margin of D log-probabilities, but logp_rejected and
      logp_mean_rejected without D; metrics also score_gap (D).

    Raises:
      ValueError: as of the loss; scores that are not [B].
    """
    check_statistics(**statistics)
    chosen, rejected = statistics["policy_chosen"], statistics["policy_rejected"]
    check_shape(rejected.sum.shape, score_chosen=score_chosen, score_rejected=score_rejected)
    gap = score_gap(score_chosen, score_rejected)

    def scaled(side: LogProbs) -> LogProbs:
        return dataclasses.replace(side, sum=gap * side.sum, mean=gap * side.mean)

    names = ("policy_rejected", "ref_rejected")
    output = loss(**{name: scaled(x) if name in names else x for name, x in statistics.items()}, **options)
    plain = {"logp_rejected": rejected.sum, "logp_mean_rejected": rejected.mean, "score_gap": gap}
    metrics = reduce_examples(gap, has_tokens(chosen, rejected), plain).metrics
    return dataclasses.replace(output, metrics=output.metrics | metrics)


def of_four(*statistics: LogProbs) -> dict[str, LogProbs]:
    """The statistics of policy and reference by the names that objectives have for them."""
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    return dict(zip(names, statistics, strict=True))


@register("mappo", category="preference", papers=("2507.21183",), proof=PROOF)
def mappo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    score_chosen: jax.Array,
    score_rejected: jax.Array,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """MaPPO of `dpo` (arXiv:2507.21183, equation 8): sp(-beta (h_w - D h_l)).

    Args:
      policy_chosen: as in `dpo`.
      policy_rejected: as in `dpo`.
      ref_chosen: as in `dpo`.
      ref_rejected: as in `dpo`.
      score_chosen: [B], in [0, 1]: of a reward model without bounds the logistic function, as in the paper.
      score_rejected: [B], likewise.
      beta: strength of the pull to the reference, above 0.

    Returns:
      LossOutput: as `dpo`, with rewards beta h_w and D beta h_l, and metric score_gap (D).

    Raises:
      ValueError: as `dpo`; scores that are not [B].
    """
    statistics = of_four(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return calibrated(dpo, statistics, score_chosen, score_rejected, beta=beta)


@register("mappo_ipo", category="preference", papers=("2507.21183", "2310.12036"), proof=PROOF)
def mappo_ipo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    score_chosen: jax.Array,
    score_rejected: jax.Array,
    *,
    beta: float = 0.1,
    length_normalised: bool = False,
) -> LossOutput:
    """MaPPO of `ipo` (arXiv:2507.21183, equation 14): (h_w - D h_l - 1 / (2 beta))^2.

    Args:
      policy_chosen: as in `mappo`, and so all statistics and scores.
      beta: the tau of IPO, above 0.
      length_normalised: as in `ipo`; the paper has sums.

    Returns:
      LossOutput: as `ipo`, with rewards beta h_w and D beta h_l, and metric score_gap (D).

    Raises:
      ValueError: as `mappo`.
    """
    statistics = of_four(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    options = {"beta": beta, "length_normalised": length_normalised}
    return calibrated(ipo, statistics, score_chosen, score_rejected, **options)


@register("mappo_simpo", category="preference", papers=("2507.21183", "2405.14734"), proof=PROOF)
def mappo_simpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    score_chosen: jax.Array,
    score_rejected: jax.Array,
    *,
    beta: float = 2.5,
    gamma: float = 1.375,
) -> LossOutput:
    """MaPPO of `simpo` (arXiv:2507.21183, equation 12): sp(-(beta a_w - D beta a_l - gamma)), a of each token.

    Args:
      policy_chosen: as in `simpo`.
      policy_rejected: as in `simpo`.
      score_chosen: [B], as in `mappo`.
      score_rejected: [B], likewise.
      beta: scale of the reward, above 0.
      gamma: margin that is asked for, at least 0. The defaults are those of `simpo`; the paper has a gamma of 1.

    Returns:
      LossOutput: as `simpo`, with rewards beta a_w and D beta a_l, and metric score_gap (D).

    Raises:
      ValueError: as `simpo`; scores that are not [B].
    """
    statistics = {"policy_chosen": policy_chosen, "policy_rejected": policy_rejected}
    return calibrated(simpo, statistics, score_chosen, score_rejected, beta=beta, gamma=gamma)


@register("mappo_cpo", category="preference", papers=("2507.21183", "2401.08417"), proof=PROOF)
def mappo_cpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    score_chosen: jax.Array,
    score_rejected: jax.Array,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
) -> LossOutput:
    """MaPPO of `cpo` (arXiv:2507.21183, equation 16): sp(-beta (s_w - D s_l)) - nll_weight a_w.

    The paper imitates the sum s_w with a weight of 0.2; the mean a_w over tokens is that of `cpo`.

    Args:
      policy_chosen: as in `cpo`.
      policy_rejected: as in `cpo`.
      score_chosen: [B], as in `mappo`.
      score_rejected: [B], likewise.
      beta: scale of the margin, above 0.
      nll_weight: at least 0.

    Returns:
      LossOutput: as `cpo`, with rewards beta s_w and D beta s_l, and metric score_gap (D).

    Raises:
      ValueError: as `cpo`; scores that are not [B].
    """
    statistics = {"policy_chosen": policy_chosen, "policy_rejected": policy_rejected}
    return calibrated(cpo, statistics, score_chosen, score_rejected, beta=beta, nll_weight=nll_weight)

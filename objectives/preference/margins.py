"""DPO with other margins: weighted log-ratios, ties, several chosen responses, an optimistic term.

Letters and errors as in `objectives.preference.dpo`: h_w and h_l are the log-ratios of the chosen and the rejected
response to the reference, d = h_w - h_l, sp the softplus. All take the four statistics first.
"""

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range, check_shape, check_statistics, check_values_among
from objectives.output import LossOutput
from objectives.preference.dpo import log_ratios
from objectives.preference.pairs import reduce_pairs
from objectives.registry import register
from objectives.statistics import LogProbs, has_tokens, log_ratio
from objectives.ties import tie_nll


@register("dpo_shift", category="preference", papers=("2502.07599",), proof="test_margins.py::test_is_its_definition")
def dpo_shift(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
    shift: float = 0.95,
) -> LossOutput:
    """DPO with a smaller weight of the rejected response, against chosen ones that sink (arXiv:2502.07599).

      loss = sp(-beta (h_w - f h_l)),   f = shift

    As in the authors' code. Schedules of f, linear between 0.95 and 1 in either direction, are values of `shift`.

    Args:
      beta: strength of the pull to the reference, above 0.
      shift: f, in (0, 1]; 1 is DPO.

    Returns:
      LossOutput: as `dpo`, with rewards beta h_w and f beta h_l.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta, shift=shift)
    check_range(0.0, 1.0, shift=shift)
    r_w, r_l = beta * h_w, beta * shift * h_l
    return reduce_pairs(jax.nn.softplus(r_l - r_w), policy_chosen, policy_rejected, r_w, r_l)


@register("todo", category="preference", papers=("2411.02442",), proof="test_margins.py::test_is_its_definition")
def todo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    tie: jax.Array,
    *,
    beta: float = 0.1,
    tie_width: float = 0.5,
) -> LossOutput:
    """DPO on pairs that may be ties, under the Bradley-Terry model with ties (TODO, arXiv:2411.02442).

      preference: sp(a - beta d),   tie: sp(a + beta d) + sp(a - beta d) - log(e^(2 a) - 1),   a = tie_width

    As in the authors' code, whose theta is -a.

    Args:
      tie: bool[B], whether neither response of a pair is better.
      beta: strength of the pull to the reference, above 0.
      tie_width: a, above 0; at 0 ties would be impossible.

    Returns:
      LossOutput: as `dpo`; metrics also tie, and tie_nll, the loss of the ties.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta, tie_width=tie_width)
    check_shape(h_w.shape, tie=tie)
    check_values_among((0, 1), where=has_tokens(policy_chosen, policy_rejected), tie=tie)
    tie = jnp.asarray(tie, bool)
    r_w, r_l = beta * h_w, beta * h_l
    win, draw = jax.nn.softplus(tie_width - (r_w - r_l)), tie_nll(r_w - r_l, tie_width)
    return reduce_pairs(
        jnp.where(tie, draw, win),
        policy_chosen,
        policy_rejected,
        r_w,
        r_l,
        tie=tie.astype(jnp.float32),
        tie_nll=jnp.where(tie, draw, 0.0),
    )


@register("selm", category="preference", papers=("2405.19332",), proof="test_margins.py::test_is_its_definition")
def selm(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    policy_sampled: LogProbs,
    ref_sampled: LogProbs,
    *,
    beta: float = 0.1,
    optimism: float = 1e-3,
) -> LossOutput:
    """Self-exploring language models: DPO that lowers what the reference samples (SELM, arXiv:2405.19332).

      loss = sp(-beta d) + alpha beta h_s,   alpha = optimism,   h_s = log-ratio of a response y_s ~ ref

    As in the authors' code, which uses an alpha of 1e-3, or 1e-4 for Llama 3.

    Args:
      policy_sampled: of one response per prompt that the reference sampled.
      ref_sampled: likewise.
      beta: strength of the pull to the reference, above 0.
      optimism: alpha, at least 0; 0 is DPO.

    Returns:
      LossOutput: as `dpo`; metrics also log_ratio_sampled (h_s).
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_statistics(policy_chosen=policy_chosen, policy_sampled=policy_sampled, ref_sampled=ref_sampled)
    check_positive(beta=beta)
    check_range(0.0, float("inf"), optimism=optimism)
    h_s = log_ratio(policy_sampled, ref_sampled)
    loss = jax.nn.softplus(-beta * (h_w - h_l)) + optimism * beta * h_s
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l, log_ratio_sampled=h_s)


@register("wrpo", category="preference", papers=("2412.03187",), proof="test_margins.py::test_is_its_definition")
def wrpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    policy_target: LogProbs,
    ref_target: LogProbs,
    *,
    beta: float = 0.01,
    source_weight: float = 0.1,
) -> LossOutput:
    """Fusion of models by preferences: the chosen response of others beside one's own (WRPO, arXiv:2412.03187).

      loss = sp(-beta (a h_w + (1 - a) h_t - h_l)),   a = source_weight

    w is the best response of the source models and t the best of the model itself, l its worst. As in the authors'
    code, where a rises linearly from 0 to 0.1 over training: a value of `source_weight`.

    Args:
      policy_chosen: of the source models' responses.
      policy_target: of the model's own chosen responses.
      ref_target: likewise.
      beta: strength of the pull to the reference, above 0.
      source_weight: a, in [0, 1]; 1 is DPO on the source models' responses, 0 on the model's own.

    Returns:
      LossOutput: as `dpo`, with the weighted reward as the chosen one; metrics also reward_source and reward_target.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_statistics(policy_chosen=policy_chosen, policy_target=policy_target, ref_target=ref_target)
    check_positive(beta=beta)
    check_range(0.0, 1.0, source_weight=source_weight)
    source, target = beta * h_w, beta * log_ratio(policy_target, ref_target)
    r_w, r_l = source_weight * source + (1.0 - source_weight) * target, beta * h_l
    return reduce_pairs(
        jax.nn.softplus(r_l - r_w), policy_chosen, policy_rejected, r_w, r_l, reward_source=source, reward_target=target
    )


@register("phantom", category="preference", papers=("2409.14713",), proof="test_margins.py::test_is_its_definition")
def phantom(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    *,
    beta: float = 2.0,
    margin: float = 0.5,
    nll_weight: float = 1.0,
) -> LossOutput:
    """Supervised training and a preference without a reference in one step (phantom optimisation, arXiv:2409.14713).

      loss = -c m_w + sp(margin - beta (m_w - m_l)),   m = log-probability by token, c = nll_weight

    w is the correct answer and l a confusing one. The form, SimPO (arXiv:2405.14734) plus cross entropy, follows the
    paper's description; the authors' training code is not public, and the defaults are those of SimPO.

    Args:
      policy_chosen: of correct answers.
      policy_rejected: of confusing ones.
      beta: scale of the log-probabilities by token, above 0.
      margin: by how much they should differ, after scaling.
      nll_weight: c, at least 0.

    Returns:
      LossOutput: as `dpo`, with rewards beta m; metrics also nll (-m_w).
    """
    check_statistics(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    check_positive(beta=beta)
    check_range(0.0, float("inf"), nll_weight=nll_weight)
    r_w, r_l = beta * policy_chosen.mean, beta * policy_rejected.mean
    loss = jax.nn.softplus(margin - (r_w - r_l)) - nll_weight * policy_chosen.mean
    return reduce_pairs(loss, policy_chosen, policy_rejected, r_w, r_l, nll=-policy_chosen.mean)

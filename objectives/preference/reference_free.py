"""Losses of pairs, and of triples, without a reference model.

Letters: s = log pi(y | x) summed over the tokens of a response, n their number, a = s / n, w chosen, l rejected;
sp(x) = log(1 + e^x), sigma the logistic function. NLL terms are per token of one response, a mean that is then summed
over responses, where TRL takes the mean over all tokens of a batch.
"""

import math

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range, check_statistics
from objectives.numerics import LEAST_LOSS, box_cox, log1mexp, log_odds
from objectives.output import LossOutput
from objectives.preference.dpo import PROOF, smoothed_preference
from objectives.preference.pairs import reduce_pairs
from objectives.registry import register
from objectives.statistics import LogProbs
from zoo.core.registry import check_choice

FORMS = ("sigmoid", "hinge", "ipo")


def _check(beta: float, label_smoothing: float, nll_weight: float) -> None:
    check_positive(beta=beta)
    check_range(0.0, 0.5, open_high=True, label_smoothing=label_smoothing)
    check_range(0.0, math.inf, nll_weight=nll_weight)


def _contrast(chosen: LogProbs, rejected: LogProbs, form: str, beta: float, label_smoothing: float) -> jax.Array:
    """[B]: `form` of the margin, of means over tokens for ipo and of sums else."""
    check_choice("form", form, FORMS)
    if form == "ipo":
        return jnp.square(chosen.mean - rejected.mean - 1.0 / (2.0 * beta))
    x = beta * (chosen.sum - rejected.sum)
    return jax.nn.relu(1.0 - x) if form == "hinge" else smoothed_preference(x, 1.0 - label_smoothing)


@register("cpo", category="preference", papers=("2401.08417",), proof=PROOF)
def cpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    form: str = "sigmoid",
    nll_weight: float = 1.0,
) -> LossOutput:
    """Contrastive preference optimisation (arXiv:2401.08417): DPO with a uniform reference, and imitation.

      sigmoid  loss = (1 - e) sp(-beta (s_w - s_l)) + e sp(beta (s_w - s_l)) - nll_weight a_w,   e = label_smoothing
      hinge    loss = max(0, 1 - beta (s_w - s_l)) - nll_weight a_w
      ipo      loss = (a_w - a_l - 1 / (2 beta))^2 - nll_weight a_w

    Args:
      policy_chosen: of the model that is trained.
      policy_rejected: likewise, as many responses.
      beta: scale of the margin, above 0.
      label_smoothing: e, in [0, 0.5); of the form sigmoid.
      form: sigmoid, hinge or ipo, as in TRL.
      nll_weight: at least 0.

    Returns:
      LossOutput: weight = number of pairs; metrics as `reduce_pairs`, rewards beta s.

    Raises:
      ValueError: numbers of responses disagree or an option is out of range.
    """
    check_statistics(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    _check(beta, label_smoothing, nll_weight)
    loss = _contrast(policy_chosen, policy_rejected, form, beta, label_smoothing) - nll_weight * policy_chosen.mean
    rewards = (beta * policy_chosen.sum, beta * policy_rejected.sum)
    return reduce_pairs(loss, policy_chosen, policy_rejected, *rewards)


@register("simpo", category="preference", papers=("2405.14734", "2501.03884"), proof=PROOF)
def simpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    *,
    beta: float = 2.5,
    gamma: float = 1.375,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
    nll_weight: float = 0.0,
) -> LossOutput:
    """Simple preference optimisation (arXiv:2405.14734): the reward is the mean log-probability, with a margin.

      r = beta a,   x = r_w - r_l - gamma
      loss = (1 - e) sp(-x) + e sp(x) - nll_weight a_w,   e = label_smoothing

    With alpha != 0 the reward is that of AlphaPO (arXiv:2501.03884), r = beta (1 - p^-alpha) / alpha for p = e^a, where
    p^-alpha ends at e^80. The defaults are the paper's for Llama-3-8B-Instruct, gamma / beta = 0.55.

    Args:
      policy_chosen: of the model that is trained.
      policy_rejected: likewise, as many responses.
      beta: scale of the reward, above 0.
      gamma: margin that is asked for, at least 0.
      label_smoothing: e, in [0, 0.5).
      alpha: shape of the reward, 0 for SimPO.
      nll_weight: at least 0; above 0 for the mixture with CPO.

    Returns:
      LossOutput: weight = number of pairs; metrics as `reduce_pairs`, rewards r.

    Raises:
      ValueError: numbers of responses disagree or an option is out of range.
    """
    check_statistics(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    _check(beta, label_smoothing, nll_weight)
    check_range(0.0, math.inf, gamma=gamma)
    r_w, r_l = (beta * box_cox(side.mean, -alpha) for side in (policy_chosen, policy_rejected))
    loss = smoothed_preference(r_w - r_l - gamma, 1.0 - label_smoothing) - nll_weight * policy_chosen.mean
    return reduce_pairs(loss, policy_chosen, policy_rejected, r_w, r_l)


@register("orpo", category="preference", papers=("2403.07691",), proof=PROOF)
def orpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    policy_full: LogProbs | None = None,
    *,
    odds_weight: float = 0.1,
) -> LossOutput:
    """Odds ratio preference optimisation (arXiv:2403.07691, equations 6 and 7): imitation and a ratio of odds.

      o(p) = log(p / (1 - p)) for p = e^a
      loss = nll + odds_weight sp(-(o_w - o_l)),   nll = -a_w

    Args:
      policy_chosen: of the model that is trained.
      policy_rejected: likewise, as many responses.
      policy_full: of prompt and chosen response together, whose mean is then the nll, as in TRL and in the authors'
        code (xfactlab/orpo) unless `disable_prompt_loss` is set there; None: the response's.
      odds_weight: the paper's lambda, TRL's beta, above 0; 0.1 and 0.05 in the authors' scripts.

    Returns:
      LossOutput: weight = number of pairs; metrics as `reduce_pairs`, rewards odds_weight a, and log_odds_ratio.

    Raises:
      ValueError: numbers of responses disagree or odds_weight is out of range.
    """
    imitated = policy_chosen if policy_full is None else policy_full
    check_statistics(policy_chosen=policy_chosen, policy_rejected=policy_rejected, policy_full=imitated)
    check_positive(odds_weight=odds_weight)
    ratio = log_odds(policy_chosen.mean) - log_odds(policy_rejected.mean)
    loss = odds_weight * jax.nn.softplus(-ratio) - imitated.mean
    rewards = (odds_weight * policy_chosen.mean, odds_weight * policy_rejected.mean)
    return reduce_pairs(loss, policy_chosen, policy_rejected, *rewards, log_odds_ratio=ratio)


@register("asft", category="preference", papers=("2409.10571", "2502.01237"), proof="test_identities.py::test_asft")
def asft(policy_chosen: LogProbs, policy_rejected: LogProbs, *, odds_weight: float = 0.1) -> LossOutput:
    """Aligned supervised fine-tuning (arXiv:2409.10571): absolute odds in place of ORPO's ratio of them.

      loss = -a_w - odds_weight [log sigma(o_w) + log sigma(-o_l)] = -a_w - odds_weight [a_w + log(1 - p_l)]

    with p = e^a and o = log(p / (1 - p)). Both forms and the mean over tokens are those of arXiv:2502.01237, sections
    2.1, 2.4 and 3.1.1, which tries weights of 0.1, 0.2, 0.5 and 1 (section 4.1); the default is ours.

    Args:
      policy_chosen: of the model that is trained.
      policy_rejected: likewise, as many responses.
      odds_weight: lambda, above 0.

    Returns:
      LossOutput: weight = number of pairs; metrics as `reduce_pairs`, rewards odds_weight a.

    Raises:
      ValueError: numbers of responses disagree or odds_weight is out of range.
    """
    check_statistics(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    check_positive(odds_weight=odds_weight)
    a_w, a_l = policy_chosen.mean, policy_rejected.mean
    loss = -a_w - odds_weight * (a_w + log1mexp(jnp.minimum(a_l, -LEAST_LOSS)))
    return reduce_pairs(loss, policy_chosen, policy_rejected, odds_weight * a_w, odds_weight * a_l)


@register("tpo", category="preference", papers=("2405.16681",), proof="test_trl_live.py::test_tpo")
def tpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    policy_gold: LogProbs,
    *,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
    form: str = "sigmoid",
    nll_weight: float = 1.0,
) -> LossOutput:
    """Triple preference optimisation (arXiv:2405.16681): `cpo` that imitates a third, gold response.

      loss = (1 - e) sp(-beta (s_w - s_l)) + e sp(beta (s_w - s_l)) - nll_weight a_gold,   e = label_smoothing

    Args:
      policy_chosen: of the model that is trained.
      policy_rejected: likewise, as many responses.
      policy_gold: likewise, of responses that are better than the chosen ones.
      beta: scale of the margin, above 0.
      label_smoothing: e, in [0, 0.5); of the form sigmoid.
      form: sigmoid, hinge or ipo, as in `cpo`.
      nll_weight: at least 0.

    Returns:
      LossOutput: weight = number of triples; metrics as `reduce_pairs`, rewards beta s, and logp_mean_gold.

    Raises:
      ValueError: numbers of responses disagree or an option is out of range.
    """
    _check_triple(policy_chosen, policy_rejected, policy_gold, beta, label_smoothing, nll_weight)
    loss = _contrast(policy_chosen, policy_rejected, form, beta, label_smoothing) - nll_weight * policy_gold.mean
    rewards = (beta * policy_chosen.sum, beta * policy_rejected.sum)
    gold = {"logp_mean_gold": policy_gold.mean}
    return reduce_pairs(loss, policy_chosen, policy_rejected, *rewards, also=(policy_gold,), **gold)


@register("tpo_l", category="preference", papers=("2405.16681",), proof="test_trl_live.py::test_tpo")
def tpo_l(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    policy_gold: LogProbs,
    *,
    beta: float = 0.01,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
) -> LossOutput:
    """Length-controlled triple preference optimisation (arXiv:2405.16681): `simpo` that imitates a third response.

      x = beta (a_w - a_l) - gamma
      loss = (1 - e) sp(-x) + e sp(x) - nll_weight a_gold,   e = label_smoothing

    Args:
      policy_chosen: as in `tpo`.
      policy_rejected: as in `tpo`.
      policy_gold: as in `tpo`.
      beta: scale of the margin, above 0.
      gamma: margin that is asked for, at least 0.
      label_smoothing: e, in [0, 0.5).
      nll_weight: at least 0.

    Returns:
      LossOutput: weight = number of triples; metrics as `reduce_pairs`, rewards beta a, and logp_mean_gold.

    Raises:
      ValueError: as `tpo`, and a gamma below 0.
    """
    _check_triple(policy_chosen, policy_rejected, policy_gold, beta, label_smoothing, nll_weight)
    check_range(0.0, math.inf, gamma=gamma)
    r_w, r_l = beta * policy_chosen.mean, beta * policy_rejected.mean
    loss = smoothed_preference(r_w - r_l - gamma, 1.0 - label_smoothing) - nll_weight * policy_gold.mean
    gold = {"logp_mean_gold": policy_gold.mean}
    return reduce_pairs(loss, policy_chosen, policy_rejected, r_w, r_l, also=(policy_gold,), **gold)


def _check_triple(
    chosen: LogProbs, rejected: LogProbs, gold: LogProbs, beta: float, label_smoothing: float, nll_weight: float
) -> None:
    check_statistics(policy_chosen=chosen, policy_rejected=rejected, policy_gold=gold)
    _check(beta, label_smoothing, nll_weight)

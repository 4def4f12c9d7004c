"""DPO on probabilities of a preference instead of certain ones, and regressions on preferences of a model.

Letters and errors as in `objectives.preference.dpo`; ce(x, p) = p sp(-x) + (1 - p) sp(x), the cross entropy of log-odds
x to the probability p. All take the four statistics first; scores, probabilities and labels get no gradient.
"""

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range, check_shape, check_values_in
from objectives.output import LossOutput
from objectives.preference.dpo import log_ratios, smoothed_preference
from objectives.preference.pairs import reduce_pairs
from objectives.registry import register
from objectives.statistics import LogProbs, has_tokens

PROOF = "test_soft_labels.py::test_is_its_definition"


@register("mmpo", category="preference", papers=("2410.03145",), proof=PROOF)
def mmpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    score_chosen: jax.Array,
    score_rejected: jax.Array,
    *,
    beta: float = 0.1,
    score_scale: float = 1.0,
) -> LossOutput:
    """Margin matching: the better a response was judged, the surer the label (MMPO, arXiv:2410.03145).

      loss = ce(beta d, p),   p = sigma(gamma (score_w - score_l)),   gamma = score_scale

    As in the authors' code, where gamma is tuned and has no default; 1 is ours.

    Args:
      score_chosen: [B], quality on any scale.
      score_rejected: [B], likewise.
      beta: strength of the pull to the reference, above 0.
      score_scale: gamma, above 0; it depends on the scale of the scores.

    Returns:
      LossOutput: as `dpo`; metrics also label (p).
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta, score_scale=score_scale)
    check_shape(h_w.shape, score_chosen=score_chosen, score_rejected=score_rejected)
    label = jax.nn.sigmoid(score_scale * jax.lax.stop_gradient(jnp.float32(score_chosen) - score_rejected))
    loss = smoothed_preference(beta * (h_w - h_l), label)
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l, label=label)


@register("dno", category="preference", papers=("2404.03715",), proof=PROOF)
def dno(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    score_chosen: jax.Array,
    score_rejected: jax.Array,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """Direct Nash optimisation, the regression on expected win rates (arXiv:2404.03715, equation 8).

      loss = ce(beta d, sigma(score_w - score_l)),   score_i = mean_j P(y_i preferred to y_j)

    y_j are samples of the current iterate, which is the reference. The two responses need not be in order. The
    practical variant is `dpo` on pairs of a large gap in score.

    Args:
      score_chosen: [B], expected win rate against samples of the reference, in [0, 1].
      score_rejected: [B], likewise.
      beta: the paper's eta, above 0.

    Returns:
      LossOutput: as `dpo`; metrics also label.
    """
    return mmpo(
        policy_chosen,
        policy_rejected,
        ref_chosen,
        ref_rejected,
        score_chosen,
        score_rejected,
        beta=beta,
        score_scale=1.0,
    )


@register("cream", category="preference", papers=("2410.12735",), proof=PROOF)
def cream(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    consistency: jax.Array,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """Self-rewarded DPO, regularised by how far two iterates agree on the ranking (CREAM, arXiv:2410.12735).

      loss = ce(beta d, C),   C = consistency

    As in the authors' code.

    Args:
      consistency: [B], C in [0, 1], of `ranking_consistency`; or its mean over the data set for every pair.
      beta: strength of the pull to the reference, above 0.

    Returns:
      LossOutput: as `dpo`; metrics also consistency.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    check_shape(h_w.shape, consistency=consistency)
    valid = has_tokens(policy_chosen, policy_rejected)
    check_values_in(0.0, 1.0, where=valid, consistency=consistency)
    consistency = jax.lax.stop_gradient(jnp.asarray(consistency, jnp.float32))
    loss = smoothed_preference(beta * (h_w - h_l), consistency)
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l, consistency=consistency)


def ranking_consistency(scores: jax.Array, previous_scores: jax.Array) -> jax.Array:
    """Agreement of two rankings of the same K responses: (tau + 1) / 2 with Kendall's tau (arXiv:2410.12735).

    Equal scores rank in their order, as in the authors' code, so that tau always exists.

    Args:
      scores: [..., K] rewards of the current model, such as its log-ratios to the reference.
      previous_scores: [..., K] of the one before.

    Returns:
      float32 [...], in [0, 1].

    Raises:
      ValueError: shapes disagree or K < 2.
    """
    scores, previous_scores = jnp.asarray(scores), jnp.asarray(previous_scores)
    if scores.shape != previous_scores.shape or scores.ndim < 1 or scores.shape[-1] < 2:
        raise ValueError(
            f"scores and previous_scores must be [..., K] with K >= 2, got {scores.shape} and {previous_scores.shape}"
        )

    def signs(x: jax.Array) -> jax.Array:
        rank = jnp.argsort(jnp.argsort(x, axis=-1, stable=True), axis=-1)
        return jnp.sign(rank[..., :, None] - rank[..., None, :])

    number = scores.shape[-1] * (scores.shape[-1] - 1)
    tau = jnp.sum(signs(scores) * signs(previous_scores), axis=(-2, -1)) / number
    return (tau.astype(jnp.float32) + 1.0) / 2.0


@register("gpo", category="preference", papers=("2410.02197",), proof=PROOF)
def gpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    score_chosen: jax.Array,
    score_rejected: jax.Array,
    *,
    beta: float = 1e-3,
) -> LossOutput:
    """Log-ratios regress on preference scores against the policy itself (GPO, arXiv:2410.02197, equation 5.3).

      loss = (h_w - score_w / beta)^2 + (h_l - score_l / beta)^2,   score_i = mean_j S(y_i, y_j)

    S is `general_preference_score`, the mean is over all samples of the prompt, drawn from the reference, which is the
    previous iterate. The log of the normaliser is taken for 0, as in the paper. The authors' code
    (general-preference/general-preference-model) has the default beta and, as score, the mean of
    (S(y_i, y_j) - S(y_j, y_i)) / temperature over all samples, y_i included, with a temperature of 0.1: twenty times
    the score above, a factor that beta can take up.

    Args:
      score_chosen: [B], mean score against the samples of the prompt.
      score_rejected: [B], likewise.
      beta: above 0; 1 / beta is the step of the policy along the score.

    Returns:
      LossOutput: as `dpo`.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    check_shape(h_w.shape, score_chosen=score_chosen, score_rejected=score_rejected)
    score_chosen, score_rejected = jax.lax.stop_gradient((jnp.float32(score_chosen), jnp.float32(score_rejected)))
    loss = jnp.square(h_w - score_chosen / beta) + jnp.square(h_l - score_rejected / beta)
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l)


@register("reward_distillation", category="preference", papers=("2405.19316",), proof=PROOF)
def reward_distillation(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    score_chosen: jax.Array,
    score_rejected: jax.Array,
    *,
    beta: float = 0.1,
    pessimism: float = 0.0,
) -> LossOutput:
    """Distillation of reward models into the policy's own reward (d-DPO, e-DPO, arXiv:2405.19316).

      loss = min_k sum_b (score_w - score_l - beta d)^2_bk - gamma sum_b (h_w + h_l) / 2,   gamma = pessimism

    The second term estimates KL(reference || policy), if the responses are samples of the reference; with several
    reward models it chooses the policy nearest to the reference among those that fit one of them. That the minimum is
    over the sums of the batch that is given, and not over each pair, is a choice of this project, as is beta: the paper
    is cited for the squared error, the family and the forward divergence. Parts of a batch may choose another model
    each.

    Args:
      score_chosen: [B] of one reward model or [B, K] of K.
      score_rejected: likewise.
      beta: strength of the pull to the reference, above 0.
      pessimism: gamma, at least 0.

    Returns:
      LossOutput: as `dpo`; metrics also squared_error and kl (-(h_w + h_l) / 2).
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    check_range(0.0, float("inf"), pessimism=pessimism)
    score_chosen, score_rejected = jnp.float32(score_chosen), jnp.float32(score_rejected)
    if score_chosen.ndim == 2:
        check_shape((*h_w.shape, score_chosen.shape[1]), score_chosen=score_chosen, score_rejected=score_rejected)
    else:
        check_shape(h_w.shape, score_chosen=score_chosen, score_rejected=score_rejected)
    gap = jax.lax.stop_gradient(score_chosen - score_rejected).reshape(*h_w.shape, -1)
    error = jnp.square(gap - beta * (h_w - h_l)[:, None])
    valid = (policy_chosen.count > 0) & (policy_rejected.count > 0)
    best = jnp.argmin(jnp.sum(jnp.where(valid[:, None], error, 0.0), axis=0))
    error, kl = error[:, best], -0.5 * (h_w + h_l)
    loss = error + pessimism * kl
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l, squared_error=error, kl=kl)


@register("pessimistic_dpo", category="preference", papers=("2405.19316",), proof=PROOF)
def pessimistic_dpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
    pessimism: float = 1e-3,
) -> LossOutput:
    """DPO held to its reference by the divergence that DPO alone does not bound (p-DPO, arXiv:2405.19316).

      loss = sp(-beta d) - gamma (h_w + h_l) / 2,   gamma = pessimism

    The second term estimates KL(reference || policy), if the responses are samples of the reference.

    Args:
      beta: strength of the pull to the reference, above 0.
      pessimism: gamma, at least 0; this default and that of beta are ours.

    Returns:
      LossOutput: as `dpo`; metrics also kl (-(h_w + h_l) / 2).
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    check_range(0.0, float("inf"), pessimism=pessimism)
    kl = -0.5 * (h_w + h_l)
    loss = jax.nn.softplus(-beta * (h_w - h_l)) + pessimism * kl
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l, kl=kl)

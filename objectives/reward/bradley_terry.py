"""Reward models trained on comparisons and ratings: functions of scalar scores.

r is the score of a response, read at its last token; w the chosen, l the rejected response; sp the softplus. `mask`,
where there is one, is 0 at padding, which takes no part and whose scores must be finite.
"""

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range, check_shape, check_values_among, check_values_in
from objectives.output import LossOutput, reduce_examples
from objectives.preference.dpo import smoothed_preference
from objectives.registry import register
from objectives.ties import outcome_log_probabilities

PROOF = "test_reward.py::test_is_its_definition"


def valid_rows(mask: jax.Array | None, size: int) -> jax.Array:
    """bool[size] of an optional mask."""
    if mask is None:
        return jnp.ones((size,), bool)
    check_shape((size,), mask=mask)
    return jnp.asarray(mask) != 0


def check_scores(**scores: jax.Array) -> int:
    """The common length of score vectors; ValueError if they are none."""
    (name, first), *_ = scores.items()
    if jnp.ndim(first) != 1:
        raise ValueError(f"{name} must be [B], one score per response, got {jnp.shape(first)}")
    check_shape(jnp.shape(first), **scores)
    return jnp.shape(first)[0]


@register("bradley_terry", category="reward", papers=("2203.02155", "2307.09288", "2409.13156"), proof=PROOF)
def bradley_terry(
    score_chosen: jax.Array,
    score_rejected: jax.Array,
    margin: jax.Array | None = None,
    label: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    centring: float = 0.0,
) -> LossOutput:
    """Bradley-Terry loss of a reward model, with optional margins, soft labels and centring.

      x = r_w - r_l - margin,   loss = p sp(-x) + (1 - p) sp(x) + c (r_w + r_l)^2,   p = label, c = centring

    Margins are those of arXiv:2307.09288, equation 2; the centring term is that of arXiv:2312.09244, with 0.01 a usual
    coefficient. A label of 1/2 is the tie of arXiv:2409.13156; margin-dependent labels sigma(score difference) those of
    arXiv:2410.03145.

    Args:
      score_chosen: float[B].
      score_rejected: float[B].
      margin: [B], by which the chosen score should lead. None: 0.
      label: [B], probability that the chosen response is the better one. None: 1.
      mask: [B], 0 at padding.
      centring: c, at least 0.

    Returns:
      LossOutput: weight = number of pairs; metrics accuracy (r_w > r_l), margin (r_w - r_l), score and score_squared
      (means over both responses, for mean and spread).

    Raises:
      ValueError: shapes disagree, or an option or, outside of traced functions, a label is out of range.
    """
    size = check_scores(score_chosen=score_chosen, score_rejected=score_rejected)
    check_range(0.0, float("inf"), centring=centring)
    r_w, r_l = jnp.float32(score_chosen), jnp.float32(score_rejected)
    x, label = r_w - r_l, jnp.ones((size,)) if label is None else label
    if margin is not None:
        check_shape((size,), margin=margin)
        x = x - margin
    check_shape((size,), label=label)
    check_values_in(0.0, 1.0, where=valid_rows(mask, size), label=label)
    loss = smoothed_preference(x, jax.lax.stop_gradient(jnp.float32(label))) + centring * jnp.square(r_w + r_l)
    metrics = {
        "accuracy": (r_w > r_l).astype(jnp.float32),
        "margin": r_w - r_l,
        "score": 0.5 * (r_w + r_l),
        "score_squared": 0.5 * (jnp.square(r_w) + jnp.square(r_l)),
    }
    return reduce_examples(loss, valid_rows(mask, size), metrics)


@register("bradley_terry_ranking", category="reward", papers=("2203.02155",), proof=PROOF)
def bradley_terry_ranking(scores: jax.Array, mask: jax.Array | None = None) -> LossOutput:
    """Bradley-Terry loss of ranked responses: the mean over all pairs of a prompt (arXiv:2203.02155, equation 1).

      loss = sum_b mean_{i < j} sp(-(r_bi - r_bj)),   response i ranked before j

    Args:
      scores: float[B, K], the best response first.
      mask: [B, K], 0 where a prompt has fewer responses. A prompt with fewer than two takes no part.

    Returns:
      LossOutput: weight = number of prompts; metric accuracy, the share of pairs in order.

    Raises:
      ValueError: shapes disagree or K < 2.
    """
    if jnp.ndim(scores) != 2 or jnp.shape(scores)[1] < 2:
        raise ValueError(f"scores must be [B, K] with K >= 2, got {jnp.shape(scores)}")
    r = jnp.float32(scores)
    counted = jnp.ones(r.shape, bool) if mask is None else jnp.asarray(mask) != 0
    check_shape(r.shape, mask=counted)
    valid = counted[:, :, None] & counted[:, None, :] & jnp.triu(jnp.ones(r.shape[1:] * 2, bool), k=1)
    number = jnp.sum(valid, axis=(1, 2))
    margin = r[:, :, None] - r[:, None, :]

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid, x, 0.0), axis=(1, 2)) / jnp.maximum(number, 1)

    accuracy = mean((margin > 0).astype(jnp.float32))
    return reduce_examples(mean(jax.nn.softplus(-margin)), number > 0, {"accuracy": accuracy})


@register("bradley_terry_ties", category="reward", papers=("2411.02442",), proof=PROOF)
def bradley_terry_ties(
    score_first: jax.Array,
    score_second: jax.Array,
    outcome: jax.Array,
    mask: jax.Array | None = None,
    *,
    tie_width: float = 0.5,
) -> LossOutput:
    """Negative log-likelihood of wins, ties and losses (arXiv:2411.02442; probabilities in `objectives.ties`).

    Args:
      score_first: float[B].
      score_second: float[B].
      outcome: int[B], 1 if the first response is better, 0 for a tie, -1 if the second is.
      mask: [B], 0 at padding.
      tie_width: above 0.

    Returns:
      LossOutput: weight = number of pairs; metrics accuracy (of the most probable outcome) and margin.

    Raises:
      ValueError: shapes disagree, the width is not above 0 or, outside of traced functions, there is another outcome.
    """
    size = check_scores(score_first=score_first, score_second=score_second)
    check_positive(tie_width=tie_width)
    check_shape((size,), outcome=outcome)
    check_values_among((-1, 0, 1), where=valid_rows(mask, size), outcome=outcome)
    x, index = jnp.float32(score_first) - score_second, 1 - jnp.asarray(outcome, jnp.int32)
    log_p = outcome_log_probabilities(x, tie_width)
    loss = -jnp.take_along_axis(log_p, index[:, None], axis=-1)[:, 0]
    loss = jnp.where((index >= 0) & (index <= 2), loss, jnp.nan)  # not that of another outcome, where traced
    accuracy = (jnp.argmax(log_p, axis=-1) == index).astype(jnp.float32)
    return reduce_examples(loss, valid_rows(mask, size), {"accuracy": accuracy, "margin": x})


@register("multi_attribute", category="reward", papers=("2311.09528", "2310.05344"), proof=PROOF)
def multi_attribute(predictions: jax.Array, ratings: jax.Array, observed: jax.Array | None = None) -> LossOutput:
    """Regression on ratings of several attributes of which some may be missing (HelpSteer, arXiv:2311.09528).

      loss = sum_ba o_ba (prediction_ba - rating_ba)^2

    A scalar reward is a fixed weighted sum of the predictions. The loss is that of the regression reward models of
    NeMo-Aligner, the library of HelpSteer's authors.

    Args:
      predictions: float[B, A].
      ratings: float[B, A] on any scale (HelpSteer: 0 to 4); where not observed they may be any number, NaN included.
      observed: [B, A], o, 1 where there is a rating. None: everywhere.

    Returns:
      LossOutput: weight = number of ratings; metric absolute_error.

    Raises:
      ValueError: shapes disagree.
    """
    if jnp.ndim(predictions) != 2:
        raise ValueError(f"predictions must be [B, A], got {jnp.shape(predictions)}")
    check_shape(jnp.shape(predictions), ratings=ratings)
    counted = jnp.ones(jnp.shape(predictions), bool) if observed is None else jnp.asarray(observed) != 0
    check_shape(jnp.shape(predictions), observed=counted)
    error = jnp.float32(predictions) - jnp.where(counted, jnp.float32(ratings), 0.0)
    return reduce_examples(jnp.square(error), counted, {"absolute_error": jnp.abs(error)})


@register("binary_principle", category="reward", papers=("2509.21319",), proof=PROOF)
def binary_principle(
    logp_yes: jax.Array, logp_no: jax.Array, label: jax.Array, mask: jax.Array | None = None
) -> LossOutput:
    """Whether a response satisfies a principle, as cross entropy of the next token (RLBFF, arXiv:2509.21319).

      loss = -(y logp_yes + (1 - y) logp_no),   reward = logp_yes - logp_no

    A question after the response names the principle. The reward is the paper's, whose scalar reward model learns to
    answer in one token, Yes or No (confirmed against accounts of the paper, not its text). That it learns by the plain
    cross entropy of that token, and labels between 0 and 1, are this project's.

    Args:
      logp_yes: float[B], log-probability over the whole vocabulary of the token that says yes.
      logp_no: float[B], likewise.
      label: [B], y in [0, 1], 1 if the principle holds, else 0.
      mask: [B], 0 at padding.

    Returns:
      LossOutput: weight = number of responses; metrics reward and accuracy (of reward > 0 for y > 1/2).

    Raises:
      ValueError: shapes disagree or, outside of traced functions, a label is out of range.
    """
    size = check_scores(logp_yes=logp_yes, logp_no=logp_no)
    check_shape((size,), label=label)
    check_values_in(0.0, 1.0, where=valid_rows(mask, size), label=label)
    yes, no, y = jnp.float32(logp_yes), jnp.float32(logp_no), jnp.float32(label)
    accuracy = ((yes > no) == (y > 0.5)).astype(jnp.float32)
    metrics = {"reward": yes - no, "accuracy": accuracy}
    return reduce_examples(-(y * yes + (1.0 - y) * no), valid_rows(mask, size), metrics)

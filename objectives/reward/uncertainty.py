"""What a model knows of its own answers: tuning, calibration, second-order prediction, change under compression."""

import flax.struct
import jax
import jax.numpy as jnp

from objectives.checks import check_range, check_shape, check_statistics, check_values_among, check_values_in
from objectives.output import LossOutput, reduce_examples
from objectives.registry import register
from objectives.reward.bradley_terry import valid_rows
from objectives.statistics import LogProbs, is_concrete

PROOF = "test_uncertainty.py::test_is_its_definition"


def jensen_shannon(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Half the divergences of both distributions from their mean, over the last axis.

    Args:
      log_p: [..., Z] log-probabilities, -inf allowed.
      log_q: likewise.
    """
    # log m where either is possible; where neither is, both terms are 0.
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)

    def term(log_x: jax.Array) -> jax.Array:
        possible = log_x > -jnp.inf
        ratio = jnp.where(possible, log_x, 0.0) - jnp.where(possible, log_m, 0.0)
        return jnp.sum(jnp.where(possible, jnp.exp(log_x) * ratio, 0.0), axis=-1)

    return 0.5 * (term(log_p) + term(log_q))


@register("uncertainty_tuning", category="reward", papers=("2406.08391",), proof=PROOF)
def uncertainty_tuning(
    option_logits: jax.Array,
    correct: jax.Array,
    logits: jax.Array | None = None,
    base_logits: jax.Array | None = None,
    loss_mask: jax.Array | None = None,
    *,
    divergence_weight: float = 0.0,
) -> LossOutput:
    """A model learns to say whether its answer is right, and stays otherwise as it was (arXiv:2406.08391).

      loss = sum_b [ CE(softmax(option_logits_b), correct_b) + kappa sum_t mask_bt JSD(p_bt, base_bt) ]

    As in the authors' code, whose kappa is 0 unless set and 1 in the paper's runs.

    Args:
      option_logits: float[B, 2], logits of the tokens for (no, yes) after the question whether the answer is right.
      correct: int[B], 1 if it is.
      logits: float[B, T, Z] at the tokens of the answer; with base_logits and loss_mask, or none of them.
      base_logits: likewise, of the model before tuning; gets no gradient.
      loss_mask: [B, T], 1 at tokens of the answer.
      divergence_weight: kappa, at least 0.

    Returns:
      LossOutput: weight = B; metrics nll, accuracy, brier (squared error of P(yes)), and divergence.

    Raises:
      ValueError: shapes disagree, an option is out of range, or a divergence is asked for without its logits.
    """
    if jnp.ndim(option_logits) != 2 or jnp.shape(option_logits)[1] != 2:
        raise ValueError(f"option_logits must be [B, 2], (no, yes), got {jnp.shape(option_logits)}")
    size = jnp.shape(option_logits)[0]
    check_shape((size,), correct=correct)
    check_values_among((0, 1), correct=correct)
    check_range(0.0, float("inf"), divergence_weight=divergence_weight)
    option_logits = jnp.float32(option_logits)
    x, y = option_logits[:, 1] - option_logits[:, 0], jnp.float32(correct)
    nll = jax.nn.softplus(jnp.where(y > 0.5, -x, x))
    if logits is not None and base_logits is not None and loss_mask is not None:
        check_shape(logits.shape, base_logits=base_logits)
        check_shape(logits.shape[:-1], loss_mask=loss_mask)
        counted = jnp.asarray(loss_mask) != 0

        def log_probabilities(z: jax.Array) -> jax.Array:
            return jax.nn.log_softmax(jnp.where(counted[..., None], jnp.float32(z), 0.0), axis=-1)

        base = jax.lax.stop_gradient(log_probabilities(base_logits))
        by_token = jensen_shannon(log_probabilities(logits), base)
        divergence = jnp.sum(jnp.where(counted, by_token, 0.0), axis=-1)
    elif logits is None and base_logits is None and loss_mask is None:
        if not (is_concrete(divergence_weight) and divergence_weight == 0):
            raise ValueError(f"divergence_weight={divergence_weight} needs logits, base_logits and loss_mask")
        divergence = jnp.zeros((size,))
    else:
        raise ValueError("logits, base_logits and loss_mask go together: all or none")
    metrics = {
        "nll": nll,
        "accuracy": ((x > 0) == (y > 0.5)).astype(jnp.float32),
        "brier": jnp.square(jax.nn.sigmoid(x) - y),
        "divergence": divergence,
    }
    return reduce_examples(nll + divergence_weight * divergence, jnp.ones((size,), bool), metrics)


@flax.struct.dataclass
class CalibrationBins:
    """Sums by bin of confidence; those of parts of a data set add up, leaf by leaf.

    Attributes:
      count: float32[N], number of answers.
      confidence: float32[N], summed confidence.
      correct: float32[N], number of right answers.
      squared_error: float32 scalar, summed (confidence - correct)^2.
    """

    count: jax.Array
    confidence: jax.Array
    correct: jax.Array
    squared_error: jax.Array

    @property
    def expected_calibration_error(self) -> jax.Array:
        """sum_n |confidence_n - correct_n| / number of answers."""
        return jnp.sum(jnp.abs(self.confidence - self.correct)) / jnp.maximum(jnp.sum(self.count), 1.0)

    @property
    def brier_score(self) -> jax.Array:
        """Mean squared error of the confidence."""
        return self.squared_error / jnp.maximum(jnp.sum(self.count), 1.0)


def calibration_bins(
    confidence: jax.Array, correct: jax.Array, mask: jax.Array | None = None, *, bins: int = 15
) -> CalibrationBins:
    """Answers in bins of equal width, ((n - 1) / N, n / N], the first with its lower end.

    Args:
      confidence: [B], in [0, 1].
      correct: [B], 1 if the answer is right, else 0.
      mask: [B], 0 at padding.
      bins: N, at least 1.

    Raises:
      ValueError: shapes disagree, bins is below 1 or, outside of traced functions, a number is out of range.
    """
    if jnp.ndim(confidence) != 1:
        raise ValueError(f"confidence must be [B], got {jnp.shape(confidence)}")
    check_shape(jnp.shape(confidence), correct=correct)
    if bins < 1:
        raise ValueError(f"bins must be 1 at least, got {bins}")
    valid = valid_rows(mask, jnp.shape(confidence)[0])
    check_values_in(0.0, 1.0, where=valid, confidence=confidence)
    check_values_among((0, 1), where=valid, correct=correct)
    confidence, correct = jnp.float32(confidence), jnp.float32(correct)
    index = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    member = (index[:, None] == jnp.arange(bins)) & valid[:, None]

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(member, x[:, None], 0.0), axis=0)

    error = jnp.sum(jnp.where(valid, jnp.square(confidence - correct), 0.0))
    return CalibrationBins(total(jnp.ones_like(confidence)), total(confidence), total(correct), error)


def auroc(confidence: jax.Array, correct: jax.Array) -> jax.Array:
    """Probability that a right answer has more confidence than a wrong one, ties counting half; float32.

    NaN where all answers are right or all wrong.

    Args:
      confidence: [B].
      correct: [B], 1 if the answer is right, else 0.
    """
    if jnp.ndim(confidence) != 1:
        raise ValueError(f"confidence must be [B], got {jnp.shape(confidence)}")
    check_shape(jnp.shape(confidence), correct=correct)
    right = jnp.asarray(correct) != 0
    number, others = jnp.sum(right, dtype=jnp.float32), jnp.sum(~right, dtype=jnp.float32)
    ranks = jax.scipy.stats.rankdata(jnp.asarray(confidence)).astype(jnp.float32)
    return (jnp.sum(jnp.where(right, ranks, 0.0)) / number - (number + 1.0) / 2.0) / others


@register("paired_prediction", category="reward", papers=("2402.08733",), proof=PROOF)
def paired_prediction(first: LogProbs, second: LogProbs) -> LossOutput:
    """Two independent answers to one question, predicted one after the other (arXiv:2402.08733).

      loss = -log p(y_1 | x) - log p(y_2 | x, y_1)

    The cross entropy of pairs of the paper's section 3, in factors. A model that knows the answers' distribution has
    nothing to learn from y_1; see `epistemic_covariance`.

    Args:
      first: of y_1 after the question.
      second: of y_2 after the question and y_1.

    Returns:
      LossOutput: weight = number of questions; metrics nll_first, nll_second.

    Raises:
      ValueError: numbers of responses disagree.
    """
    check_statistics(first=first, second=second)
    valid = (first.count > 0) & (second.count > 0)
    metrics = {"nll_first": -first.sum, "nll_second": -second.sum}
    return reduce_examples(-(first.sum + second.sum), valid, metrics)


def epistemic_covariance(first: jax.Array, second: jax.Array) -> jax.Array:
    """Covariance of what the model does not know: p(a | x) [p(b | x, a) - p(b | x)] (arXiv:2402.08733).

    For a calibrated pair predictor this is the covariance of p(a | x) and p(b | x) over the questions that it cannot
    tell apart: the pair covariance of the paper's section 3, with p(b | x) for both answers. The diagonal is the
    variance of p(a | x) of its section 4; a model may give negative ones.

    Args:
      first: [..., A], p(a | x).
      second: [..., A, A], p(b | x, a), b last.

    Returns:
      float32 [..., A, A].
    """
    first, second = jnp.float32(first), jnp.float32(second)
    check_shape((*first.shape, first.shape[-1]), second=second)
    return first[..., :, None] * (second - first[..., None, :])


@register("compression_distance", category="reward", papers=("2407.09141",), proof=PROOF)
def compression_distance(
    base_logits: jax.Array, logits: jax.Array, answers: jax.Array, mask: jax.Array | None = None
) -> LossOutput:
    """How far a changed model is from the one it was made of, beyond its accuracy (arXiv:2407.09141).

      loss = sum_b KL(softmax(base_logits_b) || softmax(logits_b))

    Args:
      base_logits: float[B, A] over options of an answer, or over a vocabulary; gets no gradient.
      logits: float[B, A] of the changed model.
      answers: int[B], index of the right one.
      mask: [B], 0 at padding.

    Returns:
      LossOutput: weight = number of questions; metrics flips (right becomes wrong or wrong right), all_flips (another
      answer), accuracy and base_accuracy.

    Raises:
      ValueError: shapes disagree.
    """
    if jnp.ndim(logits) != 2:
        raise ValueError(f"logits must be [B, A], got {jnp.shape(logits)}")
    check_shape(jnp.shape(logits), base_logits=base_logits)
    check_shape(jnp.shape(logits)[:1], answers=answers)
    check_values_in(0, logits.shape[1] - 1, where=valid_rows(mask, logits.shape[0]), answers=answers)
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(jnp.float32(base_logits), axis=-1))
    log_q = jax.nn.log_softmax(jnp.float32(logits), axis=-1)
    kl = jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=-1)
    base, new = jnp.argmax(log_p, axis=-1), jnp.argmax(log_q, axis=-1)
    metrics = {
        "flips": (base == answers) != (new == answers),
        "all_flips": base != new,
        "accuracy": new == answers,
        "base_accuracy": base == answers,
    }
    metrics = {name: x.astype(jnp.float32) for name, x in metrics.items()}
    return reduce_examples(kl, valid_rows(mask, kl.shape[0]), metrics)

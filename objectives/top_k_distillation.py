"""Distillation from what is kept of a teacher: its likeliest tokens and their probabilities."""

import jax
import jax.numpy as jnp

from objectives.checks import check_shape, check_values_in
from objectives.numerics import log1mexp
from objectives.output import LossOutput
from objectives.registry import register
from zoo.core.registry import check_choice

RESTS = ("bucket", "renormalise")
LEAST_REST = 1e-6  # of probability: less than this is the rounding of what the others sum to


@register(
    "top_k_distillation",
    category="distillation",
    papers=("1503.02531",),
    proof="test_top_k_distillation.py::test_is_its_definition",
)
def top_k_distillation(
    logits: jax.Array,
    teacher_tokens: jax.Array,
    teacher_logps: jax.Array,
    loss_mask: jax.Array,
    *,
    rest: str = "bucket",
) -> LossOutput:
    """Divergence of a student from the K likeliest tokens of its teacher (arXiv:1503.02531, cut to K classes).

    With p the teacher's probabilities of its tokens z_1 .. z_K, q the student's, and p_0, q_0 those of all others:

      bucket       loss = sum_bt mask_bt sum_{k = 0 .. K} p_k (log p_k - log q_k), all others as one class
      renormalise  loss = sum_bt mask_bt sum_{k = 1 .. K} p_k / (1 - p_0) (log (p_k / (1 - p_0)) - log q_k)

    The first is at most the divergence over the whole vocabulary, and that where K is its size; the second asks for no
    other tokens at all. At a temperature of 1; a teacher's log-probabilities at another take the student's logits over
    the same temperature. What is kept are 2 K numbers a token.

    Args:
      logits: float[B, T, Z] of the student.
      teacher_tokens: int[B, T, K], z, different from each other.
      teacher_logps: float[B, T, K], log p of them under all Z classes; no gradient.
      loss_mask: [B, T], weight of each position; 0 leaves it out, whatever the others hold.
      rest: bucket or renormalise.

    Returns:
      LossOutput: weight = sum of the mask; metrics kl (the loss) and covered (1 - p_0).

    Raises:
      ValueError: shapes disagree or another rest; outside of traced functions also a counted token outside [0, Z).
    """
    check_choice("rest", rest, RESTS)
    check_shape(logits.shape[:-1], loss_mask=loss_mask)
    if teacher_tokens.ndim != 3 or not teacher_tokens.shape[-1]:
        raise ValueError(f"teacher_tokens must be [B, T, K] with K >= 1, got {teacher_tokens.shape}")
    check_shape(
        (*logits.shape[:-1], teacher_tokens.shape[-1]), teacher_tokens=teacher_tokens, teacher_logps=teacher_logps
    )
    mask = loss_mask.astype(jnp.float32)
    counted = (mask != 0)[..., None]
    check_values_in(0, logits.shape[-1] - 1, where=mask != 0, teacher_tokens=teacher_tokens)
    tokens = jnp.where(counted, teacher_tokens, 0)
    log_p = jax.lax.stop_gradient(
        jnp.where(counted, teacher_logps.astype(jnp.float32), -jnp.log(2.0 * tokens.shape[-1]))
    )
    logits = jnp.where(counted, logits.astype(jnp.float32), 0.0)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    log_q = jnp.take_along_axis(logits, tokens, axis=-1) - log_z[..., None]
    log_q = jnp.where((tokens >= 0) & (tokens < logits.shape[-1]), log_q, jnp.nan)
    log_covered = jax.nn.logsumexp(log_p, axis=-1)
    covered = jnp.minimum(jnp.exp(log_covered), 1.0)
    if rest == "renormalise":
        log_p = log_p - log_covered[..., None]
    p = jnp.exp(log_p)
    kl = jnp.sum(jnp.where(p > 0, p * (jnp.where(p > 0, log_p, 0.0) - log_q), 0.0), axis=-1)
    if rest == "bucket" and tokens.shape[-1] < logits.shape[-1]:
        others = jnp.put_along_axis(jnp.zeros(logits.shape, bool), tokens, True, axis=-1, inplace=False)
        some = covered <= 1.0 - LEAST_REST
        log_rest = log1mexp(jnp.where(some, log_covered, -1.0))
        log_q_rest = jax.nn.logsumexp(jnp.where(others & some[..., None], -jnp.inf, logits), axis=-1) - log_z
        kl = kl + jnp.where(some, jnp.exp(log_rest) * (log_rest - log_q_rest), 0.0)
    loss = jnp.sum(jnp.where(mask != 0, mask * kl, 0.0))
    metrics = {"kl": loss, "covered": jnp.sum(mask * covered)}
    return LossOutput(loss, jnp.sum(mask), jax.lax.stop_gradient(metrics))

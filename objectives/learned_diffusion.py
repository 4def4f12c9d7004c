"""Masked diffusion whose schedule depends on the token and is learnt (GenMD4, arXiv:2406.04329, section 6).

Token v is still clean at time t with probability alpha_v(t) = 1 - t^p_v, with a power p_v > 0 per class of the
vocabulary. Powers of 1 everywhere are the linear schedule of `objectives.diffusion`.
"""

import math

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range, check_shape, check_values_in
from objectives.diffusion import ABOVE_ZERO, LEAST_TIME
from objectives.numerics import log1mexp
from objectives.output import LossOutput
from objectives.registry import register
from objectives.statistics import check_targets


def mask_tokens_by_class(
    key: jax.Array,
    tokens: jax.Array,
    times: jax.Array,
    mask_token: int,
    powers: jax.Array,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Tokens at time t of the noising process: token v becomes the mask token with probability t^p_v.

    Args:
      key: random key.
      tokens: int[B, T], each in [0, Z).
      times: float[B].
      mask_token: id.
      powers: p, float[Z].
      valid: bool[B, T]; what is not valid (padding, a prompt) stays. None = all.

    Returns:
      (int[B, T] tokens, bool[B, T] which were masked).

    Raises:
      ValueError: shapes disagree.
    """
    check_shape(tokens.shape[:1], times=times)
    masked = jax.random.uniform(key, tokens.shape) < times[:, None] ** powers[jnp.clip(tokens, 0, powers.shape[0] - 1)]
    if valid is not None:
        check_shape(tokens.shape, valid=valid)
        masked &= valid != 0
    return jnp.where(masked, mask_token, tokens), masked


@register(
    "learned_masked_diffusion",
    category="diffusion",
    papers=("2406.04329",),
    proof="test_learned_diffusion.py::test_is_its_definition",
)
def learned_masked_diffusion(
    logits: jax.Array,
    logits_again: jax.Array,
    targets: jax.Array,
    masked: jax.Array,
    masked_again: jax.Array,
    times: jax.Array,
    powers: jax.Array,
    valid: jax.Array | None = None,
    *,
    least_time: float = LEAST_TIME,
) -> LossOutput:
    """Bound of masked diffusion with a schedule per token (GenMD4), from two noised copies at the same times.

    With mu = softmax(logits), k the target, and l the sum over the masked tokens of a row of

      sum_v (p_v / t) mu_v - (p_k / t) (1 + log mu_k)

    for each copy, and q its probability of being masked as it was,

      loss_b = (l_b + l'_b) / 2 + sum_i t0^p_k (log sum_v t0^p_v - p_k log t0),   t0 = least_time

    whose last term is the part of the bound before t0: masked tokens there are taken to be of class v with probability
    in proportion to t0^p_v. As in the authors' code, times are uniform in [t0, 1) (`objectives.diffusion.draw_times`)
    and the integral over them is not scaled by its length, 1 - t0.

    Beside the gradient through that, the powers get the one through the noise, by REINFORCE with each copy as the
    other's baseline (leave-one-out; section 6):

      (l - l') / 2 (d log q - d log q')

    The value of loss_sum is the bound itself, without this term.

    Args:
      logits: float[B, T, Z] of a model that sees the first copy of `mask_tokens_by_class`; no class is the mask token.
      logits_again: of the second copy.
      targets: int[B, T], the clean tokens.
      masked: [B, T], 1 where the first copy is masked.
      masked_again: of the second.
      times: t, float[B], in [least_time, 1).
      powers: p, float[Z], above 0; it gets a gradient.
      valid: [B, T], 1 at the tokens that the bound is of; None = all.
      least_time: t0, above 0.

    Returns:
      LossOutput: weight = number of valid tokens; metrics diffusion, first (both sums), masked (mean of the copies).

    Raises:
      ValueError: shapes disagree, least_time is out of range, or, outside of traced functions, a power, a
        time or a target is.
    """
    check_shape(logits.shape, logits_again=logits_again)
    check_shape(logits.shape[:-1], targets=targets, masked=masked, masked_again=masked_again)
    check_shape(logits.shape[:1], times=times)
    check_shape(logits.shape[-1:], powers=powers)
    check_positive(least_time=least_time)
    check_range(0.0, 1.0, open_high=True, least_time=least_time)
    check_values_in(ABOVE_ZERO, math.inf, powers=powers)
    if valid is None:
        valid = jnp.ones(targets.shape, bool)
    check_shape(targets.shape, valid=valid)
    check_targets(targets, valid, powers.shape[0])
    check_values_in(least_time, 1.0, where=jnp.any(valid != 0, axis=-1), times=times)
    valid, powers = valid != 0, powers.astype(jnp.float32)
    times = times.astype(jnp.float32)[:, None]
    known = (targets >= 0) & (targets < powers.shape[0])
    labels = jnp.where(valid & known, targets, 0)
    own = powers[labels]
    log_masked = own * jnp.log(times)

    def copy(logits, masked):
        """(l, log q) of each row."""
        hidden = (masked != 0) & valid
        logs = jax.nn.log_softmax(jnp.where(hidden[..., None], logits.astype(jnp.float32), 0.0), axis=-1)
        log_own = jnp.take_along_axis(logs, labels[..., None], axis=-1)[..., 0]
        term = (jnp.exp(logs) @ powers - own * (1.0 + log_own)) / times
        term = jnp.where(known, term, jnp.nan)
        clean = log1mexp(jnp.where(hidden, -1.0, log_masked))  # of a masked token it may be infinite, and unused
        log_q = jnp.where(hidden, log_masked, clean)
        return (jnp.sum(jnp.where(mask, x, 0.0), axis=-1) for mask, x in ((hidden, term), (valid, log_q)))

    (one, log_q), (two, log_q_again) = copy(logits, masked), copy(logits_again, masked_again)
    score = 0.5 * jax.lax.stop_gradient(one - two) * (log_q - log_q_again)
    log_least = jnp.log(jnp.asarray(least_time, jnp.float32))
    log_first = own * log_least
    first = jnp.exp(log_first) * (jax.nn.logsumexp(powers * log_least) - log_first)
    first = jnp.sum(jnp.where(valid, first, 0.0))
    diffusion = jnp.sum(0.5 * (one + two))
    number = 0.5 * jnp.sum(((masked != 0) & valid).astype(jnp.float32) + ((masked_again != 0) & valid))
    metrics = {"diffusion": diffusion, "first": first, "masked": number}
    loss = diffusion + first + jnp.sum(score - jax.lax.stop_gradient(score))
    return LossOutput(loss, jnp.sum(valid, dtype=jnp.float32), jax.lax.stop_gradient(metrics))

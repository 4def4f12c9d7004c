"""Masked diffusion language models (MDLM, arXiv:2406.07524; MD4, arXiv:2406.04329): noise, times and the bound.

alpha(t) is the probability that a token is still clean at time t, from 1 at t = 0 to 0 at t = 1:

  linear      alpha = 1 - t                  w = 1 / t
  polynomial  alpha = 1 - t^p                w = p / t
  cosine      alpha = 1 - cos(pi/2 (1 - t))  w = pi/2 tan(pi/2 (1 - t))

with w(t) = -alpha'(t) / (1 - alpha(t)), the weight of a masked token's cross entropy in the bound. In S discrete steps
t is one of 1 / S, 2 / S, ... 1, all alike probable, and

  w = S (alpha(t - 1 / S) - alpha(t)) / (1 - alpha(t))
"""

import math

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range, check_shape, check_values_in
from objectives.output import LossOutput
from objectives.registry import register
from objectives.statistics import check_targets, token_logps
from zoo.core.registry import check_choice

SCHEDULES = ("linear", "polynomial", "cosine")
LEAST_TIME = 1e-3
ABOVE_ZERO = 1e-30  # the least number that counts as one


def _check_schedule(schedule: str, power: float) -> None:
    check_choice("schedule", schedule, SCHEDULES)
    check_positive(power=power)


def clean_probability(times: jax.Array, *, schedule: str = "linear", power: float = 2.0) -> jax.Array:
    """alpha(t), of the module's table.

    Args:
      times: float[...], in [0, 1].
      schedule: linear, polynomial or cosine.
      power: p of the polynomial, above 0.

    Raises:
      ValueError: an unknown schedule or a power that is not above 0.
    """
    _check_schedule(schedule, power)
    if schedule == "cosine":
        return 1.0 - jnp.cos(0.5 * jnp.pi * (1.0 - times))
    return 1.0 - (times if schedule == "linear" else times**power)


def bound_weight(
    times: jax.Array, *, schedule: str = "linear", power: float = 2.0, steps: int | None = None
) -> jax.Array:
    """w(t), of the module's table or of `steps` discrete steps; else as `clean_probability`, times above 0."""
    _check_schedule(schedule, power)
    if steps is not None:
        check_range(1, math.inf, steps=steps)
        before, now = (
            1.0 - clean_probability(t, schedule=schedule, power=power)
            for t in (jnp.maximum(times - 1.0 / steps, 0.0), times)
        )
        return steps * (now - before) / now
    if schedule == "cosine":
        return 0.5 * jnp.pi * jnp.tan(0.5 * jnp.pi * (1.0 - times))
    return (1.0 if schedule == "linear" else power) / times


def draw_times(key: jax.Array, batch: int, *, least: float = LEAST_TIME, steps: int | None = None) -> jax.Array:
    """float32 [batch] times in [least, 1), evenly spread: one uniform number shifts the grid i / batch.

    Each is uniformly distributed, and together they cover the interval, which lowers the variance of the bound
    (arXiv:2107.00630, appendix I). With `steps`, those of as many discrete steps, the last of which is 1; `least` is
    then of no meaning.
    """
    check_range(0.0, 1.0, open_high=True, least=least)
    shift = jax.random.uniform(key)
    spread = jnp.mod(shift + jnp.arange(batch, dtype=jnp.float32) / batch, 1.0)
    if steps is None:
        return least + (1.0 - least) * spread
    check_range(1, math.inf, steps=steps)
    return jnp.minimum(jnp.floor(spread * steps) + 1.0, steps) / steps


def mask_tokens(
    key: jax.Array,
    tokens: jax.Array,
    times: jax.Array,
    mask_token: int,
    valid: jax.Array | None = None,
    *,
    schedule: str = "linear",
    power: float = 2.0,
) -> tuple[jax.Array, jax.Array]:
    """Tokens at time t of the noising process: each becomes the mask token with probability 1 - alpha(t).

    Args:
      key: random key.
      tokens: int[B, T].
      times: float[B].
      mask_token: id.
      valid: bool[B, T]; what is not valid (padding, a prompt) stays. None = all.
      schedule: as `clean_probability`.
      power: likewise.

    Returns:
      (int[B, T] tokens, bool[B, T] which were masked).

    Raises:
      ValueError: shapes disagree, or as `clean_probability`.
    """
    check_shape(tokens.shape[:1], times=times)
    clean = clean_probability(times, schedule=schedule, power=power)
    masked = jax.random.uniform(key, tokens.shape) >= clean[:, None]
    if valid is not None:
        check_shape(tokens.shape, valid=valid)
        masked &= valid != 0
    return jnp.where(masked, mask_token, tokens), masked


@register(
    "masked_diffusion",
    category="diffusion",
    papers=("2406.07524", "2406.04329"),
    proof="test_diffusion.py::test_is_its_definition",
)
def masked_diffusion(
    logits: jax.Array,
    targets: jax.Array,
    masked: jax.Array,
    times: jax.Array,
    valid: jax.Array | None = None,
    *,
    mask_token: int | None = None,
    schedule: str = "linear",
    power: float = 2.0,
    steps: int | None = None,
) -> LossOutput:
    """Negative evidence lower bound of masked diffusion, one time per row (arXiv:2406.04329, equation 4).

      loss_b = w(t_b) sum_i masked_bi (-log mu_bi,target),   mu = softmax(logits) without the mask token

    Clean tokens are copied and add nothing. The logits stand at the tokens that they predict: nothing is shifted.

    Args:
      logits: float[B, T, Z], of a model that sees the tokens of `mask_tokens` in both directions.
      targets: int[B, T], the clean tokens.
      masked: [B, T], 1 where a token was masked.
      times: float[B], of the rows, above 0.
      valid: [B, T], 1 at the tokens that the bound is of, masked or not; None = all.
      mask_token: a class that is never predicted; None = the logits have none for it.
      schedule: as `clean_probability`.
      power: likewise.
      steps: number of discrete steps, whose times are those of `draw_times`. None = continuous time.

    Returns:
      LossOutput: weight = number of valid tokens, so that loss / weight is a bound in nats per token; metrics nll (of
      masked tokens, without w) and masked (their number).

    Raises:
      ValueError: shapes disagree or an option is out of range; outside of traced functions also a time, or the target
        of a masked token.
    """
    check_shape(logits.shape[:-1], targets=targets, masked=masked)
    check_shape(logits.shape[:1], times=times)
    weights = bound_weight(times.astype(jnp.float32), schedule=schedule, power=power, steps=steps)
    if mask_token is not None:
        check_range(0, logits.shape[-1], open_high=True, mask_token=mask_token)
        logits = jnp.where(jnp.arange(logits.shape[-1]) == mask_token, jnp.finfo(logits.dtype).min, logits)
    counted = masked != 0
    if valid is not None:
        check_shape(targets.shape, valid=valid)
        counted &= valid != 0
    check_targets(targets, counted, logits.shape[-1])
    check_values_in(ABOVE_ZERO, 1.0, times=times)
    nll = -token_logps(logits, targets, counted)
    number = targets.size if valid is None else jnp.sum(valid != 0)
    metrics = {"nll": jnp.sum(nll), "masked": jnp.sum(counted, dtype=jnp.float32)}
    return LossOutput(jnp.sum(weights[:, None] * nll), jnp.asarray(number, jnp.float32), jax.lax.stop_gradient(metrics))

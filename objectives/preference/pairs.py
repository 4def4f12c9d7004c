"""What all objectives of pairs share: checks at the door, rewards, and the reduction with its metrics."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from objectives.output import LossOutput
from objectives.statistics import LogProbs, is_concrete

MAX_EXPONENT = 80.0  # of exponentials of log-ratios: e^80 and its gradient are finite in float32
LEAST_LOSS = 1e-6  # nats per token, below which a response counts as having this loss: log-odds stay finite


def check_statistics(**statistics: LogProbs) -> None:
    """Raises ValueError unless all are LogProbs of as many responses as the first.

    Args:
      **statistics: by argument name.
    """
    (first, reference), *_ = statistics.items()
    for name, value in statistics.items():
        if not isinstance(value, LogProbs):
            raise ValueError(f"{name} must be LogProbs, as sequence_logps returns them, got {type(value).__name__}")
        if value.sum.shape != reference.sum.shape:
            raise ValueError(f"{name} has {value.sum.shape[0]} responses, {first} has {reference.sum.shape[0]}")


def check_unpacked(**statistics: LogProbs) -> None:
    """Raises ValueError if any are of packed rows, whose tokens do not lie in the row of their response.

    Args:
      **statistics: by argument name.
    """
    for name, value in statistics.items():
        if value.packed:
            raise ValueError(
                f"{name} comes from packed rows; this objective looks at tokens and needs a row per response"
            )


def check_shape(shape: tuple[int, ...], **arrays: Any) -> None:
    """Raises ValueError unless all arrays have the shape.

    Args:
      shape: of each.
      **arrays: by argument name.
    """
    for name, value in arrays.items():
        if jnp.shape(value) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {jnp.shape(value)}")


def check_values_in(low: float, high: float, *, where: Any = None, **arrays: Any) -> None:
    """Raises ValueError unless all values of the arrays are in [low, high]; traced arrays pass.

    Args:
      low: least value.
      high: greatest value.
      where: bool, of the leading dimensions of the arrays; False where values do not matter. None = all matter.
      **arrays: by argument name.
    """
    for name, value in arrays.items():
        if is_concrete(value, where):
            numbers = np.asarray(value)
            _refuse(~((numbers >= low) & (numbers <= high)), numbers, where, f"{name} must be in [{low}, {high}]")


def check_values_among(allowed: Sequence[int], *, where: Any = None, **arrays: Any) -> None:
    """Raises ValueError unless all values of the arrays are among those allowed; traced arrays pass.

    Args:
      allowed: numbers.
      where: as of `check_values_in`.
      **arrays: by argument name.
    """
    *most, last = allowed
    for name, value in arrays.items():
        if is_concrete(value, where):
            numbers = np.asarray(value)
            wrong = ~np.isin(numbers, allowed)
            _refuse(wrong, numbers, where, f"{name} must be {', '.join(map(str, most))} or {last}")


def _refuse(wrong: np.ndarray, numbers: np.ndarray, where: Any, rule: str) -> None:
    """Raises ValueError that names the first number that is wrong where it matters."""
    if where is not None:
        counted = np.asarray(where) != 0
        wrong = wrong & counted.reshape(counted.shape + (1,) * (wrong.ndim - counted.ndim))
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        at = f" at index {place[0] if len(place) == 1 else place}" if place else ""
        raise ValueError(f"{rule} everywhere, got {numbers[place]}{at}")


def check_positive(**options: Any) -> None:
    """Raises ValueError unless all are above 0; values of a traced function, such as schedules, pass.

    Args:
      **options: by name.
    """
    for name, value in options.items():
        if is_concrete(value) and not (_is_number(value) and value > 0):
            raise ValueError(f"{name} must be above 0, {_got(value)}")


def _is_number(value: Any) -> bool:
    """Whether it is one number, as a scalar or as an array without dimensions."""
    return np.ndim(value) == 0 and jnp.issubdtype(np.asarray(value).dtype, jnp.number)


def _got(value: Any) -> str:
    """The tail of an error: the value and, where it is no number, what was meant as far as one sees."""
    if _is_number(value):
        return f"got {value}"
    try:
        return f"got {value!r}; give a number, such as {float(value)}"
    except (TypeError, ValueError):
        return f"got {value!r}; give a number"


def check_range(low: float, high: float, *, open_high: bool = False, **options: Any) -> None:
    """Raises ValueError unless all are in [low, high], or in [low, high) with `open_high`; traced values pass.

    Args:
      low: least value.
      high: bound from above.
      open_high: whether `high` itself is out.
      **options: by name.
    """
    for name, value in options.items():
        if not is_concrete(value):
            continue
        if not _is_number(value) or not (low <= value < high if open_high else low <= value <= high):
            interval = f"[{low}, {high}{')' if open_high else ']'}"
            raise ValueError(f"{name} must be in {interval}, {_got(value)}")


def log_ratio(policy: LogProbs, ref: LogProbs) -> jax.Array:
    """h = log pi(y | x) - log ref(y | x), float32 [B]; the reference has no gradient."""
    return policy.sum - jax.lax.stop_gradient(ref.sum)


def box_cox(log_u: jax.Array, power: jax.Array | float) -> jax.Array:
    """(u^power - 1) / power for u = e^log_u, which is log u at power 0; u^power ends at e^MAX_EXPONENT.

    Args:
      log_u: any shape.
      power: scalar, may be traced.
    """
    power = jnp.asarray(power, log_u.dtype)
    nonzero = jnp.where(power == 0, 1.0, power)
    curved = jnp.expm1(jnp.minimum(nonzero * log_u, MAX_EXPONENT)) / nonzero
    return jnp.where(power == 0, log_u, curved)


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - e^x) for x < 0, exact near 0 and far from it.

    Args:
      x: any shape, below 0.
    """
    near = x > -math.log(2.0)
    small, large = jnp.where(near, x, -1.0), jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))


def log_odds(log_p: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of log p, which is taken to be at most -LEAST_LOSS.

    Args:
      log_p: any shape.
    """
    log_p = jnp.minimum(log_p, -LEAST_LOSS)
    return log_p - log1mexp(log_p)


def counted(first: LogProbs, *others: LogProbs) -> jax.Array:
    """bool[B]: whether every response has counted tokens, which padding of a batch has not."""
    valid = first.count > 0
    for other in others:
        valid = valid & (other.count > 0)
    return valid


def reduce_pairs(
    loss: jax.Array,
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    reward_chosen: jax.Array,
    reward_rejected: jax.Array,
    *,
    also: Sequence[LogProbs] = (),
    **metrics: jax.Array,
) -> LossOutput:
    """Sums of losses and metrics over the pairs; one without counted tokens, as padding of a batch, takes no part.

    Args:
      loss: [B].
      policy_chosen: of the chosen responses.
      policy_rejected: of the rejected ones.
      reward_chosen: [B], implicit rewards.
      reward_rejected: [B].
      also: further responses that a pair must have.
      **metrics: further ones, [B].

    Returns:
      LossOutput: weight = number of pairs; metrics reward_chosen, reward_rejected, margin, accuracy (of margin > 0),
      logp_chosen, logp_rejected (sums over tokens), logp_mean_chosen, logp_mean_rejected, tokens_chosen and
      tokens_rejected, and those given.
    """
    margin = reward_chosen - reward_rejected
    metrics = {
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "margin": margin,
        "accuracy": (margin > 0).astype(jnp.float32),
        "logp_chosen": policy_chosen.sum,
        "logp_rejected": policy_rejected.sum,
        "logp_mean_chosen": policy_chosen.mean,
        "logp_mean_rejected": policy_rejected.mean,
        "tokens_chosen": policy_chosen.count,
        "tokens_rejected": policy_rejected.count,
        **metrics,
    }
    return reduce_examples(loss, counted(policy_chosen, policy_rejected, *also), metrics)


def reduce_examples(loss: jax.Array, valid: jax.Array, metrics: dict[str, jax.Array]) -> LossOutput:
    """Sums over the valid examples; weight = their number.

    Args:
      loss: [B].
      valid: bool[B].
      metrics: by name, [B] or scalar each, a scalar being that of every example; they get no gradient.
    """

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid, x, 0.0), dtype=jnp.promote_types(x.dtype, jnp.float32))

    sums = {name: jax.lax.stop_gradient(total(x)) for name, x in metrics.items()}
    return LossOutput(total(loss), jnp.sum(valid, dtype=jnp.float32), sums)

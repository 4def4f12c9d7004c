"""Losses of policies and values from drawn responses, their advantages and the log-probabilities at drawing time.

rho = pi(token) / pi_old(token); its logarithm is cut at 20 in size, where it has no gradient. What was drawn from a
policy that has not moved since has rho = 1, with the gradient of log pi.
"""

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range, check_shape, check_statistics, check_unpacked
from objectives.output import LossOutput
from objectives.registry import register
from objectives.rl.advantages import ESTIMATORS, kl_estimate
from objectives.statistics import LogProbs
from zoo.core.registry import check_choice

LEVELS = ("token", "sequence")
AGGREGATIONS = ("token", "sequence", "length")


def _ratio(log_ratio: jax.Array) -> jax.Array:
    return jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))


def _surrogate(ratio: jax.Array, advantages: jax.Array, low: float, high: float) -> tuple[jax.Array, jax.Array]:
    """max(-rho A, -clip(rho) A), and where the second is the larger one."""
    plain, clipped = -ratio * advantages, -jnp.clip(ratio, 1.0 - low, 1.0 + high) * advantages
    return jnp.maximum(plain, clipped), (clipped > plain).astype(jnp.float32)


def _check_clips(clip: float, clip_high: float | None) -> float:
    high = clip if clip_high is None else clip_high
    check_positive(clip=clip)
    check_range(0.0, 1.0, clip=clip)
    check_positive(finite=False, clip_high=high)
    return high


def _total(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask != 0, x, 0.0), dtype=jnp.float32)


@register("ppo", category="rl", papers=("1707.06347",), proof="test_rl.py::test_ppo_is_its_definition")
def ppo(
    policy: LogProbs,
    advantages: jax.Array,
    old: LogProbs | None = None,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> LossOutput:
    """Clipped surrogate of proximal policy optimisation (arXiv:1707.06347, equation 7), over tokens.

      loss_t = max(-rho_t A_t, -clip(rho_t, 1 - c, 1 + c_high) A_t)

    Args:
      policy: of the model that is trained.
      advantages: float[B, T], as `generalised_advantages`, commonly whitened; no gradient.
      old: of the model that drew the responses; None: the policy as it is now.
      clip: c, in (0, 1].
      clip_high: c_high, above 0; None: c, math.inf: no bound from above.

    Returns:
      LossOutput: weight = number of tokens; metrics ratio, clip_fraction and approx_kl, half the squared log-ratio.

    Raises:
      ValueError: shapes disagree or an option is out of range.
    """
    old = policy if old is None else old
    check_statistics(policy=policy, old=old)
    check_shape(policy.per_token.shape, advantages=advantages)
    high = _check_clips(clip, clip_high)
    log_ratio = policy.per_token - jax.lax.stop_gradient(old.per_token)
    ratio = _ratio(log_ratio)
    advantages = jnp.where(policy.mask != 0, jax.lax.stop_gradient(advantages), 0.0)
    loss, clipped = _surrogate(ratio, advantages, clip, high)
    metrics = {"ratio": ratio, "clip_fraction": clipped, "approx_kl": 0.5 * jnp.square(log_ratio)}
    sums = {name: jax.lax.stop_gradient(_total(x, policy.mask)) for name, x in metrics.items()}
    return LossOutput(_total(loss, policy.mask), _total(policy.mask, policy.mask), sums)


@register("clipped_value", category="rl", papers=("1506.02438",), proof="test_rl.py::test_value_is_its_definition")
def clipped_value(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, *, clip: float = 0.2
) -> LossOutput:
    """Squared error of values that may not move far from those at drawing time, as in the code of PPO.

      loss_t = 1/2 max((V_t - R_t)^2, (clip(V_t, V_old_t - c, V_old_t + c) - R_t)^2)

    Args:
      values: float[B, T], of the model that is trained.
      old_values: float[B, T], at drawing time; no gradient.
      returns: float[B, T], as `generalised_advantages`; no gradient.
      mask: [B, T], 1 at tokens of the response.
      clip: c, above 0; math.inf for no clipping.

    Returns:
      LossOutput: weight = number of tokens; metric clip_fraction.

    Raises:
      ValueError: shapes disagree or clip is out of range.
    """
    check_shape(mask.shape, values=values, old_values=old_values, returns=returns)
    check_positive(finite=False, clip=clip)
    counted = mask != 0
    values, old_values, returns = (
        jnp.where(counted, x.astype(jnp.float32), 0.0) for x in (values, old_values, returns)
    )
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    plain = jnp.square(values - returns)
    clipped = jnp.square(jnp.clip(values, old_values - clip, old_values + clip) - returns)
    fraction = jax.lax.stop_gradient(_total(clipped > plain, mask))
    loss = _total(0.5 * jnp.maximum(plain, clipped), mask)
    return LossOutput(loss, jnp.sum(counted, dtype=jnp.float32), {"clip_fraction": fraction})


@register(
    "grpo",
    category="rl",
    papers=("2402.03300", "2503.20783", "2503.14476", "2507.18071"),
    proof="test_rl.py::test_grpo_is_its_definition",
)
def grpo(
    policy: LogProbs,
    advantages: jax.Array,
    old: LogProbs | None = None,
    ref: LogProbs | None = None,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    kl_weight: float = 0.0,
    estimator: str = "k3",
    level: str = "token",
    aggregation: str = "token",
    max_length: int | None = None,
) -> LossOutput:
    """Group relative policy optimisation (arXiv:2402.03300, equation 3) and its normalisations by length.

      loss_bt = max(-rho_bt A_b, -clip(rho_bt, 1 - c, 1 + c_high) A_b) + kl_weight kl_bt

    Args:
      policy: of the model that is trained.
      advantages: float[B], of whole responses, as `group_advantages` or `leave_one_out_advantages`; no gradient.
      old: of the model that drew the responses; None: the policy as it is now.
      ref: of the frozen reference; with kl_weight > 0 only.
      clip: c, in (0, 1].
      clip_high: c_high, above 0; None: c. DAPO (arXiv:2503.14476) has 0.28.
      kl_weight: at least 0.
      estimator: of the divergence, as `kl_estimate`.
      level: "token", or "sequence": one rho per response, the geometric mean over its tokens (GSPO, arXiv:2507.18071,
        equation 7).
      aggregation: the mean over all tokens ("token", DAPO), over responses of the means over their tokens ("sequence",
        GRPO), or over `max_length` tokens of every response ("length", Dr. GRPO, arXiv:2503.20783).
      max_length: with aggregation "length" only, the most tokens of a response.

    Returns:
      LossOutput: weight = number of tokens, of responses, or of responses times max_length, by aggregation; metrics
      ratio, clip_fraction and kl, weighted likewise. A response without tokens, as padding of a batch, takes no part.

    Raises:
      ValueError: shapes disagree, an option is out of range, or `ref`, kl_weight and max_length do not go together.
    """
    old = policy if old is None else old
    given = {"policy": policy, "old": old} | ({} if ref is None else {"ref": ref})
    check_statistics(**given)
    check_unpacked(**given)
    check_shape(policy.sum.shape, advantages=advantages)
    high = _check_clips(clip, clip_high)
    check_range(0.0, jnp.inf, kl_weight=kl_weight)
    for name, value, allowed in (
        ("level", level, LEVELS),
        ("aggregation", aggregation, AGGREGATIONS),
        ("estimator", estimator, ESTIMATORS),
    ):
        check_choice(name, value, allowed)
    if (aggregation == "length") != (max_length is not None):
        raise ValueError(f"max_length goes with aggregation='length', got {max_length} with {aggregation!r}")
    if max_length is not None and max_length < policy.per_token.shape[1]:
        raise ValueError(
            f"max_length must be at least the {policy.per_token.shape[1]} tokens of a row, got {max_length}"
        )
    if ref is None and not (isinstance(kl_weight, int | float) and kl_weight == 0):
        raise ValueError(f"kl_weight={kl_weight} needs ref, the log-probabilities of the reference")

    log_ratio = policy.per_token - jax.lax.stop_gradient(old.per_token)
    if level == "sequence":
        log_ratio = jnp.broadcast_to((policy.mean - jax.lax.stop_gradient(old.mean))[:, None], log_ratio.shape)
    ratio = _ratio(log_ratio)
    loss, clipped = _surrogate(ratio, jax.lax.stop_gradient(advantages)[:, None], clip, high)
    metrics = {"ratio": ratio, "clip_fraction": clipped}
    if ref is not None:
        kl = kl_estimate(policy.per_token, ref.per_token, estimator)
        loss = loss + kl_weight * kl
        metrics["kl"] = kl

    mask, count = policy.mask, policy.count
    if aggregation == "sequence":
        mask = mask / jnp.maximum(count, 1.0)[:, None]
    weight = {
        "token": jnp.sum(count),
        "sequence": jnp.sum(count > 0, dtype=jnp.float32),
        "length": jnp.sum(count > 0, dtype=jnp.float32) * (max_length or 0),
    }[aggregation]

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask != 0, mask * x, 0.0), dtype=jnp.float32)

    return LossOutput(total(loss), weight, {name: jax.lax.stop_gradient(total(x)) for name, x in metrics.items()})

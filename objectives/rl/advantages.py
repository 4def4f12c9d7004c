"""What a sampled response, or a token of it, was worth beyond what was expected. Nothing here has a gradient."""

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range, check_shape
from zoo.core.registry import check_choice

ESTIMATORS = ("k1", "k2", "k3")
SCALES = ("group", "batch", "none")


def kl_estimate(logps: jax.Array, ref_logps: jax.Array, estimator: str = "k3") -> jax.Array:
    """Estimates KL(policy || reference) from single tokens that the policy drew.

    With x = ref_logps - logps: k1 = -x, without bias; k2 = x^2 / 2, of little variance; k3 = e^x - 1 - x, without bias
    and never negative. x ends at 20, where k3 is 4.9e8. Differentiable: it is a penalty as well as a metric.

    Args:
      logps: float[...], log-probabilities under the policy.
      ref_logps: likewise under the reference, which gets no gradient.
      estimator: "k1", "k2" or "k3".

    Raises:
      ValueError: shapes disagree or an unknown estimator.

    Reference: Schulman, "Approximating KL divergence" (2020); k3 as the penalty of GRPO, arXiv:2402.03300, equation 4.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_shape(logps.shape, ref_logps=ref_logps)
    x = jnp.minimum(jax.lax.stop_gradient(ref_logps) - logps, 20.0)
    if estimator == "k1":
        return -x
    return 0.5 * jnp.square(x) if estimator == "k2" else jnp.expm1(x) - x


def token_rewards(rewards: jax.Array, penalties: jax.Array, mask: jax.Array, *, kl_weight: float = 0.05) -> jax.Array:
    """Rewards of tokens: -kl_weight times each token's penalty, and at the last token the response's reward.

    Args:
      rewards: float[B], of whole responses.
      penalties: float[B, T], as `kl_estimate` of the drawn tokens.
      mask: [B, T], 1 at tokens of the response.
      kl_weight: at least 0.

    Returns:
      float32 [B, T], 0 where the mask is 0. A token-level reward from elsewhere (symbolic feedback, arXiv:2405.16661)
      takes the place of this.

    Raises:
      ValueError: shapes disagree or kl_weight is negative.
    """
    check_shape(mask.shape, penalties=penalties)
    check_shape(mask.shape[:1], rewards=rewards)
    check_range(0.0, jnp.inf, kl_weight=kl_weight)
    counted = mask != 0
    last = counted & (jnp.cumsum(counted[:, ::-1], axis=1)[:, ::-1] == 1)
    per_token = jnp.where(counted, -kl_weight * penalties.astype(jnp.float32), 0.0)
    return jax.lax.stop_gradient(per_token + jnp.where(last, rewards[:, None].astype(jnp.float32), 0.0))


def generalised_advantages(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, discount: float = 1.0, decay: float = 0.95
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation over the tokens of each response (arXiv:1506.02438, equation 16).

      delta_t = r_t + discount V_t+1 - V_t,   A_t = delta_t + discount decay A_t+1,   returns_t = A_t + V_t

    t + 1 is the next token of the response, over what other turns put between; after the last one V and A are 0.

    Args:
      rewards: float[B, T].
      values: float[B, T], V before each token was drawn.
      mask: [B, T], 1 at tokens of the response; what the others hold elsewhere does not matter.
      discount: gamma, in [0, 1].
      decay: lambda, in [0, 1]; 1 is the sum of rewards less V, 0 the error of one step.

    Returns:
      advantages, returns: float32 [B, T], 0 where the mask is 0.

    Raises:
      ValueError: shapes disagree or an option is out of range.
    """
    check_shape(mask.shape, rewards=rewards, values=values)
    check_range(0.0, 1.0, discount=discount, decay=decay)
    counted = mask != 0
    rewards, values = (jnp.where(counted, x.astype(jnp.float32), 0.0) for x in (rewards, values))

    def step(carry, token):
        next_value, next_advantage = carry
        reward, value, valid = token
        advantage = reward + discount * next_value - value + discount * decay * next_advantage
        after = jnp.where(valid, value, next_value), jnp.where(valid, advantage, next_advantage)
        return after, jnp.where(valid, advantage, 0.0)

    zeros = jnp.zeros(mask.shape[:1], jnp.float32)
    tokens = (rewards.T, values.T, counted.T)
    advantages = jax.lax.scan(step, (zeros, zeros), tokens, reverse=True)[1].T
    return jax.lax.stop_gradient((advantages, jnp.where(counted, advantages + values, 0.0)))


def group_advantages(rewards: jax.Array, *, scale: str = "group", eps: float = 1e-4) -> jax.Array:
    """Rewards relative to those of the other responses to a prompt (GRPO, arXiv:2402.03300, section 4.1.2).

      A_pg = (r_pg - mean_g r_p) / (std + eps)

    Args:
      rewards: float[P, G], G >= 2 responses to each of P prompts.
      scale: the standard deviation (unbiased) is that of the "group", of the whole "batch", or there is "none", as in
        Dr. GRPO (arXiv:2503.20783). A group of equal rewards has advantages of 0 either way.
      eps: above 0.

    Returns:
      float32 [P, G].

    Raises:
      ValueError: not [P, G] with G >= 2, an unknown scale or eps out of range.
    """
    _check_group(rewards)
    check_choice("scale", scale, SCALES)
    check_positive(eps=eps)
    rewards = rewards.astype(jnp.float32)
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    if scale != "none":
        std = jnp.std(rewards, axis=1, keepdims=True, ddof=1) if scale == "group" else jnp.std(rewards, ddof=1)
        centred = centred / (std + eps)
    return jax.lax.stop_gradient(centred)


def leave_one_out_advantages(rewards: jax.Array) -> jax.Array:
    """Rewards less the mean of the other responses to the prompt (RLOO, arXiv:2402.14740, section 3.2).

    Args:
      rewards: float[P, G], G >= 2 responses to each of P prompts.

    Returns:
      float32 [P, G].

    Raises:
      ValueError: not [P, G] with G >= 2.
    """
    _check_group(rewards)
    rewards = rewards.astype(jnp.float32)
    others = (jnp.sum(rewards, axis=1, keepdims=True) - rewards) / (rewards.shape[1] - 1)
    return jax.lax.stop_gradient(rewards - others)


def _check_group(rewards: jax.Array) -> None:
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [prompts, responses] with at least 2 responses each, got {rewards.shape}")


def whiten(x: jax.Array, mask: jax.Array, *, shift_mean: bool = True, eps: float = 1e-8) -> jax.Array:
    """x with mean 0 and variance 1 over what the mask counts.

    Args:
      x: float[B, T].
      mask: [B, T].
      shift_mean: False leaves the mean where it was.
      eps: added to the variance (unbiased).

    Returns:
      float32 [B, T], 0 where the mask is 0.

    Raises:
      ValueError: shapes disagree.
    """
    check_shape(mask.shape, x=x)
    counted = mask != 0
    number = jnp.sum(counted, dtype=jnp.float32)
    x = jnp.where(counted, x.astype(jnp.float32), 0.0)
    mean = jnp.sum(x) / jnp.maximum(number, 1.0)
    variance = jnp.sum(jnp.where(counted, jnp.square(x - mean), 0.0)) / jnp.maximum(number - 1.0, 1.0)
    white = (x - mean) * jax.lax.rsqrt(variance + eps) + (0.0 if shift_mean else mean)
    return jax.lax.stop_gradient(jnp.where(counted, white, 0.0))

"""Losses that a language model proposed in a search over code: the DiscoPOP family (arXiv:2406.08414, appendix E).

r = beta d, with the letters of `objectives.preference.dpo`; tau = 0.05 stands for the beta of the search, as in the
authors' corrected code, which these follow where it differs from the appendix. Means, variances and deviations are over
the valid pairs of the batch that is given, and have gradients: over all of it on a mesh, over a microbatch with
gradient accumulation. Exponentials of -r end at e^20.
"""

import jax
import jax.numpy as jnp

from objectives.checks import check_positive
from objectives.output import LossOutput
from objectives.preference.dpo import log_ratios
from objectives.preference.pairs import reduce_pairs
from objectives.registry import register
from objectives.statistics import LogProbs, has_tokens

PROOF = "test_discovered.py::test_is_its_definition"
MAX_EXPONENT = 20.0


def _rewards(
    policy_chosen: LogProbs, policy_rejected: LogProbs, ref_chosen: LogProbs, ref_rejected: LogProbs, beta: float
) -> tuple[jax.Array, jax.Array]:
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    return beta * h_w, beta * h_l


def _exp(x: jax.Array) -> jax.Array:
    return jnp.exp(jnp.minimum(x, MAX_EXPONENT))


def _mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(valid, x, 0.0)) / jnp.maximum(jnp.sum(valid), 1)


def _variance(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Unbiased; 0 of a single pair."""
    squares = jnp.square(x - _mean(x, valid))
    return jnp.sum(jnp.where(valid, squares, 0.0)) / jnp.maximum(jnp.sum(valid) - 1, 1)


def _deviation(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Square root of `_variance`, with gradient 0 where that is 0."""
    variance = _variance(x, valid)
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)


@register(
    "discopop", category="preference", papers=("2406.08414",), proof="test_trl_goldens.py::test_values_and_gradients"
)
def discopop(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
) -> LossOutput:
    """Log-ratio modulated loss (LRML), the one the paper calls DiscoPOP (arXiv:2406.08414, equation 5).

      g = sigma(r / tau),   loss = (1 - g) sp(-r) + g e^-r

    Not convex: it has a local minimum near r = 0, on its negative side.

    Args:
      policy_chosen: as in `dpo`.
      policy_rejected: as in `dpo`.
      ref_chosen: as in `dpo`.
      ref_rejected: as in `dpo`.
      beta: strength of the pull to the reference, above 0.
      tau: scale of r in the weights, above 0.
    """
    r_w, r_l = _rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    check_positive(tau=tau)
    r = r_w - r_l
    # g e^-r as one exponential: where r is far below 0, g vanishes faster than e^-r grows.
    blended = _exp(jax.nn.log_sigmoid(r / tau) - r)
    loss = jax.nn.sigmoid(-r / tau) * jax.nn.softplus(-r) + blended
    return reduce_pairs(loss, policy_chosen, policy_rejected, r_w, r_l)


@register("cell", category="preference", papers=("2406.08414",), proof=PROOF)
def cell(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """Combined exponential and logistic loss (arXiv:2406.08414, E.5): sp(-r) / 2 + e^-r / 2.

    Args:
      policy_chosen: as in `dpo`.
      policy_rejected: as in `dpo`.
      ref_chosen: as in `dpo`.
      ref_rejected: as in `dpo`.
      beta: strength of the pull to the reference, above 0.
    """
    r_w, r_l = _rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    r = r_w - r_l
    loss = 0.5 * (jax.nn.softplus(-r) + _exp(-r))
    return reduce_pairs(loss, policy_chosen, policy_rejected, r_w, r_l)


@register("padll", category="preference", papers=("2406.08414",), proof=PROOF)
def padll(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """Performance-adaptive decay logistic loss (arXiv:2406.08414, E.3): 0.9 sp(-r), halved where d < 0.

    Args:
      policy_chosen: as in `dpo`.
      policy_rejected: as in `dpo`.
      ref_chosen: as in `dpo`.
      ref_rejected: as in `dpo`.
      beta: strength of the pull to the reference, above 0.
    """
    r_w, r_l = _rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    r = r_w - r_l
    loss = jnp.where(r < 0, 0.45, 0.9) * jax.nn.softplus(-r)
    return reduce_pairs(loss, policy_chosen, policy_rejected, r_w, r_l)


@register("dbaql", category="preference", papers=("2406.08414",), proof=PROOF)
def dbaql(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
) -> LossOutput:
    """Dynamic blended adaptive quantile loss (arXiv:2406.08414, E.1).

      c = sigma(Var[r / tau]),   loss = c sp(-r / 0.9) + (1 - c) e^(-0.9 r)

    Args:
      policy_chosen: as in `dpo`.
      policy_rejected: as in `dpo`.
      ref_chosen: as in `dpo`.
      ref_rejected: as in `dpo`.
      beta: strength of the pull to the reference, above 0.
      tau: scale of r in the weights, above 0.
    """
    r_w, r_l = _rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    check_positive(tau=tau)
    r = r_w - r_l
    blend = _variance(r / tau, has_tokens(policy_chosen, policy_rejected))
    loss = jax.nn.sigmoid(blend) * jax.nn.softplus(-r / 0.9) + jax.nn.sigmoid(-blend) * _exp(-0.9 * r)
    return reduce_pairs(loss, policy_chosen, policy_rejected, r_w, r_l)


@register("aql", category="preference", papers=("2406.08414",), proof=PROOF)
def aql(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
) -> LossOutput:
    """Adaptive quantile loss (arXiv:2406.08414, E.2).

      M = 0.5 + 0.01 (sigma(E[r / tau]) - 0.5),   q = sigma(M - r / tau)
      loss = q sp(-r) + (1 - q) max(0, 1 - r)

    Args:
      policy_chosen: as in `dpo`.
      policy_rejected: as in `dpo`.
      ref_chosen: as in `dpo`.
      ref_rejected: as in `dpo`.
      beta: strength of the pull to the reference, above 0.
      tau: scale of r in the weights, above 0.
    """
    r_w, r_l = _rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    check_positive(tau=tau)
    r = r_w - r_l
    mean = _mean(r / tau, has_tokens(policy_chosen, policy_rejected))
    x = 0.5 + 0.01 * (jax.nn.sigmoid(mean) - 0.5) - r / tau
    loss = jax.nn.sigmoid(x) * jax.nn.softplus(-r) + jax.nn.sigmoid(-x) * jax.nn.relu(1.0 - r)
    return reduce_pairs(loss, policy_chosen, policy_rejected, r_w, r_l)


@register("aqfl", category="preference", papers=("2406.08414",), proof=PROOF)
def aqfl(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
) -> LossOutput:
    """Adaptive quantile feedback loss (arXiv:2406.08414, E.4).

      A0 = Std[r / tau] E[sigma(-r / tau)],   A = A0 + 0.05 (sigma(E[r / tau]) - A0)
      b = sigma(0.1 |r / tau - A|),   loss = b sp(-r) + (1 - b) max(0, 1 - r)

    Args:
      policy_chosen: as in `dpo`.
      policy_rejected: as in `dpo`.
      ref_chosen: as in `dpo`.
      ref_rejected: as in `dpo`.
      beta: strength of the pull to the reference, above 0.
      tau: scale of r in the weights, above 0.
    """
    r_w, r_l = _rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    check_positive(tau=tau)
    r = r_w - r_l
    x, valid = r / tau, has_tokens(policy_chosen, policy_rejected)
    quantile = _deviation(x, valid) * _mean(jax.nn.sigmoid(-x), valid)
    quantile = quantile + 0.05 * (jax.nn.sigmoid(_mean(x, valid)) - quantile)
    distance = 0.1 * jnp.abs(x - quantile)
    loss = jax.nn.sigmoid(distance) * jax.nn.softplus(-r) + jax.nn.sigmoid(-distance) * jax.nn.relu(1.0 - r)
    return reduce_pairs(loss, policy_chosen, policy_rejected, r_w, r_l)


@register("pfl", category="preference", papers=("2406.08414",), proof=PROOF)
def pfl(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """Policy focused loss (arXiv:2406.08414, E.7): sp(-r) / 2 where s_w > s_l, 2 max(0, 1 - r) elsewhere.

    Args:
      policy_chosen: as in `dpo`.
      policy_rejected: as in `dpo`.
      ref_chosen: as in `dpo`.
      ref_rejected: as in `dpo`.
      beta: strength of the pull to the reference, above 0.
    """
    r_w, r_l = _rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    r = r_w - r_l
    right = policy_chosen.sum > policy_rejected.sum
    loss = jnp.where(right, 0.5 * jax.nn.softplus(-r), 2.0 * jax.nn.relu(1.0 - r))
    return reduce_pairs(loss, policy_chosen, policy_rejected, r_w, r_l)

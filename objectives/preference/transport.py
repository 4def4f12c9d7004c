"""Alignment by optimal transport (AOT, arXiv:2406.05882): the margins of a batch are compared as distributions.

The quantiles of a batch are those of its own pairs, sorted, so that a loss belongs to a batch and not to a pair. Pairs
without counted tokens, as padding of a batch, take no part in the sorting.
"""

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range
from objectives.output import LossOutput
from objectives.preference.dpo import PROOF, log_ratios, smoothed_preference
from objectives.preference.pairs import reduce_pairs
from objectives.registry import register
from objectives.statistics import LogProbs, has_tokens


def quantile_partner(x: jax.Array, y: jax.Array, valid: jax.Array) -> jax.Array:
    """[B]: for each valid x_i, the y_j that has the rank among the valid y which x_i has among the valid x.

    Args:
      x: [B].
      y: [B].
      valid: bool[B]; entries elsewhere are of no meaning.
    """
    order_x, order_y = (jnp.argsort(jnp.where(valid, a, jnp.inf)) for a in (x, y))
    return y[order_y][jnp.argsort(order_x)]


@register("aot", category="preference", papers=("2406.05882",), proof=PROOF)
def aot(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """AOT of pairs: each quantile of the policy's margins shall exceed that of the reference (arXiv:2406.05882).

      u = s_w - s_l under the policy, v under the reference, both sorted over the batch:
      loss = (1 - e) sp(-beta (u_(i) - v_(i))) + e sp(beta (u_(i) - v_(i))),   e = label_smoothing

    Args:
      policy_chosen: as in `dpo`.
      policy_rejected: as in `dpo`.
      ref_chosen: as in `dpo`.
      ref_rejected: as in `dpo`.
      beta: scale of the difference, above 0.
      label_smoothing: e, in [0, 0.5).
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    _check(beta, label_smoothing)
    u = policy_chosen.sum - policy_rejected.sum
    v = jax.lax.stop_gradient(ref_chosen.sum - ref_rejected.sum)
    difference = u - quantile_partner(u, v, has_tokens(policy_chosen, policy_rejected))
    loss = smoothed_preference(beta * difference, 1.0 - label_smoothing)
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l)


@register("aot_unpaired", category="preference", papers=("2406.05882",), proof=PROOF)
def aot_unpaired(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """AOT without pairs: each quantile of the chosen rewards shall exceed that of the rejected (arXiv:2406.05882).

      with h_w and h_l each sorted over the batch:
      loss = (1 - e) sp(-beta (h_w,(i) - h_l,(i))) + e sp(beta (h_w,(i) - h_l,(i))),   e = label_smoothing

    Row i of the chosen and of the rejected responses need not belong to one prompt. TRL 0.24 calls this aot_pair.

    Args:
      policy_chosen: as in `dpo`.
      policy_rejected: as in `dpo`.
      ref_chosen: as in `dpo`.
      ref_rejected: as in `dpo`.
      beta: scale of the difference, above 0.
      label_smoothing: e, in [0, 0.5).
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    _check(beta, label_smoothing)
    difference = h_w - quantile_partner(h_w, h_l, has_tokens(policy_chosen, policy_rejected))
    loss = smoothed_preference(beta * difference, 1.0 - label_smoothing)
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l)


def _check(beta: float, label_smoothing: float) -> None:
    check_positive(beta=beta)
    check_range(0.0, 0.5, open_high=True, label_smoothing=label_smoothing)

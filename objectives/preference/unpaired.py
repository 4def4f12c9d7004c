"""Losses of single responses with a label, desirable or not.

h = log pi(y | x) - log ref(y | x), summed over the tokens of a response; sp the softplus, sigma the logistic function.
"""

import math

import jax
import jax.numpy as jnp

from objectives.checks import (
    check_positive,
    check_range,
    check_shape,
    check_statistics,
    check_values_among,
    check_values_in,
)
from objectives.output import LossOutput, reduce_examples
from objectives.preference.pointwise import reward_shift
from objectives.registry import register
from objectives.statistics import LogProbs, has_tokens, log_ratio

PROOF = "test_trl_goldens.py::test_unpaired_values_and_gradients"


def labelled_rewards(policy: LogProbs, ref: LogProbs, desirable: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """(beta h, label), float32 [B] and bool [B], after the checks that objectives of labelled responses make.

    Raises:
      ValueError: not LogProbs or of different numbers of responses, labels that are not 0 or 1 or not [B], beta <= 0.
    """
    check_statistics(policy=policy, ref=ref)
    check_shape(policy.sum.shape, desirable=desirable)
    check_positive(beta=beta)
    check_values_among((0, 1), where=has_tokens(policy), desirable=desirable)
    return beta * log_ratio(policy, ref), jnp.asarray(desirable) != 0


def reduce_labelled(
    loss: jax.Array, policy: LogProbs, reward: jax.Array, desirable: jax.Array, **metrics: jax.Array
) -> LossOutput:
    """Sums of losses and metrics over the responses that have counted tokens.

    Args:
      loss: [B].
      policy: of the model that is trained.
      reward: [B].
      desirable: bool[B].
      **metrics: further ones, [B] or scalar.

    Returns:
      LossOutput: weight = number of responses; metrics desirable (their number), reward_desirable and
      reward_undesirable (sums over those responses), logp, logp_mean, tokens, and those given.
    """
    metrics = {
        "desirable": desirable.astype(jnp.float32),
        "reward_desirable": jnp.where(desirable, reward, 0.0),
        "reward_undesirable": jnp.where(desirable, 0.0, reward),
        "logp": policy.sum,
        "logp_mean": policy.mean,
        "tokens": policy.count,
        **metrics,
    }
    return reduce_examples(loss, has_tokens(policy), metrics)


@register("kto", category="preference", papers=("2402.01306",), proof=PROOF)
def kto(
    policy: LogProbs,
    ref: LogProbs,
    desirable: jax.Array,
    policy_kl: LogProbs | None = None,
    ref_kl: LogProbs | None = None,
    kl: jax.Array | None = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """Kahneman-Tversky optimisation (arXiv:2402.01306).

      desirable:    w_D (1 - sigma(beta (h - k)))
      undesirable:  w_U (1 - sigma(beta (k - h)))
      k = max(0, mean of h over mismatched pairs of prompt and response), without gradient

    Mismatched pairs are commonly prompt i with the response of example i + 1 of a batch, which takes at least two. The
    mean is over the batch that is given: over all of it on a mesh, over a microbatch with gradient accumulation. With
    kl = 0 this is the unpaired APO-zero of TRL.

    Args:
      policy: of the model that is trained.
      ref: of the frozen reference.
      desirable: bool[B], labels.
      policy_kl: of mismatched pairs, any number of them.
      ref_kl: likewise, if `policy_kl` is given.
      kl: scalar k, in place of the two before.
      beta: strength of the pull to the reference, above 0.
      desirable_weight: w_D; the paper wants w_D n_D / (w_U n_U) in [1, 4/3].
      undesirable_weight: w_U.

    Returns:
      LossOutput: as `reduce_labelled`, rewards beta h, and metric kl (k of each response).

    Raises:
      ValueError: as `labelled_rewards`; not exactly one source of k; a weight below 0.
    """
    reward, desirable = labelled_rewards(policy, ref, desirable, beta)
    check_range(0.0, math.inf, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    if (policy_kl is None) != (ref_kl is None) or (policy_kl is None) == (kl is None):
        raise ValueError("kto needs either policy_kl and ref_kl, of mismatched pairs, or the number kl, such as 0")
    if policy_kl is not None and ref_kl is not None:
        check_statistics(policy_kl=policy_kl, ref_kl=ref_kl)
        mismatched = has_tokens(policy_kl)
        total = jnp.sum(jnp.where(mismatched, log_ratio(policy_kl, ref_kl), 0.0))
        kl = jax.nn.relu(total / jnp.maximum(jnp.sum(mismatched), 1))
    check_shape((), kl=kl)
    kl = jax.lax.stop_gradient(jnp.asarray(kl, reward.dtype))
    gain = jnp.where(desirable, reward - beta * kl, beta * kl - reward)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    return reduce_labelled(weight * jax.nn.sigmoid(-gain), policy, reward, desirable, kl=kl)


@register("bco", category="preference", papers=("2404.04656",), proof=PROOF)
def bco(
    policy: LogProbs,
    ref: LogProbs,
    desirable: jax.Array,
    reward_mean: jax.Array | None = None,
    weights: jax.Array | None = None,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """Binary classifier optimisation (arXiv:2404.04656): logistic regression with the implicit reward as its logit.

      desirable:    w sp(-(beta h - c))
      undesirable:  w sp(beta h - c)

    c = `reward_mean` is the caller's running mean of the rewards, (reward_desirable + reward_undesirable) / weight in
    the metrics. Weights of undesirable responses that make their prompts look like those of the desirable ones are the
    paper's matching of the underlying distribution. Neither has a gradient.

    Args:
      policy: of the model that is trained.
      ref: of the frozen reference.
      desirable: bool[B], labels.
      reward_mean: scalar c; None: 0.
      weights: [B], w, at least 0; None: 1.
      beta: strength of the pull to the reference, above 0.

    Returns:
      LossOutput: as `reduce_labelled`, rewards beta h.

    Raises:
      ValueError: as `labelled_rewards`; `reward_mean` no scalar, `weights` not [B] or one below 0.
    """
    reward, desirable = labelled_rewards(policy, ref, desirable, beta)
    logit = reward - reward_shift(reward_mean)
    loss = jax.nn.softplus(jnp.where(desirable, -logit, logit))
    if weights is not None:
        check_shape(reward.shape, weights=weights)
        check_values_in(0.0, math.inf, where=has_tokens(policy), weights=weights)
        loss = jax.lax.stop_gradient(weights) * loss
    return reduce_labelled(loss, policy, reward, desirable)

"""Learned weights between given pairs and pairs of the policy's own samples (MetaAPO, arXiv:2509.23371).

Letters as in `objectives.preference.dpo`; all as in the authors' code. Off are the given pairs, on those that the
policy has sampled.
"""

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_shape, check_statistics, check_values_in
from objectives.output import LossOutput, reduce_examples
from objectives.preference.dpo import log_ratios
from objectives.preference.pairs import reduce_pairs
from objectives.registry import register
from objectives.statistics import LogProbs, has_tokens

PROOF = "test_mixing.py::test_is_its_definition"


def init_mixing(width: int = 100) -> dict[str, jax.Array]:
    """Parameters of `mixing_weight` at the start: weights of 0.1 and biases of 0.

    Args:
      width: of the hidden layer.

    Returns:
      hidden [width], hidden_bias [width], output [width] and output_bias [].
    """
    constant = jnp.full((width,), 0.1, jnp.float32)
    return {
        "hidden": constant,
        "hidden_bias": jnp.zeros((width,), jnp.float32),
        "output": constant,
        "output_bias": jnp.zeros((), jnp.float32),
    }


def mixing_weight(params: dict[str, jax.Array], margin: jax.Array) -> jax.Array:
    """Weight of a given pair: sigma(output . tanh(hidden log sigma(d) + hidden_bias) + output_bias), in (0, 1).

    A new pair is worth sampling for a prompt with the probability 1 - weight.

    Args:
      params: as of `init_mixing`.
      margin: [B], d of the given pairs without beta; gets no gradient.

    Returns:
      float32[B].
    """
    x = jax.nn.log_sigmoid(jax.lax.stop_gradient(margin))[..., None]
    return jax.nn.sigmoid(
        jnp.sum(params["output"] * jnp.tanh(params["hidden"] * x + params["hidden_bias"]), axis=-1)
        + params["output_bias"]
    )


def _losses(off: tuple[LogProbs, ...], on: tuple[LogProbs, ...], weight: jax.Array, beta: float):
    """((h_w, h_l) of the given pairs, loss_off, loss_on, whether there is an online pair)."""
    h_w, h_l = log_ratios(*off)
    names = ("online_policy_chosen", "online_policy_rejected", "online_ref_chosen", "online_ref_rejected")
    check_statistics(policy_chosen=off[0], **dict(zip(names, on, strict=True)))
    check_positive(beta=beta)
    check_shape(h_w.shape, weight=weight)
    check_values_in(0.0, 1.0, where=has_tokens(*off[:2]), weight=weight)
    on_w, on_l = log_ratios(*on)
    online = (on[0].count > 0) & (on[1].count > 0)
    loss_on = jnp.where(online, jax.nn.softplus(-beta * (on_w - on_l)), 0.0)
    return (h_w, h_l), jax.nn.softplus(-beta * (h_w - h_l)), loss_on, online


@register("metaapo", category="preference", papers=("2509.23371",), proof=PROOF)
def metaapo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    online_policy_chosen: LogProbs,
    online_policy_rejected: LogProbs,
    online_ref_chosen: LogProbs,
    online_ref_rejected: LogProbs,
    weight: jax.Array,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """DPO on given and on sampled pairs, weighted per prompt (MetaAPO, arXiv:2509.23371).

      loss = w sp(-beta d_off) + (1 - w) sp(-beta d_on)

    A prompt without an online pair, all of whose counts are 0, has only its first term.

    Args:
      policy_chosen: of the given pairs, as the next three.
      online_policy_chosen: of pairs sampled from the policy for the same prompts, as the next three.
      weight: [B], w of `mixing_weight`; gets no gradient.
      beta: strength of the pull to the reference, above 0.

    Returns:
      LossOutput: weight = number of given pairs; metrics as `dpo` of the given pairs, and weight, loss_off, loss_on.
    """
    off = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    on = (online_policy_chosen, online_policy_rejected, online_ref_chosen, online_ref_rejected)
    (h_w, h_l), loss_off, loss_on, _ = _losses(off, on, weight, beta)
    w = jax.lax.stop_gradient(jnp.asarray(weight, jnp.float32))
    loss = w * loss_off + (1.0 - w) * loss_on
    rewards = beta * h_w, beta * h_l
    return reduce_pairs(loss, policy_chosen, policy_rejected, *rewards, weight=w, loss_off=loss_off, loss_on=loss_on)


@register("metaapo_weights", category="preference", papers=("2509.23371",), proof=PROOF)
def metaapo_weights(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    online_policy_chosen: LogProbs,
    online_policy_rejected: LogProbs,
    online_ref_chosen: LogProbs,
    online_ref_rejected: LogProbs,
    weight: jax.Array,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """The loss of `metaapo` as a function of the weights alone: what trains the network behind them.

    The log-probabilities get no gradient, the weights do. Prompts without an online pair have nothing to weigh and take
    no part.

    Args:
      weight: [B], of `mixing_weight`, whose parameters are trained.
      beta: as in `metaapo`.

    Returns:
      LossOutput: weight = number of prompts with both pairs; metrics weight, loss_off, loss_on.
    """
    off, on = jax.lax.stop_gradient(
        (
            (policy_chosen, policy_rejected, ref_chosen, ref_rejected),
            (online_policy_chosen, online_policy_rejected, online_ref_chosen, online_ref_rejected),
        )
    )
    _, loss_off, loss_on, online = _losses(off, on, weight, beta)
    valid = online & (off[0].count > 0) & (off[1].count > 0)
    metrics = {"weight": weight, "loss_off": loss_off, "loss_on": loss_on}
    return reduce_examples(weight * loss_off + (1.0 - weight) * loss_on, valid, metrics)

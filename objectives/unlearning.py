"""Unlearning and rerouting: losses of what a model is to forget, and of what it is to retain.

Each is one of two summands, and each has its own weight to be divided by: a step minimises

  forget.loss_sum / forget.weight + c retain.loss_sum / retain.weight

with the retaining summand either `cross_entropy` on the retained texts (gradient descent, "GD") or `retain_kl` (both
of arXiv:2407.06460; c is 1 in the code of arXiv:2404.05868). Rerouting weighs both by `rerouting_weights`.
"""

import math

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range, check_shape, check_statistics
from objectives.contrastive import unit_vectors
from objectives.distillation import function_matching
from objectives.output import LossOutput, reduce_examples
from objectives.registry import register
from objectives.statistics import LogProbs, check_targets, has_tokens, log_ratio, token_logps


@register(
    "gradient_ascent",
    category="unlearning",
    papers=("2210.01504", "2407.06460"),
    proof="test_unlearning.py::test_gradient_ascent_is_minus_cross_entropy",
)
def gradient_ascent(
    logits: jax.Array, targets: jax.Array, loss_mask: jax.Array, *, max_nll: float | None = None
) -> LossOutput:
    """Cross entropy of texts to forget with its sign turned (arXiv:2210.01504).

      loss = -sum_bt mask_bt min(nll_bt, max_nll)

    Unbounded below without max_nll, which is of this project: a token whose loss is greater has no gradient any more.

    Args:
      logits: float[B, T, Z].
      targets: int[B, T].
      loss_mask: [B, T], weight of each position; 0 leaves it out.
      max_nll: nats, above 0. None = no bound. log Z is what a model without knowledge has.

    Returns:
      LossOutput: weight = sum of the mask; metrics nll.

    Raises:
      ValueError: shapes disagree or max_nll is not above 0; outside of traced functions also a counted target outside
        [0, Z).
    """
    nll = -token_logps(logits, targets, loss_mask)
    check_targets(targets, loss_mask, logits.shape[-1])
    mask = loss_mask.astype(jnp.float32)
    metrics = {"nll": jax.lax.stop_gradient(jnp.sum(mask * nll))}
    if max_nll is not None:
        check_positive(max_nll=max_nll)
        nll = jnp.minimum(nll, max_nll)
    return LossOutput(-jnp.sum(mask * nll), jnp.sum(mask), metrics)


@register("npo", category="unlearning", papers=("2404.05868",), proof="test_unlearning.py::test_npo_is_its_definition")
def npo(policy: LogProbs, ref: LogProbs, *, beta: float = 0.1) -> LossOutput:
    """Negative preference optimisation of responses to forget (arXiv:2404.05868, and the authors' code).

      loss_b = (2 / beta) sp(beta h_b),   h = s - z, sums over tokens of the policy and the frozen reference

    As beta goes to 0 its gradient becomes that of `gradient_ascent` with sequences weighing alike; with beta above 0 a
    response that is forgotten already has no gradient.

    Args:
      policy: of the model that is trained.
      ref: of the model before unlearning, which gets no gradient.
      beta: above 0.

    Returns:
      LossOutput: weight = number of responses with counted tokens; metrics log_ratio (h), logp and logp_mean.

    Raises:
      ValueError: numbers of responses disagree or beta is not above 0.
    """
    check_statistics(policy=policy, ref=ref)
    check_positive(beta=beta)
    h = log_ratio(policy, ref)
    metrics = {"log_ratio": h, "logp": policy.sum, "logp_mean": policy.mean}
    return reduce_examples(2.0 / beta * jax.nn.softplus(beta * h), has_tokens(policy, ref), metrics)


@register(
    "simnpo", category="unlearning", papers=("2410.07163",), proof="test_unlearning.py::test_simnpo_is_its_definition"
)
def simnpo(policy: LogProbs, *, beta: float = 2.5, gamma: float = 0.0) -> LossOutput:
    """NPO without a reference, of means over tokens (SimNPO, arXiv:2410.07163).

      loss_b = (2 / beta) sp(beta s_b / n_b + gamma)

    As on the cards of the authors' models, which have gamma 0; other code multiplies gamma by beta. At beta 2.5 a
    response of -8 nats per token has next to no gradient.

    Args:
      policy: of the model that is trained.
      beta: above 0.
      gamma: margin.

    Returns:
      LossOutput: weight = number of responses with counted tokens; metrics logp and logp_mean.

    Raises:
      ValueError: not LogProbs, or beta is not above 0.
    """
    check_statistics(policy=policy)
    check_positive(beta=beta)
    loss = 2.0 / beta * jax.nn.softplus(beta * policy.mean + gamma)
    return reduce_examples(loss, has_tokens(policy), {"logp": policy.sum, "logp_mean": policy.mean})


@register(
    "retain_kl", category="unlearning", papers=("2407.06460", "2404.05868"), proof="test_unlearning.py::test_retain_kl"
)
def retain_kl(logits: jax.Array, ref_logits: jax.Array, mask: jax.Array) -> LossOutput:
    """Divergence of a model from what it was on texts to retain (arXiv:2404.05868, and the authors' code).

      loss = sum_bt mask_bt KL(ref_bt || policy_bt)

    `function_matching` at temperature 1.

    Args:
      logits: float[B, T, Z] of the model that is trained.
      ref_logits: float[B, T, Z] of the model before unlearning, which gets no gradient.
      mask: [B, T], 0 at what does not count, which may be NaN.

    Returns:
      LossOutput, as `function_matching`: weight = number of counted tokens.

    Raises:
      ValueError: shapes disagree.
    """
    return function_matching(logits, ref_logits, mask)


@register(
    "rerouting",
    category="unlearning",
    papers=("2406.04313",),
    proof="test_unlearning.py::test_rerouting_is_its_definition",
)
def rerouting(features: jax.Array, original_features: jax.Array, mask: jax.Array) -> LossOutput:
    """Turns a model's hidden states on harmful texts away from what they were (circuit breakers, arXiv:2406.04313).

      loss = sum_lbt mask_bt relu(cos(features_lbt, original_lbt))

    Nothing is lost by orthogonal states, nor by opposite ones. As in the authors' code (GraySwanAI/circuit-breakers,
    src/lorra_circuit_breaker.py), on layers 10 and 20. Weighed by the first of `rerouting_weights`.

    Args:
      features: float[L, B, T, D] of the layers that are rerouted, of the model that is trained.
      original_features: float[L, B, T, D] of the model before; they get no gradient.
      mask: [B, T], weight of each token; 0 leaves it out, be it NaN.

    Returns:
      LossOutput: weight = L times the sum of the mask; metrics cosine.

    Raises:
      ValueError: shapes disagree.
    """
    mask, features, original = _of_layers(features, original_features, mask)
    cosine = jnp.sum(unit_vectors(features) * unit_vectors(original), axis=-1)
    metrics = {"cosine": jax.lax.stop_gradient(jnp.sum(mask * cosine))}
    return LossOutput(jnp.sum(mask * jax.nn.relu(cosine)), jnp.sum(mask), metrics)


@register(
    "rerouting_retain",
    category="unlearning",
    papers=("2406.04313",),
    proof="test_unlearning.py::test_rerouting_retain_is_its_definition",
)
def rerouting_retain(features: jax.Array, original_features: jax.Array, mask: jax.Array) -> LossOutput:
    """Holds a model's hidden states on other texts to what they were (circuit breakers, arXiv:2406.04313).

      loss = sum_lbt mask_bt |features_lbt - original_lbt|_2

    The norm, not its square, with gradient 0 where both are equal, as they are at the start. The authors' code has the
    mean over padding too, where the difference is 0. Weighed by the second of `rerouting_weights`.

    Args:
      features: float[L, B, T, D], as in `rerouting`; the authors take all layers here.
      original_features: likewise.
      mask: likewise.

    Returns:
      LossOutput: weight = L times the sum of the mask; metrics distance.

    Raises:
      ValueError: shapes disagree.
    """
    mask, features, original = _of_layers(features, original_features, mask)
    square = jnp.sum(jnp.square(features - original), axis=-1)
    distance = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    loss = jnp.sum(mask * distance)
    return LossOutput(loss, jnp.sum(mask), {"distance": jax.lax.stop_gradient(loss)})


def rerouting_weights(step: jax.Array | float, *, steps: int = 150, alpha: float = 10.0) -> tuple[jax.Array, jax.Array]:
    """Factors of `rerouting` and `rerouting_retain` at a step: alpha (1 - t / 2T) and alpha t / 2T, held after 2T.

    So in the authors' code: rerouting first, retaining more and more, and both alike at t = T.

    Args:
      step: t; the authors' first step has t = 1, their last T.
      steps: T, 150 in the authors' scripts.
      alpha: 10 for Llama 3, 5 for Mistral in the authors' scripts.

    Raises:
      ValueError: steps or alpha is not above 0.
    """
    check_positive(steps=steps, alpha=alpha)
    check_range(0.0, math.inf, step=step)
    progress = jnp.minimum(jnp.asarray(step, jnp.float32) / (2.0 * steps), 1.0)
    return alpha * (1.0 - progress), alpha * progress


def _of_layers(features, original, mask):
    if features.ndim != 4:
        raise ValueError(f"features must be [L, B, T, D], got {features.shape}")
    check_shape(features.shape, original_features=original)
    check_shape(features.shape[1:3], mask=mask)
    mask = jnp.broadcast_to(mask.astype(jnp.float32), features.shape[:3])
    features, original = (jnp.where((mask != 0)[..., None], x.astype(jnp.float32), 0.0) for x in (features, original))
    return mask, features, jax.lax.stop_gradient(original)

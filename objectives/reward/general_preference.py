"""Preferences that need not be transitive: an embedding per response and an antisymmetric score (arXiv:2410.02197), or
a language model that is shown both responses (arXiv:2405.07863)."""

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_shape, check_values_in
from objectives.output import LossOutput, reduce_examples
from objectives.preference.dpo import smoothed_preference
from objectives.registry import register
from objectives.reward.bradley_terry import valid_rows


def unit_embedding(x: jax.Array) -> jax.Array:
    """x / ||x|| along the last axis, float32; 0 stays 0, with a gradient of 0."""
    x = jnp.float32(x)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    safe = jnp.where(square > 0, square, 1.0)
    return jnp.where(square > 0, x / jnp.sqrt(safe), 0.0)


def general_preference_score(first: jax.Array, second: jax.Array, gates: jax.Array | None = None) -> jax.Array:
    """S(u, v) = sum_b c_b (u_2b v_2b+1 - u_2b+1 v_2b), antisymmetric (arXiv:2410.02197, equation 4.1).

    Args:
      first: [..., 2K], u.
      second: [..., 2K], v.
      gates: [..., K], c, of the prompt and not below 0; in the authors' code K times a softmax. None: 1.

    Returns:
      float32 [...]; above 0 if the first response is preferred.

    Raises:
      ValueError: last axes disagree or are odd.
    """
    first, second = jnp.float32(first), jnp.float32(second)
    size = first.shape[-1]
    if size % 2 or second.shape[-1] != size or (gates is not None and jnp.shape(gates)[-1] != size // 2):
        raise ValueError(
            f"embeddings must be [..., 2K] and gates [..., K], "
            f"got {first.shape}, {second.shape} and {None if gates is None else jnp.shape(gates)}"
        )
    blocks = first[..., 0::2] * second[..., 1::2] - first[..., 1::2] * second[..., 0::2]
    return jnp.sum(blocks if gates is None else blocks * gates, axis=-1)


@register(
    "general_preference",
    category="reward",
    papers=("2410.02197",),
    proof="test_general_preference.py::test_is_its_definition",
)
def general_preference(
    embedding_chosen: jax.Array,
    embedding_rejected: jax.Array,
    gates: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    temperature: float = 0.1,
    normalised: bool = True,
) -> LossOutput:
    """Logistic loss of an antisymmetric score of embeddings (arXiv:2410.02197).

      loss = sp(-S(v_w, v_l) / temperature),   S = `general_preference_score`

    One block, K = 1, fits cycles of preferences, which no scalar reward can; embeddings (r, 1), not normalised, are the
    Bradley-Terry model.

    Args:
      embedding_chosen: float[B, 2K], v_w.
      embedding_rejected: float[B, 2K], v_l.
      gates: [B, K] of the prompt. None: 1.
      mask: [B], 0 at padding.
      temperature: above 0; in the authors' scripts 0.1, or 1 for K = 1.
      normalised: whether embeddings are first divided by their norms.

    Returns:
      LossOutput: weight = number of pairs; metrics accuracy and score.

    Raises:
      ValueError: shapes disagree or the temperature is not above 0.
    """
    check_positive(temperature=temperature)
    if jnp.ndim(embedding_chosen) != 2:
        raise ValueError(f"embedding_chosen must be [B, 2K], got {jnp.shape(embedding_chosen)}")
    check_shape(jnp.shape(embedding_chosen), embedding_rejected=embedding_rejected)
    if normalised:
        embedding_chosen, embedding_rejected = unit_embedding(embedding_chosen), unit_embedding(embedding_rejected)
    score = general_preference_score(embedding_chosen, embedding_rejected, gates)
    metrics = {"accuracy": (score > 0).astype(jnp.float32), "score": score}
    return reduce_examples(jax.nn.softplus(-score / temperature), valid_rows(mask, score.shape[0]), metrics)


@register(
    "pair_preference",
    category="reward",
    papers=("2405.07863",),
    proof="test_general_preference.py::test_pair_preference_is_its_definition",
)
def pair_preference(
    option_logits: jax.Array,
    swapped_logits: jax.Array,
    label: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> LossOutput:
    """A language model that is shown two responses says which is better, in both orders (arXiv:2405.07863).

      P = sigma(l_A - l_B),   loss = (CE(P, p) + CE(P', 1 - p)) / 2,   p = label

    l are the logits of the two answers; P' is of the same question with the responses in the other order, so that no
    place is preferred for its own sake. Both orders for each pair are ours; the paper shuffles.

    Args:
      option_logits: float[B, 2], logits of the answers (A, B), A the first response, which is shown first.
      swapped_logits: float[B, 2], likewise with the second response shown first, as A.
      label: [B], probability in [0, 1] that the first response is better. None: 1.
      mask: [B], 0 at padding.

    Returns:
      LossOutput: weight = number of pairs; metrics probability, the mean (P + 1 - P') / 2 of both orders, to judge by;
      accuracy of it; and agreement, whether both orders name the same response.

    Raises:
      ValueError: shapes disagree or, outside of traced functions, a label is out of range.
    """
    if jnp.ndim(option_logits) != 2 or jnp.shape(option_logits)[1] != 2:
        raise ValueError(f"option_logits must be [B, 2], (A, B), got {jnp.shape(option_logits)}")
    check_shape(jnp.shape(option_logits), swapped_logits=swapped_logits)
    size = jnp.shape(option_logits)[0]
    valid = valid_rows(mask, size)
    label = jnp.ones((size,)) if label is None else label
    check_shape((size,), label=label)
    check_values_in(0.0, 1.0, where=valid, label=label)
    label = jax.lax.stop_gradient(jnp.asarray(label, jnp.float32))
    one, two = (x[:, 0] - x[:, 1] for x in (jnp.float32(option_logits), jnp.float32(swapped_logits)))
    loss = 0.5 * (smoothed_preference(one, label) + smoothed_preference(two, 1.0 - label))
    probability = 0.5 * (jax.nn.sigmoid(one) + jax.nn.sigmoid(-two))
    metrics = {
        "probability": probability,
        "accuracy": ((probability > 0.5) == (label > 0.5)).astype(jnp.float32),
        "agreement": ((one > 0) == (two < 0)).astype(jnp.float32),
    }
    return reduce_examples(loss, valid, metrics)

"""Multi-token prediction (arXiv:2404.19737): heads on one trunk, each for a token further ahead."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from objectives.checks import check_shape, check_values_in
from objectives.language_model import cross_entropy
from objectives.output import LossOutput
from objectives.registry import register

Head = Callable[[jax.Array, Any, Any], jax.Array]


def shifted_targets(
    targets: jax.Array, loss_mask: jax.Array, documents: jax.Array | None, ahead: int
) -> tuple[jax.Array, jax.Array]:
    """Targets and mask of the head that predicts `ahead` tokens beyond the next one.

      targets'_bt = targets_b,t+ahead,   mask'_bt = mask_b,t+ahead [document of t + ahead = document of t]

    and 0 past the end.

    Args:
      targets: int[B, T], next tokens.
      loss_mask: [B, T], of the next token.
      documents: int[B, T], equal for positions of one document; None = a row is one.
      ahead: at least 0.
    """

    def shift(x: jax.Array, fill: int) -> jax.Array:
        return jnp.pad(x[:, ahead:], ((0, 0), (0, min(ahead, x.shape[1]))), constant_values=fill)

    mask = shift(loss_mask, 0)
    if documents is not None:
        mask = jnp.where(shift(documents, -1) == documents, mask, 0)
    return shift(targets, 0), mask


def _all_targets(targets, loss_mask, documents, heads: int) -> tuple[jax.Array, jax.Array]:
    check_shape(targets.shape, loss_mask=loss_mask)
    if documents is not None:
        check_shape(targets.shape, documents=documents)
    pairs = [shifted_targets(targets, loss_mask, documents, ahead) for ahead in range(heads)]
    return jnp.stack([x for x, _ in pairs]), jnp.stack([mask for _, mask in pairs])


def _coefficients(weights: Sequence[float] | jax.Array | None, heads: int) -> jax.Array:
    if weights is None:
        return jnp.ones(heads, jnp.float32)
    coefficients = jnp.asarray(weights, jnp.float32)
    check_shape((heads,), weights=coefficients)
    check_values_in(0.0, float("inf"), weights=coefficients)
    return coefficients


def _output(losses: jax.Array, accuracies: jax.Array, counts: jax.Array, loss: jax.Array) -> LossOutput:
    metrics = {}
    for k in range(losses.shape[0]):
        metrics |= {f"nll_{k + 1}": losses[k], f"accuracy_{k + 1}": accuracies[k], f"tokens_{k + 1}": counts[k]}
    return LossOutput(loss, counts[0], jax.lax.stop_gradient(metrics))


@register(
    "multi_token_prediction",
    category="language_model",
    papers=("2404.19737",),
    proof="test_multi_token.py::test_is_its_definition",
)
def multi_token_prediction(
    logits: jax.Array,
    targets: jax.Array,
    loss_mask: jax.Array,
    documents: jax.Array | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> LossOutput:
    """Sum of the cross entropies of K heads, of which head k predicts k tokens ahead (arXiv:2404.19737, equation 2).

      loss = sum_k c_k sum_bt mask_b,t+k-1 nll_k,bt(targets_b,t+k-1),   k = 1 .. K

    Each head has fewer targets than the one before: a document's last tokens have none so far ahead. All are divided by
    the number of targets of the first, as the paper's sum over positions is. `multi_token_heads` gives the same numbers
    without the logits of all heads at a time.

    Args:
      logits: float[K, B, T, Z].
      targets: int[B, T], next tokens.
      loss_mask: [B, T], weight of each next token; a head weighs a target as the first head does.
      documents: int[B, T] of packed rows, equal for positions of one document: nothing is predicted across documents.
        None = a row is one.
      weights: c, K numbers from 0 up; None = 1 for all, as in the paper.

    Returns:
      LossOutput: weight = sum of the mask; metrics nll_k and accuracy_k of each head, over tokens_k, its mask.

    Raises:
      ValueError: shapes disagree or a weight is negative.
    """
    if logits.ndim != 4 or not logits.shape[0]:
        raise ValueError(f"logits must be [K, B, T, Z] with K >= 1, got {logits.shape}")
    check_shape(logits.shape[1:3], targets=targets)
    coefficients = _coefficients(weights, logits.shape[0])
    labels, masks = _all_targets(targets, loss_mask, documents, logits.shape[0])
    outputs = [cross_entropy(*each) for each in zip(logits, labels, masks, strict=True)]
    losses, accuracies, counts = (
        jnp.stack(x) for x in zip(*[(o.loss_sum, o.metrics["accuracy"], o.weight) for o in outputs], strict=True)
    )
    return _output(losses, accuracies, counts, jnp.sum(coefficients * losses))


def multi_token_heads(
    head: Head,
    trunk: jax.Array,
    shared: Any,
    heads: Any,
    targets: jax.Array,
    loss_mask: jax.Array,
    documents: jax.Array | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> LossOutput:
    """`multi_token_prediction` of head(trunk, shared, heads[k]), one head after another (the paper's figure 2).

    Where a gradient is wanted, each head's backward pass follows its forward pass, before the next head's: the logits
    of one head exist at a time, and what stays is their gradient at the trunk, summed in float32, at the shared
    parameters, likewise, and at each head's own. No head is computed twice. Only first derivatives are possible.

    Args:
      head: (trunk, shared, own) -> float[B, T, Z]. It must not close over traced arrays: pass them in `shared`.
      trunk: [B, T, D] activations that all heads read.
      shared: parameters that all heads use, such as the unembedding.
      heads: parameters of the heads, stacked: every leaf is [K, ...].
      targets: as `multi_token_prediction`.
      loss_mask: likewise.
      documents: likewise.
      weights: likewise.

    Returns:
      LossOutput, as `multi_token_prediction`; only loss_sum has a gradient.

    Raises:
      ValueError: shapes disagree, the leaves of `heads` have not one leading size, or a weight is negative.
    """
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(heads)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"every leaf of heads must be [K, ...] of one K >= 1, got leading sizes {sorted(sizes)}")
    number = sizes.pop()
    coefficients = _coefficients(weights, number)
    labels, masks = _all_targets(targets, loss_mask, documents, number)
    given = (labels, masks, coefficients)
    loss, losses, accuracies, counts = _in_turn(head, (trunk, shared), heads, given)  # pyright: ignore
    return _output(losses, accuracies, counts, loss)


def _one_head(head, common, own, given):
    labels, mask, coefficient = given
    trunk, shared = common
    output = cross_entropy(head(trunk, shared, own), labels, mask)
    return coefficient * output.loss_sum, (output.loss_sum, output.metrics["accuracy"], output.weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_turn(head, common, heads, given):
    losses, statistics = jax.lax.map(lambda x: _one_head(head, common, *x), (heads, given))
    return jnp.sum(losses), *statistics


def _in_turn_forward(head, common, heads, given):
    def step(total, x):
        one = functools.partial(_one_head, head)
        (loss, statistics), (d_common, d_own) = jax.value_and_grad(one, (0, 1), has_aux=True)(common, *x)
        return jax.tree.map(jnp.add, total, d_common), (loss, statistics, d_own)

    # float32 however narrow the parameters are
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), common)
    d_common, (losses, statistics, d_heads) = jax.lax.scan(step, zeros, (heads, given))
    d_common = jax.tree.map(lambda d, x: d.astype(x.dtype), d_common, common)
    return (jnp.sum(losses), *statistics), (d_common, d_heads)


def _in_turn_backward(head, gradients, cotangents):
    del head
    d_common, d_heads = jax.tree.map(lambda d: (cotangents[0] * d).astype(d.dtype), gradients)
    return d_common, d_heads, None


_in_turn.defvjp(_in_turn_forward, _in_turn_backward)

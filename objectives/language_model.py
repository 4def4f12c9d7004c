"""Objectives of given tokens under logits: next tokens, and tokens hidden from a bidirectional model."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from objectives.checks import check_range, check_shape, check_values_in
from objectives.output import LossOutput
from objectives.registry import register
from objectives.statistics import check_targets
from zoo.core.registry import check_choice


@register("cross_entropy", category="language_model", proof="test_cross_entropy.py::test_is_its_definition")
def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    loss_mask: jax.Array,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Cross entropy of next tokens, as sums.

    With log p_z = logits_z - log Z, log Z = logsumexp(logits), e = label_smoothing and Z classes:

      loss = sum_bt mask_bt [ -(1 - e) log p_target - (e / Z) sum_z log p_z + z_loss (log Z)^2 ]

    Computed in float32. No log-probabilities of the size of `logits` are formed. Where the mask is 0, neither logits
    (which may be NaN) nor targets (which may be any number) reach the loss or its gradient.

    Smoothing is that of torch, of optax's `smooth_labels` and of transformers' LabelSmoother. Its mean is over all Z
    classes, so columns that only pad a vocabulary must be cut off, `logits[..., :vocab_size]`. Without smoothing it is
    enough that they are -inf; with it, -inf makes the loss infinite.

    Args:
      logits: float[B, T, Z].
      targets: int[B, T].
      loss_mask: [B, T], weight of each position; 0 leaves it out.
      z_loss: coefficient of the squared log-normaliser (PaLM, arXiv:2204.02311, section 5).
      label_smoothing: probability mass spread evenly over all classes, in [0, 1).

    Returns:
      LossOutput: weight = sum of the mask; metrics nll (without smoothing and z-loss), accuracy; z_loss where used.

    Raises:
      ValueError: shapes disagree or an option is out of range; outside of traced functions also a counted target
        outside [0, Z), which makes the loss NaN in a traced one.
    """
    if targets.shape != logits.shape[:-1] or loss_mask.shape != targets.shape:
        raise ValueError(
            f"logits {logits.shape} need targets and loss_mask of shape {logits.shape[:-1]}, "
            f"got {targets.shape} and {loss_mask.shape}"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if z_loss < 0.0:
        raise ValueError(f"z_loss must be >= 0, got {z_loss}")
    mask = loss_mask.astype(jnp.float32)
    counted = mask != 0
    check_targets(targets, counted, logits.shape[-1])
    targets = jnp.where(counted, targets, 0)
    logits = jnp.where(counted[..., None], logits.astype(jnp.float32), 0.0)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A comparison in place of a gather: it fuses, splits over a sharded vocabulary, and its gradient needs no scatter.
    classes = jnp.arange(logits.shape[-1], dtype=targets.dtype)
    target_logit = jnp.sum(jnp.where(classes == targets[..., None], logits, 0.0), axis=-1)
    # A target outside the vocabulary must not pass for a class of logit 0.
    target_logit = jnp.where((targets >= 0) & (targets < logits.shape[-1]), target_logit, jnp.nan)
    nll = log_z - target_logit
    loss = nll
    if label_smoothing:
        loss = (1.0 - label_smoothing) * nll + label_smoothing * (log_z - jnp.mean(logits, axis=-1))
    metrics = {
        "nll": jnp.sum(mask * nll),
        "accuracy": jnp.sum(mask * (jnp.argmax(logits, axis=-1) == targets)),
    }
    if z_loss:
        penalty = z_loss * jnp.square(log_z)
        loss = loss + penalty
        metrics["z_loss"] = jnp.sum(mask * penalty)
    return LossOutput(jnp.sum(mask * loss), jnp.sum(mask), jax.lax.stop_gradient(metrics))


@register(
    "instruction_modelling",
    category="language_model",
    papers=("2405.14394",),
    proof="test_instructions.py::test_instruction_modelling_is_its_definition",
)
def instruction_modelling(
    logits: jax.Array,
    targets: jax.Array,
    response_mask: jax.Array,
    prompt_mask: jax.Array,
    *,
    prompt_weight: float = 1.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Cross entropy of responses and of the instructions before them (arXiv:2405.14394).

      loss = sum_bt (response_bt + w prompt_bt) loss_bt,   w = prompt_weight, loss_bt of `cross_entropy`

    As in the paper, tokens of the chat template belong to neither mask. The paper has w = 1, other weights are of this
    project, and w = 0 is tuning on responses alone. Everything else as `cross_entropy`.

    Args:
      logits: float[B, T, Z].
      targets: int[B, T].
      response_mask: [B, T], 1 at tokens of responses.
      prompt_mask: [B, T], 1 at tokens of instructions; nowhere where response_mask is 1.
      prompt_weight: w, at least 0.
      z_loss: as `cross_entropy`.
      label_smoothing: as `cross_entropy`.

    Returns:
      LossOutput: weight = sum of response + w prompt; metrics of `cross_entropy`, over the same weight, and
      nll_response, nll_prompt, tokens_response and tokens_prompt, over tokens.

    Raises:
      ValueError: shapes disagree, an option is out of range, or, outside of traced functions, masks overlap.
    """
    check_shape(targets.shape, response_mask=response_mask, prompt_mask=prompt_mask)
    check_range(0.0, math.inf, prompt_weight=prompt_weight)
    response, prompt = (x.astype(jnp.float32) for x in (response_mask, prompt_mask))
    check_values_in(0.0, 1.0, **{"response_mask + prompt_mask": response + prompt})
    output = cross_entropy(
        logits, targets, response + prompt_weight * prompt, z_loss=z_loss, label_smoothing=label_smoothing
    )
    metrics = {"tokens_response": jnp.sum(response), "tokens_prompt": jnp.sum(prompt)}
    for name, mask in (("response", response), ("prompt", prompt)):
        metrics[f"nll_{name}"] = cross_entropy(logits, targets, mask).loss_sum
    return dataclasses.replace(output, metrics=output.metrics | jax.lax.stop_gradient(metrics))


@register(
    "weighted_cross_entropy",
    category="language_model",
    papers=("2410.18565",),
    proof="test_instructions.py::test_weighted_cross_entropy_is_its_definition",
)
def weighted_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    loss_mask: jax.Array,
    quality: jax.Array,
    *,
    normalise: str = "weighted",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Cross entropy of examples weighted by their quality (Bielik 7B, arXiv:2410.18565, equation 6).

      loss = sum_b q_b sum_t mask_bt loss_bt,   loss_bt of `cross_entropy`

    The report weighs its high, medium and low quality 1, 0.7 and 0.5. Its rule for the learning rate goes with this:
    `objectives.optimizers.scale_by_token_count`.

    Args:
      logits: float[B, T, Z].
      targets: int[B, T].
      loss_mask: [B, T].
      quality: q, [B] or, for packed rows, [B, T]; in [0, 1], 1 for the best examples. One of quality 0 takes no part.
      normalise: what the loss is divided by: "weighted", the sum of q mask, so that a batch of equal qualities is
        `cross_entropy` whatever they are; or "plain", the sum of the mask, so that poor batches take smaller steps. The
        report gives the loss of a token alone.
      z_loss: as `cross_entropy`.
      label_smoothing: as `cross_entropy`.

    Returns:
      LossOutput: weight as `normalise` says; metrics as `cross_entropy`, weighted by q.

    Raises:
      ValueError: shapes disagree, an option is out of range, or, outside of traced functions, a quality is.
    """
    if quality.ndim == 1:
        check_shape(targets.shape[:1], quality=quality)
        quality = quality[:, None]
    else:
        check_shape(targets.shape, quality=quality)
    check_choice("normalise", normalise, ("weighted", "plain"))
    mask = loss_mask.astype(jnp.float32)
    counted = jnp.where(mask != 0, quality.astype(jnp.float32), 0.0)
    check_values_in(0.0, 1.0, quality=counted)
    output = cross_entropy(logits, targets, mask * counted, z_loss=z_loss, label_smoothing=label_smoothing)
    return output if normalise == "weighted" else dataclasses.replace(output, weight=jnp.sum(mask))


@register(
    "masked_language_model",
    category="language_model",
    papers=("1810.04805",),
    proof="test_masked_language_model.py::test_loss_is_over_selected_tokens",
)
def masked_language_model(
    logits: jax.Array, targets: jax.Array, selected: jax.Array, *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> LossOutput:
    """Cross entropy of tokens hidden from a bidirectional model (BERT, arXiv:1810.04805, section 3.1).

    `cross_entropy` with the selected tokens as mask: nothing is shifted, logits stand at the tokens that they predict.

    Args:
      logits: float[B, T, Z], of a model that sees the tokens of `hide_tokens`.
      targets: int[B, T], the tokens before that.
      selected: [B, T], of `hide_tokens`: also those that it left as they are or made another.
      z_loss: as `cross_entropy`.
      label_smoothing: as `cross_entropy`.

    Returns:
      LossOutput: weight = number of selected tokens; metrics as `cross_entropy`.

    Raises:
      ValueError: as `cross_entropy`.
    """
    return cross_entropy(logits, targets, selected, z_loss=z_loss, label_smoothing=label_smoothing)


def hide_tokens(
    key: jax.Array,
    tokens: jax.Array,
    valid: jax.Array | None = None,
    *,
    mask_token: int,
    vocab_size: int,
    rate: float = 0.15,
    keep: float = 0.1,
    replace: float = 0.1,
) -> tuple[jax.Array, jax.Array]:
    """Selects tokens to predict and hides most of them (BERT, arXiv:1810.04805, section 3.1).

    Each valid token is selected with probability `rate`, independently. Of the selected, a share `keep` stays, a share
    `replace` becomes a token drawn uniformly from [0, vocab_size), perhaps itself, and the rest the mask token.

    Args:
      key: random key.
      tokens: int[B, T].
      valid: bool[B, T]; what is not valid (padding, special tokens) is never selected. None = all.
      mask_token: id.
      vocab_size: number of ids to draw from.
      rate: in [0, 1].
      keep: in [0, 1].
      replace: in [0, 1]; keep + replace at most 1.

    Returns:
      (int[B, T] tokens, bool[B, T] which were selected).

    Raises:
      ValueError: shapes disagree or an option is out of range.
    """
    check_range(0.0, 1.0, rate=rate, keep=keep, replace=replace)
    if keep + replace > 1.0:
        raise ValueError(f"keep + replace must be at most 1, got {keep} + {replace}")
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
    choose, fate, draw = jax.random.split(key, 3)
    selected = jax.random.uniform(choose, tokens.shape) < rate
    if valid is not None:
        check_shape(tokens.shape, valid=valid)
        selected &= valid != 0
    u = jax.random.uniform(fate, tokens.shape)
    other = jax.random.randint(draw, tokens.shape, 0, vocab_size, tokens.dtype)
    hidden = jnp.where(u < keep, tokens, jnp.where(u < keep + replace, other, mask_token))
    return jnp.where(selected, hidden, tokens), selected

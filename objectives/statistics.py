"""What a model says of given tokens: log-probabilities by token and by sequence.

Preference, reinforcement and unlearning objectives are functions of these numbers and of nothing else.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.linear_cross_entropy import linear_cross_entropy


@flax.struct.dataclass
class LogProbs:
    """Log-probabilities that a model gives to the counted tokens of B responses; all float32.

    Attributes:
      sum: [B], over counted tokens.
      mean: [B], sum / max(count, 1).
      count: [B], number of counted tokens.
      per_token: [B, T], 0 where a token is not counted.
      mask: [B, T], 1 where a token is counted, else 0.

    Of packed rows, `sum`, `mean` and `count` have one entry per example, `per_token` and `mask` those of the rows.
    """

    sum: jax.Array
    mean: jax.Array
    count: jax.Array
    per_token: jax.Array
    mask: jax.Array

    @property
    def packed(self) -> bool:
        """Whether the rows of `per_token` are not the examples of `sum`."""
        return self.sum.shape[0] != self.per_token.shape[0]


def log_ratio(policy: LogProbs, ref: LogProbs) -> jax.Array:
    """h = log pi(y | x) - log ref(y | x), float32 [B]; the reference has no gradient."""
    return policy.sum - jax.lax.stop_gradient(ref.sum)


def has_tokens(first: LogProbs, *others: LogProbs) -> jax.Array:
    """bool[B]: whether every response has counted tokens, which padding of a batch has not."""
    valid = first.count > 0
    for other in others:
        valid = valid & (other.count > 0)
    return valid


def is_concrete(*arrays: Any) -> bool:
    """Whether the values of all arrays can be looked at, which they cannot while a function is traced."""
    return not any(isinstance(x, Tracer) for x in arrays)


def sequence_logps(
    logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    examples: jax.Array | None = None,
    num_examples: int | None = None,
) -> LogProbs:
    """Log-probabilities of target tokens under logits, by token and summed over each response.

      per_token_bt = mask_bt (logits_bt,target - logsumexp_z logits_btz),   sum_b = sum_t per_token_bt

    Float32 inside whatever the dtype of the logits; neither pass makes an array of their size in float32 on the way,
    and the gradient has their dtype. Where the mask is 0, neither logits (which may be NaN) nor targets (which may be
    any number) reach a result or the gradient.

    Args:
      logits: float[B, T, Z]; logits[:, t] predict targets[:, t].
      targets: int[B, T], tokens, already shifted.
      mask: [B, T], 1 or True at tokens of the response, its end-of-text token included, 0 elsewhere.
      examples: int[B, T] for packed rows: which of `num_examples` examples a token belongs to. None: a row is one.
      num_examples: number of examples in packed rows, with `examples` only.

    Raises:
      ValueError: shapes disagree; outside of a traced function also a counted target outside [0, Z), a mask that is
        neither 0 nor 1, and a response without a counted token. In a traced function such a target makes the
        log-probability NaN, and such a response has a count of 0.
    """
    if logits.ndim != 3 or targets.shape != logits.shape[:-1] or mask.shape != targets.shape:
        raise ValueError(
            f"sequence_logps: logits must be [B, T, Z] and targets and mask [B, T], "
            f"got {logits.shape}, {targets.shape} and {mask.shape}"
        )
    _check_values(targets, mask, logits.shape[-1], examples, num_examples)
    return collect_logps(token_logps(logits, targets, mask), mask, examples, num_examples)


def token_logps(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """`sequence_logps` before any sum, and without its look at values: float32 [..., T], 0 where the mask is 0.

    Args:
      logits: float[..., T, Z].
      targets: int[..., T].
      mask: [..., T].

    Raises:
      ValueError: shapes disagree.
    """
    if targets.shape != logits.shape[:-1] or mask.shape != targets.shape:
        raise ValueError(
            f"token_logps: logits {logits.shape} need targets and mask of shape {logits.shape[:-1]}, "
            f"got {targets.shape} and {mask.shape}"
        )
    counted = mask != 0
    return _token_logps(logits, jnp.where(counted, targets, 0), counted)


def check_targets(targets: jax.Array, counted: jax.Array, classes: int) -> None:
    """Raises ValueError that names the first counted target outside [0, classes); traced arrays pass.

    Args:
      targets: int[...].
      counted: [...], 0 where a target does not matter.
      classes: size of the vocabulary.
    """
    if not is_concrete(targets, counted):
        return
    labels = np.asarray(targets)
    wrong = (np.asarray(counted) != 0) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"targets{list(place)} = {labels[place]} is outside the vocabulary, [0, {classes}); "
            "mask it or check the tokenizer"
        )


def linear_sequence_logps(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    examples: jax.Array | None = None,
    num_examples: int | None = None,
    **head: Any,
) -> LogProbs:
    """`sequence_logps` of the logits x w, of which only those of some classes exist at a time, in either pass.

    Args:
      x: [B, T, D] activations before the head; where the mask is 0 they may be NaN.
      w: [D, Z] weights of the head.
      targets: int[B, T], as in `sequence_logps`.
      mask: [B, T], as in `sequence_logps`.
      examples: as in `sequence_logps`.
      num_examples: as in `sequence_logps`.
      **head: options of `pallas_kernels.linear_cross_entropy`: transposed (w is [Z, D]), logit_scale, soft_cap,
        chunk_size, implementation.

    Raises:
      ValueError: as `sequence_logps` and `linear_cross_entropy`.
    """
    if x.ndim != 3 or targets.shape != x.shape[:-1] or mask.shape != targets.shape:
        raise ValueError(
            f"linear_sequence_logps: x must be [B, T, D] and targets and mask [B, T], "
            f"got {x.shape}, {targets.shape} and {mask.shape}"
        )
    _check_values(targets, mask, w.shape[0 if head.get("transposed") else 1], examples, num_examples)
    counted = mask != 0
    labels = jnp.where(counted, targets, 0).astype(jnp.int32).reshape(-1)
    nll = linear_cross_entropy(x.reshape(-1, x.shape[-1]), w, labels, **head).nll
    return collect_logps(-jnp.where(counted, nll.reshape(targets.shape), 0.0), mask, examples, num_examples)


def log_collision(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """log sum_z p_z^2 at each position: how likely two samples of the model's next token agree. Has no gradient.

    Args:
      logits: float[B, T, Z].
      mask: [B, T], 1 or True at tokens of the response, 0 elsewhere; logits there may be NaN.

    Returns:
      float32 [B, T], in [-log Z, 0], 0 where the mask is 0.

    Raises:
      ValueError: shapes disagree.
    """
    if logits.ndim != 3 or mask.shape != logits.shape[:-1]:
        raise ValueError(
            f"log_collision: logits must be [B, T, Z] and mask [B, T], got {logits.shape} and {mask.shape}"
        )
    logits = jax.lax.stop_gradient(logits)
    (top, rest), (top_of_squares, rest_of_squares) = _log_normaliser(logits), _log_normaliser(logits, 2.0)
    return jnp.where(mask != 0, (top_of_squares - 2.0 * top) + (rest_of_squares - 2.0 * rest), 0.0)


def _check_values(
    targets: jax.Array, mask: jax.Array, classes: int, examples: jax.Array | None, num_examples: int | None
) -> None:
    if (examples is None) != (num_examples is None):
        raise ValueError("examples and num_examples go together: both for packed rows, neither otherwise")
    if examples is not None and examples.shape != mask.shape:
        raise ValueError(f"examples must be [B, T] = {mask.shape}, got {examples.shape}")
    if not is_concrete(targets, mask, examples):
        return
    counted = np.asarray(mask)
    if not np.isin(counted, (0, 1)).all():
        raise ValueError("mask must be 0 or 1 everywhere: weights of tokens belong to the objective")
    counted = counted != 0
    if num_examples is not None:
        found = np.unique(np.asarray(examples)[counted])
        if found.tolist() != list(range(num_examples)):
            raise ValueError(
                f"counted tokens must belong to the examples 0 to {num_examples - 1}, got {found.tolist()}"
            )
    elif (empty := np.flatnonzero(~counted.any(axis=-1))).size:
        raise ValueError(f"row {empty[0]} of mask counts no token: a response has at least its end-of-text token")
    check_targets(targets, counted, classes)


def collect_logps(
    per_token: jax.Array, mask: jax.Array, examples: jax.Array | None = None, num_examples: int | None = None
) -> LogProbs:
    """LogProbs of `token_logps`; arguments as in `sequence_logps`."""
    mask = mask.astype(jnp.float32)
    if examples is None or num_examples is None:
        total, count = jnp.sum(per_token, axis=-1), jnp.sum(mask, axis=-1)
    else:
        # Uncounted tokens may carry any number: they go to an entry past the last, which is dropped.
        index = jnp.where(mask != 0, examples, num_examples).reshape(-1)
        total, count = (jax.ops.segment_sum(x.reshape(-1), index, num_segments=num_examples) for x in (per_token, mask))
    return LogProbs(total, total / jnp.maximum(count, 1.0), count, per_token, mask)


def _log_normaliser(logits: jax.Array, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """float32 (a, b), a + b = log sum_z e^(scale logits_z) and a the largest term, apart for the sake of precision.

    The maximum is taken in the dtype of the logits, so that one reduction alone reads them in float32. XLA for CPUs
    fuses a conversion with one reduction; for two it would write out the copy.
    """
    top = jnp.max(logits, axis=-1).astype(jnp.float32)
    top = scale * jnp.where(jnp.isfinite(top), top, 0.0)
    return top, jnp.log(jnp.sum(jnp.exp(scale * logits.astype(jnp.float32) - top[..., None]), axis=-1))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _widen(x: jax.Array) -> jax.Array:
    """x.astype(float32), which XLA does not take for the same: it would keep the copy of one pass for the other."""
    if x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(_bits(x).astype(jnp.uint32) << 16, jnp.float32)


@jax.custom_vjp
def _token_logps(logits: jax.Array, targets: jax.Array, counted: jax.Array) -> jax.Array:
    """Float32 [B, T] log-probabilities of targets, 0 where not counted."""
    return _token_logps_forward(logits, targets, counted)[0]


def _token_logps_forward(logits, targets, counted):
    top, rest = _log_normaliser(logits)
    known = (targets >= 0) & (targets < logits.shape[-1])
    # Gathered as integers: of bfloat16 XLA for CPUs would convert all before it gathers.
    target = jnp.take_along_axis(_bits(logits), jnp.where(known, targets, 0)[..., None], axis=-1)[..., 0]
    target = jax.lax.bitcast_convert_type(target, logits.dtype).astype(jnp.float32)
    per_token = jnp.where(known, (target - top) - rest, jnp.nan)
    return jnp.where(counted, per_token, 0.0), (logits, targets, counted, top + rest)


def _token_logps_backward(residuals, cotangent):
    """d logits = g (1[z = target] - softmax); what autodiff would keep is a float32 softmax."""
    logits, targets, counted, lse = residuals
    cotangent = jnp.where(counted, cotangent, 0.0)[..., None]
    p = jnp.exp(_widen(logits) - lse[..., None])
    # A comparison in place of a scatter: it fuses, and splits over a sharded vocabulary.
    is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    gradient = cotangent * (is_target - p)
    return jnp.where(counted[..., None], gradient, 0.0).astype(logits.dtype), None, None


_token_logps.defvjp(_token_logps_forward, _token_logps_backward)

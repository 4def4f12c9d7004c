"""Selective language modelling (Rho-1): the loss of the tokens that a reference model says are worth learning."""

import jax
import jax.numpy as jnp

from objectives.checks import check_range, check_shape
from objectives.output import LossOutput
from objectives.registry import register
from objectives.statistics import check_targets, is_concrete, token_logps
from pallas_kernels import partition
from zoo.core.registry import check_choice

SCOPES = ("batch", "sequence", "device")


def select_tokens(excess: jax.Array, mask: jax.Array, ratio: jax.Array | float, groups: int) -> jax.Array:
    """The share `ratio` of counted tokens with the largest excess, in each of `groups` equal runs of rows.

    A group of n counted tokens keeps ceil(ratio n) of them; of equal ones those that come first. A NaN counts as the
    largest, so that a broken model is not hidden by the selection. Each group is sorted by itself: on a mesh that
    splits the rows into as many parts, or a divisor of them, no device needs another's.

    Args:
      excess: [B, T].
      mask: [B, T], not 0 where a token is counted.
      ratio: in (0, 1], may be traced.
      groups: divides B.

    Returns:
      bool[B, T].
    """
    shape = excess.shape
    excess, counted = excess.reshape(groups, -1), (mask != 0).reshape(groups, -1)
    excess = jnp.where(counted, jnp.where(jnp.isnan(excess), jnp.inf, excess), -jnp.inf)
    wanted = ratio * jnp.sum(counted, axis=-1, dtype=jnp.float32)
    # A product that rounding has moved off a whole number is that number.
    whole = jnp.round(wanted)
    number = jnp.where(jnp.abs(wanted - whole) <= 1e-6 * wanted, whole, jnp.ceil(wanted))
    # Uncounted tokens last, also after counted ones of excess -inf.
    order = jnp.lexsort((-excess, ~counted), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return ((rank < number[:, None]) & counted).reshape(shape)


@register(
    "selective_cross_entropy",
    category="language_model",
    papers=("2404.07965",),
    proof="test_selective.py::test_is_its_definition",
)
def selective_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    loss_mask: jax.Array,
    ref_nll: jax.Array,
    *,
    ratio: float = 0.6,
    scope: str = "batch",
    devices: int | None = None,
) -> LossOutput:
    """Cross entropy of the tokens whose loss exceeds a reference model's the most (Rho-1, arXiv:2404.07965, sec. 2.2).

      excess_bt = nll_bt - ref_nll_bt,   keep = the share `ratio` of counted tokens with the largest excess
      loss = sum_bt keep_bt mask_bt nll_bt

    The paper ranks the tokens of a batch. What a share is of:

      batch      all rows. On a mesh that splits them, every device gets the excess of all tokens (B T floats, never
                 logits) and sorts them.
      sequence   each row by itself; nothing is exchanged.
      device     the rows of each of `devices` equal runs, which is how a mesh lays out a split batch: what every device
                 would choose from its own shard. Nothing is exchanged. The choice depends on the number of devices.

    With microbatches, a batch is what one call sees. Selection has no gradient, nor has the reference.

    Args:
      logits: float[B, T, Z].
      targets: int[B, T].
      loss_mask: [B, T], weight of each position; 0 leaves it out.
      ref_nll: [B, T], -log p of the targets under a reference model of the same tokenizer; where the mask is 0 it may
        be NaN.
      ratio: share of counted tokens to keep, in (0, 1]; rounded up. The paper: 0.6 for 1.1B, 0.7 for 7B
        parameters (section 3.1).
      scope: batch, sequence or device.
      devices: parts of the batch, for scope "device"; None = those into which the mesh in use splits "batch".

    Returns:
      LossOutput: weight = sum of the mask over kept tokens; metrics, over the same weight, nll (of kept tokens),
      excess (of kept tokens), nll_all and weight_all (of all counted tokens; weight / weight_all is the kept share).

    Raises:
      ValueError: shapes disagree, an option is out of range, or `devices` does not divide the batch; outside of traced
        functions also a counted target outside [0, Z).
    """
    check_shape(logits.shape[:-1], targets=targets, loss_mask=loss_mask, ref_nll=ref_nll)
    check_choice("scope", scope, SCOPES)
    if is_concrete(ratio) and not 0.0 < ratio <= 1.0:
        raise ValueError(f"ratio must be in (0, 1], such as 0.6, got {ratio}")
    if devices is not None and scope != "device":
        raise ValueError(f"devices={devices} belongs to scope 'device', got scope {scope!r}")
    rows = targets.shape[0]
    if scope == "device":
        groups = partition.ways("batch") if devices is None else devices
        check_range(1, rows, devices=groups)
        if rows % groups:
            raise ValueError(f"{groups} devices do not divide a batch of {rows} rows")
    else:
        groups = rows if scope == "sequence" else 1
    mask = loss_mask.astype(jnp.float32)
    counted = mask != 0
    check_targets(targets, counted, logits.shape[-1])
    nll = -token_logps(logits, targets, loss_mask)
    excess = jnp.where(counted, jax.lax.stop_gradient(nll - ref_nll.astype(jnp.float32)), 0.0)
    kept = jnp.where(select_tokens(excess, mask, ratio, groups), mask, 0.0)
    loss = jnp.sum(kept * nll)
    metrics = {
        "nll": loss,
        "excess": jnp.sum(kept * excess),
        "nll_all": jnp.sum(mask * nll),
        "weight_all": jnp.sum(mask),
    }
    return LossOutput(loss, jnp.sum(kept), jax.lax.stop_gradient(metrics))

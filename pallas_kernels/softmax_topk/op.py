"""Softmax and top-k in one read: arguments, gradient and choice of implementation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, partition
from pallas_kernels.arguments import check_array
from pallas_kernels.softmax_topk import mosaic_gpu, mosaic_tpu, reference, xla

MAX_K = 128

FORWARD = {"xla": xla.forward, "mosaic_tpu": mosaic_tpu.forward, "mosaic_gpu": mosaic_gpu.forward}
FORWARD_SUPPORTS: dict[str, Any] = {"mosaic_tpu": mosaic_tpu.supports, "mosaic_gpu": mosaic_gpu.supports}
NAMES = ("reference", *FORWARD)


class SoftmaxTopK(NamedTuple):
    """The normaliser and the k largest entries of each row.

    Attributes:
      lse: float32 [N], log of the sum of exponentials of the row.
      values: float32 [N, k], the largest logits, descending.
      indices: int32 [N, k], their columns; among equal logits the lowest column comes first.
      probabilities: float32 [N, k], exp(values - m) / d, the softmax over the whole row.
    """

    lse: jax.Array
    values: jax.Array
    indices: jax.Array
    probabilities: jax.Array


def softmax_topk(logits: jax.Array, k: int, *, implementation: str | None = None) -> SoftmaxTopK:
    """Finds the log-normaliser and the k largest entries of every row, reading the logits once.

      m' = max(m, x),  d' = d exp(m - m') + exp(x - m');   lse = m + log d;   probabilities = exp(values - m) / d

    Special rows:
      -inf: an entry of probability 0; where fewer than k entries are larger, the -inf entries of the lowest columns
        fill up. A row of nothing but -inf has lse = -inf, indices 0 .. k-1 and probabilities 0, and no gradient.
      +inf: lse = +inf; the probability of such an entry is NaN (inf - inf), that of a number 0.
      NaN: a row that holds one has lse, values and probabilities NaN and indices -1.

    lse, values and probabilities are differentiable, indices are not. The gradient (a dense [N, Z] array in the dtype
    of the logits) is the same expression for every implementation; a row whose cotangents are zero gets zeros.

    Args:
      logits: [N, Z], float32, bfloat16 or float16, N >= 1.
      k: number of entries, 1 <= k <= min(Z, 128).
      implementation: "reference", "xla", "mosaic_tpu" (not for float16), "mosaic_gpu" (for long rows) or
        None for the platform's priority.

    Returns:
      SoftmaxTopK(lse [N], values [N, k], indices [N, k], probabilities [N, k]); 0.0 and -0.0 are equal logits.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
      UnsupportedError: the named implementation does not serve this call.

    Reference: Milakov and Gimelshein, arXiv:1805.02867, algorithm 4.
    """
    dispatch.check_implementation("softmax_topk", implementation, dict.fromkeys(NAMES))
    if logits is None:
        raise ValueError("softmax_topk: logits must be an array [N, Z], got None")
    sizes: dict[str, int] = {}
    check_array("softmax_topk", "logits", logits, "N Z", sizes)
    if min(sizes.values()) < 1:
        raise ValueError(f"softmax_topk: logits must have at least one row and one column, got shape {logits.shape}")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= min(MAX_K, sizes["Z"]):
        raise ValueError(
            f"softmax_topk: k must be an int from 1 to {min(MAX_K, sizes['Z'])} "
            f"(the smaller of {MAX_K} and the columns of logits), got {k!r}"
        )
    if implementation == "reference":
        return SoftmaxTopK(*reference.forward(logits, k=k))
    return _softmax_topk(k, implementation, logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softmax_topk(k, implementation, *arrays):
    return _forward(k, implementation, *arrays)[0]


def _forward(k, implementation, logits):
    # total is relative to the largest logit: exp(values - lse) would lose the digits that lse has not.
    call = functools.partial(dispatch.run, "softmax_topk", FORWARD, implementation, supports=FORWARD_SUPPORTS, k=k)
    # A vocabulary in parts is left to the partitioner, which does not gather it.
    total, values, indices = partition.run(
        "softmax_topk", call, (logits,), ("N Z",), ("N", "N k", "N k"), {"N": "batch"}, whole=("vocab",)
    )
    maximum = values[:, :1]
    lse = maximum[:, 0] + jnp.log(total)
    # A row without mass would give exp(-inf - (-inf)) / 0; its probabilities are 0.
    massless = (total == 0)[:, None]
    probabilities = jnp.where(massless, 0.0, jnp.exp(values - maximum) / jnp.where(massless, 1.0, total[:, None]))
    return SoftmaxTopK(lse, values, indices, probabilities), (logits, total, maximum, indices, probabilities)


def _backward(k, implementation, residuals, cotangents):
    del k, implementation  # elementwise and a scatter of k entries a row: no kernel would read less
    logits, total, maximum, indices, probabilities = residuals
    dlse, dvalues, _, dprobabilities = cotangents
    through = jnp.where(dprobabilities == 0, 0.0, dprobabilities * probabilities)  # 0 * NaN is NaN
    dlse = dlse - jnp.sum(through, axis=-1)
    counted = (dlse != 0) & (total != 0)  # a row without mass has no gradient; its 0 / 0 is NaN
    dense = (dlse / total)[:, None] * jnp.exp(logits.astype(jnp.float32) - maximum)
    dense = jnp.where(counted[:, None], dense, 0.0)
    rows = jnp.arange(logits.shape[0])[:, None]
    columns = jnp.where(indices < 0, logits.shape[1], indices)  # out of bounds: dropped
    return (dense.at[rows, columns].add(dvalues + through, mode="drop").astype(logits.dtype),)


_softmax_topk.defvjp(_forward, _backward)

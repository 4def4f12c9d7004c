"""Cross entropy of a linear head: arguments, gradient and choice of implementation."""

import functools
import math
from typing import Any, NamedTuple

import jax

from pallas_kernels import dispatch, partition
from pallas_kernels.arguments import check_array, check_chunk_size
from pallas_kernels.linear_cross_entropy import mosaic_tpu, mosaic_tpu_backward, reference, xla

DEFAULT_CHUNK_SIZE = 2048

FORWARD = {"xla": xla.forward, "mosaic_tpu": mosaic_tpu.forward}
FORWARD_SUPPORTS: dict[str, Any] = {"mosaic_tpu": mosaic_tpu.supports}
BACKWARD = {"xla": xla.backward, "mosaic_tpu": mosaic_tpu_backward.backward}
BACKWARD_SUPPORTS: dict[str, Any] = {"mosaic_tpu": mosaic_tpu_backward.supports}
NAMES = ("reference", *FORWARD)


class TokenStatistics(NamedTuple):
    """What cross-entropy objectives need of each token's logits.

    Attributes:
      nll: float32 [N], lse - logit of the label; NaN where the label is outside [0, Z).
      lse: float32 [N], log of the sum of exponentials of the logits.
      mean_logit: float32 [N], mean of the logits, so that lse - mean_logit is the loss of uniform labels.
      argmax: int32 [N], class of the largest logit, the lowest of equal ones; not differentiable.
    """

    nll: jax.Array
    lse: jax.Array
    mean_logit: jax.Array
    argmax: jax.Array


def linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    *,
    transposed: bool = False,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> TokenStatistics:
    """Statistics of the logits of a linear head against labels, in memory of N * chunk_size.

      l_nz = logit_scale sum_d x_nd w_dz   (then soft_cap tanh(l / soft_cap))
      lse_n = log sum_z exp l_nz,   nll_n = lse_n - l_n,label,   mean_logit_n = (1 / Z) sum_z l_nz

    Losses are sums of these: with a z-loss and label smoothing e,

      loss_n = (1 - e) nll_n + e (lse_n - mean_logit_n) + z_loss lse_n^2.

    Products take operands in the dtype of x, float32 ones as `jax.default_matmul_precision` says, and are accumulated
    in float32; logits are float32 and exist for `chunk_size` classes at a time, or in the TPU kernels for as many as
    one product makes. The gradient computes them a second time: with the cotangents g of the outputs,

      dl_nz = (g_nll + g_lse) exp(l_nz - lse_n) - g_nll [z = label_n] + g_mean / Z.

    A token whose cotangents are all zero takes no part in any gradient, even if its x is NaN; leave a token out with
    `where(mask, nll, 0)` (a product with a zero mask would keep the NaN in the loss itself). The gradient at a label
    outside [0, Z) is that of lse alone, and finite: look at the loss.

    Args:
      x: [N, D] activations, float32, bfloat16 or float16, any N >= 1.
      w: [D, Z] weights of the head, same choice of dtypes, not necessarily that of x; cast chunk by chunk.
      labels: int32 [N], classes.
      transposed: whether w is [Z, D], as the table of a tied embedding is.
      logit_scale: multiplies the products.
      soft_cap: bound of the logits, or None.
      chunk_size: classes whose logits "xla" holds at a time; None takes 2048. It changes memory, not results.
      implementation: "reference" (dense), "xla", "mosaic_tpu" or None for the platform's priority.

    Returns:
      TokenStatistics(nll, lse, mean_logit, argmax), [N] each. Gradients reach x and w in their dtypes; that of w is
      accumulated over all tokens, and that of x over all classes, in float32.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
      UnsupportedError: the named implementation does not serve this call.

    Reference: Wijmans et al., arXiv:2411.09009 (the idea); Milakov and Gimelshein, arXiv:1805.02867 (running lse).
    """
    dispatch.check_implementation("linear_cross_entropy", implementation, dict.fromkeys(NAMES))
    _check(x, w, labels, transposed)
    if not _is_finite_number(logit_scale):
        raise ValueError(f"linear_cross_entropy: logit_scale must be a finite number, got {logit_scale!r}")
    if soft_cap is not None and not (_is_finite_number(soft_cap) and soft_cap > 0):
        raise ValueError(f"linear_cross_entropy: soft_cap must be a finite number > 0 or None, got {soft_cap!r}")
    check_chunk_size("linear_cross_entropy", chunk_size)
    soft_cap = None if soft_cap is None else float(soft_cap)
    options = (bool(transposed), float(logit_scale), soft_cap)
    if implementation == "reference":
        return TokenStatistics(*reference.forward(x, w, labels, **_named(options)))
    chunk = min(chunk_size or DEFAULT_CHUNK_SIZE, w.shape[0 if transposed else 1])
    return _linear_cross_entropy((*options, chunk), implementation, x, w, labels)


def _is_finite_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(x, w, labels, transposed) -> None:
    sizes: dict[str, int] = {}
    check = functools.partial(check_array, "linear_cross_entropy", sizes=sizes)
    for name, array in (("x", x), ("w", w), ("labels", labels)):
        if array is None:
            raise ValueError(f"linear_cross_entropy: {name} must be an array, got None")
    check("x", x, "N D")
    check("w", w, "Z D" if transposed else "D Z")
    check("labels", labels, "N", dtypes=("int32",))
    for dim in "NDZ":
        if sizes[dim] < 1:
            raise ValueError(f"linear_cross_entropy: {dim} must be at least 1, got x {x.shape} and w {w.shape}")


def _named(options) -> dict:
    return dict(zip(("transposed", "logit_scale", "soft_cap", "chunk_size"), options, strict=False))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear_cross_entropy(options, implementation, *arrays):
    return _forward(options, implementation, *arrays)[0]


def _run(table, supports, options, implementation, arrays, results):
    call = functools.partial(
        dispatch.run, "linear_cross_entropy", table, implementation, supports=supports, **_named(options)
    )
    if partition.ways("vocab") > 1 or partition.ways("embed") > 1:
        # The rules split w: the partitioner works on its parts, where each device would need all of it here.
        return call(*arrays)
    weights = "Z D" if options[0] else "D Z"
    dims = ("N D", weights, *["N"] * len(arrays[2:]))
    results = tuple(weights if result == "w" else result for result in results)
    return partition.run("linear_cross_entropy", call, arrays, dims, results, {"N": "batch"})


def _forward(options, implementation, *arrays):
    out = TokenStatistics(*_run(FORWARD, FORWARD_SUPPORTS, options, implementation, arrays, ("N",) * 4))
    return out, (*arrays, out.lse)


def _backward(options, implementation, residuals, cotangents):
    arrays = (*residuals, *cotangents[:3])  # argmax has no cotangent
    return *_run(BACKWARD, BACKWARD_SUPPORTS, options, implementation, arrays, ("N D", "w")), None


_linear_cross_entropy.defvjp(_forward, _backward)

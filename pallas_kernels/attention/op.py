"""The attention op: arguments checked at the door, forward and backward each by the best implementation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, partition
from pallas_kernels.attention import (
    mosaic_gpu,
    mosaic_gpu_backward,
    mosaic_gpu_slots,
    mosaic_tpu,
    mosaic_tpu_backward,
    mosaic_tpu_slots,
    reference,
    xla,
)


def _forward_of(self_attention, slots):
    """The forward pass of two modules: one for self-attention, one for positions."""

    def forward(q, k, v, q_positions, *rest, **options):
        kernel = self_attention if q_positions is None else slots
        return kernel.forward(q, k, v, q_positions, *rest, **options)

    return forward


FORWARD = {
    "xla": xla.forward,
    "mosaic_tpu": _forward_of(mosaic_tpu, mosaic_tpu_slots),
    "mosaic_gpu": _forward_of(mosaic_gpu, mosaic_gpu_slots),
}
BACKWARD = {
    "xla": xla.backward,
    "mosaic_tpu": mosaic_tpu_backward.backward,
    "mosaic_gpu": mosaic_gpu_backward.backward,
}
# An implementation's limits: name -> function that raises `dispatch.UnsupportedError` (see `dispatch.run`).
FORWARD_SUPPORTS: dict[str, Any] = {"mosaic_tpu": mosaic_tpu_slots.supports, "mosaic_gpu": mosaic_gpu_slots.supports}
BACKWARD_SUPPORTS: dict[str, Any] = {"mosaic_tpu": mosaic_tpu.supports, "mosaic_gpu": mosaic_gpu.supports}

# How a mesh divides the op (see `partition.run`).
AXES = {"B": "batch", "H": "heads", "G": "heads"}
ARGUMENTS = ("B T H K", "B S G K", "B S G V", "B T", "B S", "B T", "B S")
RESULTS = ("B T H V", "B T H")

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_MAX_WINDOW = 2**31 - 1


class _Static(NamedTuple):
    window: int | None
    scale: float
    soft_cap: float | None
    implementation: str | None

    def run(self, op, available, supports, arrays, dims, results) -> Any:
        options = {"window": self.window, "scale": self.scale, "soft_cap": self.soft_cap}
        call = functools.partial(dispatch.run, op, available, self.implementation, supports=supports, **options)
        return partition.run(op, call, arrays, dims, results, AXES)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    q_documents: jax.Array | None = None,
    kv_documents: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Causal softmax attention with grouped heads, a sliding window and documents that do not see each other.

      s_ij = scale * q_i . k_j   (then soft_cap * tanh(s_ij / soft_cap));   y_i = sum_j softmax_j(s_ij) v_j

    over the keys j that query i sees: kv_documents[j] == q_documents[i] >= 0 and
    kv_positions[j] <= q_positions[i] and kv_positions[j] > q_positions[i] - window. Without positions this is
    self-attention (T == S, position = index) and costs O(T * window) time and memory; with them, keys may
    stand in any order, as in a ring buffer. A query that sees no key gives y = 0, lse = -inf and no gradient;
    what padding and empty slots hold, NaN included, reaches neither values nor gradients.

    Args:
      q: [B, T, H, K] queries, float32, bfloat16 or float16.
      k: [B, S, G, K] keys in q's dtype; G divides H and query head h uses key head h // (H // G).
      v: [B, S, G, V] values in q's dtype.
      q_positions: int32[B, T], or None together with `kv_positions` for self-attention.
      kv_positions: int32[B, S]; where no documents are given, a slot with a negative position is empty.
      q_documents: int32[B, T], -1 = padding; or None together with `kv_documents`: one document, no padding.
      kv_documents: int32[B, S], -1 = padding or an empty slot.
      window: how many positions back a query sees, itself included; None = all.
      scale: score factor; None = K ** -0.5.
      soft_cap: bound of the scores before masking; None = unbounded.
      return_lse: whether to return the log-sum-exp too, for `merge`; it is differentiable.
      implementation: None (by platform), "xla", "mosaic_tpu", "mosaic_gpu" (widths in multiples of 64; float32 in
        products of 16 bits), or "reference" (dense float32, differentiated by JAX). With positions, "mosaic_tpu" and
        "mosaic_gpu" serve decoding, forward only.

    Returns:
      y [B, T, H, V] in q's dtype; with `return_lse`, (y, lse) where lse is float32[B, T, H].

    Raises:
      ValueError: shapes, dtypes or options do not fit together.
      UnsupportedError: the named implementation cannot serve the call.

    Reference: blockwise softmax arXiv:1805.02867, arXiv:2307.08691; sliding window arXiv:2004.05150;
      grouped heads arXiv:2305.13245; soft cap arXiv:2408.00118.
    """
    dispatch.check_implementation("attention", implementation, {"reference": None, **FORWARD})
    _check_heads(q, k, v)
    _check_pair("positions", q, k, q_positions, kv_positions)
    _check_pair("documents", q, k, q_documents, kv_documents)
    if q_positions is None and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"without positions this is self-attention, T == S, but q has T={q.shape[1]} and k has "
            f"S={k.shape[1]}; pass q_positions [B, T] and kv_positions [B, S]"
        )
    window, scale, soft_cap = _check_options(q, window, scale, soft_cap)
    k, v = partition.spread_groups(q.shape[2], k, v)
    arrays = (q, k, v, q_positions, kv_positions, q_documents, kv_documents)
    if implementation == "reference":
        y, lse = reference.attend(*arrays, window=window, scale=scale, soft_cap=soft_cap)
    else:
        y, lse = _attention(_Static(window, scale, soft_cap, implementation), *arrays)
    return (y, lse) if return_lse else y


def merge(y1: jax.Array, lse1: jax.Array, y2: jax.Array, lse2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Joins attentions of the same queries over two disjoint sets of keys into that over their union.

      lse = log(e^lse1 + e^lse2);   y = e^(lse1 - lse) y1 + e^(lse2 - lse) y2

    Args:
      y1: [B, T, H, V] output over the first set of keys.
      lse1: float32[B, T, H] its log-sum-exp, -inf where it saw no key.
      y2: [B, T, H, V] output over the second set.
      lse2: float32[B, T, H] its log-sum-exp.

    Returns:
      (y [B, T, H, V] in y1's dtype, lse float32[B, T, H]); 0 and -inf where neither part saw a key.

    Raises:
      ValueError: the shapes differ.

    Reference: arXiv:1805.02867.
    """
    if y1.shape != y2.shape or lse1.shape != lse2.shape or y1.shape[:-1] != lse1.shape:
        raise ValueError(
            f"merge needs y1 and y2 [B, T, H, V], lse1 and lse2 [B, T, H]; "
            f"got {y1.shape}, {y2.shape}, {lse1.shape}, {lse2.shape}"
        )
    lse1, lse2 = lse1.astype(jnp.float32), lse2.astype(jnp.float32)
    sees = jnp.maximum(lse1, lse2) > -jnp.inf
    # The result does not depend on the shift, so its gradient is left out; 0 keeps (-inf) - shift defined.
    shift = jax.lax.stop_gradient(jnp.where(sees, jnp.maximum(lse1, lse2), 0.0))
    e1, e2 = jnp.exp(lse1 - shift), jnp.exp(lse2 - shift)
    total = jnp.where(sees, e1 + e2, 1.0)
    w1, w2 = (e1 / total)[..., None], (e2 / total)[..., None]
    y = w1 * y1.astype(jnp.float32) + w2 * y2.astype(jnp.float32)
    return y.astype(y1.dtype), jnp.where(sees, shift + jnp.log(total), -jnp.inf)


def _run_forward(static: _Static, *arrays) -> tuple[jax.Array, jax.Array]:
    return static.run("attention", FORWARD, FORWARD_SUPPORTS, arrays, ARGUMENTS, RESULTS)


_attention = jax.custom_vjp(_run_forward, nondiff_argnums=(0,))


def _attention_fwd(static, *arrays):
    y, lse = _run_forward(static, *arrays)
    return (y, lse), (arrays, y, lse)


def _attention_bwd(static, residuals, cotangents):
    arrays, y, lse = residuals
    operands, dims = (*arrays, y, lse, *cotangents), (*ARGUMENTS, *RESULTS, *RESULTS)
    grads = static.run("attention backward", BACKWARD, BACKWARD_SUPPORTS, operands, dims, ARGUMENTS[:3])
    return (*grads, None, None, None, None)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _check_heads(q, k, v) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q [B, T, H, K], k [B, S, G, K] and v [B, S, G, V] have four axes each; got {shapes}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v must share the batch axis; got {shapes}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"k and v must share their time and head axes [B, S, G]; got {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must share their last axis K; got {shapes}")
    if min(*q.shape, *k.shape, *v.shape) < 1:
        raise ValueError(f"every axis must be at least 1; got {shapes}")
    if q.shape[2] % k.shape[2]:
        divisors = [g for g in range(1, q.shape[2] + 1) if q.shape[2] % g == 0]
        nearest = min(divisors, key=lambda g: abs(g - k.shape[2]))
        raise ValueError(
            f"G={k.shape[2]} key heads do not divide H={q.shape[2]} query heads; the nearest that do: {nearest}"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        raise ValueError(
            f"q, k and v must share one dtype of float32, bfloat16, float16; got {q.dtype}, {k.dtype}, "
            f"{v.dtype}: cast them before the call"
        )


def _check_pair(name, q, k, q_value, kv_value) -> None:
    if (q_value is None) != (kv_value is None):
        missing, given = ("q", "kv") if q_value is None else ("kv", "q")
        raise ValueError(f"{missing}_{name} is missing: pass it as well, or leave out {given}_{name}")
    for side, value, like in (("q", q_value, q), ("kv", kv_value, k)):
        if value is None:
            continue
        if value.shape != like.shape[:2]:
            raise ValueError(f"{side}_{name} must have shape {like.shape[:2]}, got {value.shape}")
        if value.dtype != jnp.int32:
            raise ValueError(f"{side}_{name} must be int32, got {value.dtype}; use .astype(jnp.int32)")


def _check_options(q, window, scale, soft_cap) -> tuple[int | None, float, float | None]:
    if window is not None:
        if not isinstance(window, int) or isinstance(window, bool):
            raise ValueError(f"window must be a Python int or None, got {window!r}")
        if window < 1:
            raise ValueError(f"window={window} must be at least 1 (the query itself); None sees everything")
        window = min(window, _MAX_WINDOW)
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap} must be positive; None leaves the scores unbounded")
    return (
        window,
        float(q.shape[-1] ** -0.5 if scale is None else scale),
        None if soft_cap is None else float(soft_cap),
    )

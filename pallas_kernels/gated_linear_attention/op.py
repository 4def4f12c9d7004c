"""Gated linear attention: arguments, gradient and choice of implementation."""

import functools
import math

import jax

from pallas_kernels import dispatch, partition
from pallas_kernels.arguments import check_array, check_chunk_size
from pallas_kernels.chunks import NARROW_CHUNK, is_narrow
from pallas_kernels.gated_linear_attention import (
    mosaic_gpu,
    mosaic_gpu_backward,
    mosaic_tpu,
    mosaic_tpu_backward,
    reference,
    xla,
)

DEFAULT_CHUNK_SIZE = 128  # a step of the TPU kernels; twice as many states would cost more than the rest of a pass

FORWARD = {"xla": xla.forward, "mosaic_tpu": mosaic_tpu.forward, "mosaic_gpu": mosaic_gpu.forward}
BACKWARD = {
    "xla": xla.backward,
    "mosaic_tpu": mosaic_tpu_backward.backward,
    "mosaic_gpu": mosaic_gpu_backward.backward,
}
FORWARD_SUPPORTS = {"mosaic_tpu": mosaic_tpu.supports, "mosaic_gpu": mosaic_gpu.supports}
BACKWARD_SUPPORTS = {"mosaic_tpu": mosaic_tpu_backward.supports, "mosaic_gpu": mosaic_gpu_backward.supports}
NAMES = ("reference", *FORWARD)

# How a mesh divides the op (see `partition.run`).
AXES = {"B": "batch", "H": "heads", "G": "heads"}
DECAYS = {1: "H", 3: "B T H", 4: "B T G K"}
RESULTS = ("B T H V", "B H K V")
BOUNDARIES = "B C G K RV"  # R = H / G heads side by side


def gated_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    state: jax.Array | None = None,
    *,
    scale: float | None = None,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs linear attention whose matrix-valued state decays over a sequence.

      S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T,    y_t = scale q_t^T S_t

    Without decay this is linear attention; with one number per head it is RetNet's retention, simple GLA and
    Mamba-2's state-space dual form (q = C, k = B, v = dt x, log_decay = dt A, scale = 1); with one number per
    channel of the key it is GLA. Value head h uses the query and the key of group h // (H // G), and a decay
    per channel belongs to the key, hence to the group too. State and arithmetic are float32; the products of
    "mosaic_gpu" keep 16 bits of mantissa of float32 arguments. Only exponentials of log_decay and of its sums are
    taken, so they stay at most 1 as long as log_decay <= 0 (-inf included: it clears what it decays); a positive
    log_decay is the caller's error and may overflow. Training keeps the states at the chunk boundaries alone,
    B * ceil(T / chunk_size) * H * K * V floats.

    Args:
      q: [B, T, G, K] queries, float32, bfloat16 or float16 (as all floating arguments but `state`), any T >= 1.
      k: [B, T, G, K] keys.
      v: [B, T, H, V] values; G divides H.
      log_decay: logarithm of the decay: [H] constant, [B, T, H] per head, [B, T, G, K] per channel of the key,
        or None for no decay.
      state: float32 [B, H, K, V] state to continue from, or None for zeros.
      scale: factor of the output; None = K ** -0.5, as in attention.
      reset: bool [B, T], True where the carried state is dropped before the token, or None.
      valid: bool [B, T], False at padding: the state stays, y is 0, and what the other arguments hold
        there is ignored, `reset` included. None when there is no padding.
      chunk_size: tokens between two saved states; None takes 128, for narrow heads 32 (not of kernels).
      implementation: "reference", "xla", "mosaic_tpu", "mosaic_gpu" or None for the platform's priority.

    Returns:
      y: [B, T, H, V] in the dtype of v.
      new_state: float32 [B, H, K, V], the state after the last valid token.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
      UnsupportedError: the named implementation does not serve this call.

    Reference: Yang et al., arXiv:2312.06635, section 4 (GLA); Sun et al., arXiv:2307.08621 (RetNet);
      Dao and Gu, arXiv:2405.21060, section 6 (Mamba-2); Katharopoulos et al., arXiv:2006.16236.
    """
    dispatch.check_implementation("gated_linear_attention", implementation, dict.fromkeys(NAMES))
    _check(q, k, v, log_decay, state, reset, valid)
    check_chunk_size("gated_linear_attention", chunk_size)
    scale = _check_scale(scale, q.shape[-1])
    if reset is not None and valid is not None:
        reset = reset & valid
    if log_decay is not None and log_decay.ndim == 4:
        q, k, log_decay = partition.spread_groups(v.shape[2], q, k, log_decay)
    else:
        q, k = partition.spread_groups(v.shape[2], q, k)
    arrays = (q, k, v, log_decay, state, reset, valid)
    if implementation == "reference":
        return reference.forward(*arrays, scale=scale)
    chunk = min(chunk_size or default_chunk(q.shape[-1], v.shape[-1], implementation), q.shape[1])
    return _gated_linear_attention(scale, chunk, implementation, *arrays)


def default_chunk(key: int, value: int, implementation: str | None = None) -> int:
    """Tokens of a chunk where a call does not say."""
    if is_narrow(key, value, implementation):
        return NARROW_CHUNK
    return DEFAULT_CHUNK_SIZE


def _check(q, k, v, log_decay, state, reset, valid) -> None:
    sizes: dict[str, int] = {}
    check = functools.partial(check_array, "gated_linear_attention", sizes=sizes)
    for name, array, dims in (("q", q, "B T G K"), ("k", k, "B T G K"), ("v", v, "B T H V")):
        if array is None:
            raise ValueError(f"gated_linear_attention: {name} must be an array [{', '.join(dims.split())}], got None")
        check(name, array, dims)
    empty = [dim for dim in ("T", "G", "H") if sizes[dim] < 1]
    if empty:
        raise ValueError(f"gated_linear_attention: {empty[0]} must be at least 1, got q {q.shape} and v {v.shape}")
    if sizes["H"] % sizes["G"]:
        raise ValueError(
            f"gated_linear_attention: the G={sizes['G']} groups of q and k must divide the H={sizes['H']} heads of v"
        )
    dims = DECAYS.get(getattr(log_decay, "ndim", 0), "")
    if log_decay is not None and not dims:
        raise ValueError(
            "gated_linear_attention: log_decay must be None or an array [H], [B, T, H] or [B, T, G, K], "
            f"got {type(log_decay).__name__} of shape {getattr(log_decay, 'shape', ())}"
        )
    check("log_decay", log_decay, dims)
    check("state", state, "B H K V", dtypes=("float32",))
    check("reset", reset, "B T", dtypes=("bool",))
    check("valid", valid, "B T", dtypes=("bool",))


def _check_scale(scale, key: int) -> float:
    if scale is None:
        return key**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"gated_linear_attention: scale must be a finite Python number or None, got {scale!r}")
    return float(scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gated_linear_attention(scale, chunk_size, implementation, *arrays):
    y, new_state, _ = _run_forward(scale, chunk_size, implementation, arrays, save=False)
    return y, new_state


def _run_forward(scale, chunk_size, implementation, arrays, *, save: bool):
    op, static = "gated_linear_attention", {"scale": scale, "chunk_size": chunk_size, "save": save}
    call = functools.partial(dispatch.run, op, FORWARD, implementation, supports=FORWARD_SUPPORTS, **static)
    return partition.run(op, call, arrays, _arguments(arrays), (*RESULTS, BOUNDARIES), AXES)


def _arguments(arrays) -> tuple[str, ...]:
    log_decay = arrays[3]
    decay = "" if log_decay is None else DECAYS[log_decay.ndim]
    return ("B T G K", "B T G K", "B T H V", decay, "B H K V", "B T", "B T")


def _forward(scale, chunk_size, implementation, *arrays):
    y, new_state, boundaries = _run_forward(scale, chunk_size, implementation, arrays, save=True)
    return (y, new_state), (arrays, boundaries)


def _backward(scale, chunk_size, implementation, residuals, cotangents):
    arrays, boundaries = residuals
    op, static, arguments = "gated_linear_attention", {"scale": scale, "chunk_size": chunk_size}, _arguments(arrays)
    call = functools.partial(dispatch.run, op, BACKWARD, implementation, supports=BACKWARD_SUPPORTS, **static)
    operands, dims = (*arrays, boundaries, *cotangents), (*arguments, BOUNDARIES, *RESULTS)
    gradients = partition.run(op, call, operands, dims, arguments[:5], AXES)
    return (*gradients, None, None)  # reset and valid are not differentiable


_gated_linear_attention.defvjp(_forward, _backward)

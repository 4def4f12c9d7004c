"""The mLSTM cell: arguments, gradient and choice of implementation."""

import functools
import math
from typing import Any, NamedTuple

import jax

from pallas_kernels import dispatch, partition
from pallas_kernels.arguments import check_array, check_chunk_size
from pallas_kernels.chunks import NARROW_CHUNK, is_narrow
from pallas_kernels.mlstm import mosaic_tpu, mosaic_tpu_backward, reference, xla
from pallas_kernels.mlstm.gates import MAX_CHUNK

MIN_CHUNK = 128
MIN_EPS = 1e-30

FORWARD = {"xla": xla.forward, "mosaic_tpu": mosaic_tpu.forward}
BACKWARD = {"xla": xla.backward, "mosaic_tpu": mosaic_tpu_backward.backward}
# An implementation's limits: name -> function that raises `dispatch.UnsupportedError` (see `dispatch.run`).
FORWARD_SUPPORTS = {"mosaic_tpu": mosaic_tpu.supports_forward}
BACKWARD_SUPPORTS = {"mosaic_tpu": mosaic_tpu_backward.supports}
NAMES = ("reference", *FORWARD)

# How a mesh divides the op (see `partition.run`).
AXES = {"B": "batch", "H": "heads"}
STATE = ("B H K V", "B H K", "B H")
ARGUMENTS = ("B T H K", "B T H K", "B T H V", "B T H", "B T H", *STATE, "B T", "B T")
RESULTS = ("B T H V", *STATE)
BOUNDARIES = ("B N H K V", "B N H K")


class State(NamedTuple):
    """What the cell carries from token to token: C and n in units of exp(m)."""

    C: jax.Array  # float32 [B, H, K, V], the matrix memory
    n: jax.Array  # float32 [B, H, K], the normaliser
    m: jax.Array  # float32 [B, H], the stabiliser


def mlstm(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    i: jax.Array,
    f: jax.Array,
    state: State | None = None,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, State]:
    """Runs the matrix LSTM cell, a linear attention whose gates are exponential and whose output is normalised.

      m_t = max(log sigmoid(f_t) + m_{t-1}, i_t)
      a_t = exp(log sigmoid(f_t) + m_{t-1} - m_t),    b_t = exp(i_t - m_t)
      C_t = a_t C_{t-1} + b_t k_t v_t^T,    n_t = a_t n_{t-1} + b_t k_t
      y_t = scale q_t^T C_t / (max(|scale q_t^T n_t|, exp(-m_t)) + eps)

    State and arithmetic are float32; m keeps the exponentials at most 1. C and n are in units of exp(m): adding a
    number to m and dividing C and n by its exponential changes nothing but the weight of `eps`, of which a unit is
    exp(m) too. The gradients are those of the equations above, the paths through m included. A soft cap of the gates
    and the output gate are the caller's. Training keeps y and the C and n at the chunk boundaries,
    B * ceil(T / chunk_size) * H * K * (V + 1) floats.

    Args:
      q: [B, T, H, K] queries, float32, bfloat16 or float16 (as all floating arguments but `state`), any T >= 1.
      k: [B, T, H, K] keys.
      v: [B, T, H, V] values.
      i: [B, T, H] pre-activations of the input gate.
      f: [B, T, H] pre-activations of the forget gate; where log sigmoid(f) is below -1024 it is taken as -1024.
      state: the state to continue from, or None for zeros.
      scale: factor of q; None = K ** -0.5, as in attention.
      eps: what is added to the denominator, at least 1e-30.
      reset: bool [B, T], True where the carried state is replaced by zeros before the token, or None.
      valid: bool [B, T], False at padding: the state stays, y is 0, and what the other arguments hold
        there is ignored, `reset` included. None when there is no padding.
      chunk_size: tokens between two saved states, at most 256; None takes 32 (not of kernels), 128 or 256, by
        K and V.
      implementation: "reference", "xla", "mosaic_tpu" or None for the platform's priority.

    Returns:
      y: [B, T, H, V] in the dtype of v.
      state: the state after the last valid token.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
      UnsupportedError: the named implementation does not serve this call.

    Reference: Beck et al., arXiv:2405.04517, equations 19-27 and appendix A; arXiv:2503.13427 (xLSTM 7B);
      arXiv:2503.14376 (chunks).
    """
    dispatch.check_implementation("mlstm", implementation, dict.fromkeys(NAMES))
    _check(q, k, v, i, f, state, reset, valid)
    static = {"scale": _check_number("scale", scale, q.shape[-1] ** -0.5), "eps": _check_number("eps", eps)}
    if static["eps"] < MIN_EPS:
        raise ValueError(f"mlstm: eps must be at least {MIN_EPS}, or 0 / 0 could occur, got {eps!r}")
    check_chunk_size("mlstm", chunk_size, MAX_CHUNK)
    if reset is not None and valid is not None:
        reset = reset & valid
    C, n, m = state or (None, None, None)
    arrays = (q, k, v, i, f, C, n, m, reset, valid)
    out: Any
    if implementation == "reference":
        out = reference.forward(*arrays, **static)
    else:
        chunk = min(chunk_size or default_chunk(q.shape[-1], v.shape[-1], implementation), q.shape[1])
        out = _mlstm(static["scale"], static["eps"], chunk, implementation, *arrays)
    return out[0], State(*out[1:])


def default_chunk(key: int, value: int, implementation: str | None = None) -> int:
    """Up to 2 K V / (K + V) tokens the products within a chunk cost less than those with its state."""
    if is_narrow(key, value, implementation):
        return NARROW_CHUNK
    return MIN_CHUNK if 2 * key * value < MAX_CHUNK * (key + value) else MAX_CHUNK


def _check(q, k, v, i, f, state, reset, valid) -> None:
    sizes: dict[str, int] = {}
    check = functools.partial(check_array, "mlstm", sizes=sizes)
    tokens = {"q": (q, "B T H K"), "k": (k, "B T H K"), "v": (v, "B T H V"), "i": (i, "B T H"), "f": (f, "B T H")}
    for name, (array, dims) in tokens.items():
        if array is None:
            raise ValueError(f"mlstm: {name} must be an array [{', '.join(dims.split())}], got None")
        check(name, array, dims)
    empty = [dim for dim in "THKV" if sizes[dim] < 1]
    if empty:
        raise ValueError(f"mlstm: {empty[0]} must be at least 1, got q {q.shape} and v {v.shape}")
    if state is not None:
        if not isinstance(state, tuple) or len(state) != 3 or any(s is None for s in state):
            raise ValueError(f"mlstm: state must be State(C, n, m) or None, got {type(state).__name__}")
        for name, array, dims in zip(State._fields, state, ("B H K V", "B H K", "B H"), strict=True):
            check(f"state.{name}", array, dims, dtypes=("float32",))
    check("reset", reset, "B T", dtypes=("bool",))
    check("valid", valid, "B T", dtypes=("bool",))


def _check_number(name: str, value, default: float | None = None) -> float:
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        allowed = "a finite Python number" if default is None else "a finite Python number or None"
        raise ValueError(f"mlstm: {name} must be {allowed}, got {value!r}")
    return float(value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _mlstm(scale, eps, chunk_size, implementation, *arrays):
    return _run_forward(scale, eps, chunk_size, implementation, arrays, save=False)[:4]


def _run_forward(scale, eps, chunk_size, implementation, arrays, *, save: bool):
    static = {"scale": scale, "eps": eps, "chunk_size": chunk_size, "save": save}

    def call(*arrays):
        *out, boundaries = dispatch.run("mlstm", FORWARD, implementation, *arrays, supports=FORWARD_SUPPORTS, **static)
        return (*out, *(boundaries or (None, None)))

    return partition.run("mlstm", call, arrays, ARGUMENTS, (*RESULTS, *BOUNDARIES), AXES)


def _forward(scale, eps, chunk_size, implementation, *arrays):
    out = _run_forward(scale, eps, chunk_size, implementation, arrays, save=True)
    return tuple(out[:4]), (arrays, out[4:], out[0])


def _backward(scale, eps, chunk_size, implementation, residuals, cotangents):
    arrays, boundaries, y = residuals
    static = {"scale": scale, "eps": eps, "chunk_size": chunk_size}

    def call(*operands):
        count = len(ARGUMENTS)
        operands = (*operands[:count], tuple(operands[count : count + 2]), *operands[count + 2 :])
        return dispatch.run("mlstm", BACKWARD, implementation, *operands, supports=BACKWARD_SUPPORTS, **static)

    operands, dims = (*arrays, *boundaries, y, *cotangents), (*ARGUMENTS, *BOUNDARIES, RESULTS[0], *RESULTS)
    gradients = partition.run("mlstm", call, operands, dims, ARGUMENTS[:8], AXES)
    return (*gradients, None, None)  # reset and valid are not differentiable


_mlstm.defvjp(_forward, _backward)

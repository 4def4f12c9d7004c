"""The short causal convolution: arguments, gradient and choice of implementation."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, partition
from pallas_kernels.arguments import check_array
from pallas_kernels.causal_conv1d import mosaic_tpu, reference, xla

ACTIVATIONS = (None, "silu")

FORWARD = {"xla": xla.forward, "mosaic_tpu": mosaic_tpu.forward}
BACKWARD = {"xla": xla.backward, "mosaic_tpu": mosaic_tpu.backward}
FORWARD_SUPPORTS = {"mosaic_tpu": mosaic_tpu.supports_forward}
BACKWARD_SUPPORTS = {"mosaic_tpu": mosaic_tpu.supports_backward}
NAMES = ("reference", *FORWARD)

# How a mesh divides the op (see `partition.run`).
AXES = {"B": "batch", "D": "inner"}
ARGUMENTS = ("B T D", "W D", "D", "B W-1 D", "B T", "B T")
RESULTS = ("B T D", "B W-1 D")


def causal_conv1d(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    state: jax.Array | None = None,
    *,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    activation: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Convolves every channel with its own short causal filter.

      y_t = activation(bias + sum_{k < W} weight[k] x_{t - W + 1 + k}),    elementwise over channels

    Inputs before the start of a token's document count as zeros; those of a document that is continued come
    from `state`. Arithmetic is float32.

    Args:
      x: [B, T, D] input, float32, bfloat16 or float16 (as `weight` and `bias`), any T >= 1.
      weight: [W, D] filters, W >= 1; the last tap multiplies the current token.
      bias: [D], or None.
      state: float32 [B, W - 1, D], the last inputs of the document that is continued, oldest first, zeros
        where there are none; None for a fresh sequence.
      reset: bool [B, T], True at the first token of a document that does not continue the state, or None.
      valid: bool [B, T], False at padding: y is 0 there, and what x holds there is ignored, `reset` included.
        Padding that follows a token ends its document. None when there is no padding.
      activation: "silu" or None.
      implementation: "reference", "xla", "mosaic_tpu" or None for the platform's priority.

    Returns:
      y: [B, T, D] in the dtype of x.
      new_state: float32 [B, W - 1, D], the last valid inputs of each row's last document, zeros before its
        start; `state` for a row of padding alone.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
      UnsupportedError: the named implementation does not serve this call.

    Reference: the filter of Mamba, Gu and Dao, arXiv:2312.00752, section 3.4.
    """
    dispatch.check_implementation("causal_conv1d", implementation, dict.fromkeys(NAMES))
    _check(x, weight, bias, state, reset, valid)
    if activation not in ACTIVATIONS:
        raise ValueError(f"causal_conv1d: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if valid is not None:
        reset = _ends_at_padding(valid) if reset is None else (reset & valid) | _ends_at_padding(valid)
    arrays = (x, weight, bias, state, reset, valid)
    if implementation == "reference":
        return reference.forward(*arrays, activation=activation)
    return _causal_conv1d(activation, implementation, *arrays)


def _ends_at_padding(valid: jax.Array) -> jax.Array:
    """bool[B, T]: valid tokens behind padding that itself is behind a token."""
    seen = jnp.cumsum(valid, axis=1)[:, :-1] > 0
    return valid & jnp.pad(seen & ~valid[:, :-1], ((0, 0), (1, 0)))


def _check(x, weight, bias, state, reset, valid) -> None:
    sizes: dict[str, int] = {}
    check = functools.partial(check_array, "causal_conv1d", sizes=sizes)
    check("x", x, "B T D")
    if sizes["T"] < 1:
        raise ValueError(f"causal_conv1d: x must have at least one token, got shape {tuple(x.shape)}")
    check("weight", weight, "W D")
    if sizes["W"] < 1:
        raise ValueError(f"causal_conv1d: weight must have at least one tap, got shape {tuple(weight.shape)}")
    check("bias", bias, "D")
    sizes["W-1"] = sizes["W"] - 1
    check("state", state, "B W-1 D", dtypes=("float32",))
    check("reset", reset, "B T", dtypes=("bool",))
    check("valid", valid, "B T", dtypes=("bool",))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _causal_conv1d(activation, implementation, *arrays):
    static = {"supports": FORWARD_SUPPORTS, "activation": activation}
    call = functools.partial(dispatch.run, "causal_conv1d", FORWARD, implementation, **static)
    return partition.run("causal_conv1d", call, arrays, ARGUMENTS, RESULTS, AXES)


def _forward(activation, implementation, *arrays):
    return _causal_conv1d(activation, implementation, *arrays), arrays


def _backward(activation, implementation, arrays, cotangents):
    static = {"supports": BACKWARD_SUPPORTS, "activation": activation}
    call = functools.partial(dispatch.run, "causal_conv1d", BACKWARD, implementation, **static)
    operands, dims = (*arrays, *cotangents), (*ARGUMENTS, *RESULTS)
    gradients = partition.run("causal_conv1d", call, operands, dims, ARGUMENTS[:4], AXES)
    return (*gradients, None, None)  # reset and valid are not differentiable


_causal_conv1d.defvjp(_forward, _backward)

"""Causal depthwise convolution as W shifted multiply-adds; on a CPU far faster than a grouped convolution."""

import jax
import jax.numpy as jnp
from jax import lax


def _first_and_last(valid):
    """int32[B] each: indices of the first and the last valid token; (T, -1) for a row of padding."""
    length = valid.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)
    first = jnp.min(jnp.where(valid, index, length), axis=1)
    return first, jnp.max(jnp.where(valid, index, -1), axis=1)


def _windows(padded, start, width):
    """padded [B, T, D], start int32[B] -> [B, width, D]: each row's entries from start on."""
    return jax.vmap(lambda row, i: lax.dynamic_slice_in_dim(row, i, width, axis=0))(padded, start)


def _pad(x, state, valid, width):
    """Puts the carried inputs before the first token: float32 [B, W - 1 + T, D], zeros at padding."""
    batch, _, channels = x.shape
    x = x.astype(jnp.float32)
    if valid is None:
        before = jnp.zeros((batch, width - 1, channels), jnp.float32) if state is None else state
        return jnp.concatenate([before, x], axis=1)
    padded = jnp.pad(jnp.where(valid[..., None], x, 0.0), ((0, 0), (width - 1, 0), (0, 0)))
    if state is None:
        return padded
    # What lies before the first token is padding, so there is room, however far to the right the row begins.
    first, _ = _first_and_last(valid)
    return jax.vmap(lambda row, s, i: lax.dynamic_update_slice_in_dim(row, s, i, axis=0))(padded, state, first)


def _documents(reset, width):
    """int32 [B, W - 1 + T]: the document of each entry of the padded inputs; 0 is the carried one."""
    if reset is None:
        return None
    return jnp.pad(jnp.cumsum(reset, axis=1, dtype=jnp.int32), ((0, 0), (width - 1, 0)))


def _tap(padded, documents, k, length, width):
    """The inputs [B, T, D] that tap k multiplies, zeros where they are of another document than the token."""
    tap = lax.dynamic_slice_in_dim(padded, k, length, axis=1)
    if documents is None:
        return tap
    same = lax.dynamic_slice_in_dim(documents, k, length, axis=1) == documents[:, width - 1 :]
    return jnp.where(same[..., None], tap, 0.0)


def _preactivation(padded, documents, weight, bias, length):
    width = weight.shape[0]
    weight = weight.astype(jnp.float32)
    y = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)
    for k in range(width):
        y = y + weight[k] * _tap(padded, documents, k, length, width)
    return y


def _new_state(padded, documents, state, valid, length, width):
    """The last W - 1 inputs of the last document [B, W - 1, D]."""
    if valid is None and documents is None:
        return padded[:, length:]
    if valid is None:
        same = documents[:, length:] == documents[:, -1:]
        return jnp.where(same[..., None], padded[:, length:], 0.0)
    _, last = _first_and_last(valid)
    window = _windows(padded, last + 1, width - 1)
    if documents is not None:
        nearby = _windows(documents[..., None], last + 1, width - 1)  # ends with the last valid token itself
        window = jnp.where(nearby == nearby[:, -1:], window, 0.0)
    kept = jnp.zeros_like(window) if state is None else state
    return jnp.where((last >= 0)[:, None, None], window, kept)


def _activate(y, activation, valid):
    if activation == "silu":
        y = jax.nn.silu(y)
    return y if valid is None else jnp.where(valid[..., None], y, 0.0)


def forward(x, weight, bias, state, reset, valid, *, activation: str | None):
    """Returns (y [B, T, D], new_state [B, W - 1, D]); arguments as in `causal_conv1d`."""
    length, width = x.shape[1], weight.shape[0]
    padded, documents = _pad(x, state, valid, width), _documents(reset, width)
    y = _activate(_preactivation(padded, documents, weight, bias, length), activation, valid)
    return y.astype(x.dtype), _new_state(padded, documents, state, valid, length, width)


def backward(x, weight, bias, state, reset, valid, dy, dstate, *, activation: str | None):
    """Returns the gradients of (x, weight, bias, state), from the arguments of the forward pass alone."""
    length, width = x.shape[1], weight.shape[0]
    documents = _documents(reset, width)
    padded = _pad(x, state, valid, width)
    y = _preactivation(padded, documents, weight, bias, length)
    _, activation_pullback = jax.vjp(lambda y: _activate(y, activation, valid), y)
    (dy,) = activation_pullback(dy.astype(jnp.float32))

    def carry(x, state):
        padded = _pad(x, state, valid, width)
        return padded, _new_state(padded, documents, state, valid, length, width)

    _, pullback = jax.vjp(carry, x, state)
    dx, dcarried = pullback((_input_gradient(dy, documents, weight), dstate))
    # One tap after the other: all at once, XLA keeps W products of the size of x.
    dweight = lax.map(lambda k: jnp.sum(dy * _tap(padded, documents, k, length, width), axis=(0, 1)), jnp.arange(width))
    dbias = None if bias is None else jnp.sum(dy, axis=(0, 1)).astype(bias.dtype)
    return dx, dweight.astype(weight.dtype), dbias, dcarried


def _input_gradient(dy, documents, weight):
    """Cotangent of the padded inputs [B, W - 1 + T, D]: the same shifted sums, run backwards in time."""
    width = weight.shape[0]
    weight = weight.astype(jnp.float32)
    ends = (width - 1, width - 1)
    dy = jnp.pad(dy, ((0, 0), ends, (0, 0)))
    length = dy.shape[1] - (width - 1)
    if documents is not None:
        users = jnp.pad(documents[:, width - 1 :], ((0, 0), ends), constant_values=-1)
    total = jnp.zeros((), jnp.float32)
    for k in range(width):
        start = width - 1 - k
        term = weight[k] * dy[:, start : start + length]
        if documents is not None:
            term = jnp.where((users[:, start : start + length] == documents)[..., None], term, 0.0)
        total = total + term
    return total

"""Selective scan as a loop over chunks of a loop over tokens, with a hand-written backward pass.

The state is kept as [B, N, Di]: channels are contiguous, so one token is a few long vector operations.
Within a chunk the recurrence is sequential: an associative scan does log C times the work, which a CPU feels.
Only the states at the chunk boundaries survive for the backward pass, which recomputes the rest by chunk,
softplus, skip and gate included: no array of the size of x outlives a chunk.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chunks import over_chunks


class Tokens(NamedTuple):
    """A chunk of the inputs, time first, in float32, with zeros at padding."""

    x: jax.Array  # [C, B, Di]
    dt: jax.Array  # [C, B, Di], after bias and softplus
    b: jax.Array  # [C, B, N]
    c: jax.Array  # [C, B, N]
    z: jax.Array | None  # [C, B, Di]
    slope: jax.Array | None  # [C, B, Di], derivative of the softplus
    reset: jax.Array | None  # [C, B]
    valid: jax.Array | None  # [C, B, 1]


def _einsum(equation: str, *operands: jax.Array) -> jax.Array:
    # Matrix-vector products: full precision is cheap, and the TPU's default would round to bfloat16.
    return jnp.einsum(equation, *operands, precision=lax.Precision.HIGHEST)


def _sum_states(v: jax.Array) -> jax.Array:
    """[B, N, Di] -> [B, Di]; as a product with ones, ten times faster on XLA's CPU than a reduction."""
    return _einsum("bnd,bn->bd", v, jnp.ones(v.shape[:2], v.dtype))


def _sum_tokens(v: jax.Array) -> jax.Array:
    """[C, B, Di] -> [Di], as a product with ones for the same reason."""
    v = v.reshape(-1, v.shape[-1])
    return _einsum("t,td->d", jnp.ones(v.shape[0], v.dtype), v)


def _load(start, length, x, dt, B, C, z, dt_bias, reset, valid, dt_softplus) -> Tokens:
    def take(v):
        return jnp.swapaxes(lax.dynamic_slice_in_dim(v, start, length, axis=1), 0, 1)

    mask = None if valid is None else take(valid)[..., None]

    def load(v):
        v = take(v).astype(jnp.float32)
        return v if mask is None else jnp.where(mask, v, 0.0)

    step = load(dt)
    if dt_bias is not None:
        step = step + dt_bias.astype(jnp.float32)
    slope = None
    if dt_softplus:
        slope = jax.nn.sigmoid(step)
        step = jax.nn.softplus(step)
    if mask is not None:  # after the softplus: a step of exactly zero leaves the state as it is
        step = jnp.where(mask, step, 0.0)
    gate = None if z is None else load(z)
    return Tokens(load(x), step, load(B), load(C), gate, slope, None if reset is None else take(reset), mask)


def _states_first(state, batch, states, channels):
    """[B, Di, N] -> [B, N, Di]; zeros for a fresh state."""
    if state is None:
        return jnp.zeros((batch, states, channels), jnp.float32)
    return jnp.swapaxes(state, 1, 2)


def _clear(reset_t, h):
    return h if reset_t is None else jnp.where(reset_t[:, None, None], 0.0, h)


def _write(buffer, value, start):
    """Puts time-first `value` [C, B, ...] into `buffer` [B, T, ...]."""
    return lax.dynamic_update_slice_in_dim(buffer, jnp.swapaxes(value, 0, 1).astype(buffer.dtype), start, axis=1)


def _scan_chunk(tokens: Tokens, A_nd, h, history=None, *, outputs: bool):
    """Runs the recurrence over one chunk.

    Args:
      tokens: the chunk.
      A_nd: [N, Di].
      h: [B, N, Di] state before the chunk.
      history: buffers (state before the token, decay), [>= C, B, N, Di] each, to be filled for the backward
        pass, or None. The caller carries them along: fresh ones would be cleared at every chunk.
      outputs: whether to return C h.

    Returns:
      The state after the chunk, C h as [C, B, Di] or None, and the history.
    """

    def step(carry, token):
        h, history = carry
        index, dt, u, b, c, reset = token
        h = _clear(reset, h)
        decay = jnp.exp(dt[:, None] * A_nd)
        if history is not None:
            history = tuple(
                lax.dynamic_update_index_in_dim(buffer, v, index, axis=0)
                for buffer, v in zip(history, (h, decay), strict=True)
            )
        h = decay * h + u[:, None] * b[..., None]
        return (h, history), _einsum("bnd,bn->bd", h, c) if outputs else None

    index = jnp.arange(tokens.dt.shape[0])
    xs = (index, tokens.dt, tokens.dt * tokens.x, tokens.b, tokens.c, tokens.reset)
    (h, history), y = lax.scan(step, (h, history), xs)
    return h, y, history


def _one_step(x, dt, A, B, C, D, z, dt_bias, state, reset, valid, dt_softplus):
    """Decoding: a single fused step in the layout of the state."""
    t = _load(0, 1, x, dt, B, C, z, dt_bias, reset, valid, dt_softplus)
    t = jax.tree.map(lambda v: v[0], t)
    h = t.dt[..., None] * t.x[..., None] * t.b[:, None]
    if state is not None:
        h = jnp.exp(t.dt[..., None] * A.astype(jnp.float32)) * _clear(t.reset, state) + h
    y = _einsum("bdn,bn->bd", h, t.c)
    return _finish(y, D, t)[:, None].astype(x.dtype), h


def _finish(y, D, t: Tokens):
    if D is not None:
        y = y + D.astype(jnp.float32) * t.x
    if t.z is not None:
        y = y * jax.nn.silu(t.z)
    return y if t.valid is None else jnp.where(t.valid, y, 0.0)


def forward(x, dt, A, B, C, D, z, dt_bias, state, reset, valid, *, dt_softplus: bool, chunk_size: int, save: bool):
    """Returns (y [B, T, Di], new_state [B, Di, N], boundaries), arguments as in `selective_scan`.

    `boundaries` is float32 [B, ceil(T / chunk_size), N, Di], the state before each chunk; None unless `save`.
    """
    batch, length, channels = x.shape
    states = A.shape[1]
    h = _states_first(state, batch, states, channels)
    if length == 1:
        y, new_state = _one_step(x, dt, A, B, C, D, z, dt_bias, state, reset, valid, dt_softplus)
        return y, new_state, h[:, None] if save else None
    A_nd = A.astype(jnp.float32).T

    def body(index, start, size, carry):
        h, y, boundaries = carry
        if save:
            boundaries = lax.dynamic_update_index_in_dim(boundaries, h, index, axis=1)
        tokens = _load(start, size, x, dt, B, C, z, dt_bias, reset, valid, dt_softplus)
        h, y_chunk, _ = _scan_chunk(tokens, A_nd, h, outputs=True)
        return h, _write(y, _finish(y_chunk, D, tokens), start), boundaries

    boundaries = jnp.zeros((batch, -(-length // chunk_size), states, channels), jnp.float32) if save else None
    h, y, boundaries = over_chunks(length, chunk_size, body, (h, jnp.zeros_like(x), boundaries))
    return y, jnp.swapaxes(h, 1, 2), boundaries


def _gate_gradient(tokens: Tokens, y, D, dy):
    """Takes dy through y * silu(z); returns the cotangent of the ungated output and that of z."""
    if tokens.valid is not None:
        dy = jnp.where(tokens.valid, dy, 0.0)
    if tokens.z is None:
        return dy, None
    if D is not None:
        y = y + D.astype(jnp.float32) * tokens.x
    sigmoid = jax.nn.sigmoid(tokens.z)
    return dy * tokens.z * sigmoid, dy * y * sigmoid * (1.0 + tokens.z * (1.0 - sigmoid))


def _scan_chunk_backward(tokens: Tokens, A_nd, history, g, dh, dA):
    """Runs the adjoint recurrence over one chunk.

    With a_t = exp(dt_t A), u = dt x and dh the cotangent of h_t: dh += g_t C_t, dC_t = sum_d g_t h_t,
    dB_t = sum_d dh u_t, du_t = sum_n dh B_t, and r = dh a_t h_{t-1} is the cotangent of the exponent dt_t A:
    dA += dt_t r, ddt_t = sum_n r A. Then dh <- a_t dh.
    """

    def step(carry, token):
        dh, dA = carry
        dt, u, b, c, reset, g, h, decay = token
        dh = dh + c[..., None] * g[:, None]
        kept = decay * h
        r = dh * kept
        du = _einsum("bnd,bn->bd", dh, b)
        db = _einsum("bnd,bd->bn", dh, u)
        dc = _einsum("bnd,bd->bn", kept, g)  # the part u_t B_t of h_t is added for the whole chunk below
        return (_clear(reset, decay * dh), dA + dt[:, None] * r), (du, _sum_states(r * A_nd), db, dc)

    u = tokens.dt * tokens.x
    xs = (tokens.dt, u, tokens.b, tokens.c, tokens.reset, g, *(v[: g.shape[0]] for v in history))
    (dh, dA), (du, ddt, db, dc) = lax.scan(step, (dh, dA), xs, reverse=True)
    dc = dc + jnp.sum(g * u, axis=-1, keepdims=True) * tokens.b
    return dh, dA, du, ddt, db, dc


def backward(
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    state,
    reset,
    valid,
    boundaries,
    dy,
    dstate,
    *,
    dt_softplus: bool,
    chunk_size: int,
):
    """Returns the gradients of (x, dt, A, B, C, D, z, dt_bias, state), None where the argument was None.

    Args are those of `forward`, its `boundaries`, and the cotangents dy [B, T, Di] and dstate [B, Di, N].
    """
    batch, length, channels = x.shape
    A_nd = A.astype(jnp.float32).T

    def body(index, start, size, carry):
        dh, history, sums, out = carry
        tokens = _load(start, size, x, dt, B, C, z, dt_bias, reset, valid, dt_softplus)
        h = lax.dynamic_index_in_dim(boundaries, index, axis=1, keepdims=False)
        _, y, history = _scan_chunk(tokens, A_nd, h, history, outputs=z is not None)
        g = jnp.swapaxes(lax.dynamic_slice_in_dim(dy, start, size, axis=1), 0, 1).astype(jnp.float32)
        g, dz = _gate_gradient(tokens, y, D, g)
        dh, dA, du, ddt, db, dc = _scan_chunk_backward(tokens, A_nd, history, g, dh, sums["A"])
        dx = tokens.dt * du
        if D is not None:
            dx = dx + D.astype(jnp.float32) * g
        ddt = ddt + tokens.x * du
        if tokens.slope is not None:
            ddt = ddt * tokens.slope
        if tokens.valid is not None:
            ddt = jnp.where(tokens.valid, ddt, 0.0)
        new = {"x": dx, "dt": ddt, "B": db, "C": dc, "z": dz}
        sums = sums | {"A": dA}
        if D is not None:
            sums["D"] = sums["D"] + _sum_tokens(g * tokens.x)
        if dt_bias is not None:
            sums["dt_bias"] = sums["dt_bias"] + _sum_tokens(ddt)
        return dh, history, sums, {name: _write(buffer, new[name], start) for name, buffer in out.items()}

    out = {n: jnp.zeros_like(v) for n, v in (("x", x), ("dt", dt), ("B", B), ("C", C), ("z", z)) if v is not None}
    zero = jnp.zeros((channels,), jnp.float32)
    sums: dict[str, Any] = {n: zero for n, v in (("D", D), ("dt_bias", dt_bias)) if v is not None}
    sums["A"] = jnp.zeros((batch, *A_nd.shape), jnp.float32)
    history = (jnp.zeros((min(chunk_size, length), batch, *A_nd.shape), jnp.float32),) * 2
    carry = (jnp.swapaxes(dstate, 1, 2), history, sums, out)
    dh, _, sums, out = over_chunks(length, chunk_size, body, carry, reverse=True)
    return (
        out["x"],
        out["dt"],
        jnp.sum(sums["A"], axis=0).T.astype(A.dtype),
        out["B"],
        out["C"],
        None if D is None else sums["D"].astype(D.dtype),
        out.get("z"),
        None if dt_bias is None else sums["dt_bias"].astype(dt_bias.dtype),
        None if state is None else jnp.swapaxes(dh, 1, 2),
    )

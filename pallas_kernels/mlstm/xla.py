"""The mLSTM cell as a loop over chunks of matrix products, with a hand-written backward pass.

Only C and n at the chunk boundaries survive for the backward pass, which recomputes the rest by chunk; m is cheap
enough to be recomputed for all tokens at once.

Layout within a chunk of C tokens: q, k [B, H, C, K]; v, y [B, H, C, V]; gates [B, H, C]; state [B, H, K, V] and
[B, H, K].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.chunks import opaque, over_chunks
from pallas_kernels.mlstm import gates
from pallas_kernels.mlstm.gates import Gates

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Chunk(NamedTuple):
    """A chunk of the inputs in float32, with zeros at padding; q is multiplied by the scale."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gates: Gates  # each [B, H, C]
    mask: jax.Array | None  # bool [B, 1, C, 1], False at padding


class _Tokens(NamedTuple):
    """An array [B, T, H, X] of which chunks are taken, or into which they are put.

    16-bit floats are held as integers: XLA's CPU backend would convert all of the array to float32 for every chunk.
    """

    bits: jax.Array
    like: jax.Array  # empty, of the dtype of the array

    def take(self, start, size: int):
        """Float32 [B, H, C, X]."""
        x = lax.dynamic_slice_in_dim(self.bits, start, size, axis=1)
        if x.dtype != self.like.dtype:
            x = lax.bitcast_convert_type(x, self.like.dtype)
        return jnp.swapaxes(x, 1, 2).astype(jnp.float32)

    def put(self, value, start):
        """The tokens with `value` [B, H, C, X] at `start`."""
        x = _tokens(jnp.swapaxes(value, 1, 2).astype(self.like.dtype)).bits
        return self._replace(bits=lax.dynamic_update_slice_in_dim(self.bits, x, start, axis=1))

    @property
    def array(self):
        if self.bits.dtype == self.like.dtype:
            return self.bits
        return lax.bitcast_convert_type(self.bits, self.like.dtype)


def _tokens(x) -> _Tokens:
    bits = x if x.dtype.itemsize == 4 else lax.bitcast_convert_type(x, jnp.uint16)
    return _Tokens(bits, jnp.zeros((0,), x.dtype))


def _gates_at(g: Gates):
    """A function from the index of a chunk to its gates, each [B, H, C]."""
    return lambda index: jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, axis=2, keepdims=False), g)


def _load(start, size: int, tokens: list[_Tokens], valid, g: Gates, scale: float) -> Chunk:
    """The chunk of q, k and v, with its gates."""
    mask = None
    if valid is not None:
        mask = lax.dynamic_slice_in_dim(valid, start, size, axis=1)[:, None, :, None]
    g = jax.tree.map(lambda x: x[..., :size], g)
    q, k, v = (only(mask, x.take(start, size)) for x in tokens)
    return Chunk(q * scale, k, v, g, mask)


def only(mask, x):
    """Zeros where the mask is False, whatever x holds there; a mask of None is True everywhere."""
    return x if mask is None else jnp.where(mask, x, 0.0)


def _weights(g: Gates):
    """[B, H, C, C] weight of token j at token i, 0 unless i sees j."""
    size = g.m.shape[-1]
    differences = (x[..., :, None] - x[..., None, :] for x in (g.coarse, g.fine))
    exponent = sum(differences) + (g.log_input[..., None, :] - g.m[..., :, None])
    sees = np.tri(size, dtype=bool)
    if g.document is not None:
        sees = sees & (g.document[..., :, None] == g.document[..., None, :])
    return jnp.exp(jnp.where(sees, exponent, gates.NEVER))


def normaliser(denominator, m, eps: float):
    """1 / (max(|denominator|, exp(-m)) + eps), and the sign of the denominator where it is the larger one, else 0.

    Numerator and denominator are taken times exp(min(m, 0)), so that nothing overflows.
    """
    unit, least = jnp.exp(jnp.minimum(m, 0.0)), jnp.exp(-jnp.maximum(m, 0.0))
    size = jnp.abs(denominator) * unit
    return unit / (jnp.maximum(size, least) + eps * unit), jnp.where(size > least, jnp.sign(denominator), 0.0)


def _scores(t: Chunk, n):
    """(weights, weights times products [B, H, C, C], denominator [B, H, C])."""
    weights = _weights(t.gates)
    scores = weights * _einsum("bhik,bhjk->bhij", t.q, t.k)
    carried = only(t.gates.inter > 0, t.gates.inter * _einsum("bhik,bhk->bhi", t.q, n))
    return weights, scores, carried + jnp.sum(scores, axis=-1)


def _outputs(t: Chunk, C, n, eps: float):
    """[B, H, C, V]."""
    _, scores, denominator = _scores(t, n)
    inter = t.gates.inter[..., None]
    numerator = only(inter > 0, inter * _einsum("bhik,bhkv->bhiv", t.q, C)) + _einsum("bhij,bhjv->bhiv", scores, t.v)
    factor, _ = normaliser(denominator, t.gates.m, eps)
    return only(t.mask, numerator * factor[..., None])


def _next_state(t: Chunk, C, n):
    k, decay = t.k * t.gates.outer[..., None], t.gates.inter[..., -1, None]
    n = only(decay > 0, decay * n) + jnp.sum(k, axis=2)
    decay = decay[..., None]
    return only(decay > 0, decay * C) + _einsum("bhjk,bhjv->bhkv", k, t.v), n


def _chunk_backward(t: Chunk, C, n, y, dy, dC, dn, eps: float):
    """Cotangents of q (times scale), k and v, the flows of `gates.pull`, and the cotangents of C and n before."""
    inter, outer = t.gates.inter[..., None], t.gates.outer[..., None]
    decay = inter[..., -1, :]
    weights, scores, denominator = _scores(t, n)
    factor, sign = normaliser(denominator, t.gates.m, eps)
    dfactor = -factor * jnp.sum(dy * y, axis=-1)  # the cotangent of 1 / factor
    dnumerator, ddenominator = dy * factor[..., None], (dfactor * sign)[..., None]
    # Within the chunk.
    dscores = _einsum("bhiv,bhjv->bhij", dnumerator, t.v) + ddenominator
    dproducts = weights * dscores
    dq = _einsum("bhij,bhjk->bhik", dproducts, t.k)
    dk = _einsum("bhij,bhik->bhjk", dproducts, t.q)
    dv = _einsum("bhij,bhiv->bhjv", scores, dnumerator)
    flow = scores * dscores
    between = jnp.where(np.eye(flow.shape[-1], dtype=bool), 0.0, flow)
    crossing = jnp.sum(between, axis=3) - jnp.sum(between, axis=2)
    # From the state before the chunk.
    dq_in = _einsum("bhiv,bhkv->bhik", dnumerator, C) + ddenominator * n[:, :, None]
    dq_in = only(inter > 0, inter * dq_in)
    q = inter * t.q
    # To the state after the chunk.
    dk_out = outer * (_einsum("bhjv,bhkv->bhjk", t.v, dC) + dn[:, :, None])
    dv_out = outer * _einsum("bhjk,bhkv->bhjv", t.k, dC)
    departing = jnp.sum(t.k * dk_out, axis=-1)
    passing = jnp.sum(only(decay > 0, decay * (jnp.sum(C * dC, axis=-1) + n * dn)), axis=-1)
    flows = (
        departing + jnp.sum(flow, axis=2),
        crossing + jnp.sum(t.q * dq_in, axis=-1),
        departing,
        eps * dfactor,
        passing,
    )
    dn = decay * dn + jnp.sum(q * ddenominator, axis=2)
    dC = decay[..., None] * dC + _einsum("bhik,bhiv->bhkv", q, dnumerator)
    return dq + dq_in, dk + dk_out, dv + dv_out, flows, dC, dn


def initial(q, v, C, n, m):
    """The state to start from: that given, or zeros."""
    if C is not None:
        return C, n, m
    batch, _, heads, key = q.shape
    shapes = (batch, heads, key, v.shape[-1]), (batch, heads, key), (batch, heads)
    return tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)


def _one_step(q, k, v, i, f, C, n, m, reset, valid, scale: float, eps: float):
    """Decoding: a single fused step."""
    g = jax.tree.map(lambda x: x[:, :, 0], gates.prepare(i, f, m, reset, valid, 1))
    mask = None if valid is None else valid[..., None]

    def load(x):
        return only(mask, x[:, 0].astype(jnp.float32))

    q, k, v = load(q) * scale, load(k) * g.outer, load(v)
    new_n = only(g.inter > 0, g.inter * n) + k
    decay = g.inter[..., None]
    new_C = only(decay > 0, decay * C) + k[..., None] * v[..., None, :]
    factor, _ = normaliser(_einsum("bhk,bhk->bh", q, new_n)[..., None], g.m, eps)
    y = only(mask, _einsum("bhk,bhkv->bhv", q, new_C) * factor)
    return y[:, None], new_C, new_n, g.m[..., 0]


def forward(q, k, v, i, f, C, n, m, reset, valid, *, scale: float, eps: float, chunk_size: int, save: bool):
    """Returns (y [B, T, H, V], C, n, m after the sequence, boundaries), arguments as in `mlstm`.

    `boundaries` are float32 [B, N, H, K, V] and [B, N, H, K], C and n before each of the N = ceil(T / chunk_size)
    chunks; None unless `save`.
    """
    length = q.shape[1]
    C, n, m = initial(q, v, C, n, m)
    if length == 1:
        y, *state = _one_step(q, k, v, i, f, C, n, m, reset, valid, scale, eps)
        return y.astype(v.dtype), *state, (C[:, None], n[:, None]) if save else None
    g = gates.prepare(i, f, m, reset, valid, chunk_size)
    tokens = [_tokens(x) for x in (q, k, v)]

    def body(index, start, size, carry, here):
        C, n, y, boundaries = carry
        if save:
            put = functools.partial(lax.dynamic_update_index_in_dim, index=index, axis=1)
            boundaries = tuple(put(b, s) for b, s in zip(boundaries, (C, n), strict=True))
        t = _load(start, size, tokens, valid, here, scale)
        return *_next_state(t, C, n), y.put(_outputs(t, C, n, eps), start), boundaries

    boundaries = None
    if save:
        boundaries = tuple(jnp.zeros((s.shape[0], g.m.shape[2], *s.shape[1:]), jnp.float32) for s in (C, n))
    carry = (opaque(C), opaque(n), _tokens(jnp.zeros_like(v)), boundaries)
    C, n, y, boundaries = over_chunks(length, chunk_size, body, carry, load=_gates_at(g))
    return y.array, C, n, g.m[..., -1, -1], boundaries


def backward(
    q, k, v, i, f, C, n, m, reset, valid, boundaries, y, dy, dC, dn, dm, *, scale: float, eps: float, chunk_size: int
):
    """Returns the gradients of (q, k, v, i, f, C, n, m), None for those of a state that was None.

    Args are those of `forward`, its `boundaries` and `y`, and the cotangents of y, C, n and m.
    """
    length = q.shape[1]
    _, _, m_first = initial(q, v, C, n, m)
    g = gates.prepare(i, f, m_first, reset, valid, chunk_size)
    tokens, given = [_tokens(x) for x in (q, k, v)], [_tokens(x) for x in (y, dy)]

    def body(index, start, size, carry, here):
        dC, dn, out, flows = carry
        t = _load(start, size, tokens, valid, here, scale)
        C, n = (lax.dynamic_index_in_dim(b, index, axis=1, keepdims=False) for b in boundaries)
        y, dy = (only(t.mask, x.take(start, size)) for x in given)
        dq, dk, dv, flow, dC, dn = _chunk_backward(t, C, n, y, dy, dC, dn, eps)
        out = tuple(buffer.put(x, start) for buffer, x in zip(out, (dq * scale, dk, dv), strict=True))
        flow = [x[:, :, None] for x in flow]
        flows = tuple(
            lax.dynamic_update_slice(buffer, x, (0, 0, index, 0)[: buffer.ndim])
            for buffer, x in zip(flows, flow, strict=True)
        )
        return dC, dn, out, flows

    out = tuple(_tokens(jnp.zeros_like(x)) for x in (q, k, v))
    flows = (*(jnp.zeros_like(g.m) for _ in range(4)), jnp.zeros_like(g.m[..., 0]))
    carry = (opaque(dC), opaque(dn), out, flows)
    dC, dn, out, flows = over_chunks(length, chunk_size, body, carry, load=_gates_at(g), reverse=True)
    out = [x.array for x in out]
    di, df, dm = gates.pull(i, f, m_first, reset, valid, chunk_size, flows, dm)
    if C is None:
        return *out, di, df, None, None, None
    return *out, di, df, dC, dn, dm + unit(C, dC) + unit(n[..., None], dn[..., None])


def unit(x, dx):
    """[B, H] cotangent of the logarithm of the unit of x [B, H, ...]."""
    return jnp.sum(jnp.where(dx == 0, 0.0, x * dx), axis=(2, 3))

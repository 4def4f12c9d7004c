"""Linear recurrence as a loop over chunks of a loop over tokens, with a hand-written backward pass.

Tokens are read and written in place, [B, T, D] as they come: on a CPU this is several times faster than a scan over
time-first copies, and an associative scan is slower still. Only the states at the chunk boundaries survive for the
backward pass, which recomputes the rest by chunk: the output would serve only in float32 and without padding.
"""

import jax.numpy as jnp
from jax import lax


def _over_chunks(length: int, chunk: int, body, carry, *, reverse: bool = False):
    """Runs carry = body(index, size, carry) over the chunks; the last one may be shorter."""
    full, tail = divmod(length, chunk)
    if tail and reverse:
        carry = body(full, tail, carry)
    carry = lax.fori_loop(0, full, lambda i, c: body(full - 1 - i if reverse else i, chunk, c), carry)
    if tail and not reverse:
        carry = body(full, tail, carry)
    return carry


def _bits(array):
    """16-bit floats as integers: XLA's CPU backend would convert all of the array to float32 at every token."""
    return array if array.dtype.itemsize == 4 else lax.bitcast_convert_type(array, jnp.uint16)


def _floats(bits, dtype):
    return bits if bits.dtype == dtype else lax.bitcast_convert_type(bits, dtype)


def _load(bits, dtype, t, valid, otherwise):
    """Token t of [B, T, D] in float32, `otherwise` at padding."""
    token = _floats(lax.dynamic_index_in_dim(bits, t, axis=1, keepdims=False), dtype).astype(jnp.float32)
    return token if valid is None else jnp.where(_mask(valid, t), token, otherwise)


def _store(bits, dtype, token, t, valid):
    """Puts a token into [B, T, D], zeros at padding."""
    token = token if valid is None else jnp.where(_mask(valid, t), token, 0.0)
    return lax.dynamic_update_index_in_dim(bits, _bits(token.astype(dtype)), t, axis=1)


def _mask(flags, t):
    return lax.dynamic_index_in_dim(flags, t, axis=1)


def _clear(reset, t, h):
    return h if reset is None else jnp.where(_mask(reset, t), 0.0, h)


def _initial(state, a):
    return jnp.zeros((a.shape[0], a.shape[2]), jnp.float32) if state is None else state


def forward(a, b, state, reset, valid, *, chunk_size: int, save: bool):
    """Returns (h [B, T, D], new_state [B, D], boundaries), arguments as in `linear_scan`.

    `boundaries` is float32 [B, ceil(T / chunk_size), D], the state before each chunk; None unless `save`.
    """
    batch, length, channels = a.shape
    a_bits, b_bits = _bits(a), _bits(b)

    def chunk(index, size, carry):
        def token(i, carry):
            state, h = carry
            t = index * chunk_size + i
            decay = _load(a_bits, a.dtype, t, valid, 1.0)
            state = decay * _clear(reset, t, state) + _load(b_bits, b.dtype, t, valid, 0.0)
            return state, _store(h, b.dtype, state, t, valid)

        state, h, boundaries = carry
        if save:
            boundaries = lax.dynamic_update_index_in_dim(boundaries, state, index, axis=1)
        return *lax.fori_loop(0, size, token, (state, h)), boundaries

    boundaries = jnp.zeros((batch, -(-length // chunk_size), channels), jnp.float32) if save else None
    carry = _initial(state, a), jnp.zeros_like(b_bits), boundaries
    new_state, h, boundaries = _over_chunks(length, chunk_size, chunk, carry)
    return _floats(h, b.dtype), new_state, boundaries


def backward(a, b, state, reset, valid, boundaries, dh, dstate, *, chunk_size: int):
    """Returns the gradients of (a, b, state), None for a state that was None.

    With g_t = dh_t + a_{t+1} g_{t+1}: db_t = g_t and da_t = g_t h_{t-1}.

    Args are those of `forward`, its `boundaries`, and the cotangents dh [B, T, D] and dstate [B, D].
    """
    batch, length, channels = a.shape
    a_bits, b_bits, dh_bits = _bits(a), _bits(b), _bits(dh)

    def chunk(index, size, carry):
        def recompute(i, carry):
            h, before = carry
            t = index * chunk_size + i
            h = _clear(reset, t, h)
            before = lax.dynamic_update_index_in_dim(before, h, i, axis=0)
            decay = _load(a_bits, a.dtype, t, valid, 1.0)
            return decay * h + _load(b_bits, b.dtype, t, valid, 0.0), before

        def token(i, carry):
            kept, da, db = carry
            i = size - 1 - i
            t = index * chunk_size + i
            g = kept + _load(dh_bits, dh.dtype, t, valid, 0.0)
            da_t = g * lax.dynamic_index_in_dim(before, i, axis=0, keepdims=False)
            kept = _clear(reset, t, _load(a_bits, a.dtype, t, valid, 1.0) * g)
            return kept, _store(da, a.dtype, da_t, t, valid), _store(db, b.dtype, g, t, valid)

        kept, da, db, before = carry
        h = lax.dynamic_index_in_dim(boundaries, index, axis=1, keepdims=False)
        _, before = lax.fori_loop(0, size, recompute, (h, before))
        return *lax.fori_loop(0, size, token, (kept, da, db)), before

    before = jnp.zeros((min(chunk_size, length), batch, channels), jnp.float32)
    carry = dstate, jnp.zeros_like(a_bits), jnp.zeros_like(b_bits), before
    kept, da, db, _ = _over_chunks(length, chunk_size, chunk, carry, reverse=True)
    return _floats(da, a.dtype), _floats(db, b.dtype), None if state is None else kept

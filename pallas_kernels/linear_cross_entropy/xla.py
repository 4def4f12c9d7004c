"""Cross entropy of a linear head, the logits of one chunk of classes at a time, with a hand-written gradient.

Classes and not tokens are cut: a chunk's weight gradient is then finished at once, and what is carried from chunk to
chunk is [N] statistics forward and the [N, D] gradient of x backward, never a float32 copy of the weights.
"""

import jax.numpy as jnp
from jax import lax

_LOWEST = float(jnp.finfo(jnp.float32).min)  # start of a running maximum: minus infinity would make NaN of inf - inf


def forward(x, w, labels, *, transposed: bool, logit_scale: float, soft_cap: float | None, chunk_size: int):
    """Returns (nll, lse, mean_logit, argmax), arguments as in `linear_cross_entropy`."""
    classes = w.shape[0 if transposed else 1]

    def body(start, size, carry):
        maximum, total, target, summed, argmax = carry
        logits, _ = _logits(x, _slice(w, start, size, transposed), transposed, logit_scale, soft_cap)
        largest = jnp.max(logits, axis=-1)
        index = start + jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # The first of equal logits wins, and as in jnp.argmax the first NaN beats every number.
        better = (largest > maximum) | (jnp.isnan(largest) & ~jnp.isnan(maximum))
        new_maximum = jnp.maximum(maximum, largest)
        total = total * jnp.exp(maximum - new_maximum) + jnp.sum(jnp.exp(logits - new_maximum[:, None]), axis=-1)
        target = target + jnp.sum(jnp.where(_is_label(labels, start, size), logits, 0.0), axis=-1)
        summed = summed + jnp.sum(logits, axis=-1)
        return new_maximum, total, target, summed, jnp.where(better, index, argmax)

    zeros = jnp.zeros(x.shape[:1], jnp.float32)
    carry = (zeros + _LOWEST, zeros, zeros, zeros, jnp.zeros(x.shape[:1], jnp.int32))
    maximum, total, target, summed, argmax = _over_chunks(classes, chunk_size, body, carry)
    lse = jnp.where(maximum == jnp.inf, jnp.inf, maximum + jnp.log(total))
    known = (labels >= 0) & (labels < classes)
    return lse - jnp.where(known, target, jnp.nan), lse, summed / classes, argmax


def backward(
    x, w, labels, lse, dnll, dlse, dmean, *, transposed: bool, logit_scale: float, soft_cap: float | None, chunk_size
):
    """Returns the gradients of (x, w) from the arguments and the lse of `forward` and its cotangents [N]."""
    classes = w.shape[0 if transposed else 1]
    live = (dnll != 0) | (dlse != 0) | (dmean != 0)
    x_live = jnp.where(live[:, None], x, 0)  # 0 * NaN is NaN
    spread = dnll + dlse

    def body(start, size, carry):
        dx, dw = carry
        w_chunk = _slice(w, start, size, transposed).astype(x.dtype)
        logits, slope = _logits(x_live, w_chunk, transposed, logit_scale, soft_cap)
        dlogits = spread[:, None] * jnp.exp(logits - lse[:, None]) + dmean[:, None] / classes
        dlogits = dlogits - jnp.where(_is_label(labels, start, size), dnll[:, None], 0.0)
        dlogits = jnp.where(live[:, None], dlogits * slope, 0.0).astype(x.dtype)
        dx = dx + _dot(dlogits, w_chunk, (1,), (0 if transposed else 1,))
        operands = (dlogits, x_live) if transposed else (x_live, dlogits)
        dw_chunk = _dot(*operands, (0,), (0,)).astype(w.dtype)
        return dx, lax.dynamic_update_slice_in_dim(dw, dw_chunk, start, axis=0 if transposed else 1)

    carry = (jnp.zeros(x.shape, jnp.float32), jnp.zeros_like(w))
    dx, dw = _over_chunks(classes, chunk_size, body, carry)
    return dx.astype(x.dtype), dw


def _over_chunks(length: int, chunk: int, body, carry):
    """Runs carry = body(start, size, carry) over the chunks; the last one may be shorter."""
    full, tail = divmod(length, chunk)
    carry = lax.fori_loop(0, full, lambda i, carry: body(i * chunk, chunk, carry), carry)
    return body(full * chunk, tail, carry) if tail else carry


def _slice(w, start, size: int, transposed: bool):
    return lax.dynamic_slice_in_dim(w, start, size, axis=0 if transposed else 1)


def _dot(a, b, a_axes, b_axes):
    return lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=jnp.float32)


def _logits(x, w_chunk, transposed: bool, logit_scale: float, soft_cap: float | None):
    """float32 [N, C] logits, and their derivative by the product of x and w."""
    logits = logit_scale * _dot(x, w_chunk.astype(x.dtype), (1,), (1 if transposed else 0,))
    if soft_cap is None:
        return logits, logit_scale
    squashed = jnp.tanh(logits / soft_cap)
    return soft_cap * squashed, logit_scale * (1.0 - jnp.square(squashed))


def _is_label(labels, start, size: int):
    # A comparison in place of a gather: it fuses with the pass over the logits, and its gradient needs no scatter.
    return labels[:, None] == start + jnp.arange(size, dtype=jnp.int32)

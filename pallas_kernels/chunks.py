"""The loop of the chunked xla forms, and the state that enters it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

NARROW_CHUNK = 32  # tokens


def is_narrow(key: int, value: int, implementation: str | None) -> bool:
    """Whether heads of these widths take chunks of NARROW_CHUNK tokens where a call does not say.

    No published model's heads are so narrow, and kernels by name take whole registers of tokens.

    Products within a chunk cost C (K + V) per token, those with its state 2 K V: where both widths are below 64, a
    chunk as the matrix units of accelerators want it costs more than it saves, on a CPU two to four times.
    """
    return max(key, value) < 2 * NARROW_CHUNK and implementation in (None, "xla")


def opaque(x: jax.Array) -> jax.Array:
    """float32 x, which the compiler cannot see to be a constant.

    XLA on the CPU (jaxlib 0.10.2) reads memory that nothing wrote where a product with a broadcast constant, as with
    the zeros of a fresh state, is fused with a reduction, as in the norm of a layer: its results are then wrong or
    NaN. A barrier alone is gone before XLA fuses; the two changes of type keep it.
    """
    bits = lax.optimization_barrier(lax.bitcast_convert_type(x, jnp.int32))
    return lax.bitcast_convert_type(bits, jnp.float32)


def over_chunks(
    length: int,
    chunk: int,
    body: Callable[..., Any],
    carry: Any,
    *,
    load: Callable[[Any], Any] | None = None,
    reverse: bool = False,
) -> Any:
    """Runs carry = body(index, start, size, carry) over the chunks; the last one may be shorter.

    With `load`, body(index, start, size, carry, load(index)): each turn loads for the next one. For a few numbers per
    token that products of [C, C] are made of: XLA on the CPU fuses a slice into the loops that use it and leaves those
    scalar, 12 times slower than from an array that a turn is given.
    """
    if load is not None:
        last = -(-length // chunk) - 1

        def turn(index, start, size, carry):
            carry, loaded = carry
            following = jnp.clip(index + (-1 if reverse else 1), 0, last)
            return body(index, start, size, carry, loaded), load(following)

        return over_chunks(length, chunk, turn, (carry, load(last if reverse else 0)), reverse=reverse)[0]
    full, tail = divmod(length, chunk)
    if tail and reverse:
        carry = body(full, full * chunk, tail, carry)
    if full == 1:
        carry = body(0, 0, chunk, carry)
    elif full:

        def at(i, carry):
            i = full - 1 - i if reverse else i
            return body(i, i * chunk, chunk, carry)

        carry = lax.fori_loop(0, full, at, carry)
    if tail and not reverse:
        carry = body(full, full * chunk, tail, carry)
    return carry

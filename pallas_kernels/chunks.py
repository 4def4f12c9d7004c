"""The loop of the chunked xla forms."""

from collections.abc import Callable
from typing import Any

from jax import lax


def over_chunks(length: int, chunk: int, body: Callable[..., Any], carry: Any, *, reverse: bool = False) -> Any:
    """Runs carry = body(index, start, size, carry) over the chunks; the last one may be shorter."""
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

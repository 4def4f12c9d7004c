"""The pure parts of self-augmented preference optimisation (SAPO, arXiv:2405.20830).

A slowly moving average of the policy rewrites a segment of each chosen response; the result is the rejected response of
a pair that enters a buffer, and batches are drawn from the buffer. The loss is any of pairs (the paper: ORPO and DPO).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from objectives.checks import check_range


def ema_update(average: Any, params: Any, decay: float = 0.5) -> Any:
    """decay average + (1 - decay) params, leaf by leaf, in float32 and the dtype of the average.

    Args:
      average: tree of arrays.
      params: likewise.
      decay: in [0, 1]; the default is that of the authors' code.

    Raises:
      ValueError: decay is out of range.
    """
    check_range(0.0, 1.0, decay=decay)

    def leaf(old: jax.Array, new: jax.Array) -> jax.Array:
        return (decay * old.astype(jnp.float32) + (1.0 - decay) * new.astype(jnp.float32)).astype(old.dtype)

    return jax.tree.map(leaf, average, params)


def splice_segment(
    tokens: jax.Array, length: jax.Array, segment: jax.Array, start: jax.Array, *, end_token: int, pad_token: int
) -> tuple[jax.Array, jax.Array]:
    """Replaces tokens[start : start + S] by a generated segment; what follows stays.

    A segment longer than what is left of the sequence is cut to it. A segment that contains the end token ends the
    sequence there, as in the authors' code. One sequence; `jax.vmap` for more.

    Args:
      tokens: int[T].
      length: int, number of tokens before the padding.
      segment: int[S], generated after tokens[:start].
      start: int, in [0, length), not before the response.
      end_token: of a finished text.
      pad_token: written after the end.

    Returns:
      (tokens, length): the new sequence and its length.
    """
    position = jnp.arange(tokens.shape[0])
    offset = position - start
    count = jnp.minimum(segment.shape[0], length - start)
    inside = (offset >= 0) & (offset < count)
    spliced = jnp.where(inside, segment[jnp.clip(offset, 0, segment.shape[0] - 1)], tokens)
    ends = inside & (spliced == end_token)
    length = jnp.where(jnp.any(ends), jnp.argmax(ends) + 1, length)
    return jnp.where(position < length, spliced, pad_token), length


@flax.struct.dataclass
class ReplayBuffer:
    """The last `capacity` examples, first in first out.

    Attributes:
      examples: tree of arrays [capacity, ...].
      head: int32, where the next example goes.
      size: int32, number of examples it holds.
    """

    examples: Any
    head: jax.Array
    size: jax.Array

    @classmethod
    def create(cls, example: Any, capacity: int) -> "ReplayBuffer":
        """An empty buffer.

        Args:
          example: tree of arrays, or of their shapes and dtypes, of one example.
          capacity: at least 1; the authors' runs have 2,000.
        """
        if capacity < 1:
            raise ValueError(f"capacity must be 1 at least, got {capacity}")
        empty = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), example)
        return cls(empty, jnp.int32(0), jnp.int32(0))

    def push(self, batch: Any) -> "ReplayBuffer":
        """A buffer with B examples appended in order, which displace the oldest ones.

        Args:
          batch: tree of arrays [B, ...], B <= capacity.
        """
        number, capacity = (jax.tree.leaves(tree)[0].shape[0] for tree in (batch, self.examples))
        if number > capacity:
            raise ValueError(f"a batch of {number} examples does not fit a buffer of capacity {capacity}")
        slots = (self.head + jnp.arange(number)) % capacity
        examples = jax.tree.map(lambda old, new: old.at[slots].set(new), self.examples, batch)
        size = jnp.minimum(self.size + number, capacity)
        return ReplayBuffer(examples, (self.head + number) % capacity, size)

    def sample(self, key: jax.Array, number: int) -> Any:
        """Uniform draws with replacement; the authors' code favours examples that were drawn less often.

        Args:
          key: of `jax.random`.
          number: of examples. Draws of an empty buffer are zeros.

        Returns:
          Tree of arrays [number, ...].
        """
        index = jax.random.randint(key, (number,), 0, jnp.maximum(self.size, 1))
        return jax.tree.map(lambda x: x[index], self.examples)

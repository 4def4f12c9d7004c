"""Sequence metadata: the only carrier of positions, documents and padding."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class SeqContext:
    """Where each token of a call stands.

    A *document* is a maximal run of equal, non-zero segment ids; position 0 also starts one. The first document of a
    row continues the carried state unless its first token has position 0. Positions count up by one inside a document.

    Attributes:
      positions: int32[B, T], position of each token inside its document (ignored at padding).
      segment_ids: int32[B, T], 0 = padding, a change is a document boundary; or None when every row is one document
        without padding that continues the carried state (the fast path: nothing is masked).
    """

    positions: jax.Array
    segment_ids: jax.Array | None = None

    @property
    def valid(self) -> jax.Array | None:
        """bool[B, T], False at padding; None when there is no padding."""
        return None if self.segment_ids is None else self.segment_ids != 0

    @property
    def reset(self) -> jax.Array | None:
        """bool[B, T], True at the first token of a document that does not continue the carried state."""
        if self.segment_ids is None:
            return None
        valid = self.segment_ids != 0
        changed = self.segment_ids[:, 1:] != self.segment_ids[:, :-1]
        seen = jnp.cumsum(valid, axis=1)[:, :-1] > 0
        boundary = jnp.pad(changed & seen, ((0, 0), (1, 0)))
        return valid & (boundary | (self.positions == 0))

    @property
    def documents(self) -> jax.Array | None:
        """int32[B, T]: 0 for the document that continues the carried state, then 1, 2, ...; -1 at padding."""
        valid, reset = self.valid, self.reset
        if valid is None or reset is None:
            return None
        return jnp.where(valid, jnp.cumsum(reset, axis=1, dtype=jnp.int32), -1)

    @classmethod
    def contiguous(cls, start: jax.Array, length: int) -> "SeqContext":
        """Rows of one document each that go on at position `start` (int32[B])."""
        return cls(positions=start[:, None] + jnp.arange(length, dtype=jnp.int32))

    @classmethod
    def from_segment_ids(cls, segment_ids: jax.Array, start: jax.Array | int = 0) -> "SeqContext":
        """Positions that restart at every change of `segment_ids` [B, T]; a row's first one starts at `start` [B]."""
        segment_ids = jnp.asarray(segment_ids, jnp.int32)
        if segment_ids.ndim != 2:
            raise ValueError(f"segment_ids must be [batch, time], got shape {segment_ids.shape}")
        batch, length = segment_ids.shape
        start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (batch,))
        index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        changed = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        first_index = jax.lax.cummax(jnp.where(changed, index, 0), axis=1)
        valid = segment_ids != 0
        runs_before = jnp.cumsum(changed & valid, axis=1)
        offset = jnp.where(runs_before <= 1, start[:, None], 0)
        return cls(positions=jnp.where(valid, index - first_index + offset, 0), segment_ids=segment_ids)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | jax.Array, length: int, start: jax.Array | int = 0) -> "SeqContext":
        """Ragged rows, padded on the right to `length`: row b holds lengths[b] tokens from position start[b]."""
        lengths = jnp.asarray(lengths, jnp.int32)
        inside = jnp.arange(length, dtype=jnp.int32)[None] < lengths[:, None]
        return cls.from_segment_ids(inside.astype(jnp.int32), start)


def last_valid(ctx: SeqContext) -> jax.Array:
    """int32[B]: index of the last token that is not padding; -1 for a row of padding."""
    batch, length = ctx.positions.shape
    if ctx.segment_ids is None:
        return jnp.full((batch,), length - 1, jnp.int32)
    index = jnp.arange(length, dtype=jnp.int32)
    return jnp.max(jnp.where(ctx.segment_ids != 0, index, -1), axis=1)


def next_positions(ctx: SeqContext, previous: jax.Array) -> jax.Array:
    """int32[B]: the position that follows the last valid token of each row; `previous` where a row is all padding."""
    last = last_valid(ctx)
    position = jnp.take_along_axis(ctx.positions, jnp.maximum(last, 0)[:, None], axis=1)[:, 0] + 1
    return jnp.where(last >= 0, position, previous)

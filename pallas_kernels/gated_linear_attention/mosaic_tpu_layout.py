"""What the TPU kernels of gated linear attention share: how a call is laid out, and what none of them honours."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch

CHUNK = 128  # tokens of a step: a product of two chunks fills the matrix unit, a row of them a register
BLOCK = 8  # tokens of a register
LANES = 128
MAX_LANES = 2560  # of the values of a step
VMEM_LIMIT = 32 * 2**20  # a state and its gradient of 512 x 512, twice for the copies, beside the blocks


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of a call as given, and as the kernels take them: whole chunks, registers full of lanes."""

    length: int
    groups: int
    ratio: int  # heads of a group
    key: int
    value: int
    chunk_size: int
    wide: int = 1  # a step takes up to so many times MAX_LANES

    @property
    def chunks(self) -> int:
        """Steps over time."""
        return -(-self.length // CHUNK)

    @property
    def time(self) -> int:
        """Tokens, up to whole chunks."""
        return self.chunks * CHUNK

    @property
    def keys(self) -> int:
        """Width of a key, up to whole registers."""
        return -(-self.key // LANES) * LANES

    @property
    def values(self) -> int:
        """Width of a value: half a register where two heads can share one, else whole registers."""
        if self.value <= LANES // 2 and self.ratio % 2 == 0:
            return LANES // 2
        return -(-self.value // LANES) * LANES

    @property
    def heads(self) -> int:
        """Heads of a step."""
        most, pair = self.wide * MAX_LANES // self.values, self.pair
        fits = [n for n in range(pair, min(most, self.ratio) + 1, pair) if self.ratio % n == 0]
        return max(fits, default=pair)

    @property
    def pair(self) -> int:
        """Heads side by side in a register: two of half of it, or one."""
        return max(1, LANES // self.values)

    @property
    def rows(self) -> int:
        """Heads of a step, up to whole registers of eight, of every second head where two are side by side."""
        return -(-self.heads // (BLOCK * self.pair)) * BLOCK * self.pair

    @property
    def blocks(self) -> int:
        """Steps that hold the heads of a group."""
        return self.ratio // self.heads

    @property
    def lanes(self) -> int:
        """Lanes of the values of a step."""
        return self.heads * self.values

    @property
    def saves(self) -> int:
        """Chunks between two saved states."""
        return -(-self.chunk_size // CHUNK)

    @property
    def boundaries(self) -> int:
        """Saved states."""
        return -(-self.length // self.chunk_size)

    def tokens(self, x, valid, width: int) -> jax.Array:
        """[B, T, N, W] -> [B, time, N * width], zero at padding."""
        x = x if valid is None else jnp.where(valid[..., None, None], x, 0)
        pads = ((0, 0), (0, self.time - x.shape[1]), (0, 0), (0, width - x.shape[3]))
        x = jnp.pad(x, pads) if any(map(sum, pads)) else x
        return x.reshape(*x.shape[:2], -1)

    def from_tokens(self, x, heads: int, width: int) -> jax.Array:
        """The inverse of `tokens`."""
        return x.reshape(*x.shape[:2], heads, -1)[:, : self.length, :, :width]

    def states(self, s) -> jax.Array:
        """float32 [..., G, K, R * V] -> [..., G, keys, R * values]."""
        s = s.reshape(*s.shape[:-1], self.ratio, self.value)
        pads = [(0, 0)] * (s.ndim - 3) + [(0, self.keys - self.key), (0, 0), (0, self.values - self.value)]
        s = jnp.pad(s, pads) if any(map(sum, pads)) else s
        return s.reshape(*s.shape[:-2], -1)

    def from_states(self, s) -> jax.Array:
        """The inverse of `states`."""
        s = s.reshape(*s.shape[:-1], self.ratio, self.values)[..., : self.key, :, : self.value]
        return s.reshape(*s.shape[:-2], -1)

    def head_rows(self, log_decay, reset, valid) -> jax.Array:
        """float32 [B or 1, G * blocks, rows, time]: log decays [H], [B, T, H] or None; -inf at a reset."""
        heads = self.groups * self.ratio
        g = jnp.zeros((heads,), jnp.float32) if log_decay is None else log_decay.astype(jnp.float32)
        if g.ndim == 1:
            g = jnp.broadcast_to(g, (1, self.length, heads))
        g = jnp.swapaxes(masked_decay(g, reset, valid), 1, 2)
        g = g.reshape(g.shape[0], -1, self.heads, self.length)
        g = jnp.pad(g, ((0, 0), (0, 0), (0, 0), (0, self.time - self.length)))
        pads = ((0, 0), (0, 0), (0, self.rows - self.heads), (0, 0))
        return jnp.pad(g, pads, constant_values=-jnp.inf)  # a head of padding sees nothing

    def channels(self, log_decay, reset, valid) -> jax.Array:
        """float32 [B, time, G * keys]: log decays [B, T, G, K]; -inf at a reset."""
        pads = ((0, 0), (0, 0), (0, 0), (0, self.keys - self.key))
        return self.tokens(masked_decay(jnp.pad(log_decay.astype(jnp.float32), pads), reset, valid), None, self.keys)

    def from_head_rows(self, g) -> jax.Array:
        """[B, G * blocks, rows, time] -> [B, T, H]."""
        g = g[:, :, : self.heads, : self.length]
        return jnp.swapaxes(g.reshape(g.shape[0], -1, self.length), 1, 2)


def layout(q, v, chunk_size: int, wide: int = 1) -> Layout:
    """The layout of one call."""
    (_, length, groups, key), (heads, value) = q.shape, v.shape[2:]
    return Layout(length, groups, heads // groups, key, value, chunk_size, wide)


def masked_decay(g, reset, valid) -> jax.Array:
    """Log decays [B or 1, T, ...]: 0 at padding, -inf at a reset."""
    tail = (1,) * (g.ndim - 2)
    if valid is not None:
        g = jnp.where(valid.reshape(*valid.shape, *tail), g, 0.0)
    return g if reset is None else jnp.where(reset.reshape(*reset.shape, *tail), -jnp.inf, g)


def compute_dtype(*arrays) -> Any:
    """bfloat16 where all operands are, else float32."""
    return jnp.bfloat16 if all(a.dtype == jnp.bfloat16 for a in arrays) else jnp.float32


def contract(a, b, a_axis: int, b_axis: int) -> jax.Array:
    """float32 product of two matrices over an axis of each; float32 operands keep their precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def refuse(reason: str):
    """Raises UnsupportedError."""
    raise dispatch.UnsupportedError(f"gated_linear_attention: mosaic_tpu does not support {reason}")


def check_support(q, k, v, log_decay, chunk_size: int) -> None:
    """Raises UnsupportedError for what no kernel honours."""
    for name, array in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay)):
        if array is not None and array.dtype == jnp.float16:
            refuse(f"{name} in float16: the TPU has no such type; use bfloat16 or float32")
    if max(q.shape[3], v.shape[3]) > 512:
        refuse(f"widths K={q.shape[3]}, V={v.shape[3]} of q and v: a state fits in VMEM up to 512 x 512")
    length = q.shape[1]
    if chunk_size % CHUNK and chunk_size < length:
        refuse(f"chunk_size={chunk_size} for T={length}: it must be a multiple of {CHUNK}, or T at least")


def widen(x, width: int) -> jax.Array:
    """[n, 128], the same in every lane, as [n, width]."""
    return x if width == LANES else jnp.concatenate([x] * (width // LANES), axis=1)


def decayed(factor, x, resets: bool) -> jax.Array:
    """factor * x; where there are resets, a factor of zero drops even what is not finite."""
    return jnp.where(factor == 0.0, 0.0, factor * x) if resets else factor * x


def cumulate(x, axis: int, *, reverse: bool, span: int = CHUNK, documents=None) -> jax.Array:
    """Inclusive sums along an axis of 128, from the last to the first when reversed, anew in every span.

    And anew in every document, if their numbers along the axis are given, in one register's worth of the other axis.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) & (span - 1)
    for size in (2**n for n in range((span - 1).bit_length())):
        inside, shift = index < span - size if reverse else index >= size, CHUNK - size if reverse else size
        if documents is not None:
            other = pltpu.roll(documents, shift, axis) - documents
            other = jnp.concatenate([other] * (x.shape[1 - axis] // other.shape[1 - axis]), axis=1 - axis)
            inside = inside & (other == 0.0)
        x = x + jnp.where(inside, pltpu.roll(x, shift, axis), 0.0)
    return x


def numbered(g, axis: int) -> jax.Array:
    """The number of each token's document in a chunk along an axis, from log decays that are -inf where one starts."""
    return cumulate(jnp.where(g == -jnp.inf, 1.0, 0.0), axis, reverse=False)


def block_specs(lay: Layout, order: Callable[..., tuple]) -> dict[str, pl.BlockSpec]:
    """Block specs by what they hold; `order` makes (b, group, head block, chunk) of the grid's indices.

    "state_in" and "state_out" are for the grid (b, group, steps over time, head block): a head block's state goes in
    at the first step over time and out at the last; meanwhile the block in memory stays as it is.
    """

    def spec(block, index):
        return pl.BlockSpec(block, lambda *ids: index(*order(*ids)))

    state, last = (None, None, lay.keys, lay.lanes), lay.chunks - 1
    return {
        "keys": spec((None, CHUNK, lay.keys), lambda b, g, h, t: (b, t, g)),
        "values": spec((None, CHUNK, lay.lanes), lambda b, g, h, t: (b, t, g * lay.blocks + h)),
        "rows": spec((None, None, lay.rows, CHUNK), lambda b, g, h, t: (b, g * lay.blocks + h, 0, t)),
        "shared_rows": spec((None, None, lay.rows, CHUNK), lambda b, g, h, t: (0, g * lay.blocks + h, 0, t)),
        "state": spec(state, lambda b, g, h, t: (b, g, 0, h)),
        "boundary": spec((None, *state), lambda b, g, h, t: (b, jax.lax.div(t, lay.saves), g, 0, h)),
        "state_in": pl.BlockSpec(state, lambda b, g, t, h: (b, g, 0, jnp.where(t == 0, h, lay.blocks - 1))),
        "state_out": pl.BlockSpec(state, lambda b, g, t, h: (b, g, 0, jnp.where(t == last, h, 0))),
    }

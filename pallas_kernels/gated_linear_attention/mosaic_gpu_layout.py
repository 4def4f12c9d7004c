"""What the Mosaic GPU kernels of gated linear attention share: the layout of their arrays, and what they serve.

Float32 queries, keys, values and what is made of them enter the kernels, lie in shared memory and leave in two bfloat16
parts (see `wgmma`), 16-bit ones as they are, in one. Sums over time, states to begin and to end with, and gradients
that are summed outside stay float32.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import interpret
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.gated_linear_attention import xla
from pallas_kernels.gated_linear_attention.mosaic_tpu_layout import masked_decay
from pallas_kernels.wgmma import MATRIX, SMEM_BYTES, across, interpreted, multiply_parts, parts, rounded, split

STEP = 64  # tokens of a step, and columns of a state: the rows of a matrix product of one warpgroup
MAX_KEY = 256  # a state of 256 x 64 takes half of a warpgroup's registers
LOWEST = -1024.0  # a log decay whose exponential is 0, and which is finite when multiplied by 0
ALIGNMENT = 1024  # bytes, of an array in shared memory
SLOTS = 2  # steps in shared memory where they fit
DECAYS = 6  # rows of `Layout.decays`
HIGH, MIDDLE, LOW, UNTIL, AFTER, WHOLE = range(DECAYS)


class Layout(NamedTuple):
    """Sizes of a call, and its arrays as the kernels take them: whole steps, 64 columns of values at a time."""

    length: int
    heads: int
    groups: int
    key: int
    value: int
    chunk_size: int
    parts: int  # 16-bit numbers that stand for one of q, k and v

    @property
    def steps(self) -> int:
        """Steps over time."""
        return -(-self.length // STEP)

    @property
    def blocks(self) -> int:
        """Blocks of 64 columns of a value."""
        return self.value // STEP

    @property
    def units(self) -> int:
        """Blocks of 64 columns of all values."""
        return self.heads * self.blocks

    @property
    def saves(self) -> int:
        """Steps between two saved states."""
        return -(-self.chunk_size // STEP)

    @property
    def boundaries(self) -> int:
        """Saved states."""
        return -(-self.length // self.chunk_size)

    @property
    def state(self) -> tuple[int, int, int]:
        """Shape of all states of a row: [G, K, R * V], the heads of a group side by side."""
        return self.groups, self.key, self.heads // self.groups * self.value

    def indices(self) -> tuple[Any, Any, Any, Any, Any]:
        """Of a block of threads: batch, group, head, block of columns of all values, columns of the group's values."""
        b, unit = jax.lax.axis_index("batch"), jax.lax.axis_index("unit")
        head = jax.lax.div(unit, jnp.int32(self.blocks))
        group = jax.lax.div(head, jnp.int32(self.heads // self.groups))
        return b, group, head, unit, pl.ds((unit - group * (self.units // self.groups)) * STEP, STEP)

    def tokens(self, x, valid) -> jax.Array:
        """[B, T, N, W] up to whole steps, zero at padding."""
        # Zero times NaN is NaN: what padding holds must be gone before a product with a zero weight.
        x = x if valid is None else jnp.where(valid[..., None, None], x, 0)
        return self.whole_steps(x)

    def columns(self, x, valid) -> jax.Array:
        """[B, T, H, V] -> [B, time, units, 64], zero at padding."""
        return self.tokens(x, valid).reshape(x.shape[0], self.steps * STEP, self.units, STEP)

    def from_columns(self, x) -> jax.Array:
        """The inverse of `columns`, from numbers in parts."""
        return self.join(x)[:, : self.length].reshape(x.shape[0], self.length, self.heads, self.value)

    def split_states(self, x) -> jax.Array:
        """[..., K, R * V] in parts, those of 64 columns side by side."""
        return split(x.reshape(*x.shape[:-1], -1, STEP)).reshape(*x.shape[:-1], -1)

    def join_states(self, x) -> jax.Array:
        """The inverse of `split_states`."""
        return self.join(x.reshape(*x.shape[:-1], -1, self.parts * STEP)).reshape(*x.shape[:-1], -1)

    def in_parts(self, columns: Any) -> Any:
        """Where columns of a state lie after `split_states`."""
        return pl.ds(columns.start * self.parts, columns.size * self.parts)

    def join(self, x) -> jax.Array:
        """The inverse of `wgmma.split`."""
        if self.parts == 1:
            return x
        high, low = jnp.split(x.astype(jnp.float32), self.parts, axis=-1)
        return high + low

    def decays(self, log_decay, reset, valid) -> jax.Array:
        """float32 [B or 1, H, steps, 6, 64] from log decays [H], [B, T, H] or None.

        Rows: three parts that add up to the log decay; exp of the sums from the step's first token to this one, from
        the next token to the step's last, and over the whole step.
        """
        g = jnp.zeros((self.heads,), jnp.float32) if log_decay is None else log_decay.astype(jnp.float32)
        g = jnp.broadcast_to(g, (1, self.length, self.heads)) if g.ndim == 1 else g
        g = jnp.maximum(self.whole_steps(masked_decay(g, reset, valid)), LOWEST)
        g = jnp.swapaxes(g, 1, 2).reshape(g.shape[0], self.heads, self.steps, STEP)
        high = rounded(g)
        middle = rounded(g - high)
        until = jnp.exp(jnp.cumsum(g, axis=-1))
        behind = jnp.concatenate([g[..., 1:], jnp.zeros_like(g[..., :1])], axis=-1)
        after = jnp.exp(jax.lax.cumsum(behind, axis=behind.ndim - 1, reverse=True))
        whole = jnp.broadcast_to(until[..., -1:], g.shape)
        return jnp.stack([high, middle, g - high - middle, until, after, whole], axis=-2)

    def documents(self, reset, batch: int) -> jax.Array:
        """Number of resets in the step up to each token, float32 [B, steps, 64]."""
        if reset is None:
            return jnp.zeros((batch, self.steps, STEP), jnp.float32)
        return jnp.cumsum(self.whole_steps(reset).reshape(batch, self.steps, STEP), axis=-1, dtype=jnp.float32)

    def outputs(self, batch: int, save: bool) -> list[jax.ShapeDtypeStruct]:
        """What a forward kernel writes: y as of `columns`, in parts, the new state, and, to `save`, boundaries."""
        shapes = [(self.state, jnp.float32)] + [((self.boundaries, *self.state), jnp.float32)] * save
        shapes = [((self.steps * STEP, self.units, self.parts * STEP), jnp.bfloat16), *shapes]
        return [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in shapes]

    def results(self, y, new_state, boundaries=None, *, valid) -> tuple[Any, Any, Any]:
        """What a forward pass returns, from what its kernel wrote."""
        y = self.from_columns(y)
        if valid is not None:  # a state that is not finite must not show at padding
            y = jnp.where(valid[..., None, None], y, 0)
        return y, xla.unflat(new_state, self.heads // self.groups), boundaries

    def whole_steps(self, x) -> jax.Array:
        """[B, T, ...] up to whole steps."""
        extra = self.steps * STEP - x.shape[1]
        return jnp.pad(x, [(0, extra if axis == 1 else 0) for axis in range(x.ndim)]) if extra else x


def layout(q, v, chunk_size: int) -> Layout:
    """The layout of one call."""
    (_, length, groups, key), (heads, value) = q.shape, v.shape[2:]
    return Layout(length, heads, groups, key, value, chunk_size, parts(q.dtype))


def slots(scratch: Callable[[int], Sequence[Any]]) -> int:
    """Steps in shared memory: two where `scratch(2)` fits, else one, 0 where that does not fit either."""

    def size(refs):
        # Arrays start at multiples of 1024 bytes; the last of them is for barriers, of 8 bytes.
        arrays = [math.prod(ref.shape) * ref.dtype.itemsize for ref in refs if not isinstance(ref, plgpu.Barrier)]
        return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in arrays) + ALIGNMENT

    return next((count for count in (SLOTS, 1) if size(scratch(count)) <= SMEM_BYTES), 0)


def refuse(reason: str):
    """Raises UnsupportedError."""
    raise UnsupportedError(f"gated_linear_attention: mosaic_gpu does not serve {reason}")


def check_support(q, k, v, chunk_size: int, scratch: Callable[[Layout, int], Sequence[Any]]) -> None:
    """Raises UnsupportedError for what no kernel serves, and where `scratch` of one step exceeds shared memory."""
    length, key, value = q.shape[1], q.shape[3], v.shape[3]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype == jnp.float16:
            refuse(f"{name} of dtype float16: a state may exceed its range; use bfloat16 or float32, or 'xla'")
        if x.dtype != q.dtype:
            refuse(f"{name} of dtype {x.dtype} with q of dtype {q.dtype}: cast them to one, or use 'xla'")
    if key % STEP or value % STEP or not 0 < key <= MAX_KEY or not value:
        refuse(
            f"widths K={key}, V={value} of q, k and v: its tiles take multiples of {STEP}, "
            f"and keys up to {MAX_KEY}; use 'xla'"
        )
    if chunk_size % STEP and chunk_size < length:
        refuse(f"chunk_size={chunk_size} for T={length}: it must be a multiple of {STEP}, or T at least")
    lay = layout(q, v, chunk_size)
    fits = [width for width in range(STEP, key + 1, STEP) if slots(functools.partial(scratch, lay._replace(key=width)))]
    if key not in fits:
        refuse(
            f"K={key} of q and k in {q.dtype}: its buffers exceed the {SMEM_BYTES // 1024} KiB of shared memory, "
            f"where K={max(fits)} fits; use bfloat16, or 'xla'"
        )


def kernel(name: str, body: Callable[..., None], out_type: Any, scratch: Any, grid: Mapping[str, int]):
    """`body` as a kernel of one warpgroup for every place of the grid."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=f"gated_linear_attention_{name}",
        interpret=interpret.parameters(),
    )


def multiply_transposed(a: Sequence[Any], b: Sequence[Any], onto: jax.Array | None = None) -> jax.Array:
    """float32 onto + a^T @ b for matrices in parts, a in shared memory; onto None = 0."""
    transposed = [ref[...].T if interpreted() else plgpu.transpose_ref(ref, (1, 0)) for ref in a]
    return multiply_parts(transposed, b, onto)


def load_state(ref: Any) -> jax.Array:
    """float32 [rows, 64] of global memory, as the accumulator of a product."""
    return ref[...] if interpreted() else plgpu.load(ref, (), layout=MATRIX, optimized=False)


def decayed(factor: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """x times a factor for each place along `axis`; a factor of zero drops even what is not finite."""
    factor = across(factor, x.shape, axis)
    return jnp.where(factor == 0.0, 0.0, factor * x)


def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 einsum outside of kernels, of float32 arrays in parts too."""
    a_parts, b_parts = (jnp.split(split(x), parts(x.dtype), axis=-1) for x in (a, b))
    terms = [
        jnp.einsum(equation, part, other, preferred_element_type=jnp.float32)
        for i, part in enumerate(a_parts)
        for other in b_parts[: len(b_parts) - i]
    ]
    return functools.reduce(jnp.add, reversed(terms))


def states_before(lay: Layout, k, v, whole, boundaries) -> jax.Array:
    """The states before every step, in the dtype of k, [B, steps, G, K, R * V].

    Args:
      k, v: [B, time, G, K] and [B, time, units, 64], of which one is decayed to the end of its step.
      whole: decay over a step, [B or 1, steps, G, K or 1, R * V or 1].
      boundaries: float32 [B, N, G, K, R * V].
    """
    saves, states = lay.saves, [boundaries]

    def fold(x):
        """[B, steps, ...] -> [B, N, saves, ...]."""
        x = jnp.pad(x, [(0, lay.boundaries * saves - lay.steps if axis == 1 else 0) for axis in range(x.ndim)])
        return x.reshape(x.shape[0], lay.boundaries, saves, *x.shape[2:])

    k, v = (fold(x.reshape(x.shape[0], lay.steps, STEP, lay.groups, -1)) for x in (k, v))
    whole = fold(whole)
    for step in range(saves - 1):
        added = product("bntgk,bntgv->bngkv", k[:, :, step], v[:, :, step])
        factor = whole[:, :, step]
        states.append(added + jnp.where(factor == 0.0, 0.0, factor * states[-1]))
    states = jnp.stack(states, axis=2).astype(k.dtype)
    return states.reshape(k.shape[0], -1, *lay.state)[:, : lay.steps]


def where_it_moves(grad, reset, valid) -> jax.Array:
    """A gradient of log decays [B, T, ...], zero where they have no effect: at resets and padding."""
    for mask in (None if reset is None else ~reset, valid):
        if mask is not None:
            grad = jnp.where(mask.reshape(*mask.shape, *(1,) * (grad.ndim - 2)), grad, 0.0)
    return grad

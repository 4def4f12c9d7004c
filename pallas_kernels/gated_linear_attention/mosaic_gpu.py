"""Gated linear attention as Mosaic GPU kernels for Hopper: the forward pass, and what it shares with the backward pass.

Never run on a GPU: interpreted, lowered and compiled only.

A warpgroup walks over steps of 64 tokens with the float32 state of 64 columns of a head's values in its registers; the
next step's queries, keys, values and decays come by asynchronous copies meanwhile. Every (head, 64 columns) is a block
of threads of its own, so that the blocks share nothing.

Token i of a step sees token j through exp(g_{j+1} + ... + g_i), g the log decays. These sums are a matrix product too:
of the log decays up to i with ones behind j. The log decays are split in three numbers of 8 bits of mantissa, whose
products with ones are exact, so nothing cancels and nothing overflows. A reset is a log decay of `LOWEST`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import interpret
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.gated_linear_attention import xla
from pallas_kernels.gated_linear_attention.mosaic_tpu_layout import masked_decay
from pallas_kernels.warpgroup import walk
from pallas_kernels.wgmma import COLUMNS, MATRIX, ROWS, across, full, indices, interpreted, load, matrix_ref, multiply

STEP = 64  # tokens of a step, and columns of a state: the rows of a matrix product of one warpgroup
MAX_KEY = 256  # a state of 256 x 64 takes half of a warpgroup's registers
LOWEST = -1024.0  # a log decay whose exponential is 0, and which is finite when multiplied by 0
SLOTS = 2  # steps in shared memory
HIGH, MIDDLE, LOW, UNTIL, AFTER, WHOLE = range(6)  # rows of `Layout.decays`


class Layout(NamedTuple):
    """Sizes of a call, and its arrays as the kernels take them: whole steps, 64 columns of values at a time."""

    length: int
    heads: int
    groups: int
    key: int
    value: int
    chunk_size: int

    @property
    def steps(self) -> int:
        """Steps over time."""
        return -(-self.length // STEP)

    @property
    def parts(self) -> int:
        """Blocks of 64 columns of a value."""
        return self.value // STEP

    @property
    def units(self) -> int:
        """Blocks of 64 columns of all values."""
        return self.heads * self.parts

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
        head = jax.lax.div(unit, jnp.int32(self.parts))
        group = jax.lax.div(head, jnp.int32(self.heads // self.groups))
        return b, group, head, unit, pl.ds((unit - group * (self.units // self.groups)) * STEP, STEP)

    def tokens(self, x, valid) -> jax.Array:
        """[B, T, N, W] up to whole steps, zero at padding."""
        # Zero times NaN is NaN: what padding holds must be gone before a product with a zero weight.
        x = x if valid is None else jnp.where(valid[..., None, None], x, 0)
        return self._whole_steps(x)

    def columns(self, x, valid) -> jax.Array:
        """[B, T, H, V] -> [B, time, units, 64], zero at padding."""
        return self.tokens(x, valid).reshape(x.shape[0], self.steps * STEP, self.units, STEP)

    def from_columns(self, x) -> jax.Array:
        """The inverse of `columns`."""
        return x[:, : self.length].reshape(x.shape[0], self.length, self.heads, self.value)

    def decays(self, log_decay, reset, valid) -> jax.Array:
        """float32 [B or 1, H, steps, 6, 64] from log decays [H], [B, T, H] or None.

        Rows: three parts that add up to the log decay; exp of the sums from the step's first token to this one, from
        the next token to the step's last, and over the whole step.
        """
        g = jnp.zeros((self.heads,), jnp.float32) if log_decay is None else log_decay.astype(jnp.float32)
        g = jnp.broadcast_to(g, (1, self.length, self.heads)) if g.ndim == 1 else g
        g = jnp.maximum(self._whole_steps(masked_decay(g, reset, valid)), LOWEST)
        g = jnp.swapaxes(g, 1, 2).reshape(g.shape[0], self.heads, self.steps, STEP)
        # A cast there and back would be optimised away.
        high = jax.lax.reduce_precision(g, exponent_bits=8, mantissa_bits=7)
        middle = jax.lax.reduce_precision(g - high, exponent_bits=8, mantissa_bits=7)
        until = jnp.exp(jnp.cumsum(g, axis=-1))
        behind = jnp.concatenate([g[..., 1:], jnp.zeros_like(g[..., :1])], axis=-1)
        after = jnp.exp(jax.lax.cumsum(behind, axis=behind.ndim - 1, reverse=True))
        whole = jnp.broadcast_to(until[..., -1:], g.shape)
        return jnp.stack([high, middle, g - high - middle, until, after, whole], axis=-2)

    def _whole_steps(self, x) -> jax.Array:
        extra = self.steps * STEP - x.shape[1]
        return jnp.pad(x, [(0, extra if axis == 1 else 0) for axis in range(x.ndim)]) if extra else x


def layout(q, v, chunk_size: int) -> Layout:
    """The layout of one call."""
    (_, length, groups, key), (heads, value) = q.shape, v.shape[2:]
    return Layout(length, heads, groups, key, value, chunk_size)


def refuse(reason: str):
    """Raises UnsupportedError."""
    raise UnsupportedError(f"gated_linear_attention: mosaic_gpu does not serve {reason}")


def check_support(q, k, v, log_decay, chunk_size: int) -> None:
    """Raises UnsupportedError for what no kernel serves."""
    length, key, value = q.shape[1], q.shape[3], v.shape[3]
    if log_decay is not None and log_decay.ndim == 4:
        refuse("log_decay per channel of the key: its kernels decay scores, not keys; use one per head, or 'xla'")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            reason = "a state may exceed its range" if x.dtype == jnp.float16 else "the matrix units would round it"
            refuse(f"{name} of dtype {x.dtype}: {reason}; use bfloat16, or 'xla'")
    if key % STEP or value % STEP or not 0 < key <= MAX_KEY or not value:
        refuse(
            f"widths K={key}, V={value} of q, k and v: its tiles take multiples of {STEP}, "
            f"and keys up to {MAX_KEY}; use 'xla'"
        )
    if chunk_size % STEP and chunk_size < length:
        refuse(f"chunk_size={chunk_size} for T={length}: it must be a multiple of {STEP}, or T at least")


def supports(q, k, v, log_decay, state, reset, valid, *, scale: float, chunk_size: int, save: bool) -> None:
    """Raises UnsupportedError where `forward` does not serve an argument."""
    check_support(q, k, v, log_decay, chunk_size)


def kernel(name: str, body: Callable[..., None], out_type: Any, scratch: Any, lay: Layout, batch: int):
    """`body` as a kernel of one warpgroup for every block of columns."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(lay.units, batch),
        grid_names=("unit", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=f"gated_linear_attention_{name}",
        interpret=interpret.parameters(),
    )


def multiply_transposed(a: Any, b: Any, onto: jax.Array | None = None) -> jax.Array:
    """float32 onto + a^T @ b for references to shared memory; onto None = 0."""
    return multiply(a[...].T if interpreted() else plgpu.transpose_ref(a, (1, 0)), b, onto)


def load_state(ref: Any) -> jax.Array:
    """float32 [rows, 64] of global memory, as the accumulator of a product."""
    return ref[...] if interpreted() else plgpu.load(ref, (), layout=MATRIX, optimized=False)


def decayed(factor: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """x times a factor for each place along `axis`; a factor of zero drops even what is not finite."""
    factor = across(factor, x.shape, axis)
    return jnp.where(factor == 0.0, 0.0, factor * x)


def fill_ones(ref: Any) -> None:
    """Writes ones where the row is after the column, [64, 64], zeros elsewhere."""
    after = indices(ref.shape, 0) > indices(ref.shape, 1)
    ref[...] = jnp.where(after, full(ref.shape, 1.0, MATRIX), 0.0).astype(ref.dtype)


def weights(decays: Any, ones: Any) -> jax.Array:
    """[64, 64]: the decay from token j to token i, 0 unless j <= i; `ones` as of `fill_ones`."""
    shape = (STEP, STEP)
    seen = indices(shape, 1) <= indices(shape, 0)
    exponent = None
    for row in (HIGH, MIDDLE, LOW):
        part = across(load(decays.at[row], COLUMNS), shape, 1)
        exponent = multiply(jnp.where(seen, part, 0.0).astype(ones.dtype), ones, exponent)
    return jnp.where(seen, jnp.exp(exponent), 0.0)


def _forward_kernel(lay: Layout, scale: float, carried: bool, save: bool, shared: bool, *refs):
    *refs, q_smem, k_smem, v_smem, decays_smem, s_smem, ones, barrier = refs
    q_ref, k_ref, v_ref, decays_ref, *refs = refs
    state_ref = refs.pop(0) if carried else None
    y_ref, new_state_ref, *boundary_ref = refs
    b, g, h, unit, columns = lay.indices()

    def fetch(step, slot):
        rows = pl.ds(step * STEP, STEP)
        arrived = barrier.at[slot]
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, g], q_smem.at[slot], arrived)
        plgpu.copy_gmem_to_smem(k_ref.at[b, rows, g], k_smem.at[slot], arrived)
        plgpu.copy_gmem_to_smem(v_ref.at[b, rows, unit], v_smem.at[slot], arrived)
        plgpu.copy_gmem_to_smem(decays_ref.at[0 if shared else b, h, step], decays_smem.at[slot], arrived)

    def body(step, slot, s):
        if save:

            @pl.when(jax.lax.rem(step, jnp.int32(lay.saves)) == 0)
            def _():
                boundary_ref[0].at[b, jax.lax.div(step, jnp.int32(lay.saves)), g, :, columns][...] = s

        q, k, v, decays = (ref.at[slot] for ref in (q_smem, k_smem, v_smem, decays_smem))
        s_smem[...] = s.astype(s_smem.dtype)
        plgpu.commit_smem()
        scores = multiply(q, k, transpose=True) * weights(decays, ones)
        y = decayed(load(decays.at[UNTIL], ROWS), multiply(q, s_smem), 0)
        y = multiply(scores.astype(v.dtype), v, y) * scale
        # What enters the state, and then what leaves the step, take the place of the values.
        added = load(v, MATRIX).astype(jnp.float32) * across(load(decays.at[AFTER], ROWS), y.shape, 0)
        v[...] = added.astype(v.dtype)
        plgpu.commit_smem()
        s = multiply_transposed(k, v, decayed(load(decays.at[WHOLE], COLUMNS), s, 1))
        v[...] = y.astype(v.dtype)
        return s

    def store(step, slot):
        plgpu.copy_smem_to_gmem(v_smem.at[slot], y_ref.at[b, pl.ds(step * STEP, STEP), unit], commit_group=False)

    fill_ones(ones)
    start = full((lay.key, STEP), 0.0, MATRIX) if state_ref is None else load_state(state_ref.at[b, g, :, columns])
    s = walk(lay.steps, SLOTS, barrier, fetch, body, store, start, in_place=True)
    new_state_ref.at[b, g, :, columns][...] = s


def forward(q, k, v, log_decay, state, reset, valid, *, scale: float, chunk_size: int, save: bool):
    """Returns (y, new_state, boundaries) as `xla.forward` does."""
    if q.shape[1] == 1:  # one token is bound by the state's traffic: XLA fuses it into one pass
        return xla.forward(q, k, v, log_decay, state, reset, valid, scale=scale, chunk_size=chunk_size, save=save)
    lay, batch = layout(q, v, chunk_size), q.shape[0]
    decays = lay.decays(log_decay, reset, valid)
    arrays = [lay.tokens(q, valid), lay.tokens(k, valid), lay.columns(v, valid), decays]
    if state is not None:
        arrays.append(xla.flat(state, lay.groups))
    out_type = [
        jax.ShapeDtypeStruct(arrays[2].shape, v.dtype),
        jax.ShapeDtypeStruct((batch, *lay.state), jnp.float32),
    ]
    if save:
        out_type.append(jax.ShapeDtypeStruct((batch, lay.boundaries, *lay.state), jnp.float32))
    scratch = [
        matrix_ref((SLOTS, STEP, lay.key), q.dtype),
        matrix_ref((SLOTS, STEP, lay.key), k.dtype),
        matrix_ref((SLOTS, STEP, STEP), v.dtype),
        plgpu.SMEM((SLOTS, *decays.shape[3:]), jnp.float32),
        matrix_ref((lay.key, STEP), q.dtype),
        matrix_ref((STEP, STEP), jnp.bfloat16),
        plgpu.Barrier(num_arrivals=4, num_barriers=SLOTS),
    ]
    body = functools.partial(_forward_kernel, lay, scale, state is not None, save, decays.shape[0] == 1)
    y, new_state, *saved = kernel("forward", body, out_type, scratch, lay, batch)(*arrays)
    y = lay.from_columns(y)
    if valid is not None:  # a state that is not finite must not show at padding
        y = jnp.where(valid[..., None, None], y, 0)
    return y, xla.unflat(new_state, lay.heads // lay.groups), saved[0] if save else None

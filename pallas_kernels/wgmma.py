"""What the Mosaic GPU kernels share: matrix products of a warpgroup, and blocks that stream into shared memory.

Interpretation knows neither register layouts nor a left factor in registers nor a transposed right factor. There a
product reads its operands as values and multiplies them; all else (copies, barriers, loops, arithmetic) is the same.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import interpret

SMEM_BYTES = 227 * 1024  # what a block of threads may use on Hopper
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a product
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
MATRIX = plgpu.Layout.WGMMA


def interpreted() -> bool:
    """Whether the kernel that is being traced is for interpretation."""
    return interpret.parameters() is not False


def lay_out(x: jax.Array, layout: Any) -> jax.Array:
    """`x` in registers as `layout` says."""
    return x if interpreted() else plgpu.layout_cast(x, layout)


def load(ref: Any, layout: Any) -> jax.Array:
    """All of `ref`, in registers as `layout` says."""
    return ref[...] if interpreted() else plgpu.load(ref, (), layout=layout)


def full(shape: Sequence[int], value: float, layout: Any) -> jax.Array:
    """float32 array of one value."""
    return lay_out(jnp.full(shape, value, jnp.float32), layout)


def across(x: jax.Array, shape: Sequence[int], axis: int) -> jax.Array:
    """A vector along `axis` of a matrix of that shape, repeated along the other."""
    return jax.lax.broadcast_in_dim(x, shape, (axis,))


def indices(shape: Sequence[int], axis: int) -> jax.Array:
    """int32 matrix of its own indices along `axis`."""
    return lay_out(jax.lax.broadcasted_iota(jnp.int32, shape, axis), MATRIX)


def matrix_ref(shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory for [..., rows, columns] as `multiply` and `load` need it; columns in multiples of 128 bytes."""
    swizzle = (plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(tuple(shape), dtype, transforms=() if interpreted() else swizzle)


def multiply(a: Any, b: Any, onto: jax.Array | None = None, *, transpose: bool = False) -> jax.Array:
    """float32[m, n] = onto + a @ b.

    Args:
      a: [m, k], reference to shared memory or, 16-bit, an array in registers.
      b: reference to shared memory, [k, n], or [n, k] with `transpose`.
      onto: float32[m, n]; None = 0.
      transpose: whether to multiply with the transpose of b.
    """
    if interpreted():
        a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        dims = (((1,), (1 if transpose else 0,)), ((), ()))
        result = jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
        return result if onto is None else onto + result
    if transpose:
        b = plgpu.transpose_ref(b, (1, 0))
    if onto is not None:
        total: Any = plgpu.WGMMAAccumulatorRef.init(onto)
        return pl.run_state(lambda total: plgpu.wgmma(total, a, b))(total)

    def product(total: Any) -> Any:
        plgpu.wgmma(total, a, b)
        return total[...]

    total = plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32)
    return pl.run_scoped(product, total)


class Stream(NamedTuple):
    """Slots of shared memory that one warpgroup fills step by step and the others empty in the same order."""

    full: Any  # barriers, one per slot: the copies of a step have arrived
    free: Any  # barriers, one per slot: every consumer is done with it
    slots: int

    def produce(self, steps: Any, copy: Callable[[Any, Any, Any], None]) -> None:
        """Calls `copy(step, slot, barrier)`, which starts the copies of a step, as slots become free."""

        def fill(step, _):
            slot = jax.lax.rem(step, self.slots)

            @pl.when(step >= self.slots)
            def _():
                plgpu.barrier_wait(self.free.at[slot])

            copy(step, slot, self.full.at[slot])

        def drain(step, _):
            plgpu.barrier_wait(self.free.at[jax.lax.rem(step, self.slots)])

        jax.lax.fori_loop(0, steps, fill, None)
        jax.lax.fori_loop(jnp.maximum(steps - self.slots, 0), steps, drain, None)

    def take(self, step: Any) -> Any:
        """Waits for a step; returns its slot."""
        slot = jax.lax.rem(step, self.slots)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, slot: Any) -> None:
        """Gives a slot back to the producer."""
        plgpu.barrier_arrive(self.free.at[slot])

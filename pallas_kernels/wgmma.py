"""What the Mosaic GPU kernels share: matrix products of a warpgroup, and blocks that stream into shared memory.

Interpretation knows neither register layouts nor a left factor in registers nor a transposed right factor. There a
product reads its operands as values and multiplies them; all else (copies, barriers, loops, arithmetic) is the same.

The matrix units take 16-bit numbers. A float32 number enters them in two parts, the bfloat16 nearest to it and the
bfloat16 nearest to what remains, side by side along the last axis of shared memory: [rows, 2 * width]. A product of two
such matrices is three products of parts, without that of the two remainders. It keeps 16 bits of mantissa, where TF32,
which XLA takes for float32 by default, keeps 11.
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


def parts(dtype: Any) -> int:
    """How many 16-bit numbers stand for one of `dtype` in a product."""
    return 2 if jnp.dtype(dtype) == jnp.float32 else 1


def rounded(x: jax.Array) -> jax.Array:
    """float32 x with the mantissa of bfloat16."""
    # A cast there and back would be optimised away.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def split(x: jax.Array) -> jax.Array:
    """[..., width] -> [..., parts * width], as kernels take it; 16-bit numbers stay as they are."""
    if parts(x.dtype) == 1:
        return x
    high = rounded(x)
    return jnp.concatenate([high, x - high], axis=-1).astype(jnp.bfloat16)


def split_ref(ref: Any, count: int) -> tuple[Any, ...]:
    """References to the parts of shared memory [rows, count * width]."""
    width = ref.shape[1] // count
    return tuple(ref.at[:, i * width : (i + 1) * width] for i in range(count)) if count > 1 else (ref,)


def split_array(x: jax.Array, count: int, dtype: Any) -> tuple[jax.Array, ...]:
    """The parts, of `dtype`, of a float32 array in registers."""
    if count == 1:
        return (x.astype(dtype),)
    high = rounded(x) if interpreted() else x.astype(dtype).astype(jnp.float32)
    return high.astype(dtype), (x - high).astype(dtype)


def store(refs: Sequence[Any], x: jax.Array) -> None:
    """Writes the parts of a float32 array to shared memory."""
    for ref, part in zip(refs, split_array(x, len(refs), refs[0].dtype), strict=True):
        ref[...] = part


def join(refs: Sequence[Any], layout: Any) -> jax.Array:
    """The float32 array whose parts lie in shared memory."""
    return sum((load(ref, layout).astype(jnp.float32) for ref in refs[1:]), load(refs[0], layout).astype(jnp.float32))


def multiply_parts(
    a: Sequence[Any], b: Sequence[Any], onto: jax.Array | None = None, *, transpose: bool = False
) -> jax.Array:
    """`multiply` of matrices in parts, the smallest terms first."""
    pairs: list[tuple[Any, Any]] = [(a[i], b[j]) for i in reversed(range(len(a))) for j in reversed(range(len(b) - i))]
    if interpreted():
        for x, y in pairs:
            onto = _multiply_values(x, y, onto, transpose)
        assert onto is not None
        return onto
    if transpose:
        pairs = [(x, plgpu.transpose_ref(y, (1, 0))) for x, y in pairs]

    def product(total: Any) -> None:
        for x, y in pairs:
            plgpu.wgmma(total, x, y)

    if onto is not None:
        total: Any = plgpu.WGMMAAccumulatorRef.init(onto)
        return pl.run_state(product)(total)

    def scoped(total: Any) -> Any:
        product(total)
        return total[...]

    rows, columns = pairs[0][0].shape[0], pairs[0][1].shape[1]
    return pl.run_scoped(scoped, plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32))


def _multiply_values(a: Any, b: Any, onto: jax.Array | None, transpose: bool) -> jax.Array:
    """`multiply` as XLA's product of values."""
    a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    result = jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
    return result if onto is None else onto + result


def multiply(a: Any, b: Any, onto: jax.Array | None = None, *, transpose: bool = False) -> jax.Array:
    """float32[m, n] = onto + a @ b.

    Args:
      a: [m, k], reference to shared memory or, 16-bit, an array in registers.
      b: reference to shared memory, [k, n], or [n, k] with `transpose`.
      onto: float32[m, n]; None = 0.
      transpose: whether to multiply with the transpose of b.
    """
    return multiply_parts((a,), (b,), onto, transpose=transpose)


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
        # The compiler would keep the addresses of all tiles of a slot that it knows in registers, and spill others.
        slot = jax.lax.rem(step, self.slots) if self.slots > 1 else jax.lax.shift_right_logical(step, jnp.int32(30))
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, slot: Any) -> None:
        """Gives a slot back to the producer."""
        plgpu.barrier_arrive(self.free.at[slot])

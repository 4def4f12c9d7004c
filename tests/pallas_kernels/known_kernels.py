"""Pallas TPU kernels whose trips and traffic are known: each function returns (function, abstract arguments)."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask


def matmul(size, tile):
    """[size, size] @ [size, size] in tiles, accumulated over the last grid axis."""

    def kernel(a, b, out, total):
        @pl.when(pl.program_id(2) == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        total[...] += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            out[...] = total[...].astype(out.dtype)

    def specs(index):
        return pl.BlockSpec((tile, tile), index)

    matrix = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    function = pl.pallas_call(
        kernel,
        grid=(size // tile,) * 3,
        in_specs=[specs(lambda i, j, k: (i, k)), specs(lambda i, j, k: (k, j))],
        out_specs=specs(lambda i, j, k: (i, j)),
        out_shape=matrix,
        scratch_shapes=[pltpu.VMEM((tile, tile), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3),
    )
    return function, (matrix, matrix)


def _rows(kernel, grid, rows, prefetch=0):
    """A kernel over blocks of [rows, 128] of one array."""
    array = jax.ShapeDtypeStruct((grid * rows, 128), jnp.float32)
    spec = pl.BlockSpec((rows, 128), lambda i, *_: (i, 0))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=prefetch, grid=(grid,), in_specs=[spec], out_specs=spec
    )
    parameters = pltpu.CompilerParams(dimension_semantics=("arbitrary",))
    return pl.pallas_call(kernel, grid_spec=grid_spec, out_shape=array, compiler_params=parameters), array


def loop(grid, trips):
    def kernel(x, out):
        out[...] = jax.lax.fori_loop(0, trips, lambda i, c: jnp.exp(c) * 0.5 + x[...], x[...])

    function, array = _rows(kernel, grid, 8)
    return function, (array,)


def nested(grid, outer, inner):
    def kernel(x, out):
        def body(i, c):
            return jax.lax.fori_loop(0, inner, lambda j, c: jnp.tanh(c) + x[pl.ds(j * 8, 8), :], c) * 0.5

        value = jax.lax.fori_loop(0, outer, body, x[pl.ds(0, 8), :])
        out[...] = jnp.broadcast_to(value[:1], out.shape)

    function, array = _rows(kernel, grid, 8 * inner)
    return function, (array,)


def triangular(grid, outer):
    """The inner loop runs once more in each round of the outer one."""

    def kernel(x, out):
        def inner(j, c):
            rows = pl.ds(j * 8, 8)
            out[rows, :] = jnp.tanh(x[rows, :])
            return c

        jax.lax.fori_loop(0, outer, lambda i, c: jax.lax.fori_loop(0, i + 1, inner, c), 0)

    function, array = _rows(kernel, grid, 8 * outer)
    return function, (array,)


def divided(grid, divisor):
    """Step i of the grid runs the loop i % divisor + 2 (i // divisor) times."""

    def kernel(x, out):
        trips = jax.lax.rem(pl.program_id(0), divisor) + 2 * jax.lax.div(pl.program_id(0), divisor)
        out[...] = jax.lax.fori_loop(0, trips, lambda i, c: jnp.exp(c) * 0.5 + x[...], x[...])

    function, array = _rows(kernel, grid, 8)
    return function, (array,)


def dynamic(grid):
    """The number of trips is an argument."""

    def kernel(trips, x, out):
        out[...] = jax.lax.fori_loop(0, trips[0], lambda i, c: jnp.exp(c) * 0.5 + x[...], x[...])

    function, array = _rows(kernel, grid, 8, prefetch=1)
    return function, (jax.ShapeDtypeStruct((1,), jnp.int32), array)


def copies(grid, steps):
    """Copies by hand, `steps` blocks of [64, 128] float32 per grid step."""

    def kernel(x, out, buffer, semaphore):
        out[...] = jnp.zeros_like(out)

        def body(j, c):
            copy = pltpu.make_async_copy(x.at[pl.ds(j * 64, 64)], buffer, semaphore)
            copy.start()
            copy.wait()
            out[...] += buffer[...]
            return c

        jax.lax.fori_loop(0, steps, body, 0)

    function = pl.pallas_call(
        kernel,
        grid=(grid,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec((64, 128), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((grid * 64, 128), jnp.float32),
        scratch_shapes=[pltpu.VMEM((64, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    )
    return function, (jax.ShapeDtypeStruct((steps * 64, 128), jnp.float32),)


def too_large():
    """Asks for far more vector memory than there is."""
    array = jax.ShapeDtypeStruct((8, 128), jnp.float32)

    def kernel(x, out, buffer):
        buffer[pl.ds(0, 8), pl.ds(0, 128)] = x[...]
        out[...] = buffer[pl.ds(0, 8), pl.ds(0, 128)] + 1.0

    scratch = [pltpu.VMEM((16384, 8192), jnp.float32)]
    return pl.pallas_call(kernel, out_shape=array, scratch_shapes=scratch), (array,)


def splash(time, heads, width, window, backward=False, **sizes):
    """JAX's own attention kernel, forward or the gradient (forward, dq and dkv); `window` None is causal."""
    shape = (time, time)
    mask = splash_attention_mask.CausalMask(shape)
    if window is not None:
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
    )
    array = jax.ShapeDtypeStruct((heads, time, width), jnp.bfloat16)
    if not backward:
        return (lambda q, k, v: kernel(q, k, v)), (array,) * 3
    return (lambda q, k, v, dy: jax.vjp(lambda *a: kernel(*a), q, k, v)[1](dy)), (array,) * 4

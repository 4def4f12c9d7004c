"""Causal depthwise convolution as Pallas TPU kernels: one pass over memory forward, one backward.

The grid runs over batch and blocks of channels in parallel and over blocks of time in order. A tap is a rotation of a
tile of eight tokens along the sublanes, joined with the rotated tile before it. The backward pass walks back in time:
it recomputes the sums from x, whose last tokens before the block come as a block of their own, adds the gradients of
the filters up in VMEM and hands what the taps pass to earlier tokens from tile to tile.

Both passes are bound by memory: forward moves 2 and backward 3 arrays of the size of x. The kernels know nothing of
the carried state. It touches the W - 1 tokens at either edge of a row alone, wherever padding puts that edge, and XLA
computes those from windows of W - 1 tokens: their y and its gradients at the front, the new state at the back.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, interpret, tiles
from pallas_kernels.causal_conv1d import xla
from pallas_kernels.tiles import STEP, TILE

MAX_ROWS, MAX_BLOCK = 512, 512  # tokens and channels; wider blocks run out of registers
MAX_WIDTH = 4  # the flags of a tile fill one int32: the token itself and three earlier ones
DTYPES = ("float32", "bfloat16")


def _supports(x, weight, bias) -> None:
    for name, array in (("x", x), ("weight", weight), ("bias", bias)):
        if array is not None and jnp.dtype(array.dtype).name not in DTYPES:
            raise dispatch.UnsupportedError(
                f"causal_conv1d: mosaic_tpu does not compute in {array.dtype}: {name} must be one of {DTYPES}"
            )
    if not 2 <= weight.shape[0] <= MAX_WIDTH:
        raise dispatch.UnsupportedError(
            f"causal_conv1d: mosaic_tpu does not slide {weight.shape[0]} taps: weight must have 2 to {MAX_WIDTH}"
        )


def supports_forward(x, weight, bias, state, reset, valid, *, activation: str | None) -> None:
    """Raises UnsupportedError where `forward` does not honour an argument."""
    _supports(x, weight, bias)


def supports_backward(x, weight, bias, state, reset, valid, dy, dstate, *, activation: str | None) -> None:
    """Raises UnsupportedError where `backward` does not honour an argument."""
    _supports(x, weight, bias)


def _edges(valid, length: int, width: int):
    """Where the windows of W - 1 tokens at the front and at the back of each row begin, int32[B] or ints."""
    last_start = length - (width - 1)
    if valid is None:
        return 0, last_start
    first, last = xla._first_and_last(valid)
    return jnp.minimum(first, last_start), jnp.clip(last - (width - 2), 0, last_start)


def _window(array, start, size: int) -> Any:
    """array [B, T, ...] -> [B, size, ...] from `start` on; None stays None."""
    if array is None:
        return None
    if isinstance(start, int):
        return lax.slice_in_dim(array, start, start + size, axis=1)
    if array.ndim == 2:
        return jnp.take_along_axis(array, start[:, None] + jnp.arange(size), axis=1)
    # Row by row: as a gather, XLA first copies the whole array into another layout.
    return lax.map(
        lambda row: lax.dynamic_slice_in_dim(array[row[0]], row[1], size), (jnp.arange(start.shape[0]), start)
    )


def _replace(array, window, start):
    """array [B, T, D] with `window` put in at `start`."""
    window = window.astype(array.dtype)
    if isinstance(start, int):
        return lax.dynamic_update_slice_in_dim(array, window, start, axis=1)

    def put(row, array):
        return lax.dynamic_update_slice(array, lax.dynamic_slice_in_dim(window, row, 1), (row, start[row], 0))

    return lax.fori_loop(0, array.shape[0], put, array)


def _codes(reset, valid, front, batch: int, length: int, rows: int, width: int):
    """int32 [B, blocks, 1, 2 rows / 8], two words per tile; None when a block has nothing to mask.

    First word: flag 0 for tokens that count, flag j for those that see the token j before them. Second word: flag 0
    for tokens whose y is the kernel's: those of the window at `front` are left to XLA unless it is None.
    """
    if reset is None and valid is None and front is None and length % rows == 0:
        return None
    live = jnp.ones((batch, length), bool) if valid is None else valid
    seen, flags = live, [live]
    for j in range(1, width):
        before = jnp.pad(live, ((0, 0), (j, 0)))[:, :length]
        if reset is not None:
            seen = seen & ~jnp.pad(reset, ((0, 0), (j - 1, 0)))[:, :length]
        flags.append(seen & before)
    own = live
    if front is not None:
        offset = jnp.arange(length) - jnp.reshape(front, (-1, 1))
        own = live & ((offset < 0) | (offset >= width - 1))
    words = jnp.stack([tiles.pack(flags, length, rows), tiles.pack([own], length, rows)], axis=-1)
    return words.reshape(*words.shape[:2], 1, -1)


class _Masks:
    """The masks of one tile; without codes every token sees all earlier ones."""

    def __init__(self, codes, step, index: int, width: int):
        self.row = tiles.rows_of(width)
        position = 2 * (step * (STEP // TILE) + index)
        self.codes = None if codes is None else (codes[0, position], codes[0, position + 1])

    def live(self, value):
        return value if self.codes is None else jnp.where(tiles.mask(self.codes[0], self.row), value, 0.0)

    def own(self, value):
        return value if self.codes is None else jnp.where(tiles.mask(self.codes[1], self.row), value, 0.0)

    def sees(self, value, j: int):
        """Zeros at tokens that do not see the one j before them."""
        return value if self.codes is None else jnp.where(tiles.mask(self.codes[0], self.row, j), value, 0.0)


def _rotations(tile, width: int):
    """[roll(tile, j) for j in 1 .. W - 1]: token t - j of the tile at t, or the last tokens at the first ones."""
    return [pltpu.roll(tile, j, 0) for j in range(1, width)]


def _taps(masks, tile, rolled, rolled_before):
    """The inputs that each token sees: the token itself, the one before it, ..."""
    earlier = [
        masks.sees(jnp.where(masks.row < j, before, here), j)
        for j, (here, before) in enumerate(zip(rolled, rolled_before, strict=True), start=1)
    ]
    return [masks.live(tile), *earlier]


def _preactivation(taps, weight, bias):
    total = bias
    for j, tap in enumerate(taps):
        total = total + weight[len(taps) - 1 - j] * tap
    return total


def _filters(weight_ref, bias_ref):
    """Weights and bias spread over the tokens of a tile, once per block."""
    rows = weight_ref[...].astype(jnp.float32), bias_ref[...].astype(jnp.float32)
    weight, bias = ([jnp.broadcast_to(v[k : k + 1], (TILE, v.shape[1])) for k in range(v.shape[0])] for v in rows)
    return weight, bias[0]


def _forward_kernel(*refs, masked: bool, width: int, silu: bool):
    codes, refs = (refs[0], refs[1:]) if masked else (None, refs)
    x_ref, weight_ref, bias_ref, y_ref, before_ref = refs
    channels = x_ref.shape[1]
    weight, bias = _filters(weight_ref, bias_ref)

    @pl.when(pl.program_id(2) == 0)
    def _():
        before_ref[...] = jnp.zeros_like(before_ref)

    def body(step, before):
        out = []
        for i, tile in enumerate(tiles.load(x_ref, step)):
            masks = _Masks(codes, step, i, channels)
            rolled = _rotations(tile, width)
            y = _preactivation(_taps(masks, tile, rolled, before), weight, bias)
            out.append(masks.live(y * jax.nn.sigmoid(y) if silu else y))
            before = rolled
        tiles.store(y_ref, step, out)
        return before

    before = [before_ref[j] for j in range(width - 1)]
    for j, rolled in enumerate(lax.fori_loop(0, x_ref.shape[0] // STEP, body, before)):
        before_ref[j] = rolled


def _backward_kernel(*refs, masked: bool, width: int, silu: bool):
    codes, refs = (refs[0], refs[1:]) if masked else (None, refs)
    x_ref, halo_ref, weight_ref, bias_ref, dy_ref, dx_ref, sums_ref, total_ref, later_ref = refs
    block, blocks = pl.program_id(2), pl.num_programs(2)  # from the last to the first
    steps, channels = x_ref.shape[0] // STEP, x_ref.shape[1]
    weight, bias = _filters(weight_ref, bias_ref)

    @pl.when(block == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)
        later_ref[...] = jnp.zeros_like(later_ref)

    def body(i, later):
        step = steps - 1 - i
        halo = tiles.load(halo_ref, 0)[-1]
        halo = jnp.where(block == blocks - 1, jnp.zeros_like(halo), halo)
        before = jnp.where(step == 0, halo, tiles.load(x_ref, jnp.maximum(step - 1, 0))[-1])
        xs = [before, *tiles.load(x_ref, step)]
        rolled = [_rotations(x, width) for x in xs]
        out = []
        for tile, dy in reversed(list(enumerate(tiles.load(dy_ref, step)))):
            masks = _Masks(codes, step, tile, channels)
            taps = _taps(masks, xs[tile + 1], rolled[tile + 1], rolled[tile])
            if silu:
                y = _preactivation(taps, weight, bias)
                sigmoid = jax.nn.sigmoid(y)
                dy = dy * sigmoid * (1.0 + y * (1.0 - sigmoid))
            dy = masks.own(dy)
            for j, tap in enumerate(taps):
                total_ref[width - 1 - j] += dy * tap
            total_ref[width] += dy
            dx, back = weight[width - 1] * dy, []
            for j in range(1, width):
                back.append(pltpu.roll(masks.sees(dy, j), TILE - j, 0))
                dx = dx + weight[width - 1 - j] * jnp.where(masks.row < TILE - j, back[-1], later[j - 1])
            out.insert(0, dx)
            later = back
        tiles.store(dx_ref, step, out)
        return later

    later = [later_ref[j] for j in range(width - 1)]
    for j, rolled in enumerate(lax.fori_loop(0, steps, body, later)):
        later_ref[j] = rolled

    @pl.when(block == blocks - 1)
    def _():
        for k in range(width + 1):
            sums_ref[k : k + 1, :] = jnp.sum(total_ref[k], axis=0, keepdims=True)


class _Blocks:
    """Block specs of one call; `order` maps the time index of the grid to a block of time."""

    def __init__(self, x, width, arrays, *, reverse: bool):
        self.batch, self.length, self.channels = x.shape
        self.width = width
        self.rows = tiles.block_rows(self.length, MAX_ROWS)
        lanes = tiles.block_channels(self.channels, self.rows, 2 * arrays * x.dtype.itemsize, MAX_BLOCK)
        assert lanes is not None  # 512 tokens of 128 channels fit in any dtype
        self.lanes = lanes
        self.count = -(-self.length // self.rows)
        self.order = (lambda t: self.count - 1 - t) if reverse else (lambda t: t)

    @property
    def tokens(self):
        return pl.BlockSpec((None, self.rows, self.lanes), lambda b, d, t: (b, self.order(t), d))

    @property
    def halo(self):
        """The step before the block; the first block gets its own first step, which is not used."""
        steps = self.rows // STEP
        block = (None, STEP, self.lanes)
        return pl.BlockSpec(block, lambda b, d, t: (b, jnp.maximum(self.order(t) * steps - 1, 0), d))

    def filters(self, taps: int):
        return pl.BlockSpec((taps, self.lanes), lambda b, d, t: (0, d))

    @property
    def sums(self):
        return pl.BlockSpec((None, self.width + 1, self.lanes), lambda b, d, t: (b, 0, d))

    def scratch(self, count: int):
        return pltpu.VMEM((count, TILE, self.lanes), jnp.float32)

    def call(self, kernel, name, codes, activation, operands, in_specs, out_shape, out_specs, scratch, flops):
        """Runs the kernel; the codes go in front of the operands when there are any."""
        kernel = functools.partial(kernel, masked=codes is not None, width=self.width, silu=activation == "silu")
        if codes is not None:
            block = (None, None, 1, codes.shape[-1])
            spec = pl.BlockSpec(block, lambda b, d, t: (b, self.order(t), 0, 0), memory_space=pltpu.SMEM)
            operands, in_specs = (codes, *operands), (spec, *in_specs)
        nbytes = sum(v.size * v.dtype.itemsize for v in (*operands, *out_shape))
        transcendentals = self.batch * self.length * self.channels if activation == "silu" else 0
        return pl.pallas_call(
            kernel,
            grid=(self.batch, -(-self.channels // self.lanes), self.count),
            in_specs=list(in_specs),
            out_specs=list(out_specs),
            out_shape=list(out_shape),
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=nbytes, transcendentals=transcendentals),
            interpret=interpret.parameters(),
            name=name,
        )(*operands)


def _bias_row(bias, channels: int):
    return jnp.zeros((1, channels), jnp.float32) if bias is None else bias[None]


def _edge_arguments(x, state, reset, valid, start, size: int):
    """The arguments of `xla.forward` for the window of `size` tokens at `start`."""
    x = _window(x, start, size).astype(jnp.float32)
    return x, state, _window(reset, start, size), _window(valid, start, size)


def forward(x, weight, bias, state, reset, valid, *, activation: str | None):
    """Returns (y, new_state) as `xla.forward` does."""
    batch, length, channels = x.shape
    width = weight.shape[0]
    if length < STEP:  # a few tokens are elementwise: XLA fuses them with their neighbours
        return xla.forward(x, weight, bias, state, reset, valid, activation=activation)
    blocks = _Blocks(x, width, 2, reverse=False)
    (y,) = blocks.call(
        _forward_kernel,
        "causal_conv1d_forward",
        _codes(reset, valid, None, batch, length, blocks.rows, width),
        activation,
        (x, weight, _bias_row(bias, channels)),
        (blocks.tokens, blocks.filters(width), blocks.filters(1)),
        [jax.ShapeDtypeStruct(x.shape, x.dtype)],
        [blocks.tokens],
        [blocks.scratch(width - 1)],
        2 * width * x.size,
    )
    front, back = _edges(valid, length, width)
    if state is not None:
        x_edge, *edge = _edge_arguments(x, state, reset, valid, front, width - 1)
        y_edge, _ = xla.forward(x_edge, weight, bias, *edge, activation=activation)
        y = _replace(y, y_edge, front)
    x_edge, *edge = _edge_arguments(x, state, reset, valid, back, width - 1)
    return y, xla.forward(x_edge, weight, bias, *edge, activation=activation)[1]


def _edge_gradients(
    x, weight, bias, state, reset, valid, dy, dstate, front, back, activation
) -> tuple[Any, Any, Any, Any, Any]:
    """Float32 gradients of the front window's y and of the new state.

    Returns: dx of the front and of the back window [B, W - 1, D] (the former None without a state), dweight, dbias
    and d(state), zeros or None where there is nothing.
    """
    width = weight.shape[0]
    x_edge, _, reset_edge, valid_edge = _edge_arguments(x, state, reset, valid, back, width - 1)
    carry = lambda x, state: xla.forward(x, weight, bias, state, reset_edge, valid_edge, activation=activation)[1]  # noqa: E731
    dx_back, dcarried = jax.vjp(carry, x_edge, state)[1](dstate)
    if state is None:
        return None, dx_back, 0.0, 0.0, None
    weight, bias = jax.tree.map(lambda v: v.astype(jnp.float32), (weight, bias))
    x_edge, state, reset, valid = _edge_arguments(x, state, reset, valid, front, width - 1)
    dy, no_carry = _window(dy, front, width - 1), jnp.zeros_like(state)
    dx_front, dweight, dbias, dstate = xla.backward(
        x_edge, weight, bias, state, reset, valid, dy, no_carry, activation=activation
    )
    return dx_front, dx_back, dweight, dbias, dstate + dcarried


def backward(x, weight, bias, state, reset, valid, dy, dstate, *, activation: str | None):
    """Returns the gradients of (x, weight, bias, state) as `xla.backward` does.

    In bfloat16, dx of the W - 1 tokens at either edge of a row is rounded once more than elsewhere.
    """
    batch, length, channels = x.shape
    width = weight.shape[0]
    if length < STEP:
        return xla.backward(x, weight, bias, state, reset, valid, dy, dstate, activation=activation)
    blocks = _Blocks(x, width, 3, reverse=True)
    front, back = _edges(valid, length, width)
    codes = _codes(reset, valid, None if state is None else front, batch, length, blocks.rows, width)
    dx, sums = blocks.call(
        _backward_kernel,
        "causal_conv1d_backward",
        codes,
        activation,
        (x, x, weight, _bias_row(bias, channels), dy),
        (blocks.tokens, blocks.halo, blocks.filters(width), blocks.filters(1), blocks.tokens),
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((batch, width + 1, channels), jnp.float32),
        ],
        [blocks.tokens, blocks.sums],
        [blocks.scratch(width + 1), blocks.scratch(width - 1)],
        6 * width * x.size,
    )
    sums = jnp.sum(sums, axis=0)
    dx_front, dx_back, dweight, dbias, dcarried = _edge_gradients(
        x, weight, bias, state, reset, valid, dy, dstate, front, back, activation
    )
    for start, more in ((front, dx_front), (back, dx_back)):
        if more is not None:
            dx = _replace(dx, _window(dx, start, width - 1) + more, start)
    dbias = None if bias is None else (sums[width] + dbias).astype(bias.dtype)
    return dx, (sums[:width] + dweight).astype(weight.dtype), dbias, dcarried

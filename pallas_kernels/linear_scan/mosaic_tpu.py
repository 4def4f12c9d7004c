"""Linear recurrence as Pallas TPU kernels: one pass over memory forward, one backward.

The grid runs over batch and blocks of channels in parallel and over blocks of time in order, the state in VMEM scratch.
Eight tokens of 128 channels fill one register, so a tile of eight tokens is scanned in three doubling steps along the
sublanes and then joined to the state. A block of time is a chunk of the op: the backward pass starts from the state
before it, recomputes the states of the block into scratch and walks the block backwards.

Both passes are bound by memory: forward moves 3 and backward 5 arrays of the size of `a`, plus 1 / chunk_size of that
for the boundaries. Documents and padding cost 4 bytes per 8 tokens: one integer in SMEM carries the masks of a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, interpret, tiles
from pallas_kernels.linear_scan import xla
from pallas_kernels.tiles import STEP, TILE

MAX_BLOCK = 1024  # channels
DTYPES = ("float32", "bfloat16")


def _token_bytes(a, b, *, backward: bool) -> int:
    """Blocks that come and go are held twice; the backward pass keeps a block of float32 states."""
    a_bytes, b_bytes = a.dtype.itemsize, b.dtype.itemsize
    return 2 * (2 * a_bytes + 3 * b_bytes) + 4 if backward else 2 * (a_bytes + 2 * b_bytes)


def _supports(a, b, chunk_size: int) -> None:
    for name, array in (("a", a), ("b", b)):
        if jnp.dtype(array.dtype).name not in DTYPES:
            raise dispatch.UnsupportedError(
                f"linear_scan: mosaic_tpu does not compute in {array.dtype}: {name} must be one of {DTYPES}"
            )
    length = a.shape[1]
    if chunk_size < length and chunk_size % STEP:
        raise dispatch.UnsupportedError(
            f"linear_scan: mosaic_tpu does not cut tiles: chunk_size={chunk_size} must be a multiple of {STEP}, "
            f"such as {-(-chunk_size // STEP) * STEP}"
        )
    rows = tiles.block_rows(length, chunk_size)
    if tiles.block_channels(a.shape[2], rows, _token_bytes(a, b, backward=True), MAX_BLOCK) is None:
        raise dispatch.UnsupportedError(
            f"linear_scan: mosaic_tpu does not hold {rows} tokens in VMEM: chunk_size={chunk_size} must be smaller, "
            "such as 256"
        )


def supports_forward(a, b, state, reset, valid, *, chunk_size: int, save: bool) -> None:
    """Raises UnsupportedError where `forward` does not honour an argument."""
    _supports(a, b, chunk_size)


def supports_backward(a, b, state, reset, valid, boundaries, dh, dstate, *, chunk_size: int) -> None:
    """Raises UnsupportedError where `backward` does not honour an argument."""
    _supports(a, b, chunk_size)


def _codes(reset, valid, batch: int, length: int, rows: int):
    """int32 [B, blocks, 1, rows / 8]: per tile, bits 0-7 for tokens that count, bits 8-15 for those that are reset.

    None when every token of every block counts and none is reset.
    """
    if reset is None and valid is None and length % rows == 0:
        return None
    live = jnp.ones((batch, length), bool) if valid is None else valid
    reset = jnp.zeros((batch, length), bool) if reset is None else reset
    return tiles.pack([live, reset], length, rows)[:, :, None]


class _Tile:
    """The masks of one tile of eight tokens; `code` is None when all of them are trivial."""

    def __init__(self, code, width: int):
        self.row = tiles.rows_of(width)
        self.live, self.joined = (None, None) if code is None else (code & 255, (code >> TILE) & 255 ^ 255)

    def only_live(self, value, otherwise: float):
        return value if self.live is None else jnp.where(tiles.mask(self.live, self.row), value, otherwise)

    def only_joined(self, value):
        """Zeros at tokens that are reset."""
        return value if self.joined is None else jnp.where(tiles.mask(self.joined, self.row), value, 0.0)

    def scan(self, a, b, h):
        """h_t = a_t h_{t-1} + b_t over the tile from the state h [1, D] before it."""
        # After the step of size s, (a, b) cover the tokens (t - 2 s, t]; spans[i] says that none of them is reset.
        spans = None if self.joined is None else _spread_forward(self.joined)
        for i, size in enumerate((1, 2, 4)):
            joins = self.row >= size if spans is None else tiles.mask(spans[i], self.row)
            b = b + jnp.where(joins, a * pltpu.roll(b, size, 0), 0.0)
            a = jnp.where(joins, a * pltpu.roll(a, size, 0), a)
        return b + (a * h if spans is None else jnp.where(tiles.mask(spans[3], self.row), a * h, 0.0))

    def scan_reversed(self, a, b, q):
        """q_t = a_t q_{t+1} + b_t over the tile from q [1, D] after it; nothing passes a reset at t + 1."""
        spans = None if self.joined is None else _spread_backward(self.joined)
        for i, size in enumerate((1, 2, 4)):
            joins = self.row < TILE - size if spans is None else tiles.mask(spans[i], self.row)
            b = b + jnp.where(joins, a * pltpu.roll(b, TILE - size, 0), 0.0)
            a = jnp.where(joins, a * pltpu.roll(a, TILE - size, 0), a)
        return b + (a * q if spans is None else jnp.where(tiles.mask(spans[3], self.row), a * q, 0.0))

    def before(self, h_all, h):
        """The state before each token, [8, D], from those after it and the one before the tile."""
        return self.only_joined(jnp.where(self.row == 0, h, pltpu.roll(h_all, 1, 0)))

    def after(self, q_all, q):
        """What comes back to each token from the next one, [8, D]."""
        later = pltpu.roll(q_all, TILE - 1, 0)
        if self.joined is not None:
            later = jnp.where(tiles.mask(self.joined >> 1, self.row), later, 0.0)
        return jnp.where(self.row == TILE - 1, q, later)

    def pass_on(self, q_all):
        """What the first token passes to the tile before, [1, D]."""
        first = q_all[:1]
        return first if self.joined is None else jnp.where((self.joined & 1) == 1, first, 0.0)


def _spread_forward(joined):
    """Bits t of spans: no reset in (t - s, t] for s in 1, 2, 4 where token t - s is in the tile; none in [0, t]."""
    one = joined & 0xFE
    two = one & (one << 1) & 0xFC
    four = two & (two << 2) & 0xF0
    whole = joined & ((joined << 1) | 0x01)
    whole = whole & ((whole << 2) | 0x03)
    return one, two, four, whole & ((whole << 4) | 0x0F)


def _spread_backward(joined):
    """Bits t of spans: no reset in (t, t + s] for s in 1, 2, 4 where token t + s is in the tile; none in (t, 7]."""
    one = (joined >> 1) & 0x7F
    two = one & (one >> 1) & 0x3F
    four = two & (two >> 2) & 0x0F
    whole = one | 0x80
    whole = whole & ((whole >> 1) | 0x80)
    whole = whole & ((whole >> 2) | 0xC0)
    return one, two, four, whole & ((whole >> 4) | 0xF0)


def _operands(codes, step, *refs) -> list[tuple]:
    """The tiles of one step: masks, and what each of the references holds."""
    count = STEP // TILE
    masks = [_Tile(None if codes is None else codes[0, step * count + i], refs[0].shape[1]) for i in range(count)]
    return list(zip(masks, *(tiles.load(ref, step) for ref in refs), strict=True))


def _forward_kernel(*refs, masked: bool, save: bool):
    codes, refs = (refs[0], refs[1:]) if masked else (None, refs)
    a_ref, b_ref, state_ref, h_ref, new_state_ref, *boundary_refs, carry_ref = refs
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _():
        carry_ref[...] = state_ref[...]

    if save:
        boundary_refs[0][...] = carry_ref[...]

    def body(step, h):
        out = []
        for tile, a, b in _operands(codes, step, a_ref, b_ref):
            h_all = tile.scan(tile.only_live(a, 1.0), tile.only_live(b, 0.0), h)
            out.append(tile.only_live(h_all, 0.0))
            h = h_all[TILE - 1 :]
        tiles.store(h_ref, step, out)
        return h

    carry_ref[...] = jax.lax.fori_loop(0, a_ref.shape[0] // STEP, body, carry_ref[...])

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        new_state_ref[...] = carry_ref[...]


def _backward_kernel(*refs, masked: bool):
    codes, refs = (refs[0], refs[1:]) if masked else (None, refs)
    a_ref, b_ref, boundary_ref, dh_ref, dstate_ref, da_ref, db_ref, out_ref, before_ref, carry_ref = refs
    block = pl.program_id(2)  # from the last to the first
    steps = a_ref.shape[0] // STEP

    @pl.when(block == 0)
    def _():
        carry_ref[...] = dstate_ref[...]

    def recompute(step, h):
        out = []
        for tile, a, b in _operands(codes, step, a_ref, b_ref):
            h_all = tile.scan(tile.only_live(a, 1.0), tile.only_live(b, 0.0), h)
            out.append(tile.before(h_all, h))
            h = h_all[TILE - 1 :]
        tiles.store(before_ref, step, out)
        return h

    def walk_back(i, q):
        step = steps - 1 - i
        das, dbs = [], []
        for tile, a, dh, before in reversed(_operands(codes, step, a_ref, dh_ref, before_ref)):
            a, dh = tile.only_live(a, 1.0), tile.only_live(dh, 0.0)
            q_all = tile.scan_reversed(a, a * dh, q)
            g = dh + tile.after(q_all, q)
            das.insert(0, tile.only_live(g * before, 0.0))
            dbs.insert(0, tile.only_live(g, 0.0))
            q = tile.pass_on(q_all)
        tiles.store(da_ref, step, das)
        tiles.store(db_ref, step, dbs)
        return q

    jax.lax.fori_loop(0, steps, recompute, boundary_ref[...])
    carry_ref[...] = jax.lax.fori_loop(0, steps, walk_back, carry_ref[...])

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = carry_ref[...]


class _Blocks:
    """Block specs of one call; `order` maps the time index of the grid to a block of time."""

    def __init__(self, a, chunk_size, token_bytes, *, reverse: bool):
        self.batch, self.length, self.channels = a.shape
        self.rows = tiles.block_rows(self.length, chunk_size)
        width = tiles.block_channels(self.channels, self.rows, token_bytes, MAX_BLOCK)
        assert width is not None  # `supports` has been asked
        self.width = width
        self.count = -(-self.length // self.rows)
        self.order = (lambda t: self.count - 1 - t) if reverse else (lambda t: t)

    @property
    def tokens(self):
        return pl.BlockSpec((None, self.rows, self.width), lambda b, d, t: (b, self.order(t), d))

    @property
    def state(self):
        return pl.BlockSpec((None, 1, self.width), lambda b, d, t: (b, 0, d))

    @property
    def boundaries(self):
        return pl.BlockSpec((None, None, 1, self.width), lambda b, d, t: (b, self.order(t), 0, d))

    @property
    def codes(self):
        block = (None, None, 1, self.rows // TILE)
        return pl.BlockSpec(block, lambda b, d, t: (b, self.order(t), 0, 0), memory_space=pltpu.SMEM)

    def call(self, kernel, name, codes, operands, in_specs, out_shape, out_specs, scratch, flops):
        """Runs the kernel; the codes go in front of the operands when there are any."""
        if codes is not None:
            operands, in_specs = (codes, *operands), (self.codes, *in_specs)
        nbytes = sum(v.size * v.dtype.itemsize for v in (*operands, *out_shape))
        return pl.pallas_call(
            kernel,
            grid=(self.batch, -(-self.channels // self.width), self.count),
            in_specs=list(in_specs),
            out_specs=list(out_specs),
            out_shape=list(out_shape),
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=nbytes, transcendentals=0),
            interpret=interpret.parameters(),
            name=name,
        )(*operands)


def forward(a, b, state, reset, valid, *, chunk_size: int, save: bool):
    """Returns (h, new_state, boundaries) as `xla.forward` does."""
    if a.shape[1] == 1:  # a single token is elementwise: XLA fuses it with its neighbours
        return xla.forward(a, b, state, reset, valid, chunk_size=chunk_size, save=save)
    blocks = _Blocks(a, chunk_size, _token_bytes(a, b, backward=False), reverse=False)
    codes = _codes(reset, valid, blocks.batch, blocks.length, blocks.rows)
    state = jnp.zeros((blocks.batch, blocks.channels), jnp.float32) if state is None else state
    out_shape = [
        jax.ShapeDtypeStruct(b.shape, b.dtype),
        jax.ShapeDtypeStruct((blocks.batch, 1, blocks.channels), jnp.float32),
    ]
    out_specs = [blocks.tokens, blocks.state]
    if save:
        out_shape.append(jax.ShapeDtypeStruct((blocks.batch, blocks.count, 1, blocks.channels), jnp.float32))
        out_specs.append(blocks.boundaries)
    h, new_state, *boundaries = blocks.call(
        functools.partial(_forward_kernel, masked=codes is not None, save=save),
        "linear_scan_forward",
        codes,
        (a, b, state[:, None]),
        (blocks.tokens, blocks.tokens, blocks.state),
        out_shape,
        out_specs,
        [pltpu.VMEM((1, blocks.width), jnp.float32)],
        2 * a.size,
    )
    return h, new_state[:, 0], boundaries[0][:, :, 0] if save else None


def backward(a, b, state, reset, valid, boundaries, dh, dstate, *, chunk_size: int):
    """Returns the gradients of (a, b, state) as `xla.backward` does."""
    if a.shape[1] == 1:
        return xla.backward(a, b, state, reset, valid, boundaries, dh, dstate, chunk_size=chunk_size)
    blocks = _Blocks(a, chunk_size, _token_bytes(a, b, backward=True), reverse=True)
    codes = _codes(reset, valid, blocks.batch, blocks.length, blocks.rows)
    da, db, dstate = blocks.call(
        functools.partial(_backward_kernel, masked=codes is not None),
        "linear_scan_backward",
        codes,
        (a, b, boundaries[:, :, None], dh, dstate[:, None]),
        (blocks.tokens, blocks.tokens, blocks.boundaries, blocks.tokens, blocks.state),
        [
            jax.ShapeDtypeStruct(a.shape, a.dtype),
            jax.ShapeDtypeStruct(b.shape, b.dtype),
            jax.ShapeDtypeStruct((blocks.batch, 1, blocks.channels), jnp.float32),
        ],
        [blocks.tokens, blocks.tokens, blocks.state],
        [pltpu.VMEM((blocks.rows, blocks.width), jnp.float32), pltpu.VMEM((1, blocks.width), jnp.float32)],
        6 * a.size,
    )
    return da, db, None if state is None else dstate[:, 0]

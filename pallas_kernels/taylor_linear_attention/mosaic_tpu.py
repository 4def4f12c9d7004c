"""Taylor linear attention as a Pallas TPU kernel: the forward pass, and what it shares with the backward pass.

The grid runs over batch and blocks of heads in parallel and over chunks of time in order, the state in VMEM. Tokens lie
along the lanes, components and features along the sublanes: a turn of `features` is then one rotation of sublanes and
one multiplication over full registers, and features are made where the matrix unit reads them, for a tile of 128 tokens
at a time. The tile's own weights are the polynomial of its scores. Values carry a row of ones (zeros at padding), which
makes the last row of every sum the normaliser.

Documents are numbers that grow along a row, -1 at padding; those at the ends of the tiles decide in SMEM whether the
state passes.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, interpret
from pallas_kernels.taylor_linear_attention import features, xla
from pallas_kernels.tiles import LANES, as_column, contract

DTYPES = ("float32", "bfloat16")
TILE = LANES  # tokens whose scores are one matrix
MAX_CHUNK = 512
KEY_STEP = 16  # registers hold 16 bfloat16 rows, and half a turn must end with one of 8 float32 rows
VALUE_STEP = 8
STATE_BYTES = 2**20  # of one head; a kernel holds up to eight blocks of that size
MAX_STEPS = 16  # tiles times heads of a grid step, each of them code of its own


def supports(q, k, v, chunk_size: int) -> None:
    """Raises `UnsupportedError` for what neither the forward nor the backward kernel serves."""

    def refuse(what: str):
        raise dispatch.UnsupportedError(f"taylor_linear_attention: mosaic_tpu does not {what}")

    for name, array in (("q", q), ("k", k), ("v", v)):
        if jnp.dtype(array.dtype).name not in DTYPES:
            refuse(f"compute in {array.dtype}: {name} must be one of {DTYPES}")
    length, key, value = q.shape[1], q.shape[3], v.shape[3]
    if length == 1:
        return  # a step of XLA
    if key % KEY_STEP:
        refuse(f"cut registers: the width K={key} of q and k must be a multiple of {KEY_STEP}")
    if value % VALUE_STEP or value == 0:
        refuse(f"cut registers: the width V={value} of v must be a multiple of {VALUE_STEP}")
    if state_bytes(key, value) > STATE_BYTES:
        refuse(f"hold the state in VMEM: widths K={key} of q and k and V={value} of v make it too large")
    if chunk_size < length and chunk_size % LANES:
        least = -(-chunk_size // LANES) * LANES
        refuse(f"cut registers: chunk_size={chunk_size} must be a multiple of {LANES}, such as {min(least, MAX_CHUNK)}")
    if chunk_size > MAX_CHUNK:  # `chunk_size` is at most T
        refuse(f"hold the code of a chunk: T={length} and chunk_size={chunk_size} must not both exceed {MAX_CHUNK}")


def supports_forward(q, k, v, state, reset, valid, *, scale: float, eps: float, chunk_size: int, save: bool) -> None:
    """Raises UnsupportedError where `forward` does not honour an argument."""
    supports(q, k, v, chunk_size)


def state_bytes(key: int, value: int) -> int:
    """What the state of one head takes in VMEM, in tiles of 8 x 128."""
    return -(-features.count(key) // 8) * 8 * -(-(value + 1) // LANES) * LANES * 4


def choose_heads(heads: int, tiles: int, state: int) -> int:
    """Heads per grid step: work of several heads fills the waits of one, and they share the masks.

    Args:
      heads: all heads, of which the result is a divisor.
      tiles: tiles per grid step.
      state: `state_bytes` of a head.
    """
    most = max(1, min(MAX_STEPS // tiles, STATE_BYTES // state))
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)


class Masks(NamedTuple):
    """Which tokens of a tile see what; None where all of them do."""

    own: jax.Array  # bool [TILE, TILE]: the query, along the lanes, sees the key
    carried: jax.Array | None = None  # bool [1, TILE]: the query sees the state before the tile
    kept: jax.Array | None = None  # bool [1, TILE]: the state after the tile sees the key
    through: jax.Array | None = None  # bool: the state after the tile sees that before it
    valid: jax.Array | None = None  # bool [1, TILE]


def masks(documents, block, tile: int, tiles: int) -> Masks:
    """The masks of one tile of a block; `documents` are the references of `Layout.documents`."""
    key, query = (jax.lax.broadcasted_iota(jnp.int32, (TILE, TILE), axis) for axis in (0, 1))
    own = key <= query
    if not documents:
        return Masks(own)
    ends_ref, row_ref = documents
    first = block * tiles + tile
    before, last = ends_ref[0, first], ends_ref[0, first + 1]
    row = row_ref[:, tile * TILE : (tile + 1) * TILE]
    own &= as_column(row, TILE) == row
    return Masks(own, row == before, row == last, before == last, row >= 0)


def where(mask, x):
    """x, and zeros where there is a mask that is False."""
    return x if mask is None else jnp.where(mask, x, 0.0)


def load(ref, tile: int, head: int, valid):
    """The tokens of one tile in float32, zeros at padding, where memory may hold anything."""
    return where(valid, ref[head, :, tile * TILE : (tile + 1) * TILE].astype(jnp.float32))


def turned(x, turn: int):
    """x_{a + turn} at row a, for [K, C]."""
    return x if turn == 0 else pltpu.roll(x, x.shape[0] - turn, 0)


def expand(x, scale: float):
    """phi of every column: float32 [K, C] -> [F, C]."""
    x = x * math.sqrt(scale)
    parts = [x * (features.HALF * x)]
    parts += [(x * turned(x, turn))[:rows] for turn, _, rows in features.turns(x.shape[0])[1:]]
    return jnp.concatenate([*parts, x, jnp.ones((1, x.shape[1]), jnp.float32)], axis=0)


def with_ones(v, valid):
    """Values [V, C] with the row that counts the tokens, float32 [V + 1, C]."""
    return jnp.concatenate([v, where(valid, jnp.ones((1, v.shape[1]), jnp.float32))], axis=0)


def pipeline(steps, start, finish) -> None:
    """Calls finish(*step, *start(*step)) for every step, with the start of the next one in front of each finish.

    The compiler's schedule follows the order of the program; in this one it is a tenth shorter than step by step.
    """
    ready = start(*steps[0])
    for index, step in enumerate(steps):
        now = ready
        if index + 1 < len(steps):
            ready = start(*steps[index + 1])
        finish(*step, *now)


def _forward_kernel(*refs, scale: float, eps: float, masked: bool, save: bool, dtype):
    documents, refs = (refs[:2], refs[2:]) if masked else ((), refs)
    q_ref, k_ref, v_ref, before_ref, y_ref, state_ref, *saved = refs
    heads, tiles = q_ref.shape[0], q_ref.shape[2] // TILE
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _():
        state_ref[...] = before_ref[...]

    if save:
        saved[0][...] = state_ref[...]
    seen = [masks(documents, block, tile, tiles) for tile in range(tiles)]

    def start(tile, head):
        q, k, v = (load(ref, tile, head, seen[tile].valid) for ref in (q_ref, k_ref, v_ref))
        s = contract(k.astype(dtype), q.astype(dtype), 0, 0)  # [key, query], not scaled
        phi_q, phi_k = (expand(x, scale).astype(dtype) for x in (q, k))
        return s, phi_q, phi_k, with_ones(v, seen[tile].valid)

    def finish(tile, head, s, phi_q, phi_k, u):
        lanes, see, state = slice(tile * TILE, (tile + 1) * TILE), seen[tile], state_ref[head]
        weights = jnp.where(see.own, 1.0 + s * (scale + 0.5 * scale**2 * s), 0.0)
        sums = where(see.carried, contract(state.astype(dtype), phi_q, 0, 0))
        sums += contract(u.astype(dtype), weights.astype(dtype), 1, 0)
        state_ref[head] = where(see.through, state) + contract(phi_k, where(see.kept, u).astype(dtype), 1, 1)
        numerators, denominators = sums[:-1], sums[-1:] + eps
        if see.valid is not None:
            denominators = jnp.where(see.valid, denominators, 1.0)
            numerators = jnp.where(see.valid, numerators, 0.0)
        y_ref[head, :, lanes] = (numerators * (1.0 / denominators)).astype(y_ref.dtype)
        if save:
            saved[1][head, :, lanes] = denominators

    pipeline([(tile, head) for tile in range(tiles) for head in range(heads)], start, finish)


class Layout:
    """Arrays as the kernels take them, [B, H, width, T], and their block specs; behind the end of T is padding."""

    def __init__(self, q, v, reset, valid, chunk_size: int, *, reverse: bool = False):
        self.batch, self.length, self.heads, self.key = q.shape
        self.value = v.shape[3]
        self.size = chunk_size if chunk_size < self.length else -(-self.length // LANES) * LANES
        self.chunks = -(-self.length // self.size)
        self.block = choose_heads(self.heads, self.size // TILE, state_bytes(self.key, self.value))
        self.order = (lambda t: self.chunks - 1 - t) if reverse else (lambda t: t)
        self.documents: tuple[jax.Array, ...] = ()
        if reset is not None or valid is not None or self.padding:
            self.documents = self._documents(reset, valid)

    @property
    def padding(self) -> int:
        """Tokens of the last chunk behind the end of T."""
        return self.chunks * self.size - self.length

    @property
    def state_shape(self) -> tuple[int, ...]:
        """[B, H, F, V + 1]."""
        return self.batch, self.heads, features.count(self.key), self.value + 1

    def _documents(self, reset, valid):
        """int32 [B, 1, T / TILE + 1], documents before, between and after the tiles, and [B, 1, T] of the tokens."""
        numbers = jnp.zeros((self.batch, self.length), jnp.int32)
        if reset is not None:
            numbers = jnp.cumsum(reset, axis=1, dtype=jnp.int32)
        filled = jnp.pad(numbers, ((0, 0), (0, self.padding)), mode="edge")
        ends = jnp.pad(filled[:, TILE - 1 :: TILE], ((0, 0), (1, 0)))
        marks = numbers if valid is None else jnp.where(valid, numbers, -1)
        marks = jnp.pad(marks, ((0, 0), (0, self.padding)), constant_values=-1)
        return ends[:, None], marks[:, None]

    def transpose(self, x):
        """[B, T, H, width] in that layout: how the compiler lays out such arrays anyway."""
        return jnp.transpose(x, (0, 2, 3, 1))

    def restore(self, x):
        """The inverse of `transpose`."""
        return jnp.transpose(x, (0, 3, 1, 2))

    def rows(self, width: int) -> jax.ShapeDtypeStruct:
        """Shape of [B, H, width, T] in float32."""
        return jax.ShapeDtypeStruct((self.batch, self.heads, width, self.length), jnp.float32)

    def spec(self, width: int) -> pl.BlockSpec:
        """Block of `transpose`d arrays."""
        return pl.BlockSpec((None, self.block, width, self.size), lambda b, h, t: (b, h, 0, self.order(t)))

    @property
    def state_spec(self) -> pl.BlockSpec:
        """Block of states."""
        return pl.BlockSpec((None, self.block, *self.state_shape[2:]), lambda b, h, t: (b, h, 0, 0))

    @property
    def boundary_spec(self) -> pl.BlockSpec:
        """Block of the states before the chunks, [B, chunks, H, F, V + 1]."""
        block = (None, None, self.block, *self.state_shape[2:])
        return pl.BlockSpec(block, lambda b, h, t: (b, self.order(t), h, 0, 0))

    def call(self, kernel, name: str, operands, in_specs, out_shape, out_specs, flops: int, scratch=()) -> Any:
        """Runs a kernel, the documents in front of the operands when there are any."""
        if self.documents:
            operands = (*self.documents, *operands)
            ends = pl.BlockSpec(
                (None, 1, self.documents[0].shape[2]), lambda b, h, t: (b, 0, 0), memory_space=pltpu.SMEM
            )
            marks = pl.BlockSpec((None, 1, self.size), lambda b, h, t: (b, 0, self.order(t)))
            in_specs = (ends, marks, *in_specs)
        nbytes = sum(x.size * x.dtype.itemsize for x in (*operands, *out_shape))
        return pl.pallas_call(
            kernel,
            grid=(self.batch, self.heads // self.block, self.chunks),
            in_specs=list(in_specs),
            out_specs=list(out_specs),
            out_shape=list(out_shape),
            scratch_shapes=list(scratch),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=nbytes, transcendentals=0),
            interpret=interpret.parameters(),
            name=name,
        )(*operands)


def operand_dtype(q, k, v):
    """What the matrix unit multiplies: bfloat16 when all arguments are."""
    return jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in (q, k, v)) else jnp.float32


def forward(q, k, v, state, reset, valid, *, scale: float, eps: float, chunk_size: int, save: bool):
    """Returns (y, new_state, residuals) as `xla.forward` does."""
    if q.shape[1] == 1:  # decoding is bound by reading the state: XLA fuses the step
        return xla.forward(q, k, v, state, reset, valid, scale=scale, eps=eps, chunk_size=chunk_size, save=save)
    at = Layout(q, v, reset, valid, chunk_size)
    state = jnp.zeros(at.state_shape, jnp.float32) if state is None else state
    out_shape = [
        jax.ShapeDtypeStruct(at.rows(at.value).shape, v.dtype),
        jax.ShapeDtypeStruct(at.state_shape, jnp.float32),
    ]
    out_specs = [at.spec(at.value), at.state_spec]
    if save:
        boundaries = (at.batch, at.chunks, *at.state_shape[1:])
        out_shape += [jax.ShapeDtypeStruct(boundaries, jnp.float32), at.rows(1)]
        out_specs += [at.boundary_spec, at.spec(1)]
    static = {"masked": bool(at.documents), "save": save, "dtype": operand_dtype(q, k, v)}
    y, new_state, *saved = at.call(
        functools.partial(_forward_kernel, scale=scale, eps=eps, **static),
        "taylor_linear_attention_forward",
        (*(at.transpose(x) for x in (q, k, v)), state),
        (at.spec(at.key), at.spec(at.key), at.spec(at.value), at.state_spec),
        out_shape,
        out_specs,
        2 * q.size // at.key * (at.value + 1) * (2 * features.count(at.key) + at.size),
    )
    residuals = (saved[0], saved[1][:, :, 0]) if save else None
    return at.restore(y), new_state, residuals

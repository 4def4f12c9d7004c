"""Selective scan as a TPU kernel: the forward pass, and what it shares with the backward pass.

A vector register holds eight states of 128 channels: a token takes N exponentials and 4 N other operations of the
vector unit, which bounds the kernel. The sum over states of eight tokens is a product of the matrix unit, of the
block-diagonal C of those tokens with their states, which it rounds to bfloat16 unless an array of tokens is in float32.
(As a product the input's term u B would stream a row per state, more than the unit has time for.) A token's step is a
row of memory that a load repeats on all sublanes; B_t[n] is spread over the lanes once per block of tokens, for all
channels. The block-diagonal zeros are multiplied: a state that is not finite reaches the other seven tokens of its
group in the same channel.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.selective_scan import xla
from pallas_kernels.tiles import LANES

SUBLANES = 8
MAX_TOKENS = 128  # of a chunk, and of a block of the backward pass
BLOCK_TOKENS = 1024  # of the forward pass
MAX_TABLE = 2**23  # bytes that B, spread over the lanes, takes
SMALL = 2.0**-7  # below it softplus is a series
PART = 16  # states that are run together: those of eight tokens fill the matrix unit
UNROLL = 4  # groups of eight tokens: a loop takes about 60 cycles to fill and drain; more do not fit the registers
STATES_UNROLLED = 32  # more would only make the program longer
VMEM_LIMIT = 64 * 2**20  # of 128 MiB; the default of 16 does not hold a long chunk's history


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut into blocks."""

    chunk: int  # tokens between saved states
    chunks: int
    block_chunks: int  # chunks of a block
    rows: int  # tokens that are run of a group of eight
    channels: int  # padded to whole lanes
    tiles: int  # of 128 channels in a block

    @property
    def time(self) -> int:
        """Tokens, padded to whole chunks."""
        return self.chunk * self.chunks

    @property
    def width(self) -> int:
        """Channels of a block."""
        return self.tiles * LANES

    @property
    def blocks(self) -> int:
        """Blocks that hold all channels."""
        return -(-self.channels // self.width)

    @property
    def ragged(self) -> bool:
        """Whether the last block has lanes past the last channel."""
        return self.channels % self.width != 0


def plan(length: int, channels: int, chunk_size: int) -> Plan:
    """Cuts `length` tokens of `channels` channels into blocks of whole chunks and at most 1024 channels."""
    chunks = -(-length // chunk_size)
    chunk = chunk_size if chunks > 1 else -(-chunk_size // SUBLANES) * SUBLANES
    channels = -(-channels // LANES) * LANES
    block_chunks = max(k for k in range(1, chunks + 1) if chunks % k == 0 and (k == 1 or k * chunk <= MAX_TOKENS))
    return Plan(chunk, chunks, block_chunks, min(SUBLANES, length), channels, min(SUBLANES, channels // LANES))


def blocked(p: Plan, rows: int, limit: int) -> Plan:
    """The same plan in blocks of at most `limit` tokens whose table of `rows` per token is not too large."""
    limit = min(limit, MAX_TABLE // (4 * LANES * rows))
    fits = (k for k in range(1, p.chunks + 1) if p.chunks % k == 0 and k * p.chunk <= limit)
    return dataclasses.replace(p, block_chunks=max(fits, default=1))


def supports(x, dt, A, B, C, D, z, dt_bias, state, reset, valid, *rest, dt_softplus, chunk_size, save=False) -> None:
    """Raises UnsupportedError for what the kernels do not honour."""
    length = x.shape[1]
    named = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    for name, array in named.items():
        if array is not None and array.dtype == jnp.float16:
            refuse(f"{name} in float16: the TPU has no such type; use bfloat16 or float32")
    if chunk_size > MAX_TOKENS:
        refuse(f"chunk_size={chunk_size} for T={length}: chunks have at most {MAX_TOKENS} tokens")
    if chunk_size % SUBLANES and chunk_size < length:
        refuse(f"chunk_size={chunk_size} for T={length}: it must be a multiple of {SUBLANES}, or T at least")


def refuse(reason: str):
    """Raises UnsupportedError."""
    raise UnsupportedError(f"selective_scan: mosaic_tpu does not support {reason}")


# ---- layouts, outside the kernel ------------------------------------------------------------------------------


def pad_tokens(v: jax.Array, p: Plan, channels: bool = True) -> jax.Array:
    """Zeros up to whole chunks, and up to whole lanes."""
    widths = ((0, 0), (0, p.time - v.shape[1]), (0, p.channels - v.shape[2] if channels else 0))
    return jnp.pad(v, widths) if any(map(sum, widths)) else v


def padded(states: int) -> int:
    """States in whole parts; those in addition stay zero."""
    part = SUBLANES if states <= SUBLANES else PART
    return -(-states // part) * part


def pad_states(v):
    """[..., N] with zeros up to whole parts."""
    return jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, padded(v.shape[-1]) - v.shape[-1])])


def by_block(v, p):
    """[..., Di, N] -> float32 [..., blocks, padded N, width]."""
    v = jnp.swapaxes(pad_states(v.astype(jnp.float32)), -1, -2)
    pad = [(0, 0)] * (v.ndim - 1) + [(0, p.blocks * p.width - v.shape[-1])]
    return jnp.moveaxis(jnp.pad(v, pad).reshape(*v.shape[:-1], p.blocks, p.width), -2, -3)


def from_by_block(v, channels: int, states: int):
    """The inverse of `by_block`."""
    v = jnp.moveaxis(v, -3, -2)
    return jnp.swapaxes(v.reshape(*v.shape[:-2], -1)[..., :states, :channels], -1, -2)


def diagonal(v, valid, p):
    """[B, T, parts, 8, part] by rows: that of token t holds v_t [N] at the place of t in its group of eight."""
    v = pad_tokens(pad_states(v), p, channels=False)
    if valid is not None:
        v = jnp.where(valid[..., None], v, 0)
    own = jnp.arange(SUBLANES) == (jnp.arange(p.time) % SUBLANES)[:, None]
    parts = v.reshape(*v.shape[:2], -1, 1, min(v.shape[-1], PART))
    return jnp.where(own[:, None, :, None], parts, 0).reshape(*v.shape[:2], -1)


def flags(reset, valid, length: int, p: Plan):
    """(reset, valid) of the padded length; padding of our own counts as such."""
    if valid is None and p.time != length:
        valid = jnp.ones((1, length), bool)
    return tuple(None if v is None else jnp.pad(v, ((0, 0), (0, p.time - v.shape[1]))) for v in (reset, valid))


def token_maps(given, reset, valid, p: Plan, tokens: int, exact: bool) -> jax.Array:
    """[B, T / tokens, rows, tokens up to whole lanes]: the [B, T, N] given, then (not reset, valid) if either is there.

    In float32, or, unless `exact`, two bfloat16 in an int32: rows i and i + rows / 2.
    """
    batch = given[0].shape[0]
    rows = [pad_tokens(pad_states(v.astype(jnp.float32)), p, channels=False) for v in given]
    if valid is not None:
        rows = [jnp.where(valid[..., None], v, 0.0) for v in rows]
    if reset is not None or valid is not None:
        kept = (~reset if reset is not None else True, valid if valid is not None else True)
        rows += [jnp.broadcast_to(v, (batch, p.time)).astype(jnp.float32)[..., None] for v in kept]
    maps = jnp.concatenate(rows, axis=-1)
    maps = jnp.pad(maps, ((0, 0), (0, 0), (0, -maps.shape[-1] % (SUBLANES if exact else 2 * SUBLANES))))
    if not exact:
        bits = jax.lax.bitcast_convert_type(maps.astype(jnp.bfloat16), jnp.uint16).astype(jnp.int32)
        low, high = jnp.split(bits, 2, axis=-1)
        maps = low | (high << 16)
    maps = jnp.swapaxes(maps.reshape(batch, p.time // tokens, tokens, -1), -1, -2)
    return jnp.pad(maps, ((0, 0), (0, 0), (0, 0), (0, -tokens % LANES)))


def vectors(D, dt_bias, p: Plan) -> jax.Array:
    """float32 [2, channels]: D and dt_bias, zeros for None."""
    zero = jnp.zeros((p.channels,), jnp.float32)
    rows = [zero if v is None else jnp.pad(v.astype(jnp.float32), (0, p.channels - v.shape[0])) for v in (D, dt_bias)]
    return jnp.stack(rows)


# ---- pieces of a kernel ---------------------------------------------------------------------------------------


def tile_rows(j: int):
    """Where the j-th tile of eight tokens and 128 channels lies in a group of the scratch arrays."""
    return pl.ds(j * SUBLANES, SUBLANES)


def lanes(j: int):
    """The j-th 128 channels of a block."""
    return pl.ds(j * LANES, LANES)


def spread(maps_ref, table, tokens: int, s) -> None:
    """Writes table[t * rows + i] = maps[i, t] in every lane."""

    def write(t, v):
        table[pl.ds(pl.multiple_of(t * s.rows, SUBLANES), s.rows), :] = v

    def numbers(maps):
        """float32 of the words that `token_maps` makes."""
        if s.exact:
            return maps
        halves = maps << 16, maps & jnp.int32(-(1 << 16))
        return jnp.concatenate([jax.lax.bitcast_convert_type(v, jnp.float32) for v in halves])

    def permuted(maps, lane):
        return numbers(jnp.broadcast_to(maps[:, lane : lane + 1], (maps.shape[0], LANES)))

    if tokens % LANES == 0:
        some = 4 if tokens % (4 * LANES) == 0 else 1

        @functools.partial(jax.lax.fori_loop, 0, tokens // LANES // some, init_val=None)
        def _(i, _):
            starts = [pl.multiple_of((i * some + k) * LANES, LANES) for k in range(some)]
            maps = [maps_ref[0, 0, :, pl.ds(start, LANES)] for start in starts]
            # Permuted lanes come at two thirds of the rate of stores; the matrix unit can spread a lane as well.
            others = [] if s.exact else list(range(1, LANES, 2))
            for start, v in zip(starts, maps, strict=True):
                if others:
                    v = numbers(v)
                    lane = jax.lax.broadcasted_iota(jnp.int32, v.shape, 1)
                    own = jnp.concatenate([jnp.where(lane == t, v, 0.0) for t in others])
                    v = s.product(own, jnp.ones((LANES, LANES), jnp.float32))
                for k, t in enumerate(others):
                    write(start + t, v[k * s.rows : (k + 1) * s.rows])
            for t in range(LANES):
                if t not in others:
                    for start, v in zip(starts, maps, strict=True):
                        write(start + t, permuted(v, t))
    else:

        @functools.partial(jax.lax.fori_loop, 0, tokens // SUBLANES, init_val=None)
        def _(g, _):
            whole, within = (f(g, LANES // SUBLANES) for f in (jax.lax.div, jax.lax.rem))
            maps = maps_ref[0, 0, :, pl.ds(pl.multiple_of(whole * LANES, LANES), LANES)]
            maps = pltpu.roll(maps, LANES - within * SUBLANES, 1)
            for t in range(SUBLANES):
                write(g * SUBLANES + t, permuted(maps, t))


def group_tokens(g):
    """The eight tokens of a group in a block."""
    return pl.ds(g * SUBLANES if isinstance(g, int) else pl.multiple_of(g * SUBLANES, SUBLANES), SUBLANES)


def softplus(v, exact: bool = True):
    """log(1 + exp(v)), to 1e-5 of itself also where exp(v) is lost in 1 + exp(v); or else to 4e-4, in half the work."""
    if not exact:
        # Rounded up, 1 + e gives too large a logarithm at most; e itself is one too, and the better where e is small.
        e = jnp.exp(jnp.minimum(v, 80.0))
        return jnp.maximum(jnp.minimum(jnp.log((1.0 + 2.0**-23) + e), e), v)
    e = jnp.exp(-jnp.abs(v))
    # Not by the rounding error of 1 + e: a compiler may simplify (1 + e) - 1. The best line for log(1 + e) / e below
    # 2^-7, to 2.6e-6.
    series = e * ((1.0 - SMALL**2 / 24) - e * (0.5 - SMALL / 3))
    return jnp.maximum(v, 0.0) + jnp.where(e < SMALL, series, jnp.log(1.0 + e))


def silu(v):
    """v * sigmoid(v) through the hyperbolic tangent, which is one instruction."""
    half = 0.5 * v
    return half + half * jnp.tanh(half)


def for_parts(s: "Static", body, carry):
    """Runs carry = body(i, carry) for every part of the states, some at a time."""
    if s.states <= STATES_UNROLLED:
        for i in range(s.states // s.part):
            carry = body(i, carry)
        return carry
    return jax.lax.fori_loop(0, s.states // s.part, body, carry)


@dataclasses.dataclass(frozen=True)
class Static:
    """What a kernel knows when it is built."""

    plan: Plan
    states: int
    maps: int  # of N rows in the table: B, and C for the backward pass; the flags follow
    rows: int  # of the table, per token
    dt_softplus: bool
    skip: bool
    gate: bool
    bias: bool
    reset: bool
    valid: bool
    exact: bool  # float32 throughout; otherwise products of the matrix unit may round their operands

    @property
    def part(self) -> int:
        """States that are run together: those of eight tokens are the weights of one product."""
        return min(self.states, PART)

    def valid_tile(self, table, g):
        """Which of the eight tokens of a group are valid, bool [8, 128], or None."""
        if not self.valid:
            return None
        start = g * SUBLANES * self.rows + self.maps * self.states + 1
        return table[pl.ds(start, SUBLANES, stride=self.rows), :] > 0.0

    def product(self, a, b, transposed: bool = False):
        """a b, or a b^T, by the matrix unit."""
        precision = jax.lax.Precision.HIGHEST if self.exact else jax.lax.Precision.DEFAULT
        dims = (((1,), (1 if transposed else 0,)), ((), ()))
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def select(mask, v):
    """v where the mask holds and zero elsewhere; no mask holds everywhere."""
    return v if mask is None else jnp.where(mask, v, 0.0)


def is_exact(*arrays) -> bool:
    """Whether any of the arrays of tokens is in float32: then products of the matrix unit are exact to float32."""
    return any(v is not None and v.dtype == jnp.float32 for v in arrays)


def static_of(p: Plan, given: int, maps, A, D, z, dt_bias, reset, valid, dt_softplus, exact) -> Static:
    """Describes a call."""
    options = (v is not None for v in (D, z, dt_bias, reset, valid))
    rows = maps.shape[-2] * (1 if exact else 2)
    return Static(p, padded(A.shape[1]), given, rows, dt_softplus, *options, exact=exact)


def _kernel(*refs, s: Static, carried: bool, save: bool):
    p, tiles, n = s.plan, s.plan.tiles, s.states
    refs = list(refs)
    x_ref, dt_ref, maps_ref, C_ref, A_ref, vectors_ref = (refs.pop(0) for _ in range(6))
    z_ref = refs.pop(0) if s.gate else None
    state_ref = refs.pop(0) if carried else None
    y_ref, new_state_ref = refs.pop(0), refs.pop(0)
    boundaries_ref = refs.pop(0) if save else None
    table, steps, inputs, skips, h_ref = refs
    t, d = pl.program_id(1), pl.program_id(2)

    @pl.when(t == 0)
    def _():
        h_ref[d] = jnp.zeros(h_ref.shape[1:], jnp.float32) if state_ref is None else state_ref[0, d]

    def prepare(g, j, buffer):
        tokens, here = group_tokens(g), (buffer, tile_rows(j))
        mask = s.valid_tile(table, g)
        step = dt_ref[0, tokens, lanes(j)].astype(jnp.float32)
        if s.bias:
            step = step + vectors_ref[1:2, lanes(j)]
        if s.dt_softplus:
            step = softplus(step, s.exact)
        step = select(mask, step)
        x = select(mask, x_ref[0, tokens, lanes(j)].astype(jnp.float32))
        steps[here] = step
        inputs[here] = step * x
        if s.skip:
            skips[here] = vectors_ref[0:1, lanes(j)] * x

    def recur(g, j, buffer):
        def part(i, y):
            first, shape = i * s.part, (s.part, LANES)
            states, history = pl.ds(first, s.part), []
            h, A = h_ref[d, states, lanes(j)], A_ref[d, states, lanes(j)]
            for r in range(SUBLANES):
                row, start = pl.ds(j * SUBLANES + r, 1), (g * SUBLANES + r) * s.rows
                if r >= p.rows:
                    history.append(h)
                    continue
                if s.reset:
                    kept = jnp.broadcast_to(table[pl.ds(start + s.maps * n, 1), :], shape)
                    h = jnp.where(kept > 0.0, h, 0.0)
                dt = jnp.broadcast_to(steps[buffer, row, :], shape)
                u = jnp.broadcast_to(inputs[buffer, row, :], shape)
                B = table[pl.ds(start + first, s.part), :]
                h = jnp.exp2(dt * A) * h + u * B
                history.append(h)
            h_ref[d, states, lanes(j)] = h
            C = C_ref[0, group_tokens(g), pl.ds(first * SUBLANES, s.part * SUBLANES)]
            return y + s.product(C, jnp.concatenate(history))

        return for_parts(s, part, jnp.zeros((SUBLANES, LANES), jnp.float32))

    def finish(g, j, buffer, y):
        tokens = group_tokens(g)
        if s.skip:
            y = y + skips[buffer, tile_rows(j), :]
        if z_ref is not None:
            y = y * silu(z_ref[0, tokens, lanes(j)].astype(jnp.float32))
        y_ref[0, tokens, lanes(j)] = select(s.valid_tile(table, g), y).astype(y_ref.dtype)

    # While a group goes through the recurrence the one that follows is prepared. What is computed for a group too many
    # is not used.
    groups, per_chunk = p.block_chunks * p.chunk // SUBLANES, p.chunk // SUBLANES

    def keep(g, k):
        """Writes the state before a chunk; g is k modulo UNROLL."""
        if boundaries_ref is None:
            return
        index, within = (f(g, per_chunk) for f in (jax.lax.div, jax.lax.rem))

        def write(boundaries_ref=boundaries_ref):
            boundaries_ref[0, index] = h_ref[d]

        if UNROLL % per_chunk == 0:
            if k % per_chunk == 0:
                write()
        elif k == 0 or per_chunk % UNROLL:
            pl.when(within == 0)(write)

    def group(g, k):
        keep(g, k)
        buffer, after = k % 2, jnp.minimum(g + 1, groups - 1)
        for j in range(tiles):
            prepare(after, j, 1 - buffer)
            finish(g, j, buffer, recur(g, j, buffer))

    pl.when(d == 0)(lambda: spread(maps_ref, table, groups * SUBLANES, s))
    for j in range(tiles):
        prepare(0, j, 0)

    @functools.partial(jax.lax.fori_loop, 0, groups // UNROLL, init_val=None)
    def _(i, _):
        for k in range(UNROLL):
            group(UNROLL * i + k, k)

    for g in range(groups // UNROLL * UNROLL, groups):
        group(g, g % UNROLL)

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        new_state_ref[0, d] = h_ref[d]


def forward(x, dt, A, B, C, D, z, dt_bias, state, reset, valid, *, dt_softplus: bool, chunk_size: int, save: bool):
    """Returns (y [B, T, Di], new_state [B, Di, N], boundaries), as `xla.forward` does."""
    supports(x, dt, A, B, C, D, z, dt_bias, state, reset, valid, dt_softplus=dt_softplus, chunk_size=chunk_size)
    if x.shape[1] == 1:  # a single token is elementwise: XLA passes over the state once, in the layout that it has
        given = (x, dt, A, B, C, D, z, dt_bias, state, reset, valid)
        return xla.forward(*given, dt_softplus=dt_softplus, chunk_size=chunk_size, save=save)
    (batch, length, channels), states = x.shape, padded(A.shape[1])
    p = blocked(plan(length, channels, chunk_size), states, BLOCK_TOKENS)
    tokens = p.chunk * p.block_chunks
    reset, valid = flags(reset, valid, length, p)
    exact = is_exact(x, dt, B, C, z)
    maps = token_maps((B,), reset, valid, p, tokens, exact)
    s = static_of(p, 1, maps, A, D, z, dt_bias, reset, valid, dt_softplus, exact)
    by_channel = pl.BlockSpec((1, tokens, p.width), lambda b, t, d: (b, t, d))
    whole = (p.blocks, states, p.width)
    state_spec = pl.BlockSpec((1, *whole), lambda b, t, d: (b, 0, 0, 0))
    arrays: list[Any] = [
        pad_tokens(x, p),
        pad_tokens(dt, p),
        maps,
        diagonal(C, valid, p),
        by_block(A, p) / math.log(2),
        vectors(D, dt_bias, p),
    ]
    specs = [
        by_channel,
        by_channel,
        pl.BlockSpec((1, 1, *maps.shape[2:]), lambda b, t, d: (b, t, 0, 0)),
        pl.BlockSpec((1, tokens, SUBLANES * states), lambda b, t, d: (b, t, 0)),
        pl.BlockSpec(whole, lambda b, t, d: (0, 0, 0)),
        pl.BlockSpec((2, p.width), lambda b, t, d: (0, d)),
    ]
    if z is not None:
        arrays.append(pad_tokens(z, p))
        specs.append(by_channel)
    if state is not None:
        arrays.append(by_block(state, p))
        specs.append(state_spec)
    out_shape = [
        jax.ShapeDtypeStruct((batch, p.time, p.channels), x.dtype),
        jax.ShapeDtypeStruct((batch, *whole), jnp.float32),
    ]
    out_specs = [by_channel, state_spec]
    shapes = [(tokens * s.rows, LANES), *[(2, p.tiles * SUBLANES, LANES)] * 3, whole]
    if save:
        out_shape.append(jax.ShapeDtypeStruct((batch, p.chunks, states, p.channels), jnp.float32))
        out_specs.append(pl.BlockSpec((1, p.block_chunks, states, p.width), lambda b, t, d: (b, t, 0, d)))
    y, new_state, *boundaries = pl.pallas_call(
        functools.partial(_kernel, s=s, carried=state is not None, save=save),
        grid=(batch, p.chunks // p.block_chunks, p.blocks),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret.parameters(),
        name="selective_scan_forward",
    )(*arrays)
    return (
        y[:, :length, :channels],
        from_by_block(new_state, channels, A.shape[1]),
        boundaries[0][:, :, : A.shape[1], :channels] if save else None,
    )

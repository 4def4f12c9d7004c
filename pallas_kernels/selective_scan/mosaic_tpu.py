"""Selective scan as a TPU kernel: the forward pass, and what it shares with the backward pass.

A vector register holds eight states of 128 channels: a token takes N exponentials and 4 N other operations of the
vector unit, which bounds the kernel. The sum over states of eight tokens is a product of the matrix unit, of the
block-diagonal C of those tokens with their states. A token's step is a row of memory that a load repeats on all
sublanes; B_t[n] is spread over the lanes once per block of tokens, for all channels.
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
MAX_TOKENS = 128  # of a chunk or a block: `spread` is unrolled over them
TOGETHER = 2  # tiles of 128 channels that share the loads of B
SMALL = 2.0**-7  # below it softplus is a series
PASS = 4  # tokens that go through all states together
STATES_UNROLLED = 16  # more would only make the program longer
VMEM_LIMIT = 64 * 2**20  # of 128 MiB; the default of 16 does not hold a long chunk's history


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut into blocks."""

    chunk: int  # tokens between saved states
    chunks: int
    block_chunks: int  # chunks of a forward block
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
    def passes(self) -> list[range]:
        """The tokens of a group that go through all states together: what belongs to them stays in registers."""
        return [range(r, min(r + PASS, self.rows)) for r in range(0, self.rows, PASS)]

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


def by_state(v: jax.Array, p: Plan) -> jax.Array:
    """[..., Di, N] -> float32 [..., blocks, N, tiles, 128]."""
    v = jnp.swapaxes(v.astype(jnp.float32), -1, -2)
    pad = [(0, 0)] * (v.ndim - 1) + [(0, p.blocks * p.width - v.shape[-1])]
    v = jnp.pad(v, pad).reshape(*v.shape[:-1], p.blocks, p.tiles, LANES)
    return jnp.moveaxis(v, -3, -4)


def from_by_state(v: jax.Array, channels: int) -> jax.Array:
    """The inverse of `by_state`."""
    v = jnp.moveaxis(v, -4, -3)
    v = v.reshape(*v.shape[:-3], -1)[..., :channels]
    return jnp.swapaxes(v, -1, -2)


def flags(reset, valid, length: int, p: Plan):
    """(reset, valid) of the padded length; padding of our own counts as such."""
    if valid is None and p.time != length:
        valid = jnp.ones((1, length), bool)
    return tuple(None if v is None else jnp.pad(v, ((0, 0), (0, p.time - v.shape[1]))) for v in (reset, valid))


def token_maps(given, reset, valid, p: Plan, tokens: int) -> jax.Array:
    """float32 [B, T / tokens, rows, tokens]: the [B, T, N] given, then (not reset, valid) when either is given."""
    batch = given[0].shape[0]
    rows = [pad_tokens(v.astype(jnp.float32), p, channels=False) for v in given]
    if valid is not None:
        rows = [jnp.where(valid[..., None], v, 0.0) for v in rows]
    if reset is not None or valid is not None:
        kept = (~reset if reset is not None else True, valid if valid is not None else True)
        rows += [jnp.broadcast_to(v, (batch, p.time)).astype(jnp.float32)[..., None] for v in kept]
    maps = jnp.concatenate(rows, axis=-1)
    maps = jnp.pad(maps, ((0, 0), (0, 0), (0, -maps.shape[-1] % SUBLANES)))
    return jnp.swapaxes(maps.reshape(batch, p.time // tokens, tokens, -1), -1, -2)


def vectors(D, dt_bias, p: Plan) -> jax.Array:
    """float32 [2, channels]: D and dt_bias, zeros for None."""
    zero = jnp.zeros((p.channels,), jnp.float32)
    rows = [zero if v is None else jnp.pad(v.astype(jnp.float32), (0, p.channels - v.shape[0])) for v in (D, dt_bias)]
    return jnp.stack(rows)


# ---- pieces of a kernel ---------------------------------------------------------------------------------------


def tile_rows(j: int):
    """Where the j-th tile of eight tokens and 128 channels lies in a group of the scratch arrays."""
    return pl.ds(j * SUBLANES, SUBLANES)


def token_row(r: int, tiles: int):
    """Where all channels of the r-th token lie in a group of the scratch arrays."""
    return pl.ds(r, tiles, stride=SUBLANES) if tiles > 1 else pl.ds(r, 1)


def lanes(j: int):
    """The j-th 128 channels of a block."""
    return pl.ds(j * LANES, LANES)


def spread(maps_ref, table) -> None:
    """Writes table[t * rows + i] = maps[i, t] in every lane."""
    rows, tokens = maps_ref.shape[-2:]
    maps = maps_ref[0, 0]
    for t in range(tokens):
        table[pl.ds(t * rows, rows), :] = jnp.broadcast_to(maps[:, t : t + 1], (rows, LANES))


def group_tokens(g):
    """The eight tokens of a group in a block."""
    return pl.ds(g * SUBLANES if isinstance(g, int) else pl.multiple_of(g * SUBLANES, SUBLANES), SUBLANES)


def softplus(v):
    """log(1 + exp(v)), to 1e-5 of itself also where exp(v) is lost in 1 + exp(v)."""
    e = jnp.exp(-jnp.abs(v))
    # Not by the rounding error of 1 + e: a compiler may simplify (1 + e) - 1. The best line for log(1 + e) / e below
    # 2^-7, to 2.6e-6.
    series = e * ((1.0 - SMALL**2 / 24) - e * (0.5 - SMALL / 3))
    return jnp.maximum(v, 0.0) + jnp.where(e < SMALL, series, jnp.log(1.0 + e))


def silu(v):
    """v * sigmoid(v) through the hyperbolic tangent, which is one instruction."""
    half = 0.5 * v
    return half + half * jnp.tanh(half)


def for_states(states: int, body, carry):
    """Runs carry = body(n, carry) for every state index, some at a time."""
    unroll = states if states <= STATES_UNROLLED else math.gcd(states, STATES_UNROLLED)

    def step(i, carry):
        for k in range(unroll):
            carry = body(i * unroll + k, carry)
        return carry

    return step(0, carry) if unroll == states else jax.lax.fori_loop(0, states // unroll, step, carry)


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

    def map_row(self, table, token, index, shape):
        """One entry of B (index n), C (N + n) or the flags (2 N, 2 N + 1), in every lane and sublane."""
        return jnp.broadcast_to(table[pl.ds(token * self.rows + index, 1), :], shape)

    def valid_tile(self, table, g):
        """Which of the eight tokens of a group are valid, bool [8, 128], or None."""
        if not self.valid:
            return None
        start = g * SUBLANES * self.rows + self.maps * self.states + 1
        return table[pl.ds(start, SUBLANES, stride=self.rows), :] > 0.0


def select(mask, v):
    """v where the mask holds and zero elsewhere; no mask holds everywhere."""
    return v if mask is None else jnp.where(mask, v, 0.0)


def static_of(p: Plan, given: int, maps, A, D, z, dt_bias, reset, valid, dt_softplus) -> Static:
    """Describes a call."""
    options = (v is not None for v in (D, z, dt_bias, reset, valid))
    return Static(p, A.shape[1], given, maps.shape[-2], dt_softplus, *options)


def bounce_shape(p: Plan, states: int) -> tuple[int, int]:
    """Shape of the scratch array through which a state goes from one layout to another."""
    return -(-states // SUBLANES) * p.tiles * SUBLANES, LANES


def bounce_row(n: int, tiles: int):
    """Where state index n lies there, for all channels of a block."""
    return token_row(n // SUBLANES * tiles * SUBLANES + n % SUBLANES, tiles)


def bounce_tiles(states: int, tiles: int):
    """(rows of the bounce, states, lanes) of every tile."""
    for n in range(0, states, SUBLANES):
        rows = min(SUBLANES, states - n)
        for j in range(tiles):
            yield pl.ds((n // SUBLANES * tiles + j) * SUBLANES, rows), pl.ds(n, rows), lanes(j)


def _kernel(*refs, s: Static, carried: bool, save: bool):
    p, tiles, n = s.plan, s.plan.tiles, s.states
    refs = list(refs)
    x_ref, dt_ref, maps_ref, C_ref, A_ref, vectors_ref = (refs.pop(0) for _ in range(6))
    z_ref = refs.pop(0) if s.gate else None
    state_ref = refs.pop(0) if carried else None
    y_ref, new_state_ref = refs.pop(0), refs.pop(0)
    boundaries_ref = refs.pop(0) if save else None
    table, steps, inputs, h_ref = refs
    t, d = pl.program_id(1), pl.program_id(2)

    pl.when(d == 0)(lambda: spread(maps_ref, table))

    @pl.when(t == 0)
    def _():
        h_ref[d] = jnp.zeros(h_ref.shape[1:], jnp.float32) if state_ref is None else state_ref[0, d]

    def prepare(g, j, buffer):
        tokens = group_tokens(g)
        mask = s.valid_tile(table, g)
        step = dt_ref[0, tokens, lanes(j)].astype(jnp.float32)
        if s.bias:
            step = step + vectors_ref[1:2, lanes(j)]
        if s.dt_softplus:
            step = softplus(step)
        step = select(mask, step)
        steps[buffer, tile_rows(j), :] = step
        inputs[buffer, tile_rows(j), :] = step * select(mask, x_ref[0, tokens, lanes(j)].astype(jnp.float32))

    def recur(g, some, buffer):
        h = [h_ref[d, :, lanes(j)] for j in some]
        history = [[] for _ in some]
        for r in range(SUBLANES):
            start = (g * SUBLANES + r) * s.rows
            B = table[pl.ds(start, n), :]
            for i, j in enumerate(some):
                row = pl.ds(j * SUBLANES + r, 1)
                if s.reset:
                    kept = jnp.broadcast_to(table[pl.ds(start + s.maps * n, 1), :], (n, LANES))
                    h[i] = jnp.where(kept > 0.0, h[i], 0.0)
                dt = jnp.broadcast_to(steps[buffer, row, :], (n, LANES))
                u = jnp.broadcast_to(inputs[buffer, row, :], (n, LANES))
                h[i] = jnp.exp2(dt * A_ref[d, :, lanes(j)]) * h[i] + u * B
                history[i].append(h[i])
        for i, j in enumerate(some):
            h_ref[d, :, lanes(j)] = h[i]
        precision = jax.lax.Precision.HIGHEST if y_ref.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
        C = C_ref[0, group_tokens(g), :].astype(jnp.float32)
        return [
            jnp.dot(C, jnp.concatenate(v), precision=precision, preferred_element_type=jnp.float32) for v in history
        ]

    def finish(g, j, y):
        tokens = group_tokens(g)
        mask = s.valid_tile(table, g)
        if s.skip:
            y = y + vectors_ref[0:1, lanes(j)] * x_ref[0, tokens, lanes(j)].astype(jnp.float32)
        if z_ref is not None:
            y = y * silu(z_ref[0, tokens, lanes(j)].astype(jnp.float32))
        y_ref[0, tokens, lanes(j)] = select(mask, y).astype(y_ref.dtype)

    groups = p.block_chunks * p.chunk // SUBLANES

    def group(g, buffer):
        if boundaries_ref is not None:
            index, within = (f(g, p.chunk // SUBLANES) for f in (jax.lax.div, jax.lax.rem))

            @pl.when(within == 0)
            def _(boundaries_ref=boundaries_ref):
                boundaries_ref[0, index] = h_ref[d]

        following = jnp.minimum(g + 1, groups - 1)
        for first in range(0, tiles, TOGETHER):
            some = range(first, min(first + TOGETHER, tiles))
            for j in some:
                prepare(following, j, 1 - buffer)
            for j, y in zip(some, recur(g, some, buffer), strict=True):
                finish(g, j, y)

    for j in range(tiles):
        prepare(0, j, 0)

    @functools.partial(jax.lax.fori_loop, 0, groups // 2, init_val=None)
    def _(i, _):
        group(2 * i, 0)
        group(2 * i + 1, 1)

    if groups % 2:
        group(groups - 1, 0)

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        new_state_ref[0, d] = h_ref[d]


def by_block(v, p):
    """[..., Di, N] -> float32 [..., blocks, N, width]."""
    v = by_state(v, p)
    return v.reshape(*v.shape[:-2], p.width)


def diagonal(C, valid, p, dtype):
    """[B, T, 8 N]: the row of token t holds C_t at the place of t in its group of eight."""
    C = pad_tokens(C.astype(dtype), p, channels=False)
    if valid is not None:
        C = jnp.where(valid[..., None], C, 0)
    own = jnp.arange(SUBLANES) == (jnp.arange(p.time) % SUBLANES)[:, None]
    return jnp.where(own[None, :, :, None], C[:, :, None, :], 0).reshape(*C.shape[:2], -1)


def forward(x, dt, A, B, C, D, z, dt_bias, state, reset, valid, *, dt_softplus: bool, chunk_size: int, save: bool):
    """Returns (y [B, T, Di], new_state [B, Di, N], boundaries), as `xla.forward` does."""
    supports(x, dt, A, B, C, D, z, dt_bias, state, reset, valid, dt_softplus=dt_softplus, chunk_size=chunk_size)
    if x.shape[1] == 1:  # a single token is elementwise: XLA passes over the state once, in the layout that it has
        given = (x, dt, A, B, C, D, z, dt_bias, state, reset, valid)
        return xla.forward(*given, dt_softplus=dt_softplus, chunk_size=chunk_size, save=save)
    (batch, length, channels), states = x.shape, A.shape[1]
    p = plan(length, channels, chunk_size)
    tokens = p.chunk * p.block_chunks
    reset, valid = flags(reset, valid, length, p)
    maps = token_maps((B,), reset, valid, p, tokens)
    s = static_of(p, 1, maps, A, D, z, dt_bias, reset, valid, dt_softplus)
    by_channel = pl.BlockSpec((1, tokens, p.width), lambda b, t, d: (b, t, d))
    whole = (p.blocks, states, p.width)
    state_spec = pl.BlockSpec((1, *whole), lambda b, t, d: (b, 0, 0, 0))
    arrays: list[Any] = [
        pad_tokens(x, p),
        pad_tokens(dt, p),
        maps,
        diagonal(C, valid, p, x.dtype),
        by_block(A, p) / math.log(2),
        vectors(D, dt_bias, p),
    ]
    specs = [
        by_channel,
        by_channel,
        pl.BlockSpec((1, 1, s.rows, tokens), lambda b, t, d: (b, t, 0, 0)),
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
    group = (2, p.tiles * SUBLANES, LANES)
    scratch = [pltpu.VMEM((tokens * s.rows, LANES), jnp.float32), *[pltpu.VMEM(group, jnp.float32)] * 2]
    scratch.append(pltpu.VMEM(whole, jnp.float32))
    if save:
        out_shape.append(jax.ShapeDtypeStruct((batch, p.chunks, states, p.channels), jnp.float32))
        out_specs.append(pl.BlockSpec((1, p.block_chunks, states, p.width), lambda b, t, d: (b, t, 0, d)))
    y, new_state, *boundaries = pl.pallas_call(
        functools.partial(_kernel, s=s, carried=state is not None, save=save),
        grid=(batch, p.chunks // p.block_chunks, p.blocks),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret.parameters(),
        name="selective_scan_forward",
    )(*arrays)
    return (
        y[:, :length, :channels],
        from_by_state(new_state.reshape(*new_state.shape[:-1], p.tiles, LANES), channels),
        boundaries[0][..., :channels] if save else None,
    )

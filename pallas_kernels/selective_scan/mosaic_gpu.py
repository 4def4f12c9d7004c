"""Selective scan as a Mosaic GPU kernel for Hopper: the forward pass, and what the backward pass shares with it.

Never run on a GPU: interpreted on a CPU and lowered for CUDA, no more.

A block of threads takes 128 channels of one row and walks over time, a channel per thread with its N states and decay
rates in registers; the sum over states stays within the thread. B and C come as one float32 array, the states past
N that make their copies whole multiples of 128 bytes being zeros, and every thread reads all of a token's from shared
memory. Softplus, skip and gate are part of the kernel, so x, dt, z and y move once.

The exponentials, N per token and channel, weigh more than the memory. Time is not split: B * Di / 128 blocks are all
there is to fill the chip with.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, interpret, warpgroup
from pallas_kernels.selective_scan import xla
from pallas_kernels.warpgroup import CHANNELS, GROUP, SHARED, Group, channels_of, row, rows_of

MAX_STATES = 32  # a thread's registers hold the states, the decay rates and, backward, two gradients
DTYPES = ("float32", "bfloat16")
TOGETHER = 4  # tokens that are loaded together


def refuse(what: str) -> None:
    """Raises the error of an argument that is not honoured."""
    raise dispatch.UnsupportedError(f"selective_scan: mosaic_gpu does not {what}")


def supports(x, dt, A, B, C, D, z, dt_bias, state, reset, valid, *, dt_softplus, chunk_size, save=False) -> None:
    """Raises UnsupportedError for what the kernel does not honour."""
    named = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    for name, array in named.items():
        if array is not None and jnp.dtype(array.dtype).name not in DTYPES:
            refuse(f"compute in {array.dtype}: {name} must be one of {DTYPES}")
    if A.shape[1] > MAX_STATES:
        refuse(f"hold N={A.shape[1]} states in registers: A may have at most {MAX_STATES}")
    if chunk_size < x.shape[1] and chunk_size % GROUP:
        nearest = warpgroup.round_up(chunk_size, GROUP)
        refuse(f"cut groups of tokens: chunk_size={chunk_size} must be a multiple of {GROUP}, such as {nearest}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one call, and which of the optional arguments it has."""

    batch: int
    length: int  # tokens, padded to whole tiles
    channels: int  # padded to whole blocks
    states: int  # padded to a multiple of 4
    chunk: int  # tokens between two boundaries, a multiple of `rows`
    rows: int  # tokens per tile
    slots: int  # tiles in flight
    softplus: bool
    gate: bool
    masked: bool

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return self.channels // CHANNELS

    @property
    def tiles(self) -> int:
        """Tiles of tokens."""
        return self.length // self.rows

    def tile(self, dtype):
        """Shared memory for tiles of tokens of 128 channels."""
        return plgpu.SMEM((self.slots, self.rows, CHANNELS), dtype)

    def maps(self):
        """Shared memory for tiles of B and C."""
        return plgpu.SMEM((self.slots, self.rows, 2 * self.states), jnp.float32)

    def of_states(self, count: int):
        """Shared memory for states of 128 channels."""
        return plgpu.SMEM((count, self.states, CHANNELS), jnp.float32)

    def codes(self):
        """Shared memory for the codes of tiles, if there are any."""
        return [plgpu.SMEM((self.slots, warpgroup.CODES), jnp.int32)] if self.masked else []


def forward_plan(x, dt, A, z, reset, valid, *, dt_softplus: bool, chunk_size: int) -> Plan:
    """Tiles of up to 32 tokens that divide a chunk, two to four in flight."""
    batch, length, channels = x.shape
    chunk = warpgroup.round_up(min(chunk_size, length), GROUP)
    rows = next(rows for rows in (32, 16, GROUP) if chunk % rows == 0)
    states = warpgroup.round_up(A.shape[1], 4)
    token_bytes = 2 * x.dtype.itemsize + dt.dtype.itemsize + (0 if z is None else z.dtype.itemsize)
    slot_bytes = rows * (CHANNELS * token_bytes + 8 * states) + 4 * states * CHANNELS
    padded = warpgroup.round_up(length, rows)
    return Plan(
        batch,
        padded,
        warpgroup.round_up(channels, CHANNELS),
        states,
        chunk,
        rows,
        min(4, warpgroup.SMEM_BYTES // slot_bytes),
        dt_softplus,
        z is not None,
        reset is not None or valid is not None or padded != length,
    )


def token_maps(B, C, valid, p: Plan):
    """float32 [B, T, 2 N]: B and C, zeros at padding, which every thread reads."""

    def load(v):
        v = v.astype(jnp.float32) if valid is None else jnp.where(valid[..., None], v.astype(jnp.float32), 0.0)
        return warpgroup.pad(v, p.length, p.states)

    return jnp.concatenate([load(B), load(C)], axis=-1)


def by_state(v, p: Plan):
    """[..., Di, N] -> float32 [..., blocks, N, 128], of which a block is contiguous."""
    v = warpgroup.pad(v.astype(jnp.float32), p.channels, p.states)
    return jnp.swapaxes(v.reshape(*v.shape[:-2], p.blocks, CHANNELS, p.states), -1, -2)


def from_by_state(v, channels: int, states: int):
    """The inverse of `by_state`."""
    v = jnp.swapaxes(v, -1, -2)
    return v.reshape(*v.shape[:-3], -1, v.shape[-1])[..., :channels, :states]


def by_channel(v, p: Plan):
    """[Di] -> float32 [blocks, 128]; zeros for None."""
    v = jnp.zeros((p.channels,), jnp.float32) if v is None else warpgroup.pad(v.astype(jnp.float32), p.channels)
    return v.reshape(p.blocks, CHANNELS)


def softplus(v):
    """log(1 + exp(v)), and exp(-|v|) for its derivative."""
    e = jnp.exp(-jnp.abs(v))
    # log(1 + e) = 2 atanh(e / (2 + e)): a logarithm of 1 + e would lose the small steps that e stands for.
    ratio = e / (2.0 + e)  # at most 1/3, so that seven terms reach float32
    square, series = ratio * ratio, 1 / 13
    for odd in range(11, 0, -2):
        series = series * square + 1 / odd
    return jnp.maximum(v, 0.0) + 2.0 * ratio * series, e


def sigmoid(v):
    """1 / (1 + exp(-v)) without an overflow."""
    return 0.5 + 0.5 * jnp.tanh(0.5 * v)


def load_steps(group: Group, dt_tile, bias, p: Plan):
    """Step sizes [count, 128] after bias and softplus, zeros at padding, and the slope of the softplus or None."""
    v = group.load(dt_tile) + channels_of(bias, group.count)
    if not p.softplus:
        return group.only_valid(v), None
    step, e = softplus(v)
    return group.only_valid(step), jnp.where(v < 0.0, e, 1.0) / (1.0 + e)


def load_maps(maps_tile, slot, t, p: Plan):
    """B and C of token t as two of [N, 128]."""
    both = warpgroup.lay_out(maps_tile[slot, t], SHARED)
    return rows_of(both[: p.states]), rows_of(both[p.states :])


def decay_of(step, A2):
    """exp(dt A) [N, 128] of a step [128]; A2 is A in base two."""
    return jnp.exp2(channels_of(step, A2.shape[0]) * A2)


def _kernel(*refs, p: Plan, save: bool):
    refs = list(refs)
    codes: Any = refs.pop(0) if p.masked else None
    x_ref, dt_ref, maps_ref, A_ref, D_ref, bias_ref, state_ref = (refs.pop(0) for _ in range(7))
    z_ref: Any = refs.pop(0) if p.gate else None
    y_ref, new_state_ref = refs.pop(0), refs.pop(0)
    boundary_ref: Any = refs.pop(0) if save else None
    barrier, x_tile, dt_tile, y_tile, maps_tile = (refs.pop(0) for _ in range(5))
    z_tile: Any = refs.pop(0) if p.gate else None
    edges: Any = refs.pop(0) if save else None
    code_tile: Any = refs.pop(0) if p.masked else None
    here, block = jax.lax.axis_index("row"), jax.lax.axis_index("block")
    channels = pl.ds(block * CHANNELS, CHANNELS)
    per_chunk = p.chunk // p.rows
    A2 = warpgroup.load_global(A_ref.at[block]) * math.log2(math.e)
    skip, bias = (warpgroup.load_global(ref.at[block], warpgroup.CHANNEL) for ref in (D_ref, bias_ref))

    def tokens(step):
        return pl.ds(step * p.rows, p.rows)

    def fetch(step, slot):
        for ref, tile in ((x_ref, x_tile), (dt_ref, dt_tile), *([(z_ref, z_tile)] if p.gate else [])):
            plgpu.copy_gmem_to_smem(ref.at[here, tokens(step), channels], tile.at[slot], barrier.at[slot])
        plgpu.copy_gmem_to_smem(maps_ref.at[here, tokens(step)], maps_tile.at[slot], barrier.at[slot])
        if p.masked:
            plgpu.copy_gmem_to_smem(codes.at[here, step], code_tile.at[slot], barrier.at[slot])

    def store(step, slot):
        plgpu.copy_smem_to_gmem(y_tile.at[slot], y_ref.at[here, tokens(step), channels], commit_group=False)
        if save:

            @pl.when(jax.lax.rem(step, per_chunk) == 0)
            def _():
                to = boundary_ref.at[here, jax.lax.div(step, per_chunk), :, channels]
                plgpu.copy_smem_to_gmem(edges.at[slot], to, commit_group=False)

    def body(step, slot, h):
        if save:
            edges[slot] = h

        def scan(g, h):
            group = Group(code_tile, slot, pl.multiple_of(g * TOGETHER, TOGETHER), TOGETHER)
            dt, _ = load_steps(group, dt_tile, bias, p)
            x = group.load(x_tile)
            z = group.load(z_tile) if p.gate else None
            u = dt * x
            for i in range(TOGETHER):
                B, C = load_maps(maps_tile, slot, group.start + i, p)
                h = decay_of(row(dt, i), A2) * group.clear(i, h) + channels_of(row(u, i), p.states) * B
                y = jnp.sum(h * C, axis=0) + skip * row(x, i)
                if z is not None:
                    y = y * (row(z, i) * sigmoid(row(z, i)))
                group.store(y_tile, i, channels_of(y, 1))
            return h

        return jax.lax.fori_loop(0, p.rows // TOGETHER, scan, h)

    h = warpgroup.load_global(state_ref.at[here, block])
    new_state_ref[here, block] = warpgroup.walk(p.tiles, p.slots, barrier, fetch, body, store, h)


def call(kernel, name: str, p: Plan, codes, operands, out_type, scratch, copies: int, reduction_bytes: int = 2048):
    """Runs a kernel on one block of threads per row and 128 channels.

    Args:
      kernel: takes the codes if there are any, the operands, the results, the barrier, the scratch, and last the tiles
        of codes if there are any.
      name: of the kernel.
      p: sizes.
      codes: of `warpgroup.codes`.
      operands: arrays.
      out_type: shapes and dtypes of the results.
      scratch: shared memory.
      copies: how many copies bring one tile, codes aside.
      reduction_bytes: shared memory for sums over channels.
    """
    assert (codes is not None) == p.masked
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[plgpu.Barrier(num_arrivals=copies + p.masked, num_barriers=p.slots), *scratch, *p.codes()],
        grid=(p.blocks, p.batch),
        grid_names=("block", "row"),
        # A thread shares what it writes with none but the copies, which `walk` waits for.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=reduction_bytes),
        kernel_name=name,
        interpret=interpret.parameters(),
    )(*([codes] if p.masked else []), *operands)


def forward(x, dt, A, B, C, D, z, dt_bias, state, reset, valid, *, dt_softplus: bool, chunk_size: int, save: bool):
    """Returns (y, new_state, boundaries) as `xla.forward` does."""
    static = {"dt_softplus": dt_softplus, "chunk_size": chunk_size}
    if x.shape[1] == 1:  # decoding: XLA fuses a single token with its neighbours
        return xla.forward(x, dt, A, B, C, D, z, dt_bias, state, reset, valid, **static, save=save)
    (batch, length, channels), states = x.shape, A.shape[1]
    p = forward_plan(x, dt, A, z, reset, valid, **static)
    state = jnp.zeros((batch, channels, states), jnp.float32) if state is None else state
    of_tokens = [warpgroup.pad(v, p.length, p.channels) for v in (x, dt)]
    arrays = [*of_tokens, token_maps(B, C, valid, p), by_state(A, p), by_channel(D, p), by_channel(dt_bias, p)]
    arrays.append(by_state(state, p))
    out_type = [
        jax.ShapeDtypeStruct((batch, p.length, p.channels), x.dtype),
        jax.ShapeDtypeStruct((batch, p.blocks, p.states, CHANNELS), jnp.float32),
    ]
    scratch = [p.tile(x.dtype), p.tile(dt.dtype), p.tile(x.dtype), p.maps()]
    if z is not None:
        arrays.append(warpgroup.pad(z, p.length, p.channels))
        scratch.append(p.tile(z.dtype))
    if save:
        out_type.append(jax.ShapeDtypeStruct((batch, -(-length // p.chunk), p.states, p.channels), jnp.float32))
        scratch.append(p.of_states(p.slots))
    y, new_state, *boundaries = call(
        functools.partial(_kernel, p=p, save=save),
        "selective_scan_forward",
        p,
        warpgroup.codes(reset, valid, batch, length, p.tiles, p.rows),
        arrays,
        out_type,
        scratch,
        3 + p.gate,
    )
    boundary = boundaries[0][..., :states, :channels] if save else None
    return y[:, :length, :channels], from_by_state(new_state, channels, states), boundary

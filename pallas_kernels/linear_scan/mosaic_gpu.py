"""Linear recurrence as Mosaic GPU kernels for Hopper: one pass over memory forward, one backward.

Never run on a GPU: interpreted on a CPU and lowered for CUDA, no more.

A block of threads takes 128 channels of one row and walks over time, a channel per thread, the state in a register.
Tiles of tokens come and go by asynchronous copies while it computes on the one before; eight tokens are loaded at a
time, so that the latency of shared memory is paid once in eight tokens. A chunk of the op is walked twice backward:
forwards from its boundary to keep the states before its tokens in shared memory, then backwards through them.

Both passes are bound by memory: forward moves 3 and backward 5 arrays of the size of `a`, the second reading of which
is left to the L2 cache. Time is not split: B * D / 128 blocks are all there is to fill the chip with.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, interpret, warpgroup
from pallas_kernels.linear_scan import xla
from pallas_kernels.warpgroup import CHANNELS, GROUP, Group

MAX_CHUNK = 256  # tokens whose states the backward pass keeps in shared memory, 512 bytes each
DTYPES = ("float32", "bfloat16")


def _supports(a, b, chunk_size: int) -> None:
    for name, array in (("a", a), ("b", b)):
        if jnp.dtype(array.dtype).name not in DTYPES:
            raise dispatch.UnsupportedError(
                f"linear_scan: mosaic_gpu does not compute in {array.dtype}: {name} must be one of {DTYPES}"
            )
    if chunk_size < a.shape[1] and chunk_size % GROUP:
        raise dispatch.UnsupportedError(
            f"linear_scan: mosaic_gpu does not cut groups of tokens: chunk_size={chunk_size} must be a multiple of "
            f"{GROUP}, such as {warpgroup.round_up(chunk_size, GROUP)}"
        )
    if chunk_size > MAX_CHUNK:
        raise dispatch.UnsupportedError(
            f"linear_scan: mosaic_gpu does not hold the states of {chunk_size} tokens in shared memory: "
            f"chunk_size={chunk_size} must be at most {MAX_CHUNK}"
        )


def supports_forward(a, b, state, reset, valid, *, chunk_size: int, save: bool) -> None:
    """Raises UnsupportedError where `forward` does not honour an argument."""
    _supports(a, b, chunk_size)


def supports_backward(a, b, state, reset, valid, boundaries, dh, dstate, *, chunk_size: int) -> None:
    """Raises UnsupportedError where `backward` does not honour an argument."""
    _supports(a, b, chunk_size)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one call."""

    length: int  # tokens, padded to whole chunks
    channels: int  # padded to whole blocks
    chunk: int  # tokens between two boundaries, a multiple of `rows`
    rows: int  # tokens per tile
    slots: int  # tiles in flight


def plan(length: int, channels: int, chunk_size: int, token_bytes: int, kept_bytes: int) -> Plan:
    """Tiles of up to 32 tokens that divide a chunk, as many in flight, up to 4, as shared memory holds.

    Args:
      length: tokens of the sequence.
      channels: size of the channel axis.
      chunk_size: tokens per chunk.
      token_bytes: bytes that one token of one channel takes in the tiles that come and go.
      kept_bytes: bytes that one token of one channel takes for the length of a chunk.
    """
    chunk = warpgroup.round_up(min(chunk_size, length), GROUP)
    rows = next(rows for rows in (32, 16, GROUP) if chunk % rows == 0)
    free = warpgroup.SMEM_BYTES - kept_bytes * CHANNELS * chunk
    slots = 0
    while slots < 2:
        slots = min(4, free // (rows * CHANNELS * token_bytes))
        rows = rows if slots >= 2 else rows // 2
    # The last chunk may be shorter, but not by less than a tile.
    return Plan(warpgroup.round_up(length, rows), warpgroup.round_up(channels, CHANNELS), chunk, rows, slots)


def _group(codes, slot, g) -> Group:
    return Group(codes, slot, pl.multiple_of(g * GROUP, GROUP), GROUP)


def _scan_group(group: Group, h, a_ref, b_ref, put):
    """Runs the recurrence over eight tokens; put(i, before, after) takes the states around token i."""
    a, b = group.load(a_ref, 1.0), group.load(b_ref)
    for i in range(GROUP):
        before = group.clear(i, h)
        h = a[i : i + 1] * before + b[i : i + 1]
        put(i, before, h)
    return h


def _forward_kernel(*refs, p: Plan, masked: bool, save: bool):
    codes: Any = refs[0] if masked else None
    refs = refs[masked:]
    a_ref, b_ref, state_ref, h_ref, new_state_ref, *refs = refs
    boundary_ref: Any = refs[0] if save else None
    refs = refs[save:]
    barrier, a_tile, b_tile, h_tile, *code_tile = refs
    row, block = jax.lax.axis_index("row"), jax.lax.axis_index("block")
    channels, here = pl.ds(block * CHANNELS, CHANNELS), pl.ds(block, 1)

    def tokens(step):
        return pl.ds(step * p.rows, p.rows)

    def fetch(step, slot):
        for ref, tile in ((a_ref, a_tile), (b_ref, b_tile)):
            plgpu.copy_gmem_to_smem(ref.at[row, tokens(step), channels], tile.at[slot], barrier.at[slot])
        if masked:
            plgpu.copy_gmem_to_smem(codes.at[row, step], code_tile[0].at[slot], barrier.at[slot])

    def store(step, slot):
        plgpu.copy_smem_to_gmem(h_tile.at[slot], h_ref.at[row, tokens(step), channels], commit_group=False)

    def body(step, slot, h):
        if save:
            per_chunk = p.chunk // p.rows

            @pl.when(jax.lax.rem(step, per_chunk) == 0)
            def _():
                boundary_ref[row, jax.lax.div(step, per_chunk), here, :] = h

        def scan(g, h):
            group = _group(code_tile[0] if masked else None, slot, g)
            return _scan_group(group, h, a_tile, b_tile, lambda i, _, h: group.store(h_tile, i, h))

        return jax.lax.fori_loop(0, p.rows // GROUP, scan, h)

    h = warpgroup.load_global(state_ref.at[row, here, :])
    h = warpgroup.walk(p.length // p.rows, p.slots, barrier, fetch, body, store, h)
    new_state_ref[row, here, :] = h


def _backward_kernel(*refs, p: Plan, masked: bool):
    codes: Any = refs[0] if masked else None
    refs = refs[masked:]
    a_ref, b_ref, boundary_ref, dh_ref, dstate_ref, da_ref, db_ref, out_ref, *refs = refs
    barrier, a_tile, other_tile, da_tile, db_tile, before, *code_tile = refs
    row, block = jax.lax.axis_index("row"), jax.lax.axis_index("block")
    channels, here = pl.ds(block * CHANNELS, CHANNELS), pl.ds(block, 1)
    tiles = p.length // p.rows
    per_chunk = min(p.chunk // p.rows, tiles)
    tail = tiles % per_chunk or per_chunk  # tiles of the last chunk, the first that is walked

    def locate(step):
        """(chunk, tile of the chunk, whether the step goes back): each chunk is walked forwards, then backwards."""
        first = step < 2 * tail
        past = jnp.maximum(step - 2 * tail, 0)
        count = jnp.where(first, tail, per_chunk)
        chunk = -(-tiles // per_chunk) - 1 - jnp.where(first, 0, 1 + jax.lax.div(past, 2 * per_chunk))
        i = jnp.where(first, step, jax.lax.rem(past, 2 * per_chunk))
        back = i >= count
        return chunk, jnp.where(back, 2 * count - 1 - i, i), back

    def index(step):
        chunk, tile, _ = locate(step)
        return chunk * per_chunk + tile

    def tokens(step):
        return pl.ds(index(step) * p.rows, p.rows)

    def fetch(step, slot):
        def copy(ref, tile):
            plgpu.copy_gmem_to_smem(ref.at[row, tokens(step), channels], tile.at[slot], barrier.at[slot])

        copy(a_ref, a_tile)
        jax.lax.cond(locate(step)[2], lambda: copy(dh_ref, other_tile), lambda: copy(b_ref, other_tile))
        if masked:
            plgpu.copy_gmem_to_smem(codes.at[row, index(step)], code_tile[0].at[slot], barrier.at[slot])

    def store(step, slot):
        @pl.when(locate(step)[2])
        def _():
            for ref, tile in ((da_ref, da_tile), (db_ref, db_tile)):
                plgpu.copy_smem_to_gmem(tile.at[slot], ref.at[row, tokens(step), channels], commit_group=False)

    def body(step, slot, carry):
        chunk, tile, back = locate(step)

        def kept(group, i):
            return pl.ds(tile * p.rows + group.start + i, 1)

        def group_at(g):
            return _group(code_tile[0] if masked else None, slot, g)

        def recompute(h, q):
            def scan(g, h):
                group = group_at(g)

                def keep(i, state, _):
                    before[kept(group, i), :] = state

                return _scan_group(group, h, a_tile, other_tile, keep)

            h = jax.lax.cond(
                tile == 0, lambda h: warpgroup.load_global(boundary_ref.at[row, chunk, here, :]), lambda h: h, h
            )
            return jax.lax.fori_loop(0, p.rows // GROUP, scan, h), q

        def walk_back(h, q):
            def scan(g, q):
                group = group_at(p.rows // GROUP - 1 - g)
                a, dh = group.load(a_tile, 1.0), group.load(other_tile)
                states = warpgroup.load(before.at[pl.ds(tile * p.rows + group.start, GROUP), :])
                for i in reversed(range(GROUP)):
                    g_t = dh[i : i + 1] + q
                    group.store(da_tile, i, g_t * states[i : i + 1])
                    group.store(db_tile, i, g_t)
                    q = group.clear(i, a[i : i + 1] * g_t)
                return q

            return h, jax.lax.fori_loop(0, p.rows // GROUP, scan, q)

        return jax.lax.cond(back, walk_back, recompute, *carry)

    q = warpgroup.load_global(dstate_ref.at[row, here, :])
    _, q = warpgroup.walk(2 * tiles, p.slots, barrier, fetch, body, store, (q, q))
    out_ref[row, here, :] = q


def _call(kernel, name, p: Plan, code, operands, out_type, scratch, copies):
    """Runs the kernel on one block of threads per row and 128 channels; the codes go in front when there are any."""
    batch = operands[0].shape[0]
    if code is not None:
        operands, copies = (code, *operands), copies + 1
        scratch = [*scratch, plgpu.SMEM((p.slots, warpgroup.CODES), jnp.int32)]
    return plgpu.kernel(
        functools.partial(kernel, p=p, masked=code is not None),
        out_type=out_type,
        scratch_types=[plgpu.Barrier(num_arrivals=copies, num_barriers=p.slots), *scratch],
        grid=(p.channels // CHANNELS, batch),
        grid_names=("block", "row"),
        # A thread shares what it writes with none but the copies, which `walk` waits for.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name=name,
        interpret=interpret.parameters(),
    )(*operands)


def _blocks(array, p: Plan):
    """[..., D] -> [..., blocks, 128], of which a block is contiguous."""
    return warpgroup.pad(array, p.channels).reshape(*array.shape[:-1], -1, CHANNELS)


def _channels(array, channels: int):
    """The inverse of `_blocks`."""
    return array.reshape(*array.shape[:-2], -1)[..., :channels]


def _tile(p: Plan, dtype):
    return plgpu.SMEM((p.slots, p.rows, CHANNELS), dtype)


def forward(a, b, state, reset, valid, *, chunk_size: int, save: bool):
    """Returns (h, new_state, boundaries) as `xla.forward` does."""
    batch, length, channels = a.shape
    if length == 1:  # a single token is elementwise: XLA fuses it with its neighbours
        return xla.forward(a, b, state, reset, valid, chunk_size=chunk_size, save=save)
    p = plan(length, channels, chunk_size, a.dtype.itemsize + 2 * b.dtype.itemsize, 0)
    state = jnp.zeros((batch, channels), jnp.float32) if state is None else state
    count = -(-length // p.chunk)
    out_type = [
        jax.ShapeDtypeStruct((batch, p.length, p.channels), b.dtype),
        jax.ShapeDtypeStruct((batch, p.channels // CHANNELS, CHANNELS), jnp.float32),
    ]
    if save:
        out_type.append(jax.ShapeDtypeStruct((batch, count, p.channels // CHANNELS, CHANNELS), jnp.float32))
    h, new_state, *boundaries = _call(
        functools.partial(_forward_kernel, save=save),
        "linear_scan_forward",
        p,
        warpgroup.codes(reset, valid, batch, length, p.length // p.rows, p.rows),
        (*(warpgroup.pad(v, p.length, p.channels) for v in (a, b)), _blocks(state, p)),
        out_type,
        [_tile(p, a.dtype), _tile(p, b.dtype), _tile(p, b.dtype)],
        2,
    )
    boundary = _channels(boundaries[0], channels) if save else None
    return h[:, :length, :channels], _channels(new_state, channels), boundary


def backward(a, b, state, reset, valid, boundaries, dh, dstate, *, chunk_size: int):
    """Returns the gradients of (a, b, state) as `xla.backward` does."""
    batch, length, channels = a.shape
    if length == 1:
        return xla.backward(a, b, state, reset, valid, boundaries, dh, dstate, chunk_size=chunk_size)
    p = plan(length, channels, chunk_size, 2 * (a.dtype.itemsize + b.dtype.itemsize), 4)
    tokens = [warpgroup.pad(v, p.length, p.channels) for v in (a, b, dh)]
    da, db, dstate = _call(
        _backward_kernel,
        "linear_scan_backward",
        p,
        warpgroup.codes(reset, valid, batch, length, p.length // p.rows, p.rows),
        (*tokens[:2], _blocks(boundaries, p), tokens[2], _blocks(dstate, p)),
        [
            jax.ShapeDtypeStruct((batch, p.length, p.channels), a.dtype),
            jax.ShapeDtypeStruct((batch, p.length, p.channels), b.dtype),
            jax.ShapeDtypeStruct((batch, p.channels // CHANNELS, CHANNELS), jnp.float32),
        ],
        [
            *(_tile(p, v.dtype) for v in (a, b, a, b)),
            plgpu.SMEM((p.chunk, CHANNELS), jnp.float32),
        ],
        2,
    )
    da, db = (v[:, :length, :channels] for v in (da, db))
    return da, db, None if state is None else _channels(dstate, channels)

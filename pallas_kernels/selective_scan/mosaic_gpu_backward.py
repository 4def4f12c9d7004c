"""Selective scan as a Mosaic GPU kernel for Hopper: the backward pass, one chunk at a time from the last to the first.

Never run on a GPU: interpreted on a CPU and lowered for CUDA, no more.

A chunk is one tile. It is walked forwards from its boundary to keep the states before every four tokens in shared
memory, then backwards: four tokens' states are computed once more into registers and the adjoint recurrence of
`xla._scan_chunk_backward` runs through them. The gradients of x, dt and z take the places of x, dt and z in shared
memory. dB and dC are sums over channels, thus over threads, two vectors of N per token; blocks of channels write them
apart, as they write what of dA, dD and the bias belongs to a row, and XLA adds them up, always in the same order.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import warpgroup
from pallas_kernels.selective_scan import mosaic_gpu as common
from pallas_kernels.selective_scan import xla
from pallas_kernels.selective_scan.mosaic_gpu import TOGETHER, Plan, sigmoid
from pallas_kernels.warpgroup import CHANNELS, GROUP, Group, channels_of, row

SLOTS = 2
REDUCTION_BYTES = 4096  # sums over threads exchange 512 bytes each, so eight states at a time


def _plan(x, dt, A, z, reset, valid, *, dt_softplus: bool, chunk_size: int) -> Plan:
    """One tile per chunk; the last chunk is padded."""
    p = common.forward_plan(x, dt, A, z, reset, valid, dt_softplus=dt_softplus, chunk_size=chunk_size)
    padded = warpgroup.round_up(x.shape[1], p.chunk)
    masked = p.masked or padded != x.shape[1]
    return dataclasses.replace(p, length=padded, rows=p.chunk, slots=SLOTS, masked=masked)


def smem_bytes(p: Plan, token_bytes: int) -> int:
    """Shared memory of the kernel; `token_bytes` is what x, dt, dy and z take per token and channel."""
    tile = p.rows * (CHANNELS * token_bytes + 2 * 8 * p.states)
    states = 4 * p.states * CHANNELS
    return p.slots * (tile + states) + (p.rows // TOGETHER - 1) * states + REDUCTION_BYTES


def supports(x, dt, A, B, C, D, z, dt_bias, state, reset, valid, *rest, dt_softplus, chunk_size) -> None:
    """Raises UnsupportedError for what the kernel does not honour."""
    static = {"dt_softplus": dt_softplus, "chunk_size": chunk_size}
    common.supports(x, dt, A, B, C, D, z, dt_bias, state, reset, valid, **static)
    if chunk_size > warpgroup.CODES:
        common.refuse(f"keep {chunk_size} tokens in a tile: chunk_size={chunk_size} must be at most {warpgroup.CODES}")
    p = _plan(x, dt, A, z, reset, valid, **static)
    used = smem_bytes(p, _token_bytes(x, dt, z))
    if used > warpgroup.SMEM_BYTES:
        common.refuse(
            f"hold the states of a chunk in shared memory: chunk_size={chunk_size} with N={A.shape[1]} takes {used} "
            f"bytes of {warpgroup.SMEM_BYTES}; take a smaller chunk_size, such as {max(GROUP, chunk_size // 2)}"
        )


def _token_bytes(x, dt, z) -> int:
    return 2 * x.dtype.itemsize + dt.dtype.itemsize + (0 if z is None else z.dtype.itemsize)


def _kernel(*refs, p: Plan):
    refs = list(refs)
    codes: Any = refs.pop(0) if p.masked else None
    x_ref, dt_ref, dy_ref, maps_ref, boundary_ref, A_ref, D_ref, bias_ref, dstate_ref = (refs.pop(0) for _ in range(9))
    z_ref: Any = refs.pop(0) if p.gate else None
    dx_ref, ddt_ref, dmaps_ref, dA_ref, dD_ref, dbias_ref, out_ref = (refs.pop(0) for _ in range(7))
    dz_ref: Any = refs.pop(0) if p.gate else None
    barrier, x_tile, dt_tile, dy_tile, maps_tile, dmaps_tile, boundary, edges = (refs.pop(0) for _ in range(8))
    z_tile: Any = refs.pop(0) if p.gate else None
    code_tile: Any = refs.pop(0) if p.masked else None
    here, block = jax.lax.axis_index("row"), jax.lax.axis_index("block")
    channels = pl.ds(block * CHANNELS, CHANNELS)
    groups = p.rows // TOGETHER
    A2 = warpgroup.load_global(A_ref.at[block]) * math.log2(math.e)
    skip, bias = (warpgroup.load_global(ref.at[block], warpgroup.CHANNEL) for ref in (D_ref, bias_ref))

    def tokens(step):
        return pl.ds((p.tiles - 1 - step) * p.rows, p.rows)

    def fetch(step, slot):
        gate = [(z_ref, z_tile)] if p.gate else []
        for ref, tile in ((x_ref, x_tile), (dt_ref, dt_tile), (dy_ref, dy_tile), *gate):
            plgpu.copy_gmem_to_smem(ref.at[here, tokens(step), channels], tile.at[slot], barrier.at[slot])
        plgpu.copy_gmem_to_smem(maps_ref.at[here, tokens(step)], maps_tile.at[slot], barrier.at[slot])
        before = boundary_ref.at[here, p.tiles - 1 - step, :, channels]
        plgpu.copy_gmem_to_smem(before, boundary.at[slot], barrier.at[slot])
        if p.masked:
            plgpu.copy_gmem_to_smem(codes.at[here, p.tiles - 1 - step], code_tile.at[slot], barrier.at[slot])

    def store(step, slot):
        gate = [(dz_ref, z_tile)] if p.gate else []
        for ref, tile in ((dx_ref, x_tile), (ddt_ref, dt_tile), *gate):
            plgpu.copy_smem_to_gmem(tile.at[slot], ref.at[here, tokens(step), channels], commit_group=False)
        to = dmaps_ref.at[block, here, tokens(step)]
        plgpu.copy_smem_to_gmem(dmaps_tile.at[slot], to, commit_group=False)

    def group_at(g, slot):
        return Group(code_tile, slot, pl.multiple_of(g * TOGETHER, TOGETHER), TOGETHER)

    def recompute(slot):
        def scan(g, h):
            group = group_at(g, slot)
            dt, _ = common.load_steps(group, dt_tile, bias, p)
            u = dt * group.load(x_tile)
            for i in range(TOGETHER):
                B, _ = common.load_maps(maps_tile, slot, group.start + i, p)
                h = common.decay_of(row(dt, i), A2) * group.clear(i, h) + channels_of(row(u, i), p.states) * B
            edges[g] = h
            return h

        jax.lax.fori_loop(0, groups - 1, scan, warpgroup.load(boundary.at[slot]))

    def walk_back(slot, g, carry):
        dh, dA, dD, dbias = carry
        group = group_at(g, slot)
        dt, slope = common.load_steps(group, dt_tile, bias, p)
        x, dy = group.load(x_tile), group.load(dy_tile)
        u, cotangent = dt * x, dy
        if p.gate:
            z = group.load(z_tile)
            opened = sigmoid(z)
            cotangent = dy * (z * opened)
            by_gate = dy * (opened + z * (opened - opened * opened))
        h = jax.lax.cond(
            g == 0,
            lambda: warpgroup.load(boundary.at[slot]),
            lambda: warpgroup.load(edges.at[jnp.maximum(g - 1, 0)]),
        )
        befores, afters = [], []
        for i in range(TOGETHER):
            B, C = common.load_maps(maps_tile, slot, group.start + i, p)
            befores.append(group.clear(i, h))
            h = common.decay_of(row(dt, i), A2) * befores[i] + channels_of(row(u, i), p.states) * B
            afters.append(h)
            if p.gate:
                y = jnp.sum(h * C, axis=0) + skip * row(x, i)
                group.store(z_tile, i, channels_of(row(by_gate, i) * y, 1))
        for i in reversed(range(TOGETHER)):
            B, C = common.load_maps(maps_tile, slot, group.start + i, p)
            x_i, dt_i, g_i = row(x, i), row(dt, i), row(cotangent, i)
            decay = common.decay_of(dt_i, A2)
            wide = channels_of(g_i, p.states)
            dh = dh + wide * C
            exponent = dh * decay * befores[i]
            dA = dA + channels_of(dt_i, p.states) * exponent
            du = jnp.sum(dh * B, axis=0)
            ddt = jnp.sum(exponent * A2, axis=0) * math.log(2) + x_i * du
            if slope is not None:
                ddt = ddt * row(slope, i)
            ddt = row(group.only_valid_row(i, channels_of(ddt, 1)), 0)
            t = group.start + i
            dmaps_tile[slot, t, pl.ds(0, p.states)] = jnp.sum(dh * channels_of(row(u, i), p.states), axis=1)
            dmaps_tile[slot, t, pl.ds(p.states, p.states)] = jnp.sum(wide * afters[i], axis=1)
            group.store(x_tile, i, channels_of(dt_i * du + skip * g_i, 1))
            group.store(dt_tile, i, channels_of(ddt, 1))
            dD, dbias = dD + g_i * x_i, dbias + ddt
            dh = group.clear(i, decay * dh)
        return dh, dA, dD, dbias

    def body(step, slot, carry):
        recompute(slot)
        return jax.lax.fori_loop(0, groups, lambda i, carry: walk_back(slot, groups - 1 - i, carry), carry)

    dh = warpgroup.load_global(dstate_ref.at[here, block])
    carry = (dh, warpgroup.zeros(p.states, CHANNELS), warpgroup.zeros(CHANNELS), warpgroup.zeros(CHANNELS))
    dh, dA, dD, dbias = warpgroup.walk(p.tiles, p.slots, barrier, fetch, body, store, carry, in_place=True)
    out_ref[here, block], dA_ref[here, block] = dh, dA
    dD_ref[here, block], dbias_ref[here, block] = dD, dbias


def backward(
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    state,
    reset,
    valid,
    boundaries,
    dy,
    dstate,
    *,
    dt_softplus: bool,
    chunk_size: int,
):
    """Returns the gradients of (x, dt, A, B, C, D, z, dt_bias, state), as `xla.backward` does."""
    given = (x, dt, A, B, C, D, z, dt_bias, state, reset, valid)
    static = {"dt_softplus": dt_softplus, "chunk_size": chunk_size}
    if x.shape[1] == 1:
        return xla.backward(*given, boundaries, dy, dstate, **static)
    (batch, length, width), states = x.shape, A.shape[1]
    p = _plan(x, dt, A, z, reset, valid, **static)
    arrays = [warpgroup.pad(v, p.length, p.channels) for v in (x, dt, dy)]
    arrays += [common.token_maps(B, C, valid, p), warpgroup.pad(boundaries, p.states, p.channels)]
    arrays += [common.by_state(A, p), common.by_channel(D, p), common.by_channel(dt_bias, p)]
    arrays.append(common.by_state(dstate, p))
    of_states = jax.ShapeDtypeStruct((batch, p.blocks, p.states, CHANNELS), jnp.float32)
    of_channels = jax.ShapeDtypeStruct((batch, p.blocks, CHANNELS), jnp.float32)
    out_type = [jax.ShapeDtypeStruct((batch, p.length, p.channels), v.dtype) for v in (x, dt)]
    out_type.append(jax.ShapeDtypeStruct((p.blocks, batch, p.length, 2 * p.states), jnp.float32))
    out_type += [of_states, of_channels, of_channels, of_states]
    scratch = [*(p.tile(v.dtype) for v in (x, dt, dy)), p.maps(), p.maps(), p.of_states(p.slots)]
    scratch.append(p.of_states(p.rows // TOGETHER - 1))
    if z is not None:
        arrays.append(warpgroup.pad(z, p.length, p.channels))
        out_type.append(jax.ShapeDtypeStruct((batch, p.length, p.channels), z.dtype))
        scratch.append(p.tile(z.dtype))
    dx, ddt, dmaps, dA, dD, dbias, dh, *dz = common.call(
        functools.partial(_kernel, p=p),
        "selective_scan_backward",
        p,
        warpgroup.codes(reset, valid, batch, length, p.tiles, p.rows),
        arrays,
        out_type,
        scratch,
        5 + p.gate,
        REDUCTION_BYTES,
    )
    dmaps = jnp.sum(dmaps, axis=0)[:, :length]
    dD, dbias = (jnp.sum(v, axis=0).reshape(-1)[:width] for v in (dD, dbias))
    return (
        dx[:, :length, :width],
        ddt[:, :length, :width],
        common.from_by_state(jnp.sum(dA, axis=0), width, states).astype(A.dtype),
        dmaps[..., :states].astype(B.dtype),
        dmaps[..., p.states : p.states + states].astype(C.dtype),
        None if D is None else dD.astype(D.dtype),
        dz[0][:, :length, :width] if dz else None,
        None if dt_bias is None else dbias.astype(dt_bias.dtype),
        None if state is None else common.from_by_state(dh, width, states),
    )

"""Selective scan as a TPU kernel: the backward pass, one chunk at a time from the last to the first.

The states of a chunk are recomputed from its boundary into VMEM, as (a_t, a_t h_{t-1}) for every token; then the
adjoint recurrence of `xla._scan_chunk_backward` runs through them, eight tokens at a time. The sums over channels that
dB and dC are take one reduction over lanes per token and state; each lands in the lane of its token.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.selective_scan import mosaic_tpu as common
from pallas_kernels.selective_scan.mosaic_tpu import LANES, SUBLANES, Static, for_states, lanes, select

MAX_HISTORY = 32 * 2**20  # bytes, within common.VMEM_LIMIT


def history_bytes(p: common.Plan, states: int) -> int:
    """VMEM that the recomputed states of one chunk take."""
    return 2 * 4 * p.chunk * states * SUBLANES * LANES


def supports(x, dt, A, B, C, D, z, dt_bias, state, reset, valid, *rest, dt_softplus, chunk_size) -> None:
    """Raises UnsupportedError for what the kernel does not honour."""
    arrays = (x, dt, A, B, C, D, z, dt_bias, state, reset, valid)
    common.supports(*arrays, dt_softplus=dt_softplus, chunk_size=chunk_size)
    needed = history_bytes(common.plan(x.shape[1], x.shape[2], chunk_size), A.shape[1])
    if needed > MAX_HISTORY:
        common.refuse(
            f"chunk_size={chunk_size} with N={A.shape[1]} in the backward pass: the states of a chunk would take "
            f"{needed} bytes of VMEM, more than {MAX_HISTORY}; take a smaller chunk_size"
        )


def _kernel(*refs, s: Static):
    p, tiles, states = s.plan, s.plan.tiles, s.states
    shape = (tiles, LANES)
    refs = list(refs)
    x_ref, dt_ref, maps_ref, A_ref, vectors_ref, boundary_ref, dy_ref, dstate_ref = (refs.pop(0) for _ in range(8))
    z_ref = refs.pop(0) if s.gate else None
    dx_ref, ddt_ref, dmaps_ref, dA_ref, dvectors_ref, dh_ref = (refs.pop(0) for _ in range(6))
    dz_ref = refs.pop(0) if s.gate else None
    table, steps, inputs, cotangents, slopes, outputs, dinputs, dsteps, h_ref, bounce, decays, kepts, sums = refs
    t, d = pl.program_id(1), pl.program_id(2)
    groups = p.chunk // SUBLANES
    entry = functools.partial(s.map_row, table, shape=shape)

    @pl.when(d == 0)
    def _():
        common.spread(maps_ref, table)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    @pl.when(t == 0)
    def _():
        dh_ref[0, d] = dstate_ref[0, d]
        dA_ref[0, d] = jnp.zeros(dA_ref.shape[2:], jnp.float32)
        dvectors_ref[0, d] = jnp.zeros(dvectors_ref.shape[2:], jnp.float32)

    def inside(j, v):
        """Zeros in the lanes past the last channel, which sums over channels must not see."""
        return jnp.where((d * tiles + j) * LANES < p.channels, v, 0.0) if p.ragged else v

    def prepare(g):
        tokens = common.group_tokens(g)
        mask = s.valid_tile(table, g)
        for j in range(tiles):
            here = (g, common.tile_rows(j))

            def load(ref, j=j):
                return inside(j, select(mask, ref[0, tokens, lanes(j)].astype(jnp.float32)))

            step, x, dy = load(dt_ref), load(x_ref), load(dy_ref)
            if s.bias:
                step = step + inside(j, vectors_ref[1:2, lanes(j)])
            if s.dt_softplus:
                v = step
                step, e = common.softplus(v)
                slopes[here] = jnp.where(v < 0.0, e, 1.0) / (1.0 + e)
            step = select(mask, step)
            steps[here] = step
            inputs[here] = step * x
            cotangents[here] = dy if z_ref is None else dy * common.silu(load(z_ref))

    def recompute(g, dt, u):
        def state(n, y):
            a, h = A_ref[d, n], h_ref[n]
            y = list(y)
            for r in range(p.rows):
                token = g * SUBLANES + r
                decay = jnp.exp2(dt[r] * a)
                if s.reset:
                    keep = entry(token, 2 * states) > 0.0
                    decay, h = select(keep, decay), select(keep, h)
                kept = decay * h
                decays[token, n], kepts[token, n] = decay, kept
                h = kept + u[r] * entry(token, n)
                if s.gate:
                    y[r] = y[r] + h * entry(token, states + n)
            h_ref[n] = h
            return tuple(y)

        y = for_states(states, state, (jnp.zeros(shape, jnp.float32),) * p.rows)
        if s.gate:
            for r in range(p.rows):
                outputs[common.token_row(r, tiles), :] = y[r]

    def gate(g):
        if z_ref is None or dz_ref is None:
            return
        tokens = common.group_tokens(g)
        mask = s.valid_tile(table, g)
        for j in range(tiles):
            z, dy = (ref[0, tokens, lanes(j)].astype(jnp.float32) for ref in (z_ref, dy_ref))
            y = outputs[common.tile_rows(j), :]
            if s.skip:
                y = y + vectors_ref[0:1, lanes(j)] * x_ref[0, tokens, lanes(j)].astype(jnp.float32)
            sigmoid = 0.5 + 0.5 * jnp.tanh(0.5 * z)
            dz = dy * y * (sigmoid + z * (sigmoid - sigmoid * sigmoid))
            dz_ref[0, tokens, lanes(j)] = select(mask, dz).astype(dz_ref.dtype)

    def rows_of(scratch, g):
        return [scratch[g, common.token_row(r, tiles), :] for r in range(p.rows)]

    def adjoint(g, dt, u, cotangent):
        lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1) - g * SUBLANES

        def put(total, r, v):
            return jnp.where(lane == r, jnp.sum(v, axis=1, keepdims=True), total)

        def state(n, carry):
            du, ddt = (list(v) for v in carry)
            a, dh, dA, dB, dC = A_ref[d, n], dh_ref[0, d, n], dA_ref[0, d, n], sums[n], sums[states + n]
            products = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
            for r in reversed(range(p.rows)):
                token = g * SUBLANES + r
                kept = kepts[token, n]
                dh = dh + cotangent[r] * entry(token, states + n)
                exponent = dh * kept
                dA = dA + dt[r] * exponent
                ddt[r] = ddt[r] + a * exponent
                du[r] = du[r] + dh * entry(token, n)
                products = put(products[0], r, dh * u[r]), put(products[1], r, cotangent[r] * kept)
                dh = decays[token, n] * dh
            dh_ref[0, d, n], dA_ref[0, d, n] = dh, dA
            sums[n], sums[states + n] = dB + products[0], dC + products[1]
            return tuple(du), tuple(ddt)

        zeros = (jnp.zeros(shape, jnp.float32),) * p.rows
        du, ddt = for_states(states, state, (zeros, zeros))
        diagonal = jnp.zeros(shape, jnp.float32)  # what u_t B_t, the part of h_t that `kept` lacks, adds to dC_t
        for r in range(p.rows):
            dinputs[common.token_row(r, tiles), :] = du[r]
            dsteps[common.token_row(r, tiles), :] = ddt[r]
            diagonal = put(diagonal, r, cotangent[r] * u[r])
        sums[2 * states] = sums[2 * states] + diagonal

    def finish(g):
        tokens = common.group_tokens(g)
        mask = s.valid_tile(table, g)
        for j in range(tiles):
            rows = common.tile_rows(j)
            x = inside(j, select(mask, x_ref[0, tokens, lanes(j)].astype(jnp.float32)))
            du, cotangent = dinputs[rows, :], cotangents[g, rows]
            dx = steps[g, rows] * du
            if s.skip:
                dx = dx + vectors_ref[0:1, lanes(j)] * cotangent
                dvectors_ref[0, d, 0, rows] += cotangent * x
            ddt = math.log(2) * dsteps[rows, :] + x * du  # A is in base two
            if s.dt_softplus:
                ddt = ddt * slopes[g, rows]
            ddt = select(mask, ddt)
            if s.bias:
                dvectors_ref[0, d, 1, rows] += ddt
            dx_ref[0, tokens, lanes(j)] = select(mask, dx).astype(dx_ref.dtype)
            ddt_ref[0, tokens, lanes(j)] = ddt.astype(ddt_ref.dtype)

    for j, (rows, within, columns) in enumerate(common.bounce_tiles(states, tiles)):
        bounce[rows, :] = inside(j % tiles, boundary_ref[0, 0, within, columns])
    for n in range(states):
        h_ref[n] = bounce[common.bounce_row(n, tiles), :]

    prepare(0)

    @functools.partial(jax.lax.fori_loop, 0, groups, init_val=None)
    def _(g, _):
        dt, u = rows_of(steps, g), rows_of(inputs, g)
        gate(jnp.maximum(g - 1, 0))
        prepare(jnp.minimum(g + 1, groups - 1))
        recompute(g, dt, u)

    gate(groups - 1)

    @functools.partial(jax.lax.fori_loop, 0, groups, init_val=None)
    def _(i, _):
        g = groups - 1 - i
        adjoint(g, rows_of(steps, g), rows_of(inputs, g), rows_of(cotangents, g))
        finish(g)

    @pl.when(d == pl.num_programs(2) - 1)
    def _():
        for i in range(2 * states + 1):
            dmaps_ref[0, 0, pl.ds(i, 1), :] = jnp.sum(sums[i], axis=0, keepdims=True)


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
    supports(*given, dt_softplus=dt_softplus, chunk_size=chunk_size)
    (batch, length, channels), states = x.shape, A.shape[1]
    p = common.plan(length, channels, chunk_size)
    reset, valid = common.flags(reset, valid, length, p)
    maps = common.token_maps(B, C, reset, valid, p, p.chunk)
    s = common.static_of(p, maps, A, D, z, dt_bias, reset, valid, dt_softplus)
    last = p.chunks - 1

    def token_spec(*block):
        return pl.BlockSpec((1, *block), lambda b, t, d: (b, last - t, d))

    def row_spec(*block):
        return pl.BlockSpec((1, *block), lambda b, t, d: (b,) + (0,) * len(block))

    by_channel = token_spec(p.chunk, p.width)
    whole = (p.blocks, states, p.tiles, LANES)
    totals = (p.blocks, 2, p.tiles * SUBLANES, LANES)
    boundaries = jnp.pad(boundaries, ((0, 0),) * 3 + ((0, p.channels - channels),))
    arrays: list[Any] = [common.pad_tokens(x, p), common.pad_tokens(dt, p), maps, common.by_state(A, p) / math.log(2)]
    arrays += [common.vectors(D, dt_bias, p), boundaries, common.pad_tokens(dy, p), common.by_state(dstate, p)]
    specs = [
        by_channel,
        by_channel,
        pl.BlockSpec((1, 1, s.rows, p.chunk), lambda b, t, d: (b, last - t, 0, 0)),
        pl.BlockSpec(whole, lambda b, t, d: (0, 0, 0, 0)),
        pl.BlockSpec((2, p.width), lambda b, t, d: (0, d)),
        pl.BlockSpec((1, 1, states, p.width), lambda b, t, d: (b, last - t, 0, d)),
        by_channel,
        row_spec(*whole),
    ]
    sums = (2 * states + 1, LANES)
    outs = [
        (jax.ShapeDtypeStruct((batch, p.time, p.channels), x.dtype), by_channel),
        (jax.ShapeDtypeStruct((batch, p.time, p.channels), dt.dtype), by_channel),
        (
            jax.ShapeDtypeStruct((batch, p.chunks, *sums), jnp.float32),
            pl.BlockSpec((1, 1, *sums), lambda b, t, d: (b, last - t, 0, 0)),
        ),
        (jax.ShapeDtypeStruct((batch, *whole), jnp.float32), row_spec(*whole)),
        (jax.ShapeDtypeStruct((batch, *totals), jnp.float32), row_spec(*totals)),
        (jax.ShapeDtypeStruct((batch, *whole), jnp.float32), row_spec(*whole)),
    ]
    if z is not None:
        arrays.append(common.pad_tokens(z, p))
        specs.append(by_channel)
        outs.append((jax.ShapeDtypeStruct((batch, p.time, p.channels), z.dtype), by_channel))
    groups, group = p.chunk // SUBLANES, (p.tiles * SUBLANES, LANES)
    history = (p.chunk, *whole[1:])
    shapes = [(p.chunk * s.rows, LANES), *[(groups, *group)] * 4, *[group] * 3, whole[1:]]
    shapes += [common.bounce_shape(p, states), history, history, (sums[0], *whole[2:])]
    dx, ddt, dmaps, dA, dvectors, dh, *dz = pl.pallas_call(
        functools.partial(_kernel, s=s),
        grid=(batch, p.chunks, p.blocks),
        in_specs=specs,
        out_specs=[spec for _, spec in outs],
        out_shape=[shape for shape, _ in outs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=common.VMEM_LIMIT
        ),
        interpret=interpret.parameters(),
        name="selective_scan_backward",
    )(*arrays)
    dmaps = jnp.swapaxes(dmaps[..., : p.chunk], 2, 3).reshape(batch, p.time, -1)[:, :length]
    dB, dC, diagonal = dmaps[..., :states], dmaps[..., states:-1], dmaps[..., -1:]
    dC = dC + diagonal * jnp.swapaxes(maps, 2, 3).reshape(batch, p.time, -1)[:, :length, :states]
    dvectors = jnp.sum(dvectors.reshape(batch, p.blocks, 2, p.tiles, SUBLANES, LANES), axis=(0, 4))
    dD, dbias = jnp.moveaxis(dvectors, 1, 0).reshape(2, -1)[:, :channels]
    return (
        dx[:, :length, :channels],
        ddt[:, :length, :channels],
        common.from_by_state(jnp.sum(dA, axis=0), channels).astype(A.dtype),
        dB.astype(B.dtype),
        dC.astype(C.dtype),
        None if D is None else dD.astype(D.dtype),
        dz[0][:, :length, :channels] if dz else None,
        None if dt_bias is None else dbias.astype(dt_bias.dtype),
        None if state is None else common.from_by_state(dh, channels),
    )

"""Selective scan as a TPU kernel: the backward pass, one chunk at a time from the last to the first.

The states of a chunk are recomputed from its boundary into VMEM; then the adjoint recurrence of
`xla._scan_chunk_backward` runs through them. Per token and state that is 23 vector operations, the two exponentials
included: taking exp(dt A) again is cheaper than a second store. The sums over channels that dB and dC are go through
memory: the products of eight tokens are written, read with a stride that puts tokens on sublanes, added there, and
only once per chunk summed over lanes.
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
from pallas_kernels.selective_scan import xla
from pallas_kernels.selective_scan.mosaic_tpu import LANES, SUBLANES, Static, for_states, lanes, select

MAX_HISTORY = 32 * 2**20  # bytes, within common.VMEM_LIMIT


def parts_of(tiles: int) -> int:
    """Sums over the channels of a token are added up in as many parts: a stride over four takes two loads."""
    return 2 if tiles % 2 == 0 else 1


def history_bytes(p: common.Plan, states: int) -> int:
    """VMEM that the recomputed states of one chunk, the products and their sums take."""
    rows = (p.chunk + 1) * SUBLANES + 2 * SUBLANES * SUBLANES + 2 * p.chunk * parts_of(p.tiles)
    return 4 * LANES * states * rows


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
    table, steps, inputs, cotangents, slopes, outputs, dinputs, dsteps, h_ref, bounce, *refs = refs
    history, products, sums = refs
    parts = parts_of(tiles)
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
                v, step = step, common.softplus(step)
                slopes[here] = jnp.exp(v - step)  # the sigmoid, small ones with all their digits
            step = select(mask, step)
            steps[here] = step
            inputs[here] = step * x
            cotangents[here] = dy if z_ref is None else dy * common.silu(load(z_ref))

    def recompute(g, dt, u):
        for rows in p.passes:

            def state(n, y, rows=rows):
                a, h, y = A_ref[d, n], h_ref[n], list(y)
                for i, r in enumerate(rows):
                    token = g * SUBLANES + r
                    if s.reset:
                        h = select(entry(token, 2 * states) > 0.0, h)
                    h = jnp.exp2(dt[r] * a) * h + u[r] * entry(token, n)
                    history[token + 1, n] = h
                    if s.gate:
                        y[i] = y[i] + h * entry(token, states + n)
                h_ref[n] = h
                return tuple(y)

            y = for_states(states, state, (jnp.zeros(shape, jnp.float32),) * len(rows))
            if s.gate:
                for i, r in enumerate(rows):
                    outputs[common.token_row(r, tiles), :] = y[i]

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

    def add_up(i, g):
        """Adds up products[i] over the channels of equal lane; sublanes are parts of tokens then."""
        stride = tiles // parts
        for part in range(parts):
            first = part * SUBLANES * stride
            rows = [products[i, pl.ds(first + j, SUBLANES, stride=stride), :] for j in range(stride)]
            while len(rows) > 1:
                rows = [sum(rows[k + 1 : k + 2], rows[k]) for k in range(0, len(rows), 2)]
            sums[i, common.group_tokens(g * parts + part)] += rows[0]

    def adjoint(g, dt, u, cotangent):
        for rows in reversed(p.passes):

            def state(n, carry, rows=rows):
                du, ddt = (list(v) for v in carry)
                a, dh, dA = A_ref[d, n], dh_ref[0, d, n], dA_ref[0, d, n]
                h = history[g * SUBLANES + rows[-1] + 1, n]
                for i, r in reversed(list(enumerate(rows))):
                    token, here = g * SUBLANES + r, pl.ds(r * tiles, tiles)
                    dh = dh + cotangent[r] * entry(token, states + n)
                    du[i] = du[i] + dh * entry(token, n)
                    products[n, here, :], products[states + n, here, :] = dh * u[r], cotangent[r] * h
                    dh, h = jnp.exp2(dt[r] * a) * dh, history[token, n]
                    exponent = dh * h
                    if s.reset:
                        keep = entry(token, 2 * states) > 0.0
                        dh, exponent = select(keep, dh), select(keep, exponent)
                    dA = dA + dt[r] * exponent
                    ddt[i] = ddt[i] + a * exponent
                dh_ref[0, d, n], dA_ref[0, d, n] = dh, dA
                if rows[0] == 0:
                    add_up(n, g)
                    add_up(states + n, g)
                return tuple(du), tuple(ddt)

            zeros = (jnp.zeros(shape, jnp.float32),) * len(rows)
            du, ddt = for_states(states, state, (zeros, zeros))
            for i, r in enumerate(rows):
                dinputs[common.token_row(r, tiles), :] = du[i]
                dsteps[common.token_row(r, tiles), :] = ddt[i]

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
        history[0, n] = h_ref[n] = bounce[common.bounce_row(n, tiles), :]

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
        for i in range(2 * states):
            total = sum(sums[i, pl.ds(k, p.chunk, stride=parts), :] for k in range(parts))
            dmaps_ref[0, :, i : i + 1] = jnp.sum(total, axis=1, keepdims=True)


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
    if x.shape[1] == 1:
        return xla.backward(*given, boundaries, dy, dstate, dt_softplus=dt_softplus, chunk_size=chunk_size)
    (batch, length, channels), states = x.shape, A.shape[1]
    p = common.plan(length, channels, chunk_size)
    reset, valid = common.flags(reset, valid, length, p)
    maps = common.token_maps((B, C), reset, valid, p, p.chunk)
    s = common.static_of(p, 2, maps, A, D, z, dt_bias, reset, valid, dt_softplus)
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
    outs = [
        (jax.ShapeDtypeStruct((batch, p.time, p.channels), x.dtype), by_channel),
        (jax.ShapeDtypeStruct((batch, p.time, p.channels), dt.dtype), by_channel),
        (
            jax.ShapeDtypeStruct((batch, p.time, 2 * states), jnp.float32),
            pl.BlockSpec((1, p.chunk, 2 * states), lambda b, t, d: (b, last - t, 0)),
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
    shapes = [(p.chunk * s.rows, LANES), *[(groups, *group)] * 4, *[group] * 3, whole[1:]]
    shapes += [common.bounce_shape(p, states), (p.chunk + 1, *whole[1:])]
    shapes += [(2 * states, *group), (2 * states, p.chunk * parts_of(p.tiles), LANES)]
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
    dB, dC = jnp.split(dmaps[:, :length], 2, axis=-1)
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

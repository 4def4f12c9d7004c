"""Selective scan as a TPU kernel: the backward pass, one chunk at a time from the last to the first.

The states of a chunk are recomputed from its boundary into VMEM; then the adjoint recurrence of
`xla._scan_chunk_backward` runs through them, in the layout of the forward pass: eight states of 128 channels a
register. Every sum, over the states of a token (y, du, d(dt)) and over its channels (dB, dC), is a product of the
matrix unit for eight tokens at once: with a block-diagonal matrix on the left for the former; for the latter all pairs
of tokens are multiplied out and only those of a token with itself kept. What is left to the vector unit is 14
operations per token and state, the two exponentials included: taking exp(dt A) again is cheaper than a second store.
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
from pallas_kernels.selective_scan.mosaic_tpu import LANES, SUBLANES, Static, for_parts, lanes, select

MAX_HISTORY = 32 * 2**20  # bytes, within common.VMEM_LIMIT
UNROLL = 4  # groups of eight tokens


def history_bytes(p: common.Plan, states: int) -> int:
    """VMEM that the recomputed states of one chunk take in a block of 1024 channels."""
    return 4 * LANES * common.padded(states) * (p.chunk + 1) * SUBLANES


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


def for_groups(groups: int, body) -> None:
    """Runs body(g) for every group of eight tokens, some at a time."""
    unroll = max(k for k in range(1, UNROLL + 1) if groups % k == 0)

    def some(i, _=None):
        for k in range(unroll):
            body(i * unroll + k)

    some(0) if unroll == groups else jax.lax.fori_loop(0, groups // unroll, some, None)


def own_token(s: Static):
    """bool [8, 8 part]: where the column belongs to the token of the row."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, SUBLANES * s.part), axis) for axis in (0, 1))
    return (column >= row * s.part) & (column < (row + 1) * s.part)


def _kernel(*refs, s: Static):
    p, tiles, states, part = s.plan, s.plan.tiles, s.states, s.part
    shape = (part, LANES)
    refs = list(refs)
    x_ref, dt_ref, maps_ref, B_ref, C_ref, A_ref, vectors_ref = (refs.pop(0) for _ in range(7))
    boundary_ref, dy_ref, dstate_ref = (refs.pop(0) for _ in range(3))
    z_ref = refs.pop(0) if s.gate else None
    dx_ref, ddt_ref, dmaps_ref, dA_ref, dvectors_ref, dh_ref = (refs.pop(0) for _ in range(6))
    dz_ref = refs.pop(0) if s.gate else None
    table, steps, inputs, cotangents, slopes, history, sums = refs
    t, d = pl.program_id(1), pl.program_id(2)
    groups = p.chunk // SUBLANES

    @pl.when(d == 0)
    def _():
        common.spread(maps_ref, table, p.block_chunks * p.chunk, s)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    @pl.when(t == 0)
    def _():
        dh_ref[0, d] = dstate_ref[0, d]
        dA_ref[0, d] = jnp.zeros(dA_ref.shape[2:], jnp.float32)
        dvectors_ref[0, d] = jnp.zeros(dvectors_ref.shape[2:], jnp.float32)

    def inside(j, v):
        """Zeros in the lanes past the last channel, which sums over channels must not see."""
        return jnp.where((d * tiles + j) * LANES < p.channels, v, 0.0) if p.ragged else v

    def load(ref, at, j):
        v = ref[0, common.group_tokens(at), lanes(j)].astype(jnp.float32)
        return inside(j, select(s.valid_tile(table, at), v))

    def row_of(scratch, g, j, r):
        return jnp.broadcast_to(scratch[g, pl.ds(j * SUBLANES + r, 1), :], shape)

    def entries(at, r, index):
        """B or C of a token, from a row of the table on, spread over the lanes."""
        return table[pl.ds((at * SUBLANES + r) * s.rows + index, part), :]

    def kept(at, r):
        """Where the state before a token counts."""
        return jnp.broadcast_to(table[pl.ds((at * SUBLANES + r) * s.rows + 2 * states, 1), :], shape) > 0.0

    def diagonal(ref, at, i):
        return ref[0, common.group_tokens(at), pl.ds(i * part * SUBLANES, part * SUBLANES)]

    def token_states(g, r):
        """Where the states after the r-th token of a group lie in the history; r = -1 before the first."""
        return pl.ds((g * SUBLANES + r + 1) * part, part)

    def recompute(at, g, j):
        here = (g, common.tile_rows(j))
        step, x, dy = (load(ref, at, j) for ref in (dt_ref, x_ref, dy_ref))
        if s.bias:
            step = step + inside(j, vectors_ref[1:2, lanes(j)])
        if s.dt_softplus:
            v, step = step, common.softplus(step, s.exact)
            slopes[here] = jnp.exp(v - step)  # the sigmoid, small ones with all their digits
        steps[here] = select(s.valid_tile(table, at), step)
        inputs[here] = steps[here] * x
        cotangent = dy
        if z_ref is not None:
            z = load(z_ref, at, j)
            sigmoid = 0.5 + 0.5 * jnp.tanh(0.5 * z)
            silu = z * sigmoid
            cotangent = dy * silu
        cotangents[here] = cotangent

        def run(i, y):
            states_of = pl.ds(i * part, part)
            A, h = A_ref[d, states_of, lanes(j)], history[i, j, token_states(g, -1), :]
            ran = []
            for r in range(SUBLANES):
                if s.reset:
                    h = select(kept(at, r), h)
                h = jnp.exp2(row_of(steps, g, j, r) * A) * h + row_of(inputs, g, j, r) * entries(at, r, i * part)
                history[i, j, token_states(g, r), :] = h
                ran.append(h)
            ran = jnp.concatenate(ran)
            sums[1, i, at] += s.product(cotangent, ran, transposed=True)
            return y + s.product(diagonal(C_ref, at, i), ran) if s.gate else y

        y = for_parts(s, run, jnp.zeros((SUBLANES, LANES), jnp.float32))
        if z_ref is None or dz_ref is None:
            return
        if s.skip:
            y = y + vectors_ref[0:1, lanes(j)] * x
        dz = dy * y * (sigmoid + silu * (1.0 - sigmoid))
        dz = select(s.valid_tile(table, at), dz)
        dz_ref[0, common.group_tokens(at), lanes(j)] = dz.astype(dz_ref.dtype)

    def adjoint(at, g, j):
        def run(i, carry):
            du, ddt = carry
            columns = (0, d, pl.ds(i * part, part), lanes(j))
            A, dh, dA = A_ref[columns[1:]], dh_ref[columns], dA_ref[columns]
            cotangents_of, exponents = [], []
            for r in reversed(range(SUBLANES)):
                dt = row_of(steps, g, j, r)
                dh = dh + row_of(cotangents, g, j, r) * entries(at, r, states + i * part)
                cotangents_of.insert(0, dh)
                dh = jnp.exp2(dt * A) * dh
                exponent = dh * history[i, j, token_states(g, r - 1), :]
                if s.reset:
                    dh, exponent = (select(kept(at, r), v) for v in (dh, exponent))
                dA = dA + dt * exponent
                exponents.insert(0, A * exponent)
            dh_ref[columns], dA_ref[columns] = dh, dA
            cotangent = jnp.concatenate(cotangents_of)
            sums[0, i, at] += s.product(inputs[g, common.tile_rows(j), :], cotangent, transposed=True)
            du = du + s.product(diagonal(B_ref, at, i), cotangent)
            return du, ddt + s.product(own_token(s), jnp.concatenate(exponents))

        zero = jnp.zeros((SUBLANES, LANES), jnp.float32)
        du, ddt = for_parts(s, run, (zero, zero))
        tokens, here = common.group_tokens(at), (g, common.tile_rows(j))
        x, cotangent, mask = load(x_ref, at, j), cotangents[here], s.valid_tile(table, at)
        dx = steps[here] * du
        if s.skip:
            dx = dx + vectors_ref[0:1, lanes(j)] * cotangent
            dvectors_ref[0, d, 0, :, lanes(j)] += cotangent * x
        ddt = math.log(2) * ddt + x * du  # A is in base two
        if s.dt_softplus:
            ddt = ddt * slopes[here]
        ddt = select(mask, ddt)
        if s.bias:
            dvectors_ref[0, d, 1, :, lanes(j)] += ddt
        dx_ref[0, tokens, lanes(j)] = select(mask, dx).astype(dx_ref.dtype)
        ddt_ref[0, tokens, lanes(j)] = ddt.astype(ddt_ref.dtype)

    @functools.partial(jax.lax.fori_loop, 0, p.block_chunks, init_val=None)
    def _(k, _):
        chunk = p.block_chunks - 1 - k
        for j in range(tiles):
            for i in range(states // part):
                boundary = boundary_ref[0, chunk, pl.ds(i * part, part), lanes(j)]
                history[i, j, pl.ds(0, part), :] = inside(j, boundary)

        def forwards(g):
            for j in range(tiles):
                recompute(chunk * groups + g, g, j)

        def backwards(i):
            g = groups - 1 - i
            for j in range(tiles):
                adjoint(chunk * groups + g, g, j)

        for_groups(groups, forwards)
        for_groups(groups, backwards)

    @pl.when(d == pl.num_programs(2) - 1)
    def _():
        for i in range(2 * (states // part)):
            where = divmod(i, states // part)
            for g in range(p.block_chunks * groups):
                of_token = jnp.where(own_token(s), sums[(*where, g)], 0.0)
                dmaps_ref[0, 0, i, g : g + 1, :] = jnp.sum(of_token, axis=0, keepdims=True)


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
    (batch, length, channels), states = x.shape, common.padded(A.shape[1])
    p = common.blocked(common.plan(length, channels, chunk_size), 2 * states, common.MAX_TOKENS)
    tokens, last = p.chunk * p.block_chunks, p.chunks // p.block_chunks - 1
    reset, valid = common.flags(reset, valid, length, p)
    exact = common.is_exact(x, dt, B, C, z)
    maps = common.token_maps((B, C), reset, valid, p, tokens, exact)
    s = common.static_of(p, 2, maps, A, D, z, dt_bias, reset, valid, dt_softplus, exact)
    parts, groups = states // s.part, tokens // SUBLANES

    def token_spec(*block):
        return pl.BlockSpec((1, *block), lambda b, t, d: (b, last - t, d))

    def row_spec(*block):
        return pl.BlockSpec((1, *block), lambda b, t, d: (b,) + (0,) * len(block))

    by_channel = token_spec(tokens, p.width)
    by_group = pl.BlockSpec((1, tokens, SUBLANES * states), lambda b, t, d: (b, last - t, 0))
    whole, totals = (p.blocks, states, p.width), (p.blocks, 2, SUBLANES, p.width)
    pads = (0, 0), (0, 0), (0, states - A.shape[1]), (0, p.channels - channels)
    arrays: list[Any] = [
        common.pad_tokens(x, p),
        common.pad_tokens(dt, p),
        maps,
        *(common.diagonal(v, valid, p) for v in (B, C)),
        common.by_block(A, p) / math.log(2),
        common.vectors(D, dt_bias, p),
        jnp.pad(boundaries, pads) if any(map(sum, pads)) else boundaries,
        common.pad_tokens(dy, p),
        common.by_block(dstate, p),
    ]
    specs = [
        by_channel,
        by_channel,
        pl.BlockSpec((1, 1, *maps.shape[2:]), lambda b, t, d: (b, last - t, 0, 0)),
        by_group,
        by_group,
        pl.BlockSpec(whole, lambda b, t, d: (0, 0, 0)),
        pl.BlockSpec((2, p.width), lambda b, t, d: (0, d)),
        pl.BlockSpec((1, p.block_chunks, states, p.width), lambda b, t, d: (b, last - t, 0, d)),
        by_channel,
        row_spec(*whole),
    ]
    sums = (2 * parts, groups, SUBLANES * s.part)
    outs = [
        (jax.ShapeDtypeStruct((batch, p.time, p.channels), x.dtype), by_channel),
        (jax.ShapeDtypeStruct((batch, p.time, p.channels), dt.dtype), by_channel),
        (
            jax.ShapeDtypeStruct((batch, last + 1, *sums), jnp.float32),
            pl.BlockSpec((1, 1, *sums), lambda b, t, d: (b, last - t, 0, 0, 0)),
        ),
        (jax.ShapeDtypeStruct((batch, *whole), jnp.float32), row_spec(*whole)),
        (jax.ShapeDtypeStruct((batch, *totals), jnp.float32), row_spec(*totals)),
        (jax.ShapeDtypeStruct((batch, *whole), jnp.float32), row_spec(*whole)),
    ]
    if z is not None:
        arrays.append(common.pad_tokens(z, p))
        specs.append(by_channel)
        outs.append((jax.ShapeDtypeStruct((batch, p.time, p.channels), z.dtype), by_channel))
    shapes = [(tokens * s.rows, LANES), *[(p.chunk // SUBLANES, p.tiles * SUBLANES, LANES)] * 4]
    shapes += [(parts, p.tiles, (p.chunk + 1) * s.part, LANES), (2, parts, groups, SUBLANES, SUBLANES * s.part)]
    dx, ddt, dmaps, dA, dvectors, dh, *dz = pl.pallas_call(
        functools.partial(_kernel, s=s),
        grid=(batch, last + 1, p.blocks),
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
    dmaps = dmaps.reshape(batch, last + 1, 2, parts, tokens, s.part)
    dB, dC = jnp.moveaxis(dmaps, (2, 3), (0, 4)).reshape(2, batch, p.time, states)[:, :, :length, : A.shape[1]]
    dD, dbias = jnp.moveaxis(jnp.sum(dvectors, axis=(0, 3)), 1, 0).reshape(2, -1)[:, :channels]
    return (
        dx[:, :length, :channels],
        ddt[:, :length, :channels],
        common.from_by_block(jnp.sum(dA, axis=0), channels, A.shape[1]).astype(A.dtype),
        dB.astype(B.dtype),
        dC.astype(C.dtype),
        None if D is None else dD.astype(D.dtype),
        dz[0][:, :length, :channels] if dz else None,
        None if dt_bias is None else dbias.astype(dt_bias.dtype),
        None if state is None else common.from_by_block(dh, channels, A.shape[1]),
    )

"""Taylor linear attention as a Pallas TPU kernel: the backward pass, in the layout of the forward kernel.

A grid step takes one chunk, from the last to the first. It makes the states between the tiles of the chunk again and
walks the tiles backwards with the cotangent of the state in VMEM. With n_i = sum_j w_ij u_j over values and ones, whose
cotangent is g_i = (dy_i, -dy_i . y_i) / denominator_i:  ds_ij = (1 + s_ij) g_i . u_j,  du_j = sum_i w_ij g_i.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.taylor_linear_attention import features, xla
from pallas_kernels.taylor_linear_attention.mosaic_tpu import (
    TILE,
    Layout,
    expand,
    load,
    masks,
    operand_dtype,
    pipeline,
    supports,
    turned,
    where,
    with_ones,
)
from pallas_kernels.tiles import contract


def supports_backward(q, k, v, state, reset, valid, y, residuals, dy, dstate, *, scale: float, chunk_size: int) -> None:
    """Raises UnsupportedError where `backward` does not honour an argument."""
    supports(q, k, v, chunk_size)


def _pull(x, g, scale: float):
    """The gradient of x [K, C] from g [F, C], that of `expand(x, scale)`; float32."""
    key, first = x.shape[0], features.products(x.shape[0])
    x = x * math.sqrt(scale)
    dx = g[first : first + key] + 2 * features.HALF * g[:key] * x
    for turn, start, rows in features.turns(key)[1:]:
        part = g[start : start + rows]
        if rows < key:
            part = jnp.concatenate([part, jnp.zeros((key - rows, part.shape[1]), jnp.float32)], axis=0)
        dx += part * turned(x, turn) + pltpu.roll(part * x, turn, 0)
    return dx * math.sqrt(scale)


def _backward_kernel(*refs, scale: float, masked: bool, dtype):
    documents, refs = (refs[:2], refs[2:]) if masked else ((), refs)
    q_ref, k_ref, v_ref, y_ref, dy_ref, denominators_ref, boundary_ref, after_ref, *refs = refs
    dq_ref, dk_ref, dv_ref, dstate_ref, *between = refs
    heads, tiles = q_ref.shape[0], q_ref.shape[2] // TILE
    block = pl.num_programs(2) - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = after_ref[...]

    seen = [masks(documents, block, tile, tiles) for tile in range(tiles)]
    states = [boundary_ref, *(between[0].at[tile] for tile in range(tiles - 1))]  # before every tile

    for tile in range(tiles - 1):
        for head in range(heads):
            k, v = (load(ref, tile, head, seen[tile].valid) for ref in (k_ref, v_ref))
            u, phi_k = with_ones(v, seen[tile].valid), expand(k, scale).astype(dtype)
            added = contract(phi_k, where(seen[tile].kept, u).astype(dtype), 1, 1)
            states[tile + 1][head] = where(seen[tile].through, states[tile][head]) + added

    def start(tile, head):
        see = seen[tile]
        q, k, v, y, dy = (load(ref, tile, head, see.valid) for ref in (q_ref, k_ref, v_ref, y_ref, dy_ref))
        denominators = denominators_ref[head, :, tile * TILE : (tile + 1) * TILE]
        if see.valid is not None:
            denominators = jnp.where(see.valid, denominators, 1.0)
        dy *= 1.0 / denominators
        g = jnp.concatenate([dy, -jnp.sum(dy * y, axis=0, keepdims=True)], axis=0)
        q, k, u = q.astype(dtype), k.astype(dtype), with_ones(v, see.valid)
        s = contract(k, q, 0, 0)  # [key, query], not scaled
        dw = contract(u.astype(dtype), g.astype(dtype), 0, 0)
        weights = jnp.where(see.own, 1.0 + s * (scale + 0.5 * scale**2 * s), 0.0).astype(dtype)
        ds = jnp.where(see.own, dw * (scale + scale**2 * s), 0.0).astype(dtype)
        du = contract(g.astype(dtype), weights, 1, 1)
        return q, k, u, g, du, contract(k, ds, 1, 0), contract(q, ds, 1, 1)

    def finish(tile, head, q, k, u, g, du, dq, dk):
        lanes, see, dstate = slice(tile * TILE, (tile + 1) * TILE), seen[tile], dstate_ref[head]
        q, k, u, after = q.astype(jnp.float32), k.astype(jnp.float32), where(see.kept, u), dstate.astype(dtype)
        # What comes from the state before the tile, and what goes to the state after it.
        dphi_q = where(see.carried, contract(states[tile][head].astype(dtype), g.astype(dtype), 1, 0))
        dphi_k = contract(after, u.astype(dtype), 1, 0)
        du += where(see.kept, contract(after, expand(k, scale).astype(dtype), 0, 0))
        arrived = contract(expand(q, scale).astype(dtype), where(see.carried, g).astype(dtype), 1, 1)
        dstate_ref[head] = where(see.through, dstate) + arrived
        dq_ref[head, :, lanes] = (dq + _pull(q, dphi_q, scale)).astype(dq_ref.dtype)
        dk_ref[head, :, lanes] = (dk + where(see.kept, _pull(k, dphi_k, scale))).astype(dk_ref.dtype)
        dv_ref[head, :, lanes] = du[:-1].astype(dv_ref.dtype)

    pipeline([(tile, head) for tile in reversed(range(tiles)) for head in range(heads)], start, finish)


def backward(q, k, v, state, reset, valid, y, residuals, dy, dstate, *, scale: float, chunk_size: int):
    """Returns the gradients of (q, k, v, state) as `xla.backward` does."""
    arrays = (q, k, v, state, reset, valid)
    if q.shape[1] == 1:
        return xla.backward(*arrays, y, residuals, dy, dstate, scale=scale, chunk_size=chunk_size)
    boundaries, denominators = residuals
    at = Layout(q, v, reset, valid, chunk_size, reverse=True)
    shapes = [jax.ShapeDtypeStruct(at.rows(x.shape[3]).shape, x.dtype) for x in (q, k, v)]
    key, value, tiles = at.spec(at.key), at.spec(at.value), at.size // TILE
    between = (tiles - 1, at.block, *at.state_shape[2:])
    dq, dk, dv, dstate = at.call(
        functools.partial(_backward_kernel, scale=scale, masked=bool(at.documents), dtype=operand_dtype(q, k, v)),
        "taylor_linear_attention_backward",
        (*(at.transpose(x) for x in (q, k, v, y, dy)), denominators[:, :, None], boundaries, dstate),
        (key, key, value, value, value, at.spec(1), at.boundary_spec, at.state_spec),
        [*shapes, jax.ShapeDtypeStruct(at.state_shape, jnp.float32)],
        [key, key, value, at.state_spec],
        2 * dy.size // at.value * (at.value + 1) * (5 * features.count(at.key) + 3 * TILE),
        [pltpu.VMEM(between, jnp.float32)] if tiles > 1 else [],
    )
    return *(at.restore(x) for x in (dq, dk, dv)), None if state is None else dstate

"""Attention over pairs of a query block and a key block, in jnp: the floor on every platform.

The pairs that can hold a visible score are listed in Python (the lower triangle, or a band of it under a
window) and one `lax.scan` walks the list: neither time nor memory is spent outside it, and the program does
not grow with T. Forward is an online softmax (arXiv:1805.02867); backward recomputes the scores of a pair
from the saved log-sum-exp (arXiv:2307.08691). Arrays are laid out [blocks, B, G, R, block, width], R = H / G
query heads per key head, so that a step reads and updates contiguous memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.reference import visible

BLOCK = 256  # queries, and keys, of a block: of 64 ... 512, fastest forward and backward on CPU
MIN_BLOCK = 64  # below it matrix units starve, however short the window


class Plan(NamedTuple):
    """Block sizes and the pairs (int32[P, 2]) of blocks to visit; only `edge` pairs can hide a key."""

    q_block: int
    kv_block: int
    interior: np.ndarray
    edge: np.ndarray


def plan(time: int, keys: int, window: int | None, *, indexed: bool, documents: bool) -> Plan:
    """Which blocks meet; `indexed` says that positions are indices (self-attention)."""
    if indexed:
        return _banded_plan(time, window, documents)
    q_block = _even_block(time, BLOCK)
    kv_block = keys if time == 1 else _even_block(keys, BLOCK * max(1, 2 * BLOCK // q_block))
    i, j = np.indices((-(-time // q_block), -(-keys // kv_block))).reshape(2, -1)
    return Plan(q_block, kv_block, _as_pairs(i[:0], j[:0]), _as_pairs(i, j))


def _banded_plan(time: int, window: int | None, documents: bool) -> Plan:
    block = _even_block(time, BLOCK if window is None else min(BLOCK, max(MIN_BLOCK, window)))
    blocks = -(-time // block)
    reach = blocks if window is None else -(-(window - 1) // block)  # key blocks before the query's own
    i, back = np.indices((blocks, min(reach, blocks - 1) + 1)).reshape(2, -1)
    j = i - back
    i, j, back = i[j >= 0], j[j >= 0], back[j >= 0]
    whole = back > 0
    if window is not None:
        whole &= (back + 1) * block <= window  # the last query of the block still sees the first key
    if documents:
        whole[:] = False
    return Plan(block, block, _as_pairs(i[whole], j[whole]), _as_pairs(i[~whole], j[~whole]))


def _as_pairs(i: np.ndarray, j: np.ndarray) -> np.ndarray:
    return np.stack([i, j], axis=1).astype(np.int32)


def _even_block(length: int, limit: int) -> int:
    """The block, about `limit` at most, that splits `length` evenly: whole, or a multiple of 8."""
    blocks = -(-length // limit)
    return length if blocks == 1 else -(-length // (8 * blocks)) * 8


class _Grid(NamedTuple):
    """The plan of one call; `*_meta` are (positions, documents) [blocks, B, block], None where implied."""

    plan: Plan
    window: int | None
    groups: int
    q_real: jax.Array | None
    kv_real: jax.Array | None
    q_meta: tuple[jax.Array | None, jax.Array | None]
    kv_meta: tuple[jax.Array | None, jax.Array | None]

    @property
    def single(self) -> bool:
        """Whether one block of queries meets one block of keys, as in decoding."""
        return len(self.plan.interior) + len(self.plan.edge) == 1

    def query_blocks(self, x: jax.Array) -> jax.Array:
        """[B, T, H, width] -> [blocks, B, G, H / G, block, width], zero at padding."""
        batch, _, heads, width = x.shape
        x = _pad(_clean(x, self.q_real), self.plan.q_block)
        x = x.reshape(batch, -1, self.plan.q_block, self.groups, heads // self.groups, width)
        return x.transpose(1, 0, 3, 4, 2, 5)

    def key_blocks(self, x: jax.Array) -> jax.Array:
        """[B, S, G, width] -> [blocks, B, G, block, width], zero at padding and in empty slots."""
        batch, _, groups, width = x.shape
        x = _pad(_clean(x, self.kv_real), self.plan.kv_block)
        return x.reshape(batch, -1, self.plan.kv_block, groups, width).transpose(1, 0, 3, 2, 4)

    def scan(self, update, query, key, query_carry, key_carry) -> tuple[Any, Any]:
        """Folds `update(query_carry, key_carry, query, key, mask)`, all of one pair, over the pairs."""
        # Without positions or documents every listed pair holds a visible score.
        skip = len(self.plan.edge) > 1 and (self.q_meta[0] is not None or self.q_meta[1] is not None)

        def step(carry, pair, masked):
            i, j = pair[0], pair[1]
            held = _take(carry[0], i), _take(carry[1], j)
            blocks = _take(query, i), _take(key, j)
            mask = self.mask(i, j) if masked else None
            if mask is not None and skip:
                held = jax.lax.cond(jnp.any(mask), lambda held: update(*held, *blocks, mask), lambda held: held, held)
            else:
                held = update(*held, *blocks, mask)
            return (_put(carry[0], held[0], i), _put(carry[1], held[1], j)), None

        carry = query_carry, key_carry
        for pairs, masked in ((self.plan.interior, False), (self.plan.edge, True)):
            if len(pairs):
                carry, _ = jax.lax.scan(functools.partial(step, masked=masked), carry, pairs)
        return carry

    def mask(self, i, j) -> jax.Array:
        """bool[B or 1, q_block, kv_block]: what is visible between query block i and key block j."""
        q_positions, q_documents = _take(self.q_meta, i)
        kv_positions, kv_documents = _take(self.kv_meta, j)
        if q_positions is None:
            q_positions = (i * self.plan.q_block + jnp.arange(self.plan.q_block))[None]
            kv_positions = (j * self.plan.kv_block + jnp.arange(self.plan.kv_block))[None]
        return visible(q_positions, kv_positions, q_documents, kv_documents, self.window)


def _grid(q, k, q_positions, kv_positions, q_documents, kv_documents, window) -> _Grid:
    time, keys, indexed = q.shape[1], k.shape[1], q_positions is None
    if indexed and window is not None and window >= time:
        window = None
    chosen = plan(time, keys, window, indexed=indexed, documents=q_documents is not None)

    def real(positions, documents):
        marks = positions if documents is None else documents
        return None if marks is None else marks >= 0

    def meta(positions, documents, block):
        # Slots that only fill the last block take -1: empty, or padding.
        def blocks(x):
            return _pad(x, block, fill=-1).reshape(x.shape[0], -1, block).swapaxes(0, 1)

        return jax.tree.map(blocks, (positions, documents))

    return _Grid(
        plan=chosen,
        window=window,
        groups=k.shape[2],
        q_real=real(q_positions, q_documents),
        kv_real=real(kv_positions, kv_documents),
        q_meta=meta(q_positions, q_documents, chosen.q_block),
        kv_meta=meta(kv_positions, kv_documents, chosen.kv_block),
    )


def _clean(x, real):
    # Zero times NaN is NaN: what padding holds must be gone before a product with a zero weight.
    return x if real is None else jnp.where(real[:, :, None, None], x, 0)


def _pad(x, block, fill=0):
    extra = -x.shape[1] % block
    return jnp.pad(x, [(0, extra) if axis == 1 else (0, 0) for axis in range(x.ndim)], constant_values=fill)


def _take(tree, index):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, axis=0, keepdims=False), tree)


def _put(tree, block, index):
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, axis=0), tree, block)


def _from_query_blocks(x, time):
    blocks, batch, groups, ratio, block, width = x.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, blocks * block, groups * ratio, width)[:, :time]


def _from_key_blocks(x, keys):
    blocks, batch, groups, block, width = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, blocks * block, groups, width)[:, :keys]


def _scores(q, k, scale, soft_cap, eqn="bgrtk,bgsk->bgrts"):
    s = jnp.einsum(eqn, q, k, preferred_element_type=jnp.float32) * scale
    return s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)


def _hide(s, mask):
    return s if mask is None else jnp.where(mask[:, None, None], s, -jnp.inf)


def forward(q, k, v, q_positions, kv_positions, q_documents, kv_documents, *, window, scale, soft_cap):
    """Arguments as in `attention`, all given; returns (y [B, T, H, V] in q.dtype, lse float32[B, T, H])."""
    grid = _grid(q, k, q_positions, kv_positions, q_documents, kv_documents, window)
    if grid.single:
        return _dense_forward(grid, q, k, v, scale, soft_cap)
    query, key = (grid.query_blocks(q),), (grid.key_blocks(k), grid.key_blocks(v))

    def update(held, nothing, query, key, mask):
        (q,), (k, v) = query, key
        acc, total, peak = jnp.split(held, (width, width + 1), axis=-1)
        s = _hide(_scores(q, k, scale, soft_cap), mask)
        new_peak = jnp.maximum(peak, jnp.max(s, axis=-1, keepdims=True))
        shift = new_peak if mask is None else jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        p, decay = jnp.exp(s - shift), jnp.exp(peak - shift)
        total = total * decay + jnp.sum(p, axis=-1, keepdims=True)
        pv = jnp.einsum("bgrts,bgsv->bgrtv", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return jnp.concatenate([acc * decay + pv, total, new_peak], axis=-1), nothing

    # One carry for accumulator, sum and maximum: as three, XLA copies whole ones every step, O(T^2) in all.
    width = v.shape[-1]
    start = jnp.where(jnp.arange(width + 2) > width, -jnp.inf, 0.0)
    start = jnp.broadcast_to(start, (*query[0].shape[:-1], width + 2))
    held, _ = grid.scan(update, query, key, start, ())
    acc, total, peak = jnp.split(held, (width, width + 1), axis=-1)
    sees = total > 0
    total = jnp.where(sees, total, 1.0)
    y = _from_query_blocks((acc / total).astype(q.dtype), q.shape[1])
    lse = _from_query_blocks(jnp.where(sees, peak + jnp.log(total), -jnp.inf), q.shape[1])
    return y, lse[..., 0]


def _dense_forward(grid, q, k, v, scale, soft_cap):
    # No block layout here: decoding must not copy the cache into it.
    (batch, time, heads, _), groups = q.shape, k.shape[2]
    q = _clean(q, grid.q_real).reshape(batch, time, groups, heads // groups, -1)
    s = _hide(_scores(q, k, scale, soft_cap, "btgrk,bsgk->bgrts"), grid.mask(0, 0))
    peak = jnp.max(s, axis=-1, keepdims=True)
    sees = peak > -jnp.inf
    e = jnp.exp(s - jnp.where(sees, peak, 0.0))
    total = jnp.where(sees, jnp.sum(e, axis=-1, keepdims=True), 1.0)
    v = _clean(v, grid.kv_real)
    y = jnp.einsum("bgrts,bsgv->bgrtv", e.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    lse = jnp.where(sees, peak + jnp.log(total), -jnp.inf)
    y, lse = (x.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, -1) for x in (y, lse))
    return y.astype(q.dtype), lse[..., 0]


def backward(
    q,
    k,
    v,
    q_positions,
    kv_positions,
    q_documents,
    kv_documents,
    y,
    lse,
    dy,
    dlse,
    *,
    window,
    scale,
    soft_cap,
):
    """Gradients (dq, dk, dv), in the dtypes of q, k, v, from the cotangents of y and lse.

    With p = exp(s - lse) and delta = sum_v(dy * y) - dlse:  ds = p * (dy @ v^T - delta).
    """
    grid = _grid(q, k, q_positions, kv_positions, q_documents, kv_documents, window)
    sees = lse > -jnp.inf
    dy = jnp.where(sees[..., None], dy, 0)  # y is the constant 0 where nothing is seen
    delta = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1) - jnp.where(sees, dlse, 0.0)
    rows = (jnp.where(sees, lse, 0.0)[..., None], delta[..., None])
    query = tuple(grid.query_blocks(x) for x in (q, dy, *rows))
    key = (grid.key_blocks(k), grid.key_blocks(v))

    def update(dq, held, query, key, mask):
        (q, dy, lse, delta), (k, v), (dk, dv) = query, key, held
        s = _scores(q, k, scale, soft_cap)
        p = jnp.exp(_hide(s, mask) - lse)
        ds = p * (jnp.einsum("bgrtv,bgsv->bgrts", dy, v, preferred_element_type=jnp.float32) - delta) * scale
        if soft_cap is not None:
            ds *= 1.0 - jnp.square(s / soft_cap)
        ds, p = ds.astype(q.dtype), p.astype(q.dtype)
        dq += jnp.einsum("bgrts,bgsk->bgrtk", ds, k, preferred_element_type=jnp.float32)
        dk += jnp.einsum("bgrts,bgrtk->bgsk", ds, q, preferred_element_type=jnp.float32)
        dv += jnp.einsum("bgrts,bgrtv->bgsv", p, dy, preferred_element_type=jnp.float32)
        return dq, (dk, dv)

    start_q, *start_kv = (jnp.zeros(x.shape, jnp.float32) for x in (query[0], *key))
    dq, (dk, dv) = grid.scan(update, query, key, start_q, tuple(start_kv))
    return (
        _from_query_blocks(dq.astype(q.dtype), q.shape[1]),
        _from_key_blocks(dk.astype(k.dtype), k.shape[1]),
        _from_key_blocks(dv.astype(v.dtype), v.shape[1]),
    )

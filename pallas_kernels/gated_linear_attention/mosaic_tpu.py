"""Gated linear attention as Pallas TPU kernels: the forward pass, for a decay per head or none.

The grid walks over chunks of 128 tokens in order with the float32 states in VMEM scratch. A step holds one chunk of
several heads of a group, side by side in the lanes (two heads of 64 fill a register).

Where two heads share a register they share the work on pairs of tokens too, in two spans of the chunk: see
`mosaic_tpu_decay`, which holds the decays. Scores between the spans are the same for all heads.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.gated_linear_attention import mosaic_tpu_channel, xla
from pallas_kernels.gated_linear_attention.mosaic_tpu_decay import HeadDecay, apart
from pallas_kernels.gated_linear_attention.mosaic_tpu_layout import (
    CHUNK,
    LANES,
    VMEM_LIMIT,
    Layout,
    block_specs,
    check_support,
    compute_dtype,
    contract,
    decayed,
    layout,
    widen,
)

UNROLL = 20  # pairs of heads


def supports(q, k, v, log_decay, state, reset, valid, *, scale: float, chunk_size: int, save: bool) -> None:
    """Raises UnsupportedError where `forward` does not honour an argument."""
    check_support(q, k, v, log_decay, chunk_size)


def unrolled(lay: Layout, limit: int) -> int:
    """How many of them the compiler sees at once: enough to overlap, few enough to stay in registers."""
    total = lay.heads // lay.pair
    return max(n for n in range(1, limit + 1) if total % n == 0)


class Heads(NamedTuple):
    """Heads side by side: their number p, their lanes, the step of the loop and the place among those unrolled."""

    p: Any
    lanes: Any
    step: Any
    slot: int


def heads_of(lay: Layout, steps: int, step) -> list[Heads]:
    """The groups of heads side by side that a step of `for_heads` takes."""
    found, width = [], lay.pair * lay.values
    for slot in range(steps):
        start = (step * steps + slot) * width
        lanes = pl.ds(start if isinstance(start, int) else pl.multiple_of(start, LANES), width)
        found.append(Heads(step * steps + slot, lanes, step, slot))
    return found


def for_heads(
    lay: Layout,
    steps: int,
    body: Callable[[Heads], Iterator[None]],
    end: Callable[[Any], Iterator[None]] | None = None,
) -> None:
    """Runs `body` for every group of heads side by side, `steps` of them unrolled.

    What follows a yield in a body is written after the next body's part before it: a matrix unit takes its products in
    the order in which they are written, so that what a product waits for must be old. `end(step)` follows the last
    body; its parts hide what the last bodies wait for.
    """

    def step(i, _=None):
        running: list[Iterator[None]] = []
        for heads in heads_of(lay, steps, i):
            running.append(body(heads))
            _advance(running)
        last = iter(()) if end is None else end(i)
        for _ in range(2):
            _advance(running)
            next(last, None)

    trips = lay.heads // (steps * lay.pair)
    if trips == 1:
        step(0)
    else:
        jax.lax.fori_loop(0, trips, step, None)


def _advance(running: list[Iterator[None]]) -> None:
    for part in reversed(running):
        next(part, None)


def _head_kernel(*refs, lay: Layout, scale: float, dtype, carried: bool, save: bool, resets: bool):
    refs = list(refs)
    q_ref, k_ref, v_ref, g_ref = (refs.pop(0) for _ in range(4))
    state_ref = refs.pop(0) if carried else None
    y_ref, new_state_ref = refs.pop(0), refs.pop(0)
    boundary_ref = refs.pop(0) if save else None
    s_ref, products_ref, between_ref, transposed_ref, *tables = refs
    t, count = pl.program_id(3), lay.pair
    spans = [slice(start, start + CHUNK // count) for start in range(0, CHUNK, CHUNK // count)]

    @pl.when(t == 0)
    def _():
        s_ref[...] = jnp.zeros(s_ref.shape, jnp.float32) if state_ref is None else state_ref[...]

    if boundary_ref is not None:

        @pl.when(jax.lax.rem(t, lay.saves) == 0)
        def _():
            boundary_ref[...] = s_ref[...]

    decay = HeadDecay(g_ref, scale, tables, count)
    q, k = q_ref[...].astype(dtype), k_ref[...].astype(dtype)
    transposed_ref[...] = k.T
    for span in spans:
        products_ref[span, :] = scale * contract(q[span], jnp.concatenate([k[span]] * count, axis=0), 1, 1)
    if count == 2:
        between_ref[...] = contract(q[spans[1]], k[spans[0]], 1, 1).astype(dtype)

    def body(heads):
        p, lanes, *_ = heads
        width = lanes.size
        v, s, whole = v_ref[:, lanes], s_ref[:, lanes], [widen(w, width) for w in decay.whole(p)]
        seen = contract(q_ref[...].astype(dtype), s.astype(dtype), 1, 0)
        added = widen(decay.other(p), width) * v.astype(jnp.float32)  # to the end of the span
        for n, span in enumerate(spans):
            scores, untils = [], []
            for rows, weight, until in decay.blocks(p, n):
                rows = slice(span.start + rows.start, span.start + rows.stop)
                scores.append((weight * products_ref[rows, :]).astype(dtype))
                untils.append(until)
            until = widen(jnp.concatenate(untils, axis=0), width)
            y = contract(jnp.concatenate(scores, axis=0), apart(v[span].astype(dtype), count), 1, 0)
            if n == 1:
                y = y + until * contract(between_ref[...], added[spans[0]].astype(dtype), 1, 0)
                until = until * whole[0]
            y_ref[span, lanes] = (y + decayed(until, seen[span], resets)).astype(y_ref.dtype)
        if count == 2:
            added = jnp.concatenate([added[spans[0]] * whole[1], added[spans[1]]], axis=0)
            whole = [whole[0] * whole[1]]
        yield
        kept = decayed(jnp.broadcast_to(whole[0], s.shape), s, resets)
        s_ref[:, lanes] = kept + contract(transposed_ref[...], added.astype(dtype), 1, 0)

    for_heads(lay, unrolled(lay, UNROLL), body)

    @pl.when(t == pl.num_programs(3) - 1)
    def _():
        new_state_ref[...] = s_ref[...]


def _by_head(q, k, v, g, state, lay: Layout, *, scale: float, save: bool, resets: bool):
    batch = v.shape[0]
    specs = block_specs(lay, lambda *ids: ids)
    rows = "shared_rows" if g.shape[0] == 1 else "rows"
    out_shape = [
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        jax.ShapeDtypeStruct((batch, lay.groups, lay.keys, lay.ratio * lay.values), jnp.float32),
    ]
    if save:
        shape = (batch, lay.boundaries, *out_shape[1].shape[1:])
        out_shape.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    dtype = compute_dtype(q, k, v)
    kernel = functools.partial(
        _head_kernel,
        lay=lay,
        scale=scale,
        dtype=dtype,
        carried=state is not None,
        save=save,
        resets=resets,
    )
    names = ("keys", "keys", "values", rows) + (("state",) if state is not None else ())
    return pl.pallas_call(
        kernel,
        grid=(batch, lay.groups, lay.blocks, lay.chunks),
        in_specs=[specs[name] for name in names],
        out_specs=[specs[name] for name in ("values", "state", "boundary")[: len(out_shape)]],
        out_shape=out_shape,
        scratch_shapes=[
            pltpu.VMEM((lay.keys, lay.lanes), jnp.float32),
            pltpu.VMEM((CHUNK, CHUNK), jnp.float32),
            pltpu.VMEM((CHUNK // 2, CHUNK // 2), dtype),
            pltpu.VMEM((lay.keys, CHUNK), dtype),
            *HeadDecay.scratch(lay),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret.parameters(),
        name="gated_linear_attention_forward",
    )(*(a for a in (q, k, v, g, state) if a is not None))


def forward(q, k, v, log_decay, state, reset, valid, *, scale: float, chunk_size: int, save: bool):
    """Returns (y, new_state, boundaries) as `xla.forward` does."""
    if q.shape[1] == 1:  # one token is bound by the state's traffic: XLA fuses it into one pass
        return xla.forward(q, k, v, log_decay, state, reset, valid, scale=scale, chunk_size=chunk_size, save=save)
    lay = layout(q, v, chunk_size)
    per_channel = log_decay is not None and log_decay.ndim == 4
    decay = (lay.channels if per_channel else lay.head_rows)(log_decay, reset, valid)
    y, new_state, *boundaries = (mosaic_tpu_channel.forward if per_channel else _by_head)(
        lay.tokens(q, valid, lay.keys),
        lay.tokens(k, valid, lay.keys),
        lay.tokens(v, valid, lay.values),
        decay,
        None if state is None else lay.states(xla.flat(state, lay.groups)),
        lay,
        scale=scale,
        save=save,
        resets=reset is not None,
    )
    y = lay.from_tokens(y, v.shape[2], v.shape[3])
    if valid is not None:  # a state that is not finite must not show at padding
        y = jnp.where(valid[..., None, None], y, 0)
    new_state = xla.unflat(lay.from_states(new_state), lay.ratio)
    return y, new_state, lay.from_states(boundaries[0]) if save else None

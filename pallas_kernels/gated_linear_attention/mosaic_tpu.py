"""Gated linear attention as Pallas TPU kernels: the forward pass for a decay per head, and what all kernels share.

The grid walks over chunks of 128 tokens in order with the float32 states in VMEM scratch. A step holds one chunk of
several heads of a group, side by side in the lanes (two heads of 64 fill a register), so that the products with the
state are one product for all of them and the scores q . k are shared.

Token i of the eight tokens of block I sees an earlier token j through exp(prefix_i) exp(w_I[j]): prefix_i sums the log
decays of block I up to i, w_I[j] those from j + 1 to the start of block I; within a block a table of 8 x 8 sums serves.
All are sums of non-positive numbers: nothing overflows and nothing cancels. A reset is a log decay of -inf.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.gated_linear_attention import mosaic_tpu_channel, xla
from pallas_kernels.gated_linear_attention.mosaic_tpu_layout import (
    BLOCK,
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


def supports(q, k, v, log_decay, state, reset, valid, *, scale: float, chunk_size: int, save: bool) -> None:
    """Raises UnsupportedError where `forward` does not honour an argument."""
    check_support(q, k, v, log_decay, chunk_size)


# ---- a decay per head: pieces of a kernel ---------------------------------------------------------------------


class HeadDecay:
    """The decays of a chunk of several heads, from their logarithms g [rows, 128] with the tokens in the lanes.

    Attributes:
      columns: [128, 128], tokens in the sublanes: lane h holds exp(prefix of the block of eight) of head h, lane
        rows + h exp(next token to the chunk's end), the last lane more than 0 if a head sees the state before.
      whole: [rows, 128], exp(sum over the chunk) in every lane.
    """

    def __init__(self, g, before_ref, start_ref, within_ref):
        self.rows, self.before_ref, self.start_ref, self.within_ref = g.shape[0], before_ref, start_ref, within_ref
        lane = jax.lax.broadcasted_iota(jnp.int32, g.shape, 1)
        place = lane & (BLOCK - 1)
        prefix, suffix = g, jnp.where(place < BLOCK - 1, pltpu.roll(g, LANES - 1, 1), 0.0)
        for size in (1, 2, 4):
            prefix = prefix + jnp.where(place >= size, pltpu.roll(prefix, size, 1), 0.0)
            suffix = suffix + jnp.where(place + size < BLOCK, pltpu.roll(suffix, LANES - size, 1), 0.0)
        self._write_within(g, place)
        before, start, until = jnp.full(g.shape, -jnp.inf, jnp.float32), jnp.zeros_like(g), jnp.zeros_like(g)
        for i in range(CHUNK // BLOCK):
            before_ref[pl.ds(i * self.rows, self.rows), :] = jnp.exp(before)
            start_ref[pl.ds(i * self.rows, self.rows), :] = jnp.exp(start)
            inside = (lane >> 3) == i
            total = jnp.broadcast_to(prefix[:, (i + 1) * BLOCK - 1 : (i + 1) * BLOCK], g.shape)
            until = jnp.where(inside, start + prefix, until)
            before = jnp.where(inside, suffix, before + total)
            start = start + total
        self.whole = jnp.exp(start)
        seen = jnp.max(jnp.exp(until), axis=0, keepdims=True)
        rest = jnp.broadcast_to(seen, (LANES - 2 * self.rows, LANES))
        self.columns = jnp.concatenate([jnp.exp(prefix), jnp.exp(before), rest], axis=0).T

    def _write_within(self, g, place) -> None:
        """Row r * rows + h of within_ref: for token j exp(sum from j + 1 to token r of its block), 0 if r < j."""
        run, runs = jnp.zeros_like(g), [jnp.zeros_like(g)]
        for distance in range(1, BLOCK):
            run = run + pltpu.roll(g, LANES - distance, 1)
            runs.append(run)
        for r in range(BLOCK):
            total = jnp.full(g.shape, -jnp.inf, jnp.float32)
            for p in range(r + 1):
                total = jnp.where(place == p, runs[r - p], total)
            self.within_ref[pl.ds(r * self.rows, self.rows), :] = jnp.exp(total)

    def prefix(self, head: int) -> jax.Array:
        """exp(sum of the block of eight up to the token), [128, 128], the same in every lane."""
        return jnp.broadcast_to(self.columns[:, head : head + 1], (CHUNK, LANES))

    def seen(self) -> jax.Array:
        """[128, 128], more than 0 where the state before the chunk is seen."""
        return jnp.broadcast_to(self.columns[:, LANES - 1 :], (CHUNK, LANES))

    def after(self, heads: list[int]) -> jax.Array:
        """exp(sum from the next token to the chunk's end), [128, 128], in the lanes of each head."""
        lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, LANES), 1)
        index = self.rows + heads[0] + (lane >> 6 if len(heads) == 2 else 0 * lane)
        return jnp.take_along_axis(self.columns, index, axis=1, mode="promise_in_bounds")

    def until(self, heads: list[int], prefixes: list[jax.Array]) -> jax.Array:
        """exp(sum from the chunk's start to the token), [128, 128], in the lanes of each head."""
        prefix, blocks = join(prefixes), []
        for i in range(CHUNK // BLOCK):
            start = join([self.start_ref[pl.ds(i * self.rows + head, 1), :] for head in heads])
            blocks.append(prefix[i * BLOCK : (i + 1) * BLOCK] * start)
        return jnp.concatenate(blocks, axis=0)

    def weights(self, head: int, prefix) -> list[jax.Array]:
        """By block of eight tokens i [8, 128]: decay from token j to i, 0 unless j <= i; prefix as `prefix(head)`."""
        within = self.within_ref[pl.ds(head, BLOCK, stride=self.rows), :]
        lane = jax.lax.broadcasted_iota(jnp.int32, within.shape, 1)
        out = []
        for i in range(CHUNK // BLOCK):
            before = self.before_ref[pl.ds(i * self.rows + head, 1), :]
            block = prefix[i * BLOCK : (i + 1) * BLOCK] * before
            out.append(jnp.where((lane >> 3) == i, within, block))
        return out


def units(lay: Layout) -> list[tuple[list[int], slice]]:
    """(heads, lanes) that are computed together: two heads of half a register, or one head."""
    count = max(1, LANES // lay.values)
    width = count * lay.values
    return [
        (list(range(n * count, (n + 1) * count)), slice(n * width, (n + 1) * width)) for n in range(lay.heads // count)
    ]


def join(parts: list[jax.Array]) -> jax.Array:
    """The lanes of each head from its own part, [n, 128] each; a single part is as it is."""
    if len(parts) == 1:
        return parts[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 1)
    return jnp.where(lane < LANES // 2, parts[0], parts[1])


def _head_kernel(*refs, lay: Layout, scale: float, dtype, carried: bool, save: bool, resets: bool):
    refs = list(refs)
    q_ref, k_ref, v_ref, g_ref = (refs.pop(0) for _ in range(4))
    state_ref = refs.pop(0) if carried else None
    y_ref, new_state_ref = refs.pop(0), refs.pop(0)
    boundary_ref = refs.pop(0) if save else None
    s_ref, before_ref, start_ref, within_ref = refs
    t = pl.program_id(3)

    @pl.when(t == 0)
    def _():
        s_ref[...] = jnp.zeros(s_ref.shape, jnp.float32) if state_ref is None else state_ref[...]

    if boundary_ref is not None:

        @pl.when(jax.lax.rem(t, lay.saves) == 0)
        def _():
            boundary_ref[...] = s_ref[...]

    decay = HeadDecay(g_ref[...], before_ref, start_ref, within_ref)
    q, k = q_ref[...].astype(dtype), k_ref[...].astype(dtype)
    products, transposed = scale * contract(q, k, 1, 1), k.T
    for heads, lanes in units(lay):
        width = lanes.stop - lanes.start
        v, s = v_ref[:, lanes].astype(dtype), s_ref[:, lanes]
        prefixes = [decay.prefix(head) for head in heads]
        parts = []
        for head, prefix in zip(heads, prefixes, strict=True):
            scores = jnp.concatenate(decay.weights(head, prefix), axis=0) * products
            parts.append(contract(scores.astype(dtype), v, 1, 0))
        until, after = widen(scale * decay.until(heads, prefixes), width), widen(decay.after(heads), width)
        whole = widen(join([decay.whole[h : h + 1] for h in heads]), width)
        y = decayed(until, contract(q, s.astype(dtype), 1, 0), resets) + join(parts)
        y_ref[:, lanes] = y.astype(y_ref.dtype)
        added = contract(transposed, (after * v.astype(jnp.float32)).astype(dtype), 1, 0)
        s_ref[:, lanes] = decayed(jnp.broadcast_to(whole, s.shape), s, resets) + added

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
    kernel = functools.partial(
        _head_kernel,
        lay=lay,
        scale=scale,
        dtype=compute_dtype(q, k, v),
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
            *[pltpu.VMEM((CHUNK // BLOCK * lay.rows, LANES), jnp.float32)] * 2,
            pltpu.VMEM((BLOCK * lay.rows, LANES), jnp.float32),
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

"""The mLSTM cell as a TPU kernel: the forward pass, and what it shares with the backward pass.

The grid runs over batch and heads in parallel and over chunks in order, C and n in VMEM scratch. All products run on
the matrix unit, in bfloat16 when q, k and v are bfloat16, else in float32; sums, gates, C and n are float32. What the
gates amount to is prepared outside (`gates.prepare`): eight numbers per token, read as rows with a token per lane and,
transposed, as columns with a token per sublane. Queries go in blocks of 128, which see only the keys up to their own.

The scale is a factor of numerator and denominator, so it is multiplied to columns and not to matrices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.mlstm import gates, xla
from pallas_kernels.tiles import LANES

ROWS = 8  # numbers per token
COARSE, FINE_M, UNIT, LEAST, INTER, OUTER, DOCUMENT, INPUT_FINE = range(ROWS)
VMEM_LIMIT = 64 * 2**20  # of 128 MiB; the default of 16 does not hold C, its boundaries and their copies
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut into blocks; `chunk` tokens each."""

    batch: int
    length: int
    heads: int
    key: int  # padded to whole lanes, as `value`
    value: int
    chunk: int
    dtype: jnp.dtype  # of the products
    documents: bool
    masked: bool  # some tokens of some block do not count

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.length // self.chunk)


def plan(q, k, v, reset, valid, chunk: int) -> Plan:
    """Pads widths and a lone chunk to whole lanes."""
    batch, length, heads, key = q.shape
    chunk = _lanes(chunk)
    masked = valid is not None or length % chunk != 0
    dtype = jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in (q, k, v)) else jnp.float32
    return Plan(
        batch, length, heads, _lanes(key), _lanes(v.shape[-1]), chunk, jnp.dtype(dtype), reset is not None, masked
    )


def _lanes(size: int) -> int:
    return -(-size // LANES) * LANES


def vmem_bytes(key: int, value: int, chunk: int) -> int:
    """Bytes that the backward pass, the larger one, takes at most."""
    key, value, chunk = _lanes(key), _lanes(value), _lanes(chunk)
    states = 4 * key * value * (1 + 3 * 2 + 1)  # scratch; boundary, first and last twice; what is cast
    tokens = 4 * chunk * (4 * key + 4 * value) * 2  # read and written, twice
    return states + tokens + 4 * chunk * (3 * key + 3 * value + 6 * chunk)


def _supports(q, k, v, i, f, chunk_size: int) -> None:
    for name, array in {"q": q, "k": k, "v": v, "i": i, "f": f}.items():
        if jnp.dtype(array.dtype).name not in DTYPES:
            raise UnsupportedError(
                f"mlstm: mosaic_tpu does not compute in {array.dtype}: {name} must be one of {DTYPES}"
            )
    if chunk_size < q.shape[1] and chunk_size % LANES:
        raise UnsupportedError(
            f"mlstm: mosaic_tpu does not cut lanes: chunk_size={chunk_size} must be a multiple of {LANES}, "
            f"such as {_lanes(chunk_size)}, or T={q.shape[1]} at least"
        )
    needed = vmem_bytes(q.shape[-1], v.shape[-1], chunk_size)
    if q.shape[1] > 1 and needed > VMEM_LIMIT:
        raise UnsupportedError(
            f"mlstm: mosaic_tpu does not hold C in VMEM: K={q.shape[-1]} and V={v.shape[-1]} take "
            f"{needed >> 20} MiB of {VMEM_LIMIT >> 20}"
        )


def supports_forward(q, k, v, i, f, C, n, m, reset, valid, *, scale, eps, chunk_size: int, save: bool) -> None:
    """Raises UnsupportedError where `forward` does not honour an argument."""
    _supports(q, k, v, i, f, chunk_size)


# ---- layouts, outside the kernel ------------------------------------------------------------------------------


def by_token(x, p: Plan):
    """[B, T, H, X] -> [B, T, H X], X padded to whole lanes."""
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, -x.shape[-1] % LANES)])
    return x.reshape(p.batch, p.length, -1)


def from_by_token(x, p: Plan, width: int):
    """The inverse of `by_token`."""
    return x.reshape(p.batch, p.length, p.heads, -1)[..., :width]


def pad_state(x, *widths: int):
    """Zeros up to the given last sizes."""
    return jnp.pad(
        x,
        [(0, 0)] * (x.ndim - len(widths)) + [(0, w - s) for w, s in zip(widths, x.shape[-len(widths) :], strict=True)],
    )


def rows(g: gates.Gates, valid, p: Plan) -> jax.Array:
    """float32 [B, H, N, 8, C]: what the kernels read of the gates; the document of padding is -1."""
    unit, least = jnp.exp(jnp.minimum(g.m, 0.0)), jnp.exp(-jnp.maximum(g.m, 0.0))
    document = jnp.zeros_like(g.m) if g.document is None else g.document.astype(jnp.float32)
    live = jnp.ones((p.batch, p.length), bool) if valid is None else valid
    live = jnp.pad(live, ((0, 0), (0, p.chunks * p.chunk - p.length))).reshape(p.batch, 1, p.chunks, p.chunk)
    document = jnp.where(live, document, -1.0)
    numbers = (g.coarse, g.fine - g.m, unit, least, g.inter, g.outer, document, g.log_input - g.fine)
    return jnp.stack(numbers, axis=3)


class Specs:
    """Block specs of one call; `order` maps the last index of the grid to a chunk."""

    def __init__(self, p: Plan, *, reverse: bool):
        self.p = p
        self.order = (lambda t: p.chunks - 1 - t) if reverse else (lambda t: t)

    def tokens(self, width: int):
        """Of `by_token` arrays."""
        return pl.BlockSpec((None, self.p.chunk, width), lambda b, h, t: (b, self.order(t), h))

    @property
    def rows(self):
        """Of arrays such as those of `rows`."""
        return pl.BlockSpec((None, None, None, ROWS, self.p.chunk), lambda b, h, t: (b, h, self.order(t), 0, 0))

    @property
    def state(self):
        """Of C [B, H, K, V] and n [B, H, 1, K]."""
        shapes = (None, None, self.p.key, self.p.value), (None, None, 1, self.p.key)
        return [pl.BlockSpec(shape, lambda b, h, t: (b, h, 0, 0)) for shape in shapes]

    @property
    def boundaries(self):
        """Of C [B, N, H, K, V] and n [B, N, H, 1, K]."""
        shapes = (None, None, None, self.p.key, self.p.value), (None, None, None, 1, self.p.key)
        return [pl.BlockSpec(shape, lambda b, h, t: (b, self.order(t), h, 0, 0)) for shape in shapes]


def call(kernel, p: Plan, name: str, operands, in_specs, out_shape, out_specs, products: int):
    """Runs a kernel whose scratch is C and n; `products` counts multiplications of [., K] with [K, V]."""
    size = sum(a.size * a.dtype.itemsize for a in (*operands, *out_shape))
    tokens = p.batch * p.heads * p.chunks * p.chunk
    return pl.pallas_call(
        kernel,
        grid=(p.batch, p.heads, p.chunks),
        in_specs=list(in_specs),
        out_specs=list(out_specs),
        out_shape=list(out_shape),
        scratch_shapes=[pltpu.VMEM((p.key, p.value), jnp.float32), pltpu.VMEM((1, p.key), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * tokens * p.key * p.value, bytes_accessed=size, transcendentals=tokens * p.chunk
        ),
        interpret=interpret.parameters(),
        name=name,
    )(*operands)


# ---- pieces of a kernel ---------------------------------------------------------------------------------------


def dot(a, b, axes: tuple[int, int] = (1, 0)):
    """Float32 product that contracts these axes of a and b."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def total(x):
    """[C, X] -> [C, 1]."""
    return jnp.sum(x, axis=1, keepdims=True)


class Numbers:
    """The gates of a chunk, and what a kernel does with them."""

    def __init__(self, ref, p: Plan):
        self.p = p
        self._rows = ref[...]
        self._columns = self._rows.T

    def row(self, index: int, stop: int | None = None):
        """[1, stop]."""
        return self._rows[index : index + 1, :stop]

    def column(self, index: int, block: slice = slice(None)):
        """[C, 1], or those of a block."""
        return self._columns[block, index : index + 1]

    @property
    def decay(self):
        """[1, 1] weight of the state before the chunk in that after it."""
        return self._rows[INTER : INTER + 1, self.p.chunk - 1 :]

    def load(self, ref, block: slice = slice(None)):
        """Tokens in the dtype of the products, zeros at padding; to be called where they are used, or they spill."""
        x = ref[block, :]
        if self.p.masked:
            x = jnp.where(self.column(DOCUMENT, block) >= 0, x, jnp.zeros_like(x))
        return x.astype(self.p.dtype)

    def carried(self, weight, x):
        """weight * x; where documents start, what came before does not matter, finite or not."""
        return jnp.where(weight > 0, weight * x, 0.0) if self.p.documents else weight * x

    def weights(self, block: slice):
        """[128, stop] weights of the tokens up to the end of the block at those of the block."""
        stop = block.stop
        exponent = (self.column(COARSE, block) - self.row(COARSE, stop)) + (
            self.column(FINE_M, block) + self.row(INPUT_FINE, stop)
        )
        token = lax.broadcasted_iota(jnp.int32, exponent.shape, 0) + block.start
        sees = token >= lax.broadcasted_iota(jnp.int32, exponent.shape, 1)
        if self.p.documents:
            sees = sees & (self.column(DOCUMENT, block) == self.row(DOCUMENT, stop))
        return jnp.exp(jnp.where(sees, exponent, gates.NEVER))

    def normaliser(self, scores, q, n, block: slice, scale: float, eps: float):
        """[128, 1] 1 / (max(|denominator|, exp(-m)) + eps), and the denominator's sign where it is the larger one."""
        inter = self.column(INTER, block)
        denominator = scale * (total(scores) + self.carried(inter, total(q.astype(jnp.float32) * n)))
        unit, least = self.column(UNIT, block), self.column(LEAST, block)
        size = jnp.abs(denominator) * unit
        return unit / (jnp.maximum(size, least) + eps * unit), jnp.where(
            size > least, jnp.where(denominator > 0, 1.0, -1.0), 0.0
        )


def blocks(p: Plan) -> list[slice]:
    """The queries of a chunk in blocks of 128."""
    return [slice(start, start + LANES) for start in range(0, p.chunk, LANES)]


def _forward_kernel(*refs, p: Plan, scale: float, eps: float, fresh: bool, save: bool):
    gates_ref, q_ref, k_ref, v_ref, *refs = refs
    initial_refs, refs = ((), refs) if fresh else (refs[:2], refs[2:])
    y_ref, *out_refs, C_ref, n_ref = refs
    last_refs, boundary_refs = out_refs[:2], out_refs[2:]
    state_refs = (C_ref, n_ref)

    @pl.when(pl.program_id(2) == 0)
    def _():
        for i, ref in enumerate(state_refs):
            ref[...] = jnp.zeros_like(ref) if fresh else initial_refs[i][...]

    for boundary, ref in zip(boundary_refs, state_refs, strict=save):
        boundary[...] = ref[...]

    g = Numbers(gates_ref, p)
    n = n_ref[...]
    for block in blocks(p):
        seen, q = slice(0, block.stop), g.load(q_ref, block)
        scores = g.weights(block) * dot(q, g.load(k_ref, seen), (1, 1))
        factor = g.normaliser(scores, q, n, block, scale, eps)[0]
        y = g.carried(g.column(INTER, block), dot(q, C_ref[...].astype(p.dtype)))
        y = y + dot(scores.astype(p.dtype), g.load(v_ref, seen))
        y = y * (scale * factor)
        if p.masked:
            y = jnp.where(g.column(DOCUMENT, block) >= 0, y, 0.0)
        y_ref[block, :] = y.astype(y_ref.dtype)
    written = g.load(k_ref).astype(jnp.float32) * g.column(OUTER)
    n_ref[...] = g.carried(g.decay, n) + jnp.sum(written, axis=0, keepdims=True)
    C_ref[...] = g.carried(g.decay, C_ref[...]) + dot(written.astype(p.dtype), g.load(v_ref), (0, 0))

    @pl.when(pl.program_id(2) == p.chunks - 1)
    def _():
        for last, ref in zip(last_refs, state_refs, strict=True):
            last[...] = ref[...]


def state_shapes(p: Plan, *, boundaries: bool):
    """Of C and n as the kernels see them."""
    lead = (p.batch, p.chunks, p.heads) if boundaries else (p.batch, p.heads)
    return [jax.ShapeDtypeStruct((*lead, *shape), jnp.float32) for shape in ((p.key, p.value), (1, p.key))]


def padded_state(C, n, p: Plan):
    """C [..., K, V] and n [..., K] as the kernels see them."""
    return pad_state(C, p.key, p.value), pad_state(n[..., None, :], 1, p.key)


def forward(q, k, v, i, f, C, n, m, reset, valid, *, scale: float, eps: float, chunk_size: int, save: bool):
    """Returns (y, C, n, m, boundaries) as `xla.forward` does."""
    static = {"scale": scale, "eps": eps}
    if q.shape[1] == 1:  # a single token is elementwise: XLA fuses it with its neighbours
        return xla.forward(q, k, v, i, f, C, n, m, reset, valid, **static, chunk_size=chunk_size, save=save)
    p = plan(q, k, v, reset, valid, chunk_size)
    fresh, (key, value) = C is None, (q.shape[-1], v.shape[-1])
    m = jnp.zeros((p.batch, p.heads), jnp.float32) if m is None else m
    g = gates.prepare(i, f, m, reset, valid, p.chunk)
    specs = Specs(p, reverse=False)
    operands = [rows(g, valid, p), *(by_token(x, p) for x in (q, k, v))]
    in_specs = [specs.rows, specs.tokens(p.key), specs.tokens(p.key), specs.tokens(p.value)]
    if not fresh:
        operands, in_specs = [*operands, *padded_state(C, n, p)], [*in_specs, *specs.state]
    out_shape = [jax.ShapeDtypeStruct((p.batch, p.length, p.heads * p.value), v.dtype)]
    out_shape, out_specs = out_shape + state_shapes(p, boundaries=False), [specs.tokens(p.value), *specs.state]
    if save:
        out_shape, out_specs = out_shape + state_shapes(p, boundaries=True), out_specs + specs.boundaries
    kernel = functools.partial(_forward_kernel, p=p, fresh=fresh, save=save, **static)
    y, last_C, last_n, *boundaries = call(kernel, p, "mlstm_forward", operands, in_specs, out_shape, out_specs, 2)
    if save:
        boundaries = boundaries[0][..., :key, :value], boundaries[1][..., 0, :key]
    state = last_C[..., :key, :value], last_n[..., 0, :key], g.m[..., -1, -1]
    return from_by_token(y, p, value), *state, boundaries if save else None

"""Shampoo whose statistics are kept as eigenvectors in four bits (4-bit Shampoo)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from objectives.checks import check_positive, check_range
from objectives.optimizers import common
from objectives.optimizers import layout as layout_lib
from objectives.optimizers.layout import Layout
from objectives.optimizers.registry import register
from zoo.core.params import Tree
from zoo.core.registry import check_choice

ROOT = 4  # of the inverse roots: one over twice the number of sides
BITS = (4, 32)


def codebook() -> np.ndarray:
    """The 16 values of linear-square quantisation (arXiv:2405.18144, section 3.3): sign(u) u^2 of u = -1 + 2 j / 15,
    with 0 in place of the eighth."""
    u = np.linspace(-1.0, 1.0, 16)
    u[7] = 0.0
    return (np.sign(u) * u * u).astype(np.float32)


class Packed(NamedTuple):
    """Matrices in four bits.

    Attributes:
      codes: uint8 [..., padded rows / 2, columns], two codes to a byte, the first row of a pair in the high bits.
      scales: largest size in each block of a column, float32 [..., blocks, columns].
    """

    codes: jax.Array
    scales: jax.Array


def quantize(x: jax.Array, block: int) -> Packed:
    """The nearest values of the codebook times the largest size of `block` rows of a column; x [..., n, n]."""
    rows, columns = x.shape[-2:]
    padding = [(0, 0)] * (x.ndim - 2) + [(0, -rows % block), (0, 0)]
    x = jnp.pad(x.astype(jnp.float32), padding)
    x = x.reshape(*x.shape[:-2], -1, block, columns)
    scales = jnp.max(jnp.abs(x), axis=-2)
    unit = x / jnp.where(scales > 0, scales, 1.0)[..., None, :]
    book = codebook()
    codes = jnp.searchsorted(jnp.asarray((book[1:] + book[:-1]) / 2), unit).astype(jnp.uint8)
    codes = codes.reshape(*codes.shape[:-3], -1, 2, columns)
    return Packed((codes[..., 0, :] << 4) | codes[..., 1, :], scales)


def dequantize(packed: Packed, rows: int) -> jax.Array:
    """float32 [..., rows, columns]."""
    codes = jnp.stack([packed.codes >> 4, packed.codes & 15], axis=-2)
    blocks, columns = packed.scales.shape[-2:]
    values = jnp.asarray(codebook())[codes].reshape(*packed.scales.shape[:-1], -1, columns)
    values = values * packed.scales[..., None, :]
    return values.reshape(*values.shape[:-3], blocks * values.shape[-2], columns)[..., :rows, :]


def rectify(v: jax.Array, steps: int) -> jax.Array:
    """Bjorck's iteration towards the nearest orthogonal matrix: V = 1.5 V - 0.5 V V'V."""
    for _ in range(steps):
        v = 1.5 * v - 0.5 * v @ (v.T @ v)
    return v


def update_eigen(v: jax.Array, values: jax.Array, statistic: jax.Array, decay: float) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors and eigenvalues of decay V diag(values) V' + (1 - decay) statistic, by one step of orthogonal
    iteration from V (algorithm 1 of the paper)."""
    a = decay * (v * values) @ v.T + (1 - decay) * statistic
    q, _ = jnp.linalg.qr(a @ v)
    return q, jnp.sum(q * (a @ q), axis=0)


def inverse_root(v: jax.Array, values: jax.Array, eps: float) -> jax.Array:
    """V diag((values + eps max(values))^(-1/4)) V' (algorithm 2 of the paper)."""
    return (v * (jnp.maximum(values, 0.0) + eps * jnp.max(values)) ** (-1.0 / ROOT)) @ v.T


class Side(NamedTuple):
    """Statistic and inverse root of one side of a matrix.

    Attributes:
      vectors: eigenvectors [L, n, n], `Packed` or float32.
      values: eigenvalues, float32 [L, n].
      root: the inverse root off its diagonal, `Packed` or float32.
      diagonal: of the inverse root, float32 [L, n].
    """

    vectors: Any
    values: jax.Array
    root: Any
    diagonal: jax.Array


def _keep(x: jax.Array, block: int) -> Any:
    return quantize(x, block) if block else x.astype(jnp.float32)


def _read(x: Any) -> jax.Array:
    return dequantize(x, x.scales.shape[-1]) if isinstance(x, Packed) else x


def _refresh_vectors(side: Side, statistic: jax.Array, decay: float, rectifications: int, block: int) -> Side:
    def one(v: jax.Array, values: jax.Array, statistic: jax.Array) -> tuple[jax.Array, jax.Array]:
        return update_eigen(rectify(v, rectifications), values, statistic, decay)

    v, values = jax.vmap(one)(_read(side.vectors), side.values, statistic)
    return side._replace(vectors=_keep(v, block), values=values)


def _refresh_root(side: Side, eps: float, rectifications: int, block: int) -> Side:
    def one(v: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        root = inverse_root(rectify(v, rectifications), values, eps)
        diagonal = jnp.diagonal(root)
        return root - jnp.diag(diagonal), diagonal

    root, diagonal = jax.vmap(one)(_read(side.vectors), side.values)
    return side._replace(root=_keep(root, block), diagonal=diagonal)


def _root(side: Side) -> jax.Array:
    return _read(side.root) + side.diagonal[:, :, None] * jnp.eye(side.diagonal.shape[1])


class ShampooState(NamedTuple):
    """State of `scale_by_shampoo`.

    Attributes:
      count: updates so far.
      sides: of every matrix leaf, the `Side` of rows and of columns; None of all else and of sides above `max_size`.
    """

    count: jax.Array
    sides: Any


def scale_by_shampoo(
    *,
    bits: int = 4,
    decay: float = 0.95,
    eps: float = 1e-6,
    statistic_every: int = 100,
    root_every: int = 500,
    rectify_statistic: int = 1,
    rectify_root: int = 4,
    max_size: int = 1200,
    block: int = 64,
    min_quantized: int = 4096,
    layout: Tree | None = None,
) -> optax.GradientTransformation:
    """L^-1/4 G R^-1/4 of matrices, of the norm of G; other leaves pass; see `shampoo`."""
    check_choice("bits", bits, BITS)
    check_range(0.0, 1.0, open_high=True, decay=decay)
    check_positive(eps=eps)
    check_range(1, math.inf, statistic_every=statistic_every, root_every=root_every, max_size=max_size)
    check_range(0, math.inf, rectify_statistic=rectify_statistic, rectify_root=rectify_root)
    if block < 2 or block % 2:
        raise ValueError(f"block={block} must be even and at least 2: two codes share a byte")

    def block_of(size: int) -> int:
        return block if bits == 4 and size * size >= min_quantized else 0

    def init(params: Any) -> ShampooState:
        def one(x: jax.Array, how: Layout) -> tuple[Any]:
            if not how.is_matrix:
                return (None,)
            layers, *sizes = how.matrix_shape(x.shape)

            def side(size: int) -> Side | None:
                if size > max_size or size == 1:
                    return None
                eye = jnp.tile(jnp.eye(size), (layers, 1, 1))
                ones = jnp.ones((layers, size), jnp.float32)
                return Side(_keep(eye, block_of(size)), eps * ones, _keep(0.0 * eye, block_of(size)), ones)

            return (tuple(map(side, sizes)),)

        (sides,) = common.map_tuple(1, one, params, layout_lib.resolve(layout, params))
        return ShampooState(jnp.zeros((), jnp.int32), sides)

    def update(updates: Any, state: ShampooState, params: Any = None) -> tuple[Any, ShampooState]:
        del params
        count = common.increment(state.count)

        def one(g: jax.Array, how: Layout, sides: Any) -> tuple[Any, Any]:
            if sides is None:
                return g, None
            matrices = layout_lib.to_matrices(g.astype(jnp.float32), how)
            white, new = matrices, []
            for axis, side in enumerate(sides):
                if side is None:
                    new.append(None)
                    continue
                held = block_of(side.values.shape[1])
                pair = "lmn,lkn->lmk" if axis == 0 else "lmn,lmk->lnk"
                side = jax.lax.cond(
                    count % statistic_every == 0,
                    lambda side, pair=pair, held=held: _refresh_vectors(
                        side, jnp.einsum(pair, matrices, matrices), decay, rectify_statistic, held
                    ),
                    lambda side: side,
                    side,
                )
                side = jax.lax.cond(
                    count % root_every == 0,
                    lambda side, held=held: _refresh_root(side, eps, rectify_root, held),
                    lambda side: side,
                    side,
                )
                new.append(side)
                white = jnp.einsum(
                    "lmk,lkn->lmn" if axis == 0 else "lmn,lnk->lmk",
                    *((_root(side), white) if axis == 0 else (white, _root(side))),
                )
            axes = (1, 2)
            norms = [jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True)) for x in (matrices, white)]
            white = white * (norms[0] / (norms[1] + 1e-12))
            return white.reshape(g.shape).astype(g.dtype), tuple(new)

        how = layout_lib.resolve(layout, updates)
        white, sides = common.map_tuple(2, one, updates, how, state.sides)
        return white, ShampooState(count, sides)

    return common.transformation(init, update)


@register("shampoo", papers=("2405.18144", "1802.09568"), proof="test_shampoo.py::test_32_bits_against_numpy")
def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    bits: int = 4,
    b1: float = 0.9,
    b2: float = 0.999,
    adam_eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: float = 0.95,
    eps: float = 1e-6,
    statistic_every: int = 100,
    root_every: int = 500,
    rectify_statistic: int = 1,
    rectify_root: int = 4,
    max_size: int = 1200,
    block: int = 64,
    min_quantized: int = 4096,
    mask: Tree | None = None,
    layout: Tree | None = None,
) -> optax.GradientTransformation:
    """Shampoo before AdamW, its statistics as eigenvectors in four bits (arXiv:2405.18144, algorithms 1 to 3).

      every `statistic_every` steps   L = decay L + (1 - decay) G G',   R = decay R + (1 - decay) G'G
      every `root_every` steps        L^-1/4, R^-1/4
      G~ = L^-1/4 G R^-1/4 |G| / |L^-1/4 G R^-1/4|,   then AdamW on G~

    L = V diag(lambda) V' is kept as lambda in float32 and V in codes of `codebook`, in blocks of a column; V is
    rectified before it is used, and follows L by one step of orthogonal iteration. Roots keep their diagonal in
    float32. L begins at eps 1, its root at 1. Intervals, rectifications and the norm are as in the authors' code
    (ShampooAdamW). There sides above `max_size` are split into blocks; here such a side has no preconditioner. Each
    layer of a stacked leaf is a matrix of its own; leaves that are no matrices have AdamW alone.
    State of a side n in four bits: n^2 bytes, and AdamW's 8 bytes a parameter.

    Args:
      learning_rate: lr.
      bits: 4, or 32 for float32.
      b1: of Adam.
      b2: of Adam.
      adam_eps: of Adam.
      weight_decay: decoupled, times the learning rate.
      decay: beta of the statistics, in [0, 1).
      eps: damping of the roots over the largest eigenvalue, above 0.
      statistic_every: T1.
      root_every: T2.
      rectify_statistic: Bjorck steps before a statistic, t1.
      rectify_root: Bjorck steps before a root, t2.
      max_size: largest side with a preconditioner.
      block: rows of a column that share a scale, even.
      min_quantized: sides of fewer than so many elements stay in float32.
      mask: True where the decay applies.
      layout: which leaves are matrices.
    """
    check_range(0.0, math.inf, weight_decay=weight_decay)
    return optax.chain(
        scale_by_shampoo(
            bits=bits,
            decay=decay,
            eps=eps,
            statistic_every=statistic_every,
            root_every=root_every,
            rectify_statistic=rectify_statistic,
            rectify_root=rectify_root,
            max_size=max_size,
            block=block,
            min_quantized=min_quantized,
            layout=layout,
        ),
        _adam_in_float32(b1, b2, adam_eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _adam_in_float32(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """scale_by_adam with moments in float32 whatever the parameters are."""
    adam = optax.scale_by_adam(b1, b2, eps)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        step, state = adam.update(common.raised(updates), state)
        return common.cast_like(step, updates), state

    return common.transformation(lambda params: adam.init(common.raised(params)), update)

"""Preconditioned SGD whose preconditioner is a product of small factors, one for each side of a matrix (PSGD Kron)."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from objectives.checks import check_positive, check_range
from objectives.optimizers import common
from objectives.optimizers import layout as layout_lib
from objectives.optimizers.layout import Layout
from objectives.optimizers.registry import register
from zoo.core.params import Tree
from zoo.core.registry import check_choice

DIAGONAL = ("none", "largest", "all")
BALANCE_EVERY = 100  # updates of the factors; kron-torch balances with probability 1 / 100
MAX_RMS = 1.1  # of a preconditioned gradient, which is white where the factors fit
Factors = tuple[jax.Array, ...]


def anneal_probability(
    count: jax.Array, *, most: float = 1.0, least: float = 0.03, decay: float = 0.001, flat: int = 500
) -> jax.Array:
    """How often factors are updated: most for `flat` steps, then most e^(-decay (step - flat)), at least `least`."""
    return jnp.clip(most * jnp.exp(-decay * (count.astype(jnp.float32) - flat)), least, most)


def tensor_view(shape: tuple[int, ...], how: Layout) -> tuple[int, ...]:
    """[layers, rows, columns] of leaves of two dimensions or more, [layers, size] of all others.

    A leaf that is no matrix (an embedding, a convolution) has its last dimension as columns.
    """
    if how.is_matrix:
        return how.matrix_shape(shape)
    layers, inner = (shape[0], shape[1:]) if how.stacked else (1, shape)
    return (layers, math.prod(inner[:-1]), inner[-1]) if len(inner) > 1 else (layers, math.prod(inner))


def diagonal_sides(shape: tuple[int, ...], max_size: int, diagonal: str) -> tuple[bool, ...]:
    """Which sides of a tensor have a diagonal factor: [rows, columns], or the only one of a vector."""
    largest = max(range(len(shape)), key=lambda i: (shape[i], i)) if diagonal == "largest" else -1
    return tuple(
        len(shape) < 2 or size == 1 or size > max_size or diagonal == "all" or i == largest
        for i, size in enumerate(shape)
    )


def _apply(q: jax.Array, x: jax.Array, side: int, *, transposed: bool = False) -> jax.Array:
    """q (or its transpose) times x on one side; q is a vector where it is diagonal."""
    if q.ndim == 1:
        return x * (q if side == x.ndim - 1 else q[:, None])
    q = q.T if transposed else q
    return q @ x if side == 0 else x @ q.T


def _solve_transposed(q: jax.Array, x: jax.Array, side: int) -> jax.Array:
    """q^-T times x on one side."""
    if q.ndim == 1:
        return x / (q if side == x.ndim - 1 else q[:, None])
    solve = jax.scipy.linalg.solve_triangular
    return solve(q, x, trans=1) if side == 0 else solve(q, x.T, trans=1).T


def _square(x: jax.Array, side: int, diagonal: bool) -> jax.Array:
    """x x' of the rows (side 0) or x' x of the columns (side 1), or its diagonal."""
    if x.ndim == 1:
        return x * x
    if diagonal:
        return jnp.sum(x * x, axis=1 - side)
    return x @ x.T if side == 0 else x.T @ x


def _norm_bound(a: jax.Array, largest: jax.Array) -> jax.Array:
    """A lower bound of the spectral norm of a symmetric matrix: two products with its longest column."""
    safe = jnp.where(largest > 0, largest, 1.0)
    a = a / safe
    column = a[:, jnp.argmax(jnp.sum(a * a, axis=0))]
    x = column @ a
    length = jnp.linalg.norm(x)
    return jnp.linalg.norm(a @ (x / jnp.where(length > 0, length, 1.0))) * safe


def update_factors(factors: Factors, g: jax.Array, probe: jax.Array, step_size: float) -> Factors:
    """One step of every factor on the criterion E[g' P g + v' P^-1 v], P = Q'Q, whose minimum whitens g.

      A = Q_1 g Q_2',   B = Q_1^-T v Q_2^-1
      Q_1 = Q_1 - step_size triu(A A' - B B') Q_1 / |A A' + B B'|,   likewise Q_2 with A' A and B' B

    Args:
      factors: Q of each side, upper triangular, or a vector where it is diagonal.
      g: gradient of one tensor, [rows, columns] or [size].
      probe: v of g's shape, standard normal.
      step_size: of the factors.
    """
    noise = math.sqrt(float(jnp.finfo(jnp.float32).eps)) * jnp.mean(jnp.abs(g))
    a, b = g + noise * probe, probe
    for side, q in enumerate(factors):
        a, b = _apply(q, a, side), _solve_transposed(q, b, side)
    tiny, new = jnp.finfo(g.dtype).tiny, []
    for side, q in enumerate(factors):
        of_gradient, of_probe = (_square(x, side, q.ndim == 1) for x in (a, b))
        change, scale = step_size * (of_gradient - of_probe), of_gradient + of_probe
        largest = jnp.max(jnp.abs(scale))
        if q.ndim == 1:
            new.append(q - change * q / jnp.maximum(largest, tiny))
        else:
            new.append(q - (jnp.triu(change) / jnp.maximum(_norm_bound(scale, largest), tiny)) @ q)
    return tuple(new)


def precondition(factors: Factors, g: jax.Array) -> jax.Array:
    """Q'Q g on every side."""
    for side, q in enumerate(factors):
        g = _apply(q, _apply(q, g, side), side, transposed=True)
    return g


def _balance(factors: Factors) -> Factors:
    """Factors of one magnitude, their product as it was."""
    sizes = jnp.stack([jnp.max(jnp.abs(q)) for q in factors])
    mean = jnp.exp(jnp.mean(jnp.log(sizes)))
    return tuple(q * (mean / size) for q, size in zip(factors, sizes, strict=True))


def _probe(seed: int, count: jax.Array, index: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The standard normal tensor of a step and a leaf."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), count), index)
    return jax.random.normal(key, shape, dtype)


class KronState(NamedTuple):
    """State of `scale_by_kron`.

    Attributes:
      count: updates so far.
      since: updates since the factors' last.
      renewed: updates of the factors so far.
      momentum: moving average of the gradient.
      factors: of every leaf, a tuple over its sides: [L, n, n], or [L, n] where diagonal.
    """

    count: jax.Array
    since: jax.Array
    renewed: jax.Array
    momentum: Any
    factors: Any


def scale_by_kron(
    *,
    b1: float = 0.9,
    update_probability: float | Callable[[jax.Array], jax.Array] | None = None,
    step_size: float = 0.1,
    initial_scale: float = 1.0,
    max_size: int = 8192,
    diagonal: str = "none",
    seed: int = 0,
    layout: Tree | None = None,
) -> optax.GradientTransformation:
    """The preconditioned momentum; see `psgd_kron`. `update_probability` may be a function of the step, too."""
    check_range(0.0, 1.0, open_high=True, b1=b1)
    check_positive(step_size=step_size, initial_scale=initial_scale)
    check_range(1, math.inf, max_size=max_size)
    check_choice("diagonal", diagonal, DIAGONAL)
    if isinstance(update_probability, (int, float)):
        check_range(0.0, 1.0, update_probability=update_probability)
        check_positive(update_probability=update_probability)
    probability = anneal_probability if update_probability is None else update_probability

    def init(params: Any) -> KronState:
        def one(x: jax.Array, how: Layout) -> tuple[Factors]:
            layers, *shape = tensor_view(x.shape, how)
            sides, dtype = diagonal_sides(tuple(shape), max_size, diagonal), common.state_dtype(x)
            scale = initial_scale ** (1.0 / len(shape))

            def factor(size: int, vector: bool) -> jax.Array:
                q = jnp.ones(size, dtype) if vector else jnp.eye(size, dtype=dtype)
                return jnp.tile(scale * q, (layers, *(1,) * q.ndim))

            return (tuple(map(factor, shape, sides)),)

        (factors,) = common.map_tuple(1, one, params, layout_lib.resolve(layout, params))
        zero = jnp.zeros((), jnp.int32)
        return KronState(zero, zero, zero, common.zeros(params), factors)

    def update(updates: Any, state: KronState, params: Any = None) -> tuple[Any, KronState]:
        del params
        count, since = common.increment(state.count), state.since + 1
        chance = probability(state.count) if callable(probability) else probability
        renew = since >= 1.0 / chance
        balance = renew & (state.renewed % BALANCE_EVERY == BALANCE_EVERY - 1)
        indices = iter(range(len(jax.tree.leaves(updates))))

        def one(g: jax.Array, how: Layout, m: jax.Array, factors: Factors) -> tuple[Any, ...]:
            m = b1 * m + (1 - b1) * g.astype(m.dtype)
            tensors = (m / (1 - b1**count)).reshape(tensor_view(g.shape, how))
            index = next(indices)

            def renewed() -> Factors:
                old = factors
                if len(old) > 1:
                    old = jax.lax.cond(balance, lambda: jax.vmap(_balance)(factors), lambda: factors)
                probe = _probe(seed, state.count, index, tensors.shape, m.dtype)
                return jax.vmap(lambda q, g, v: update_factors(q, g, v, step_size))(old, tensors, probe)

            factors = jax.lax.cond(renew, renewed, lambda: factors)
            white = jax.vmap(precondition)(factors, tensors)
            axes = tuple(range(1, white.ndim))
            rms = jnp.sqrt(jnp.mean(white * white, axis=axes, keepdims=True))
            white = white * jnp.minimum(1.0, MAX_RMS / (rms + 1e-12))
            return white.reshape(g.shape).astype(g.dtype), m, factors

        how = layout_lib.resolve(layout, updates)
        white, momentum, factors = common.map_tuple(3, one, updates, how, state.momentum, state.factors)
        return white, KronState(count, jnp.where(renew, 0, since), state.renewed + renew, momentum, factors)

    return common.transformation(init, update)


@register("psgd_kron", papers=("1512.04202", "1809.10232"), proof="test_psgd.py::test_kron_against_the_package")
def psgd_kron(
    learning_rate: optax.ScalarOrSchedule = 3e-4,
    *,
    b1: float = 0.9,
    weight_decay: float = 0.0,
    update_probability: float | None = None,
    step_size: float = 0.1,
    initial_scale: float = 1.0,
    max_size: int = 8192,
    diagonal: str = "none",
    seed: int = 0,
    mask: Tree | None = None,
    layout: Tree | None = None,
) -> optax.GradientTransformation:
    """PSGD with a Kronecker-factored preconditioner that whitens the gradient (arXiv:1512.04202, 1809.10232).

      m = b1 m + (1 - b1) g, without bias;   at updates of the factors: `update_factors` with m
      x = x - lr (clip(Q_1' Q_1 m Q_2' Q_2) + weight_decay x),   clip: root mean square of at most 1.1

    As kron-torch 0.3.3, with these differences: factors are balanced after every 100th of their updates and not at
    random, and the noise of the probe stays out of the step (there it is added to m in place). Each layer of a stacked
    leaf has factors of its own. Vectors, sides of size 1 and sides above `max_size` have diagonal factors.
    State of a matrix m x n, in float32: m n + m^2 + n^2 numbers.

    Args:
      learning_rate: lr; about a third of Adam's.
      b1: of the momentum, in [0, 1).
      weight_decay: decoupled, times the learning rate.
      update_probability: share of steps that update the factors, in (0, 1]; None = 1 for 500 steps, then down to 0.03.
      step_size: of the factors.
      initial_scale: of the product of the factors at the beginning.
      max_size: largest side with a triangular factor.
      diagonal: sides with diagonal factors whatever their size: "none", "largest" of a matrix, "all".
      seed: of the probes.
      mask: True where the decay applies.
      layout: which leaves stack layers, and how they are matrices.
    """
    check_range(0.0, math.inf, weight_decay=weight_decay)
    return optax.chain(
        scale_by_kron(
            b1=b1,
            update_probability=update_probability,
            step_size=step_size,
            initial_scale=initial_scale,
            max_size=max_size,
            diagonal=diagonal,
            seed=seed,
            layout=layout,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )

"""Preconditioned SGD whose preconditioner is a diagonal times a low-rank change of the identity (PSGD LRA).

All parameters share one preconditioner P = Q'Q, Q = (I + U V') diag(d). U and V have a row for every parameter; they
are trees like the parameters with a trailing dimension for the rank, so that they lie on devices as the parameters do.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from objectives.checks import check_positive, check_range
from objectives.optimizers import common
from objectives.optimizers.registry import register
from zoo.core.params import Tree

BALANCE_EVERY = 100  # updates of the preconditioner; psgd-jax balances with probability 1 / 100


class LowRank(NamedTuple):
    """Q = (I + U V') diag(d).

    Attributes:
      u: tree of [*shape, r].
      v: likewise.
      d: tree of [*shape].
    """

    u: Any
    v: Any
    d: Any


def _project(x: Any, basis: Any) -> jax.Array:
    """x' basis, [r], or [s, r] where the leaves of x have a trailing dimension too."""
    sums = jax.tree.map(lambda x, b: _flat(x, b).T @ b.reshape(-1, b.shape[-1]), x, basis)
    result = common.total(sums)
    return result[0] if jax.tree.leaves(x)[0].ndim < jax.tree.leaves(basis)[0].ndim else result


def _flat(x: jax.Array, basis: jax.Array) -> jax.Array:
    return x.reshape(math.prod(basis.shape[:-1]), -1)


def _add(x: Any, basis: Any, weights: jax.Array) -> Any:
    """x + basis weights."""
    return jax.tree.map(lambda x, b: x + b @ weights, x, basis)


def _times(x: Any, y: Any) -> Any:
    return jax.tree.map(jnp.multiply, x, y)


def _norm(x: Any) -> jax.Array:
    return jnp.sqrt(common.inner(x, x))


def precondition(q: LowRank, g: Any) -> Any:
    """P g = diag(d) (I + V U') (I + U V') diag(d) g."""
    x = _times(q.d, g)
    x = _add(x, q.u, _project(x, q.v))
    return _times(q.d, _add(x, q.v, _project(x, q.u)))


def update_preconditioner(q: LowRank, h: Any, probe: Any, step_size: Any, update_u: jax.Array) -> LowRank:
    """One step on the criterion E[h' P h + v' P^-1 v] in d and in U or V (arXiv:2402.04553; psgd-jax 0.2.9).

    Its minimum whitens h; with h a Hessian times v it is |Hessian|^-1. Steps are those of a group.

    Args:
      q: U, V, d.
      h: tree like d.
      probe: v, standard normal, likewise.
      step_size: over the curvature of the criterion.
      update_u: whether U is updated, else V.
    """
    u, v, d = q
    a = _times(d, h)
    a = _add(a, u, _project(a, v))  # Q h
    ph = _times(d, _add(a, v, _project(a, u)))
    inner = jnp.eye(jax.tree.leaves(u)[0].shape[-1]) + _project(v, u)  # I + V'U
    b = jax.tree.map(jnp.divide, probe, d)
    b = _add(b, v, -jnp.linalg.solve(inner.T, _project(b, u)))  # Q^-T v
    inverse = _add(b, u, -jnp.linalg.solve(inner, _project(b, v)))
    inverse = jax.tree.map(jnp.divide, inverse, d)  # P^-1 v
    tiny = jnp.finfo(jnp.float32).tiny
    smallest = jax.tree.map(
        lambda ph, h, w, iw: jnp.min(jax.lax.rsqrt(ph * ph + w * w + tiny) * jax.lax.rsqrt(h * h + iw * iw + tiny)),
        *(ph, h, probe, inverse),
    )
    size = step_size * jnp.min(jnp.stack(jax.tree.leaves(smallest)))
    new_d = jax.tree.map(lambda d, ph, h, w, iw: d - size * d * (ph * h - w * iw), d, ph, h, probe, inverse)

    def rates(basis: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """a' basis, b' basis and the step."""
        from_a, from_b = _project(a, basis), _project(b, basis)
        back = [_norm(jax.tree.map(lambda x, w=w: x @ w, basis)) for w in (from_a, from_b)]
        return from_a, from_b, step_size / (_norm(a) * back[0] + _norm(b) * back[1] + tiny)

    def outer(x: Any, weights: jax.Array) -> Any:
        return jax.tree.map(lambda x: x[..., None] * weights, x)

    def change_u() -> tuple[Any, Any]:
        from_a, from_b, rate = rates(v)
        change = jax.tree.map(jnp.subtract, outer(a, from_a @ inner), outer(b, from_b @ inner))
        return jax.tree.map(lambda u, c: u - rate * c, u, change), v

    def change_v() -> tuple[Any, Any]:
        from_a, from_b, rate = rates(u)
        change = jax.tree.map(jnp.subtract, outer(_add(a, v, from_a), from_a), outer(_add(b, v, from_b), from_b))
        return u, jax.tree.map(lambda v, c: v - rate * c, v, change)

    u, v = jax.lax.cond(update_u, change_u, change_v)
    return LowRank(u, v, new_d)


class LowRankState(NamedTuple):
    """State of `scale_by_psgd_low_rank`.

    Attributes:
      count: updates so far.
      momentum: moving average of the gradient.
      preconditioner: U, V and d.
    """

    count: jax.Array
    momentum: Any
    preconditioner: LowRank


def _normals(key: jax.Array, shapes: Tree) -> Tree:
    leaves, structure = jax.tree.flatten(shapes)
    drawn = [jax.random.normal(jax.random.fold_in(key, i), s.shape, s.dtype) for i, s in enumerate(leaves)]
    return structure.unflatten(drawn)


def scale_by_psgd_low_rank(
    *, rank: int = 10, b1: float = 0.9, update_probability: float = 1.0, step_size: float = 0.1, seed: int = 0
) -> optax.GradientTransformation:
    """The preconditioned momentum; see `psgd_low_rank`."""
    check_range(1, math.inf, rank=rank)
    check_range(0.0, 1.0, open_high=True, b1=b1)
    check_range(0.0, 1.0, update_probability=update_probability)
    check_positive(step_size=step_size, update_probability=update_probability)

    def init(params: Any) -> LowRankState:
        total = sum(x.size for x in jax.tree.leaves(params))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape, rank), common.state_dtype(x)), params)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0))
        u, v = (jax.tree.map(lambda x: x / math.sqrt(total * (rank + 10)), _normals(key, shapes)) for key in keys)
        ones = jax.tree.map(jnp.ones_like, common.zeros(params))
        return LowRankState(jnp.zeros((), jnp.int32), common.zeros(params), LowRank(u, v, ones))

    def update(updates: Any, state: LowRankState, params: Any = None) -> tuple[Any, LowRankState]:
        del params
        g, count = common.raised(updates), common.increment(state.count)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), count), 3)

        def renewed() -> LowRank:
            u, v, d = state.preconditioner
            squares = common.inner(g, g)
            scale = (sum(x.size for x in jax.tree.leaves(g)) / jnp.where(squares > 0, squares, 1.0)) ** 0.25
            scale = jnp.where((state.count == 0) & (squares > 0), scale, 1.0)
            ratio = jnp.where(count % BALANCE_EVERY == 0, jnp.sqrt(_norm(u) / _norm(v)), 1.0)
            u, v = jax.tree.map(lambda x: x / ratio, u), jax.tree.map(lambda x: x * ratio, v)
            old = LowRank(u, v, jax.tree.map(lambda x: x * scale, d))
            coin = jax.random.uniform(keys[1]) < 0.5
            return update_preconditioner(old, g, _normals(keys[0], g), step_size, coin)

        renew = (state.count < 2) | (jax.random.uniform(keys[2]) < update_probability)
        q = jax.lax.cond(renew, renewed, lambda: state.preconditioner)
        momentum = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.momentum, g)
        white = precondition(q, jax.tree.map(lambda m: m / (1 - b1**count), momentum))
        return common.cast_like(white, updates), LowRankState(count, momentum, q)

    return common.transformation(init, update)


@register("psgd_low_rank", papers=("2402.04553", "2211.04422"), proof="test_psgd.py::test_low_rank_against_the_package")
def psgd_low_rank(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    *,
    rank: int = 10,
    b1: float = 0.9,
    weight_decay: float = 0.0,
    update_probability: float = 1.0,
    step_size: float = 0.1,
    seed: int = 0,
    mask: Tree | None = None,
) -> optax.GradientTransformation:
    """PSGD with P = Q'Q, Q = (I + U V') diag(d), fitted to whiten gradients (arXiv:2402.04553; psgd-jax 0.2.9).

      `update_preconditioner` with the gradient;   m = b1 m + (1 - b1) g, without bias
      x = x - lr (P m + weight_decay x)

    d begins at (n / |g_1|^2)^(1/4) for n parameters, U and V at random. U and V are brought to one magnitude at every
    100th step, not at random ones. State in float32: 4 (2 rank + 2) bytes a parameter.

    Args:
      learning_rate: lr.
      rank: columns of U and V, at least 1.
      b1: of the momentum, in [0, 1).
      weight_decay: decoupled, times the learning rate.
      update_probability: of an update of the preconditioner in a step (the first two always have one), in (0, 1].
      step_size: of the preconditioner, above 0.
      seed: of probes and beginnings.
      mask: True where the decay applies.
    """
    check_range(0.0, math.inf, weight_decay=weight_decay)
    return optax.chain(
        scale_by_psgd_low_rank(rank=rank, b1=b1, update_probability=update_probability, step_size=step_size, seed=seed),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )

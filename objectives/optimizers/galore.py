"""Adam on gradients projected to a few directions (GaLore), for matrices one by one or in stacked layers."""

import math
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

SIDES = ("smaller", "larger")


def projects_rows(shape: tuple[int, ...], side: str) -> bool:
    """Whether the projected gradient of [L, rows, columns] is P' G, P [rows, r], and not G P, P [columns, r]."""
    _, rows, columns = shape
    return (rows < columns) if side == "smaller" else (rows >= columns)


def projector(matrices: jax.Array, rank: int, side: str) -> jax.Array:
    """The leading singular vectors of each matrix on one side: [L, rows or columns, r] from [L, rows, columns].

    Their signs, which moments that outlive a projector depend on, are those that make the largest element of each
    positive: on all platforms the same.
    """
    u, _, vt = jnp.linalg.svd(matrices.astype(jnp.promote_types(matrices.dtype, jnp.float32)), full_matrices=False)
    chosen = u if projects_rows(matrices.shape, side) else jnp.swapaxes(vt, 1, 2)
    chosen = chosen[:, :, :rank]
    largest = jnp.take_along_axis(chosen, jnp.argmax(jnp.abs(chosen), axis=1, keepdims=True), axis=1)
    return chosen * jnp.where(largest < 0, -1.0, 1.0)


def project(matrices: jax.Array, p: jax.Array, side: str) -> jax.Array:
    """[L, r, columns] or [L, rows, r]."""
    if projects_rows(matrices.shape, side):
        return jnp.einsum("lmr,lmn->lrn", p, matrices)
    return jnp.einsum("lmn,lnr->lmr", matrices, p)


def project_back(low: jax.Array, p: jax.Array, shape: tuple[int, ...], side: str) -> jax.Array:
    """The inverse on the space that P spans; `shape` is that of the matrices, [L, rows, columns]."""
    if projects_rows(shape, side):
        return jnp.einsum("lmr,lrn->lmn", p, low)
    return jnp.einsum("lmr,lnr->lmn", low, p)


def low_shapes(shape: tuple[int, int, int], rank: int, side: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the projector and of the projected gradient of matrices [L, rows, columns]."""
    layers, rows, columns = shape
    rank = min(rank, rows, columns)
    if projects_rows(shape, side):
        return (layers, rows, rank), (layers, rank, columns)
    return (layers, columns, rank), (layers, rows, rank)


def check_options(rank: int, update_every: int, scale: float, side: str) -> None:
    """Raises ValueError for options that no projection has."""
    check_range(1, math.inf, rank=rank, update_every=update_every)
    check_positive(scale=scale)
    check_choice("side", side, SIDES)


def adam_direction(mu: Any, nu: Any, count: jax.Array, b1: float, b2: float, eps: float) -> jax.Array:
    """(mu / (1 - b1^count)) / (sqrt(nu / (1 - b2^count)) + eps), count from 1."""
    return (mu / (1 - b1**count)) / (jnp.sqrt(nu / (1 - b2**count)) + eps)


class ScaleByGaloreState(NamedTuple):
    """State of `scale_by_galore`.

    Attributes:
      count: updates so far.
      projectors: [L, rows or columns, r] of matrices, None of all else.
      mu: first moments, of projected gradients or, where there is no matrix, of gradients.
      nu: second moments likewise.
    """

    count: jax.Array
    projectors: Any
    mu: Any
    nu: Any


def scale_by_galore(
    *,
    rank: int = 128,
    update_every: int = 200,
    scale: float = 0.25,
    side: str = "smaller",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    layout: Tree | None = None,
) -> optax.GradientTransformation:
    """Adam's direction in the projected space, projected back; see `galore`."""
    check_options(rank, update_every, scale, side)
    check_range(0.0, 1.0, open_high=True, b1=b1, b2=b2)
    check_positive(eps=eps)

    def init(params: Any) -> ScaleByGaloreState:
        def one(x: jax.Array, how: Layout) -> tuple[Any, jax.Array]:
            if not how.is_matrix:
                return None, jnp.zeros(x.shape, common.state_dtype(x))
            of_projector, low = low_shapes(how.matrix_shape(x.shape), rank, side)
            return jnp.zeros(of_projector, common.state_dtype(x)), jnp.zeros(low, common.state_dtype(x))

        projectors, moments = common.map_tuple(2, one, params, layout_lib.resolve(layout, params))
        return ScaleByGaloreState(jnp.zeros((), jnp.int32), projectors, moments, jax.tree.map(jnp.copy, moments))

    def update(updates: Any, state: ScaleByGaloreState, params: Any = None) -> tuple[Any, ScaleByGaloreState]:
        del params
        count = common.increment(state.count)
        renew = state.count % update_every == 0

        def one(g: jax.Array, how: Layout, p: Any, mu: jax.Array, nu: jax.Array) -> tuple[Any, ...]:
            low = matrices = g.astype(mu.dtype)
            if how.is_matrix:
                matrices = layout_lib.to_matrices(matrices, how)
                new = lambda: projector(matrices, rank, side).astype(p.dtype)  # noqa: E731
                p = jax.lax.cond(renew, new, lambda: p)
                low = project(matrices, p, side)
            mu, nu = b1 * mu + (1 - b1) * low, b2 * nu + (1 - b2) * low * low
            step = adam_direction(mu, nu, count, b1, b2, eps)
            if how.is_matrix:
                step = scale * project_back(step, p, matrices.shape, side)
            return step.reshape(g.shape).astype(g.dtype), p, mu, nu

        how = layout_lib.resolve(layout, updates)
        step, *rest = common.map_tuple(4, one, updates, how, state.projectors, state.mu, state.nu)
        return step, ScaleByGaloreState(count, *rest)

    return common.transformation(init, update)


@register("galore", papers=("2403.03507",), proof="test_layers.py::test_galore_against_the_authors_package")
def galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int = 128,
    update_every: int = 200,
    scale: float = 0.25,
    side: str = "smaller",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Tree | None = None,
    layout: Tree | None = None,
) -> optax.GradientTransformation:
    """GaLore: Adam in the space of the gradient's leading singular vectors (arXiv:2403.03507, algorithm 2).

      every `update_every` steps   P = the first r left singular vectors of G (right ones where rows >= columns)
      W = W - lr (scale P adam(P' G) + weight_decay W),   W - lr (scale adam(G P) P' + ...)

    Moments stay as they are when P changes. Leaves that are no matrices have Adam. `optax.contrib.galore`, which is
    not registered, projects the larger side and does not see stacked layers; `side="larger"` is its projection.
    State of a matrix m x n, m <= n, in float32: r (m + 2 n) numbers.

    Args:
      learning_rate: lr.
      rank: r, at least 1; that of a matrix with a smaller side is that side.
      update_every: steps between projectors.
      scale: alpha of the paper.
      side: "smaller", as the paper and galore-torch's "std"; "larger", galore-torch's "reverse_std".
      b1: in [0, 1).
      b2: in [0, 1).
      eps: above 0.
      weight_decay: decoupled, times the learning rate.
      mask: True where the decay applies.
      layout: which leaves are matrices.
    """
    check_range(0.0, math.inf, weight_decay=weight_decay)
    return optax.chain(
        scale_by_galore(
            rank=rank, update_every=update_every, scale=scale, side=side, b1=b1, b2=b2, eps=eps, layout=layout
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )

"""AdaGrad whose updates are shrunk until no element moves far (Clippy)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from objectives.checks import check_range
from objectives.optimizers import common
from objectives.optimizers import layout as layout_lib
from objectives.optimizers.layout import Layout
from objectives.optimizers.registry import register
from objectives.statistics import is_concrete
from zoo.core.params import Tree


class ClippyAdagradState(NamedTuple):
    """State of `clippy_adagrad`.

    Attributes:
      count: updates so far.
      squares: A, the sum of squared gradients.
    """

    count: jax.Array
    squares: Any


def shrink_by_references(
    update: jax.Array,
    references: tuple[jax.Array, ...],
    factors: tuple[float, ...],
    offset: float,
    axes: tuple[int, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The largest factor of at most 1 that keeps |update| below sum_r factor_r |reference_r| + offset everywhere.

    Args:
      update: change of a tensor.
      references: tensors that bound it.
      factors: of the references.
      offset: added to the bound.
      axes: over which one factor is shared; None = all.

    Returns:
      (factor update, factor), the factor with axes of size 1. An element that does not move needs no factor.
    """
    bound = sum((f * jnp.abs(r) for f, r in zip(factors, references, strict=True)), jnp.zeros_like(update)) + offset
    moves = update != 0
    ratio = jnp.where(moves, bound / jnp.where(moves, jnp.abs(update), 1.0), 1.0)
    factor = jnp.minimum(1.0, jnp.min(ratio, axis=axes, keepdims=True))
    return factor * update, factor


@register("clippy_adagrad", papers=("2302.09178",), proof="test_parity.py::test_clippy_against_numpy")
def clippy_adagrad(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    initial_accumulator: float = 0.1,
    relative: float = 0.1,
    accumulator_relative: float = 0.0,
    absolute: float = 1e-7,
    eps: float = 1e-7,
    clip_accumulator: bool = False,
    layout: Tree | None = None,
) -> optax.GradientTransformation:
    """AdaGrad with Clippy's adaptive clipping (arXiv:2302.09178; form and defaults of ClippyAdagrad in Keras RS).

      q = 1 / sqrt(A + eps),   u = lr g q
      c = min(1, min_i (relative |w_i| + accumulator_relative q_i + absolute) / |u_i|)   for every tensor
      w = w - c u,   A = A + g^2,   or A + (c g)^2 with `clip_accumulator`

    q has the A of before this gradient, and so has the bound. Each layer of a stacked leaf has its own c. A tensor that
    starts at 0 moves by `absolute` at most in its first step: raise it where there are such. Other implementations of
    the paper have a relative 0.5 and an absolute 1e-2 (WeiHanTu/Multitask_E-commerce_Recommender_System); the rate of 1
    that Keras RS names is in the form of the paper on AdaGrad. State: A in float32, 4 bytes a parameter.

    Args:
      learning_rate: lr.
      initial_accumulator: A at the beginning, at least 0.
      relative: bound over the parameter.
      accumulator_relative: bound over q.
      absolute: bound without anything; at least 0.
      eps: added to A, at least 0.
      clip_accumulator: whether A sums what was applied.
      layout: which leaves stack layers.
    """
    check_range(
        0.0,
        math.inf,
        initial_accumulator=initial_accumulator,
        relative=relative,
        accumulator_relative=accumulator_relative,
        absolute=absolute,
        eps=eps,
    )
    if is_concrete(initial_accumulator, eps) and initial_accumulator + eps == 0.0:
        raise ValueError("initial_accumulator and eps are both 0; one of them must be above 0")

    def init(params: Any) -> ClippyAdagradState:
        squares = jax.tree.map(lambda p: jnp.full_like(p, initial_accumulator), common.zeros(params))
        return ClippyAdagradState(jnp.zeros((), jnp.int32), squares)

    def update(updates: Any, state: ClippyAdagradState, params: Any = None) -> tuple[Any, ClippyAdagradState]:
        rate = common.rate_at(learning_rate, state.count)

        def one(g: jax.Array, w: jax.Array, squares: jax.Array, how: Layout) -> tuple[jax.Array, jax.Array]:
            g, w = g.astype(squares.dtype), w.astype(squares.dtype)
            q = jax.lax.rsqrt(squares + eps)
            axes = how.tensor_axes(g.ndim)
            step, factor = shrink_by_references(rate * g * q, (w, q), (relative, accumulator_relative), absolute, axes)
            added = factor * g if clip_accumulator else g
            return -step, squares + added * added

        how = layout_lib.resolve(layout, updates)
        step, squares = common.map_tuple(2, one, updates, common.need_params(params), state.squares, how)
        return common.cast_like(step, updates), ClippyAdagradState(common.increment(state.count), squares)

    return common.transformation(init, update)

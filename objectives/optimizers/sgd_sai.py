"""SGD with learning-rate scaling at initialisation."""

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


class ScaleBySaiState(NamedTuple):
    """State of `scale_by_sai`.

    Attributes:
      count: updates so far.
      gain: of every tensor, a scalar, or [L, 1, ...] for stacked layers; 0 before the first step.
      momentum: moving average of the gradient, which begins at the first one.
    """

    count: jax.Array
    gain: Any
    momentum: Any


def gradient_gain(g: jax.Array, layout: Layout, eps: float, max_gain: float) -> jax.Array:
    """|g| / (std(g) + eps) of a tensor, or of every layer; the unbiased deviation, which is 0 for a single element."""
    axes = layout.tensor_axes(g.ndim)
    size = math.prod(g.shape[axis] for axis in axes)
    norm = jnp.sqrt(jnp.sum(g * g, axis=axes, keepdims=True))
    deviation = jnp.std(g, axis=axes, keepdims=True, ddof=1) if size > 1 else jnp.zeros_like(norm)
    return jnp.minimum(norm / (deviation + eps), max_gain)


def scale_by_sai(
    *, momentum: float = 0.9, eps: float = 1e-8, max_gain: float = math.inf, layout: Tree | None = None
) -> optax.GradientTransformation:
    """gain times the momentum of the gradient; see `sgd_sai`."""
    check_range(0.0, 1.0, open_high=True, momentum=momentum)
    check_positive(eps=eps)
    check_positive(finite=False, max_gain=max_gain)

    def init(params: Any) -> ScaleBySaiState:
        def zero_gain(p: jax.Array, how: Layout) -> jax.Array:
            shape = tuple(1 if axis in how.tensor_axes(p.ndim) else p.shape[axis] for axis in range(p.ndim))
            return jnp.zeros(shape, common.state_dtype(p))

        gains = jax.tree.map(zero_gain, params, layout_lib.resolve(layout, params))
        return ScaleBySaiState(jnp.zeros((), jnp.int32), gains, common.zeros(params))

    def update(updates: Any, state: ScaleBySaiState, params: Any = None) -> tuple[Any, ScaleBySaiState]:
        del params
        first, g = state.count == 0, common.raised(updates)
        how = layout_lib.resolve(layout, updates)
        gain = jax.tree.map(
            lambda g, how, old: jnp.where(first, gradient_gain(g, how, eps, max_gain), old), g, how, state.gain
        )
        m = jax.tree.map(lambda m, g: jnp.where(first, g, momentum * m + (1.0 - momentum) * g), state.momentum, g)
        scaled = common.cast_like(jax.tree.map(jnp.multiply, gain, m), updates)
        return scaled, ScaleBySaiState(common.increment(state.count), gain, m)

    return common.transformation(init, update)


@register("sgd_sai", papers=("2412.11768",), proof="test_parity.py::test_sgd_sai_against_the_authors_package")
def sgd_sai(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-2,
    eps: float = 1e-8,
    max_gain: float = math.inf,
    mask: Tree | None = None,
    layout: Tree | None = None,
) -> optax.GradientTransformation:
    """SGD-SaI: momentum with a gain per tensor that the first gradient fixes (arXiv:2412.11768, sgd-sai 1.0.3).

      k = |g_1| / (std(g_1) + eps)   for every tensor, kept ever after
      m = momentum m + (1 - momentum) g,   m = g at the first step
      x = x - lr (k m + weight_decay x)

    Each layer of a stacked leaf has its own k. State: m in float32, 4 bytes a parameter. The first gradient decides:
    give it the batch that the others have. A tensor whose first gradients are all equal has k = |g_1| / eps, which
    `max_gain` bounds (the paper has no bound).

    Args:
      learning_rate: lr.
      momentum: in [0, 1).
      weight_decay: decoupled, times the learning rate.
      eps: above 0.
      max_gain: largest k.
      mask: True where the decay applies.
      layout: which leaves stack layers.
    """
    check_range(0.0, math.inf, weight_decay=weight_decay)
    return optax.chain(
        scale_by_sai(momentum=momentum, eps=eps, max_gain=max_gain, layout=layout),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )

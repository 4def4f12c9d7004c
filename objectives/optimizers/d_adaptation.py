"""D-Adaptation: gradient methods that estimate the distance to the solution and need no learning rate.

D = |x0 - x*| is bounded from below by what the gradients tell; the bound d is the step size. `learning_rate` multiplies
it: leave it at 1, or give a schedule whose peak is 1. All sums run over the whole tree. optax has the variant of Adam,
`dadapt_adamw`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from objectives.checks import check_positive, check_range
from objectives.optimizers import common
from objectives.optimizers.registry import register

PROOF = "test_parity.py::test_d_adaptation_against_the_authors_package"


def _check(estimate: float, growth_rate: float, momentum: float, weight_decay: float) -> None:
    check_positive(initial_estimate=estimate)
    check_range(1.0, math.inf, finite=False, growth_rate=growth_rate)
    check_range(0.0, 1.0, open_high=True, momentum=momentum)
    check_range(0.0, math.inf, weight_decay=weight_decay)


def _grown(estimate: jax.Array, bound: jax.Array, growth_rate: Any) -> jax.Array:
    return jnp.maximum(estimate, jnp.minimum(bound, estimate * growth_rate))


class DAdaptSGDState(NamedTuple):
    """State of `dadapt_sgd`.

    Attributes:
      count: updates so far.
      estimate: d.
      first_norm: |g_0|, 0 before the first gradient that is not 0.
      numerator: sum_k lambda_k <g_k, s_k>.
      start: x_0.
      weighted: s = sum_k lambda_k g_k.
    """

    count: jax.Array
    estimate: jax.Array
    first_norm: jax.Array
    numerator: jax.Array
    start: Any
    weighted: Any


@register("dadapt_sgd", papers=("2301.07733",), proof=PROOF)
def dadapt_sgd(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    initial_estimate: float = 1e-6,
    growth_rate: float = math.inf,
) -> optax.GradientTransformation:
    """SGD with D-Adaptation (arXiv:2301.07733, algorithm 4, as in the authors' code: dadaptation 3.2).

      lambda_k = lr d_k / |g_0|,   numerator += lambda_k <g_k, s_k>,   s_{k+1} = s_k + lambda_k g_k
      d_{k+1} = max(d_k, min(2 numerator / |s_{k+1}|, growth_rate d_k))
      x_{k+1} = momentum x_k + (1 - momentum) (x_0 - s_{k+1})

    State: x_0 and s in float32, 8 bytes a parameter. Gradients that are all 0 at the beginning are passed over.

    Args:
      learning_rate: factor of d, 1 but for a schedule.
      momentum: weight of the last iterate, in [0, 1).
      weight_decay: added to the gradient times the parameter (an L2 penalty), from the second step's norm on, as there.
      initial_estimate: d_0, above 0 and below D.
      growth_rate: largest factor by which d grows in a step, at least 1.
    """
    _check(initial_estimate, growth_rate, momentum, weight_decay)

    def init(params: Any) -> DAdaptSGDState:
        d, zero = jnp.asarray(initial_estimate, jnp.float32), jnp.zeros((), jnp.float32)
        start = common.raised(jax.tree.map(jnp.copy, params))
        return DAdaptSGDState(jnp.zeros((), jnp.int32), d, zero, zero, start, common.zeros(params))

    def update(updates: Any, state: DAdaptSGDState, params: Any = None) -> tuple[Any, DAdaptSGDState]:
        x, g = common.raised(common.need_params(params)), common.raised(updates)
        norm = jnp.sqrt(common.inner(g, g))
        first = jnp.where(state.first_norm > 0, state.first_norm, norm)
        g = jax.tree.map(lambda g, x: g + weight_decay * x, g, x)
        step = common.rate_at(learning_rate, state.count) * state.estimate / jnp.where(first > 0, first, 1.0)
        numerator = state.numerator + step * common.inner(g, state.weighted)
        s = jax.tree.map(lambda s, g: s + step * g, state.weighted, g)
        length = jnp.sqrt(common.inner(s, s))
        bound = 2.0 * numerator / jnp.where(length > 0, length, 1.0)
        d = _grown(state.estimate, bound, growth_rate)
        new = jax.tree.map(lambda x0, s, x: (1.0 - momentum) * (x0 - s - x), state.start, s, x)
        scalars = {"estimate": d, "first_norm": first, "numerator": numerator}
        scalars = {name: value.astype(jnp.float32) for name, value in scalars.items()}
        state = state._replace(count=common.increment(state.count), weighted=s, **scalars)
        return common.cast_like(new, updates), state

    return common.transformation(init, update)


class DAdaptAdaGradState(NamedTuple):
    """State of `dadapt_adagrad`.

    Attributes:
      count: updates so far.
      estimate: d.
      weighted_squares: sum_k lambda_k^2 |g_k|^2 in the inverse norm of step k.
      start: x_0.
      weighted: s = sum_k lambda_k g_k.
      squares: a = sum of squared gradients.
    """

    count: jax.Array
    estimate: jax.Array
    weighted_squares: jax.Array
    start: Any
    weighted: Any
    squares: Any


@register("dadapt_adagrad", papers=("2301.07733",), proof=PROOF)
def dadapt_adagrad(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-6,
    initial_estimate: float = 1e-6,
    growth_rate: float = math.inf,
) -> optax.GradientTransformation:
    """AdaGrad with D-Adaptation (arXiv:2301.07733, as in the authors' code: dadaptation 3.2, dense gradients).

      a += g^2 (1e-6 at the beginning),   A = sqrt(a) + eps,   lambda = lr d,   s += lambda g
      d = max(d, min((|s|^2_{1/A} - sum_k lambda_k^2 |g_k|^2_{1/A_k}) / |s|_1, growth_rate d))
      x = momentum x + (1 - momentum) (x_0 - s / A)

    State: x_0, s and a in float32, 12 bytes a parameter.

    Args:
      learning_rate: factor of d, 1 but for a schedule.
      momentum: weight of the last iterate, in [0, 1).
      weight_decay: added to the gradient times the parameter (an L2 penalty).
      eps: added to the root, above 0.
      initial_estimate: d_0, above 0 and below D.
      growth_rate: largest factor by which d grows in a step, at least 1.
    """
    _check(initial_estimate, growth_rate, momentum, weight_decay)
    check_positive(eps=eps)

    def init(params: Any) -> DAdaptAdaGradState:
        d, zero = jnp.asarray(initial_estimate, jnp.float32), jnp.zeros((), jnp.float32)
        squares = jax.tree.map(lambda p: jnp.full_like(p, 1e-6), common.zeros(params))
        start = common.raised(jax.tree.map(jnp.copy, params))
        return DAdaptAdaGradState(jnp.zeros((), jnp.int32), d, zero, start, common.zeros(params), squares)

    def update(updates: Any, state: DAdaptAdaGradState, params: Any = None) -> tuple[Any, DAdaptAdaGradState]:
        x, g = common.raised(common.need_params(params)), common.raised(updates)
        g = jax.tree.map(lambda g, x: g + weight_decay * x, g, x)
        step = common.rate_at(learning_rate, state.count) * state.estimate
        squares = jax.tree.map(lambda a, g: a + g * g, state.squares, g)
        root = jax.tree.map(lambda a: jnp.sqrt(a) + eps, squares)
        s = jax.tree.map(lambda s, g: s + step * g, state.weighted, g)
        of_gradients = state.weighted_squares + step**2 * common.inner(g, jax.tree.map(jnp.divide, g, root))
        of_sum = common.inner(s, jax.tree.map(jnp.divide, s, root))
        length = common.total(jax.tree.map(lambda s: jnp.sum(jnp.abs(s)), s))
        bound = (of_sum - of_gradients) / jnp.where(length > 0, length, 1.0)
        d = _grown(state.estimate, bound, growth_rate).astype(state.estimate.dtype)
        new = jax.tree.map(lambda x0, s, a, x: (1.0 - momentum) * (x0 - s / a - x), state.start, s, root, x)
        count, of_gradients = common.increment(state.count), of_gradients.astype(state.weighted_squares.dtype)
        return common.cast_like(new, updates), DAdaptAdaGradState(count, d, of_gradients, state.start, s, squares)

    return common.transformation(init, update)

"""Values of unfinished solutions: what is the chance that this leads to a right answer?"""

import jax
import jax.numpy as jnp

from objectives.checks import check_shape, check_values_in
from objectives.output import LossOutput, reduce_examples
from objectives.registry import register


@register("outcome_value", category="reward", papers=("2311.09724",), proof="test_value.py::test_is_its_definition")
def outcome_value(values: jax.Array, outcomes: jax.Array, mask: jax.Array) -> LossOutput:
    """Outcome-supervised value model: every token of a solution predicts its outcome (OVM, arXiv:2311.09724).

      loss = sum_bt mask_bt (v_bt - y_b)^2

    The head is linear, without a logistic function. The authors' code divides by the number of solutions; here the
    weight is the number of tokens.

    Args:
      values: float[B, T], v of each token of the solution.
      outcomes: [B], y in [0, 1], 1 for a right final answer, else 0.
      mask: [B, T], 1 at tokens of the solution, 0 elsewhere.

    Returns:
      LossOutput: weight = sum of the mask; metrics value_right and value_wrong, sums of v over tokens of right and of
      wrong solutions, and right, the number of tokens of right solutions.

    Raises:
      ValueError: shapes disagree or, outside of traced functions, an outcome is out of range.
    """
    if jnp.ndim(values) != 2:
        raise ValueError(f"values must be [B, T], got {jnp.shape(values)}")
    check_shape(jnp.shape(values), mask=mask)
    check_shape(jnp.shape(values)[:1], outcomes=outcomes)
    counted, y = jnp.asarray(mask) != 0, jnp.float32(outcomes)[:, None]
    check_values_in(0.0, 1.0, where=jnp.any(counted, axis=1), outcomes=outcomes)
    v = jnp.where(counted, jnp.float32(values), 0.0)
    right = jnp.broadcast_to(y, v.shape)
    metrics = {"value_right": v * right, "value_wrong": v * (1.0 - right), "right": right}
    return reduce_examples(jnp.square(v - y), counted, metrics)


@register("step_values", category="reward", papers=("2405.03553",), proof="test_value.py::test_is_its_definition")
def step_values(values: jax.Array, targets: jax.Array, mask: jax.Array) -> LossOutput:
    """Values at the ends of steps regress on those of a tree search (AlphaMath, arXiv:2405.03553).

      loss = sum_bs mask_bs (tanh(v_bs) - q_bs)^2

    As in the authors' code (MARIO-Math-Reasoning/Super_MARIO, implementation_details.md): a tanh, the mean squared
    error over last tokens of steps, and the sum of this, times a coefficient, and of the policy's `cross_entropy` over
    right solutions alone. Each of the two is divided by its own weight; the coefficient is the caller's.

    Args:
      values: float[B, S], v before the tanh.
      targets: [B, S], q in [-1, 1], backed up by the search; where the mask is 0 any number.
      mask: [B, S], 1 at ends of steps, 0 elsewhere.

    Returns:
      LossOutput: weight = sum of the mask; metric value (tanh(v)).

    Raises:
      ValueError: shapes disagree or, outside of traced functions, a target is out of range.
    """
    if jnp.ndim(values) != 2:
        raise ValueError(f"values must be [B, S], got {jnp.shape(values)}")
    check_shape(jnp.shape(values), targets=targets, mask=mask)
    counted = jnp.asarray(mask) != 0
    check_values_in(-1.0, 1.0, where=counted, targets=targets)
    value = jnp.tanh(jnp.where(counted, jnp.float32(values), 0.0))
    error = value - jnp.where(counted, jnp.float32(targets), 0.0)
    return reduce_examples(jnp.square(error), counted, {"value": value})

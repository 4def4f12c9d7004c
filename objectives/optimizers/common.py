"""What the optimisers of this package share: dtypes, the learning rate of a step, sums over trees."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zoo.core.params import Tree


def transformation(init: Callable[[Any], Any], update: Callable[..., tuple[Any, Any]]) -> optax.GradientTransformation:
    """GradientTransformation of functions that are typed by their own states."""
    untyped: Any = (init, update)
    return optax.GradientTransformation(*untyped)


def increment(count: jax.Array) -> jax.Array:
    """count + 1, at most the largest int32."""
    return jnp.asarray(optax.safe_increment(count))


def state_dtype(x: Any) -> Any:
    """float32 for parameters of less precision, else their own dtype."""
    return jnp.promote_types(x.dtype, jnp.float32)


def raised(tree: Tree) -> Tree:
    """Leaves in `state_dtype`."""
    return jax.tree.map(lambda x: x.astype(state_dtype(x)), tree)


def zeros(tree: Tree) -> Tree:
    """Zeros like the leaves, in `state_dtype`."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, state_dtype(x)), tree)


def cast_like(tree: Tree, like: Tree) -> Tree:
    """Leaves in the dtypes of `like`."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def rate_at(learning_rate: optax.ScalarOrSchedule, count: jax.Array) -> Any:
    """The learning rate of step `count`."""
    return learning_rate(count) if callable(learning_rate) else learning_rate


def need_params(params: Tree | None) -> Tree:
    """`params`, or the error of an optimiser whose `update` was called without them."""
    if params is None:
        raise ValueError("this optimiser needs the parameters: update(gradients, state, params)")
    return params


def total(tree: Tree) -> jax.Array:
    """Sum of scalar leaves."""
    return sum(jax.tree.leaves(tree), jnp.zeros(()))


def inner(a: Tree, b: Tree) -> jax.Array:
    """Sum of products over all leaves."""
    return total(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))


def map_tuple(count: int, function: Callable[..., tuple], tree: Tree, *rest: Any) -> tuple[Tree, ...]:
    """`function` over the leaves of `tree`, which returns `count` values, as `count` trees.

    The other trees may hold subtrees in place of leaves.
    """
    leaves, structure = jax.tree.flatten(tree)
    others = [structure.flatten_up_to(other) for other in rest]
    results = [function(*row) for row in zip(leaves, *others, strict=True)]
    return tuple(structure.unflatten([result[i] for result in results]) for i in range(count))

"""The one door for dense contractions.

A weight is a jax.Array or anything that implements `Weight`: low-rank updates, quantised or ternary storage, and
so on. Models call `linear`; an adapter or a quantiser replaces leaves of the parameter tree and no model changes.
Weights are laid out as [inputs..., outputs...].
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from zoo.core.sharding import ways


@runtime_checkable
class Weight(Protocol):
    """A registered pytree that knows how to contract."""

    def contract(self, x: jax.Array, eqn: str) -> jax.Array:
        """The einsum `eqn` of x with the weight, in x.dtype."""
        ...

    def materialise(self) -> jax.Array:
        """The dense array that the weight stands for."""
        ...


def linear(x: jax.Array, w: Any, eqn: str) -> jax.Array:
    """Contracts activations with a weight: y = einsum(eqn, x, w), in x.dtype.

    Args:
      x: activations, e.g. [B, T, D].
      w: an array [inputs..., outputs...] or a `Weight`.
      eqn: einsum equation, e.g. "btd,dhk->bthk".

    Returns:
      The contraction, in x.dtype. A bias is added by the caller.
    """
    if isinstance(w, Weight):
        return w.contract(x, eqn)
    w = w.astype(x.dtype)
    if eqn.startswith("bt") and "->bt" in eqn and ways("time") == 1:
        # As rows of one matrix: XLA's CPU backend copies both operands of a weight gradient that sums over two axes.
        y = jnp.einsum(eqn.replace("bt", "n"), x.reshape(-1, *x.shape[2:]), w)
        return y.reshape(*x.shape[:2], *y.shape[1:])
    return jnp.einsum(eqn, x, w)


def materialise(w: Any) -> jax.Array:
    """The dense array of a weight."""
    return w.materialise() if isinstance(w, Weight) else w


def is_weight(leaf: Any) -> bool:
    """True for `Weight` nodes (not plain arrays); use as `is_leaf`."""
    return isinstance(leaf, Weight) and not isinstance(leaf, jax.Array)


def split_equation(eqn: str) -> tuple[str, str, str, str]:
    """Splits an equation into letters of x, inputs, outputs, result: "btd,dhk->bthk" is ("btd", "d", "hk", "bthk").

    Raises:
      ValueError: the weight's contracted dimensions do not all come first.
    """
    operands, result = eqn.replace(" ", "").split("->")
    x, w = operands.split(",")
    inputs = "".join(c for c in w if c not in result)
    outputs = w[len(inputs) :]
    if w[: len(inputs)] != inputs or any(c not in x for c in inputs):
        raise ValueError(f"{eqn!r}: a weight's contracted dimensions must come first and appear in x")
    return x, inputs, outputs, result

"""Quantisers of weights and activations, and ternary weights: integers and the scales that give them meaning."""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.ternary_matmul import LAYOUTS, ternary_matmul, unpack
from zoo.core.linear import split_equation

SMALLEST = 1e-5  # a matrix or a row whose magnitude is smaller counts as this large
LEVELS = 127.0
MAX_INPUTS = (2**24 - 1) // 127  # sums of this many products of int8 and ternary numbers are exact in float32


def ternarise(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ternary codes of a matrix and the magnitude that they stand for, by the mean absolute value.

      s = 1 / max(mean|W|, 1e-5);   codes = round(clip(W s, -1, 1)), half to even;   W_q = codes / s

    Args:
      weight: float [...], one matrix.

    Returns:
      codes int8 of the same shape, in {-1, 0, 1}; scale float32 [], 1 / s.

    Reference: BitNet b1.58, Ma et al., arXiv:2402.17764, equations 1 to 3.
    """
    weight = weight.astype(jnp.float32)
    s = 1.0 / jnp.maximum(jnp.mean(jnp.abs(weight)), SMALLEST)
    return jnp.round(jnp.clip(weight * s, -1.0, 1.0)).astype(jnp.int8), 1.0 / s


def quantise_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Int8 values of each row of x [M, D] and their steps float32 [M], by the largest magnitude.

    scale = max(max|x|, 1e-5) / 127; values = round(x / scale), half to even. Rows that are int8 multiples of a float32
    step already keep their values. A row that is not finite gets values 0 and scale NaN.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    finite = jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
    scale = jnp.maximum(largest, SMALLEST) / LEVELS
    values = jnp.where(finite, jnp.round(x / scale), 0.0).astype(jnp.int8)
    return values, jnp.where(finite, scale, jnp.nan)[:, 0]


def check_equation(eqn: str) -> None:
    """Raises ValueError unless `eqn` contracts the last axis of x with the first of a weight, e.g. "btd,dci->btci"."""
    x_dims, inputs, outputs, result = split_equation(eqn)
    if len(inputs) != 1 or x_dims[-1] != inputs or result != x_dims[:-1] + outputs:
        raise ValueError(f"{eqn!r}: a ternary weight contracts the last axis of x with the first of its own")


@flax.struct.dataclass
class TernaryWeight:
    """A weight of -scale, 0 and scale, four to a byte.

    Attributes:
      packed: uint8 bytes of the weights as [N, K] in `layout`: N is the product of the output dimensions, and K the
        input dimension rounded up, with zeros, to what the layout packs together.
      scale: float32 [], what 1 stands for.
      shape: [inputs, outputs...] of the weight.
      layout: see `pallas_kernels.ternary_matmul`.

    Stacked layers carry one more leading dimension on packed and scale alike.
    """

    packed: Any
    scale: Any
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    layout: str = flax.struct.field(pytree_node=False)

    def multiply(
        self, values: jax.Array, scales: jax.Array, *, dtype: DTypeLike, implementation: str | None = None
    ) -> jax.Array:
        """int8 rows [M, inputs] with steps float32 [M], times the weight: [M, N] in `dtype`.

        Raises:
          ValueError: arrays that do not fit the weight's shape.
        """
        _check_fits(self)
        padding = -self.shape[0] % LAYOUTS[self.layout].inputs
        values = jnp.pad(values, ((0, 0), (0, padding)))
        return ternary_matmul(
            values, self.packed, scales, self.scale, layout=self.layout, dtype=dtype, implementation=implementation
        )

    def contract(self, x: jax.Array, eqn: str) -> jax.Array:
        """einsum(eqn, x_q, W), x_q being x quantised to int8 by row: x itself where it is so already, in float32."""
        check_equation(eqn)
        y = self.multiply(*quantise_rows(x.reshape(-1, x.shape[-1])), dtype=x.dtype)
        return y.reshape(*x.shape[:-1], *self.shape[1:])

    def materialise(self) -> jax.Array:
        """The weight as float32 [inputs, outputs...] (stacked: [L, inputs, outputs...]).

        No latent weight: quantised again, it would get a smaller scale.
        """

        def dense(packed, scale):
            codes = unpack(packed, self.layout)[:, : self.shape[0]]
            return (codes.T.astype(jnp.float32) * scale).reshape(self.shape)

        return (jax.vmap(dense) if self.packed.ndim == 3 else dense)(self.packed, self.scale)


def is_ternary(leaf: Any) -> bool:
    """True for `TernaryWeight` nodes; use as `is_leaf`."""
    return isinstance(leaf, TernaryWeight)


def packed_shape(shape: tuple[int, ...], layout: str) -> tuple[int, int]:
    """Shape of the bytes of one weight [inputs, outputs...].

    Raises:
      ValueError: as many outputs as the layout cannot pack.
    """
    rules = LAYOUTS[layout]
    outputs = math.prod(shape[1:])
    if outputs % rules.outputs:
        raise ValueError(f"layout {layout!r} packs multiples of {rules.outputs} outputs, got {outputs}; use another")
    return rules.shape(outputs, shape[0] + -shape[0] % rules.inputs)


def _check_fits(weight: TernaryWeight) -> None:
    want = {"packed": packed_shape(weight.shape, weight.layout), "scale": ()}
    for name, shape in want.items():
        have = tuple(getattr(weight, name).shape)
        if have != shape:
            raise ValueError(
                f"TernaryWeight.{name} has shape {have}, expected {shape} for a weight {weight.shape} in layout "
                f"{weight.layout!r}"
            )

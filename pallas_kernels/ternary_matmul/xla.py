"""Ternary products by XLA's own int8 product: weights are unpacked in memory, which moves nine times their bytes."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.ternary_matmul import packing


def forward(x, w, x_scale, w_scale, *, layout: str, dtype):
    """Returns [M, N]: int32 accumulators where the scales are None; arguments as in `ternary_matmul`."""
    weights = packing.unpack(w, layout)
    total = lax.dot_general(x, weights, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    if x_scale is None:
        return total
    return (total.astype(jnp.float32) * (x_scale[:, None] * w_scale)).astype(dtype)

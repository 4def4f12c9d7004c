"""Ternary products in int32, weight by weight of the unpacked matrix: the oracle."""

import jax.numpy as jnp

from pallas_kernels.ternary_matmul import packing


def forward(x, w, x_scale, w_scale, *, layout: str, dtype):
    """Returns [M, N]: int32 accumulators where the scales are None; arguments as in `ternary_matmul`."""
    weights = packing.unpack(w, layout).astype(jnp.int32)
    total = jnp.einsum("mk,nk->mn", x.astype(jnp.int32), weights)
    if x_scale is None:
        return total
    return (total.astype(jnp.float32) * (x_scale[:, None] * w_scale)).astype(dtype)

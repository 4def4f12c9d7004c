"""BitLinear (arXiv:2406.02528, section 3.2): RMSNorm, int8 activations, ternary weights, straight-through gradients.

  x_n = norm_scale x / sqrt(mean(x^2) + eps)
  x_q = round(x_n / a) a,              a = max(max|x_n|, 1e-5) / 127, one per token
  W_q = round(clip(W s, -1, 1)) / s,   s = 1 / max(mean|W|, 1e-5), one per matrix
  y   = x_q W_q;      dW = x_q^T dy,   dx_n = dy W_q^T, and on through the norm

Rounding is half to even. The product is formed of the integers and scaled afterwards, in training too: integers up to
127 are exact in bfloat16, and their sums in float32. Training and packed weights so sum the same integers, in whatever
order, and differ by the last bit of s alone, whose mean XLA may sum in different orders.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.rms_norm_quantize import rms_norm_fake_quantize, rms_norm_quantize
from zoo.core.linear import linear, materialise
from zoo.core.params import Spec, Tree
from zoo.layers.norm import NO_DECAY
from zoo.layers.quantization import MAX_INPUTS, TernaryWeight, check_equation, is_ternary, ternarise

TERNARY = frozenset({"ternary"})


def param_specs(shape: tuple[int, ...], axes: tuple[str, ...], init: Any) -> Tree:
    """Specs {"norm_scale" [D], "weight" [D, outputs...]} of one BitLinear; the latent weight is tagged "ternary".

    Args:
      shape, axes: of the weight; its first dimension is contracted.
      init: of the weight.

    Raises:
      ValueError: so many inputs that their sums would not be exact in float32.
    """
    if shape[0] > MAX_INPUTS:
        raise ValueError(f"a BitLinear sums at most {MAX_INPUTS} inputs exactly in float32, got {shape[0]}")
    return {
        "norm_scale": Spec(shape[:1], axes[:1], jax.nn.initializers.ones, tags=NO_DECAY),
        "weight": Spec(shape, axes, init, inputs=1, tags=TERNARY),
    }


def bit_linear(params: Tree, x: jax.Array, eqn: str, *, eps: float, implementation: str | None = None) -> jax.Array:
    """Normalises and quantises x once, and multiplies it by a ternary weight: see the module's docstring.

    Args:
      params: {"norm_scale": [D], "weight": [D, outputs...]}. The weight is a latent float array, or an adapter over
        one, which is quantised here and gets straight-through gradients; or a packed `TernaryWeight`; or an adapter
        over a packed one, which then adds to the ternary product.
      x: [..., D], float32, bfloat16 or float16.
      eqn: einsum equation that contracts the last axis of x with the first of the weight, e.g. "btd,dci->btci".
      eps: of the norm.
      implementation: of `rms_norm_quantize` and `ternary_matmul`; None = the platform's.

    Returns:
      The product [..., outputs...] in x.dtype.

    Raises:
      ValueError: another kind of equation, or a packed weight whose arrays do not fit each other.
    """
    check_equation(eqn)
    norm_scale, weight = params["norm_scale"], params["weight"]
    y: Any
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, TernaryWeight):
        values, scales = rms_norm_quantize(rows, norm_scale, eps=eps, implementation=implementation)
        y = weight.multiply(values, scales, dtype=x.dtype, implementation=implementation)
        y = y.reshape(-1, *weight.shape[1:])
    elif any(is_ternary(leaf) for leaf in jax.tree.leaves(weight, is_leaf=is_ternary)):
        x_q = rms_norm_fake_quantize(rows, norm_scale, eps=eps, implementation=implementation)
        return linear(x_q.reshape(x.shape), weight, eqn)
    else:
        y = _product(eps, implementation, rows, norm_scale, materialise(weight))
    return y.reshape(*x.shape[:-1], *y.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(eps, implementation, x, norm_scale, weight):
    """x [M, D], weight [D, outputs...] -> [M, outputs...]."""
    values, scales = rms_norm_quantize(x, norm_scale, eps=eps, implementation=implementation)
    codes, scale = ternarise(weight)
    # No reshape of the weight: one of its output dimensions may be split over devices.
    total = jnp.tensordot(values.astype(x.dtype), codes.astype(x.dtype), 1, preferred_element_type=jnp.float32)
    scales = scales.reshape(-1, *[1] * (total.ndim - 1))
    return (total * (scales * scale)).astype(x.dtype)


def _forward(eps, implementation, x, norm_scale, weight):
    return _product(eps, implementation, x, norm_scale, weight), (x, norm_scale, weight)


def _backward(eps, implementation, residuals, dy):
    # Norm and quantisation are computed again: x is kept anyway, and one x for each of its BitLinears would not be.
    x, norm_scale, weight = residuals
    quantise = functools.partial(rms_norm_fake_quantize, eps=eps, implementation=implementation)
    x_q, of_norm = jax.vjp(quantise, x, norm_scale)
    codes, scale = ternarise(weight)
    w_q = (codes.astype(jnp.float32) * scale).astype(dy.dtype)
    outputs = tuple(range(1, dy.ndim))
    dx, dnorm_scale = of_norm(jnp.tensordot(dy, w_q, (outputs, outputs)))
    dweight = jnp.tensordot(x_q, dy, (0, 0), preferred_element_type=jnp.float32)
    return dx, dnorm_scale, dweight.astype(weight.dtype)


_product.defvjp(_forward, _backward)

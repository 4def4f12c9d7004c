"""RMSNorm and LayerNorm, with or without parameters."""

import dataclasses

import jax
import jax.numpy as jnp

from zoo.core.params import Spec, Tree
from zoo.core.registry import check_choice


@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalisation over the last axes.

    rms: y = x / sqrt(mean(x^2) + eps) * scale. layer: y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias.
    References: RMSNorm arXiv:1910.07467, LayerNorm arXiv:1607.06450.

    Attributes:
      kind: "rms" or "layer".
      eps: added to the mean square or the variance.
      scale: multiply by a learned scale (False: no parameters, as in OLMo).
      bias: add a learned bias.
    """

    kind: str = "rms"
    eps: float = 1e-5
    scale: bool = True
    bias: bool = False

    def __post_init__(self):
        check_choice("Norm.kind", self.kind, ("rms", "layer"))


NO_DECAY = frozenset({"no_decay"})


def param_specs(config: Norm, shape: tuple[int, ...], axes: tuple[str, ...]) -> Tree:
    """Specs {"scale", "bias"} of the given shape, those that the config asks for."""
    specs = {}
    if config.scale:
        specs["scale"] = Spec(shape, axes, jax.nn.initializers.ones, tags=NO_DECAY)
    if config.bias:
        specs["bias"] = Spec(shape, axes, jax.nn.initializers.zeros, tags=NO_DECAY)
    return specs


def apply(params: Tree, x: jax.Array, *, config: Norm, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """Normalises x over `axis`, in float32 inside, returning x.dtype.

    Args:
      params: tree of `param_specs`; shapes broadcast against the trailing axes of x.
      x: [..., D].
      config: which norm.
      axis: the axes that statistics are taken over.
    """
    x_f32 = x.astype(jnp.float32)
    if config.kind == "layer":
        x_f32 = x_f32 - jnp.mean(x_f32, axis=axis, keepdims=True)
    mean_square = jnp.mean(jnp.square(x_f32), axis=axis, keepdims=True)
    y = x_f32 * jax.lax.rsqrt(mean_square + config.eps)
    if config.scale:
        y = y * params["scale"].astype(jnp.float32)
    if config.bias:
        y = y + params["bias"].astype(jnp.float32)
    return y.astype(x.dtype)

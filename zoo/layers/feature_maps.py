"""Learned feature maps of linear attention: Hedgehog (arXiv:2402.04347)."""

import dataclasses

import jax
import jax.numpy as jnp

from zoo.core.linear import materialise
from zoo.core.params import Spec, Tree
from zoo.core.registry import check_choice
from zoo.layers.norm import NO_DECAY

FEATURE_MAP = frozenset({"feature_map"})  # tag: what attention distillation trains while the rest is frozen


@dataclasses.dataclass(frozen=True)
class HedgehogMap:
    """phi(x) = [exp(u), exp(-u)] with u = W x + b, a W and b for each head, brought into the range of floats.

    "joint": phi(x) = softmax([2 u, -2 u]) over all 2 K features. "halves": phi(x) = [softmax(u), softmax(-u)]. Both are
    exact for any u. A positive factor of a query cancels in the normalised weights and one of a key does not, so these
    are three different models: [exp(u), exp(-u)], which overflows, is not offered.

    Attributes:
      form: "joint" or "halves".
      bias: whether there is a b.
      floor: smallest value of a feature. Saturated features would be exactly 0, and a query whose features meet none
        of the keys' would divide 0 by 0; with a floor phi(q) . phi(k) is at least that.
    """

    form: str = "joint"
    bias: bool = True
    floor: float = 1e-12

    def __post_init__(self):
        check_choice("HedgehogMap.form", self.form, ("joint", "halves"))
        if not 1e-30 <= self.floor < 1.0:
            raise ValueError(f"HedgehogMap.floor must be in [1e-30, 1), such as 1e-12, got {self.floor}")


def _identity_init(key, shape, dtype=jnp.float32):
    del key
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)


def param_specs(config: HedgehogMap, heads: int, head_width: int) -> Tree:
    """Specs: weight [H, K, K] (inputs, outputs), the identity at first, and bias [H, K], zeros."""
    specs = {"weight": Spec((heads, head_width, head_width), ("heads", "key", "feature"), _identity_init)}
    if config.bias:
        specs["bias"] = Spec((heads, head_width), ("heads", "feature"), tags=NO_DECAY)
    return {name: dataclasses.replace(spec, tags=spec.tags | FEATURE_MAP) for name, spec in specs.items()}


def apply(params: Tree, x: jax.Array, *, config: HedgehogMap) -> jax.Array:
    """The features of queries or keys, in float32: an exponential turns the rounding of u into that of a feature.

    Args:
      params: tree of `param_specs`.
      x: [B, T, H, K].
      config: which form.

    Returns:
      float32[B, T, H, 2K], at least `config.floor`; they sum to 1 in the joint form and to 2 in halves.
    """
    weight = materialise(params["weight"]).astype(jnp.float32)
    u = jnp.einsum("bthk,hkf->bthf", x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
    if config.bias:
        u = u + params["bias"].astype(jnp.float32)
    if config.form == "joint":
        phi = jax.nn.softmax(jnp.concatenate([2.0 * u, -2.0 * u], axis=-1), axis=-1)
    else:
        phi = jnp.concatenate([jax.nn.softmax(u, axis=-1), jax.nn.softmax(-u, axis=-1)], axis=-1)
    return jnp.maximum(phi, config.floor)

"""Linear attention with Hedgehog's learned feature maps (arXiv:2402.04347)."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.gated_linear_attention import gated_linear_attention
from zoo.core.context import SeqContext
from zoo.core.linear import linear
from zoo.core.params import Spec, Tree
from zoo.core.sharding import constrain
from zoo.layers import feature_maps, rotary
from zoo.layers.feature_maps import HedgehogMap
from zoo.layers.norm import NO_DECAY
from zoo.layers.rotary import Rotary
from zoo.mixers.contract import MixerType, register


@dataclasses.dataclass(frozen=True)
class Hedgehog:
    """w_ts = phi_q(q_t) . phi_k(k_s); y_t = sum_{s <= t} w_ts v_s / sum_{s <= t} w_ts.

    Parameters are those of softmax attention under the same names, and the maps: attention is converted by adding
    them. Every query head has its own two maps and its own state, also where it shares its key and value.

    Attributes:
      heads: H query heads.
      kv_heads: G key/value heads; must divide H.
      head_width: K (and V); there are 2 K features.
      feature_map: form of both maps.
      rotary: rotary embedding, before the maps; None = no positions.
      qkv_bias, out_bias: biases.
      init_std, out_init_std: standard deviations of the projections.
    """

    heads: int
    kv_heads: int
    head_width: int
    feature_map: HedgehogMap = HedgehogMap()
    rotary: Rotary | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    init_std: float = 0.02
    out_init_std: float = 0.02

    def __post_init__(self):
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            divisors = [g for g in range(1, self.heads + 1) if self.heads % g == 0]
            raise ValueError(f"Hedgehog.kv_heads={self.kv_heads} must divide heads={self.heads}: one of {divisors}")
        if self.head_width < 1:
            raise ValueError(f"Hedgehog.head_width must be >= 1, got {self.head_width}")


@flax.struct.dataclass
class HedgehogState:
    """Attributes: sums, float32[B, H, 2K, V+1], sums of phi_k(k) [v, 1]^T: the last column is the normaliser's."""

    sums: Any


def param_specs(config: Hedgehog, width: int) -> Tree:
    """Specs: q [D, H, K], k and v [D, G, K], o [H, K, D], biases; q_map and k_map, see `feature_maps`."""
    heads, groups, head = config.heads, config.kv_heads, config.head_width
    into, out = jax.nn.initializers.normal(config.init_std), jax.nn.initializers.normal(config.out_init_std)
    specs: dict[str, Any] = {
        "q": Spec((width, heads, head), ("embed", "heads", "key"), into, inputs=1),
        "k": Spec((width, groups, head), ("embed", "kv_heads", "key"), into, inputs=1),
        "v": Spec((width, groups, head), ("embed", "kv_heads", "value"), into, inputs=1),
        "o": Spec((heads, head, width), ("heads", "value", "embed"), out, inputs=2),
        "q_map": feature_maps.param_specs(config.feature_map, heads, head),
        "k_map": feature_maps.param_specs(config.feature_map, heads, head),
    }
    if config.qkv_bias:
        for name in ("q", "k", "v"):
            specs[f"{name}_bias"] = Spec(specs[name].shape[1:], specs[name].axes[1:], tags=NO_DECAY)
    if config.out_bias:
        specs["o_bias"] = Spec((width,), ("embed",), tags=NO_DECAY)
    return specs


def state_specs(config: Hedgehog, batch_size: int, max_length: int, dtype: DTypeLike) -> HedgehogState:
    """Specs of the state, float32 whatever the compute dtype, independent of `max_length`."""
    del max_length, dtype
    shape = (batch_size, config.heads, 2 * config.head_width, config.head_width + 1)
    return HedgehogState(sums=Spec(shape, ("batch", "heads", "feature", "value")))


def project(params: Tree, x: jax.Array, ctx: SeqContext, config: Hedgehog) -> tuple[jax.Array, ...]:
    """q, k and v [B, T, H, K]; k and v repeated for the heads that share them."""
    repeats = config.heads // config.kv_heads

    def project(name: str) -> jax.Array:
        y = linear(x, params[name], "btd,dhk->bthk")
        if config.qkv_bias:
            y = y + params[f"{name}_bias"].astype(y.dtype)
        if config.rotary is not None and name != "v":
            y = rotary.apply(y, ctx.positions, config=config.rotary)
        y = y if name == "q" or repeats == 1 else jnp.repeat(y, repeats, axis=2)
        return constrain(y, "batch", "time", "heads", None)

    return project("q"), project("k"), project("v")


def mix(
    params: Tree,
    x: jax.Array,
    ctx: SeqContext,
    state: HedgehogState | None = None,
    *,
    config: Hedgehog,
    implementation: str | None = None,
) -> tuple[jax.Array, HedgehogState]:
    """Hedgehog linear attention within documents.

    Args:
      params: tree of `param_specs`.
      x: [B, T, D], T >= 1.
      ctx: positions, documents, padding.
      state: sums over the preceding tokens, None at the start.
      config: shape and options.
      implementation: of `gated_linear_attention`; None = the platform's.

    Returns:
      y [B, T, D] in x.dtype, and the state after the last token.
    """
    valid = ctx.valid
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)
    q, k, v = project(params, x, ctx, config)
    # The floor of a feature is below what float16 can hold: float32 in its place.
    dtype = jnp.promote_types(x.dtype, jnp.bfloat16)
    phi_q = feature_maps.apply(params["q_map"], q, config=config.feature_map).astype(dtype)
    phi_k = feature_maps.apply(params["k_map"], k, config=config.feature_map).astype(dtype)
    # One more value, always 1, sums the normaliser: of the same rounded weights, so y stays a mean of values.
    values = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1).astype(dtype)
    y, sums = gated_linear_attention(
        phi_q,
        phi_k,
        values,
        None,
        None if state is None else state.sums,
        scale=1.0,
        reset=ctx.reset,
        valid=valid,
        implementation=implementation,
    )
    y = y.astype(jnp.float32)
    normaliser = y[..., -1:]
    if valid is not None:
        normaliser = jnp.where(valid[..., None, None], normaliser, 1.0)
    y = constrain((y[..., :-1] / normaliser).astype(x.dtype), "batch", "time", "heads", None)
    y = linear(y, params["o"], "bthv,hvd->btd")
    if config.out_bias:
        y = y + params["o_bias"].astype(y.dtype)
    if valid is not None:
        y = jnp.where(valid[..., None], y, 0)
    return y, HedgehogState(sums=sums)


def flops_per_token(config: Hedgehog, width: int, length: int) -> float:
    """Projections, maps, and a multiply-add per state element for each of update and read."""
    del length
    heads, head = config.heads, config.head_width
    matrices = 2 * width * head * (heads + config.kv_heads) + 2 * heads * head * head
    return 2.0 * matrices + 4.0 * heads * 2 * head * (head + 1)


register(
    MixerType(
        "hedgehog",
        Hedgehog,
        param_specs,
        state_specs,
        mix,
        flops_per_token,
        examples=(
            Hedgehog(heads=2, kv_heads=2, head_width=8, rotary=Rotary(), qkv_bias=True, out_bias=True),
            Hedgehog(heads=4, kv_heads=2, head_width=5, feature_map=HedgehogMap("halves", bias=False, floor=0.02)),
        ),
    )
)

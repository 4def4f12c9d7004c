"""Linear attention with a matrix-valued state that decays: GLA, simple GLA, RetNet's retention, plain linear attention.

One layer, four decays. References: GLA and simple GLA arXiv:2312.06635, RetNet arXiv:2307.08621, linear attention
arXiv:2006.16236.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.gated_linear_attention import gated_linear_attention
from zoo.core.context import SeqContext
from zoo.core.linear import linear
from zoo.core.params import Spec, Tree
from zoo.core.registry import check_choice
from zoo.core.sharding import constrain
from zoo.layers import norm, rotary
from zoo.layers.norm import NO_DECAY, Norm
from zoo.layers.rotary import Rotary
from zoo.mixers.contract import MixerType, register

FEATURE_MAPS = {
    "identity": lambda x: x,
    "elu": lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x))),  # elu(x) + 1; exp overflows for no x
    "relu": jax.nn.relu,
}
POSITIVE = ("elu", "relu")
NORMALISER_EPS = 1e-10  # of the denominator, which is 0 only where the numerator is


@dataclasses.dataclass(frozen=True)
class ChannelGate:
    """GLA: log a_t = log_sigmoid(W_up W_down x + b) / normaliser, one decay per channel of the key.

    Attributes: rank, width between the two matrices; normaliser, which keeps decays near 1.
    """

    rank: int = 16
    normaliser: float = 16.0


@dataclasses.dataclass(frozen=True)
class HeadGate:
    """Simple GLA: log a_t = log_sigmoid(W x + b) / normaliser, one decay per head."""

    normaliser: float = 16.0


@dataclasses.dataclass(frozen=True)
class FixedDecay:
    """RetNet: a = 1 - 2^(-5 - h) for head h = 0, 1, ..., whatever the token."""


@dataclasses.dataclass(frozen=True)
class GatedLinearAttention:
    """S_t = a_t S_{t-1} + phi(k_t) v_t^T; o_t = K^-1/2 S_t^T phi(q_t); y = W_o (norm(o) * silu(W_g x)).

    Attributes:
      heads: H; keys, queries and values have as many.
      key_width, value_width: K and V.
      decay: what a_t is; None = 1, plain linear attention.
      feature_map: phi, before the rotary embedding: "identity", "elu" (elu + 1) or "relu".
      normalise: divide o_t by K^-1/2 phi(q_t)^T z_t, z_t = a_t z_{t-1} + phi(k_t); needs a positive feature map.
      rotary: rotary embedding of queries and keys; None = no positions.
      norm: normalisation of o per head, one scale [V] for all heads; None = none.
      output_gate: multiply by silu(W_g x), after the norm.
      init_std, out_init_std: standard deviations of the projections.
    """

    heads: int
    key_width: int
    value_width: int
    decay: ChannelGate | HeadGate | FixedDecay | None = ChannelGate()
    feature_map: str = "identity"
    normalise: bool = False
    rotary: Rotary | None = None
    norm: Norm | None = Norm()
    output_gate: bool = True
    init_std: float = 0.02
    out_init_std: float = 0.02

    def __post_init__(self):
        check_choice("GatedLinearAttention.feature_map", self.feature_map, FEATURE_MAPS)
        if not isinstance(self.decay, ChannelGate | HeadGate | FixedDecay | None):
            raise ValueError(
                f"GatedLinearAttention.decay={self.decay!r} is not supported; "
                "allowed: ChannelGate(), HeadGate(), FixedDecay() or None"
            )
        for field in ("heads", "key_width", "value_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"GatedLinearAttention.{field} must be >= 1, got {getattr(self, field)}")
        if getattr(self.decay, "normaliser", 1.0) <= 0:
            raise ValueError(f"GatedLinearAttention.decay needs a normaliser > 0, got {self.decay}")
        if self.normalise and (self.feature_map not in POSITIVE or self.rotary is not None):
            raise ValueError(
                "GatedLinearAttention.normalise needs products of queries and keys that are not negative: "
                f"feature_map one of {POSITIVE} and rotary None, got {self.feature_map!r} and {self.rotary}"
            )


@flax.struct.dataclass
class GatedLinearAttentionState:
    """Attributes: kv, float32[B, H, K, V]; with a normaliser [B, H, K, V + 1], whose last column is z."""

    kv: Any


def param_specs(config: GatedLinearAttention, width: int) -> Tree:
    """Specs: q and k [D, H, K], v and gate [D, H, V], o [H, V, D], norm [V], and those of the decay: decay_down [D, R]
    and decay_up [R, H, K], or decay_proj [D, H], with decay_bias."""
    heads, key, value = config.heads, config.key_width, config.value_width
    normal = jax.nn.initializers.normal
    into = normal(config.init_std)
    to_key = Spec((width, heads, key), ("embed", "heads", "key"), into, inputs=1)
    to_value = Spec((width, heads, value), ("embed", "heads", "value"), into, inputs=1)
    out = Spec((heads, value, width), ("heads", "value", "embed"), normal(config.out_init_std), inputs=2)
    specs: dict[str, Any] = {"q": to_key, "k": to_key, "v": to_value, "o": out}
    if config.output_gate:
        specs["gate"] = to_value
    if config.norm is not None:
        specs["norm"] = norm.param_specs(config.norm, (value,), ("value",))
    if isinstance(config.decay, ChannelGate):
        rank = config.decay.rank
        specs["decay_down"] = Spec((width, rank), ("embed", "decay_rank"), into, inputs=1)
        specs["decay_up"] = Spec((rank, heads, key), ("decay_rank", "heads", "key"), into, inputs=1)
        specs["decay_bias"] = Spec((heads, key), ("heads", "key"), tags=NO_DECAY)
    elif isinstance(config.decay, HeadGate):
        specs["decay_proj"] = Spec((width, heads), ("embed", "heads"), into, inputs=1)
        specs["decay_bias"] = Spec((heads,), ("heads",), tags=NO_DECAY)
    return specs


def state_specs(
    config: GatedLinearAttention, batch_size: int, max_length: int, dtype: DTypeLike
) -> GatedLinearAttentionState:
    """Specs of the state, float32 whatever the compute dtype, independent of `max_length`."""
    del max_length, dtype
    shape = (batch_size, config.heads, config.key_width, config.value_width + config.normalise)
    return GatedLinearAttentionState(kv=Spec(shape, ("batch", "heads", "key", "value")))


def _log_decay(params: Tree, x: jax.Array, config: GatedLinearAttention) -> jax.Array | None:
    """log a: None, [H], [B, T, H] or [B, T, H, K]; float32 and at most 0."""
    if config.decay is None:
        return None
    if isinstance(config.decay, FixedDecay):
        return jnp.asarray(np.log1p(-(2.0 ** (-5.0 - np.arange(config.heads)))), jnp.float32)
    if isinstance(config.decay, HeadGate):
        logits = linear(x, params["decay_proj"], "btd,dh->bth")
    else:
        logits = linear(linear(x, params["decay_down"], "btd,dr->btr"), params["decay_up"], "btr,rhk->bthk")
    logits = logits.astype(jnp.float32) + params["decay_bias"].astype(jnp.float32)
    return jax.nn.log_sigmoid(logits) / config.decay.normaliser


def mix(
    params: Tree,
    x: jax.Array,
    ctx: SeqContext,
    state: GatedLinearAttentionState | None = None,
    *,
    config: GatedLinearAttention,
    implementation: str | None = None,
) -> tuple[jax.Array, GatedLinearAttentionState]:
    """Linear attention with decay within documents.

    Args:
      params: tree of `param_specs`.
      x: [B, T, D], T >= 1.
      ctx: positions, documents, padding.
      state: state after the preceding tokens, None at the start.
      config: sizes and options.
      implementation: of the `gated_linear_attention` op; None = the platform's.

    Returns:
      y [B, T, D] in x.dtype, and the state after the last token.
    """
    valid = ctx.valid
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)

    def project(name: str) -> jax.Array:
        return constrain(linear(x, params[name], "btd,dhk->bthk"), "batch", "time", "heads", None)

    q, k = (FEATURE_MAPS[config.feature_map](project(name)) for name in ("q", "k"))
    if config.rotary is not None:
        q, k = (rotary.apply(a, ctx.positions, config=config.rotary) for a in (q, k))
    v = project("v")
    if config.normalise:  # z is the column of the state that sums keys times 1
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    y, kv = gated_linear_attention(
        q,
        k,
        v,
        _log_decay(params, x, config),
        None if state is None else state.kv,
        reset=ctx.reset,
        valid=valid,
        implementation=implementation,
    )
    y = y.astype(jnp.float32)  # rounded once, before the output projection
    if config.normalise:
        y = y[..., :-1] / (y[..., -1:] + NORMALISER_EPS)
    if config.norm is not None:
        y = norm.apply(params.get("norm", {}), y, config=config.norm)
    if config.output_gate:
        y = y * jax.nn.silu(project("gate").astype(jnp.float32))
    y = linear(y.astype(x.dtype), params["o"], "bthv,hvd->btd")
    if valid is not None:
        y = jnp.where(valid[..., None], y, 0)
    return y, GatedLinearAttentionState(kv=kv)


def flops_per_token(config: GatedLinearAttention, width: int, length: int) -> float:
    """Projections at two per multiply-add, and 5 per state element for decay, update and read (4 without decay)."""
    del length
    key, value = config.heads * config.key_width, config.heads * config.value_width
    matrices = 2 * width * key + (3 if config.output_gate else 2) * width * value
    if isinstance(config.decay, ChannelGate):
        matrices += config.decay.rank * (width + key)
    elif isinstance(config.decay, HeadGate):
        matrices += width * config.heads
    elements = key * (config.value_width + config.normalise)
    return 2.0 * matrices + (4.0 if config.decay is None else 5.0) * elements


register(
    MixerType(
        "gated_linear_attention",
        GatedLinearAttention,
        param_specs,
        state_specs,
        mix,
        flops_per_token,
        examples=(
            # The eps keeps the norm well-conditioned where the product of a narrow query and key is nearly 0.
            GatedLinearAttention(
                heads=2, key_width=4, value_width=8, decay=ChannelGate(rank=3, normaliser=4.0), norm=Norm(eps=0.1)
            ),
            GatedLinearAttention(
                heads=2, key_width=6, value_width=12, decay=FixedDecay(), rotary=Rotary(), norm=Norm(scale=False)
            ),
            GatedLinearAttention(
                heads=3,
                key_width=5,
                value_width=4,
                decay=HeadGate(normaliser=2.0),
                feature_map="elu",
                normalise=True,
                norm=None,
                output_gate=False,
            ),
        ),
    )
)

"""Linear attention with the second-order Taylor expansion of the exponential: Based (arXiv:2402.18668)."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.taylor_linear_attention import features, taylor_linear_attention
from zoo.core.context import SeqContext
from zoo.core.linear import linear
from zoo.core.params import Spec, Tree
from zoo.core.sharding import constrain
from zoo.mixers.contract import MixerType, register


@dataclasses.dataclass(frozen=True)
class TaylorAttention:
    """w_ts = 1 + s + s^2 / 2 with s = q_t . k_s / sqrt(feature_dim); y_t = sum_{s <= t} w_ts v_s / (sum_{s <= t} w_ts +
    eps); no positions, no biases.

    The weight of a pair is phi(q) . phi(k). The paper writes phi with 1 + K + K^2 features, 273 at K = 16; the state
    here merges x_a x_b with x_b x_a and has 153: the same weights.

    Attributes:
      heads: H.
      head_width: V, width of a value.
      feature_dim: K, width of queries and keys; the state grows with its square.
      eps: added to the normaliser, which is at least 1/2.
      init_std, out_init_std: standard deviations of the projections.
    """

    heads: int
    head_width: int
    feature_dim: int = 16
    eps: float = 1e-12
    init_std: float = 0.02
    out_init_std: float = 0.02

    def __post_init__(self):
        for field in ("heads", "head_width", "feature_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"TaylorAttention.{field} must be >= 1, got {getattr(self, field)}")


@flax.struct.dataclass
class TaylorAttentionState:
    """Attributes: sums, float32[B, H, F, V+1], sums of phi(k) [v, 1]^T: the last column is the normaliser's."""

    sums: Any


def param_specs(config: TaylorAttention, width: int) -> Tree:
    """Specs: q and k [D, H, K], v [D, H, V], o [H, V, D]."""
    heads, key, value = config.heads, config.feature_dim, config.head_width
    into, out = jax.nn.initializers.normal(config.init_std), jax.nn.initializers.normal(config.out_init_std)
    return {
        "q": Spec((width, heads, key), ("embed", "heads", "key"), into, inputs=1),
        "k": Spec((width, heads, key), ("embed", "heads", "key"), into, inputs=1),
        "v": Spec((width, heads, value), ("embed", "heads", "value"), into, inputs=1),
        "o": Spec((heads, value, width), ("heads", "value", "embed"), out, inputs=2),
    }


def state_specs(config: TaylorAttention, batch_size: int, max_length: int, dtype: DTypeLike) -> TaylorAttentionState:
    """Specs of the state, float32 whatever the compute dtype, independent of `max_length`."""
    del max_length, dtype
    shape = (batch_size, config.heads, features.count(config.feature_dim), config.head_width + 1)
    return TaylorAttentionState(sums=Spec(shape, ("batch", "heads", "feature", "value")))


def mix(
    params: Tree,
    x: jax.Array,
    ctx: SeqContext,
    state: TaylorAttentionState | None = None,
    *,
    config: TaylorAttention,
    implementation: str | None = None,
) -> tuple[jax.Array, TaylorAttentionState]:
    """Taylor linear attention within documents.

    Args:
      params: tree of `param_specs`.
      x: [B, T, D], T >= 1.
      ctx: documents and padding; positions do not matter.
      state: sums over the preceding tokens, None at the start.
      config: sizes.
      implementation: of `taylor_linear_attention`; None = the platform's.

    Returns:
      y [B, T, D] in x.dtype, and the state after the last token.
    """
    valid = ctx.valid
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)
    q, k, v = (
        constrain(linear(x, params[name], "btd,dhk->bthk"), "batch", "time", "heads", None) for name in ("q", "k", "v")
    )
    y, sums = taylor_linear_attention(
        q,
        k,
        v,
        None if state is None else state.sums,
        eps=config.eps,
        reset=ctx.reset,
        valid=valid,
        implementation=implementation,
    )
    y = linear(constrain(y, "batch", "time", "heads", None), params["o"], "bthv,hvd->btd")
    if valid is not None:
        y = jnp.where(valid[..., None], y, 0)
    return y, TaylorAttentionState(sums=sums)


def flops_per_token(config: TaylorAttention, width: int, length: int) -> float:
    """Projections, and a multiply-add per state element for each of update and read."""
    del length
    heads, key, value = config.heads, config.feature_dim, config.head_width
    return 4.0 * width * heads * (key + value) + 4.0 * heads * features.count(key) * (value + 1)


register(
    MixerType(
        "taylor_attention",
        TaylorAttention,
        param_specs,
        state_specs,
        mix,
        flops_per_token,
        examples=(TaylorAttention(heads=3, head_width=5, feature_dim=4, eps=0.5),),
    )
)

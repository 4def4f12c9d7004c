"""Feed-forward sublayer of BitLinears: the MatMul-free language model's GLU (arXiv:2406.02528, section 3.3.2)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from zoo.core.context import SeqContext
from zoo.core.params import Tree
from zoo.core.registry import check_choice
from zoo.core.sharding import constrain
from zoo.layers.activations import ACTIVATIONS
from zoo.layers.bit_linear import bit_linear
from zoo.layers.bit_linear import param_specs as bit_linear_specs
from zoo.mixers.contract import MixerType, register


@dataclasses.dataclass(frozen=True)
class BitMLP:
    """[g, u] = W_in x; y = W_down (act(g) u), W BitLinears. Gate and up are one matrix with one ternary scale.

    Attributes:
      hidden: F.
      activation: see `MLP`.
      bit_eps: of the norms of the BitLinears.
      init_std, out_init_std: standard deviations of the input and output matrices.
    """

    hidden: int
    activation: str = "silu"
    bit_eps: float = 1e-6
    init_std: float = 0.02
    out_init_std: float = 0.02

    def __post_init__(self):
        check_choice("BitMLP.activation", self.activation, ACTIVATIONS)


def param_specs(config: BitMLP, width: int) -> Tree:
    """Specs: BitLinears gate_up [D, 2, F] (g, u) and down [F, D]."""
    normal, hidden = jax.nn.initializers.normal, config.hidden
    return {
        "gate_up": bit_linear_specs((width, 2, hidden), ("embed", "branch", "mlp"), normal(config.init_std)),
        "down": bit_linear_specs((hidden, width), ("mlp", "embed"), normal(config.out_init_std)),
    }


def state_specs(config: BitMLP, batch_size: int, max_length: int, dtype: DTypeLike) -> Tree:
    """An empty state."""
    del config, batch_size, max_length, dtype
    return {}


def mix(
    params: Tree,
    x: jax.Array,
    ctx: SeqContext,
    state: Tree | None = None,
    *,
    config: BitMLP,
    implementation: str | None = None,
) -> tuple[jax.Array, Tree]:
    """The feed-forward map on every token by itself: x [B, T, D] -> (y [B, T, D], {})."""
    del state
    if ctx.valid is not None:
        x = jnp.where(ctx.valid[..., None], x, 0)
    options = {"eps": config.bit_eps, "implementation": implementation}
    gate_up = bit_linear(params["gate_up"], x, "btd,dcf->btcf", **options)
    h = ACTIVATIONS[config.activation](gate_up[:, :, 0]) * gate_up[:, :, 1]
    y = bit_linear(params["down"], constrain(h, "batch", "time", "mlp"), "btf,fd->btd", **options)
    if ctx.valid is not None:
        y = jnp.where(ctx.valid[..., None], y, 0)
    return y, {}


def flops_per_token(config: BitMLP, width: int, length: int) -> float:
    """Two per multiply-add of each matrix, ternary or not."""
    del length
    return 6.0 * width * config.hidden


register(
    MixerType(
        "bit_mlp",
        BitMLP,
        param_specs,
        state_specs,
        mix,
        flops_per_token,
        examples=(BitMLP(20, activation="gelu", bit_eps=1e-2),),
    )
)

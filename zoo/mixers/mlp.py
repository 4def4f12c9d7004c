"""Feed-forward sublayer: SwiGLU, GeGLU and plain two-matrix forms (arXiv:2002.05202)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from zoo.core.context import SeqContext
from zoo.core.linear import linear
from zoo.core.params import Spec, Tree
from zoo.core.registry import check_choice
from zoo.core.sharding import constrain
from zoo.layers.activations import ACTIVATIONS
from zoo.layers.norm import NO_DECAY
from zoo.mixers.contract import MixerType, register


@dataclasses.dataclass(frozen=True)
class MLP:
    """y = W_down (act(W_gate x) * (W_up x)), or W_down act(W_up x) when not gated.

    Attributes:
      hidden: F.
      activation: "silu" (gated: SwiGLU), "gelu" or "gelu_tanh" (gated: GeGLU), "relu", "squared_relu".
      gated: whether there is a gate matrix.
      bias: biases on all matrices.
      init_std, out_init_std: standard deviations of the input and output matrices.
    """

    hidden: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    init_std: float = 0.02
    out_init_std: float = 0.02

    def __post_init__(self):
        check_choice("MLP.activation", self.activation, ACTIVATIONS)


def param_specs(config: MLP, width: int) -> Tree:
    """Specs: up and gate [D, F], down [F, D], biases."""
    normal = jax.nn.initializers.normal
    into = Spec((width, config.hidden), ("embed", "mlp"), normal(config.init_std), inputs=1)
    specs = {"up": into}
    if config.gated:
        specs["gate"] = into
    specs["down"] = Spec((config.hidden, width), ("mlp", "embed"), normal(config.out_init_std), inputs=1)
    if config.bias:
        for name in list(specs):
            out = specs[name]
            specs[f"{name}_bias"] = Spec(out.shape[1:], out.axes[1:], tags=NO_DECAY)
    return specs


def state_specs(config: MLP, batch_size: int, max_length: int, dtype: DTypeLike) -> Tree:
    """An empty state."""
    del config, batch_size, max_length, dtype
    return {}


def mix(
    params: Tree,
    x: jax.Array,
    ctx: SeqContext,
    state: Tree | None = None,
    *,
    config: MLP,
    implementation: str | None = None,
) -> tuple[jax.Array, Tree]:
    """The feed-forward map on every token by itself: x [B, T, D] -> (y [B, T, D], {})."""
    del implementation, state
    act = ACTIVATIONS[config.activation]
    if ctx.valid is not None:
        x = jnp.where(ctx.valid[..., None], x, 0)

    def project(name: str, inputs: jax.Array, eqn: str) -> jax.Array:
        y = linear(inputs, params[name], eqn)
        return y + params[f"{name}_bias"].astype(y.dtype) if config.bias else y

    h = project("up", x, "btd,df->btf")
    h = act(project("gate", x, "btd,df->btf")) * h if config.gated else act(h)
    h = constrain(h, "batch", "time", "mlp")
    y = project("down", h, "btf,fd->btd")
    if ctx.valid is not None:
        y = jnp.where(ctx.valid[..., None], y, 0)
    return y, {}


def flops_per_token(config: MLP, width: int, length: int) -> float:
    """Two per multiply-add of each matrix."""
    del length
    return 2.0 * width * config.hidden * (3 if config.gated else 2)


register(
    MixerType(
        "mlp",
        MLP,
        param_specs,
        state_specs,
        mix,
        flops_per_token,
        examples=(
            MLP(24),
            MLP(24, activation="gelu"),
            MLP(24, activation="gelu_tanh", gated=False, bias=True),
            MLP(24, activation="squared_relu", gated=False),
        ),
    )
)

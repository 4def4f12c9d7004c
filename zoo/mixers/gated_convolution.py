"""Gated short convolutions: BaseConv of Based (arXiv:2402.18668) and of Zoology (arXiv:2312.04927)."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.causal_conv1d import causal_conv1d
from zoo.core.context import SeqContext
from zoo.core.linear import linear
from zoo.core.params import Spec, Tree
from zoo.core.registry import check_choice
from zoo.core.sharding import constrain
from zoo.layers.norm import NO_DECAY
from zoo.mixers.contract import MixerType, register


@dataclasses.dataclass(frozen=True)
class BaseConv:
    """A depthwise causal convolution times a linear gate.

    "projected" (Based): [u, g] = W_in x + b_in; y = W_out (silu(conv(u)) * g) + b_out.
    "residual" (Zoology): y = x + conv(x) * (W x + b).

    Attributes:
      inner: Di, channels of the convolution: 2 D in Based; D, and nothing else, in the residual form.
      conv_width: W, taps of the convolution.
      form: "projected" or "residual".
      conv_bias: bias of the convolution; Zoology's has one, the released Based has none.
      bias: biases of the projections.
      init_std, out_init_std: standard deviations of the projections.
    """

    inner: int
    conv_width: int = 3
    form: str = "projected"
    conv_bias: bool = False
    bias: bool = True
    init_std: float = 0.02
    out_init_std: float = 0.02

    def __post_init__(self):
        check_choice("BaseConv.form", self.form, ("projected", "residual"))
        for field, least in (("inner", 1), ("conv_width", 2)):
            if getattr(self, field) < least:
                raise ValueError(f"BaseConv.{field} must be >= {least}, got {getattr(self, field)}")


@flax.struct.dataclass
class BaseConvState:
    """Attributes: conv, float32[B, W-1, Di], last inputs of the convolution."""

    conv: Any


def _taps_init(taps: int):
    bound = taps**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def param_specs(config: BaseConv, width: int) -> Tree:
    """Specs: conv [W, Di]; projected: in_proj [D, 2, Di] (u, g), out_proj [Di, D]; residual: gate [D, Di]; biases.

    Raises:
      ValueError: the residual form with inner other than the model's width.
    """
    inner, normal, taps = config.inner, jax.nn.initializers.normal, _taps_init(config.conv_width)
    specs = {"conv": Spec((config.conv_width, inner), ("conv", "inner"), taps)}
    if config.conv_bias:
        specs["conv_bias"] = Spec((inner,), ("inner",), taps, tags=NO_DECAY)
    if config.form == "residual":
        if inner != width:
            raise ValueError(f"BaseConv.inner must be the model's width {width} for form='residual', got {inner}")
        specs["gate"] = Spec((width, inner), ("embed", "inner"), normal(config.init_std), inputs=1)
        if config.bias:
            specs["gate_bias"] = Spec((inner,), ("inner",), tags=NO_DECAY)
        return specs
    specs["in_proj"] = Spec((width, 2, inner), ("embed", "branch", "inner"), normal(config.init_std), inputs=1)
    specs["out_proj"] = Spec((inner, width), ("inner", "embed"), normal(config.out_init_std), inputs=1)
    if config.bias:
        specs["in_bias"] = Spec((2, inner), ("branch", "inner"), tags=NO_DECAY)
        specs["out_bias"] = Spec((width,), ("embed",), tags=NO_DECAY)
    return specs


def state_specs(config: BaseConv, batch_size: int, max_length: int, dtype: DTypeLike) -> BaseConvState:
    """Specs of the state, float32 whatever the compute dtype, independent of `max_length`."""
    del max_length, dtype
    shape = (batch_size, config.conv_width - 1, config.inner)
    return BaseConvState(conv=Spec(shape, ("batch", "conv", "inner")))


def mix(
    params: Tree,
    x: jax.Array,
    ctx: SeqContext,
    state: BaseConvState | None = None,
    *,
    config: BaseConv,
    implementation: str | None = None,
) -> tuple[jax.Array, BaseConvState]:
    """The gated convolution within documents.

    Args:
      params: tree of `param_specs`.
      x: [B, T, D], T >= 1.
      ctx: documents and padding; positions do not matter.
      state: last inputs of the convolution, None at the start.
      config: form and sizes.
      implementation: of `causal_conv1d`; None = the platform's.

    Returns:
      y [B, T, D] in x.dtype, and the state after the last token.
    """
    valid = ctx.valid
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)

    def biased(y: jax.Array, name: str) -> jax.Array:
        return y + params[name].astype(y.dtype) if config.bias else y

    projected = config.form == "projected"
    if projected:
        u_gate = biased(linear(x, params["in_proj"], "btd,dci->btci"), "in_bias")
        u, gate = u_gate[:, :, 0], u_gate[:, :, 1]
    else:
        u, gate = x, biased(linear(x, params["gate"], "btd,di->bti"), "gate_bias")
    u, gate = constrain(u, "batch", "time", "inner"), constrain(gate, "batch", "time", "inner")
    u, conv_state = causal_conv1d(
        u,
        params["conv"],
        params.get("conv_bias"),
        None if state is None else state.conv,
        reset=ctx.reset,
        valid=valid,
        activation="silu" if projected else None,
        implementation=implementation,
    )
    y = u * gate
    y = biased(linear(y, params["out_proj"], "bti,id->btd"), "out_bias") if projected else x + y
    if valid is not None:
        y = jnp.where(valid[..., None], y, 0)
    return y, BaseConvState(conv=conv_state)


def flops_per_token(config: BaseConv, width: int, length: int) -> float:
    """Projections, convolution and gate."""
    del length
    matrices = (3 if config.form == "projected" else 1) * width * config.inner
    return 2.0 * matrices + (2.0 * config.conv_width + 1.0) * config.inner


register(
    MixerType(
        "base_conv",
        BaseConv,
        param_specs,
        state_specs,
        mix,
        flops_per_token,
        examples=(
            BaseConv(inner=24),
            BaseConv(inner=16, conv_width=2, form="residual", conv_bias=True),
        ),
    )
)

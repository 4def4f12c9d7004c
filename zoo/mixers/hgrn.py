"""HGRN's elementwise gated recurrence, in its real-valued form (arXiv:2311.04823, section 3)."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.linear_scan import linear_scan
from zoo.core.context import SeqContext
from zoo.core.linear import linear
from zoo.core.params import Spec, Tree
from zoo.core.sharding import constrain
from zoo.layers import norm
from zoo.layers.norm import NO_DECAY, Norm
from zoo.mixers.contract import MixerType, register


@dataclasses.dataclass(frozen=True)
class HGRN:
    """f = b + (1 - b) sigmoid(W_f x); h_t = f h_{t-1} + (1 - f) silu(W_i x); y = W_o (norm(h) * silu(W_g x)).

    b is this layer's lower bound, a row of `lower_bounds`. The paper's main form turns h by a fixed phase per channel
    in the complex plane besides; this is the form without, which published weights have.

    Attributes:
      inner: Di, channels of the recurrence.
      lower_bound: whether the forget gate has one; without, b = 0.
      norm: normalisation of h over all channels.
      init_std, out_init_std: standard deviations of the projections.
    """

    inner: int
    lower_bound: bool = True
    norm: Norm = Norm()
    init_std: float = 0.02
    out_init_std: float = 0.02

    def __post_init__(self):
        if self.inner < 1:
            raise ValueError(f"HGRN.inner must be >= 1, got {self.inner}")


@flax.struct.dataclass
class HGRNState:
    """Attributes: h, float32[B, Di]."""

    h: Any


def lower_bounds(logits: jax.Array) -> jax.Array:
    """Lower bounds of the forget gates of all layers, growing with depth, from [L, Di] logits; float32.

    b_l = p_1 + ... + p_l, p = softmax of the logits over layers 0, 1, ...: 0 in the first layer, below 1 in the last.

    Reference: arXiv:2311.04823, section 3.2.
    """
    shares = jax.nn.softmax(logits.astype(jnp.float32), axis=0)
    return jnp.cumsum(shares.at[0].set(0.0), axis=0)


def param_specs(config: HGRN, width: int) -> Tree:
    """Specs: i, f and g [D, Di], o [Di, D], norm [Di]; lower_bound [Di], the logits of one layer."""
    normal = jax.nn.initializers.normal
    into = Spec((width, config.inner), ("embed", "inner"), normal(config.init_std), inputs=1)
    specs = {
        "i": into,
        "f": into,
        "g": into,
        "o": Spec((config.inner, width), ("inner", "embed"), normal(config.out_init_std), inputs=1),
        "norm": norm.param_specs(config.norm, (config.inner,), ("inner",)),
    }
    if config.lower_bound:
        specs["lower_bound"] = Spec((config.inner,), ("inner",), tags=NO_DECAY)
    return specs


def state_specs(config: HGRN, batch_size: int, max_length: int, dtype: DTypeLike) -> HGRNState:
    """Specs of the state, float32 whatever the compute dtype, independent of `max_length`."""
    del max_length, dtype
    return HGRNState(h=Spec((batch_size, config.inner), ("batch", "inner")))


def mix(
    params: Tree,
    x: jax.Array,
    ctx: SeqContext,
    state: HGRNState | None = None,
    *,
    config: HGRN,
    implementation: str | None = None,
) -> tuple[jax.Array, HGRNState]:
    """The HGRN mixer.

    Args:
      params: tree of `param_specs`, in which lower_bound is the bound itself: a model makes it of the logits of all its
        layers (`MixerType.across_layers`). What is not in [0, 1] counts as the nearer end.
      x: [B, T, D], T >= 1.
      ctx: positions, documents, padding.
      state: state after the preceding tokens, None at the start.
      config: sizes.
      implementation: of the `linear_scan` op; None = the platform's.

    Returns:
      y [B, T, D] in x.dtype, and the state after the last token.
    """
    valid = ctx.valid
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)
    i, f, g = (constrain(linear(x, params[n], "btd,di->bti"), "batch", "time", "inner") for n in ("i", "f", "g"))
    f = f.astype(jnp.float32)  # in bfloat16 a gate of 0.999 is 1
    forget, write = jax.nn.sigmoid(f), jax.nn.sigmoid(-f)
    if config.lower_bound:
        bound = jnp.clip(params["lower_bound"].astype(jnp.float32), 0.0, 1.0)
        forget, write = bound + (1.0 - bound) * forget, (1.0 - bound) * write
    h, last = linear_scan(
        forget,
        (jax.nn.silu(i.astype(jnp.float32)) * write).astype(x.dtype),
        None if state is None else state.h,
        reset=ctx.reset,
        valid=valid,
        implementation=implementation,
    )
    y = norm.apply(params.get("norm", {}), h, config=config.norm) * jax.nn.silu(g)
    y = linear(constrain(y, "batch", "time", "inner"), params["o"], "bti,id->btd")
    if valid is not None:
        y = jnp.where(valid[..., None], y, 0)
    return y, HGRNState(h=last)


def flops_per_token(config: HGRN, width: int, length: int) -> float:
    """Projections at two per multiply-add, 2 per channel for the recurrence and 6 for its gates."""
    del length
    return 8.0 * width * config.inner + 8.0 * config.inner


register(
    MixerType(
        "hgrn",
        HGRN,
        param_specs,
        state_specs,
        mix,
        flops_per_token,
        examples=(HGRN(inner=24),),
        across_layers={"lower_bound": lower_bounds},
    )
)

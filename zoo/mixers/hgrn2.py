"""HGRN2: HGRN's gate on a matrix-valued state (arXiv:2404.07904)."""

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
from zoo.layers import norm
from zoo.layers.norm import NO_DECAY, Norm
from zoo.mixers.contract import MixerType, register
from zoo.mixers.hgrn import lower_bounds

SMALLEST, LARGEST = 1e-37, 1.0 - 2.0**-24  # bounds whose logarithm, and that of 1 - bound, are finite


@dataclasses.dataclass(frozen=True)
class HGRN2:
    """f = b + (1 - b) sigmoid(W_f x); S_t = f S_{t-1} + (1 - f) (W_i x)^T; y = W_o norm(S_t^T silu(W_q x) K^-1/2).

    The input gate 1 - f is the key and the state has K rows where HGRN has one; b as in HGRN. The norm is over all
    heads together, so that the factor K^-1/2 matters only beside its eps.

    Attributes:
      heads: H.
      key_width: K, the expansion of the state. value_width: V.
      lower_bound: whether the forget gate has one; without, b = 0.
      norm: normalisation of the output over all heads.
      init_std, out_init_std: standard deviations of the projections.
    """

    heads: int
    key_width: int
    value_width: int
    lower_bound: bool = True
    norm: Norm = Norm()
    init_std: float = 0.02
    out_init_std: float = 0.02

    def __post_init__(self):
        for field in ("heads", "key_width", "value_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"HGRN2.{field} must be >= 1, got {getattr(self, field)}")


@flax.struct.dataclass
class HGRN2State:
    """Attributes: kv, float32[B, H, K, V]."""

    kv: Any


def param_specs(config: HGRN2, width: int) -> Tree:
    """Specs: q and f [D, H, K], i [D, H, V], o [H, V, D], norm [H, V]; lower_bound [H, K], the logits of one layer."""
    heads, key, value = config.heads, config.key_width, config.value_width
    normal = jax.nn.initializers.normal
    into = normal(config.init_std)
    to_key = Spec((width, heads, key), ("embed", "heads", "key"), into, inputs=1)
    specs = {
        "q": to_key,
        "f": to_key,
        "i": Spec((width, heads, value), ("embed", "heads", "value"), into, inputs=1),
        "o": Spec((heads, value, width), ("heads", "value", "embed"), normal(config.out_init_std), inputs=2),
        "norm": norm.param_specs(config.norm, (heads, value), ("heads", "value")),
    }
    if config.lower_bound:
        specs["lower_bound"] = Spec((heads, key), ("heads", "key"), tags=NO_DECAY)
    return specs


def state_specs(config: HGRN2, batch_size: int, max_length: int, dtype: DTypeLike) -> HGRN2State:
    """Specs of the state, float32 whatever the compute dtype, independent of `max_length`."""
    del max_length, dtype
    shape = (batch_size, config.heads, config.key_width, config.value_width)
    return HGRN2State(kv=Spec(shape, ("batch", "heads", "key", "value")))


def mix(
    params: Tree,
    x: jax.Array,
    ctx: SeqContext,
    state: HGRN2State | None = None,
    *,
    config: HGRN2,
    implementation: str | None = None,
) -> tuple[jax.Array, HGRN2State]:
    """The HGRN2 mixer.

    Args:
      params: tree of `param_specs`, in which lower_bound is the bound itself: a model makes it of the logits of all its
        layers (`MixerType.across_layers`). What is not in [0, 1] counts as the nearer end.
      x: [B, T, D], T >= 1.
      ctx: positions, documents, padding.
      state: state after the preceding tokens, None at the start.
      config: sizes.
      implementation: of the `gated_linear_attention` op; None = the platform's.

    Returns:
      y [B, T, D] in x.dtype, and the state after the last token.
    """
    valid = ctx.valid
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)

    def project(name: str) -> jax.Array:
        return constrain(linear(x, params[name], "btd,dhk->bthk"), "batch", "time", "heads", None)

    f = project("f").astype(jnp.float32)
    log_forget, write = jax.nn.log_sigmoid(f), jax.nn.sigmoid(-f)
    if config.lower_bound:
        bound = jnp.clip(params["lower_bound"].astype(jnp.float32), SMALLEST, LARGEST)
        log_forget, write = jnp.logaddexp(jnp.log(bound), jnp.log1p(-bound) + log_forget), (1.0 - bound) * write
    y, kv = gated_linear_attention(
        jax.nn.silu(project("q")),
        write.astype(x.dtype),
        project("i"),
        jnp.minimum(log_forget, 0.0),
        None if state is None else state.kv,
        reset=ctx.reset,
        valid=valid,
        implementation=implementation,
    )
    y = norm.apply(params.get("norm", {}), y, config=config.norm, axis=(-2, -1))
    y = linear(y, params["o"], "bthv,hvd->btd")
    if valid is not None:
        y = jnp.where(valid[..., None], y, 0)
    return y, HGRN2State(kv=kv)


def flops_per_token(config: HGRN2, width: int, length: int) -> float:
    """Projections at two per multiply-add, 5 per state element for decay, update and read, and 4 per gate."""
    del length
    key, value = config.heads * config.key_width, config.heads * config.value_width
    return 4.0 * width * (key + value) + 5.0 * key * config.value_width + 4.0 * key


register(
    MixerType(
        "hgrn2",
        HGRN2,
        param_specs,
        state_specs,
        mix,
        flops_per_token,
        examples=(HGRN2(heads=2, key_width=5, value_width=8),),
        across_layers={"lower_bound": lower_bounds},
    )
)

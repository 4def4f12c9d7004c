"""The mLSTM layer of xLSTM 7B (arXiv:2503.13427): a matrix memory with exponential gates, in a head layout like
attention's."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.mlstm import State, mlstm
from zoo.core.context import SeqContext
from zoo.core.linear import linear
from zoo.core.params import Spec, Tree
from zoo.core.sharding import constrain
from zoo.layers import norm
from zoo.layers.norm import NO_DECAY, Norm
from zoo.mixers.contract import MixerType, register

FORGET_BIAS = (3.0, 6.0)  # of the first and the last head at initialisation


@dataclasses.dataclass(frozen=True)
class MLSTM:
    """Per head, with q, k, v linear in x: i = cap(w_i x + b_i), f = cap(w_f x + b_f), cap(a) = c tanh(a / c);
    h = mlstm(q, k, v, i, f), see `pallas_kernels.mlstm`; y = W_out (sigmoid(W_o x) * norm(h)).

    Attributes:
      heads: H.
      key_width: K, of queries and keys of a head; D / (2 H) in the paper.
      value_width: V, of the values of a head; D / H in the paper.
      gate_soft_cap: c, or None for cap(a) = a.
      norm: normalisation of each head's h, with parameters of its own.
      cell_eps: added to the cell's denominator.
      bias: biases on q, k, v, the output gate and the output projection; the other gates always have one.
      input_gate_bias: b_i at initialisation. Gate weights start at 0 and b_f at 3 to 6, evenly over the heads.
      init_std, out_init_std: standard deviations of the input matrices and of the output matrix.
    """

    heads: int
    key_width: int
    value_width: int
    gate_soft_cap: float | None = 15.0
    norm: Norm = Norm("layer", 1e-6)
    cell_eps: float = 1e-6
    bias: bool = False
    input_gate_bias: float = -10.0
    init_std: float = 0.02
    out_init_std: float = 0.02

    def __post_init__(self):
        for field in ("heads", "key_width", "value_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"MLSTM.{field} must be >= 1, got {getattr(self, field)}")
        if self.gate_soft_cap is not None and self.gate_soft_cap <= 0:
            raise ValueError(f"MLSTM.gate_soft_cap must be > 0, or None for no cap, got {self.gate_soft_cap}")


@flax.struct.dataclass
class MLSTMState:
    """Attributes: C, float32[B, H, K, V], the memory; n, float32[B, H, K], the normaliser; m, float32[B, H], the
    stabiliser: the equations' C and n are exp(m) times these."""

    C: Any
    n: Any
    m: Any


def forget_bias_init(key, shape, dtype=jnp.float32):
    """3 to 6, evenly over the heads: from short memories to long ones."""
    del key
    return jnp.linspace(*FORGET_BIAS, shape[-1], dtype=dtype)


def param_specs(config: MLSTM, width: int) -> Tree:
    """Specs: q and k [D, H, K], v and output_gate [D, H, V], input_gate and forget_gate [D, H] with biases [H], norm
    [H, V], out [H, V, D], biases."""
    heads, key, value = config.heads, config.key_width, config.value_width
    normal = jax.nn.initializers.normal
    query = Spec((width, heads, key), ("embed", "heads", "key"), normal(config.init_std), inputs=1)
    values = Spec((width, heads, value), ("embed", "heads", "value"), normal(config.init_std), inputs=1)
    out_init = normal(config.out_init_std)
    out = Spec((heads, value, width), ("heads", "value", "embed"), out_init, inputs=2)
    specs: dict[str, Any] = {"q": query, "k": query, "v": values, "output_gate": values, "out": out}
    if config.bias:
        specs |= {f"{name}_bias": Spec(s.shape[s.inputs :], s.axes[s.inputs :], tags=NO_DECAY)
                  for name, s in specs.items()}  # fmt: skip
    input_bias = jax.nn.initializers.constant(config.input_gate_bias)
    for name, init in (("input_gate", input_bias), ("forget_gate", forget_bias_init)):
        specs[name] = Spec((width, heads), ("embed", "heads"), jax.nn.initializers.zeros, inputs=1)
        specs[f"{name}_bias"] = Spec((heads,), ("heads",), init, tags=NO_DECAY)
    if head_norm := norm.param_specs(config.norm, (heads, value), ("heads", "value")):
        specs["norm"] = head_norm
    return specs


def state_specs(config: MLSTM, batch_size: int, max_length: int, dtype: DTypeLike) -> MLSTMState:
    """Specs of the state, float32 whatever the compute dtype, independent of `max_length`."""
    del max_length, dtype
    heads, key, value = config.heads, config.key_width, config.value_width
    return MLSTMState(
        C=Spec((batch_size, heads, key, value), ("batch", "heads", "key", "value")),
        n=Spec((batch_size, heads, key), ("batch", "heads", "key")),
        m=Spec((batch_size, heads), ("batch", "heads")),
    )


def mix(
    params: Tree,
    x: jax.Array,
    ctx: SeqContext,
    state: MLSTMState | None = None,
    *,
    config: MLSTM,
    implementation: str | None = None,
) -> tuple[jax.Array, MLSTMState]:
    """The mLSTM layer.

    Args:
      params: tree of `param_specs`.
      x: [B, T, D], T >= 1.
      ctx: positions, documents, padding.
      state: state after the preceding tokens, None at the start.
      config: sizes.
      implementation: of `mlstm`; None = the platform's.

    Returns:
      y [B, T, D] in x.dtype, and the state after the last token.
    """
    if ctx.valid is not None:
        x = jnp.where(ctx.valid[..., None], x, 0)

    def project(name: str, width_axis: str) -> jax.Array:
        y = linear(x, params[name], "btd,dhk->bthk")
        if config.bias:
            y = y + params[f"{name}_bias"].astype(y.dtype)
        return constrain(y, "batch", "time", "heads", width_axis)

    def gate(name: str) -> jax.Array:
        # In float32 throughout: the cell takes the exponential, so an error here is a relative error of a weight.
        a = linear(x.astype(jnp.float32), params[name], "btd,dh->bth")
        a = constrain(a + params[f"{name}_bias"].astype(jnp.float32), "batch", "time", "heads")
        cap = config.gate_soft_cap
        return a if cap is None else cap * jnp.tanh(a / cap)

    h, (C, n, m) = mlstm(
        project("q", "key"),
        project("k", "key"),
        project("v", "value"),
        gate("input_gate"),
        gate("forget_gate"),
        None if state is None else State(state.C, state.n, state.m),
        eps=config.cell_eps,
        reset=ctx.reset,
        valid=ctx.valid,
        implementation=implementation,
    )
    h = norm.apply(params.get("norm", {}), h, config=config.norm)
    h = constrain(jax.nn.sigmoid(project("output_gate", "value")) * h, "batch", "time", "heads", "value")
    y = linear(h, params["out"], "bthv,hvd->btd")
    if config.bias:
        y = y + params["out_bias"].astype(y.dtype)
    if ctx.valid is not None:
        y = jnp.where(ctx.valid[..., None], y, 0)
    return y, MLSTMState(C, n, m)


def cell_flops(heads: int, key: int, value: int) -> float:
    """Per token, as a recurrence: 5 per element of the memory (decay, outer product, sum, read) and of n."""
    return 5.0 * heads * key * (value + 1)


def flops_per_token(config: MLSTM, width: int, length: int) -> float:
    """Projections at two per multiply-add, and the cell as a recurrence."""
    del length
    heads, key, value = config.heads, config.key_width, config.value_width
    return 2.0 * width * heads * (2 * key + 3 * value + 2) + cell_flops(heads, key, value)


register(
    MixerType(
        "mlstm",
        MLSTM,
        param_specs,
        state_specs,
        mix,
        flops_per_token,
        # Both epsilons so large that a wrong place of either shows.
        examples=(
            MLSTM(
                heads=3,
                key_width=5,
                value_width=4,
                gate_soft_cap=1.5,
                norm=Norm("layer", 0.2, bias=True),
                cell_eps=0.1,
                bias=True,
            ),
        ),
    )
)

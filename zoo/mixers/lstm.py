"""The LSTM and the eight variants of "LSTM: a search space odyssey" (arXiv:1503.04069, section III)."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from zoo.core.context import SeqContext
from zoo.core.linear import linear
from zoo.core.params import Spec, Tree, fresh
from zoo.core.registry import check_choice
from zoo.core.sharding import constrain
from zoo.layers.norm import NO_DECAY
from zoo.mixers.contract import MixerType, register

ACTIVATIONS = {"tanh": jnp.tanh, "identity": lambda a: a}

# The paper's names, and the one switch that each variant turns.
VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "vanilla": {},
        "NIG": {"input_gate": False},
        "NFG": {"forget_gate": False},
        "NOG": {"output_gate": False},
        "NIAF": {"input_activation": "identity"},
        "NOAF": {"output_activation": "identity"},
        "CIFG": {"coupled": True},
        "NP": {"peepholes": False},
        "FGR": {"gate_recurrence": True},
    }
)


@dataclasses.dataclass(frozen=True)
class LSTM:
    """With W [D, D] and R [D, D] of z and of every gate, peepholes p [D], and g = h = tanh:

      z = g(W_z x + R_z y' + b_z)
      i = sigmoid(W_i x + R_i y' + p_i * c' + b_i), f = sigmoid(W_f x + R_f y' + p_f * c' + b_f)
      c = i * z + f * c'
      o = sigmoid(W_o x + R_o y' + p_o * c + b_o), y = o * h(c)

    where ' marks the token before. The gates read the last output: T tokens are T steps of a scan.

    Attributes:
      width: D, cells and the model's width.
      input_gate, forget_gate, output_gate: False sets i, f or o to 1 (NIG, NFG, NOG).
      input_activation, output_activation: g and h, "tanh" or "identity" (NIAF, NOAF).
      coupled: f = 1 - i (CIFG).
      peepholes: False drops p (NP).
      gate_recurrence: adds R_ig i' + R_fg f' + R_og o' to the sum inside of every gate g (FGR).
      forget_bias: b_f at initialisation; the other biases start at 0.
      init_std: standard deviation of all else; 0.1 is the paper's.
    """

    width: int
    input_gate: bool = True
    forget_gate: bool = True
    output_gate: bool = True
    input_activation: str = "tanh"
    output_activation: str = "tanh"
    coupled: bool = False
    peepholes: bool = True
    gate_recurrence: bool = False
    forget_bias: float = 1.0
    init_std: float = 0.1

    def __post_init__(self):
        check_choice("LSTM.input_activation", self.input_activation, ACTIVATIONS)
        check_choice("LSTM.output_activation", self.output_activation, ACTIVATIONS)
        if self.width < 1:
            raise ValueError(f"LSTM.width must be >= 1, got {self.width}")
        if self.coupled and not (self.input_gate and self.forget_gate):
            raise ValueError("LSTM.coupled=True makes f = 1 - i: input_gate and forget_gate must be True")
        if self.gate_recurrence and not self.gates:
            raise ValueError(
                "LSTM.gate_recurrence=True needs a gate: set input_gate, forget_gate or output_gate to True"
            )

    @property
    def gates(self) -> str:
        """Letters of the gates that have parameters, in order."""
        given = (("i", self.input_gate), ("f", self.forget_gate and not self.coupled), ("o", self.output_gate))
        return "".join(name for name, there in given if there)


@flax.struct.dataclass
class LSTMState:
    """Attributes: c, y, float32[B, D], cells and last output; gates, float32[B, G, D], last values of the G gates that
    have parameters, None without gate recurrence."""

    c: Any
    y: Any
    gates: Any = None


def _bias_init(config: LSTM):
    """[1 + G, D]: zeros but for the forget gate's."""

    def init(key, shape, dtype=jnp.float32):
        del key
        bias = jnp.zeros(shape, dtype)
        return bias.at[1 + config.gates.index("f")].set(config.forget_bias) if "f" in config.gates else bias

    return init


def param_specs(config: LSTM, width: int) -> Tree:
    """Specs, the second dimension being z and the G gates in the order i, f, o: input and recurrent [D, 1 + G, D], bias
    [1 + G, D]; peephole [G, D]; gate_recurrent [G, D, G, D] (from gate and cell, to gate and cell)."""
    if width != config.width:
        raise ValueError(f"LSTM.width={config.width} must be the width of the model, {width}")
    gates, normal = len(config.gates), jax.nn.initializers.normal(config.init_std)
    specs = {
        "input": Spec((width, 1 + gates, width), ("embed", "gate", "inner"), normal, inputs=1),
        "recurrent": Spec((width, 1 + gates, width), ("cell", "gate", "inner"), normal, inputs=1),
        "bias": Spec((1 + gates, width), ("gate", "inner"), _bias_init(config), tags=NO_DECAY),
    }
    if config.peepholes and gates:
        specs["peephole"] = Spec((gates, width), ("gate", "inner"), normal, tags=NO_DECAY)
    if config.gate_recurrence:
        shape, axes = (gates, width, gates, width), ("gate", "cell", "gate", "inner")
        specs["gate_recurrent"] = Spec(shape, axes, normal, inputs=2)
    return specs


def state_specs(config: LSTM, batch_size: int, max_length: int, dtype: DTypeLike) -> LSTMState:
    """Specs of the state, float32 whatever the compute dtype, independent of `max_length`."""
    del max_length, dtype
    cells = Spec((batch_size, config.width), ("batch", "inner"))
    gates = Spec((batch_size, len(config.gates), config.width), ("batch", "gate", "inner"))
    return LSTMState(c=cells, y=cells, gates=gates if config.gate_recurrence else None)


def _step(params: Tree, state: LSTMState, sums: jax.Array, config: LSTM) -> LSTMState:
    """One token: the state after it. `sums` [B, 1 + G, D] is W x + b."""
    sums = sums + linear(state.y, params["recurrent"], "bk,kgv->bgv")
    to_z, to_gates = sums[:, 0], sums[:, 1:]
    if config.gate_recurrence:
        to_gates = to_gates + linear(state.gates, params["gate_recurrent"], "bhk,hkgv->bgv")
    values = []

    def gate(name: str, cells: jax.Array) -> jax.Array | float:
        if name not in config.gates:
            return 1.0
        at = config.gates.index(name)
        a = to_gates[:, at]
        if config.peepholes:
            a = a + cells * params["peephole"][at].astype(jnp.float32)
        values.append(jax.nn.sigmoid(a))
        return values[-1]

    i = gate("i", state.c)
    f = 1.0 - i if config.coupled else gate("f", state.c)
    c = i * ACTIVATIONS[config.input_activation](to_z) + f * state.c
    o = gate("o", c)  # sees the new cells
    y = o * ACTIVATIONS[config.output_activation](c)
    return LSTMState(c=c, y=y, gates=jnp.stack(values, axis=1) if config.gate_recurrence else None)


def _rows(condition: jax.Array, like: jax.Array) -> jax.Array:
    """[B] with the rank of `like`."""
    return condition.reshape(-1, *(1,) * (like.ndim - 1))


def mix(
    params: Tree,
    x: jax.Array,
    ctx: SeqContext,
    state: LSTMState | None = None,
    *,
    config: LSTM,
    implementation: str | None = None,
) -> tuple[jax.Array, LSTMState]:
    """The LSTM layer: T sequential steps, whatever the platform.

    Args:
      params: tree of `param_specs`.
      x: [B, T, D], T >= 1.
      ctx: positions, documents, padding.
      state: state after the preceding tokens, None at the start.
      config: the variant.
      implementation: names no choice here: there is one form.

    Returns:
      y [B, T, D] in x.dtype, and the state after the last token.
    """
    del implementation
    valid, reset = ctx.valid, ctx.reset
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)
    sums = linear(x, params["input"], "btd,dgv->btgv").astype(jnp.float32) + params["bias"].astype(jnp.float32)
    sums = constrain(sums, "batch", "time", None, "inner")
    first = fresh(state_specs(config, x.shape[0], x.shape[1], x.dtype)) if state is None else state

    def step(old: LSTMState, token):
        sums, reset, valid = token
        if reset is not None:
            old = jax.tree.map(lambda a: jnp.where(_rows(reset, a), 0.0, a), old)
        new = _step(params, old, sums, config)
        if valid is not None:
            new = jax.tree.map(lambda a, b: jnp.where(_rows(valid, a), a, b), new, old)
        return new, new.y

    by_time = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (sums, reset, valid))
    last, y = jax.lax.scan(step, first, by_time)
    y = constrain(jnp.swapaxes(y, 0, 1).astype(x.dtype), "batch", "time", "inner")
    if valid is not None:
        y = jnp.where(valid[..., None], y, 0)
    return y, last


def flops_per_token(config: LSTM, width: int, length: int) -> float:
    """Matrices at two per multiply-add, and 4 per cell for the cells' sum and product, 3 per gate and cell."""
    del length
    gates = len(config.gates)
    matrices = 2 * (1 + gates) + (gates**2 if config.gate_recurrence else 0)
    return 2.0 * width**2 * matrices + (4.0 + 3.0 * gates) * width


register(
    MixerType(
        "lstm",
        LSTM,
        param_specs,
        state_specs,
        mix,
        flops_per_token,
        examples=(LSTM(width=16, gate_recurrence=True),),  # the largest; tests of their own show the other variants
    )
)

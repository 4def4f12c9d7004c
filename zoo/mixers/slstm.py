"""The sLSTM of xLSTM (arXiv:2405.04517, section 2.2): scalar memories with exponential gates that mix within a head."""

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
from zoo.core.sharding import constrain
from zoo.layers import norm
from zoo.layers.norm import NO_DECAY, Norm
from zoo.mixers.contract import MixerType, register
from zoo.mixers.mlstm_block import conv_init

NEVER = -1e30  # an exponent whose exponential is 0
GATES = ("i", "f", "z", "o")


@dataclasses.dataclass(frozen=True)
class SLSTM:
    """With every W and R block-diagonal over the heads and c_x = silu(conv(x)):

      i, f, z, o = [W_i c_x, W_f c_x, W_z x, W_o x] + R h_{t-1} + b
      m_t = max(log sigmoid(f) + m_{t-1}, i), of a document's first token m_t = i
      a = exp(log sigmoid(f) + m_{t-1} - m_t), b = exp(i - m_t)
      c_t = a c_{t-1} + b tanh(z), n_t = a n_{t-1} + b
      h_t = sigmoid(o) c_t / n_t, y = norm(h) per head.

    The gates read the last output, so no parallel form exists: T tokens are T steps of a scan, forwards and backwards.

    Attributes:
      width: D, which must be the model's.
      heads: H, must divide D; a head's K = D / H cells see each other.
      conv_width: W, taps of the causal convolution.
      norm: normalisation of each head's h, with parameters of its own.
      forget_power: p; b_f of cell j of K at initialisation is 5 - 12 (j / (K - 1))^p. The paper's p is 0.3 in the first
        block and 1.6 in the last one.
      init_std: standard deviation of W. R starts at 0, and so do the other biases.
    """

    width: int
    heads: int = 4
    conv_width: int = 4
    norm: Norm = Norm("layer", 1e-5)
    forget_power: float = 0.3
    init_std: float = 0.02

    def __post_init__(self):
        if self.conv_width < 2:
            raise ValueError(f"SLSTM.conv_width must be >= 2, got {self.conv_width}")
        if self.forget_power <= 0:
            raise ValueError(f"SLSTM.forget_power must be > 0, got {self.forget_power}")
        if self.heads < 1 or self.width % self.heads:
            divisors = [n for n in range(1, self.width + 1) if self.width % n == 0]
            near = min(divisors, key=lambda n: abs(n - self.heads), default=1)
            raise ValueError(f"SLSTM.heads={self.heads} must divide width={self.width}; the nearest is {near}")

    @property
    def head_width(self) -> int:
        """K."""
        return self.width // self.heads


@flax.struct.dataclass
class SLSTMState:
    """Attributes: conv, float32[B, W-1, D], last inputs of the convolution; h, c, n, m, float32[B, H, K]: last output,
    memory, normaliser (at least 1 once a token was seen, 0 before) and stabiliser of every cell."""

    conv: Any
    h: Any
    c: Any
    n: Any
    m: Any


def _bias_init(forget_power: float):
    """[4, H, K]: zeros but for the forget gate's."""

    def init(key, shape, dtype=jnp.float32):
        del key
        cell = jnp.arange(shape[-1], dtype=dtype) / max(shape[-1] - 1, 1)
        return jnp.zeros(shape, dtype).at[GATES.index("f")].set(5 - 12 * cell**forget_power)

    return init


def param_specs(config: SLSTM, width: int) -> Tree:
    """Specs: conv [W, D], conv_bias [D], conv_gates [K, H, 2, K] (inputs of a head, heads, i and f, outputs), gates
    [K, H, 2, K] (z and o), recurrent [K, H, 4, K], bias [4, H, K] (i, f, z, o), norm [H, K].

    Checkpoints of the paper's code call the matrix of i `fgate` and that of f `igate`."""
    if width != config.width:
        raise ValueError(f"SLSTM.width={config.width} must be the width of the model, {width}")
    heads, key, taps = config.heads, config.head_width, config.conv_width
    axes = ("key", "heads", "gate", "value")
    of_input = Spec((key, heads, 2, key), axes, jax.nn.initializers.normal(config.init_std), inputs=1)
    bias_init = _bias_init(config.forget_power)
    specs = {
        "conv": Spec((taps, width), ("conv", "inner"), conv_init),
        "conv_bias": Spec((width,), ("inner",), tags=NO_DECAY),
        "conv_gates": of_input,
        "gates": of_input,
        "recurrent": Spec((key, heads, 4, key), axes, jax.nn.initializers.zeros, inputs=1),
        "bias": Spec((4, heads, key), ("gate", "heads", "value"), bias_init, tags=NO_DECAY),
    }
    if head_norm := norm.param_specs(config.norm, (heads, key), ("heads", "value")):
        specs["norm"] = head_norm
    return specs


def state_specs(config: SLSTM, batch_size: int, max_length: int, dtype: DTypeLike) -> SLSTMState:
    """Specs of the state, float32 whatever the compute dtype, independent of `max_length`."""
    del max_length, dtype
    cells = Spec((batch_size, config.heads, config.head_width), ("batch", "heads", "value"))
    conv = Spec((batch_size, config.conv_width - 1, config.width), ("batch", "conv", "inner"))
    return SLSTMState(conv=conv, h=cells, c=cells, n=cells, m=cells)


def _step(params: Tree, cells, token):
    """One token: ((h, c, n, m), (gates of the input, reset, valid)) -> new cells."""
    gates, reset, valid = token
    if reset is not None:
        cells = tuple(jnp.where(reset[:, None, None], 0.0, s) for s in cells)
    h, c, n, m = cells
    i, f, z, o = jnp.moveaxis(gates + linear(h, params["recurrent"], "bhk,khgv->bghv"), 1, 0)
    # n is 0 before the first token: without this, exp(i - m) could vanish there, and c / n be 0 / 0.
    kept = jnp.where(n > 0, jax.nn.log_sigmoid(f) + m, NEVER)
    new_m = jnp.maximum(kept, i)
    forget, write = jnp.exp(kept - new_m), jnp.exp(i - new_m)
    new_c, new_n = forget * c + write * jnp.tanh(z), forget * n + write
    new = (jax.nn.sigmoid(o) * new_c / new_n, new_c, new_n, new_m)
    if valid is not None:
        new = tuple(jnp.where(valid[:, None, None], s, old) for s, old in zip(new, (h, c, n, m), strict=True))
    return new


def mix(
    params: Tree,
    x: jax.Array,
    ctx: SeqContext,
    state: SLSTMState | None = None,
    *,
    config: SLSTM,
    implementation: str | None = None,
) -> tuple[jax.Array, SLSTMState]:
    """The sLSTM layer: T sequential steps, whatever the platform.

    Args:
      params: tree of `param_specs`.
      x: [B, T, D], T >= 1.
      ctx: positions, documents, padding.
      state: state after the preceding tokens, None at the start.
      config: sizes.
      implementation: of `causal_conv1d`; None = the platform's.

    Returns:
      y [B, T, D] in x.dtype, and the state after the last token.
    """
    valid, reset = ctx.valid, ctx.reset
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)
    batch, length, width = x.shape
    heads, key = config.heads, config.head_width
    conv, *cells = (None,) * 5 if state is None else (state.conv, state.h, state.c, state.n, state.m)
    c_x, conv = causal_conv1d(
        x,
        params["conv"],
        params["conv_bias"],
        conv,
        reset=reset,
        valid=valid,
        activation="silu",
        implementation=implementation,
    )

    def of_input(a: jax.Array, name: str) -> jax.Array:
        return linear(a.reshape(batch, length, heads, key), params[name], "bthk,khgv->btghv").astype(jnp.float32)

    gates = jnp.concatenate([of_input(c_x, "conv_gates"), of_input(x, "gates")], axis=2)
    gates = constrain(gates + params["bias"].astype(jnp.float32), "batch", "time", None, "heads", "value")
    if state is None:
        cells = [jnp.zeros((batch, heads, key), jnp.float32)] * 4

    def step(cells, token):
        new = _step(params, cells, token)
        return new, new[0]

    by_time = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (gates, reset, valid))
    (h, c, n, m), y = jax.lax.scan(step, tuple(cells), by_time)
    y = norm.apply(params.get("norm", {}), jnp.swapaxes(y, 0, 1), config=config.norm)
    y = constrain(y.astype(x.dtype), "batch", "time", "heads", "value").reshape(batch, length, width)
    if valid is not None:
        y = jnp.where(valid[..., None], y, 0)
    return y, SLSTMState(conv=conv, h=h, c=c, n=n, m=m)


def flops_per_token(config: SLSTM, width: int, length: int) -> float:
    """Matrices and convolution at two per multiply-add, and 8 per cell for decay, sums, products and the quotient."""
    del length
    return 2.0 * width * (8 * config.head_width + config.conv_width) + 8.0 * width


register(
    MixerType(
        "slstm",
        SLSTM,
        param_specs,
        state_specs,
        mix,
        flops_per_token,
        examples=(SLSTM(width=16, heads=2, norm=Norm("layer", 0.2)),),
    )
)

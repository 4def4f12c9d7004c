"""The mLSTM block of the first xLSTM (arXiv:2405.04517, figure 11): the cell between an up- and a down-projection."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.mlstm import State, mlstm
from zoo.core.context import SeqContext
from zoo.core.linear import linear
from zoo.core.params import Spec, Tree
from zoo.core.sharding import constrain
from zoo.layers import norm
from zoo.layers.norm import NO_DECAY, Norm
from zoo.mixers.contract import MixerType, register
from zoo.mixers.mlstm import cell_flops, forget_bias_init

INPUT_GATE_BIAS_STD = 0.1


@dataclasses.dataclass(frozen=True)
class MLSTMBlock:
    """[u, z] = W_in x; c = silu(conv(u)); q = B_q c, k = B_k c, v = B_v u, each B block-diagonal;
    i, f = W_g [q, k, v] + b_g, one of each per head; h = norm(mlstm(q, k, v, i, f)) + skip * c;
    y = W_out (h * silu(z)). No feed-forward layer follows.

    Attributes:
      inner: Di, the width between the projections (2 D in the paper).
      heads: H, of the cell; keys and values of a head are Di / H wide.
      block: size of the blocks of B_q, B_k and B_v.
      conv_width: W, taps of the causal convolution.
      norm: normalisation of each head's output, with parameters of its own.
      cell_eps: added to the cell's denominator.
      init_std, out_init_std: standard deviations of W_in and the blocks, and of W_out. Gate weights start at 0, the
        input gate's bias near 0 and the forget gate's at 3 to 6, evenly over the heads.
    """

    inner: int
    heads: int = 4
    block: int = 4
    conv_width: int = 4
    norm: Norm = Norm("layer", 1e-5)
    cell_eps: float = 1e-6
    init_std: float = 0.02
    out_init_std: float = 0.02

    def __post_init__(self):
        if self.conv_width < 2:
            raise ValueError(f"MLSTMBlock.conv_width must be >= 2, got {self.conv_width}")
        for field in ("heads", "block"):
            size = getattr(self, field)
            if size < 1 or self.inner % size:
                divisors = [n for n in range(1, self.inner + 1) if self.inner % n == 0]
                near = min(divisors, key=lambda n: abs(n - size), default=1)
                raise ValueError(f"MLSTMBlock.{field}={size} must divide inner={self.inner}; the nearest is {near}")


@flax.struct.dataclass
class MLSTMBlockState:
    """Attributes: conv, float32[B, W-1, Di], last inputs of the convolution; C, float32[B, H, K, V], n,
    float32[B, H, K], and m, float32[B, H], those of the cell with K = V = Di / H."""

    conv: Any
    C: Any
    n: Any
    m: Any


def conv_init(key, shape, dtype=jnp.float32):
    """Uniform in +-1/sqrt(W) for filters [W, channels]."""
    return jax.random.uniform(key, shape, dtype, -(shape[0] ** -0.5), shape[0] ** -0.5)


def _gate_bias_init(key, shape, dtype=jnp.float32):
    """[2, H]: the input gate's, normal around 0, and the forget gate's."""
    near_zero = INPUT_GATE_BIAS_STD * jax.random.normal(key, shape[1:], dtype)
    return jnp.stack([near_zero, forget_bias_init(None, shape[1:], dtype)])


def param_specs(config: MLSTMBlock, width: int) -> Tree:
    """Specs: in_proj [D, 2, Di] (u, z), conv [W, Di], conv_bias [Di], q, k and v [block, Di / block, block] (inputs,
    blocks, outputs), gates [3, Di, 2, H] (of q, k, v; to i, f), gates_bias [2, H], norm [H, V], skip [Di], out_proj
    [Di, D]."""
    inner, taps, heads, block = config.inner, config.conv_width, config.heads, config.block
    normal = jax.nn.initializers.normal(config.init_std)
    blocks = Spec((block, inner // block, block), ("block_in", "inner", "block_out"), normal, inputs=1)
    out_init = jax.nn.initializers.normal(config.out_init_std)
    specs = {
        "in_proj": Spec((width, 2, inner), ("embed", "branch", "inner"), normal, inputs=1),
        "conv": Spec((taps, inner), ("conv", "inner"), conv_init),
        "conv_bias": Spec((inner,), ("inner",), tags=NO_DECAY),
        "q": blocks,
        "k": blocks,
        "v": blocks,
        "gates": Spec((3, inner, 2, heads), ("branch", "inner", "gate", "heads"), jax.nn.initializers.zeros, inputs=2),
        "gates_bias": Spec((2, heads), ("gate", "heads"), _gate_bias_init, tags=NO_DECAY),
        "skip": Spec((inner,), ("inner",), jax.nn.initializers.ones, tags=NO_DECAY),
        "out_proj": Spec((inner, width), ("inner", "embed"), out_init, inputs=1),
    }
    if head_norm := norm.param_specs(config.norm, (heads, inner // heads), ("heads", "value")):
        specs["norm"] = head_norm
    return specs


def state_specs(config: MLSTMBlock, batch_size: int, max_length: int, dtype: DTypeLike) -> MLSTMBlockState:
    """Specs of the state, float32 whatever the compute dtype, independent of `max_length`."""
    del max_length, dtype
    heads, value = config.heads, config.inner // config.heads
    return MLSTMBlockState(
        conv=Spec((batch_size, config.conv_width - 1, config.inner), ("batch", "conv", "inner")),
        C=Spec((batch_size, heads, value, value), ("batch", "heads", "key", "value")),
        n=Spec((batch_size, heads, value), ("batch", "heads", "key")),
        m=Spec((batch_size, heads), ("batch", "heads")),
    )


def _gates(params: Tree, qkv: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Pre-activations of the input and the forget gate, float32 [B, T, H], of q, k and v [B, T, Di]."""
    # In float32 throughout: the cell takes the exponential, so an error here is a relative error of a weight.
    stacked = jnp.stack(qkv, axis=2).astype(jnp.float32)
    gates = linear(stacked, params["gates"], "btci,cigh->btgh") + params["gates_bias"].astype(jnp.float32)
    return gates[:, :, 0], gates[:, :, 1]


def mix(
    params: Tree,
    x: jax.Array,
    ctx: SeqContext,
    state: MLSTMBlockState | None = None,
    *,
    config: MLSTMBlock,
    implementation: str | None = None,
) -> tuple[jax.Array, MLSTMBlockState]:
    """The mLSTM block.

    Args:
      params: tree of `param_specs`.
      x: [B, T, D], T >= 1.
      ctx: positions, documents, padding.
      state: state after the preceding tokens, None at the start.
      config: sizes.
      implementation: of `causal_conv1d` and `mlstm`; None = the platform's.

    Returns:
      y [B, T, D] in x.dtype, and the state after the last token.
    """
    valid, reset = ctx.valid, ctx.reset
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)
    tokens, inner = x.shape[:2], config.inner
    uz = linear(x, params["in_proj"], "btd,dci->btci")
    u, z = constrain(uz[:, :, 0], "batch", "time", "inner"), constrain(uz[:, :, 1], "batch", "time", "inner")
    c, conv_state = causal_conv1d(
        u,
        params["conv"],
        params["conv_bias"],
        None if state is None else state.conv,
        reset=reset,
        valid=valid,
        activation="silu",
        implementation=implementation,
    )

    def blockwise(a: jax.Array, name: str) -> jax.Array:
        blocks = a.reshape(*tokens, inner // config.block, config.block)
        return linear(blocks, params[name], "btgi,igj->btgj").reshape(*tokens, inner)

    qkv = [blockwise(c, "q"), blockwise(c, "k"), blockwise(u, "v")]
    i, f = _gates(params, qkv)
    q, k, v = (a.reshape(*tokens, config.heads, inner // config.heads) for a in qkv)
    h, (C, n, m) = mlstm(
        q,
        k,
        v,
        i,
        f,
        None if state is None else State(state.C, state.n, state.m),
        eps=config.cell_eps,
        reset=reset,
        valid=valid,
        implementation=implementation,
    )
    h = norm.apply(params.get("norm", {}), h, config=config.norm).reshape(*tokens, inner)
    h = (h + params["skip"].astype(c.dtype) * c) * jax.nn.silu(z)
    y = linear(constrain(h, "batch", "time", "inner"), params["out_proj"], "bti,id->btd")
    if valid is not None:
        y = jnp.where(valid[..., None], y, 0)
    return y, MLSTMBlockState(conv=conv_state, C=C, n=n, m=m)


def flops_per_token(config: MLSTMBlock, width: int, length: int) -> float:
    """Matrices and convolution at two per multiply-add, and the cell as a recurrence."""
    del length
    inner, heads = config.inner, config.heads
    matrices = 3 * width * inner + 3 * inner * config.block + 3 * inner * 2 * heads + config.conv_width * inner
    return 2.0 * matrices + cell_flops(heads, inner // heads, inner // heads)


register(
    MixerType(
        "mlstm_block",
        MLSTMBlock,
        param_specs,
        state_specs,
        mix,
        flops_per_token,
        # Both epsilons so large that a wrong place of either shows.
        examples=(MLSTMBlock(inner=24, heads=2, conv_width=3, cell_eps=0.1, norm=Norm("layer", 0.2)),),
    )
)

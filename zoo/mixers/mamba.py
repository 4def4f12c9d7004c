"""Mamba's selective state-space mixer, S6 (arXiv:2312.00752, section 3 and algorithm 2), with one or several heads."""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.selective_scan import selective_scan
from zoo.core.context import SeqContext
from zoo.core.linear import linear, materialise
from zoo.core.params import Spec, Tree
from zoo.core.sharding import constrain
from zoo.layers.norm import NO_DECAY
from zoo.mixers.contract import MixerType, register


@dataclasses.dataclass(frozen=True)
class Mamba:
    """[u, z] = W_in x; u = silu(conv(u)); [r, B, C] = W_x u; dt = softplus(W_dt r + b_dt);
    h_t = exp(dt A) h_{t-1} + dt u B; y = W_out ((C h + D u) * silu(z)).

    Attributes:
      inner: Di, channels of the recurrence (2 D in the paper).
      state: N, states per channel.
      conv_width: W, taps of the causal convolution.
      dt_rank: r; None = ceil(D / 16).
      heads: H groups of Di / H neighbouring channels, each with W_x and W_dt of its own (Zamba, arXiv:2405.16712): then
        r, B and C of a group depend on its channels alone. None = one group, the paper's.
      conv_bias: bias of the convolution.
      bias: biases on the input and output projections.
      dt_min, dt_max: dt at initialisation is log-uniform between them.
      init_std, out_init_std: standard deviations; None = uniform(+-1/sqrt(fan in)).
    """

    inner: int
    state: int = 16
    conv_width: int = 4
    dt_rank: int | None = None
    heads: int | None = None
    conv_bias: bool = True
    bias: bool = False
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    init_std: float | None = None
    out_init_std: float | None = None

    def __post_init__(self):
        if self.conv_width < 2:
            raise ValueError(f"Mamba.conv_width must be >= 2, got {self.conv_width}")
        if self.heads is not None and (self.heads < 1 or self.inner % self.heads):
            divisors = [h for h in range(1, self.inner + 1) if self.inner % h == 0]
            raise ValueError(f"Mamba.heads={self.heads} must divide inner={self.inner}: None or one of {divisors}")

    def rank(self, width: int) -> int:
        """r of this mixer at model width D."""
        return self.dt_rank if self.dt_rank is not None else math.ceil(width / 16)


@flax.struct.dataclass
class MambaState:
    """Attributes: conv, float32[B, W-1, Di], last inputs of the convolution; ssm, float32[B, Di, N]."""

    conv: Any
    ssm: Any


def uniform(bound: float):
    """Initialiser: uniform in +-bound."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _matrix_init(std: float | None, fan_in: int):
    return uniform(fan_in**-0.5) if std is None else jax.nn.initializers.normal(std)


def dt_bias_init(low: float, high: float, floor: float = 1e-4):
    """Initialiser: b with softplus(b) log-uniform in [low, high], and at least `floor`."""

    def init(key, shape, dtype=jnp.float32):
        u = jax.random.uniform(key, shape, jnp.float32)
        dt = jnp.maximum(jnp.exp(u * (math.log(high) - math.log(low)) + math.log(low)), floor)
        return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)

    return init


def _a_log_init(key, shape, dtype=jnp.float32):
    """log(1..N) for every channel (S4D-real)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)), shape).astype(dtype)


def param_specs(config: Mamba, width: int) -> Tree:
    """Specs: in_proj [D, 2, Di] (u, z), conv [W, Di], x_proj [Di, r + 2N] (dt, B, C), dt_proj [r, Di], dt_bias [Di],
    A_log [Di, N], D [Di], out_proj [Di, D], biases. With heads Di is H, P = Di / H in dt_proj [r, H, P], dt_bias, A_log
    and D, and x_proj is [P, H, r + 2N]."""
    inner, states, rank, taps = config.inner, config.state, config.rank(width), config.conv_width
    into = _matrix_init(config.init_std, width)
    channels, names, each = (inner,), ("inner",), ()
    if config.heads is not None:
        channels, names, each = (config.heads, inner // config.heads), ("mamba_heads", "inner"), (config.heads,)
    reads = Spec(
        (channels[-1], *each, rank + 2 * states),
        ("inner", *names[: len(each)], "ssm"),
        _matrix_init(config.init_std, channels[-1]),
        inputs=1,
    )
    specs = {
        "in_proj": Spec((width, 2, inner), ("embed", "branch", "inner"), into, inputs=1),
        "conv": Spec((taps, inner), ("conv", "inner"), uniform(taps**-0.5)),
        "x_proj": reads,
        "dt_proj": Spec((rank, *channels), ("dt_rank", *names), uniform(rank**-0.5), inputs=1),
        "dt_bias": Spec(channels, names, dt_bias_init(config.dt_min, config.dt_max), tags=NO_DECAY),
        "A_log": Spec((*channels, states), (*names, "state"), _a_log_init, tags=NO_DECAY),
        "D": Spec(channels, names, jax.nn.initializers.ones, tags=NO_DECAY),
        "out_proj": Spec((inner, width), ("inner", "embed"), _matrix_init(config.out_init_std, inner), inputs=1),
    }
    if config.conv_bias:
        specs["conv_bias"] = Spec((inner,), ("inner",), tags=NO_DECAY)
    if config.bias:
        specs["in_bias"] = Spec((2, inner), ("branch", "inner"), tags=NO_DECAY)
        specs["out_bias"] = Spec((width,), ("embed",), tags=NO_DECAY)
    return specs


def state_specs(config: Mamba, batch_size: int, max_length: int, dtype: DTypeLike) -> MambaState:
    """Specs of the state, float32 whatever the compute dtype, independent of `max_length`."""
    del max_length, dtype
    return MambaState(
        conv=Spec((batch_size, config.conv_width - 1, config.inner), ("batch", "conv", "inner")),
        ssm=Spec((batch_size, config.inner, config.state), ("batch", "inner", "state")),
    )


def _recurrence(params: Tree, u, z, ctx: SeqContext, state, *, config: Mamba, rank: int, implementation):
    """(C h + D u) * silu(z) [B, T, P] and the new h of one head's channels."""
    dbc = linear(u, params["x_proj"], "bti,ip->btp")
    dt_low, b, c = jnp.split(dbc, [rank, rank + config.state], axis=-1)
    dt = linear(dt_low, params["dt_proj"], "btr,ri->bti")
    return selective_scan(
        u,
        dt,
        -jnp.exp(params["A_log"].astype(jnp.float32)),
        b,
        c,
        params["D"],
        z,
        params["dt_bias"],
        state,
        dt_softplus=True,
        reset=ctx.reset,
        valid=ctx.valid,
        implementation=implementation,
    )


# The dimension of the heads in the leaves that have one.
_HEAD_AXIS = {"x_proj": 1, "dt_proj": 1, "dt_bias": 0, "A_log": 0, "D": 0}


def _heads(params: Tree, u, z, ctx: SeqContext, state, *, config: Mamba, rank: int, implementation):
    """`_recurrence` of every head, side by side."""
    options = {"config": config, "rank": rank, "implementation": implementation}
    if config.heads is None:
        return _recurrence(params, u, z, ctx, state, **options)
    outputs = []
    for head, (u_head, z_head) in enumerate(zip(*(jnp.split(v, config.heads, axis=-1) for v in (u, z)), strict=True)):
        own = {name: jnp.take(materialise(params[name]), head, axis) for name, axis in _HEAD_AXIS.items()}
        carried = None if state is None else jnp.split(state, config.heads, axis=1)[head]
        outputs.append(_recurrence(own, u_head, z_head, ctx, carried, **options))
    ys, states = zip(*outputs, strict=True)
    return jnp.concatenate(ys, axis=-1), jnp.concatenate(states, axis=1)


def mix(
    params: Tree,
    x: jax.Array,
    ctx: SeqContext,
    state: MambaState | None = None,
    *,
    config: Mamba,
    implementation: str | None = None,
) -> tuple[jax.Array, MambaState]:
    """The Mamba mixer.

    Args:
      params: tree of `param_specs`.
      x: [B, T, D], T >= 1.
      ctx: positions, documents, padding.
      state: state after the preceding tokens, None at the start.
      config: sizes.
      implementation: of `causal_conv1d` and `selective_scan`; None = the platform's.

    Returns:
      y [B, T, D] in x.dtype, and the state after the last token.
    """
    width, valid = x.shape[-1], ctx.valid
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)
    uz = linear(x, params["in_proj"], "btd,dci->btci")
    if config.bias:
        uz = uz + params["in_bias"].astype(uz.dtype)
    u, z = uz[:, :, 0], uz[:, :, 1]
    u, z = constrain(u, "batch", "time", "inner"), constrain(z, "batch", "time", "inner")
    u, conv_state = causal_conv1d(
        u,
        params["conv"],
        params.get("conv_bias"),
        None if state is None else state.conv,
        reset=ctx.reset,
        valid=valid,
        activation="silu",
        implementation=implementation,
    )
    carried = None if state is None else state.ssm
    options = {"config": config, "rank": config.rank(width), "implementation": implementation}
    y, ssm_state = _heads(params, u, z, ctx, carried, **options)
    y = constrain(y, "batch", "time", "inner")
    y = linear(y, params["out_proj"], "bti,id->btd")
    if config.bias:
        y = y + params["out_bias"].astype(y.dtype)
    if valid is not None:
        y = jnp.where(valid[..., None], y, 0)
    return y, MambaState(conv=conv_state, ssm=ssm_state)


def flops_per_token(config: Mamba, width: int, length: int) -> float:
    """Projections at two per multiply-add, convolution, and 7 per state element for discretise, update and read."""
    del length
    inner, states, rank = config.inner, config.state, config.rank(width)  # heads split both, and cost the same
    matrices = width * 2 * inner + inner * (rank + 2 * states) + rank * inner + inner * width
    return 2.0 * matrices + 2.0 * config.conv_width * inner + 7.0 * inner * states


register(
    MixerType(
        "mamba",
        Mamba,
        param_specs,
        state_specs,
        mix,
        flops_per_token,
        examples=(
            Mamba(inner=32, state=4),
            Mamba(inner=24, state=5, conv_width=3, dt_rank=3, heads=2, conv_bias=False, bias=True),
        ),
    )
)

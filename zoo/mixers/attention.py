"""Softmax attention: multi-head, grouped-query and multi-query, with rotary positions, windows and a ring state.

References: arXiv:1706.03762 (attention), arXiv:2305.13245 (grouped queries), arXiv:2310.06825 (sliding window).
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.attention import attention as attention_op
from pallas_kernels.attention import merge
from zoo.core.context import SeqContext
from zoo.core.linear import linear
from zoo.core.params import Spec, Tree
from zoo.core.registry import check_choice
from zoo.core.sharding import constrain
from zoo.layers import norm, rotary
from zoo.layers.norm import NO_DECAY, Norm
from zoo.layers.rotary import Rotary
from zoo.mixers.contract import MixerType, register


@dataclasses.dataclass(frozen=True)
class QKNorm:
    """Normalisation of queries and keys before the rotary embedding.

    Attributes:
      norm: the normalisation.
      over: "head", statistics per head and one scale of width K for all (Qwen3); "per_head", statistics per head and a
        scale for each (StableLM 2); "full", statistics over all heads together (OLMo 2).
    """

    norm: Norm
    over: str = "head"

    def __post_init__(self):
        check_choice("QKNorm.over", self.over, ("head", "per_head", "full"))


@dataclasses.dataclass(frozen=True)
class Attention:
    """Softmax attention.

    Attributes:
      heads: H query heads.
      kv_heads: G key/value heads; must divide H. G = H is multi-head, G = 1 multi-query.
      head_width: K (and V).
      window: keys visible to a query, itself included; None = all preceding.
      rotary: rotary embedding, None = no positions.
      scale: multiplier of q.k; None = K^-1/2.
      soft_cap: s = soft_cap tanh(s / soft_cap) on the scores.
      qk_norm: normalisation of queries and keys.
      clip_qkv: clamps q, k and v to +-clip_qkv (OLMo).
      qkv_bias, out_bias: biases.
      init_std, out_init_std: standard deviations of the projections.
      causal: whether a token does not see those after it; otherwise a layer takes neither state nor window.
    """

    heads: int
    kv_heads: int
    head_width: int
    window: int | None = None
    rotary: Rotary | None = Rotary()
    scale: float | None = None
    soft_cap: float | None = None
    qk_norm: QKNorm | None = None
    clip_qkv: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    init_std: float = 0.02
    out_init_std: float = 0.02
    causal: bool = True

    def __post_init__(self):
        if not self.causal and self.window is not None:
            raise ValueError(f"Attention.window={self.window} needs causal=True: a window reaches back, not ahead")
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            divisors = [g for g in range(1, self.heads + 1) if self.heads % g == 0]
            raise ValueError(f"Attention.kv_heads={self.kv_heads} must divide heads={self.heads}: one of {divisors}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"Attention.window must be None or >= 1, got {self.window}")


@flax.struct.dataclass
class AttentionState:
    """Keys and values seen so far, in S slots; position p lives in slot p mod S.

    S is the window, or the state's capacity where there is no window. Masks come from the stored positions, never from
    slot order.

    Attributes: k [B, S, G, K] (after the rotary embedding); v [B, S, G, V]; positions int32[B, S], -1 = empty.
    """

    k: Any
    v: Any
    positions: Any


def param_specs(config: Attention, width: int) -> Tree:
    """Specs: q [D, H, K], k and v [D, G, K], o [H, K, D], biases, q_norm and k_norm."""
    heads, groups, head = config.heads, config.kv_heads, config.head_width
    normal = jax.nn.initializers.normal
    into = normal(config.init_std)
    specs: dict[str, Any] = {
        "q": Spec((width, heads, head), ("embed", "heads", "key"), into, inputs=1),
        "k": Spec((width, groups, head), ("embed", "kv_heads", "key"), into, inputs=1),
        "v": Spec((width, groups, head), ("embed", "kv_heads", "value"), into, inputs=1),
        "o": Spec((heads, head, width), ("heads", "value", "embed"), normal(config.out_init_std), inputs=2),
    }
    if config.qkv_bias:
        for name in ("q", "k", "v"):
            specs[f"{name}_bias"] = Spec(specs[name].shape[1:], specs[name].axes[1:], tags=NO_DECAY)
    if config.out_bias:
        specs["o_bias"] = Spec((width,), ("embed",), tags=NO_DECAY)
    if config.qk_norm is not None:
        for name in ("q", "k"):
            out = specs[name]
            skip = 2 if config.qk_norm.over == "head" else 1
            specs[f"{name}_norm"] = norm.param_specs(config.qk_norm.norm, out.shape[skip:], out.axes[skip:])
    return specs


def state_specs(config: Attention, batch_size: int, max_length: int, dtype: DTypeLike) -> AttentionState:
    """Specs of the ring: `window` slots, or `max_length` where there is no window."""
    slots = max_length if config.window is None else config.window
    shape = (batch_size, slots, config.kv_heads, config.head_width)
    empty = jax.nn.initializers.constant(-1, jnp.int32)
    return AttentionState(
        k=Spec(shape, ("batch", "slot", "kv_heads", "key"), dtype=dtype),
        v=Spec(shape, ("batch", "slot", "kv_heads", "value"), dtype=dtype),
        positions=Spec((batch_size, slots), ("batch", "slot"), empty, dtype=jnp.int32),
    )


def _empty(config: Attention, k: jax.Array) -> AttentionState:
    batch, length = k.shape[:2]
    slots = length if config.window is None else config.window
    shape = (batch, slots, *k.shape[2:])
    zeros = jnp.zeros(shape, k.dtype)
    return AttentionState(k=zeros, v=zeros, positions=jnp.full((batch, slots), -1, jnp.int32))


def append(state: AttentionState, k: jax.Array, v: jax.Array, ctx: SeqContext) -> AttentionState:
    """Writes the last document's tokens into the ring; the oldest ones give way.

    Args:
      state: the ring, S slots.
      k, v: [B, T, G, K], any T.
      ctx: of these T tokens.

    Returns:
      The ring after them: a new document empties it first, padding leaves it alone.
    """
    slots = state.positions.shape[1]
    documents = ctx.documents
    if documents is None:
        k, v, positions = k[:, -slots:], v[:, -slots:], ctx.positions[:, -slots:]
        index, kept = positions % slots, state.positions
    else:
        positions = ctx.positions
        current = jnp.max(documents, axis=1, keepdims=True)
        inside = (documents == current) & (documents >= 0)
        last = jnp.max(jnp.where(inside, positions, -1), axis=1, keepdims=True)
        write = inside & (positions > last - slots)
        index = jnp.where(write, positions % slots, slots)  # the slot past the end is dropped
        kept = jnp.where(current > 0, -1, state.positions)
    row = jnp.arange(k.shape[0])[:, None]
    return AttentionState(
        k=state.k.at[row, index].set(k.astype(state.k.dtype), mode="drop"),
        v=state.v.at[row, index].set(v.astype(state.v.dtype), mode="drop"),
        positions=kept.at[row, index].set(positions, mode="drop"),
    )


def _attend(q, k, v, ctx, state, *, config, implementation):
    """Attention over the carried ring and the new tokens; returns (y, new ring)."""
    options = {
        "window": config.window,
        "scale": config.scale,
        "soft_cap": config.soft_cap,
        "implementation": implementation,
    }
    documents = ctx.documents
    if not config.causal:
        if state is not None:
            raise ValueError("Attention with causal=False sees a whole document at once: it cannot go on from a state")
        same = jnp.zeros(q.shape[:2], jnp.int32)  # what stands at one position sees each other
        positions = {"q_positions": same, "kv_positions": same}
        y = attention_op(q, k, v, q_documents=documents, kv_documents=documents, **positions, **options)
        return y, append(_empty(config, k), k, v, ctx)
    if state is None:
        y = attention_op(q, k, v, q_documents=documents, kv_documents=documents, **options)
        return y, append(_empty(config, k), k, v, ctx)

    new_state = append(state, k, v, ctx)
    # Once written, the ring alone answers when it still holds every key that a query needs.
    ring_suffices = q.shape[1] == 1 or (config.window is None and documents is None)
    ring = new_state if ring_suffices else state
    ring_k, ring_v = ring.k.astype(q.dtype), ring.v.astype(q.dtype)
    q_documents, ring_documents = documents, None
    if documents is not None:
        ring_documents = jnp.where(ring.positions >= 0, 0, -1)
        if ring_suffices:  # a reset has emptied the ring before the write: what it holds is this document
            q_documents = jnp.minimum(documents, 0)
    from_ring = {
        "q_positions": ctx.positions,
        "kv_positions": ring.positions,
        "q_documents": q_documents,
        "kv_documents": ring_documents,
        **options,
    }
    if ring_suffices:
        y = attention_op(q, ring_k, ring_v, **from_ring)
    else:
        old = attention_op(q, ring_k, ring_v, return_lse=True, **from_ring)
        new = attention_op(q, k, v, q_documents=documents, kv_documents=documents, return_lse=True, **options)
        y, _ = merge(*old, *new)
    if config.window is None:
        slots = state.positions.shape[1]
        overflow = ctx.positions >= slots
        if ctx.valid is not None:
            overflow &= ctx.valid
        # A full state cannot answer: NaN is loud, a silently shortened memory would not be.
        y = jnp.where(overflow.any(axis=1)[:, None, None, None], jnp.nan, y)
    return y, new_state


def mix(
    params: Tree,
    x: jax.Array,
    ctx: SeqContext,
    state: AttentionState | None = None,
    *,
    config: Attention,
    implementation: str | None = None,
) -> tuple[jax.Array, AttentionState]:
    """Attention within documents, to what came before or, without `causal`, in both directions.

    Args:
      params: tree of `param_specs`.
      x: [B, T, D], T >= 1.
      ctx: positions, documents, padding.
      state: ring of the preceding tokens, None at the start. Without a window a state of S slots holds positions
        0..S-1; a row that goes past them returns NaN.
      config: shape and options.
      implementation: of the attention op; None = the platform's.

    Returns:
      y [B, T, D] in x.dtype, and the ring after the last token.
    """
    valid = ctx.valid
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)

    def project(name: str, axis: str) -> jax.Array:
        y = linear(x, params[name], "btd,dhk->bthk")
        if config.qkv_bias:
            y = y + params[f"{name}_bias"].astype(y.dtype)
        if config.clip_qkv is not None:
            y = jnp.clip(y, -config.clip_qkv, config.clip_qkv)
        if config.qk_norm is not None and name != "v":
            over = (-2, -1) if config.qk_norm.over == "full" else -1
            y = norm.apply(params[f"{name}_norm"], y, config=config.qk_norm.norm, axis=over)
        if config.rotary is not None and name != "v":
            y = rotary.apply(y, ctx.positions, config=config.rotary)
        return constrain(y, "batch", "time", axis, None)

    q, k, v = project("q", "heads"), project("k", "kv_heads"), project("v", "kv_heads")
    y, new_state = _attend(q, k, v, ctx, state, config=config, implementation=implementation)
    y = linear(y, params["o"], "bthv,hvd->btd")
    if config.out_bias:
        y = y + params["o_bias"].astype(y.dtype)
    if valid is not None:
        y = jnp.where(valid[..., None], y, 0)
    return y, new_state


def flops_per_token(config: Attention, width: int, length: int) -> float:
    """Projections, and scores and values over the mean number of visible keys at `length`."""
    matrices = 2 * width * config.head_width * (config.heads + config.kv_heads)
    window = length if config.window is None else min(config.window, length)
    mean_keys = window - window * (window - 1) / (2 * length) if config.causal else length
    return 2.0 * matrices + 4.0 * config.heads * config.head_width * mean_keys


register(
    MixerType(
        "attention",
        Attention,
        param_specs,
        state_specs,
        mix,
        flops_per_token,
        examples=(
            Attention(heads=4, kv_heads=2, head_width=8),
            Attention(heads=3, kv_heads=1, head_width=8, window=5, qkv_bias=True, out_bias=True),
            Attention(
                heads=2,
                kv_heads=2,
                head_width=8,
                window=7,
                rotary=Rotary(style="interleaved", fraction=0.5),
                qk_norm=QKNorm(Norm("layer"), "per_head"),
                soft_cap=5.0,
                scale=0.3,
            ),
            Attention(heads=4, kv_heads=2, head_width=4, rotary=None, qk_norm=QKNorm(Norm(), "full"), clip_qkv=0.5),
            Attention(heads=2, kv_heads=1, head_width=8, window=1, qk_norm=QKNorm(Norm(), "head")),
        ),
    )
)

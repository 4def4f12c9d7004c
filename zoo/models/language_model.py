"""The one pattern-driven language model: embed -> residual sublayers -> norm -> head.

An architecture is a pattern of sublayers repeated `repeats` times. Repeats are stacked on a leading `layers` axis and
run by jax.lax.scan, so compile time grows with the pattern and not with the depth.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.core
import jax.numpy as jnp
from jax.typing import DTypeLike

from zoo.core.context import SeqContext, last_valid, next_positions
from zoo.core.linear import linear, materialise
from zoo.core.params import Spec, Tree, stack, unstack, update
from zoo.core.registry import check_choice
from zoo.core.sharding import constrain
from zoo.layers import bit_linear, norm
from zoo.layers.norm import Norm
from zoo.mixers.contract import mixer_of

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
LOGITS = ("all", "last", "none")


@dataclasses.dataclass(frozen=True)
class Sublayer:
    """One residual step: x + residual_scale * post_norm(mixer(norm(x))).

    Attributes:
      mixer: config of a registered mixer.
      norm: normalisation before the mixer, or None.
      post_norm: normalisation of the mixer's output, or None.
    """

    mixer: Any
    norm: Norm | None = Norm()
    post_norm: Norm | None = None


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """A decoder-only language model.

    Attributes:
      vocab_size: Z.
      width: D.
      pattern: the sublayers of one repeat.
      repeats: how often the pattern is repeated.
      final_norm: normalisation before the head, or None.
      tied: the head is the transposed embedding.
      head_bit_eps: not None makes the head a BitLinear (ternary weight, int8 input) with this epsilon in its norm.
      embedding_scale, residual_scale, logit_scale: multipliers of embedding, residual branches, logits.
      logit_soft_cap: logits = soft_cap tanh(logits / soft_cap).
      embedding_init_std, head_init_std: standard deviations at initialisation.
      max_length: context the model is meant for; a default for states, no limit for recurrent models.
      dtype: compute dtype. param_dtype: storage. residual_dtype: of the residual stream.
      remat: what the backward pass recomputes per repeat: "none", "dots" (all but matrix products), "full".
    """

    vocab_size: int
    width: int
    pattern: tuple[Sublayer, ...]
    repeats: int
    final_norm: Norm | None = Norm()
    tied: bool = True
    head_bit_eps: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    embedding_init_std: float = 0.02
    head_init_std: float = 0.02
    max_length: int = 4096
    dtype: str = "float32"
    param_dtype: str = "float32"
    residual_dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        check_choice("remat", self.remat, REMAT)
        for field in ("dtype", "param_dtype", "residual_dtype"):
            check_choice(field, getattr(self, field), ("float32", "bfloat16", "float16", "float64"))
        for field in ("vocab_size", "width", "repeats", "max_length"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be >= 1, got {getattr(self, field)}")
        if not self.pattern:
            raise ValueError("pattern must hold at least one Sublayer")
        if self.tied and self.head_bit_eps is not None:
            raise ValueError(f"head_bit_eps={self.head_bit_eps} needs tied=False: an embedding is not ternary")
        for sublayer in self.pattern:
            mixer_of(sublayer.mixer)

    def sublayers(self) -> dict[str, Sublayer]:
        """The pattern by name: "0_mamba", "1_mlp", ..."""
        return {f"{i}_{mixer_of(s.mixer).name}": s for i, s in enumerate(self.pattern)}


@flax.struct.dataclass
class LanguageModelState:
    """Attributes: next_position int32[B]; layers, states by sublayer name, each stacked over repeats."""

    next_position: Any
    layers: Any


@flax.struct.dataclass
class LanguageModelOutput:
    """Attributes: logits float32[B, T, Z] ([B, 1, Z] for "last", None for "none"); state after the last token; aux,
    {"hidden": [B, T, D] after the final norm}."""

    logits: Any
    state: Any
    aux: dict[str, Any]


def param_specs(config: LanguageModelConfig) -> Tree:
    """Specs: embedding [Z, D], layers/<sublayer>/{norm, mixer, post_norm} (stacked), final_norm, head [D, Z] (or
    head/{norm_scale, weight})."""
    width, dtype = config.width, config.param_dtype
    layer: dict[str, Any] = {}
    for name, sub in config.sublayers().items():
        layer[name] = {"mixer": mixer_of(sub.mixer).param_specs(sub.mixer, width)}
        for key, n in (("norm", sub.norm), ("post_norm", sub.post_norm)):
            if n is not None and (specs := norm.param_specs(n, (width,), ("embed",))):
                layer[name][key] = specs
    normal = jax.nn.initializers.normal
    specs = {
        "embedding": Spec(
            (config.vocab_size, width),
            ("vocab", "embed"),
            normal(config.embedding_init_std),
            tags=frozenset({"embedding"}),
        ),
        "layers": stack(layer, config.repeats),
    }
    if config.final_norm is not None and (final := norm.param_specs(config.final_norm, (width,), ("embed",))):
        specs["final_norm"] = final
    if not config.tied:
        shape, axes, init = (width, config.vocab_size), ("embed", "vocab"), normal(config.head_init_std)
        bits = config.head_bit_eps is not None
        specs["head"] = bit_linear.param_specs(shape, axes, init) if bits else Spec(shape, axes, init, inputs=1)
    return jax.tree.map(lambda s: dataclasses.replace(s, dtype=jnp.dtype(dtype)), specs, is_leaf=_is_spec)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, Spec)


def state_specs(
    config: LanguageModelConfig,
    batch_size: int,
    max_length: int | None = None,
    dtype: DTypeLike | None = None,
) -> LanguageModelState:
    """Specs of the decoding state.

    Args:
      config: the model.
      batch_size: B.
      max_length: positions that attention without a window can hold; None = config.max_length. Windows and recurrent
        states do not depend on it.
      dtype: of keys and values; None = the compute dtype. Recurrent state is float32.
    """
    max_length = config.max_length if max_length is None else max_length
    if batch_size < 1 or max_length < 1:
        raise ValueError(f"batch_size and max_length must be >= 1, got {batch_size} and {max_length}")
    dtype = jnp.dtype(config.dtype if dtype is None else dtype)
    layers = {
        name: mixer_of(sub.mixer).state_specs(sub.mixer, batch_size, max_length, dtype)
        for name, sub in config.sublayers().items()
    }
    return LanguageModelState(
        next_position=Spec((batch_size,), ("batch",), dtype=jnp.int32),
        layers=stack(layers, config.repeats),
    )


def unroll(tree: Tree, config: LanguageModelConfig) -> Tree:
    """Parameters (or a state) with a tuple of per-repeat trees in place of the stacked `layers`.

    `apply` then runs a Python loop instead of a scan: slower to compile, no copies of weights at run time. Pass both
    the parameters and the state unrolled, or neither.
    """
    if isinstance(tree, LanguageModelState):
        return dataclasses.replace(tree, layers=unstack(tree.layers, config.repeats))
    return {**tree, "layers": unstack(tree["layers"], config.repeats)}


def _sublayer(params, x, ctx, state, *, sub: Sublayer, config: LanguageModelConfig, implementation):
    h = x if sub.norm is None else norm.apply(params.get("norm", {}), x, config=sub.norm)
    y, new_state = mixer_of(sub.mixer).mix(
        params["mixer"], h.astype(config.dtype), ctx, state, config=sub.mixer, implementation=implementation
    )
    if sub.post_norm is not None:
        y = norm.apply(params.get("post_norm", {}), y, config=sub.post_norm)
    y = y.astype(x.dtype)
    x = x + (y if config.residual_scale == 1.0 else y * config.residual_scale)
    return constrain(x, "batch", "time", "embed"), new_state


def _across_layers(layers: Any, config: LanguageModelConfig) -> Any:
    """Layers, stacked or unrolled, with what `MixerType.across_layers` makes of some leaves in their place."""
    for name, sub in config.sublayers().items():
        for leaf, function in mixer_of(sub.mixer).across_layers.items():
            unrolled = isinstance(layers, tuple)
            mixers = [layer[name]["mixer"] for layer in (layers if unrolled else (layers,))]
            if leaf not in mixers[0]:
                continue
            path = f"{name}/mixer/{leaf}"
            if unrolled:
                values = function(jnp.stack([mixer[leaf] for mixer in mixers]))
                layers = tuple(update(layer, path, value) for layer, value in zip(layers, values, strict=True))
            else:
                layers = update(layers, path, function(mixers[0][leaf]))
    return layers


def _run_layers(params, x, ctx, state, config, implementation):
    sublayers = config.sublayers()

    def repeat(x, layer):
        layer_params, layer_state = layer
        new = {}
        for name, sub in sublayers.items():
            sub_state = None if layer_state is None else layer_state[name]
            x, new[name] = _sublayer(
                layer_params[name], x, ctx, sub_state, sub=sub, config=config, implementation=implementation
            )
        return x, new

    if config.remat != "none":
        repeat = jax.checkpoint(repeat, policy=REMAT[config.remat], prevent_cse=False)
    layers = _across_layers(params["layers"], config)
    if not isinstance(layers, tuple):
        return jax.lax.scan(repeat, x, (layers, state))
    if state is not None and not isinstance(state, tuple):
        raise ValueError("unrolled parameters need an unrolled state: zoo.unroll(state, model.config)")
    new_states = []
    for i, layer_params in enumerate(layers):
        x, new = repeat(x, (layer_params, None if state is None else state[i]))
        new_states.append(new)
    return x, tuple(new_states)


def head(
    params: Tree, hidden: jax.Array, *, config: LanguageModelConfig, implementation: str | None = None
) -> jax.Array:
    """Logits float32[B, T, Z] of normalised hidden states [B, T, D]."""
    if config.tied:
        logits = linear(hidden, params["embedding"], "btd,zd->btz")
    elif config.head_bit_eps is not None:
        options = {"eps": config.head_bit_eps, "implementation": implementation}
        logits = bit_linear.bit_linear(params["head"], hidden, "btd,dz->btz", **options)
    else:
        logits = linear(hidden, params["head"], "btd,dz->btz")
    logits = constrain(logits.astype(jnp.float32), "batch", "time", "vocab")
    if config.logit_scale != 1.0:
        logits = logits * config.logit_scale
    if config.logit_soft_cap is not None:
        logits = config.logit_soft_cap * jnp.tanh(logits / config.logit_soft_cap)
    return logits


def apply(
    params: Tree,
    tokens: jax.Array,
    *,
    config: LanguageModelConfig,
    ctx: SeqContext | None = None,
    state: LanguageModelState | None = None,
    logits: str = "all",
    implementation: str | None = None,
) -> LanguageModelOutput:
    """The model on T more tokens of each row; training, prefill and decode alike.

    Args:
      params: tree of `param_specs` (or `unroll`ed).
      tokens: int[B, T], T >= 1. A token outside the vocabulary gives NaN.
      config: the model.
      ctx: documents, padding and positions; None = each row is one document that continues `state`.
      state: from `init_state` or an earlier call; None = fresh rows. Attention without a window then returns a state
        that is full: to go on, start from `init_state`.
      logits: "all" positions, only the "last" token that is not padding of each row, or "none".
      implementation: of every op inside; None = the platform's.

    Returns:
      LanguageModelOutput.

    Raises:
      ValueError: tokens are not int[B, T], shapes disagree, or (outside jit) the state cannot hold T more tokens.
    """
    check_choice("logits", logits, LOGITS)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [batch, time], got {tokens.dtype}{list(tokens.shape)}")
    batch, length = tokens.shape
    if state is None:
        start = jnp.zeros((batch,), jnp.int32)
    else:
        start = state.next_position
        if start.shape != (batch,):
            raise ValueError(f"tokens have batch size {batch}, the state has {start.shape[0]}")
        _check_capacity(state, length, ctx, config)
    if ctx is None:
        ctx = SeqContext.contiguous(start, length)
    elif ctx.positions.shape != tokens.shape:
        raise ValueError(f"ctx is for {ctx.positions.shape}, tokens are {tokens.shape}")

    x = jnp.take(materialise(params["embedding"]), tokens, axis=0).astype(config.residual_dtype)
    if config.embedding_scale != 1.0:
        x = x * config.embedding_scale
    x = constrain(x, "batch", "time", "embed")
    x, layers = _run_layers(params, x, ctx, None if state is None else state.layers, config, implementation)
    if config.final_norm is not None:
        x = norm.apply(params.get("final_norm", {}), x, config=config.final_norm)
    hidden = x.astype(config.dtype)
    read = hidden
    if logits == "last":
        last = jnp.maximum(last_valid(ctx), 0)
        read = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return LanguageModelOutput(
        logits=None if logits == "none" else head(params, read, config=config, implementation=implementation),
        state=LanguageModelState(next_position=next_positions(ctx, start), layers=layers),
        aux={"hidden": hidden},
    )


def _check_capacity(state, length: int, ctx: SeqContext | None, config: LanguageModelConfig) -> None:
    """Outside jit, an error in place of the NaN that attention returns when its state is full."""
    slots = capacity(state, config)
    if slots is None or ctx is not None or isinstance(state.next_position, jax.core.Tracer):
        return
    used = int(jnp.max(state.next_position))
    if used + length > slots:
        raise ValueError(
            f"the state holds {slots} positions, {used} are taken and {length} more were given; "
            f"use init_state(batch_size, max_length={used + length}) or more"
        )


def capacity(state: LanguageModelState, config: LanguageModelConfig) -> int | None:
    """Positions that a state can hold; None when nothing in it grows with the sequence."""
    layers = state.layers[0] if isinstance(state.layers, tuple) else state.layers
    slots = [
        layers[name].positions.shape[-1]
        for name, sub in config.sublayers().items()
        if getattr(sub.mixer, "window", 0) is None
    ]
    return min(slots, default=None)


def flops_per_token(config: LanguageModelConfig, length: int) -> float:
    """Forward FLOPs per token at context `length`: every sublayer, and the head."""
    layer = sum(mixer_of(s.mixer).flops_per_token(s.mixer, config.width, length) for s in config.pattern)
    return config.repeats * layer + 2.0 * config.width * config.vocab_size

"""The one pattern-driven language model: embed -> residual sublayers -> norm -> head.

An architecture is a pattern of sublayers repeated `repeats` times, between sublayers that come once (`first`, `last`).
Repeats are stacked on a leading `layers` axis and run by jax.lax.scan, so compile time grows with the pattern and not
with the depth. Sublayers may share weights: those stand once in the tree, under `shared`, and every site reads them.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.core
import jax.numpy as jnp
from jax.typing import DTypeLike

from zoo.core.context import SeqContext, last_valid, next_positions
from zoo.core.linear import linear, materialise
from zoo.core.params import LAYERS, Spec, Tree, stack, unstack, update
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
      reads_embedding: norm and mixer get [x, e] of width 2 D, where e are the embeddings of the same tokens, as they
        went into the first layer; the output still has D channels.
      aside: the step is input of the next sublayer alone, mixer(norm(x + step)), and x stays as it is.
      share: name of a set of weights. Sublayers that give the same name have one set of parameters, but for what
        `MixerType.own` leaves to each site; the gradient of the set is the sum over its sites. States are the sites'.
    """

    mixer: Any
    norm: Norm | None = Norm()
    post_norm: Norm | None = None
    reads_embedding: bool = False
    aside: bool = False
    share: str | None = None

    def __post_init__(self):
        if self.share is None:
            return
        if not self.share or "/" in self.share:
            raise ValueError(f"Sublayer.share={self.share!r} must be None or a name without '/'")
        if mixer_of(self.mixer).across_layers:
            raise ValueError(f"Sublayer.share={self.share!r}: {mixer_of(self.mixer).name} depends on its layer")


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """A decoder-only language model.

    Attributes:
      vocab_size: Z.
      width: D.
      pattern: the sublayers of one repeat.
      repeats: how often the pattern is repeated.
      first, last: sublayers before and after the repeats, once each; for depths that no pattern divides.
      final_norm: normalisation before the head, or None.
      tied: the head is the transposed embedding.
      head_bit_eps: not None makes the head a BitLinear (ternary weight, int8 input) with this epsilon in its norm.
      embedding_scale, residual_scale, logit_scale: multipliers of embedding, residual branches, logits.
      logit_soft_cap: logits = soft_cap tanh(logits / soft_cap).
      embedding_init_std, head_init_std: standard deviations at initialisation.
      max_length: context the model is meant for; a default for states, no limit for recurrent models.
      dtype: compute dtype. param_dtype: storage. residual_dtype: of the residual stream.
      remat: what the backward pass recomputes, a repeat at a time (a sublayer at a time where nothing repeats): "none",
        "dots" (all but matrix products), "full".
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
    first: tuple[Sublayer, ...] = ()
    last: tuple[Sublayer, ...] = ()

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
        shared: dict[str, Sublayer] = {}
        for stage, sublayers in (("first", self.first), ("pattern", self.pattern), ("last", self.last)):
            for sublayer in sublayers:
                if mixer_of(sublayer.mixer).across_layers and stage != "pattern":
                    raise ValueError(f"{stage}: {mixer_of(sublayer.mixer).name} depends on its layer of the repeats")
                name = sublayer.share
                if name is not None and shared.setdefault(name, sublayer) != sublayer:
                    raise ValueError(f"sublayers with share={name!r} must be equal: {shared[name]} and {sublayer}")
            if sublayers and sublayers[-1].aside:
                raise ValueError(f"{stage}: the last sublayer has aside=True, and no sublayer that follows it")

    def sublayers(self) -> dict[str, Sublayer]:
        """The pattern by name: "0_mamba", "1_mlp", ..."""
        return _named(self.pattern)

    def stages(self) -> dict[str, dict[str, Sublayer]]:
        """Sublayers by name, under "first", "layers" (the pattern) and "last", where there are any."""
        stages = {"first": self.first, LAYERS: self.pattern, "last": self.last}
        return {stage: _named(sublayers) for stage, sublayers in stages.items() if sublayers}

    def in_order(self) -> list[tuple[str, tuple[int, ...], Sublayer]]:
        """Every sublayer in the order of the computation: path in the tree, index of the repeat, (i,) or (), config."""
        order: list[tuple[str, tuple[int, ...], Sublayer]] = []
        for stage, sublayers in self.stages().items():
            for index in [(i,) for i in range(self.repeats)] if stage == LAYERS else [()]:
                order += [(f"{stage}/{name}", index, sub) for name, sub in sublayers.items()]
        return order


def _named(sublayers: tuple[Sublayer, ...]) -> dict[str, Sublayer]:
    return {f"{i}_{mixer_of(s.mixer).name}": s for i, s in enumerate(sublayers)}


@flax.struct.dataclass
class LanguageModelState:
    """Attributes: next_position int32[B]; layers, states by sublayer name, each stacked over repeats; first and last,
    states by sublayer name."""

    next_position: Any
    layers: Any
    first: Any = flax.struct.field(default_factory=dict)
    last: Any = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class LanguageModelOutput:
    """Attributes: logits float32[B, T, Z] ([B, 1, Z] for "last", None for "none"); state after the last token; aux,
    {"hidden": [B, T, D] after the final norm, "inputs": of every mixer, where asked for}."""

    logits: Any
    state: Any
    aux: dict[str, Any]


def _sublayer_specs(sub: Sublayer, width: int) -> Tree:
    """Specs {mixer, norm, post_norm} of one sublayer by itself."""
    inputs = 2 * width if sub.reads_embedding else width
    specs = {"mixer": mixer_of(sub.mixer).param_specs(sub.mixer, inputs)}
    for key, n, size in (("norm", sub.norm, inputs), ("post_norm", sub.post_norm, width)):
        if n is not None and (scale := norm.param_specs(n, (size,), ("embed",))):
            specs[key] = scale
    return specs


def _split(sub: Sublayer, tree: Tree) -> tuple[Tree, Tree]:
    """(what the site keeps, what it shares) of a sublayer's tree; `_join` is the inverse."""
    if sub.share is None:
        return tree, {}
    own = {name: leaf for name, leaf in tree["mixer"].items() if name in mixer_of(sub.mixer).own}
    rest = {name: leaf for name, leaf in tree["mixer"].items() if name not in own}
    return {"mixer": own} if own else {}, {**tree, "mixer": rest}


def _join(own: Tree, shared: Tree | None) -> Tree:
    if shared is None:
        return own
    return {**shared, "mixer": {**shared["mixer"], **own.get("mixer", {})}}


def param_specs(config: LanguageModelConfig) -> Tree:
    """Specs: embedding [Z, D], layers/<sublayer>/{norm, mixer, post_norm} (stacked), the same under first and last and,
    once per set of weights, shared/<name>; final_norm, head [D, Z] (or head/{norm_scale, weight})."""
    width, dtype = config.width, config.param_dtype
    normal = jax.nn.initializers.normal
    specs: dict[str, Any] = {
        "embedding": Spec(
            (config.vocab_size, width),
            ("vocab", "embed"),
            normal(config.embedding_init_std),
            tags=frozenset({"embedding"}),
        )
    }
    shared: dict[str, Tree] = {}
    for stage, sublayers in config.stages().items():
        layer: dict[str, Tree] = {}
        for name, sub in sublayers.items():
            layer[name], common = _split(sub, _sublayer_specs(sub, width))
            if sub.share is not None:
                shared[sub.share] = common
        specs[stage] = stack(layer, config.repeats) if stage == LAYERS else layer
    if shared:
        specs["shared"] = shared
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
    stages = {
        stage: {name: mixer_of(s.mixer).state_specs(s.mixer, batch_size, max_length, dtype) for name, s in subs.items()}
        for stage, subs in config.stages().items()
    }
    stages[LAYERS] = stack(stages[LAYERS], config.repeats)
    return LanguageModelState(next_position=Spec((batch_size,), ("batch",), dtype=jnp.int32), **stages)


def unroll(tree: Tree, config: LanguageModelConfig) -> Tree:
    """Parameters (or a state) with a tuple of per-repeat trees in place of the stacked `layers`.

    `apply` then runs a Python loop instead of a scan: slower to compile, no copies of weights at run time. Pass both
    the parameters and the state unrolled, or neither.
    """
    if isinstance(tree, LanguageModelState):
        return dataclasses.replace(tree, layers=unstack(tree.layers, config.repeats))
    return {**tree, "layers": unstack(tree["layers"], config.repeats)}


def _sublayer(params, x, aside, embedding, ctx, state, *, sub: Sublayer, config: LanguageModelConfig, implementation):
    """(x, what the next sublayer reads beside it or None, new state, what its mixer read) after one sublayer."""
    h = x if aside is None else x + aside
    if sub.reads_embedding:
        h = jnp.concatenate([h, embedding], axis=-1)
    h = h if sub.norm is None else norm.apply(params.get("norm", {}), h, config=sub.norm)
    h = h.astype(config.dtype)
    y, new_state = mixer_of(sub.mixer).mix(
        params["mixer"], h, ctx, state, config=sub.mixer, implementation=implementation
    )
    if y.shape != x.shape:
        raise ValueError(f"{mixer_of(sub.mixer).name} gives {y.shape[-1]} channels, the model has width {config.width}")
    if sub.post_norm is not None:
        y = norm.apply(params.get("post_norm", {}), y, config=sub.post_norm)
    y = y.astype(x.dtype)
    y = y if config.residual_scale == 1.0 else y * config.residual_scale
    if sub.aside:
        return x, constrain(y, "batch", "time", "embed"), new_state, h
    return constrain(x + y, "batch", "time", "embed"), None, new_state, h


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


def _run_layers(params, x, ctx, state, config, implementation, inputs):
    """x after all stages, {stage: new state} and, where `inputs`, {stage: {sublayer: what its mixer read}}."""
    embedding, shared = x, params.get("shared", {})

    def recomputed(function, in_loop: bool):
        # Outside a loop, and in one of a single turn, XLA would find the recomputed values equal to the first ones, and
        # keep those.
        return jax.checkpoint(function, policy=REMAT[config.remat], prevent_cse=not in_loop)

    def stage_of(sublayers: dict[str, Sublayer], once: bool, scanned: bool):
        steps = {}
        for name, sub in sublayers.items():
            step = functools.partial(_sublayer, sub=sub, config=config, implementation=implementation)
            # Recomputing all of what comes once would hold as much as keeping it does.
            steps[name] = recomputed(step, in_loop=False) if once and config.remat != "none" else step

        def run(x, layer):
            (layer_params, layer_state), aside, new, read = layer, None, {}, {}
            for name, sub in sublayers.items():
                own = _join(layer_params.get(name, {}), None if sub.share is None else shared[sub.share])
                sub_state = None if layer_state is None else layer_state[name]
                x, aside, new[name], read[name] = steps[name](own, x, aside, embedding, ctx, sub_state)
            return x, (new, read if inputs else {})

        return run if once or config.remat == "none" else recomputed(run, in_loop=scanned)

    new_states: dict[str, Any] = {}
    reads: dict[str, Any] = {}
    for stage, sublayers in config.stages().items():
        layers = params[stage]
        once = stage != LAYERS or config.repeats == 1
        run = stage_of(sublayers, once, scanned=stage == LAYERS and not isinstance(layers, tuple))
        carried = None if state is None else getattr(state, stage)
        if stage != LAYERS:
            x, (new_states[stage], reads[stage]) = run(x, (layers, carried))
            continue
        layers = _across_layers(layers, config)
        if not isinstance(layers, tuple):
            x, (new_states[stage], reads[stage]) = jax.lax.scan(run, x, (layers, carried), length=config.repeats)
            continue
        if carried is not None and not isinstance(carried, tuple):
            raise ValueError("unrolled parameters need an unrolled state: zoo.unroll(state, model.config)")
        new = []
        for i, layer_params in enumerate(layers):
            x, results = run(x, (layer_params, None if carried is None else carried[i]))
            new.append(results)
        new_states[stage], reads[stage] = zip(*new, strict=True)
    return x, new_states, reads


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
    inputs: bool = False,
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
      inputs: aux also holds "inputs", what every mixer reads: [B, T, D] by stage and sublayer, as in the parameters.
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
    x, stages, reads = _run_layers(params, x, ctx, state, config, implementation, inputs)
    if config.final_norm is not None:
        x = norm.apply(params.get("final_norm", {}), x, config=config.final_norm)
    hidden = x.astype(config.dtype)
    read = hidden
    if logits == "last":
        last = jnp.maximum(last_valid(ctx), 0)
        read = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return LanguageModelOutput(
        logits=None if logits == "none" else head(params, read, config=config, implementation=implementation),
        state=LanguageModelState(next_position=next_positions(ctx, start), **stages),
        aux={"hidden": hidden, **({"inputs": reads} if inputs else {})},
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
    slots = []
    for stage, sublayers in config.stages().items():
        states = getattr(state, stage)
        states = states[0] if isinstance(states, tuple) else states
        slots += [
            states[name].positions.shape[-1]
            for name, sub in sublayers.items()
            if getattr(sub.mixer, "window", 0) is None
        ]
    return min(slots, default=None)


def flops_per_token(config: LanguageModelConfig, length: int) -> float:
    """Forward FLOPs per token at context `length`: every sublayer, and the head."""
    total = 2.0 * config.width * config.vocab_size
    for stage, sublayers in config.stages().items():
        for sub in sublayers.values():
            inputs = 2 * config.width if sub.reads_embedding else config.width
            once = mixer_of(sub.mixer).flops_per_token(sub.mixer, inputs, length)
            total += once * (config.repeats if stage == LAYERS else 1)
    return total

"""Attention layers of a trained model as linear recurrences that start from their weights.

Two targets: "mamba2_attention" (Mamba in the Llama, arXiv:2408.15237) and "hedgehog" (arXiv:2402.04347). Both have
q, k, v and o of attention under the same names, so a conversion copies every leaf that both models have and draws the
others.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from zoo.core.linear import is_weight, materialise
from zoo.core.params import LAYERS, Spec, Tree, check_tree, initialise, is_spec
from zoo.core.registry import check_choice
from zoo.mixers import Attention, Hedgehog, Mamba2Attention, mixer_of
from zoo.models import language_model
from zoo.models.hybrid import build
from zoo.models.language_model import LanguageModelConfig, Sublayer
from zoo.models.model import FAMILIES, Model, create, preset

TARGETS: Mapping[str, type] = {"mamba2_attention": Mamba2Attention, "hedgehog": Hedgehog}
FAMILY = "converted"
STANDARD_DEVIATIONS = ("init_std", "out_init_std")
# Fields of attention that the target has under the same names, and those that neither target can express. Without
# softmax there is no scale; a window and, in Mamba-2, the rotary embedding are what the method leaves out.
TAKEN = ("heads", "kv_heads", "head_width", "qkv_bias", "out_bias", *STANDARD_DEVIATIONS)
REFUSED = ("soft_cap", "qk_norm", "clip_qkv")
# Fields of a model that do not change what its parameters compute.
FREE = ("dtype", "param_dtype", "residual_dtype", "remat", "max_length", "embedding_init_std", "head_init_std")
OVERRIDES = (
    "vocab_size",
    "dtype",
    "param_dtype",
    "residual_dtype",
    "remat",
    "max_length",
)  # of the base, in `converted`
STAGES = ("first", "pattern", "repeats", "last")


def converted_mixer(attention: Attention, to: str, options: Mapping[str, Any] | None = None) -> Any:
    """The config of the mixer that takes the place of `attention`.

    Args:
      attention: the layer to convert.
      to: "mamba2_attention" or "hedgehog".
      options: of the target; those that attention has, too, can only have its values.

    Raises:
      ValueError: a field of attention that the target cannot express, or an option that disagrees with attention.
    """
    check_choice("convert: to", to, TARGETS)
    for name in REFUSED:
        if getattr(attention, name) is not None:
            raise ValueError(f"convert: {to} cannot express Attention.{name}={getattr(attention, name)}, only None")
    taken = {name: getattr(attention, name) for name in (*TAKEN, *(("rotary",) if to == "hedgehog" else ()))}
    given = dict(options or {})
    for name in taken:
        if name in given and given[name] != taken[name]:
            raise ValueError(f"convert: mixer[{name!r}]={given[name]!r} must be the attention's {taken[name]!r}")
    return build(f"convert: mixer {to!r}", TARGETS[to], {**given, **taken})


def _kept(keep: int | Sequence[int], layers: int) -> set[int]:
    """Indices of the attention layers that stay."""
    if isinstance(keep, int):
        if keep != 0 and not 2 <= keep <= layers:
            raise ValueError(f"convert: keep={keep} must be 0 for none, or n = 2..{layers} for the last of every n")
        return set(range(keep - 1, layers, keep)) if keep else set()
    indices = set(keep)
    if not indices <= set(range(layers)) or len(indices) != len(keep) or len(indices) == layers:
        raise ValueError(f"convert: keep={list(keep)} must name some, not all, of the attention layers 0..{layers - 1}")
    return indices


def _folded(sublayers: Sequence[Sublayer]) -> dict[str, Any]:
    """first, pattern, repeats and last that spell the sublayers with the fewest of them written out."""
    count = len(sublayers)
    best, cost = (0, count, 1), count
    for start in range(count):
        for period in range(1, (count - start) // 2 + 1):
            end = start + period
            while end < count and sublayers[end] == sublayers[end - period]:
                end += 1
            repeats = (end - start) // period
            if count - (repeats - 1) * period < cost:
                best, cost = (start, period, repeats), count - (repeats - 1) * period
    start, period, repeats = best
    end = start + period * repeats
    stages = sublayers[:start], sublayers[start : start + period], repeats, sublayers[end:]
    return {
        name: tuple(stage) if isinstance(stage, list) else stage for name, stage in zip(STAGES, stages, strict=True)
    }


@FAMILIES.register(FAMILY)
def converted(
    *,
    base: str,
    to: str,
    keep: int | Sequence[int] = 2,
    mixer: Mapping[str, Any] | None = None,
    base_options: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    dtype: str | None = None,
    param_dtype: str | None = None,
    residual_dtype: str | None = None,
    remat: str | None = None,
    max_length: int | None = None,
) -> LanguageModelConfig:
    """The model `base` with some of its attention layers as linear recurrences.

    Args:
      base: preset or family of the model to convert; base_options: its options.
      to: "mamba2_attention" or "hedgehog".
      keep: which attention layers stay: n = the last of every n (2, 4 and 8 are the 50, 25 and 12.5 % of Mamba in the
        Llama), 0 = none, or their indices among the attention layers.
      mixer: options of the new mixers that attention does not fix, such as {"conv_width": None}.
      vocab_size, dtype, param_dtype, residual_dtype, remat, max_length: None = the base's.

    Raises:
      ValueError: there is no attention to convert, or it cannot be converted; see `converted_mixer`.
    """
    values = (vocab_size, dtype, param_dtype, residual_dtype, remat, max_length)
    given = {name: value for name, value in zip(OVERRIDES, values, strict=True) if value is not None}
    options = {**(base_options or {}), **given}
    config = create(base, **options).config
    sublayers = [sub for _, _, sub in config.in_order()]
    if any(mixer_of(sub.mixer).across_layers for sub in sublayers):
        raise ValueError(f"convert: {base} has mixers that depend on their layer, which would come to lie elsewhere")
    attention = [i for i, sub in enumerate(sublayers) if type(sub.mixer) is Attention]
    if not attention:
        raise ValueError(f"convert: {base} has no attention layer")
    kept = _kept(keep, len(attention))
    for layer, i in enumerate(attention):
        if layer in kept:
            continue
        if sublayers[i].share is not None:
            raise ValueError(f"convert: attention layer {layer} shares its weights ({sublayers[i].share!r})")
        sublayers[i] = dataclasses.replace(sublayers[i], mixer=converted_mixer(sublayers[i].mixer, to, mixer))
    return dataclasses.replace(config, **_folded(sublayers))


def convert(
    model: Model,
    params: Tree,
    *,
    to: str,
    keep: int | Sequence[int] = 2,
    mixer: Mapping[str, Any] | None = None,
    key: jax.Array,
) -> tuple[Model, Tree]:
    """A trained model with a share of its attention layers as linear recurrences that start from their weights.

    Args:
      model: from `zoo.create`, `zoo.from_hf` or an earlier `convert` that kept more attention layers.
      params: its parameters.
      to, keep, mixer: see `converted`; for a model that is converted already, `to` and `mixer` must not change.
      key: a jax.random key for the leaves that attention lacks.

    Returns:
      The new model and its parameters; layers that stay, and every leaf that both have, are bitwise the old ones.

    Raises:
      ValueError: see `converted` and `carry_over`.

    Reference: arXiv:2408.15237, algorithm 1; arXiv:2402.04347, section 4.2.
    """
    new = converted_model(model, to=to, keep=keep, mixer=mixer)
    return new, carry_over(model.config, params, new.config, key)


def converted_model(
    model: Model,
    *,
    to: str,
    keep: int | Sequence[int] = 2,
    mixer: Mapping[str, Any] | None = None,
    base_options: Mapping[str, Any] | None = None,
) -> Model:
    """The model that `convert` makes, without parameters; base_options replace some of the options of `model`."""
    options = {"base": model.family, "base_options": model.options, "to": to, "keep": keep, "mixer": mixer}
    if model.family == FAMILY:
        earlier = dict(model.options)
        for name, value in (("to", to), ("mixer", mixer)):
            if value != earlier[name]:
                raise ValueError(f"convert: {name}={value!r} must be that of the earlier conversion, {earlier[name]!r}")
        options = {**earlier, "keep": keep}
    options["base_options"] = {**(options["base_options"] or {}), **(base_options or {})}
    return dataclasses.replace(create(FAMILY, **options), name=model.name)


def carry_over(source: LanguageModelConfig, params: Tree, target: LanguageModelConfig, key: jax.Array) -> Tree:
    """Parameters of `target`: those of `source` wherever both have a leaf, and fresh ones elsewhere.

    Args:
      source: a model.
      params: its parameters; a leaf may be a weight, such as one with an adapter.
      target: the same model, or one in which attention layers of it are converted.
      key: for the leaves that `source` lacks; they are those of `Model.init(key)`.

    Returns:
      The tree, in the dtypes of `target`.

    Raises:
      ValueError: the models differ in anything else; the message names field and values.
    """
    if isinstance(params[LAYERS], tuple):
        raise ValueError("carry_over needs the stacked parameters, these are unrolled")
    _check_models(source, target)
    specs = language_model.param_specs(target)

    def rearranged(params: Tree, key: jax.Array) -> Tree:
        trees = [_site(params, path, index) for path, index, _ in source.in_order()]
        new = _missing(trees, target, specs)
        fresh = initialise(new, key) if new else {}
        repeats: dict[str, list[Tree]] = collections.defaultdict(list)
        for tree, (path, index, _) in zip(trees, target.in_order(), strict=True):
            drawn = _site(fresh, path, index).get("mixer", {})
            repeats[path].append({**tree, "mixer": {**drawn, **tree.get("mixer", {})}} if drawn else tree)
        result = {name: leaf for name, leaf in params.items() if name not in ("first", LAYERS, "last")}
        for path, trees in repeats.items():
            stage, name = path.split("/")
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if stage == LAYERS else trees[0]
            result.setdefault(stage, {})[name] = stacked
        return result

    shapes = jax.eval_shape(lambda *args: jax.tree.map(materialise, rearranged(*args), is_leaf=is_weight), params, key)
    check_tree(shapes, specs)
    as_declared = lambda *args: jax.tree.map(_as_declared, specs, rearranged(*args), is_leaf=is_spec)  # noqa: E731
    return jax.jit(as_declared)(params, key)


def _as_declared(spec: Spec, leaf: Any) -> Any:
    return leaf if is_weight(leaf) else jnp.asarray(leaf, spec.dtype)


def _site(params: Tree, path: str, index: tuple[int, ...]) -> Tree:
    """The tree of one sublayer in one repeat."""
    stage, name = path.split("/")
    tree = params.get(stage, {}).get(name, {})
    return jax.tree.map(lambda leaf: leaf[index], tree) if index else tree


def _missing(trees: list[Tree], target: LanguageModelConfig, specs: Tree) -> Tree:
    """The specs of those leaves of mixers that some source lacks."""
    missing: dict[str, Any] = {}
    for tree, (path, _, _) in zip(trees, target.in_order(), strict=True):
        stage, name = path.split("/")
        wanted = specs[stage].get(name, {}).get("mixer", {})
        lacking = {leaf: spec for leaf, spec in wanted.items() if leaf not in tree.get("mixer", {})}
        if lacking:
            missing.setdefault(stage, {}).setdefault(name, {}).setdefault("mixer", {}).update(lacking)
    return missing


def _check_models(source: LanguageModelConfig, target: LanguageModelConfig) -> None:
    """Raises ValueError unless `target` is `source` with attention layers converted."""
    _check_equal("the model", source, target, (*STAGES, *FREE))
    old, new = ([sub for _, _, sub in config.in_order()] for config in (source, target))
    if len(old) != len(new):
        raise ValueError(f"the models have {len(old)} and {len(new)} sublayers")
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        what = f"sublayer {i} ({mixer_of(a.mixer).name})"
        _check_equal(what, a, b, ("mixer",))
        if type(a.mixer) is type(b.mixer):
            _check_equal(what, a.mixer, b.mixer, STANDARD_DEVIATIONS)
            continue
        names = [name for name, kind in TARGETS.items() if type(b.mixer) is kind]
        if type(a.mixer) is not Attention or not names:
            raise ValueError(
                f"{what} cannot become {mixer_of(b.mixer).name}; attention can become {', '.join(TARGETS)}"
            )
        wanted = converted_mixer(a.mixer, names[0])
        own = {field.name for field in dataclasses.fields(wanted)} - {*TAKEN, "rotary"}
        _check_equal(what, wanted, b.mixer, (*own, *STANDARD_DEVIATIONS))


def _check_equal(what: str, a: Any, b: Any, but: Sequence[str]) -> None:
    for field in dataclasses.fields(a):
        ours, theirs = getattr(a, field.name), getattr(b, field.name)
        if field.name not in but and ours != theirs:
            raise ValueError(f"{what} has {field.name}={ours} and is to have {theirs}; set it to {ours}")


for _name, _to, _keep, _citation in (
    ("mamba-in-llama-tiny", "mamba2_attention", 2, "arXiv:2408.15237"),
    ("hedgehog-llama-tiny", "hedgehog", 0, "arXiv:2402.04347"),
):
    preset(
        _name,
        FAMILY,
        citation=f"a tiny variant of {_citation} for tests and examples",
        base="llama-tiny",
        to=_to,
        keep=_keep,
    )

"""`create`, `describe` and the registries of families and presets."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.typing import DTypeLike

from zoo.core import params as params_lib
from zoo.core.context import SeqContext
from zoo.core.params import Tree
from zoo.core.registry import Registry, check_keys, nearest
from zoo.models import language_model
from zoo.models.language_model import LanguageModelConfig, LanguageModelOutput, LanguageModelState

Family = Callable[..., LanguageModelConfig]
FAMILIES: Registry[Family] = Registry("family")


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published (or tiny) configuration.

    Attributes:
      family: the function that turns options into a config.
      options: its keyword arguments.
      parameters: published parameter count in millions, as printed; None where none was published.
      citation: where the sizes come from.
    """

    family: str
    options: Mapping[str, Any]
    parameters: float | None = None
    citation: str = ""


PRESETS: Registry[Preset] = Registry("model")


def preset(name: str, family: str, *, parameters: float | None = None, citation: str = "", **options: Any) -> None:
    """Registers a preset; its options are checked against the family at import."""
    check_keys(f"family {family!r}", options, _options_of(family))
    PRESETS.register(name)(Preset(family, MappingProxyType(options), parameters, citation))


def _options_of(family: str) -> list[str]:
    return list(inspect.signature(FAMILIES.get(family)).parameters)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model: a description and pure functions of it.

    Attributes:
      name: preset or family name.
      family: name of the family.
      options: the family's keyword arguments, resolved.
      config: the pattern-driven description.
    """

    name: str
    family: str
    options: Mapping[str, Any] = dataclasses.field(hash=False)
    config: LanguageModelConfig

    def param_specs(self) -> Tree:
        """The tree of `Spec`s that declares every parameter."""
        return language_model.param_specs(self.config)

    def init(self, key: jax.Array, shardings: Tree | None = None) -> Tree:
        """Parameters, a nested dict of arrays; bitwise the same however they are sharded."""
        return params_lib.initialise(self.param_specs(), key, shardings)

    def state_specs(
        self, batch_size: int, max_length: int | None = None, dtype: DTypeLike | None = None
    ) -> LanguageModelState:
        """Specs of the decoding state; see `language_model.state_specs`."""
        return language_model.state_specs(self.config, batch_size, max_length, dtype)

    def init_state(
        self, batch_size: int, max_length: int | None = None, dtype: DTypeLike | None = None
    ) -> LanguageModelState:
        """The state of fresh rows."""
        return params_lib.fresh(self.state_specs(batch_size, max_length, dtype))

    def apply(
        self,
        params: Tree,
        tokens: jax.Array,
        *,
        ctx: SeqContext | None = None,
        state: LanguageModelState | None = None,
        logits: str = "all",
        inputs: bool = False,
        implementation: str | None = None,
    ) -> LanguageModelOutput:
        """The model on tokens int[B, T]; see `language_model.apply`."""
        return language_model.apply(
            params,
            tokens,
            config=self.config,
            ctx=ctx,
            state=state,
            logits=logits,
            inputs=inputs,
            implementation=implementation,
        )


def create(name: str, **overrides: Any) -> Model:
    """The model called `name`, with some options of its family replaced.

    Args:
      name: a preset of `list_models()`, or a family name (then every option without a default must be given).
      **overrides: options of the family, e.g. window=64, dtype="bfloat16".

    Raises:
      KeyError: unknown name, with the nearest one.
      ValueError: unknown option, with the nearest one, or a value that the family refuses.
    """
    if name in PRESETS.names():
        entry = PRESETS.get(name)
        family, options = entry.family, {**entry.options, **overrides}
    elif name in FAMILIES.names():
        family, options = name, overrides
    else:
        raise KeyError(f"unknown model {name!r}; {nearest(name, [*PRESETS.names(), *FAMILIES.names()])}")
    check_keys(f"model {name!r}", options, _options_of(family))
    build = FAMILIES.get(family)
    missing = [
        p.name for p in inspect.signature(build).parameters.values() if p.default is p.empty and p.name not in options
    ]
    if missing:
        raise ValueError(f"family {family!r} needs {', '.join(missing)}")
    defaults = {p.name: p.default for p in inspect.signature(build).parameters.values() if p.default is not p.empty}
    return Model(name, family, MappingProxyType({**defaults, **options}), build(**options))


def list_models() -> list[str]:
    """Names of all presets."""
    return PRESETS.names()


def describe(name: str | Model, lengths: tuple[int, ...] = (1024, 32768, 1048576)) -> str:
    """A table of a model: parameters, FLOPs per token and state bytes at some lengths, and its parameter groups.

    Args:
      name: a preset name or a Model.
      lengths: context lengths in tokens.
    """
    model = create(name) if isinstance(name, str) else name
    config, specs = model.config, model.param_specs()
    stages = {stage: " ".join(key.partition("_")[2] for key in subs) for stage, subs in config.stages().items()}
    total = params_lib.count(specs)
    lines = [
        f"{model.name}  (family {model.family})",
        f"  pattern      ({stages.pop('layers')}) x {config.repeats}, width {config.width}, "
        f"vocabulary {config.vocab_size}",
        *(f"  {stage:<12} ({mixers})" for stage, mixers in stages.items()),
        f"  parameters   {total:,} ({total / 1e6:.1f}M)",
        f"  {'length':>10}  {'forward FLOPs/token':>20}  {'state bytes/row':>16}",
    ]
    for length in lengths:
        flops = language_model.flops_per_token(config, length)
        state = params_lib.nbytes(model.state_specs(1, length))
        lines.append(f"  {length:>10,}  {flops:>20,.0f}  {state:>16,}")
    lines.append(f"  {'parameter group':<28}  {'parameters':>15}")
    groups: dict[str, int] = {}
    for path, spec in params_lib.flatten(specs).items():
        parts = path.split("/")
        group = "/".join(parts[:2]) if parts[0] in ("first", "layers", "last", "shared") else parts[0]
        groups[group] = groups.get(group, 0) + spec.size
    lines += [f"  {group:<28}  {size:>15,}" for group, size in groups.items()]
    return "\n".join(lines)

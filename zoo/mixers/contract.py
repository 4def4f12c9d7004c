"""The mixer contract: what every token mixer (and every token-wise sublayer) offers.

A mixer is a frozen config dataclass and four functions, registered together:

  param_specs(config, width) -> Spec tree
  state_specs(config, batch_size, max_length, dtype) -> Spec tree
  mix(params, x, ctx, state=None, *, config, implementation=None) -> (y, new_state)
  flops_per_token(config, width, length) -> float

`mix` takes x [B, T, D] for any T >= 1 and has no modes: training, prefill and decode are the same call with another T.
`state=None` is a fresh sequence. The new state has the structure, shapes and dtypes of `state_specs`, whatever T was;
only where a state grows with the sequence (attention without a window) and `state` is None, its capacity is T.
Recurrent state is float32. Documents of a `SeqContext` never see each other; padding neither writes nor moves state,
and y is 0 there.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from jax.typing import DTypeLike

from zoo.core.context import SeqContext
from zoo.core.params import Tree, fresh
from zoo.core.registry import Registry, nearest


class Mix(Protocol):
    """The pure function of a mixer."""

    def __call__(
        self,
        params: Tree,
        x: jax.Array,
        ctx: SeqContext,
        state: Any = None,
        *,
        config: Any,
        implementation: str | None = None,
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> (y [B, T, D], new state)."""
        ...


@dataclasses.dataclass(frozen=True)
class MixerType:
    """A registered mixer.

    Attributes:
      name: registry name; also the last part of the parameter path of its sublayers.
      config_type: the frozen dataclass that describes one instance.
      param_specs, state_specs, mix, flops_per_token: see the module docstring.
      examples: small configs at width 16 that together switch on every option; the conformance battery runs them all.
      across_layers: functions [L, ...] -> [L, ...] by parameter name, for a value of one layer that depends on the
        parameters of all. A model applies them once, before its layers run, to that leaf stacked over the repeats of a
        sublayer; `mix` finds its layer's row of the result at the leaf's place.
      own: names in the parameter tree that every site keeps to itself where sublayers share their weights
        (`Sublayer.share`); `mix` finds the whole tree at each site.
    """

    name: str
    config_type: type
    param_specs: Callable[[Any, int], Tree]
    state_specs: Callable[[Any, int, int, DTypeLike], Tree]
    mix: Mix
    flops_per_token: Callable[[Any, int, int], float]
    examples: tuple[Any, ...]
    across_layers: Mapping[str, Callable[[jax.Array], jax.Array]] = dataclasses.field(default_factory=dict)
    own: tuple[str, ...] = ()

    def init_state(self, config: Any, batch_size: int, max_length: int, dtype: DTypeLike) -> Any:
        """The state of fresh sequences."""
        return fresh(self.state_specs(config, batch_size, max_length, dtype))


MIXERS: Registry[MixerType] = Registry("mixer")


def register(mixer: MixerType) -> MixerType:
    """Files a mixer; one without examples is refused, because nothing would test it."""
    if not mixer.examples:
        raise ValueError(f"mixer {mixer.name!r} needs example configs for the conformance battery")
    return MIXERS.register(mixer.name)(mixer)


def mixer_of(config: Any) -> MixerType:
    """The mixer whose config type is that of `config`.

    Raises:
      TypeError: no registered mixer has such a config.
    """
    for mixer in MIXERS.items().values():
        if type(config) is mixer.config_type:
            return mixer
    types = [m.config_type.__name__ for m in MIXERS.items().values()]
    raise TypeError(f"{type(config).__name__} is no mixer config; {nearest(type(config).__name__, types)}")

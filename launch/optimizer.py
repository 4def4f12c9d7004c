"""The optimiser and the learning rate of a config, by name."""

import inspect
from collections.abc import Callable
from typing import Any

import optax

from launch.config import ConfigError, options
from objectives.optimizers import OPTIMIZERS, SCHEDULES, create, layout, scale_by_token_count
from objectives.optimizers.schedules import Schedule
from zoo.core.params import Tree, combine, map_specs, partition
from zoo.core.registry import check_keys

NO_DECAY_TAGS = "no_decay_tags"


def decay_mask(specs: Tree, no_decay_tags: tuple[str, ...]) -> Tree:
    """Boolean tree: True where weight decay applies.

    Norms, biases, A_log, D and dt_bias carry the tag "no_decay". Embeddings carry "embedding" and are decayed like
    every matrix, since a tied embedding is the head; add "embedding" to the tags to leave them out.
    """
    return map_specs(lambda _, spec: not spec.tags & set(no_decay_tags), specs)


def make_schedule(config: Any) -> Schedule:
    """The learning rate as a function of the step, from the `optimizer` part of a resolved config."""
    name, given = options(config["schedule"])
    steps = given.pop("steps")
    rate = config["learning_rate"]
    if not rate > 0:
        raise ConfigError(f"config.optimizer.learning_rate={rate!r} must be above 0")
    function = SCHEDULES.get(name)
    parameters = inspect.signature(function).parameters.values()
    check_keys(f"schedule {name!r}", given, [p.name for p in parameters if p.kind is p.KEYWORD_ONLY])
    return function(rate, steps, **given)


def make(config: Any, specs: Tree) -> tuple[optax.GradientTransformation, Schedule]:
    """Optimiser (with clipping of the global norm) and schedule, from the `optimizer` part of a resolved config.

    Beside its own options, an optimiser that can leave parameters out of weight decay takes `no_decay_tags`, tags of
    Specs, ("no_decay",) unless given. With `reference_tokens` the update of a step with T counted tokens is scaled by
    sqrt(T / reference_tokens), as if the learning rate were (`scale_by_token_count`); it then takes num_tokens.

    Raises:
      KeyError, ValueError: unknown names or options, with the nearest one.
    """
    name, given = options(config)
    schedule = make_schedule(config)
    for key in ("schedule", "learning_rate"):
        given.pop(key)
    clip_norm = given.pop("clip_norm", 0.0)
    if clip_norm < 0:
        raise ConfigError(f"config.optimizer.clip_norm={clip_norm} must be at least 0")
    reference = given.pop("reference_tokens", 0)
    entry = OPTIMIZERS.get(name)
    if reference and entry.evaluation_params is not None:
        raise ConfigError(f"config.optimizer.reference_tokens: {name!r} averages what it steps through; set it to 0")
    check_keys(f"optimizer {name!r}", given, [*entry.defaults, *([NO_DECAY_TAGS] if entry.mask else [])])
    mask = decay_mask(specs, tuple(given.pop(NO_DECAY_TAGS, ("no_decay",)))) if entry.mask else None
    optimizer = create(name, schedule, mask=mask, layout=layout.of_specs(specs), **given)
    before = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    after = [scale_by_token_count(reference)] if reference else []
    return (optax.chain(*before, optimizer, *after) if before or after else optimizer), schedule


def evaluation_params(name: str, trainable: Tree | None) -> Callable[[Tree, Any], Tree] | None:
    """`(params, opt_state) -> params` to evaluate where the optimiser trains others (schedule-free methods), or None.

    Args:
      name: of the optimiser.
      trainable: boolean tree of the parameters that it sees; None = all.
    """
    function = OPTIMIZERS.get(name).evaluation_params
    if function is None:
        return None

    def evaluated(params: Tree, opt_state: Any) -> Tree:
        if trainable is None:
            return function(opt_state, params)
        trained, frozen = partition(params, trainable)
        return combine(function(opt_state, trained), frozen)

    return evaluated

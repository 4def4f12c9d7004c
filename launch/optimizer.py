"""Optimisers and learning-rate schedules by name."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from launch.config import ConfigError, options
from zoo.core.params import Tree, map_specs
from zoo.core.registry import Registry, check_choice, check_keys

Schedule = Callable[[Any], Any]  # step -> learning rate
SCHEDULES: Registry[Callable[..., Schedule]] = Registry("schedule")
OPTIMIZERS: Registry[Callable[..., optax.GradientTransformation]] = Registry("optimizer")

DECAYS: Mapping[str, Callable[[jax.Array, float], jax.Array]] = {
    "linear": lambda p, final: final + (1 - final) * (1 - p),
    "cosine": lambda p, final: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * p)),
    "sqrt": lambda p, final: final + (1 - final) * (1 - jnp.sqrt(p)),
    "exponential": lambda p, final: jnp.power(final, p),
}


def _warm_up(step: jax.Array | int, warmup_steps: int) -> jax.Array:
    """(step + 1) / warmup_steps, at most 1: the first update is not lost and step warmup_steps - 1 is at the peak."""
    return jnp.minimum(1.0, (jnp.asarray(step, jnp.float32) + 1.0) / max(warmup_steps, 1))


def _progress(step: jax.Array | int, start: int, end: int) -> jax.Array:
    return jnp.clip((jnp.asarray(step, jnp.float32) - start) / max(end - start, 1), 0.0, 1.0)


def _check_fraction(**fractions: float) -> None:
    for name, value in fractions.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"schedule: {name}={value} must be in [0, 1]")


@SCHEDULES.register("constant")
def constant(peak: float, steps: int, *, warmup_steps: int = 0) -> Schedule:
    """peak min(1, (step + 1) / warmup_steps)."""
    del steps
    return lambda step: peak * _warm_up(step, warmup_steps)


@SCHEDULES.register("cosine")
def cosine(peak: float, steps: int, *, warmup_steps: int = 0, final_fraction: float = 0.1) -> Schedule:
    """Warm-up, then half a cosine from peak at warmup_steps to final_fraction peak at `steps` (arXiv:1608.03983)."""
    _check_fraction(final_fraction=final_fraction)
    shape = DECAYS["cosine"]
    return lambda s: peak * _warm_up(s, warmup_steps) * shape(_progress(s, warmup_steps, steps), final_fraction)


@SCHEDULES.register("wsd")
def wsd(
    peak: float,
    steps: int,
    *,
    warmup_steps: int = 0,
    decay_fraction: float = 0.2,
    decay: str = "linear",
    final_fraction: float = 0.0,
) -> Schedule:
    """Warm-up, stable, decay (MiniCPM, arXiv:2404.06395).

    Args:
      peak: learning rate of the stable phase.
      steps: end of the decay.
      warmup_steps: length of the linear warm-up.
      decay_fraction: share of `steps` that the decay takes.
      decay: with progress p and final fraction f: "linear" f + (1 - f)(1 - p), "cosine", "sqrt"
        f + (1 - f)(1 - sqrt p) (arXiv:2405.18392), "exponential" f^p.
      final_fraction: learning rate at `steps` over the peak.
    """
    check_choice("decay", decay, DECAYS)
    _check_fraction(decay_fraction=decay_fraction, final_fraction=final_fraction)
    if decay == "exponential" and final_fraction == 0:
        raise ValueError("schedule wsd: an exponential decay needs final_fraction > 0")
    start = max(steps - round(decay_fraction * steps), warmup_steps)
    shape = DECAYS[decay]
    return lambda step: peak * _warm_up(step, warmup_steps) * shape(_progress(step, start, steps), final_fraction)


def decay_mask(specs: Tree, no_decay_tags: tuple[str, ...]) -> Tree:
    """Boolean tree: True where weight decay applies."""
    return map_specs(lambda _, spec: not spec.tags & set(no_decay_tags), specs)


@OPTIMIZERS.register("adamw")
def adamw(
    schedule: Schedule,
    specs: Tree,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    no_decay_tags: tuple[str, ...] | list[str] = ("no_decay",),
) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101): the decay is multiplied by the learning rate.

    Norms, biases, A_log, D and dt_bias carry the tag "no_decay". Embeddings carry "embedding" and are decayed like
    every matrix, since a tied embedding is the head; add "embedding" to `no_decay_tags` to leave them out.
    """
    mask = decay_mask(specs, tuple(no_decay_tags))
    return optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)


@OPTIMIZERS.register("sgd")
def sgd(schedule: Schedule, specs: Tree, *, momentum: float = 0.0) -> optax.GradientTransformation:
    """params <- params - learning_rate (momentum trace of) gradient."""
    del specs
    return optax.sgd(schedule, momentum=momentum or None)


def _build(kind: Registry, name: str, given: dict[str, Any], *args: Any) -> Any:
    function = kind.get(name)
    allowed = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    check_keys(f"{kind.kind} {name!r}", given, allowed)
    return function(*args, **given)


def make_schedule(config: Any) -> Schedule:
    """The learning rate as a function of the step, from the `optimizer` part of a resolved config."""
    name, given = options(config["schedule"])
    steps = given.pop("steps")
    rate = config["learning_rate"]
    if not rate > 0:
        raise ConfigError(f"config.optimizer.learning_rate={rate!r} must be above 0")
    return _build(SCHEDULES, name, given, rate, steps)


def make(config: Any, specs: Tree) -> tuple[optax.GradientTransformation, Schedule]:
    """Optimiser (with clipping of the global norm) and schedule, from the `optimizer` part of a resolved config.

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
    optimizer = _build(OPTIMIZERS, name, given, schedule, specs)
    return (optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer), schedule

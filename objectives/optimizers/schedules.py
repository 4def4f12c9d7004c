"""Learning rates as functions of the step, by name."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from zoo.core.registry import Registry, check_choice

Schedule = Callable[[Any], Any]  # step -> learning rate
SCHEDULES: Registry[Callable[..., Schedule]] = Registry("schedule")

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

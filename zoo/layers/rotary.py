"""Rotary position embedding (arXiv:2104.09864) and its context extensions.

Pair i of a head's first `fraction` of channels turns by the angle position * frequency_i, frequency_i = theta^(-2i/R).
"half" pairs channel i with i + R/2 (Llama); "interleaved" pairs 2i with 2i + 1 (GPT-J).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from zoo.core.registry import check_choice


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation (arXiv:2306.15595): all frequencies divided by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1 scaling: long wavelengths divided by `factor`, short ones kept, a linear ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int


@dataclasses.dataclass(frozen=True)
class YaRN:
    """YaRN (arXiv:2309.00071, section 3.2): interpolates slow pairs, keeps fast ones, and scales cos and sin.

    Attributes:
      factor: context extension.
      original_max_length: context of pretraining.
      beta_fast, beta_slow: turns over the original context that bound the ramp.
      attention_factor: multiplier of cos and sin; None = 0.1 ln(factor) + 1.
      truncate: round the ramp's bounds to whole pairs.
    """

    factor: float
    original_max_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class LongRoPE:
    """LongRoPE (arXiv:2402.13753): one divisor per pair, a short and a long table.

    The long table is used exactly when `max_length` > `original_max_length`: the choice belongs to the model and not to
    the length of one call, so that a split pass equals one pass.

    Attributes:
      short_factor, long_factor: R/2 divisors each.
      original_max_length: context of pretraining.
      max_length: context that this model is to serve.
      attention_factor: multiplier of cos and sin.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_length: int
    max_length: int
    attention_factor: float


Scaling = Linear | Llama3 | YaRN | LongRoPE


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Attributes: theta, the base; fraction of the head that turns; style "half" or "interleaved"; context scaling."""

    theta: float = 10000.0
    fraction: float = 1.0
    style: str = "half"
    scaling: Scaling | None = None

    def __post_init__(self):
        check_choice("Rotary.style", self.style, ("half", "interleaved"))
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"Rotary.fraction must be in (0, 1], got {self.fraction}")

    def width(self, head_width: int) -> int:
        """R, the number of channels of a head that turn; even."""
        width = int(head_width * self.fraction)
        if width < 2 or width % 2:
            raise ValueError(
                f"Rotary: fraction {self.fraction} of head width {head_width} is {width} channels; "
                "an even number >= 2 is needed"
            )
        return width


def frequencies(config: Rotary, head_width: int) -> tuple[np.ndarray, float]:
    """Angles per position, float32[R/2], and the multiplier of cos and sin."""
    width = config.width(head_width)
    plain = config.theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    scaling = config.scaling
    if scaling is None:
        return plain.astype(np.float32), 1.0
    if isinstance(scaling, Linear):
        return (plain / scaling.factor).astype(np.float32), 1.0
    if isinstance(scaling, Llama3):
        return _llama3(plain, scaling).astype(np.float32), 1.0
    if isinstance(scaling, YaRN):
        attention_factor = scaling.attention_factor
        if attention_factor is None:
            attention_factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
        return _yarn(plain, scaling, config.theta, width).astype(np.float32), attention_factor
    factors = scaling.long_factor if scaling.max_length > scaling.original_max_length else scaling.short_factor
    if len(factors) != width // 2:
        raise ValueError(f"LongRoPE needs {width // 2} factors for {width} rotary channels, got {len(factors)}")
    return (plain / np.asarray(factors, np.float64)).astype(np.float32), scaling.attention_factor


def _llama3(plain: np.ndarray, scaling: Llama3) -> np.ndarray:
    wavelength = 2 * math.pi / plain
    turns = scaling.original_max_length / wavelength
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(ramp, 0.0, 1.0)
    return (1 - keep) * plain / scaling.factor + keep * plain


def _yarn(plain: np.ndarray, scaling: YaRN, theta: float, width: int) -> np.ndarray:
    def pair_of(turns: float) -> float:
        return width * math.log(scaling.original_max_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    interpolate = np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)
    return interpolate * plain / scaling.factor + (1 - interpolate) * plain


def apply(x: jax.Array, positions: jax.Array, *, config: Rotary) -> jax.Array:
    """Turns queries or keys by their positions, in float32 inside.

    Args:
      x: [B, T, H, K].
      positions: int32[B, T].
      config: which rotary embedding.

    Returns:
      [B, T, H, K] in x.dtype; channels past `config.width(K)` pass unchanged.
    """
    width = config.width(x.shape[-1])
    freqs, multiplier = frequencies(config, x.shape[-1])
    angles = positions.astype(jnp.float32)[:, :, None, None] * freqs
    cos, sin = jnp.cos(angles) * multiplier, jnp.sin(angles) * multiplier
    turned, passed = x[..., :width].astype(jnp.float32), x[..., width:]
    if config.style == "half":
        a, b = jnp.split(turned, 2, axis=-1)
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    return jnp.concatenate([out.astype(x.dtype), passed], axis=-1)

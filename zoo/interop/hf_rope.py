"""Rotary parameters of Hugging Face configs, old and new keys, to and from `zoo.layers.rotary`."""

import math
from collections.abc import Mapping
from typing import Any

from zoo.core.registry import check_choice, check_keys
from zoo.layers.rotary import Linear, Llama3, LongRoPE, Scaling, YaRN

# rope type -> keys beside rope_type, rope_theta and partial_rotary_factor
KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "finetuned",  # a remark about the weights, no parameter
    ),
    "longrope": (
        "short_factor",
        "long_factor",
        "original_max_position_embeddings",
        "factor",
        "attention_factor",
    ),
}
COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
TYPE_OF: Mapping[type, str] = {Linear: "linear", Llama3: "llama3", YaRN: "yarn", LongRoPE: "longrope"}


def read(
    config: Mapping[str, Any],
    *,
    types: tuple[str, ...],
    default_fraction: float | None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """The options rope_theta, rope_fraction and rope_scaling of a Hugging Face config.

    `rope_scaling` (transformers 4) goes before `rope_parameters` (transformers 5); a value inside either goes before
    the same key at the top level, as in transformers.

    Args:
      config: the config of a folder.
      types: rope types of the family.
      default_fraction: partial_rotary_factor where none is given; None when the family turns the whole head.
      max_length: context that the model is to serve, for LongRoPE's choice of table; None = the config's.
    """
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(field) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{field}={rope!r} must be an object")
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if "original_max_position_embeddings" in config and kind in ("su", "yarn"):
        kind = "longrope"  # Phi-3's names for it; no other family has this field at the top level
    check_choice(f"{field}['rope_type']", kind, types)
    check_keys(f"{field} of type {kind!r}", rope, (*COMMON, *KEYS[kind]))
    theta = rope.get("rope_theta", config.get("rope_theta") or 10000.0)
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if default_fraction is None:
        if fraction not in (None, 1, 1.0):
            raise ValueError(f"partial_rotary_factor={fraction!r} is not supported by this model_type; allowed: 1.0")
        fraction = 1.0
    elif fraction is None:
        fraction = default_fraction
    try:
        scaling = _scaling(kind, rope, config, max_length)
    except KeyError as error:
        raise ValueError(f"{field} of type {kind!r} lacks {error}") from error
    return {"rope_theta": float(theta), "rope_fraction": float(fraction), "rope_scaling": scaling}


def _scaling(kind: str, rope: dict[str, Any], config: Mapping[str, Any], max_length: int | None) -> Scaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(float(rope["factor"]))
    full = config["max_position_embeddings"]
    # Phi-3 keeps the context of pretraining at the top level, where it goes first.
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings", full)
    if kind == "llama3":
        return Llama3(float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), original)
    if kind == "yarn":
        factor = float(rope.get("factor", full / original))
        return YaRN(
            factor,
            original,
            beta_fast=float(rope.get("beta_fast") or 32.0),
            beta_slow=float(rope.get("beta_slow") or 1.0),
            attention_factor=_yarn_attention_factor(rope, factor),
            truncate=bool(rope.get("truncate", True)),
        )
    factor = float(rope.get("factor", full / original))
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRoPE(
        short_factor=tuple(float(f) for f in rope["short_factor"]),
        long_factor=tuple(float(f) for f in rope["long_factor"]),
        original_max_length=original,
        max_length=full if max_length is None else max_length,
        attention_factor=float(attention_factor),
    )


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float | None:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return None

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])


def write(options: Mapping[str, Any], *, partial: bool, original_at_top: bool) -> dict[str, Any]:
    """The inverse of `read`: {"rope_parameters": ...}, with Phi-3's top-level key where `original_at_top`."""
    scaling = options["rope_scaling"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": options["rope_theta"]}
    if partial:
        rope["partial_rotary_factor"] = options["rope_fraction"]
    config: dict[str, Any] = {"rope_parameters": rope}
    if scaling is None:
        return config
    rope["rope_type"] = TYPE_OF[type(scaling)]
    if isinstance(scaling, Linear):
        rope["factor"] = scaling.factor
        return config
    rope["original_max_position_embeddings"] = scaling.original_max_length
    if isinstance(scaling, Llama3):
        rope |= {
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    elif isinstance(scaling, YaRN):
        rope |= {
            "factor": scaling.factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
        if scaling.attention_factor is not None:
            rope["attention_factor"] = scaling.attention_factor
    else:
        rope |= {
            "short_factor": list(scaling.short_factor),
            "long_factor": list(scaling.long_factor),
            "attention_factor": scaling.attention_factor,
        }
        if original_at_top:
            config["original_max_position_embeddings"] = scaling.original_max_length
    return config


def lacks(options: Mapping[str, Any], *, types: tuple[str, ...], partial: bool) -> list[str]:
    """What a family with these rope types cannot express of some options."""
    scaling = options["rope_scaling"]
    problems = []
    kind = "default" if scaling is None else TYPE_OF[type(scaling)]
    if kind not in types:
        problems.append(f"rope_scaling={kind}")
    if options["rope_fraction"] != 1.0 and not partial:
        problems.append(f"rope_fraction={options['rope_fraction']}")
    if isinstance(scaling, LongRoPE):
        served = scaling.max_length > scaling.original_max_length
        if served != (options["max_length"] > scaling.original_max_length):
            problems.append(f"rope_scaling.max_length={scaling.max_length} with max_length={options['max_length']}")
    return problems

"""The sizes of xLSTM in Hugging Face configs: factors of the width there, widths here."""

import math
from collections.abc import Mapping
from typing import Any

# Kernels, chunks, precisions and what is returned: how the function is computed.
IGNORED = """
autocast_kernel_dtype chunk_size chunkwise_kernel force_bos_token_insert inference_state_dtype max_inference_chunksize
mode norm_reduction_force_float32 return_last_states sequence_kernel step_kernel
"""
# Tensor in a block, leaf, form.
TENSORS: tuple[tuple[str, str, str], ...] = (
    ("norm_mlstm.weight", "{mlstm}/norm/scale", "vector"),
    ("norm_mlstm.bias", "{mlstm}/norm/bias", "vector"),
    *(
        (f"mlstm_layer.{theirs}.{kind}", f"{{mlstm}}/mixer/{ours}{suffix}", form)
        for theirs, ours in (
            ("q", "q"),
            ("k", "k"),
            ("v", "v"),
            ("ogate_preact", "output_gate"),
            ("igate_preact", "input_gate"),
            ("fgate_preact", "forget_gate"),
            ("out_proj", "out"),
        )
        for kind, suffix, form in (("weight", "", "matrix"), ("bias", "_bias", "vector"))
    ),
    ("mlstm_layer.multihead_norm.weight", "{mlstm}/mixer/norm/scale", "vector"),
    ("mlstm_layer.multihead_norm.bias", "{mlstm}/mixer/norm/bias", "vector"),
    ("norm_ffn.weight", "{mlp}/norm/scale", "vector"),
    ("norm_ffn.bias", "{mlp}/norm/bias", "vector"),
    *(
        (f"ffn.{theirs}.{kind}", f"{{mlp}}/mixer/{ours}{suffix}", form)
        for theirs, ours in (("proj_up_gate", "gate"), ("proj_up", "up"), ("proj_down", "down"))
        for kind, suffix, form in (("weight", "", "matrix"), ("bias", "_bias", "vector"))
    ),
)
FFN_FACTOR, FFN_MULTIPLE = 2.667, 64
# Fields that `read` and `write` know, and their defaults; None where another name of the size may stand for it.
SIZES: Mapping[str, Any] = {
    "hidden_size": None,
    "embedding_dim": None,
    "num_hidden_layers": None,
    "num_blocks": None,
    "qk_dim_factor": 0.5,
    "v_dim_factor": 1.0,
    "head_dim": None,  # of the values, in released configs
    "ffn_proj_factor": FFN_FACTOR,
    "ffn_round_up_to_multiple_of": FFN_MULTIPLE,
}
# {option: (two names of a size, default)} and {factor of the width: width of a head}
NAMES = {"width": ("hidden_size", "embedding_dim", 4096), "layers": ("num_hidden_layers", "num_blocks", 32)}
FACTORS = {"qk_dim_factor": "key_width", "v_dim_factor": "value_width"}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options width, layers, key_width, value_width and hidden of a config that is complete with defaults.

    Raises:
      ValueError: two names of one size disagree, or a size that the heads cannot share; the message names the field.
    """
    options: dict[str, Any] = {}
    for option, (name, twin, default) in NAMES.items():
        values = {config[field] for field in (name, twin)} - {None} or {default}
        if len(values) > 1 or type(next(iter(values))) is not int:
            raise ValueError(f"xlstm config: {name}={config[name]!r} and {twin}={config[twin]!r} must be one integer")
        options[option] = values.pop()
    width, heads = options["width"], config["num_heads"]
    for factor, option in FACTORS.items():
        total = int(width * config[factor])
        if heads < 1 or total < heads or total % heads:
            raise ValueError(
                f"xlstm config: num_heads={heads} must divide {factor}={config[factor]} * {width} = {total}"
            )
        options[option] = total // heads
    if config["head_dim"] not in (None, options["value_width"]):
        raise ValueError(
            f"xlstm config: head_dim={config['head_dim']!r} must be that of the values, {options['value_width']}"
        )
    multiple = config["ffn_round_up_to_multiple_of"]
    if multiple < 1:
        raise ValueError(f"xlstm config: ffn_round_up_to_multiple_of={multiple} must be >= 1")
    options["hidden"] = _round_up(width * config["ffn_proj_factor"], multiple)
    return options


def _round_up(size: float, multiple: int) -> int:
    # As transformers does it: a fraction above a multiple of it is dropped, and not rounded up.
    return int((size + multiple - 1) // multiple * multiple)


def write(options: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `read`, for options without None."""
    width, heads = options["width"], options["heads"]
    config: dict[str, Any] = {}
    for option, (name, twin, _) in NAMES.items():
        config |= {name: options[option], twin: options[option]}
    for factor, option in FACTORS.items():
        config[factor] = _factor(options[option] * heads, width, SIZES[factor])
    if _round_up(width * FFN_FACTOR, FFN_MULTIPLE) == options["hidden"]:
        return config | {"ffn_proj_factor": FFN_FACTOR, "ffn_round_up_to_multiple_of": FFN_MULTIPLE}
    return config | {"ffn_proj_factor": _factor(options["hidden"], width), "ffn_round_up_to_multiple_of": 1}


def _factor(size: int, width: int, default: float = math.nan) -> float:
    """The factor f, `default` if it will do, with int(width f) == size."""
    for factor in (default, size / width):
        if math.isfinite(factor) and int(width * factor) == size:
            return factor
    return math.nextafter(size / width, math.inf)


def lacks(options: Mapping[str, Any]) -> list[str]:
    """What a config cannot say of some options."""
    return [f"{name}=None" for name in ("gate_soft_cap", "logit_soft_cap") if options[name] is None]

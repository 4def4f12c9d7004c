"""The model types of flash-linear-attention (github.com/fla-org): GLA, RetNet, HGRN and HGRN2."""

from collections.abc import Mapping
from typing import Any

from zoo.interop.hf_family import Field, HFFamily, Rule

LIBRARY = "flash-linear-attention"

# Choices of kernels; sizes that play no part without short convolutions.
_IGNORED = frozenset(
    {"attn_mode", "conv_size", "share_conv_kernel", "use_l2warp", "fuse_swiglu"}
    | {"fuse_cross_entropy", "fuse_linear_cross_entropy"}
)
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("swish",),
    "use_short_conv": (False,),
    "attn": (None,),
    "attnres_block_size": (None,),
    "fuse_norm": (True,),  # without, tensors have other names
}
_ATTENTION_REQUIRED: Mapping[str, tuple[Any, ...]] = {**_REQUIRED, "use_output_gate": (True,)}


def _decoder(hidden_ratio: float = 4.0) -> dict[str, Field]:
    """The fields that every model type has."""
    return {
        "vocab_size": Field(32000, ("vocab_size",)),
        "hidden_size": Field(2048, ("width",)),
        "num_hidden_layers": Field(24, ("layers",)),
        "hidden_ratio": Field(hidden_ratio, ("hidden_ratio",)),
        "intermediate_size": Field(None, ("hidden",)),
        "norm_eps": Field(1e-6, ("norm_eps",)),
        "max_position_embeddings": Field(2048, ("max_length",)),
        "initializer_range": Field(0.02, ("init_std",)),
        "tie_word_embeddings": Field(False, ("tied",)),
    }


def _attention(heads: int, expand_k: float, expand_v: float) -> dict[str, Field]:
    """The fields of a mixer with a matrix-valued state."""
    return {
        "num_heads": Field(heads, ("heads",)),
        "num_kv_heads": Field(None),
        "expand_k": Field(expand_k, ("expand_k",)),
        "expand_v": Field(expand_v, ("expand_v",)),
        "feature_map": Field(None, ("feature_map",), {None: "identity", "relu": "relu"}),
        "elementwise_affine": Field(True, ("output_norm_scale",)),
    }


def _rules(mixer: str, names: Mapping[str, str], norm: str) -> tuple[Rule, ...]:
    """Tensors of a model; `names` {projection: leaf of the mixer}, `norm` the name of its output's norm."""
    layer, leaf = "model.layers.{layer}", f"{{{mixer}}}/mixer"
    return (
        Rule("model.embeddings.weight", ("embedding",), "same"),
        Rule("model.norm.weight", ("final_norm/scale",), "vector"),
        Rule("lm_head.weight", ("head",), "matrix"),
        Rule(f"{layer}.attn_norm.weight", (f"{{{mixer}}}/norm/scale",), "vector"),
        Rule(f"{layer}.mlp_norm.weight", ("{mlp}/norm/scale",), "vector"),
        *(Rule(f"{layer}.attn.{name}.weight", (f"{leaf}/{path}",), "matrix") for name, path in names.items()),
        Rule(f"{layer}.attn.o_proj.weight", (f"{leaf}/o",), "matrix"),
        Rule(f"{layer}.attn.{norm}.weight", (f"{leaf}/norm/scale",), "vector"),
        *(
            Rule(f"{layer}.mlp.{name}_proj.weight", (f"{{mlp}}/mixer/{name}",), "matrix")
            for name in ("gate", "up", "down")
        ),
    )


_MIXER = "gated_linear_attention"
_PROJECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "g_proj": "gate"}
_RETNET_RULES = _rules(_MIXER, _PROJECTIONS, "g_norm_swish_gate")
_GLA_RULES = (
    *_rules(_MIXER, {**_PROJECTIONS, "gk_proj.0": "decay_down", "gk_proj.1": "decay_up"}, "g_norm_swish_gate"),
    Rule("model.layers.{layer}.attn.gk_proj.1.bias", (f"{{{_MIXER}}}/mixer/decay_bias",), "vector"),
)


def _hgrn_rules(mixer: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    bounds = Rule("model.lower_bounds", (f"{{{mixer}}}/mixer/lower_bound",), "stacked")
    return (*_rules(mixer, names, "g_norm"), bounds)


def _read_attention(config: Mapping[str, Any]) -> dict[str, Any]:
    heads, kv_heads = config["num_heads"], config["num_kv_heads"]
    if kv_heads not in (None, heads):
        raise ValueError(f"num_kv_heads={kv_heads} is not supported; allowed: null or num_heads={heads}")
    return {}


def _read_hgrn2(config: Mapping[str, Any]) -> dict[str, Any]:
    heads, width, ratio = config["num_heads"], config["hidden_size"], config["expand_ratio"]
    if heads not in (None, width // ratio):
        raise ValueError(f"num_heads={heads} must be null or hidden_size / expand_ratio = {width} / {ratio}")
    return {}


def _read_nothing(config: Mapping[str, Any]) -> dict[str, Any]:
    del config
    return {}


def _write_nothing(options: Mapping[str, Any]) -> dict[str, Any]:
    del options
    return {}


def _lacks_state_width(options: Mapping[str, Any]) -> list[str]:
    return ["state_width=None"] if options["state_width"] is None else []


FAMILIES: tuple[HFFamily, ...] = (
    HFFamily(
        "gla",
        "GLAForCausalLM",
        "gated_linear_attention",
        {**_decoder(), **_attention(4, 0.5, 1.0)},
        _GLA_RULES,
        fixed={"decay": "channel", "output_gate": True, "rope_theta": None},
        required={**_ATTENTION_REQUIRED, "clamp_min": (None,), "use_gk": (True,), "use_gv": (False,)},
        ignored=_IGNORED,
        read=_read_attention,
        write=_write_nothing,
        library=LIBRARY,
    ),
    HFFamily(
        "retnet",
        "RetNetForCausalLM",
        "gated_linear_attention",
        {**_decoder(hidden_ratio=2.0), **_attention(8, 1.0, 2.0)},
        _RETNET_RULES,
        fixed={"decay": "fixed", "output_gate": True, "rope_theta": 10000.0},
        required=_ATTENTION_REQUIRED,
        ignored=_IGNORED,
        read=_read_attention,
        write=_write_nothing,
        library=LIBRARY,
    ),
    HFFamily(
        "hgrn",
        "HGRNForCausalLM",
        "hgrn",
        {**_decoder(), "use_lower_bound": Field(True, ("lower_bound",))},
        _hgrn_rules("hgrn", {"i_proj": "i", "f_proj": "f", "g_proj": "g"}),
        fixed={"state_width": None, "inner": None, "output_norm_eps": None},
        required={**_REQUIRED, "expand_ratio": (1,), "elementwise_affine": (True,)},
        ignored=_IGNORED,
        read=_read_nothing,
        write=_write_nothing,
        library=LIBRARY,
    ),
    HFFamily(
        "hgrn2",
        "HGRN2ForCausalLM",
        "hgrn",
        {
            **_decoder(),
            "use_lower_bound": Field(True, ("lower_bound",)),
            "expand_ratio": Field(128, ("state_width",)),
            "num_heads": Field(None),
        },
        _hgrn_rules("hgrn2", {"q_proj": "q", "f_proj": "f", "i_proj": "i"}),
        fixed={"inner": None, "output_norm_eps": 1e-5},  # the class does not pass norm_eps on
        required={**_REQUIRED, "elementwise_affine": (True,)},
        ignored=_IGNORED,
        read=_read_hgrn2,
        write=_write_nothing,
        lacks=_lacks_state_width,
        library=LIBRARY,
    ),
)

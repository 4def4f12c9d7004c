"""What purezoo knows of Hugging Face model types: config fields and tensor names, as data for both directions.

A config field is used, must have a given value, is ignored because it does not change the function (dropout rates,
token ids, initialisation, caching), or is an error. Dropout acts in training alone and the zoo's models have none.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from zoo.core.registry import check_choice, nearest
from zoo.interop import hf_rope, hf_xlstm


@dataclasses.dataclass(frozen=True)
class Field:
    """A used config field.

    Attributes:
      default: of transformers, where the field is absent.
      options: the zoo options that it sets, all to the same value; empty for fields that code reads.
      values: {Hugging Face value: zoo value} where they differ; the first of several names is the one written.
    """

    default: Any
    options: tuple[str, ...] = ()
    values: Mapping[Any, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """A tensor name and what it holds.

    Attributes:
      key: template with {layer} and, for one tensor per head, {head}.
      paths: leaves of the zoo's tree, concatenated along the tensor's first axis; {attention}, {mlp}, {mamba} and
        {mlstm} stand for "layers/<sublayer>". A rule holds where the model has its leaves.
      form: "matrix", [inputs..., outputs...] here and [outputs, inputs] there; "vector", flattened; "same"; "conv",
        [W, Di] here and [Di, 1, W] there.
    """

    key: str
    paths: tuple[str, ...]
    form: str


@dataclasses.dataclass(frozen=True)
class HFFamily:
    """One model_type.

    Attributes:
      model_type, architecture: names in config.json.
      family: name of the zoo family.
      fields: used config fields.
      fixed: zoo options that the architecture fixes.
      required: {field: allowed values} beside the generic ones.
      ignored: fields that do not change the function, beside the generic ones.
      rules: tensors.
      rope_types: rope types that transformers runs for this family.
      rope_fraction: default of partial_rotary_factor; None when the whole head turns.
      window: None, "one" for all layers, or "layers".
    """

    model_type: str
    architecture: str
    family: str
    fields: Mapping[str, Field]
    rules: tuple[Rule, ...]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    required: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn", "longrope")
    rope_fraction: float | None = None
    window: str | None = None


_GENERIC = """
_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation auto_map
bos_token_id chunk_size_feed_forward decoder_start_token_id dtype eos_token_id finetuning_task forced_bos_token_id
forced_eos_token_id id2label is_llama_config keys_to_ignore_at_inference label2id model_type name_or_path num_labels
output_attentions output_hidden_states pad_token_id prefix pretraining_tp problem_type return_dict sep_token_id
task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers.js_config
transformers_version unk_token_id use_bfloat16 use_cache
"""
_GENERATION = """
bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
_DROPOUT = "attention_dropout embd_pdrop embedding_dropout hidden_dropout resid_pdrop residual_dropout"
# d_inner, d_model and n_layer repeat other fields in converted checkpoints.
_MAMBA = """
initializer_range rescale_prenorm_residual time_step_floor time_step_init_scheme time_step_max time_step_min
time_step_scale use_associative_scan use_mambapy fused_add_norm pad_vocab_size_multiple d_inner d_model n_layer
"""
IGNORED = frozenset((_GENERIC + _GENERATION + _DROPOUT).split())
REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "rope_interleaved": (False, None),
}
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
}
# Read and written by hf_rope.
_ROPE = {
    "rope_theta": Field(None),
    "rope_scaling": Field(None),
    "rope_parameters": Field(None),
    "partial_rotary_factor": Field(None),
}


def _decoder(
    vocab_size: int,
    width: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int | None,
    max_length: int,
    *,
    activation: str = "silu",
    init_std: float = 0.02,
    tied: bool = False,
) -> dict[str, Field]:
    """The fields that every decoder has, with the defaults of one model_type."""
    return {
        "vocab_size": Field(vocab_size, ("vocab_size",)),
        "hidden_size": Field(width, ("width",)),
        "intermediate_size": Field(hidden, ("hidden",)),
        "num_hidden_layers": Field(layers, ("layers",)),
        "num_attention_heads": Field(heads, ("heads",)),
        "num_key_value_heads": Field(kv_heads, ("kv_heads",)),
        "head_dim": Field(None, ("head_width",)),
        "max_position_embeddings": Field(max_length, ("max_length",)),
        "hidden_act": Field(activation, ("activation",), ACTIVATIONS),
        "initializer_range": Field(init_std, ("init_std",)),
        "tie_word_embeddings": Field(tied, ("tied",)),
        **_ROPE,
    }


_OUTSIDE = (
    Rule("model.embed_tokens.weight", ("embedding",), "same"),
    Rule("model.norm.weight", ("final_norm/scale",), "vector"),
    Rule("model.norm.bias", ("final_norm/bias",), "vector"),
    Rule("lm_head.weight", ("head",), "matrix"),
)
_PRE_NORMS = tuple(
    Rule(f"model.layers.{{layer}}.{name}.{kind}", (f"{{{sublayer}}}/norm/{leaf}",), "vector")
    for name, sublayer in (("input_layernorm", "attention"), ("post_attention_layernorm", "mlp"))
    for kind, leaf in (("weight", "scale"), ("bias", "bias"))
)
_POST_NORMS = tuple(
    Rule(f"model.layers.{{layer}}.{name}.weight", (f"{{{sublayer}}}/post_norm/scale",), "vector")
    for name, sublayer in (("post_attention_layernorm", "attention"), ("post_feedforward_layernorm", "mlp"))
)


def _projections(module: str, sublayer: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Weight and bias of nn.Linear layers {their name: leaf}."""
    rules = []
    for name, leaf in names.items():
        key, path = f"model.layers.{{layer}}.{module}.{name}", f"{{{sublayer}}}/mixer/{leaf}"
        rules += [Rule(f"{key}.weight", (path,), "matrix"), Rule(f"{key}.bias", (f"{path}_bias",), "vector")]
    return tuple(rules)


_OUT = _projections("self_attn", "attention", {"o_proj": "o"})
_ATTENTION = (*_projections("self_attn", "attention", {"q_proj": "q", "k_proj": "k", "v_proj": "v"}), *_OUT)
_GATED = _projections("mlp", "mlp", {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"})
_LLAMA_RULES = (*_OUTSIDE, *_PRE_NORMS, *_ATTENTION, *_GATED)
_FUSED = (
    Rule(
        "model.layers.{layer}.self_attn.qkv_proj.weight",
        ("{attention}/mixer/q", "{attention}/mixer/k", "{attention}/mixer/v"),
        "matrix",
    ),
    Rule("model.layers.{layer}.mlp.gate_up_proj.weight", ("{mlp}/mixer/gate", "{mlp}/mixer/up"), "matrix"),
    *_projections("mlp", "mlp", {"down_proj": "down"}),
)
_MAMBA_RULES = (
    Rule("backbone.embeddings.weight", ("embedding",), "same"),
    Rule("backbone.norm_f.weight", ("final_norm/scale",), "vector"),
    Rule("lm_head.weight", ("head",), "matrix"),
    *(
        Rule(f"backbone.layers.{{layer}}.{key}", (f"{{mamba}}/{path}",), form)
        for key, path, form in (
            ("norm.weight", "norm/scale", "vector"),
            ("mixer.in_proj.weight", "mixer/in_proj", "matrix"),
            ("mixer.in_proj.bias", "mixer/in_bias", "vector"),
            ("mixer.conv1d.weight", "mixer/conv", "conv"),
            ("mixer.conv1d.bias", "mixer/conv_bias", "vector"),
            ("mixer.x_proj.weight", "mixer/x_proj", "matrix"),
            ("mixer.dt_proj.weight", "mixer/dt_proj", "matrix"),
            ("mixer.dt_proj.bias", "mixer/dt_bias", "vector"),
            ("mixer.A_log", "mixer/A_log", "same"),
            ("mixer.D", "mixer/D", "vector"),
            ("mixer.out_proj.weight", "mixer/out_proj", "matrix"),
            ("mixer.out_proj.bias", "mixer/out_bias", "vector"),
        )
    ),
)
_XLSTM_RULES = (
    Rule("backbone.embeddings.weight", ("embedding",), "same"),
    Rule("backbone.out_norm.weight", ("final_norm/scale",), "vector"),
    Rule("lm_head.weight", ("head",), "matrix"),
    *(Rule(f"backbone.blocks.{{layer}}.{key}", (path,), form) for key, path, form in hf_xlstm.TENSORS),
)
_BIASES = ("qkv_bias", "out_bias")

HF_FAMILIES: Mapping[str, HFFamily] = {
    family.model_type: family
    for family in (
        HFFamily(
            "llama",
            "LlamaForCausalLM",
            "dense",
            {
                **_decoder(32000, 4096, 11008, 32, 32, None, 2048),
                "rms_norm_eps": Field(1e-6, ("norm_eps",)),
                "attention_bias": Field(False, _BIASES),
                "mlp_bias": Field(False, ("mlp_bias",)),
            },
            _LLAMA_RULES,
            fixed={"norm": "rms", "norm_placement": "pre", "gated": True},
        ),
        HFFamily(
            "mistral",
            "MistralForCausalLM",
            "dense",
            {
                **_decoder(32000, 4096, 14336, 32, 32, 8, 4096 * 32),
                "rms_norm_eps": Field(1e-6, ("norm_eps",)),
                "sliding_window": Field(4096),
            },
            _LLAMA_RULES,
            fixed={"norm": "rms", "norm_placement": "pre", "gated": True},
            window="one",
        ),
        HFFamily(
            "qwen2",
            "Qwen2ForCausalLM",
            "dense",
            {
                **_decoder(151936, 4096, 22016, 32, 32, 32, 32768),
                "rms_norm_eps": Field(1e-6, ("norm_eps",)),
                "use_sliding_window": Field(False),
                "sliding_window": Field(4096),
                "max_window_layers": Field(28),
                "layer_types": Field(None),
            },
            _LLAMA_RULES,
            fixed={"norm": "rms", "norm_placement": "pre", "gated": True, "qkv_bias": True},
            required={"use_mrope": (False, None)},
            window="layers",
        ),
        HFFamily(
            "phi3",
            "Phi3ForCausalLM",
            "dense",
            {
                **_decoder(32064, 3072, 8192, 32, 32, None, 4096),
                "rms_norm_eps": Field(1e-5, ("norm_eps",)),
                "original_max_position_embeddings": Field(4096),
                "sliding_window": Field(None),
            },
            (*_OUTSIDE, *_PRE_NORMS, *_OUT, *_FUSED),
            fixed={"norm": "rms", "norm_placement": "pre", "gated": True},
            required={"attention_bias": (False,), "mlp_bias": (False,)},
            rope_types=("default", "longrope"),
            rope_fraction=1.0,
            window="one",
        ),
        HFFamily(
            "starcoder2",
            "Starcoder2ForCausalLM",
            "dense",
            {
                **_decoder(
                    49152, 3072, 12288, 30, 24, 2, 4096, activation="gelu_pytorch_tanh", init_std=0.018042, tied=True
                ),
                "norm_epsilon": Field(1e-5, ("norm_eps",)),
                "sliding_window": Field(None),
                "use_bias": Field(True, (*_BIASES, "mlp_bias")),
            },
            (*_OUTSIDE, *_PRE_NORMS, *_ATTENTION, *_projections("mlp", "mlp", {"c_fc": "up", "c_proj": "down"})),
            fixed={"norm": "layer", "norm_placement": "pre", "gated": False},
            required={"mlp_type": ("default",), "norm_type": ("layer_norm",)},
            window="one",
        ),
        HFFamily(
            "stablelm",
            "StableLmForCausalLM",
            "dense",
            {
                **_decoder(50304, 2560, 6912, 32, 32, 32, 4096),
                "layer_norm_eps": Field(1e-5, ("norm_eps",)),
                "use_qkv_bias": Field(False, ("qkv_bias",)),
                "qk_layernorm": Field(False, ("qk_norm",), {False: None, True: "per_head"}),
            },
            (
                *_LLAMA_RULES,
                Rule(
                    "model.layers.{layer}.self_attn.q_layernorm.norms.{head}.weight",
                    ("{attention}/mixer/q_norm/scale",),
                    "vector",
                ),
                Rule(
                    "model.layers.{layer}.self_attn.k_layernorm.norms.{head}.weight",
                    ("{attention}/mixer/k_norm/scale",),
                    "vector",
                ),
            ),
            fixed={"norm": "layer", "norm_placement": "pre", "gated": True},
            required={"use_parallel_residual": (False,)},
            rope_fraction=0.25,
        ),
        HFFamily(
            "olmo",
            "OlmoForCausalLM",
            "dense",
            {
                **_decoder(50304, 4096, 11008, 32, 32, None, 2048),
                "attention_bias": Field(False, _BIASES),
                "clip_qkv": Field(None, ("clip_qkv",)),
            },
            _LLAMA_RULES,
            fixed={"norm": "nonparametric", "norm_eps": 1e-5, "norm_placement": "pre", "gated": True},
        ),
        HFFamily(
            "olmo2",
            "Olmo2ForCausalLM",
            "dense",
            {
                **_decoder(50304, 4096, 11008, 32, 32, None, 2048),
                "attention_bias": Field(False, _BIASES),
                "rms_norm_eps": Field(1e-5, ("norm_eps",)),
            },
            (
                *_OUTSIDE,
                *_POST_NORMS,
                *_ATTENTION,
                *_GATED,
                Rule("model.layers.{layer}.self_attn.q_norm.weight", ("{attention}/mixer/q_norm/scale",), "vector"),
                Rule("model.layers.{layer}.self_attn.k_norm.weight", ("{attention}/mixer/k_norm/scale",), "vector"),
            ),
            fixed={"norm": "rms", "norm_placement": "post", "gated": True, "qk_norm": "full"},
        ),
        HFFamily(
            "mamba",
            "MambaForCausalLM",
            "mamba",
            {
                "vocab_size": Field(50280, ("vocab_size",)),
                "hidden_size": Field(768, ("width",)),
                "num_hidden_layers": Field(32, ("layers",)),
                "state_size": Field(16, ("state",)),
                "conv_kernel": Field(4, ("conv_width",)),
                "use_conv_bias": Field(True, ("conv_bias",)),
                "use_bias": Field(False, ("bias",)),
                "layer_norm_epsilon": Field(1e-5, ("norm_eps",)),
                "tie_word_embeddings": Field(True, ("tied",)),
                "expand": Field(2),
                "intermediate_size": Field(None),
                "time_step_rank": Field("auto"),
                "residual_in_fp32": Field(True),
            },
            _MAMBA_RULES,
            required={"hidden_act": ("silu", "swish"), "rms_norm": (True,), "ssm_cfg": ({}, None)},
            ignored=frozenset(_MAMBA.split()),
        ),
        HFFamily(
            "xlstm",
            "xLSTMForCausalLM",
            "xlstm",
            {
                "vocab_size": Field(50304, ("vocab_size",)),
                "num_heads": Field(8, ("heads",)),
                "use_bias": Field(False, ("bias",)),
                "norm_eps": Field(1e-6, ("norm_eps",)),
                "eps": Field(1e-6, ("cell_eps",)),
                "gate_soft_cap": Field(15.0, ("gate_soft_cap",)),
                "output_logit_soft_cap": Field(30.0, ("logit_soft_cap",)),
                **{name: Field(default) for name, default in hf_xlstm.SIZES.items()},
            },
            _XLSTM_RULES,
            fixed={"tied": False},
            required={"tie_word_embeddings": (False,), "weight_mode": ("single",), "add_out_norm": (True,)},
            ignored=frozenset(hf_xlstm.IGNORED.split()),
        ),
    )
}


def check_fields(family: HFFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """The used fields of a config, complete with defaults.

    Raises:
      ValueError: a field that is unknown, or a value that is not supported; the message names what is allowed.
    """
    required = {**REQUIRED, **family.required}
    ignored = IGNORED | family.ignored
    for name, value in config.items():
        where = f"{family.model_type} config: {name}={value!r}"
        if name in required:
            if value not in required[name]:
                allowed = ", ".join(repr(v) for v in required[name])
                raise ValueError(f"{where} is not supported; allowed: {allowed}")
        elif name in family.fields:
            _check_type(where, value, family.fields[name].default)
        elif name not in ignored:
            raise ValueError(f"{where} is not supported; {nearest(name, family.fields)}")
    return {name: config.get(name, field.default) for name, field in family.fields.items()}


def _check_type(where: str, value: Any, default: Any) -> None:
    if value is None or default is None:
        return
    if isinstance(default, bool) or isinstance(value, bool):
        good = isinstance(value, bool) and isinstance(default, bool)
    elif isinstance(default, int):
        good = isinstance(value, int)
    elif isinstance(default, float):
        good = isinstance(value, int | float)
    else:
        good = isinstance(value, str | int)
    if not good:
        raise ValueError(f"{where} must be a {type(default).__name__}")


def read_options(family: HFFamily, config: Mapping[str, Any], max_length: int | None = None) -> dict[str, Any]:
    """Options of the zoo family for a config; see `hf_rope.read` for `max_length`."""
    config = check_fields(family, config)
    options: dict[str, Any] = dict(family.fixed)
    for name, field in family.fields.items():
        value = config[name]
        if field.values is not None:
            check_choice(f"{family.model_type} config: {name}", value, field.values)
            value = field.values[value]
        elif value is None and field.default is not None and field.options and name != "num_key_value_heads":
            raise ValueError(f"{family.model_type} config: {name} is null; give a value")
        options |= dict.fromkeys(field.options, value)
    if family.family == "mamba":
        inner, rank = config["intermediate_size"], config["time_step_rank"]
        if rank != "auto" and not isinstance(rank, int):
            raise ValueError(f"mamba config: time_step_rank={rank!r} is not supported; allowed: 'auto' or an integer")
        options["inner"] = int(config["expand"] * config["hidden_size"]) if inner is None else inner
        options["dt_rank"] = None if rank == "auto" else rank
        # Not in float32, the residual stream has the compute dtype.
        options["residual_dtype"] = "float32" if config["residual_in_fp32"] else None
        return options
    if family.family == "xlstm":
        return options | hf_xlstm.read(config)
    options |= hf_rope.read(
        config, types=family.rope_types, default_fraction=family.rope_fraction, max_length=max_length
    )
    if family.model_type == "stablelm" and config["head_dim"] not in (None, options["width"] // options["heads"]):
        raise ValueError(f"stablelm config: head_dim={config['head_dim']} must be hidden_size / num_attention_heads")
    options["window"] = _read_window(family, config)
    return options


def _read_window(family: HFFamily, config: Mapping[str, Any]) -> int | tuple[int | None, ...] | None:
    """The `window` option: one for all layers, or the shortest cycle."""
    if family.window is None:
        return None
    if family.window == "one":
        return config["sliding_window"]
    layers, window = config["num_hidden_layers"], config["sliding_window"] if config["use_sliding_window"] else None
    types = config["layer_types"]
    if types is None:
        sliding = [window is not None and layer >= config["max_window_layers"] for layer in range(layers)]
    else:
        if not isinstance(types, list) or len(types) != layers:
            raise ValueError(f"layer_types={types!r} must be a list of num_hidden_layers={layers} names")
        for kind in types:
            check_choice("layer_types", kind, ("full_attention", "sliding_attention"))
        sliding = [kind == "sliding_attention" for kind in types]
        if any(sliding) and window is None:
            raise ValueError("layer_types has 'sliding_attention', but use_sliding_window or sliding_window is not set")
    windows = tuple(window if slides else None for slides in sliding)
    cycle = next(c for c in range(1, layers + 1) if layers % c == 0 and windows[:c] * (layers // c) == windows)
    return windows[0] if cycle == 1 else windows[:cycle]

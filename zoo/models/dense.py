"""One dense decoder for Llama, Mistral, Phi-3, Qwen2, StarCoder2, StableLM, OLMo, OLMo 2 and MiniCPM: options alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.core.registry import check_choice
from zoo.layers.norm import Norm
from zoo.layers.rotary import Rotary, Scaling
from zoo.mixers import MLP, Attention, QKNorm
from zoo.models.language_model import LanguageModelConfig, Sublayer
from zoo.models.model import FAMILIES, preset

NORMS: Mapping[str, dict[str, Any]] = {
    "rms": {"kind": "rms"},
    "layer": {"kind": "layer", "bias": True},
    "layer_without_bias": {"kind": "layer"},
    "nonparametric": {"kind": "layer", "scale": False},
}


@FAMILIES.register("dense")
def dense(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    hidden: int,
    kv_heads: int | None = None,
    head_width: int | None = None,
    activation: str = "silu",
    gated: bool = True,
    norm: str = "rms",
    norm_eps: float = 1e-5,
    norm_placement: str = "pre",
    qk_norm: str | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    rope_theta: float = 10000.0,
    rope_fraction: float = 1.0,
    rope_style: str = "half",
    rope_scaling: Scaling | None = None,
    window: int | Sequence[int | None] | None = None,
    causal: bool = True,
    clip_qkv: float | None = None,
    attention_scale: float | None = None,
    attention_soft_cap: float | None = None,
    logit_soft_cap: float | None = None,
    embedding_scale: float = 1.0,
    residual_scale: float = 1.0,
    logit_scale: float = 1.0,
    tied: bool = False,
    init_std: float = 0.02,
    max_length: int = 4096,
    dtype: str = "float32",
    param_dtype: str = "float32",
    residual_dtype: str = "float32",
    remat: str = "none",
) -> LanguageModelConfig:
    """x <- x + attention(norm(x)); x <- x + mlp(norm(x)), `layers` times.

    Args:
      kv_heads: None = heads. head_width: None = width / heads.
      activation, gated: see MLP.
      norm: "rms", "layer", "layer_without_bias" or "nonparametric".
      norm_placement: "pre", or "post" for x + norm(f(x)) (OLMo 2).
      qk_norm: None, "head", "per_head" or "full"; see QKNorm. Same kind of norm as the layers, without bias.
      qkv_bias, out_bias, mlp_bias: biases.
      rope_theta, rope_fraction, rope_style, rope_scaling: see Rotary.
      window: None, one window for all layers, or a cycle of windows whose length divides `layers`.
      causal: False = every token sees its whole document, as masked diffusion needs; such a model does not decode.
      embedding_scale, residual_scale, logit_scale, logit_soft_cap: see LanguageModelConfig.
      vocab_size, width, layers, heads, hidden, norm_eps, clip_qkv, attention_scale, attention_soft_cap, tied, init_std,
        max_length, dtype, param_dtype, residual_dtype, remat: see the mixers and LanguageModelConfig.
    """
    check_choice("norm", norm, NORMS)
    check_choice("norm_placement", norm_placement, ("pre", "post"))
    if head_width is None:
        if width % heads:
            raise ValueError(f"dense: heads={heads} must divide width={width}, or give head_width")
        head_width = width // heads
    windows = tuple(window) if isinstance(window, Sequence) else (window,)
    if not windows or layers % len(windows):
        raise ValueError(f"dense: the cycle of {len(windows)} windows must divide layers={layers}")
    layer_norm = Norm(eps=norm_eps, **NORMS[norm])
    mlp = MLP(hidden, activation, gated, mlp_bias, init_std=init_std, out_init_std=init_std)

    def sublayer(mixer: Any) -> Sublayer:
        if norm_placement == "pre":
            return Sublayer(mixer, norm=layer_norm)
        return Sublayer(mixer, norm=None, post_norm=layer_norm)

    pattern: list[Sublayer] = []
    for layer_window in windows:
        attention = Attention(
            heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            head_width=head_width,
            window=layer_window,
            rotary=Rotary(rope_theta, rope_fraction, rope_style, rope_scaling),
            scale=attention_scale,
            soft_cap=attention_soft_cap,
            qk_norm=None if qk_norm is None else QKNorm(Norm(layer_norm.kind, norm_eps), qk_norm),
            causal=causal,
            clip_qkv=clip_qkv,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            init_std=init_std,
            out_init_std=init_std,
        )
        pattern += [sublayer(attention), sublayer(mlp)]
    return LanguageModelConfig(
        vocab_size=vocab_size,
        width=width,
        pattern=tuple(pattern),
        repeats=layers // len(windows),
        final_norm=layer_norm,
        tied=tied,
        embedding_scale=embedding_scale,
        residual_scale=residual_scale,
        logit_scale=logit_scale,
        logit_soft_cap=logit_soft_cap,
        embedding_init_std=init_std,
        head_init_std=init_std,
        max_length=max_length,
        dtype=dtype,
        param_dtype=param_dtype,
        residual_dtype=residual_dtype,
        remat=remat,
    )


_LLAMA = {"vocab_size": 32000, "max_length": 4096}
_PHI3 = {"vocab_size": 32064, "max_length": 4096}
_QWEN2 = {"qkv_bias": True, "rope_theta": 1e6, "norm_eps": 1e-6, "max_length": 32768}
_STARCODER2 = {
    "vocab_size": 49152,
    "norm": "layer",
    "activation": "gelu_tanh",
    "gated": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "tied": True,
    "window": 4096,
    "max_length": 16384,
}
_MINICPM = {"embedding_scale": 12.0, "tied": True, "max_length": 4096}

# name, published millions, citation, options
_PRESETS: tuple[tuple[str, float | None, str, dict[str, Any]], ...] = (
    ("llama-135m", 134.5, "SmolLM2, arXiv:2502.02737",
     {"vocab_size": 49152, "width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "hidden": 1536, "tied": True,
      "rope_theta": 1e5, "max_length": 8192}),
    ("llama-200m", None, "LWM, arXiv:2402.08268",
     {**_LLAMA, "width": 1024, "layers": 14, "heads": 8, "hidden": 2048}),
    ("llama-1b", None, "LWM, arXiv:2402.08268",
     {**_LLAMA, "width": 2048, "layers": 22, "heads": 16, "hidden": 5504}),
    ("llama-3b", None, "LWM, arXiv:2402.08268",
     {**_LLAMA, "width": 3200, "layers": 26, "heads": 32, "hidden": 8640}),
    ("llama-7b", 6738.4, "Llama 2, arXiv:2307.09288",
     {**_LLAMA, "width": 4096, "layers": 32, "heads": 32, "hidden": 11008}),
    ("llama-13b", 13015.9, "Llama 2, arXiv:2307.09288",
     {**_LLAMA, "width": 5120, "layers": 40, "heads": 40, "hidden": 13824}),
    ("mistral-7b", 7241.7, "arXiv:2310.06825",
     {**_LLAMA, "width": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "hidden": 14336, "window": 4096,
      "max_length": 32768}),
    ("phi-3-mini", 3821.1, "arXiv:2404.14219",
     {**_PHI3, "width": 3072, "layers": 32, "heads": 32, "hidden": 8192, "window": 2047}),
    ("phi-3-medium", 13960.2, "arXiv:2404.14219",
     {**_PHI3, "width": 5120, "layers": 40, "heads": 40, "kv_heads": 10, "hidden": 17920, "window": 2047}),
    ("phi-4-mini", 3836.0, "arXiv:2503.01743",
     {**_PHI3, "vocab_size": 200064, "width": 3072, "layers": 32, "heads": 24, "kv_heads": 8, "hidden": 8192,
      "rope_fraction": 0.75, "tied": True}),
    ("qwen2-0.5b", 494.0, "arXiv:2407.10671",
     {**_QWEN2, "vocab_size": 151936, "width": 896, "layers": 24, "heads": 14, "kv_heads": 2, "hidden": 4864,
      "tied": True}),
    ("qwen2-1.5b", 1543.7, "arXiv:2407.10671",
     {**_QWEN2, "vocab_size": 151936, "width": 1536, "layers": 28, "heads": 12, "kv_heads": 2, "hidden": 8960,
      "tied": True}),
    ("qwen2-7b", 7615.6, "arXiv:2407.10671",
     {**_QWEN2, "vocab_size": 152064, "width": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "hidden": 18944}),
    ("qwen2-72b", 72706.2, "arXiv:2407.10671",
     {**_QWEN2, "vocab_size": 152064, "width": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "hidden": 29568}),
    ("starcoder2-3b", 3030.4, "arXiv:2402.19173",
     {**_STARCODER2, "width": 3072, "layers": 30, "heads": 24, "kv_heads": 2, "hidden": 12288,
      "rope_theta": 999999.4420358813, "init_std": 0.018042}),
    ("starcoder2-7b", 7173.9, "arXiv:2402.19173",
     {**_STARCODER2, "width": 4608, "layers": 32, "heads": 36, "kv_heads": 4, "hidden": 18432,
      "rope_theta": 1e6, "init_std": 0.018042}),
    ("starcoder2-15b", 15957.9, "arXiv:2402.19173",
     {**_STARCODER2, "width": 6144, "layers": 40, "heads": 48, "kv_heads": 4, "hidden": 24576,
      "rope_theta": 1e5, "tied": False, "init_std": 0.01275}),
    ("stable-code-3b", 2795.4, "Stable Code, arXiv:2404.01226",
     {"vocab_size": 50304, "width": 2560, "layers": 32, "heads": 32, "hidden": 6912, "norm": "layer",
      "rope_fraction": 0.25, "rope_theta": 1e6, "max_length": 16384}),
    ("olmo-7b", 6888.1, "arXiv:2402.00838",
     {"vocab_size": 50304, "width": 4096, "layers": 32, "heads": 32, "hidden": 11008, "norm": "nonparametric",
      "max_length": 2048}),
    ("olmo2-7b", 7298.6, "arXiv:2501.00656",
     {"vocab_size": 100352, "width": 4096, "layers": 32, "heads": 32, "hidden": 11008, "norm_placement": "post",
      "qk_norm": "full", "rope_theta": 5e5, "norm_eps": 1e-6}),
    ("minicpm-2.4b", None, "arXiv:2404.06395",
     {**_MINICPM, "vocab_size": 122753, "width": 2304, "layers": 40, "heads": 36, "hidden": 5760,
      "residual_scale": 1.4 / math.sqrt(40), "logit_scale": 256 / 2304}),
    ("minicpm-1.2b", None, "arXiv:2404.06395",
     {**_MINICPM, "vocab_size": 73440, "width": 1536, "layers": 52, "heads": 24, "kv_heads": 8, "hidden": 3840,
      "residual_scale": 1.4 / math.sqrt(52), "logit_scale": 256 / 1536}),
)  # fmt: skip

for _name, _millions, _citation, _options in _PRESETS:
    preset(_name, "dense", parameters=_millions, citation=_citation, **_options)

_TINY = {
    "vocab_size": 512,
    "width": 64,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "hidden": 192,
    "max_length": 512,
}

for _name, _options in (
    ("llama-tiny", {}),
    ("mistral-tiny", {"window": 128}),
    ("phi-3-tiny", {"window": 127, "kv_heads": 4}),
    ("phi-4-tiny", {"rope_fraction": 0.75, "tied": True}),
    ("qwen2-tiny", {"qkv_bias": True, "rope_theta": 1e6, "norm_eps": 1e-6, "tied": True}),
    ("starcoder2-tiny", {**_STARCODER2, "vocab_size": 512, "window": 128, "max_length": 512}),
    ("stablelm-tiny", {"norm": "layer", "rope_fraction": 0.25}),
    ("olmo-tiny", {"norm": "nonparametric", "clip_qkv": 8.0}),
    ("olmo2-tiny", {"norm_placement": "post", "qk_norm": "full"}),
    ("minicpm-tiny", {"embedding_scale": 12.0, "residual_scale": 0.7, "logit_scale": 0.25, "tied": True}),
):
    preset(_name, "dense", citation="a tiny variant for tests and examples", **{**_TINY, **_options})

# Grouped-query transformers with the vocabulary, width and depth of each Samba size; the feed-forward width makes the
# parameter count equal (within 0.3 %, tiny within 1 %).
_TWINS: dict[str, dict[str, Any]] = {
    "tiny": {**_TINY, "hidden": 248},
    "421m": {"width": 1536, "layers": 12, "heads": 12, "kv_heads": 4, "hidden": 5376},
    "1.3b": {"width": 2304, "layers": 18, "heads": 18, "kv_heads": 6, "hidden": 8064},
    "1.7b": {"width": 2048, "layers": 24, "heads": 32, "kv_heads": 4, "hidden": 9600, "vocab_size": 32064},
    "3.8b": {"width": 2816, "layers": 32, "heads": 22, "kv_heads": 2, "hidden": 11904, "vocab_size": 32064},
}
for _name, _options in _TWINS.items():
    preset(
        f"transformer-{_name}",
        "dense",
        citation=f"size-matched twin of samba-{_name}",
        **{**_LLAMA, "tied": True, **_options},
    )

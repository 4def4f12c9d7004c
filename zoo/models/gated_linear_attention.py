"""GLA, simple GLA, RetNet and linear attention: one family, a mixer with a matrix-valued state and a SwiGLU."""

from typing import Any

from zoo.core.registry import check_choice
from zoo.layers.norm import Norm
from zoo.layers.rotary import Rotary
from zoo.mixers import MLP, ChannelGate, FixedDecay, GatedLinearAttention, HeadGate
from zoo.models.language_model import LanguageModelConfig, Sublayer
from zoo.models.model import FAMILIES, preset

DECAYS = ("channel", "head", "fixed", None)


def swiglu_hidden(width: int, ratio: float) -> int:
    """F of a SwiGLU with about 2 ratio D^2 parameters: 2/3 ratio D, rounded up to a multiple of 256."""
    return -(-int(width * ratio * 2 / 3) // 256) * 256


@FAMILIES.register("gated_linear_attention")
def gated_linear_attention(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    expand_k: float = 0.5,
    expand_v: float = 1.0,
    decay: str | None = "channel",
    gate_rank: int = 16,
    gate_normaliser: float = 16.0,
    feature_map: str = "identity",
    normalise: bool = False,
    rope_theta: float | None = None,
    output_norm: bool = True,
    output_norm_scale: bool = True,
    output_gate: bool = True,
    hidden: int | None = None,
    hidden_ratio: float = 4.0,
    norm_eps: float = 1e-6,
    tied: bool = False,
    init_std: float = 0.02,
    max_length: int = 2048,
    dtype: str = "float32",
    param_dtype: str = "float32",
    residual_dtype: str = "float32",
    remat: str = "none",
) -> LanguageModelConfig:
    """x <- x + mixer(norm(x)); x <- x + swiglu(norm(x)), `layers` times.

    Args:
      expand_k, expand_v: widths of all keys and of all values together, in units of `width`.
      decay: "channel" (GLA), "head" (simple GLA), "fixed" (RetNet) or None (linear attention).
      gate_rank: of the gate of "channel". gate_normaliser: of the gates of "channel" and "head".
      feature_map, normalise, output_gate: see GatedLinearAttention.
      rope_theta: base of the rotary embedding of queries and keys; None = none.
      output_norm, output_norm_scale: whether each head's output is normed, and with a learned scale.
      hidden: F; None = 2/3 hidden_ratio width, rounded up to a multiple of 256.
      vocab_size, width, layers, heads, norm_eps, tied, init_std, max_length, dtype, param_dtype, residual_dtype, remat:
        see the mixers and LanguageModelConfig.
    """
    check_choice("decay", decay, DECAYS)
    widths = {"expand_k": round(width * expand_k), "expand_v": round(width * expand_v)}
    for name, total in widths.items():
        if total < 1 or total % heads:
            raise ValueError(
                f"gated_linear_attention: heads={heads} must divide {name} * width = {total}; "
                f"the nearest multiple is {max(1, round(total / heads)) * heads}"
            )
    gates = {"channel": ChannelGate(gate_rank, gate_normaliser), "head": HeadGate(gate_normaliser)}
    mixer = GatedLinearAttention(
        heads=heads,
        key_width=widths["expand_k"] // heads,
        value_width=widths["expand_v"] // heads,
        decay=FixedDecay() if decay == "fixed" else gates.get(decay or ""),
        feature_map=feature_map,
        normalise=normalise,
        rotary=None if rope_theta is None else Rotary(rope_theta),
        norm=Norm("rms", norm_eps, scale=output_norm_scale) if output_norm else None,
        output_gate=output_gate,
        init_std=init_std,
        out_init_std=init_std,
    )
    mlp = MLP(
        swiglu_hidden(width, hidden_ratio) if hidden is None else hidden, init_std=init_std, out_init_std=init_std
    )
    norm = Norm("rms", norm_eps)
    return LanguageModelConfig(
        vocab_size=vocab_size,
        width=width,
        pattern=(Sublayer(mixer, norm), Sublayer(mlp, norm)),
        repeats=layers,
        final_norm=norm,
        tied=tied,
        embedding_init_std=init_std,
        head_init_std=init_std,
        max_length=max_length,
        dtype=dtype,
        param_dtype=param_dtype,
        residual_dtype=residual_dtype,
        remat=remat,
    )


_RETNET = {"decay": "fixed", "expand_k": 1.0, "expand_v": 2.0, "rope_theta": 10000.0, "hidden_ratio": 2.0}
_GLA_SIZES = "arXiv:2312.06635, section 5.1; feed-forward width and count of flash-linear-attention's class"
_RETNET_SIZES = "arXiv:2307.08621, table 2; feed-forward layers and count of flash-linear-attention's class"

# name, exact millions, citation, options
_PRESETS: tuple[tuple[str, float, str, dict[str, Any]], ...] = (
    ("gla-340m", 374.5, _GLA_SIZES, {"width": 1024, "layers": 24, "heads": 4}),
    ("gla-1.3b", 1365.5, _GLA_SIZES, {"width": 2048, "layers": 24, "heads": 4}),
    ("retnet-1.3b", 1351.7, _RETNET_SIZES, {**_RETNET, "width": 2048, "layers": 24, "heads": 8}),
    ("retnet-2.7b", 2722.5, _RETNET_SIZES, {**_RETNET, "width": 2560, "layers": 32, "heads": 10}),
    ("retnet-6.7b", 6772.0, _RETNET_SIZES, {**_RETNET, "width": 4096, "layers": 32, "heads": 16}),
)
for _name, _millions, _citation, _options in _PRESETS:
    preset(_name, "gated_linear_attention", parameters=_millions, citation=_citation, vocab_size=32000, **_options)

_TINY = {"vocab_size": 512, "width": 64, "layers": 4, "heads": 2, "hidden": 192, "max_length": 512}
for _name, _options in (
    ("gla-tiny", {}),
    ("simple-gla-tiny", {"decay": "head", "expand_k": 1.0}),
    ("retnet-tiny", _RETNET),
    ("linear-attention-tiny", {"decay": None, "feature_map": "elu", "normalise": True, "output_gate": False}),
):
    preset(_name, "gated_linear_attention", citation="a tiny variant for tests and examples", **{**_TINY, **_options})

"""Mamba-2 (arXiv:2405.21060): a stack of state-space dual mixers without feed-forward layers."""

import math

from zoo.layers.norm import Norm
from zoo.mixers import Mamba2
from zoo.models.language_model import LanguageModelConfig, Sublayer
from zoo.models.model import FAMILIES, preset


@FAMILIES.register("mamba2")
def mamba2(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int | None = None,
    head_width: int = 64,
    groups: int = 1,
    state: int = 128,
    conv_width: int = 4,
    conv_bias: bool = True,
    bias: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    skip: str = "head",
    gated_norm: bool = True,
    norm_groups: int | None = None,
    norm_before_gate: bool = False,
    mlp: int = 0,
    chunk_size: int | None = None,
    norm_eps: float = 1e-5,
    tied: bool = True,
    max_length: int = 2048,
    dtype: str = "float32",
    param_dtype: str = "float32",
    residual_dtype: str = "float32",
    remat: str = "none",
) -> LanguageModelConfig:
    """x <- x + Mamba2(RMSNorm(x)), `layers` times.

    Args:
      heads: None = 2 width / head_width.
      gated_norm: RMSNorm of the gated output.
      vocab_size, width, layers, head_width, groups, state, conv_width, conv_bias, bias, dt_limit, skip, norm_groups,
        norm_before_gate, mlp, chunk_size, norm_eps, tied, max_length, dtype, param_dtype, residual_dtype, remat: see
        the mixer and LanguageModelConfig.
    """
    if heads is None:
        if 2 * width % head_width:
            raise ValueError(f"mamba2: head_width={head_width} must divide 2 * width={2 * width}, or give heads")
        heads = 2 * width // head_width
    norm = Norm("rms", norm_eps)
    mixer = Mamba2(
        heads=heads,
        head_width=head_width,
        groups=groups,
        state=state,
        conv_width=conv_width,
        conv_bias=conv_bias,
        bias=bias,
        dt_limit=dt_limit,
        skip=skip,
        norm=norm if gated_norm else None,
        norm_groups=norm_groups,
        norm_before_gate=norm_before_gate,
        mlp=mlp,
        chunk_size=chunk_size,
        out_init_scale=1 / math.sqrt(layers),
    )
    return LanguageModelConfig(
        vocab_size=vocab_size,
        width=width,
        pattern=(Sublayer(mixer, norm),),
        repeats=layers,
        final_norm=norm,
        tied=tied,
        max_length=max_length,
        dtype=dtype,
        param_dtype=param_dtype,
        residual_dtype=residual_dtype,
        remat=remat,
    )


_CITATION = "arXiv:2405.21060 and the released configurations; vocabulary of GPT-NeoX padded to 50288"

preset("mamba2-tiny", "mamba2", vocab_size=512, width=64, layers=4, head_width=16, state=32, max_length=512)
for _name, _width, _layers, _millions in (
    ("130m", 768, 24, 129.0),
    ("370m", 1024, 48, 368.3),
    ("780m", 1536, 48, 780.2),
    ("1.3b", 2048, 48, 1343.8),
    ("2.7b", 2560, 64, 2702.6),
):
    preset(
        f"mamba2-{_name}",
        "mamba2",
        parameters=_millions,
        citation=_CITATION,
        vocab_size=50288,
        width=_width,
        layers=_layers,
    )

"""Mamba (arXiv:2312.00752): a stack of S6 mixers without feed-forward layers."""

import math

from zoo.layers.norm import Norm
from zoo.mixers import Mamba
from zoo.models.language_model import LanguageModelConfig, Sublayer
from zoo.models.model import FAMILIES, preset


@FAMILIES.register("mamba")
def mamba(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    inner: int | None = None,
    state: int = 16,
    conv_width: int = 4,
    dt_rank: int | None = None,
    conv_bias: bool = True,
    bias: bool = False,
    norm_eps: float = 1e-5,
    tied: bool = True,
    max_length: int = 2048,
    dtype: str = "float32",
    param_dtype: str = "float32",
    residual_dtype: str = "float32",
    remat: str = "none",
) -> LanguageModelConfig:
    """x <- x + Mamba(RMSNorm(x)), `layers` times; inner = 2 width and dt_rank = ceil(width / 16) unless given."""
    inner = 2 * width if inner is None else inner
    mixer = Mamba(
        inner=inner,
        state=state,
        conv_width=conv_width,
        dt_rank=dt_rank,
        conv_bias=conv_bias,
        bias=bias,
        # The paper's output projection is uniform(+-1/sqrt(inner)) divided by sqrt(layers).
        out_init_std=1 / math.sqrt(3 * inner * layers),
    )
    return LanguageModelConfig(
        vocab_size=vocab_size,
        width=width,
        pattern=(Sublayer(mixer, Norm("rms", norm_eps)),),
        repeats=layers,
        final_norm=Norm("rms", norm_eps),
        tied=tied,
        max_length=max_length,
        dtype=dtype,
        param_dtype=param_dtype,
        residual_dtype=residual_dtype,
        remat=remat,
    )


_CITATION = "arXiv:2312.00752, table 12; vocabulary of GPT-NeoX padded to 50280"

preset("mamba-tiny", "mamba", vocab_size=512, width=64, layers=4, max_length=512)
for _name, _width, _layers, _millions in (
    ("130m", 768, 24, 129.1),
    ("370m", 1024, 48, 371.5),
    ("790m", 1536, 48, 793.2),
    ("1.4b", 2048, 48, 1372.2),
    ("2.8b", 2560, 64, 2768.3),
):
    preset(
        f"mamba-{_name}",
        "mamba",
        parameters=_millions,
        citation=_CITATION,
        vocab_size=50280,
        width=_width,
        layers=_layers,
    )

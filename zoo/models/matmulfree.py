"""The MatMul-free language model (arXiv:2406.02528): MLGRU and GLU sublayers of BitLinears, and a BitLinear head."""

import math

from zoo.layers.norm import Norm
from zoo.mixers import MLGRU, BitMLP
from zoo.models.language_model import LanguageModelConfig, Sublayer
from zoo.models.model import FAMILIES, preset


@FAMILIES.register("matmulfree")
def matmulfree(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    hidden: int | None = None,
    inner: int | None = None,
    gate_form: str = "release",
    lower_bound: bool = True,
    norm_eps: float = 1e-6,
    bit_eps: float = 1e-6,
    init_std: float = 0.02,
    max_length: int = 2048,
    dtype: str = "float32",
    param_dtype: str = "float32",
    residual_dtype: str = "float32",
    remat: str = "none",
) -> LanguageModelConfig:
    """x <- x + MLGRU(RMSNorm(x)); x <- x + GLU(RMSNorm(x)); each BitLinear normalises its input once more.

    Args:
      hidden: of the GLU; None = 8/3 width, rounded up to a multiple of 256.
      inner: channels of the recurrence; None = width.
      gate_form: "release", that of the published weights; "paper", or "hgrn": see `MLGRU`.
      lower_bound: forget gates are bounded from below, the more the deeper the layer.
      norm_eps: of the norms of residual stream and output gate. bit_eps: of those inside BitLinears.
      init_std: of all matrices; those that write to the residual stream get init_std / sqrt(2 layers).
      vocab_size, width, layers, max_length, dtype, param_dtype, residual_dtype, remat: see LanguageModelConfig.
    """
    hidden = 256 * math.ceil(int(8 * width / 3) / 256) if hidden is None else hidden
    norm, out_std = Norm("rms", norm_eps), init_std / math.sqrt(2 * layers)
    mixer = MLGRU(
        inner=width if inner is None else inner,
        gate_form=gate_form,
        lower_bound=lower_bound,
        bit_eps=bit_eps,
        norm_eps=norm_eps,
        init_std=init_std,
        out_init_std=out_std,
    )
    glu = BitMLP(hidden, bit_eps=bit_eps, init_std=init_std, out_init_std=out_std)
    return LanguageModelConfig(
        vocab_size=vocab_size,
        width=width,
        pattern=(Sublayer(mixer, norm), Sublayer(glu, norm)),
        repeats=layers,
        final_norm=norm,
        tied=False,
        head_bit_eps=bit_eps,
        embedding_init_std=init_std,
        head_init_std=init_std,
        max_length=max_length,
        dtype=dtype,
        param_dtype=param_dtype,
        residual_dtype=residual_dtype,
        remat=remat,
    )


_CITATION = "arXiv:2406.02528, section 4.1: widths and depths; vocabulary of Mistral"

# The paper rounds to 370M, 1.3B and 2.7B; matrices alone are 373.8M, 1364.2M and 2701.4M.
preset("matmulfree-tiny", "matmulfree", vocab_size=512, width=64, layers=4, hidden=192, max_length=512)
for _name, _width, _layers in (("370m", 1024, 24), ("1.3b", 2048, 24), ("2.7b", 2560, 32)):
    preset(f"matmulfree-{_name}", "matmulfree", citation=_CITATION, vocab_size=32000, width=_width, layers=_layers)

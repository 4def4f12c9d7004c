"""Samba (arXiv:2406.07522): Mamba, MLP, sliding-window attention, MLP, repeated."""

import math

from zoo.layers.norm import Norm
from zoo.layers.rotary import Rotary
from zoo.mixers import MLP, Attention, Mamba
from zoo.models.language_model import LanguageModelConfig, Sublayer
from zoo.models.model import FAMILIES, preset


@FAMILIES.register("samba")
def samba(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    hidden: int,
    kv_heads: int | None = None,
    head_width: int | None = None,
    window: int = 2048,
    rope_theta: float = 10000.0,
    inner: int | None = None,
    state: int = 16,
    conv_width: int = 4,
    dt_rank: int | None = None,
    norm_eps: float = 1e-5,
    init_std: float = 0.02,
    tied: bool = True,
    max_length: int = 4096,
    dtype: str = "float32",
    param_dtype: str = "float32",
    residual_dtype: str = "float32",
    remat: str = "none",
) -> LanguageModelConfig:
    """Blocks of four pre-norm sublayers: Mamba, SwiGLU, windowed attention, SwiGLU.

    Args:
      layers: (mixer, MLP) pairs, half of them Mamba and half attention; must be even. The paper counts sublayers: twice
        as many.
      kv_heads: key/value heads; None = heads.
      head_width: None = width / heads.
      window: keys visible to a query, itself included.
      inner: channels of Mamba; None = 2 width.
      init_std: of all matrices; those that write to the residual stream get init_std / sqrt(2 layers).
      vocab_size, width, heads, hidden, rope_theta, state, conv_width, dt_rank, norm_eps, tied, max_length, dtype,
        param_dtype, residual_dtype, remat: see the mixers and LanguageModelConfig.
    """
    if layers % 2:
        raise ValueError(f"samba: layers={layers} must be even (Mamba and attention alternate)")
    if head_width is None:
        if width % heads:
            raise ValueError(f"samba: heads={heads} must divide width={width}, or give head_width")
        head_width = width // heads
    norm = Norm("rms", norm_eps)
    out_std = init_std / math.sqrt(2 * layers)
    recurrent = Mamba(
        inner=2 * width if inner is None else inner,
        state=state,
        conv_width=conv_width,
        dt_rank=dt_rank,
        init_std=init_std,
        out_init_std=out_std,
    )
    attention = Attention(
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_width=head_width,
        window=window,
        rotary=Rotary(theta=rope_theta),
        init_std=init_std,
        out_init_std=out_std,
    )
    mlp = MLP(hidden, init_std=init_std, out_init_std=out_std)
    return LanguageModelConfig(
        vocab_size=vocab_size,
        width=width,
        pattern=tuple(Sublayer(mixer, norm) for mixer in (recurrent, mlp, attention, mlp)),
        repeats=layers // 2,
        final_norm=norm,
        tied=tied,
        embedding_init_std=init_std,
        max_length=max_length,
        dtype=dtype,
        param_dtype=param_dtype,
        residual_dtype=residual_dtype,
        remat=remat,
    )


_CITATION = "arXiv:2406.07522, section 3 and the released configurations"
_UNRELEASED = "arXiv:2406.07522, its text alone: no configuration of this size was released"

preset(
    "samba-tiny",
    "samba",
    vocab_size=512,
    width=64,
    layers=4,
    heads=4,
    kv_heads=2,
    hidden=192,
    window=128,
    max_length=512,
)
preset(
    "samba-421m",
    "samba",
    parameters=421.8,
    citation=_CITATION,
    vocab_size=32000,
    width=1536,
    layers=12,
    heads=12,
    hidden=4096,
)
preset(
    "samba-1.3b",
    "samba",
    parameters=1330.2,
    citation=_CITATION,
    vocab_size=32000,
    width=2304,
    layers=18,
    heads=18,
    hidden=6144,
)
preset(
    "samba-1.7b",
    "samba",
    citation=_UNRELEASED,
    vocab_size=32064,
    width=2048,
    layers=24,
    heads=32,
    kv_heads=4,
    hidden=8192,
)
preset(
    "samba-3.8b",
    "samba",
    citation=_UNRELEASED,
    vocab_size=32064,
    width=2816,
    layers=32,
    heads=11,
    kv_heads=1,
    head_width=256,
    hidden=9984,
)

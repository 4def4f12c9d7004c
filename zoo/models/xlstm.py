"""xLSTM 7B (arXiv:2503.13427) and the first xLSTMs (arXiv:2405.04517): stacks of mLSTM and sLSTM."""

import math
from collections.abc import Sequence

from zoo.layers.norm import Norm
from zoo.mixers import MLP, MLSTM, SLSTM, MLSTMBlock
from zoo.models.language_model import LanguageModelConfig, Sublayer
from zoo.models.model import FAMILIES, preset

MULTIPLE = 64  # feed-forward widths are rounded up to it


def _rounded(width: float) -> int:
    return math.ceil(width / MULTIPLE) * MULTIPLE


def _init_stds(width: int, layers: int, init_std: float | None) -> tuple[float, float]:
    """Of input matrices (arXiv:1910.05895) and of those that write to the residual stream (arXiv:2204.06745)."""
    return math.sqrt(2 / (5 * width)) if init_std is None else init_std, 2 / (layers * math.sqrt(width))


def _head_width(option: str, value: int | None, total: int, heads: int) -> int:
    if value is not None:
        return value
    if heads < 1 or total % heads:
        raise ValueError(f"xlstm: heads={heads} must divide {total}, or give {option}")
    return total // heads


@FAMILIES.register("xlstm")
def xlstm(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    hidden: int | None = None,
    key_width: int | None = None,
    value_width: int | None = None,
    gate_soft_cap: float | None = 15.0,
    logit_soft_cap: float | None = 30.0,
    bias: bool = False,
    norm_eps: float = 1e-6,
    cell_eps: float = 1e-6,
    tied: bool = False,
    init_std: float | None = None,
    max_length: int = 8192,
    dtype: str = "float32",
    param_dtype: str = "float32",
    residual_dtype: str = "float32",
    remat: str = "none",
) -> LanguageModelConfig:
    """x <- x + mLSTM(RMSNorm(x)); x <- x + SwiGLU(RMSNorm(x)), `layers` times.

    Args:
      hidden: feed-forward width; None = 2.667 width, rounded up to a multiple of 64.
      key_width, value_width: of a head; None = width / (2 heads) and width / heads.
      gate_soft_cap, cell_eps: see MLSTM.
      bias: biases on all matrices but the head, and on the norms but the final one.
      init_std: None = sqrt(2 / (5 width)); matrices that write to the residual stream have 2 / (layers sqrt(width)).
      vocab_size, width, layers, heads, logit_soft_cap, norm_eps, tied, max_length, dtype, param_dtype, residual_dtype,
        remat: see the mixers and LanguageModelConfig.
    """
    std, out_std = _init_stds(width, layers, init_std)
    norm = Norm("rms", norm_eps, bias=bias)
    mlstm = MLSTM(
        heads=heads,
        key_width=_head_width("key_width", key_width, width // 2, heads),
        value_width=_head_width("value_width", value_width, width, heads),
        gate_soft_cap=gate_soft_cap,
        norm=Norm("layer", norm_eps, bias=bias),
        cell_eps=cell_eps,
        bias=bias,
        init_std=std,
        out_init_std=out_std,
    )
    hidden = _rounded(math.floor(2.667 * width)) if hidden is None else hidden
    # The width that this matrix reads from is the feed-forward one.
    mlp = MLP(hidden, bias=bias, init_std=std, out_init_std=2 / (layers * math.sqrt(hidden)))
    return LanguageModelConfig(
        vocab_size=vocab_size,
        width=width,
        pattern=(Sublayer(mlstm, norm), Sublayer(mlp, norm)),
        repeats=layers,
        final_norm=Norm("rms", norm_eps),
        tied=tied,
        logit_soft_cap=logit_soft_cap,
        embedding_init_std=std,
        head_init_std=std,
        max_length=max_length,
        dtype=dtype,
        param_dtype=param_dtype,
        residual_dtype=residual_dtype,
        remat=remat,
    )


def block_kinds(layers: int, ratio: Sequence[int] | None = None, slstm_at: Sequence[int] | None = None) -> str:
    """One letter per block, "m" for mLSTM and "s" for sLSTM.

    Args:
      layers: number of blocks.
      ratio: (a, b) of xLSTM[a:b]: a mLSTM blocks, then b sLSTM blocks, again and again; None = (1, 0).
      slstm_at: indices, from 0, of the sLSTM blocks, in place of a ratio.

    Raises:
      ValueError: both are given, or a ratio or index that does not fit `layers`.
    """
    if slstm_at is not None:
        if ratio is not None:
            raise ValueError(f"xlstm-blocks: give ratio={tuple(ratio)} or slstm_at={tuple(slstm_at)}, not both")
        wrong = [at for at in slstm_at if not 0 <= at < layers]
        if wrong or len(set(slstm_at)) < len(slstm_at):
            raise ValueError(
                f"xlstm-blocks: slstm_at={tuple(slstm_at)} must be distinct indices from 0 to {layers - 1}"
            )
        return "".join("s" if layer in set(slstm_at) else "m" for layer in range(layers))
    ratio = (1, 0) if ratio is None else tuple(ratio)
    if len(ratio) != 2 or min(ratio) < 0 or sum(ratio) == 0:
        raise ValueError(f"xlstm-blocks: ratio={ratio} must be (a, b), mLSTM to sLSTM blocks, at least one of them > 0")
    if layers % sum(ratio):
        below, above = layers // sum(ratio) * sum(ratio), (layers // sum(ratio) + 1) * sum(ratio)
        fits = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"xlstm-blocks: ratio={ratio} takes a multiple of {sum(ratio)} blocks, layers={layers} is none; "
            f"the nearest is {fits}, or give slstm_at"
        )
    return ("m" * ratio[0] + "s" * ratio[1]) * (layers // sum(ratio))


@FAMILIES.register("xlstm-blocks")
def xlstm_blocks(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int = 4,
    ratio: Sequence[int] | None = None,
    slstm_at: Sequence[int] | None = None,
    inner: int | None = None,
    hidden: int | None = None,
    block: int = 4,
    conv_width: int = 4,
    norm_eps: float = 1e-5,
    cell_eps: float = 1e-6,
    tied: bool = False,
    init_std: float | None = None,
    max_length: int = 2048,
    dtype: str = "float32",
    param_dtype: str = "float32",
    residual_dtype: str = "float32",
    remat: str = "none",
) -> LanguageModelConfig:
    """xLSTM[a:b] of 2024: blocks x <- x + mLSTMBlock(LayerNorm(x)), and blocks x <- x + sLSTM(LayerNorm(x));
    x <- x + GeGLU(LayerNorm(x)).

    The shortest cycle of blocks becomes the repeated pattern. Positions without one (the published [7:1] models) make a
    pattern of all layers, which compiles once per layer.

    Args:
      layers: number of blocks of either kind.
      heads: of both kinds of cell.
      ratio, slstm_at: which blocks are sLSTM; see `block_kinds`.
      inner: between the projections of an mLSTM block; None = 2 width, rounded up to a multiple of 64.
      hidden: feed-forward width behind an sLSTM; None = 1.3 width, rounded up to a multiple of 64.
      block, cell_eps: see MLSTMBlock.
      init_std: None = sqrt(2 / (5 width)); matrices that write to the residual stream have 2 / (layers sqrt(width)).
        The forget bias of an sLSTM depends on its depth; blocks that share a place in the cycle take their mean depth.
      vocab_size, width, conv_width, norm_eps, tied, max_length, dtype, param_dtype, residual_dtype, remat: see the
        mixers and LanguageModelConfig.
    """
    kinds = block_kinds(layers, ratio, slstm_at)
    cycle = next(c for c in range(1, layers + 1) if layers % c == 0 and kinds[:c] * (layers // c) == kinds)
    std, out_std = _init_stds(width, layers, init_std)
    norm = Norm("layer", norm_eps)
    common = {"heads": heads, "conv_width": conv_width, "norm": norm, "init_std": std}
    mlstm = MLSTMBlock(
        inner=_rounded(2 * width) if inner is None else inner,
        block=block,
        cell_eps=cell_eps,
        out_init_std=out_std,
        **common,
    )
    mlp = MLP(_rounded(1.3 * width) if hidden is None else hidden, "gelu", init_std=std, out_init_std=out_std)

    def blocks(place: int) -> tuple[Sublayer, ...]:
        if kinds[place] == "m":
            return (Sublayer(mlstm, norm),)
        depth = (place + (layers - cycle) / 2) / max(layers - 1, 1)  # 0 for the first block, 1 for the last one
        slstm = SLSTM(width=width, forget_power=0.3 + 1.3 * depth, **common)
        return Sublayer(slstm, norm), Sublayer(mlp, norm)

    return LanguageModelConfig(
        vocab_size=vocab_size,
        width=width,
        pattern=tuple(sublayer for place in range(cycle) for sublayer in blocks(place)),
        repeats=layers // cycle,
        final_norm=norm,
        tied=tied,
        embedding_init_std=std,
        head_init_std=std,
        max_length=max_length,
        dtype=dtype,
        param_dtype=param_dtype,
        residual_dtype=residual_dtype,
        remat=remat,
    )


_TINY = {"vocab_size": 512, "width": 64, "layers": 4, "heads": 4, "init_std": 0.02, "max_length": 512}

preset("xlstm-tiny", "xlstm", citation="a tiny variant for tests and examples", **_TINY)
preset("xlstm-1-1-tiny", "xlstm-blocks", citation="a tiny variant for tests and examples", ratio=(1, 1), **_TINY)
preset(
    "xlstm-7b",
    "xlstm",
    parameters=6865.4,
    citation="arXiv:2503.13427 and the released configuration",
    vocab_size=50304,
    width=4096,
    layers=32,
    heads=8,
)

# The paper places the sLSTM blocks of its [7:1] models irregularly; with 24 blocks there are only two of them.
_CITATION = "arXiv:2405.04517, appendix: models for scaling laws; vocabulary of GPT-NeoX padded to 50304"
for _size, _width, _layers, _slstm_at, _millions, _millions_mixed in (
    ("125m", 768, 24, (3, 20), 163.8, 163.7),
    ("350m", 1024, 48, (3, 5, 7, 40, 42, 44), 409.3, 408.4),
    ("760m", 1536, 48, (3, 5, 7, 40, 42, 44), 840.4, 839.7),
    ("1.3b", 2048, 48, (3, 5, 7, 40, 42, 44), 1422.6, 1420.1),
):
    for _ratio, _at, _count in (("1-0", (), _millions), ("7-1", _slstm_at, _millions_mixed)):
        preset(
            f"xlstm-{_ratio}-{_size}",
            "xlstm-blocks",
            parameters=_count,
            citation=_CITATION,
            vocab_size=50304,
            width=_width,
            layers=_layers,
            slstm_at=_at,
        )

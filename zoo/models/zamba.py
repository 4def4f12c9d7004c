"""Zamba (arXiv:2405.16712) and Zamba2 (arXiv:2411.15242): Mamba layers and transformer blocks of shared weights.

At its sites a block reads the residual stream h beside the token's embedding e, and what it gives goes into the Mamba
layer of the site alone: t = W_site Block([h, e]); h <- h + Mamba(norm(h + t)).
"""

from collections.abc import Sequence
from typing import Any

from zoo.layers.norm import Norm
from zoo.layers.rotary import Rotary
from zoo.mixers import MLP, Attention, Mamba, Mamba2, ZambaBlock
from zoo.models.language_model import LanguageModelConfig, Sublayer
from zoo.models.model import FAMILIES, preset

Layer = tuple[Sublayer, ...]
GATED_NORM_EPS = 1e-5  # of Zamba2's Mamba-2, whatever norm_eps is


def default_sites(layers: int) -> tuple[int, ...]:
    """Zamba-7B's rule: the third layer, the eighth, and every sixth from there."""
    return (2, *range(7, layers, 6)) if layers > 2 else ()


def _check_sites(family: str, sites: Sequence[int], layers: int) -> tuple[int, ...]:
    if not sites:
        raise ValueError(f"{family}: sites={tuple(sites)} must name at least one layer of 0..{layers - 1}")
    for site in sites:
        if not 0 <= site < layers:
            raise ValueError(f"{family}: sites has {site}, but layers={layers}: allowed are 0..{layers - 1}")
    if list(sites) != sorted(set(sites)):
        raise ValueError(f"{family}: sites={tuple(sites)} must rise; give {tuple(sorted(set(sites)))}")
    return tuple(sites)


def head_width_of(family: str, width: int, heads: int) -> int:
    """Channels of a head: all heads together read the 2 D channels of stream and embedding."""
    if heads < 1 or 2 * width % heads:
        raise ValueError(f"{family}: heads={heads} must divide 2 * width={2 * width}")
    return 2 * width // heads


def fold(layers: Sequence[Layer]) -> dict[str, Any]:
    """first, pattern, repeats and last of a LanguageModelConfig: the form that writes out the fewest layers."""
    best = (0, 0, len(layers), 1)  # layers saved, start, period, repeats
    for period in range(1, len(layers) // 2 + 1):
        run = 0
        for start in range(len(layers) - period - 1, -1, -1):
            run = run + 1 if layers[start] == layers[start + period] else 0
            repeats = run // period + 1
            if repeats > 1:
                best = max(
                    best, ((repeats - 1) * period, start, period, repeats), key=lambda form: form[0]
                )  # ties: the first
    _, start, period, repeats = best

    def joined(part: Sequence[Layer]) -> tuple[Sublayer, ...]:
        return tuple(sublayer for layer in part for sublayer in layer)

    return {
        "first": joined(layers[:start]),
        "pattern": joined(layers[start : start + period]),
        "repeats": repeats,
        "last": joined(layers[start + period * repeats :]),
    }


def _stack(mamba: Sublayer, blocks: Sequence[Sublayer], sites: tuple[int, ...], layers: int) -> dict[str, Any]:
    """`fold` of the layers; the blocks take turns at the sites."""
    order: list[Layer] = []
    for layer in range(layers):
        block = (blocks[sites.index(layer) % len(blocks)],) if layer in sites else ()
        order.append((*block, mamba))
    return fold(order)


@FAMILIES.register("zamba")
def zamba(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    sites: tuple[int, ...] | None = None,
    kv_heads: int | None = None,
    head_width: int | None = None,
    hidden: int | None = None,
    activation: str = "gelu",
    expand: int = 2,
    mamba_heads: int = 2,
    state: int = 16,
    conv_width: int = 4,
    dt_rank: int | None = None,
    conv_bias: bool = True,
    bias: bool = False,
    norm_eps: float = 1e-5,
    init_std: float = 0.02,
    tied: bool = True,
    max_length: int = 4096,
    dtype: str = "float32",
    param_dtype: str = "float32",
    residual_dtype: str = "float32",
    remat: str = "none",
) -> LanguageModelConfig:
    """Mamba layers of several heads, and one transformer block without positions at some of them.

    Args:
      sites: layers with the block, from 0; None = `default_sites`.
      heads: of attention. kv_heads: None = heads. head_width: None = 2 width / heads.
      hidden: F of the block; None = 4 width.
      expand: channels of Mamba over width.
      mamba_heads: H of Mamba.
      bias: of Mamba's projections.
      vocab_size, width, layers, activation, state, conv_width, dt_rank, conv_bias, norm_eps, init_std, tied,
        max_length, dtype, param_dtype, residual_dtype, remat: see the mixers and LanguageModelConfig.
    """
    sites = _check_sites("zamba", default_sites(layers) if sites is None else sites, layers)
    head_width = head_width_of("zamba", width, heads) if head_width is None else head_width
    norm = Norm("rms", norm_eps)
    block = ZambaBlock(
        attention=Attention(
            heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            head_width=head_width,
            rotary=None,
            scale=(head_width / 2) ** -0.5,
            init_std=init_std,
            out_init_std=init_std,
        ),
        mlp=MLP(4 * width if hidden is None else hidden, activation, init_std=init_std, out_init_std=init_std),
        width=width,
        norm=norm,
        init_std=init_std,
    )
    mamba = Mamba(
        inner=expand * width,
        state=state,
        conv_width=conv_width,
        dt_rank=dt_rank,
        heads=mamba_heads,
        conv_bias=conv_bias,
        bias=bias,
        init_std=init_std,
        out_init_std=init_std,
    )
    shared = Sublayer(block, norm, reads_embedding=True, aside=True, share="block")
    return LanguageModelConfig(
        vocab_size=vocab_size,
        width=width,
        **_stack(Sublayer(mamba, norm), [shared], sites, layers),
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


@FAMILIES.register("zamba2")
def zamba2(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    sites: tuple[int, ...],
    heads: int,
    mamba_heads: int,
    blocks: int = 2,
    rank: int | None = 128,
    attention_updates: bool = False,
    rope_theta: float | None = None,
    kv_heads: int | None = None,
    hidden: int | None = None,
    activation: str = "gelu",
    expand: int = 2,
    groups: int = 1,
    state: int = 64,
    conv_width: int = 4,
    bias: bool = False,
    dt_limit: tuple[float, float] = (0.001, float("inf")),
    chunk_size: int | None = None,
    norm_eps: float = 1e-5,
    init_std: float = 0.02,
    tied: bool = True,
    max_length: int = 4096,
    dtype: str = "float32",
    param_dtype: str = "float32",
    residual_dtype: str = "float32",
    remat: str = "none",
) -> LanguageModelConfig:
    """Mamba-2 layers, and transformer blocks that take turns at some of them, with low-rank updates for each site.

    Args:
      sites: layers with a block, from 0.
      mamba_heads: H of Mamba-2, expand * width / mamba_heads channels each.
      blocks: how many sets of weights take turns.
      rank: of the sites' updates; None = none. attention_updates: they act on q, k and v too.
      rope_theta: base of the rotary embedding; None = no positions.
      heads: of attention, 2 width / heads channels each. kv_heads: None = heads. hidden: F; None = 4 width.
      bias: of Mamba-2's projections and the blocks' MLPs.
      vocab_size, width, layers, activation, expand, groups, state, conv_width, dt_limit, chunk_size, norm_eps,
        init_std, tied, max_length, dtype, param_dtype, residual_dtype, remat: see the mixers and LanguageModelConfig.
    """
    sites = _check_sites("zamba2", sites, layers)
    if not 1 <= blocks <= len(sites):
        raise ValueError(f"zamba2: blocks={blocks} must be in 1..{len(sites)}, the number of sites")
    if mamba_heads < 1 or expand * width % mamba_heads:
        raise ValueError(f"zamba2: mamba_heads={mamba_heads} must divide expand * width={expand * width}")
    head_width, norm = head_width_of("zamba2", width, heads), Norm("rms", norm_eps)
    block = ZambaBlock(
        attention=Attention(
            heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            head_width=head_width,
            rotary=None if rope_theta is None else Rotary(rope_theta),
            scale=(head_width / 2) ** -0.5,
            init_std=init_std,
            out_init_std=init_std,
        ),
        mlp=MLP(
            4 * width if hidden is None else hidden, activation, bias=bias, init_std=init_std, out_init_std=init_std
        ),
        width=width,
        norm=norm,
        rank=rank,
        attention_updates=attention_updates,
        init_std=init_std,
    )
    mamba = Mamba2(
        heads=mamba_heads,
        head_width=expand * width // mamba_heads,
        groups=groups,
        state=state,
        conv_width=conv_width,
        bias=bias,
        dt_limit=dt_limit,
        norm=Norm("rms", GATED_NORM_EPS),
        chunk_size=chunk_size,
        init_std=init_std,
    )
    shared = [Sublayer(block, norm, reads_embedding=True, aside=True, share=f"block_{i}") for i in range(blocks)]
    return LanguageModelConfig(
        vocab_size=vocab_size,
        width=width,
        **_stack(Sublayer(mamba, norm), shared, sites, layers),
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


_COUNTED = "the released configuration; parameters as transformers' class counts them"

preset(
    "zamba-tiny",
    "zamba",
    citation="a tiny variant for tests and examples",
    vocab_size=512,
    width=64,
    layers=4,
    heads=4,
    sites=(1, 3),
    hidden=96,
    state=8,
    max_length=512,
)
preset(
    "zamba-7b",
    "zamba",
    parameters=7232.5,
    citation=f"arXiv:2405.16712, {_COUNTED}",
    vocab_size=32000,
    width=3712,
    layers=76,
    heads=16,
)
preset(
    "zamba2-tiny",
    "zamba2",
    citation="a tiny variant for tests and examples",
    vocab_size=512,
    width=64,
    layers=6,
    sites=(1, 2, 3, 4),
    heads=4,
    mamba_heads=8,
    rank=4,
    attention_updates=True,
    rope_theta=10000.0,
    hidden=96,
    state=16,
    max_length=512,
)
preset(
    "zamba2-1.2b",
    "zamba2",
    parameters=1215.1,
    citation=f"arXiv:2411.15242, {_COUNTED}",
    vocab_size=32000,
    width=2048,
    layers=38,
    sites=tuple(range(5, 38, 6)),
    heads=32,
    mamba_heads=64,
    blocks=1,
    attention_updates=True,
    rope_theta=10000.0,
    state=128,
)
preset(
    "zamba2-2.7b",
    "zamba2",
    parameters=2662.2,
    citation=f"arXiv:2411.15242, {_COUNTED}",
    vocab_size=32000,
    width=2560,
    layers=54,
    sites=(*range(6, 43, 6), 47, 51),
    heads=32,
    mamba_heads=80,
)
preset(
    "zamba2-7b",
    "zamba2",
    parameters=7356.7,
    citation=f"arXiv:2411.15242, {_COUNTED}",
    vocab_size=32000,
    width=3584,
    layers=81,
    sites=(6, *range(11, 78, 6)),
    heads=32,
    mamba_heads=112,
    groups=2,
    rope_theta=10000.0,
)

"""Mamba-2-Hybrid (arXiv:2406.07887): Mamba-2, attention and feed-forward layers in an uneven order."""

import math
from collections.abc import Mapping
from typing import Any

from zoo.layers.norm import Norm
from zoo.mixers import MLP, Attention, Mamba2
from zoo.models.language_model import LanguageModelConfig, Sublayer
from zoo.models.model import FAMILIES, preset

MAMBA, ATTENTION, FEED_FORWARD = LETTERS = "M*-"


def allocate(layers: int, attention_ratio: float, mlp_ratio: float) -> str:
    """The order of layers as letters: M Mamba-2, * attention, - feed-forward.

    Attention is spread so that the sections between its layers are equal, then feed-forward layers are spread over
    the rest, towards the end.

    Args:
      layers: L.
      attention_ratio, mlp_ratio: parts of L, rounded to whole layers.

    Raises:
      ValueError: there is no layer, a part is negative, or together they are more than all layers.

    Reference: arXiv:2406.07887 and the authors' code.
    """
    attention, mlp = round(layers * attention_ratio), round(layers * mlp_ratio)
    if layers < 1 or min(attention, mlp) < 0 or attention + mlp > layers:
        raise ValueError(
            f"mamba2-hybrid: attention_ratio={attention_ratio} and mlp_ratio={mlp_ratio} of layers={layers} ask for "
            f"{attention} and {mlp} layers; both must be >= 0 and their sum at most layers"
        )
    order = _spread([MAMBA] * layers, ATTENTION, (layers - attention) / (attention + 1))
    return "".join(_spread(order, FEED_FORWARD, (layers - attention - mlp) / mlp) if mlp else order)


def _spread(order: list[str], letter: str, gap: float) -> list[str]:
    """Replaces Mamba-2 layers so that about `gap` of them stand before each new one."""
    left, new = gap, []
    for old in order:
        due = old == MAMBA and left < 0.5
        if old == MAMBA:
            left += gap if due else -1
        new.append(letter if due else old)
    return new


def allocation_of(options: Mapping[str, Any]) -> str:
    """The order of layers that the options of `mamba2_hybrid` stand for."""
    layers, given = options["layers"], options["allocation"]
    if given is None:
        if layers is None:
            raise ValueError("mamba2-hybrid needs layers or allocation")
        return allocate(layers, options["attention_ratio"], options["mlp_ratio"])
    unknown = sorted(set(given) - set(LETTERS))
    if unknown or not given:
        raise ValueError(f"mamba2-hybrid: allocation={given!r} must be of the letters {', '.join(LETTERS)}")
    if layers not in (None, len(given)):
        raise ValueError(f"mamba2-hybrid: allocation={given!r} has {len(given)} letters, layers={layers}")
    return given


@FAMILIES.register("mamba2-hybrid")
def mamba2_hybrid(
    *,
    vocab_size: int,
    width: int,
    heads: int,
    layers: int | None = None,
    attention_ratio: float = 0.08,
    mlp_ratio: float = 0.5,
    allocation: str | None = None,
    kv_heads: int | None = None,
    head_width: int | None = None,
    hidden: int | None = None,
    activation: str = "gelu",
    mlp_bias: bool = False,
    mamba_heads: int | None = None,
    mamba_head_width: int = 64,
    groups: int = 8,
    state: int = 128,
    conv_width: int = 4,
    conv_bias: bool = True,
    bias: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int | None = None,
    norm_eps: float = 1e-5,
    init_std: float = 0.02,
    tied: bool = False,
    max_length: int = 4096,
    dtype: str = "float32",
    param_dtype: str = "float32",
    residual_dtype: str = "float32",
    remat: str = "none",
) -> LanguageModelConfig:
    """x <- x + f(RMSNorm(x)) for every layer: Mamba-2, attention without positions, or a plain feed-forward map.

    Args:
      layers, attention_ratio, mlp_ratio: see `allocate`.
      allocation: letters in place of the rule, "M" Mamba-2, "*" attention, "-" feed-forward.
      kv_heads: None = heads. head_width: None = width / heads. hidden: None = 4 width.
      mamba_heads: None = 2 width / mamba_head_width.
      bias: of Mamba-2's projections.
      init_std: of all matrices; those that write to the residual stream get init_std / sqrt(layers).
      vocab_size, width, heads, activation, mlp_bias, mamba_head_width, groups, state, conv_width, conv_bias, dt_limit,
        chunk_size, norm_eps, tied, max_length, dtype, param_dtype, residual_dtype, remat: see the mixers and
        LanguageModelConfig.
    """
    order = allocation_of(
        {"layers": layers, "attention_ratio": attention_ratio, "mlp_ratio": mlp_ratio, "allocation": allocation}
    )
    if mamba_heads is None:
        if 2 * width % mamba_head_width:
            raise ValueError(
                f"mamba2-hybrid: mamba_head_width={mamba_head_width} must divide 2 * width={2 * width}, or give "
                "mamba_heads"
            )
        mamba_heads = 2 * width // mamba_head_width
    if head_width is None:
        if width % heads:
            raise ValueError(f"mamba2-hybrid: heads={heads} must divide width={width}, or give head_width")
        head_width = width // heads
    norm, scale = Norm("rms", norm_eps), 1 / math.sqrt(len(order))
    mixers = {
        MAMBA: Mamba2(
            heads=mamba_heads,
            head_width=mamba_head_width,
            groups=groups,
            state=state,
            conv_width=conv_width,
            conv_bias=conv_bias,
            bias=bias,
            dt_limit=dt_limit,
            norm=norm,
            chunk_size=chunk_size,
            init_std=init_std,
            out_init_scale=scale,
        ),
        ATTENTION: Attention(
            heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            head_width=head_width,
            rotary=None,
            init_std=init_std,
            out_init_std=init_std * scale,
        ),
        FEED_FORWARD: MLP(
            4 * width if hidden is None else hidden,
            activation,
            gated=False,
            bias=mlp_bias,
            init_std=init_std,
            out_init_std=init_std * scale,
        ),
    }
    cycle = next(n for n in range(1, len(order) + 1) if order[:n] * (len(order) // n) == order)
    return LanguageModelConfig(
        vocab_size=vocab_size,
        width=width,
        pattern=tuple(Sublayer(mixers[letter], norm) for letter in order[:cycle]),
        repeats=len(order) // cycle,
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


_CITATION = "arXiv:2406.07887 and the released configuration"
_EXAMPLE = "the example configuration that was released with arXiv:2406.07887"

preset(
    "mamba2-hybrid-tiny",
    "mamba2-hybrid",
    citation="a tiny variant for tests and examples",
    vocab_size=512,
    width=64,
    heads=4,
    kv_heads=2,
    layers=8,
    attention_ratio=0.125,
    hidden=128,
    mamba_head_width=16,
    groups=2,
    state=16,
    max_length=512,
)
for _name, _citation, _width, _layers, _heads in (
    ("800m", _EXAMPLE, 1024, 48, 16),
    ("8b", _CITATION, 4096, 56, 32),
):
    preset(
        f"mamba2-hybrid-{_name}",
        "mamba2-hybrid",
        citation=_citation,
        vocab_size=256000,
        width=_width,
        layers=_layers,
        heads=_heads,
        kv_heads=8,
    )

"""Based (arXiv:2402.18668): gated short convolutions, Taylor linear attention and sliding-window attention."""

import math
from collections.abc import Sequence

from zoo.layers.norm import Norm
from zoo.layers.rotary import Rotary
from zoo.mixers import MLP, Attention, BaseConv, TaylorAttention
from zoo.models.language_model import LanguageModelConfig, Sublayer
from zoo.models.model import FAMILIES, preset


@FAMILIES.register("based")
def based(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    linear_layers: Sequence[int],
    window_layers: Sequence[int],
    hidden: int | None = None,
    feature_dim: int = 16,
    eps: float = 1e-12,
    window: int = 129,
    rope_theta: float = 10000.0,
    inner: int | None = None,
    conv_width: int = 3,
    norm_eps: float = 1e-5,
    init_std: float = 0.02,
    tied: bool = True,
    max_length: int = 2048,
    dtype: str = "float32",
    param_dtype: str = "float32",
    residual_dtype: str = "float32",
    remat: str = "none",
) -> LanguageModelConfig:
    """Layers of two pre-norm sublayers, a mixer and SwiGLU; the layer's index decides which mixer.

    The shortest stretch of layers that repeats is the pattern of the model. Where none repeats, as in the published
    sizes, the pattern is the whole model: it compiles longer than a scan, and `remat` recomputes all of it at once.

    Args:
      layers: (mixer, MLP) pairs.
      linear_layers: indices, from 0, of the layers with linear attention.
      window_layers: indices of the layers with sliding-window attention; all others hold a gated convolution.
      hidden: width of the MLP; None = 2 width.
      feature_dim: width of queries and keys of the linear attention.
      eps: added to the normaliser of the linear attention.
      window: keys visible to a query, itself included. The released models look back over 128 keys besides.
      inner: channels of the convolution; None = 2 width.
      init_std: of all matrices; those that write to the residual stream get init_std / sqrt(2 layers).
      vocab_size, width, heads, rope_theta, conv_width, norm_eps, tied, max_length, dtype, param_dtype, residual_dtype,
        remat: see the mixers and LanguageModelConfig.
    """
    if width % heads:
        raise ValueError(f"based: heads={heads} must divide width={width}")
    kinds = _allocate(layers, linear_layers, window_layers)
    norm, out_std = Norm("rms", norm_eps), init_std / math.sqrt(2 * layers)
    inner, hidden = 2 * width if inner is None else inner, 2 * width if hidden is None else hidden
    head_width, rotary = width // heads, Rotary(theta=rope_theta)
    mixers = {
        "convolution": BaseConv(inner, conv_width, init_std=init_std, out_init_std=out_std),
        "linear": TaylorAttention(heads, head_width, feature_dim, eps, init_std, out_std),
        "window": Attention(heads, heads, head_width, window, rotary, init_std=init_std, out_init_std=out_std),
    }
    mlp = MLP(hidden, init_std=init_std, out_init_std=out_std)
    period = next(n for n in range(1, layers + 1) if layers % n == 0 and kinds == kinds[:n] * (layers // n))
    return LanguageModelConfig(
        vocab_size=vocab_size,
        width=width,
        pattern=tuple(Sublayer(m, norm) for kind in kinds[:period] for m in (mixers[kind], mlp)),
        repeats=layers // period,
        final_norm=norm,
        tied=tied,
        embedding_init_std=init_std,
        max_length=max_length,
        dtype=dtype,
        param_dtype=param_dtype,
        residual_dtype=residual_dtype,
        remat=remat,
    )


def _allocate(layers: int, linear_layers: Sequence[int], window_layers: Sequence[int]) -> list[str]:
    """The mixer of every layer."""
    if layers < 1:
        raise ValueError(f"based: layers must be >= 1, got {layers}")
    kinds = ["convolution"] * layers
    for field, kind, indices in (
        ("linear_layers", "linear", linear_layers),
        ("window_layers", "window", window_layers),
    ):
        for index in indices:
            if not 0 <= index < layers:
                raise ValueError(f"based: {field}={tuple(indices)} holds {index}; allowed are 0..{layers - 1}")
            if kinds[index] != "convolution":
                raise ValueError(f"based: layer {index} is named twice in linear_layers and window_layers")
            kinds[index] = kind
    return kinds


_CITATION = "arXiv:2402.18668, the reference configurations of its code; vocabulary of GPT-2 padded to 50264"
_DERIVED = "no exact parameter count was published, the tests derive one"

preset(
    "based-tiny",
    "based",
    vocab_size=512,
    width=64,
    layers=6,
    heads=4,
    linear_layers=(1, 4),
    window_layers=(2, 5),
    max_length=512,
)
preset(
    "based-360m",
    "based",
    citation=f"{_CITATION}; {_DERIVED}",
    vocab_size=50264,
    width=1024,
    layers=27,
    heads=16,
    linear_layers=(1, 6, 11, 16, 21),
    window_layers=(2, 7, 12, 17, 22),
)
preset(
    "based-1.3b",
    "based",
    citation=f"{_CITATION}; {_DERIVED}",
    vocab_size=50264,
    width=1792,
    layers=36,
    heads=16,
    linear_layers=(1, 6, 11, 16, 21, 27, 33),
    window_layers=(2, 7, 12, 17, 22, 28, 34),
)

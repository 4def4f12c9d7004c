"""HGRN (arXiv:2311.04823) and HGRN2 (arXiv:2404.07904): gated recurrences with bounds that grow with depth."""

from zoo.layers.norm import Norm
from zoo.mixers import HGRN, HGRN2, MLP
from zoo.models.gated_linear_attention import swiglu_hidden
from zoo.models.language_model import LanguageModelConfig, Sublayer
from zoo.models.model import FAMILIES, preset


@FAMILIES.register("hgrn")
def hgrn(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    state_width: int | None = None,
    inner: int | None = None,
    lower_bound: bool = True,
    hidden: int | None = None,
    hidden_ratio: float = 4.0,
    norm_eps: float = 1e-6,
    output_norm_eps: float | None = None,
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
      state_width: None = HGRN, one state per channel; K = HGRN2 with width / K heads, K states per channel.
      inner: channels of HGRN's recurrence; None = width, which HGRN2 always has.
      lower_bound: whether forget gates have a lower bound, which grows from layer to layer.
      output_norm_eps: of the norm inside the mixer; None = norm_eps, that of the layers.
      hidden: F; None = 2/3 hidden_ratio width, rounded up to a multiple of 256.
      vocab_size, width, layers, norm_eps, tied, init_std, max_length, dtype, param_dtype, residual_dtype, remat: see
        the mixers and LanguageModelConfig.
    """
    norm = Norm("rms", norm_eps)
    common = {
        "lower_bound": lower_bound,
        "norm": Norm("rms", norm_eps if output_norm_eps is None else output_norm_eps),
        "init_std": init_std,
        "out_init_std": init_std,
    }
    if state_width is None:
        mixer = HGRN(inner=width if inner is None else inner, **common)
    elif inner not in (None, width) or width % state_width:
        raise ValueError(
            f"hgrn: with state_width={state_width} (HGRN2) it must divide width={width}, and inner={inner} must be None"
        )
    else:
        mixer = HGRN2(heads=width // state_width, key_width=state_width, value_width=state_width, **common)
    mlp = MLP(
        swiglu_hidden(width, hidden_ratio) if hidden is None else hidden, init_std=init_std, out_init_std=init_std
    )
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


_SIZES = {"vocab_size": 32000, "width": 2048, "layers": 24}
_TINY = {"vocab_size": 512, "width": 64, "layers": 4, "hidden": 192, "max_length": 512}
_CLASS = "the default configuration of flash-linear-attention, whose class has this count"

preset("hgrn-1.3b", "hgrn", parameters=1364.4, citation=f"arXiv:2311.04823; {_CLASS}", **_SIZES)
preset(
    "hgrn2-1.3b",
    "hgrn",
    parameters=1364.4,
    citation=f"arXiv:2404.07904; {_CLASS}",
    **_SIZES,
    state_width=128,
    output_norm_eps=1e-5,
)
_CITATION = "a tiny variant for tests and examples"
preset("hgrn-tiny", "hgrn", citation=_CITATION, **_TINY)
preset("hgrn2-tiny", "hgrn", citation=_CITATION, **_TINY, state_width=16, output_norm_eps=1e-5)

"""HybriDNA (arXiv:2502.10807): presets of the family hybrid, seven Mamba-2 layers to one of attention, on nucleotides.

h <- h + mixer(RMSNorm(h)); h <- h + MLP(RMSNorm(h)) for every layer. Attention has no positions: the Mamba-2 layers
before it know the order. The ids are those of `pipelines.NucleotideTokenizer`.
"""

import math

from zoo.models.model import preset

PERIOD, ATTENTION = 8, 4  # one layer of attention in each 8, at this index
_CITATION = (
    "arXiv:2502.10807 and its repository (widths, layers, 7 to 1, order in a layer, no positions); attention at index "
    "4 of 8 and 12 ids as reported of the released 7B (the paper's figure: index 3); SwiGLU of 2 D fitted to the "
    "printed sizes; heads, key/value heads, the state of Mamba-2 and eps assumed"
)


def _register(
    size: str,
    citation: str,
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    max_length: int,
    mamba_head_width: int = 64,
    state: int = 128,
) -> None:
    order = ["attention" if layer == ATTENTION else "mamba2" for layer in range(PERIOD)]
    preset(
        f"hybridna-{size}",
        "hybrid",
        citation=citation,
        vocab_size=vocab_size,
        width=width,
        pattern=" ".join(f"{mixer} mlp" for mixer in order),
        repeats=layers // PERIOD,
        mixers={
            "mamba2": {
                "heads": 2 * width // mamba_head_width,
                "head_width": mamba_head_width,
                "state": state,
                "out_init_scale": 1 / math.sqrt(2 * layers),
            },
            "attention": {"heads": heads, "kv_heads": heads // 4, "head_width": width // heads, "rotary": None},
            "mlp": {"hidden": 2 * width},
        },
        norm_eps=1e-6,
        tied=False,
        max_length=max_length,
    )


_register(
    "tiny",
    "a tiny variant for tests and examples",
    vocab_size=512,
    width=64,
    layers=8,
    heads=4,
    mamba_head_width=16,
    state=16,
    max_length=512,
)
for _size, _width, _layers, _heads in (("300m", 1024, 24, 16), ("3b", 4096, 16, 32), ("7b", 4096, 32, 32)):
    _register(_size, _CITATION, vocab_size=12, width=_width, layers=_layers, heads=_heads, max_length=131074)

"""Associative recall in the small (MQAR) by one mixer (the variant), with the size of its state where it has a knob.

    python launch/main.py --config=launch/configs/recall.py:attention --workdir=runs/recall_attention
    python launch/main.py --config=launch/configs/recall.py:mamba-4 --workdir=runs/recall_mamba_4

A row shows 8 pairs of a key and a value, then asks for the value of every key (arXiv:2312.04927). All models have two
layers of width 64: a gated convolution of 3 tokens, which brings a key and its value together, and the mixer, as in the
comparison of Based (arXiv:2402.18668). They differ in the mixer alone, and in what its state holds: keys and values of
all tokens (attention) or of the last 16 (attention-16), Taylor features of keys of so many channels (based-4, based-8),
so many states per channel (mamba-4, mamba-16, mamba2-4, mamba2-16), values under keys of so many channels (gla-8,
gla-32, mlstm-8, mlstm-32). Other sizes can be named, too. No mixer knows positions, but from its decay. More pairs:
--config.data.source.pairs=16 --config.sequence_length=64.

Matrices start with a standard deviation of 0.1, as in colabs/02_mixers.ipynb: the usual 0.02 is for wide models.
What comes out: docs/claims.md.
"""

from typing import Any

from launch.configs import base
from zoo.core.registry import nearest

WIDTH = 64
_ATTENTION = {"heads": 1, "kv_heads": 1, "head_width": WIDTH, "rotary": None}
# name: the mixer, its options, the option that is its size, the sizes that are compared
MIXERS: dict[str, tuple[str, dict[str, Any], str, tuple[int | None, ...]]] = {
    "attention": ("attention", _ATTENTION, "window", (16, None)),
    "based": ("taylor_attention", {"heads": 1, "head_width": WIDTH}, "feature_dim", (4, 8)),
    "mamba": ("mamba", {"inner": 2 * WIDTH}, "state", (4, 16)),
    "mamba2": ("mamba2", {"heads": 2, "head_width": WIDTH}, "state", (4, 16)),
    "gla": ("gated_linear_attention", {"heads": 1, "value_width": WIDTH}, "key_width", (8, 32)),
    "mlstm": ("mlstm", {"heads": 1, "value_width": WIDTH}, "key_width", (8, 32)),
}
VARIANTS = tuple(
    name if size is None else f"{name}-{size}" for name, (_, _, _, sizes) in MIXERS.items() for size in sizes
)
LEARNING_RATES = {"attention": 4e-3, "based": 4e-3, "mamba": 4e-3, "mamba2": 1.2e-2, "gla": 4e-3, "mlstm": 4e-3}


def get_config(variant: str = "attention") -> Any:
    """8 pairs in 32 tokens, 64 ids. A mixer without a size has its largest."""
    name, dash, size = variant.partition("-")
    if name not in MIXERS or (dash and not size.isdecimal()):
        raise ValueError(f"recall.py:{variant} is unknown; {nearest(variant, sorted({*MIXERS, *VARIANTS}))}")
    mixer, options, option, sizes = MIXERS[name]
    config = base.get_config()
    config.model = {
        "name": "hybrid",
        "vocab_size": None,
        "dtype": "float32",
        "width": WIDTH,
        "pattern": f"base_conv {mixer}",
        "repeats": 1,
        "mixers": {
            "base_conv": {"inner": 2 * WIDTH},
            mixer: {**options, option: int(size) if size else sizes[-1]},
        },
        "init_std": 0.1,
        "max_length": 32,
    }
    config.steps = 1000
    config.batch_size = 32
    config.sequence_length = 32
    config.data.source = {
        "name": "mqar",
        "vocab_size": 64,
        "pairs": 8,
        "random_non_queries": False,
        "validation_examples": 512,
    }
    config.data.tokenizer = {"name": "none"}
    config.optimizer.learning_rate = LEARNING_RATES[name]
    config.optimizer.weight_decay = 0.01
    config.optimizer.schedule.warmup_steps = 30
    config.checkpoint.every = 0
    config.evaluate.every = config.steps
    config.log.every = 50
    return config

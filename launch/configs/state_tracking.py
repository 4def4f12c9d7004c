"""State tracking in the small: products of permutations by one of slstm, lstm, mamba and attention (the variant).

    python launch/main.py --config=launch/configs/state_tracking.py:slstm --workdir=runs/tracking_slstm

Every token is a permutation, and the target at every position is the product of all so far (arXiv:2404.08819). The four
models have about 100k parameters in two blocks of width 64. A word problem of another group or length:
--config.data.source.group=s5 --config.sequence_length=64; on rows longer than those of training:
--config.data.source.validation_length=128.

Expected on 2 CPU cores: minutes per variant; see docs/measurements.md.
"""

from typing import Any

from launch.configs import base
from zoo.core.registry import nearest

_SIZES = {"vocab_size": None, "dtype": "float32", "width": 64, "max_length": 512}
MODELS: dict[str, dict[str, Any]] = {
    "slstm": {"name": "xlstm-blocks", "layers": 2, "heads": 1, "ratio": (0, 1), **_SIZES},
    "lstm": {"name": "lstm", "layers": 2, "hidden": 128, **_SIZES},
    "mamba": {"name": "mamba", "layers": 4, **_SIZES},
    "attention": {"name": "dense", "layers": 2, "heads": 4, "hidden": 192, **_SIZES},
}


def get_config(model: str = "slstm") -> Any:
    """S3 at 32 tokens."""
    if model not in MODELS:
        raise ValueError(f"state_tracking.py:{model} is unknown; {nearest(model, MODELS)}")
    config = base.get_config()
    config.model = MODELS[model]
    config.steps = 1500
    config.batch_size = 64
    config.sequence_length = 32
    config.data.source = {"name": "state_tracking", "group": "s3", "inputs": "elements", "validation_length": None}
    config.data.tokenizer = {"name": "none"}
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.01
    config.checkpoint.every = 0
    config.evaluate.every = 250
    config.log.every = 50
    return config

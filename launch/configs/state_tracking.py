"""State tracking in the small: products of permutations by one of slstm, lstm, mamba and attention (the variant).

    python launch/main.py --config=launch/configs/state_tracking.py:slstm --workdir=runs/tracking_slstm

Every token is one of the six permutations of three things, and the target at every position is the product of all so
far (arXiv:2404.08819). The four models have about 100k parameters at width 64. They train on rows of 12 tokens and are
evaluated on rows of 48: the columns loss and accuracy of metrics.csv are of 12 tokens, none of which was seen before,
validation_loss and validation_accuracy of 48. Other groups and lengths: --config.data.source.group=s5,
--config.sequence_length=32, --config.data.source.validation_length=128.

Expected on 2 CPU cores: a minute or two per variant. Accuracy on 12 and on 48 tokens, means of three seeds: slstm 1.00
and 0.97, lstm 0.84 and 0.52, mamba 1.00 and 0.40, attention 0.54 and 0.26 (a guess is right once in six times); see
docs/claims.md.
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
LEARNING_RATES = {"slstm": 1e-2, "lstm": 1e-2, "mamba": 5e-3, "attention": 3e-3}


def get_config(model: str = "slstm") -> Any:
    """S3, 12 tokens to train on and 48 to be evaluated on."""
    if model not in MODELS:
        raise ValueError(f"state_tracking.py:{model} is unknown; {nearest(model, MODELS)}")
    config = base.get_config()
    config.model = MODELS[model]
    config.steps = 800
    config.batch_size = 64
    config.sequence_length = 12
    config.data.source = {
        "name": "state_tracking",
        "group": "s3",
        "inputs": "elements",
        "validation_length": 48,
        "validation_examples": 256,
    }
    config.data.tokenizer = {"name": "none"}
    config.optimizer.learning_rate = LEARNING_RATES[model]
    config.optimizer.weight_decay = 0.01
    config.checkpoint.every = 0
    config.evaluate.every = 200
    config.log.every = 50
    return config

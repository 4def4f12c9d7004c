"""Associative recall in the small (MQAR): one of slstm, lstm, mamba and attention (the variant).

    python launch/main.py --config=launch/configs/recall.py:attention --workdir=runs/recall_attention

A row shows pairs of a key and a value, then asks for the value of every key (arXiv:2312.04927). The models are those of
launch/configs/state_tracking.py, and the comparison is its other half: what a fixed state can hold. More pairs:
--config.data.source.pairs=16 --config.sequence_length=128.

How long a variant takes, and what it reaches, has not been measured.
"""

from typing import Any

from launch.configs import state_tracking


def get_config(model: str = "attention") -> Any:
    """4 pairs in 64 tokens, 256 ids."""
    config = state_tracking.get_config(model)
    config.sequence_length = 64
    config.data.source = {"name": "mqar", "vocab_size": 256, "pairs": 4, "random_non_queries": False}
    return config

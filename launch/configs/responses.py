"""What the recipes of responses share: a small model on sums such as "12+7=", whose answers can be checked.

Not a recipe itself: `sft.py`, `preference.py`, `kto.py`, `reward.py`, `grpo.py` and `spin.py` start from it.
"""

from typing import Any

from launch.configs import base

RUNS = "runs/sums"


def get_config(kind: str) -> Any:
    """Width 64, two layers, bytes; records of one kind."""
    config = base.get_config()
    config.batch_size = 32
    config.sequence_length = 16
    config.data.source = {"name": "arithmetic", "kind": kind, "low": 0, "high": 49}
    config.model = {
        "name": "llama-tiny",
        "vocab_size": None,
        "width": 64,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "hidden": 128,
        "max_length": 32,
    }
    config.checkpoint.every = 0
    config.evaluate.every = 50
    config.log.every = 25
    config.generate.update(prompts=("12+7=", "30+4=", "25+25="), max_tokens=8, temperature=0.0)
    return config


def after(config: Any, run: str) -> Any:
    """Goes on from the run of another recipe, with a lower learning rate."""
    config.initial = {"name": "run", "workdir": f"{RUNS}/{run}"}
    config.steps = 100
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 0.0
    config.optimizer.schedule.warmup_steps = 10
    config.evaluate.every = 25
    return config

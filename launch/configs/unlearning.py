"""Unlearning: a model of `sft.py`, which has learnt sums of numbers below 50, is to forget those of 40 to 49.

python launch/main.py --config=launch/configs/unlearning.py:npo --workdir=runs/sums/npo
python launch/main.py --config=launch/configs/unlearning.py:simnpo --workdir=runs/sums/simnpo_forget
python launch/main.py --config=launch/configs/unlearning.py:gradient_ascent --workdir=runs/sums/ascent
"""

from typing import Any

from launch.configs import responses
from zoo.core.registry import check_choice

OBJECTIVES: dict[str, dict[str, Any]] = {
    "npo": {"name": "npo", "beta": 0.1},  # arXiv:2404.05868
    "simnpo": {"name": "simnpo", "beta": 2.5},  # arXiv:2410.07163
    "gradient_ascent": {"name": "gradient_ascent", "max_nll": 5.56},  # arXiv:2210.01504; log 260
}


def get_config(objective: str = "npo") -> Any:
    """Retained are sums of numbers below 40."""
    check_choice("unlearning", objective, OBJECTIVES)
    config = responses.after(responses.get_config("sft"), "sft")
    config.data.source.high = 39
    config.data.forget = {"name": "arithmetic", "kind": "sft", "low": 40, "high": 49}
    config.objective = {**OBJECTIVES[objective], "retain": "cross_entropy", "retain_weight": 1.0}
    if objective == "npo":
        config.teacher = {"name": "initial"}
    return config

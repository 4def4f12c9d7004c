"""Unlearning: a model of `sft.py`, which has learnt sums of numbers below 50, is to forget those of 40 to 49.

python launch/main.py --config=launch/configs/unlearning.py:npo --workdir=runs/sums/npo
python launch/main.py --config=launch/configs/unlearning.py:simnpo --workdir=runs/sums/simnpo_forget
python launch/main.py --config=launch/configs/unlearning.py:gradient_ascent --workdir=runs/sums/ascent

Three minutes each on 2 busy CPU cores, seed 0. Nats per token of what is to be forgotten (forget_nll, of the batches)
rise from 0.61 to 8.65 with NPO, to 2.79 with SimNPO, to 5.56 with gradient ascent; of held-out sums that are retained
they are 0.522, 0.466 and 0.510 at the end, with 81, 82 and 82 % of the tokens right. NPO's loss is 2 / beta times a
number of order one: with a retain_weight of 1 it forgets more (10.5) and retains less (0.734, 74 %).
"""

from typing import Any

from launch.configs import responses
from zoo.core.registry import check_choice

OBJECTIVES: dict[str, dict[str, Any]] = {
    "npo": {"name": "npo", "beta": 0.1, "retain_weight": 10.0},  # arXiv:2404.05868
    "simnpo": {"name": "simnpo", "beta": 2.5},  # arXiv:2410.07163
    "gradient_ascent": {"name": "gradient_ascent", "max_nll": 5.56},  # arXiv:2210.01504; log 260
}


def get_config(objective: str = "npo") -> Any:
    """Retained are sums of numbers below 40."""
    check_choice("unlearning", objective, OBJECTIVES)
    config = responses.after(responses.get_config("sft"), "sft")
    config.data.source.high = 39
    config.data.forget = {"name": "arithmetic", "kind": "sft", "low": 40, "high": 49}
    config.objective = {"retain": "cross_entropy", "retain_weight": 1.0, **OBJECTIVES[objective]}
    if objective == "npo":
        config.teacher = {"name": "initial"}
    return config

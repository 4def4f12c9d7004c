"""Preference optimisation from pairs: any objective of pairs by name, from the model of `sft.py`.

    python launch/main.py --config=launch/configs/preference.py --workdir=runs/sums/dpo
    python launch/main.py --config=launch/configs/preference.py --config.objective.name=ipo --workdir=runs/sums/ipo
    python launch/main.py --config=launch/configs/preference.py --config.objective.name=simpo --workdir=runs/sums/simpo
    python launch/main.py --config=launch/configs/preference.py --config.objective.name=orpo --workdir=runs/sums/orpo

A chosen answer is right, the rejected one a near miss. The reference is the model as it starts; with
--config.teacher.precompute=True its log-probabilities are computed once, before the first step. Objectives without a
reference leave it out. Half a minute each on 2 CPU cores; the share of held-out pairs with the higher reward for the
chosen answer rises from 0.67 after 25 steps to 0.85 after 100 with DPO, and ends at 0.88 with IPO, 0.88 with SimPO and
0.93 with ORPO. `python -m objectives.catalog --category preference` lists them all.
"""

from typing import Any

from launch.configs import responses


def get_config() -> Any:
    """Pairs of sums."""
    config = responses.after(responses.get_config("pairs"), "sft")
    config.teacher = {"name": "initial"}
    config.objective = {"name": "dpo"}
    return config

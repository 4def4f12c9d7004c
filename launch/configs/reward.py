"""A reward model from pairs (Bradley-Terry), from the model of `sft.py`.

    python launch/main.py --config=launch/configs/reward.py --workdir=runs/sums/reward

The reward of a response is the logit of the mask token, which no text holds, after its last token. On 2
CPU cores, half a minute: the right answer has the higher reward in 0.70 of held-out pairs with a near miss (0.63 after
100 steps).
"""

from typing import Any

from launch.configs import responses


def get_config() -> Any:
    """Pairs of sums."""
    config = responses.after(responses.get_config("pairs"), "sft")
    config.objective = {"name": "bradley_terry"}
    config.optimizer.learning_rate = 1e-3
    config.steps = 600
    config.evaluate.every = 100
    return config

"""SPIN (arXiv:2401.01335): a model against its own past, two iterations from the model of `sft.py`.

    python launch/main.py --config=launch/configs/spin.py:first --workdir=runs/sums/spin_first
    python launch/main.py --config=launch/configs/spin.py:second --workdir=runs/sums/spin_second

In every iteration the opponent is the model as the iteration starts: it draws the rejected response to each prompt, and
is the reference. The chosen response is that of the data. On 2 CPU cores, half a minute each: the loss on held-out
prompts falls from 0.693, where model and opponent are equal, to 0.661, and in the second iteration to 0.662. With
beta 0.1 and a learning rate of 3e-4 it rose instead, as the chosen responses lost probability, too.
"""

from typing import Any

from launch.configs import responses
from zoo.core.registry import check_choice

STARTS = {"first": "sft", "second": "spin_first"}


def get_config(iteration: str = "first") -> Any:
    """32 prompts a step."""
    check_choice("spin", iteration, STARTS)
    config = responses.after(responses.get_config("sft"), STARTS[iteration])
    config.optimizer.learning_rate = 1e-4
    config.teacher = {"name": "initial"}
    config.objective = {"name": "spin", "beta": 1.0}
    config.rollout.update(name="teacher", max_tokens=4)
    config.data.source.validation_examples = 64
    return config

"""KTO: responses with a label in place of pairs (arXiv:2402.01306), from the model of `sft.py`.

python launch/main.py --config=launch/configs/kto.py --workdir=runs/sums/kto

On 2 CPU cores, half a minute: the loss on held-out responses falls from 0.5, where policy and reference are equal, to
0.467.
"""

from typing import Any

from launch.configs import responses


def get_config() -> Any:
    """Right and wrong sums; the baseline is of prompts with the response of another one."""
    config = responses.after(responses.get_config("unpaired"), "sft")
    config.data.source.mismatched = True
    config.teacher = {"name": "initial"}
    config.objective = {"name": "kto"}
    return config

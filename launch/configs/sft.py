"""Supervised fine-tuning: prompts with a response, the loss on the response alone, several examples to a row.

    python launch/main.py --config=launch/configs/sft.py --workdir=runs/sums/sft

On 2 CPU cores, half a minute: 0.520 nats per token of held-out answers, 80 % of their tokens right.

The prompts too, at a tenth of the weight (instruction modelling, arXiv:2405.14394):
--config.data.source.loss=all --config.objective.name=instruction_modelling --config.objective.prompt_weight=0.1.
Examples weighed by a "quality" of their records, and a learning rate that follows the tokens of a step
(arXiv:2410.18565): --config.data.source.quality=True --config.objective.name=weighted_cross_entropy
--config.optimizer.reference_tokens=512.

Your own data, one JSON object to a line ({"messages": ...} or {"prompt": ..., "response": ...}):
--config.data.source.name=sft with .paths and .template; see pipelines/preference.py.
"""

from typing import Any

from launch.configs import responses


def get_config() -> Any:
    """Sums of two numbers below 50."""
    config = responses.get_config("sft")
    config.data.source.pack = True
    config.sequence_length = 64
    config.batch_size = 16
    config.steps = 400
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule.warmup_steps = 20
    return config

"""GRPO (arXiv:2402.03300) on sums that a program checks, with responses drawn in every step; from `sft.py`.

    python launch/main.py --config=launch/configs/grpo.py --workdir=runs/sums/grpo

`reward` is the share of right answers among the samples of a step. On 2 CPU cores, under two minutes: it rises from
0.27 (mean of the first 20 steps) to 0.37 (of the last 20), on held-out prompts to 0.33 (0.28 after 100 steps).

Variants by options alone: Dr. GRPO is
--config.objective.aggregation=length --config.objective.max_length=16 with
--config.rollout.advantages=group_unscaled; DAPO's upper clip --config.objective.clip_high=0.28; GSPO
--config.objective.level=sequence; RLOO's advantages --config.rollout.advantages=leave_one_out.
"""

from typing import Any

from launch.configs import responses


def get_config() -> Any:
    """32 prompts a step, 16 samples each."""
    config = responses.after(responses.get_config("sft"), "sft")
    config.steps = 300
    config.optimizer.learning_rate = 2e-4
    config.optimizer.b2 = 0.99
    config.evaluate.every = 100
    config.objective = {"name": "grpo"}
    config.rollout.update(name="policy", samples=16, max_tokens=4, reward="arithmetic")
    config.data.source.validation_examples = 128
    return config

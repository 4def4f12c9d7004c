"""GRPO (arXiv:2402.03300) on sums that a program checks, with responses drawn in every step; from `sft.py`.

    python launch/main.py --config=launch/configs/grpo.py --workdir=runs/sums/grpo

`reward` is the share of right answers among the samples of a step. Variants by options alone: Dr. GRPO is
--config.objective.aggregation=length --config.objective.max_length=16 with
--config.rollout.advantages=group_unscaled; DAPO's upper clip --config.objective.clip_high=0.28; GSPO
--config.objective.level=sequence; RLOO's advantages --config.rollout.advantages=leave_one_out.
"""

from typing import Any

from launch.configs import responses


def get_config() -> Any:
    """16 prompts a step, 8 samples each."""
    config = responses.after(responses.get_config("sft"), "sft")
    config.batch_size = 16
    config.objective = {"name": "grpo"}
    config.rollout.update(name="policy", samples=8, max_tokens=4, reward="arithmetic")
    config.data.source.validation_examples = 64
    return config

"""Responses that a model draws while it trains: for policies that learn from rewards, and against its own past.

A rollout replaces a batch of prompts and responses by one of drawn responses before the step: with name "policy" by
`samples` responses of the model as it is, with their rewards and advantages; with name "teacher" by pairs of the given
response, chosen, and one that the frozen teacher draws, rejected (SPIN, arXiv:2401.01335).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from launch.config import ConfigError
from launch.data import Data
from objectives.rl import advantages as advantages_lib
from pipelines.rewards import REWARDS
from zoo.core.params import Tree
from zoo.core.registry import check_choice
from zoo.decoding import Generation, Sampling, generate
from zoo.models import Model

NAMES = ("none", "policy", "teacher")
ADVANTAGES: dict[str, Callable[[Any], Any]] = {
    "group": advantages_lib.group_advantages,
    "group_unscaled": lambda rewards: advantages_lib.group_advantages(rewards, scale="none"),
    "leave_one_out": advantages_lib.leave_one_out_advantages,
}


def check(plain: dict[str, Any], category: str) -> None:
    """Raises ConfigError for a config.rollout that cannot be, or that the objective does not go with."""
    options = plain["rollout"]
    check_choice("name", options["name"], NAMES)
    if (options["name"] == "policy") != (category == "rl"):
        wanted = "'policy'" if category == "rl" else "'none' or 'teacher'"
        raise ConfigError(
            f"config.rollout.name={options['name']!r}: objective {plain['objective']['name']!r} takes {wanted}"
        )
    if options["name"] == "none":
        return
    check_choice("advantages", options["advantages"], ADVANTAGES)
    check_choice("reward", options["reward"], REWARDS)
    for name in ("samples", "max_tokens"):
        if not isinstance(options[name], int) or options[name] < 1:
            raise ConfigError(f"config.rollout.{name}={options[name]!r} must be a number of at least 1")
    if options["name"] == "policy" and options["samples"] < 2:
        raise ConfigError("config.rollout.samples=1: advantages compare at least 2 responses to a prompt")
    if not options["temperature"] > 0:
        raise ConfigError(f"config.rollout.temperature={options['temperature']!r} must be above 0")
    if jax.process_count() > 1:
        raise ConfigError("config.rollout draws responses in one process; others are not supported yet")


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Draws the responses of a batch.

    Attributes:
      model: that draws: the policy, or the teacher.
      data: of prompts and responses, with a tokenizer.
      options: config.rollout.
      seed: of the run.
      implementation: of the model's ops.
    """

    model: Model
    data: Data
    options: dict[str, Any]
    seed: int
    implementation: str | None = None

    def __call__(self, params: Tree, batch: dict[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
        """The batch of drawn responses.

        Args:
          params: of `model`.
          batch: arrays [B, 1, T] as `responses` has them.
          step: number of the step; the draws are a function of it, of the seed and of nothing else.
        """
        samples = self.options["samples"] if self.options["name"] == "policy" else 1
        prompts = [prompt_of(row, batch) for row in range(len(batch["tokens"]))]
        there = [row for row, prompt in enumerate(prompts) if len(prompt)]  # a padded batch has rows of nothing
        drawn = generate(
            self.model,
            params,
            [prompts[row] for row in there for _ in range(samples)],
            max_new_tokens=self.options["max_tokens"],
            sampling=Sampling(temperature=float(self.options["temperature"])),
            key=jax.random.fold_in(jax.random.key(self.seed), step),
            eos_id=self.data.end_ids,
            implementation=self.implementation,
        )
        groups = {row: drawn[i * samples : (i + 1) * samples] for i, row in enumerate(there)}
        if self.options["name"] == "teacher":
            return self._pairs(batch, prompts, groups)
        return self._rewarded(batch, prompts, groups, samples)

    def _pairs(self, batch, prompts, groups) -> dict[str, np.ndarray]:
        rejected = self._rows(batch, prompts, groups, 1)
        both = {key: np.concatenate([batch[key], rejected[key]], axis=1) for key in rejected if key in batch}
        return {**batch, **both}

    def _rewarded(self, batch, prompts, groups, samples: int) -> dict[str, np.ndarray]:
        rows = self._rows(batch, prompts, groups, samples)
        reward = REWARDS[self.options["reward"]]
        rewards = np.zeros((len(prompts), samples), np.float32)
        text = self.data.tokenizer.decode
        for row, group in groups.items():
            prompt, given = text(prompts[row]), text(response_of(row, batch))
            rewards[row] = [reward(prompt, text(each.tokens), given) for each in group]
        advantages = np.asarray(ADVANTAGES[self.options["advantages"]](rewards))
        return {**rows, "rewards": rewards, "advantages": advantages}

    def _rows(self, batch, prompts, groups: dict[int, list[Generation]], samples: int) -> dict[str, np.ndarray]:
        """Drawn responses as arrays [B, samples, T] of the batch's T."""
        length = batch["tokens"].shape[-1]
        shape = (len(prompts), samples, length)
        rows = {key: np.zeros(shape, np.int32) for key in ("tokens", "targets", "segment_ids", "positions")}
        rows |= {key: np.zeros(shape, np.float32) for key in ("loss_mask", "old_logps")}
        for row, group in groups.items():
            for k, each in enumerate(group):
                ids, first = [*prompts[row], *each.tokens][: length + 1], len(prompts[row]) - 1
                size = len(ids) - 1
                rows["tokens"][row, k, :size], rows["targets"][row, k, :size] = ids[:-1], ids[1:]
                rows["segment_ids"][row, k, :size], rows["positions"][row, k, :size] = 1, np.arange(size)
                rows["loss_mask"][row, k, first:size] = 1
                rows["old_logps"][row, k, first:size] = each.logprobs[: size - first]
        return rows


def prompt_of(row: int, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Ids of the prompt of an example: what stands before its first counted target."""
    counted = np.flatnonzero(batch["loss_mask"][row, 0])
    return batch["tokens"][row, 0, : counted[0] + 1] if counted.size else np.zeros(0, np.int32)


def response_of(row: int, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Ids of the response of an example: its counted targets."""
    return batch["targets"][row, 0][batch["loss_mask"][row, 0] != 0]

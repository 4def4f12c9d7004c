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
from objectives.rl import advantages as advantages_lib
from pipelines import ResponseDataset
from pipelines.rewards import REWARDS
from zoo.core.params import Tree
from zoo.core.registry import check_choice
from zoo.decoding import Generation, Sampling, generate
from zoo.models import Model

Batch = dict[str, np.ndarray]
Groups = dict[int, list[Generation]]  # drawn responses by the row of their prompt
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
      data: of prompts with one response.
      end_id: token that ends a response.
      options: config.rollout.
      seed: of the run.
      implementation: of the model's ops.
    """

    model: Model
    data: ResponseDataset
    end_id: int
    options: dict[str, Any]
    seed: int
    implementation: str | None = None

    def __call__(self, params: Tree, batch: Batch, step: int, split: str) -> Batch:
        """The batch of drawn responses.

        Args:
          params: of `model`.
          batch: arrays as of `ResponseDataset`, one response to a prompt.
          step: number of the step; the draws are a function of it, of the seed and of nothing else.
          split: that the examples are of.

        Raises:
          ConfigError: a prompt whose response may not fit into the rows.
        """
        samples = self.options["samples"] if self.options["name"] == "policy" else 1
        # A batch that is not full ends in rows of nothing.
        there = np.flatnonzero(batch["loss_mask"].any(axis=(1, 2)))
        prompts = {row: self.data.prompt(split, int(batch["index"][row])) for row in there.tolist()}
        room = batch["tokens"].shape[-1] + 1 - max(len(prompt) for prompt in prompts.values())
        if room < self.options["max_tokens"]:
            raise ConfigError(
                f"config.rollout.max_tokens={self.options['max_tokens']} does not fit behind the prompts of a batch; "
                f"lower it to {room} or raise config.sequence_length"
            )
        drawn = generate(
            self.model,
            params,
            [prompt.tolist() for prompt in prompts.values() for _ in range(samples)],
            max_new_tokens=self.options["max_tokens"],
            sampling=Sampling(temperature=float(self.options["temperature"])),
            key=jax.random.fold_in(jax.random.key(self.seed), step),
            eos_id=self.end_id,
            implementation=self.implementation,
        )
        groups = {row: drawn[i * samples : (i + 1) * samples] for i, row in enumerate(prompts)}
        rows = self._rows(batch, prompts, groups, samples)
        if self.options["name"] == "teacher":
            pairs = {key: np.concatenate([batch[key], rows[key]], axis=1) for key in rows if key in batch}
            return {**batch, **pairs}
        rewards = self._rewards(batch, groups, samples, split)
        return {**rows, "rewards": rewards, "advantages": np.asarray(ADVANTAGES[self.options["advantages"]](rewards))}

    def _rewards(self, batch: Batch, groups: Groups, samples: int, split: str) -> np.ndarray:
        """float32[B, samples]; 0 for rows of nothing."""
        reward, examples = REWARDS[self.options["reward"]], self.data.examples(split)
        rewards = np.zeros((len(batch["tokens"]), samples), np.float32)
        for row, group in groups.items():
            example = examples[int(batch["index"][row])]
            prompt, given = example.prompt[-1]["content"], example.responses[0][-1]["content"]
            texts = [self.data.tokenizer.decode(i for i in each.tokens if i != self.end_id) for each in group]
            rewards[row] = [reward(prompt, text, given) for text in texts]
        return rewards

    def _rows(self, batch: Batch, prompts: dict[int, np.ndarray], groups: Groups, samples: int) -> Batch:
        """Drawn responses as arrays [B, samples, T] of the batch's T."""
        length = batch["tokens"].shape[-1]
        shape = (len(batch["tokens"]), samples, length)
        rows = {key: np.zeros(shape, np.int32) for key in ("tokens", "targets", "segment_ids", "positions")}
        rows |= {key: np.zeros(shape, np.float32) for key in ("loss_mask", "old_logps")}
        for row, group in groups.items():
            for k, each in enumerate(group):
                ids, first = [*prompts[row], *each.tokens], len(prompts[row]) - 1
                size = len(ids) - 1
                rows["tokens"][row, k, :size], rows["targets"][row, k, :size] = ids[:-1], ids[1:]
                rows["segment_ids"][row, k, :size], rows["positions"][row, k, :size] = 1, np.arange(size)
                rows["loss_mask"][row, k, first:size] = 1
                rows["old_logps"][row, k, first:size] = each.logprobs
        return rows

"""What every generated task shares: examples that are pure functions of (seed, split, index), and their batches."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import grain
import numpy as np

from pipelines.packing import READ, check_positive, check_seed, local_batches
from pipelines.sources import SPLITS
from zoo.core.registry import Registry, check_keys

TASKS: "Registry[type[Task]]" = Registry("task")


class Example(NamedTuple):
    """One row: tokens, targets int32[T]; asked, bool[T], where the target is to be predicted."""

    tokens: np.ndarray
    targets: np.ndarray
    asked: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A generator of rows of token ids, with a target at some of the positions.

    Example i of a split is drawn by a generator that is seeded with (seed, split, i): no example depends on another, on
    a batch or on a process. Rows of the two splits are drawn independently; where a task has few rows in all, they may
    coincide.

    Args:
      seed: of all examples.
      train_examples: rows of an epoch; every epoch shows them in another order.
      validation_examples: rows of an evaluation.
      validation_length: tokens of a row of an evaluation; None = as in training.
    """

    seed: int = 0
    train_examples: int = 1_000_000
    validation_examples: int = 1024
    validation_length: int | None = None
    version: ClassVar[int] = 1  # raise it when the examples that a task makes change

    def __post_init__(self):
        check_seed(self.seed)
        check_positive(train_examples=self.train_examples, validation_examples=self.validation_examples)
        if self.validation_length is not None:
            check_positive(validation_length=self.validation_length)

    @property
    def ids(self) -> int:
        """Number of token ids, inputs and targets together."""
        raise NotImplementedError

    @property
    def answers(self) -> int:
        """Number of ids that can be a target."""
        raise NotImplementedError

    def check_length(self, length: int) -> None:
        """Raises ValueError for a length of rows that the task cannot make."""
        check_positive(length=length)

    def draw(self, rng: np.random.Generator, length: int) -> Example:
        """A row of `length` tokens."""
        raise NotImplementedError

    def example(self, split: str, index: int, length: int) -> Example:
        """Row `index` of "train" or "validation"."""
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not supported; allowed: {', '.join(SPLITS)}")
        return self.draw(np.random.default_rng([self.seed, SPLITS.index(split), index]), length)


def make_task(config: Mapping[str, Any]) -> Task:
    """Builds the task that `config["name"]` names with the other entries as its options.

    Raises:
      KeyError, ValueError: unknown name or option, with the nearest one, or a value that the task refuses.
    """
    options = dict(config)
    if "name" not in options:
        raise ValueError("a task config needs a 'name', for example {'name': 'mqar'}")
    name = options.pop("name")
    kind = TASKS.get(name)
    check_keys(f"task {name!r}", options, [field.name for field in dataclasses.fields(kind)])
    return kind(**options)


class TaskDataset:
    """The batches of a task, beside `TextDataset`: what a run needs of its data.

    Attributes:
      task: the task.
      vocab_size: number of ids.
      fingerprint: hash of the task, its options and its version.
      uniform_loss: nats per target of a uniform guess among the answers.
      metrics: what runs report, nats per target and the share of targets that is met; the first one chooses the best
        checkpoint. unit: of what is held out.
      tokenizer: None: the ids stand for no text.

    Args:
      task: a task.
      length: tokens of a training row.

    Raises:
      ValueError: the task cannot make rows of such a length.
    """

    metrics = ("loss", "accuracy")
    unit = "examples"
    tokenizer = None

    def __init__(self, task: Task, length: int):
        self.task, self.length = task, length
        self.validation_length = length if task.validation_length is None else task.validation_length
        for each in (self.length, self.validation_length):
            task.check_length(each)
        self.vocab_size = task.ids
        self.uniform_loss = math.log(task.answers)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the rows depend on but their length."""
        parts = [type(self.task).__name__, self.task.version, dataclasses.asdict(self.task)]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def train_iterator(
        self, *, batch_size: int, seed: int, epochs: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> grain.DatasetIterator:
        """Batches of shuffled examples; `get_state` / `set_state` continue exactly.

        Args:
          batch_size: rows B of the global batch; this process yields B / process_count of them.
          seed: of the order of the examples; the examples are those of the task's own seed.
          epochs: passes over the examples, each in another order; None never ends. The last batch is padded.
          process_index, process_count: which block of each global batch to yield.

        Returns:
          Iterator of dicts: tokens, targets, segment_ids, positions int32[B/P, T], loss_mask float32[B/P, T].
        """
        check_positive(batch_size=batch_size)
        check_seed(seed)
        if epochs is not None:
            check_positive(epochs=epochs)
        order = grain.MapDataset.range(self.task.train_examples).seed(seed).shuffle().repeat(epochs)
        return self._batches(order, "train", self.length, batch_size, process_index, process_count)

    def evaluation_iterator(
        self, *, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> grain.DatasetIterator:
        """One pass over the held-out examples in order, dicts as in `train_iterator`; the last batch is padded."""
        check_positive(batch_size=batch_size)
        order = grain.MapDataset.range(self.task.validation_examples)
        return self._batches(order, "validation", self.validation_length, batch_size, process_index, process_count)

    def _batches(self, order, split, length, batch_size, process_index, process_count) -> grain.DatasetIterator:
        def row(index: int) -> dict[str, np.ndarray]:
            tokens, targets, asked = self.task.example(split, int(index), length)
            return {
                "tokens": tokens.astype(np.int32),
                "targets": targets.astype(np.int32),
                "loss_mask": asked.astype(np.float32),
                "segment_ids": np.ones(length, np.int32),
                "positions": np.arange(length, dtype=np.int32),
            }

        rows = order.map(row).to_iter_dataset(READ)
        return iter(local_batches(rows, batch_size, process_index, process_count))

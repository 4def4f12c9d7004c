"""Sums with answers that can be checked: "12+7=" and "19", in every kind of record that preferences come in."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipelines.errors import DataError
from pipelines.packing import check_positive, check_seed
from pipelines.preference import RESPONSE_SOURCES, ResponseSource
from pipelines.sources import SPLITS

_OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
_PROMPT = re.compile(r"(\d+)([+\-*])(\d+)=", re.ASCII)
_TRIES = 10_000  # draws until a prompt falls on its side of the split


def answer(prompt: str) -> int:
    """The right answer. ValueError for what is no "a+b=", "a-b=" or "a*b=" of digits."""
    found = _PROMPT.fullmatch(prompt)
    if found is None:
        raise ValueError(f"prompt {prompt[:40]!r} is no sum such as '12+7=', with one of {' '.join(_OPERATIONS)}")
    first, operator, second = found.groups()
    return _OPERATIONS[operator](int(first), int(second))


def reward(prompt: str, response: str) -> float:
    """1.0 for the right answer, written as Python writes an int, with or without spaces about it; otherwise 0.0.

    Args:
        prompt: as of `answer`.
        response: what a model wrote, without its end mark.

    Raises:
        ValueError: not a prompt of this task.
    """
    return float(response.strip() == str(answer(prompt)))


def near_misses(right: int, count: int, rng: np.random.Generator) -> list[int]:
    """`count` wrong answers at different distances from the right one, the nearest first.

    A distance is 1 to 3 in one of the digits (1, 2, 3, 10, 20, 30, ...), as of a slip in it, up or down at random.

    Args:
        right: the right answer.
        count: how many.
        rng: source of randomness.
    """
    digits = max(len(str(abs(right))), -(-count // 3))
    distances = [step * 10**place for place in range(digits) for step in (1, 2, 3)]
    drawn = np.sort(rng.choice(len(distances), size=count, replace=False))
    return [right + distances[i] * int(rng.choice((-1, 1))) for i in drawn]


@RESPONSE_SOURCES.register("arithmetic")
@dataclasses.dataclass(kw_only=True)
class Arithmetic(ResponseSource):
    """Examples of sums, each drawn by a generator that is seeded with (seed, split, number).

    No prompt is in both splits: which one it is in follows from a hash of its text and `heldout_fraction`.

      sft       the right answer
      pairs     the right answer and a near miss (see `near_misses`)
      unpaired  either of the two, evenly, with its label
      ranked    the right answer, score 0, and near misses, whose score is minus their distance

    Args:
        kind: of records: "sft", "pairs", "unpaired" or "ranked".
        low: least operand.
        high: greatest operand.
        operators: which of + - *, as one string.
        candidates: responses of a ranked record.
        seed: of all examples.
        train_examples: their number; prompts may come again.
        validation_examples: likewise.
    """

    kind: str = "pairs"  # pyright: ignore[reportIncompatibleVariableOverride] (of records of any kind)
    low: int = 0
    high: int = 99
    operators: str = "+"
    candidates: int = 4
    seed: int = 0
    train_examples: int = 10_000
    validation_examples: int = 256

    def __post_init__(self):
        super().__post_init__()
        check_seed(self.seed)
        check_positive(train_examples=self.train_examples, validation_examples=self.validation_examples)
        if isinstance(self.low, bool) or not isinstance(self.low, int) or self.low < 0:
            raise ValueError(f"low={self.low!r} must be an int of at least 0")
        if not isinstance(self.high, int) or self.high <= self.low:
            raise ValueError(f"high={self.high!r} must be an int above low={self.low}")
        known = "".join(_OPERATIONS)
        if not isinstance(self.operators, str) or not self.operators or set(self.operators) - set(known):
            raise ValueError(f"operators={self.operators!r} must be a text of one or more of {' '.join(known)}")
        if not isinstance(self.candidates, int) or self.candidates < 2:
            raise ValueError(f"candidates={self.candidates!r} must be an int of at least 2")
        if not self.heldout_fraction:
            raise ValueError("heldout_fraction=0 leaves no prompt for validation; 0.05 holds out a twentieth")

    def files(self):
        """None: everything follows from the options."""
        return []

    def records(self) -> Iterator[tuple[dict[str, Any], str, str]]:
        """Yields one record per example, train first."""
        for split, count in zip(SPLITS, (self.train_examples, self.validation_examples), strict=True):
            for index in range(count):
                yield self._record(split, index), f"arithmetic:{split}:{index}", split

    def _record(self, split: str, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        prompt = self._prompt(rng, split)
        right = answer(prompt)
        if self.kind == "sft":
            return {"prompt": prompt, "response": str(right)}
        if self.kind == "ranked":
            answers = [right, *near_misses(right, self.candidates - 1, rng)]
            return {"prompt": prompt, "responses": [*map(str, answers)], "scores": [-abs(a - right) for a in answers]}
        (wrong,) = near_misses(right, 1, rng)
        if self.kind == "pairs":
            return {"prompt": prompt, "chosen": str(right), "rejected": str(wrong)}
        label = bool(rng.integers(2))
        return {"prompt": prompt, "response": str(right if label else wrong), "label": label}

    def _prompt(self, rng: np.random.Generator, split: str) -> str:
        for _ in range(_TRIES):
            first, second = rng.integers(self.low, self.high, size=2, endpoint=True)
            prompt = f"{first}{self.operators[rng.integers(len(self.operators))]}{second}="
            if self.split(prompt) == split:
                return prompt
        where = f"of {self.low} to {self.high} none fell to {split} in {_TRIES} draws"
        raise DataError("no prompt", str(self), f"{where}; widen the range or change heldout_fraction")

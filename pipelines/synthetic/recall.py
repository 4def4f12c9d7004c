"""Multi-query associative recall (MQAR, arXiv:2312.04927, appendix on the synthetic task)."""

import dataclasses

import numpy as np

from pipelines.packing import check_positive
from pipelines.synthetic.task import TASKS, Example, Task


@TASKS.register("mqar")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Key and value pairs k1 v1 k2 v2 .., then every key once more, scattered; the target there is its value.

    Keys are drawn from 1 .. Z/2 - 1 and values from Z/2 .. Z - 1, without replacement. After P pairs in `passes` passes
    there are (T - 2 P passes) / 2 slots of two tokens. Queries open slots g = 1, 2, .. drawn without replacement with
    p(g) in proportion to g^(power - 1): most of them come early.

    Args:
      vocab_size: Z.
      pairs: P.
      passes: how often the pairs are shown before the queries.
      power: of the distribution of slots; 1 is uniform.
      random_non_queries: fills what lies between the queries with ids of the whole vocabulary, in place of id 0.
    """

    vocab_size: int = 8192
    pairs: int = 8
    passes: int = 1
    power: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_positive(vocab_size=self.vocab_size, pairs=self.pairs, passes=self.passes)
        if self.vocab_size // 2 - 1 < self.pairs:
            raise ValueError(
                f"vocab_size={self.vocab_size} has {max(self.vocab_size // 2 - 1, 0)} keys for pairs={self.pairs}; "
                f"it must be at least {2 * (self.pairs + 1)}"
            )
        if not self.power > 0:
            raise ValueError(f"power={self.power!r} must be > 0")

    @property
    def ids(self) -> int:
        """Z."""
        return self.vocab_size

    @property
    def answers(self) -> int:
        """Number of values."""
        return self.vocab_size - self.vocab_size // 2

    def check_length(self, length: int) -> None:
        """Raises ValueError unless the length is even and has room for the pairs and as many queries."""
        least = 2 * self.pairs * (self.passes + 1)
        if length % 2 or length < least:
            raise ValueError(
                f"mqar needs an even length of at least {least} for pairs={self.pairs} and passes={self.passes}, "
                f"got {length}; the nearest is {max(length + length % 2, least)}"
            )

    def draw(self, rng: np.random.Generator, length: int) -> Example:
        """Pairs, then queries."""
        half = self.vocab_size // 2
        keys = 1 + rng.choice(half - 1, self.pairs, replace=False)
        values = half + rng.choice(self.answers, self.pairs, replace=False)
        shown = np.tile(np.stack([keys, values], axis=1).ravel(), self.passes)
        weight = np.arange(1, (length - len(shown)) // 2 + 1) ** (self.power - 1.0)
        at = len(shown) + 2 * rng.choice(len(weight), self.pairs, replace=False, p=weight / weight.sum())

        tokens, targets, asked = np.zeros(length, np.int64), np.zeros(length, np.int64), np.zeros(length, bool)
        if self.random_non_queries:
            tokens = rng.integers(self.vocab_size, size=length)
        tokens[: len(shown)] = shown
        tokens[at], targets[at], asked[at] = keys, values, True
        return Example(tokens, targets, asked)

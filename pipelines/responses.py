"""Batches of prompts with responses, for fine-tuning, preferences and rewards.

A row is a conversation `t0 .. tn` as inputs `t0 .. t(n-1)` and targets `t1 .. tn`, so that a row of T takes T + 1
tokens. The loss mask says which targets count: those of the responses (see `ChatTemplate.encode`).

The K responses of an example lie side by side, [B, K, T]. Examples are held in memory as tokens.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import logging

from pipelines.chat import ROLES, TEMPLATES
from pipelines.dataset import check_tokenizer, make_tokenizer
from pipelines.errors import DataError
from pipelines.packing import READ, check_positive, check_seed, local_batches, pack_whole
from pipelines.preference import ResponseExample, ResponseSource, make_response_source
from pipelines.sources import SPLITS
from pipelines.tokenizers import Tokenizer
from zoo.core.registry import check_choice

PARTNERS = 32  # examples that are looked at for a mismatched response


class _Tokens(NamedTuple):
    """Tokens, int32[T], which of them are to be learnt, bool[T], and which of those are not the model's, bool[T]."""

    tokens: np.ndarray
    mask: np.ndarray
    asked: np.ndarray


class _Encoded(NamedTuple):
    """An example as tokens; a response begins with the marks that open it, a prompt may have been shortened."""

    example: ResponseExample
    prompt: _Tokens
    responses: tuple[_Tokens, ...]
    shortened: bool

    @property
    def key(self) -> bytes:
        """What tells its prompt from another one."""
        return self.prompt.tokens.tobytes()


class ResponseDataset:
    """The batches of a source of responses, beside `TextDataset`: what a run needs of its data.

    A batch is a dict of arrays; rows that fill up the last batch are zeros, as are the responses that an example of a
    ranked list has fewer than others:

      tokens, targets, segment_ids, positions   int32[B, K, T]; segment 1, and 0 where a row is padding
      loss_mask                                 float32[B, K, T], whether the target counts
      prompt_mask                               float32[B, K, T], with loss="all": loss_mask at the turns that are not
                                                the model's
      index                                     int32[B], number of the example in its split
      quality                                   float32[B], where the source reads it; of packed rows float32[B, T]
      label                                     float32[B], of "unpaired": 1 desirable, 0 not
      scores                                    float32[B, K], of "ranked", and of pairs that come from ranked records
      tie                                       float32[B], of such pairs where ties are kept: 1 where neither is better

      "sft"       K = 1; packed into rows: [B, T], several segments each, without index
      "pairs"     K = 2: chosen, rejected
      "unpaired"  K = 1; with `mismatched` K = 2: the second response is another example's. It comes from the next
                  example in the epoch's order that has another prompt and whose response fits; without one among the
                  next 32 the row is empty. It neither depends on the size of batches nor on processes.
      "ranked"    K = the most responses of an example, the best first

    Attributes:
      source: where the examples are from.
      kind: "sft", "pairs", "unpaired" or "ranked".
      responses: K.
      packed: whether rows are [B, T].
      tokenizer: of the ids. template: how conversations become tokens.
      length: T.
      vocab_size: number of ids.
      info: counts of examples, tokens and tokens to be learnt by split, and of what was skipped and shortened.
      metrics: what runs report; the first one chooses the best checkpoint. unit: of what is held out.

    Args:
      source: a source of responses.
      tokenizer: of the model.
      length: tokens of a row.

    Raises:
      DataError: bad data, an example that is too long, no example to train on.
    """

    unit = "examples"

    def __init__(self, source: ResponseSource, tokenizer: Tokenizer, length: int):
        check_positive(length=length)
        self.source, self.tokenizer, self.length = source, tokenizer, length
        self.kind, self.packed, self.metrics = source.batches, source.pack, source.metrics
        self.template = TEMPLATES.get(source.template)
        self.vocab_size = tokenizer.vocab_size
        self._splits: dict[str, list[_Encoded]] = {split: [] for split in SPLITS}
        too_long = {"skipped": 0, "shortened": 0}
        for example in source.examples():
            encoded = self._encode(example)
            if encoded is None:
                too_long["skipped"] += 1
                continue
            too_long["shortened"] += encoded.shortened
            self._splits[example.split].append(encoded)
        self.info: dict[str, Any] = {split: _counts(examples) for split, examples in self._splits.items()}
        self.info |= {"skipped": dict(source.skipped), "too_long": too_long}
        logging.info("tokenised %s: %s", source, self.info)
        if not self._splits["train"]:
            fix = f"lower heldout_fraction, raise the length or add examples; {self.info}"
            raise DataError("no example to train on", str(source), fix)
        most = max(len(each.responses) for examples in self._splits.values() for each in examples)
        self.responses = 2 if source.mismatched else most
        if source.mismatched:
            for split, examples in self._splits.items():
                if examples and len({each.key for each in examples}) < 2:
                    raise DataError("one prompt alone", str(source), f"mismatched needs two; {split} has one")

    @property
    def fingerprint(self) -> str:
        """Hash of the examples, the tokenizer and the length of rows, on which depends what is skipped."""
        parts = [self.source.fingerprint(), self.tokenizer.state(), self.length]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def examples(self, split: str) -> list[ResponseExample]:
        """The examples of a split as text, by number, before anything was dropped of their prompts."""
        return [each.example for each in self._split(split)]

    def prompt(self, split: str, index: int) -> np.ndarray:
        """Ids int32[T] to generate a response from, of the prompt as it is in the batches, shortened or not."""
        encoded = self._split(split)[index]
        return np.concatenate([encoded.prompt.tokens, self.template.start_of_response(self.tokenizer)])

    def train_iterator(
        self, *, batch_size: int, seed: int, epochs: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> grain.DatasetIterator:
        """Batches of shuffled examples; `get_state` / `set_state` continue exactly.

        Args:
          batch_size: examples, or packed rows, B of the global batch; this process yields B / process_count of them.
          seed: of the order of the examples.
          epochs: passes over the examples, each in another order; None never ends. The last batch is padded.
          process_index, process_count: which block of each global batch to yield.

        Returns:
          Iterator of batches.
        """
        check_positive(batch_size=batch_size)
        check_seed(seed)
        if epochs is not None:
            check_positive(epochs=epochs)
        order = grain.MapDataset.range(len(self._splits["train"])).seed(seed).shuffle().repeat(epochs)
        return self._batches(order, "train", seed, batch_size, process_index, process_count)

    def evaluation_iterator(
        self, *, batch_size: int, split: str = "validation", process_index: int = 0, process_count: int = 1
    ) -> grain.DatasetIterator:
        """One pass over a split in order, batches as of `train_iterator`; the last batch is padded."""
        check_positive(batch_size=batch_size)
        if not self._split(split):
            raise DataError("no held-out examples", str(self.source), "raise heldout_fraction or add examples")
        order = grain.MapDataset.range(len(self._splits[split]))
        return self._batches(order, split, 0, batch_size, process_index, process_count)

    def _split(self, split: str) -> list[_Encoded]:
        check_choice("split", split, SPLITS)
        return self._splits[split]

    def _encode(self, example: ResponseExample) -> _Encoded | None:
        """The example as tokens, or None if it is to be skipped."""
        conversations = self.template.encode_responses(
            example.prompt,
            example.responses,
            self.tokenizer,
            context=example.context,
            loss=self.source.loss,
            length=self.length + 1,
            truncate=self.source.truncate,
            origin=example.origin,
        )
        if conversations is None:
            return None
        prompts, responses = [], []
        for chat, response in zip(conversations, example.responses, strict=True):
            split = int(np.searchsorted(chat.turns, chat.turns[-1] + 1 - len(response)))
            whole = (chat.tokens, chat.loss_mask, chat.loss_mask & (chat.roles != ROLES.index("assistant")))
            prompts.append(_Tokens(*(part[:split] for part in whole)))
            responses.append(_Tokens(*(part[split:] for part in whole)))
        shortened = int(chat.turns[-1]) + 1 < len(example.prompt) + len(response)
        return _Encoded(example, prompts[0], tuple(responses), shortened)

    def _batches(self, order, split, seed, batch_size, process_index, process_count) -> grain.DatasetIterator:
        examples = self._splits[split]
        if self.packed:
            pairs = order.map(lambda i: self._pairs(examples[int(i)])).to_iter_dataset(READ)
            also = {"prompt_mask": self.source.loss == "all", "quality": self.source.quality}
            rows = pack_whole(pairs, self.length, seed=seed, also=[name for name, there in also.items() if there])
        else:
            rows = order.map_with_index(self._rows(examples, order)).to_iter_dataset(READ)
        return iter(local_batches(rows, batch_size, process_index, process_count))

    def _pairs(self, encoded: _Encoded) -> dict[str, np.ndarray]:
        """An example as inputs and targets, unpadded."""
        tokens, masks = self._masks(encoded.prompt, encoded.responses[0])
        pairs = {"tokens": tokens[:-1], "targets": tokens[1:], **masks}
        if encoded.example.quality is not None:
            pairs["quality"] = np.full(len(tokens) - 1, encoded.example.quality, np.float32)
        return pairs

    def _masks(self, *parts: _Tokens) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The tokens of parts, and the masks of their targets."""
        tokens, mask, asked = (np.concatenate(each) for each in zip(*parts, strict=True))
        masks = {"loss_mask": self._weights(mask)}
        return tokens, masks | ({"prompt_mask": masks["loss_mask"] * asked[1:]} if self.source.loss == "all" else {})

    def _weights(self, mask: np.ndarray) -> np.ndarray:
        weights = mask[1:].astype(np.float32)
        return weights / weights.sum() if self.source.weighting == "example" else weights

    def _rows(self, examples: list[_Encoded], order: Any) -> Callable[[int, Any], dict[str, Any]]:
        """The row of the example that comes at a position of the order."""

        def row(position: int, index: Any) -> dict[str, Any]:
            encoded = examples[int(index)]
            responses = list(encoded.responses)
            if self.source.mismatched:
                responses += self._mismatched(examples, order, position)
            arrays: dict[str, Any] = self._arrays(encoded.prompt, responses) | {"index": np.int32(index)}
            example = encoded.example
            if example.quality is not None:
                arrays["quality"] = np.float32(example.quality)
            if example.label is not None:
                arrays["label"] = np.float32(example.label)
            if example.scores is not None:
                missing = self.responses - len(example.scores)
                arrays["scores"] = np.array([*example.scores, *[0.0] * missing], np.float32)
            if self.source.ties:
                arrays["tie"] = np.float32(example.tie)
            return arrays

        return row

    def _mismatched(self, examples: list[_Encoded], order: Any, position: int) -> list[_Tokens]:
        """The response of one of the next examples of the epoch, or none."""
        encoded = examples[int(order[position])]
        room = self.length + 1 - len(encoded.prompt.tokens)
        start, size = position - position % len(examples), len(examples)
        for step in range(1, min(PARTNERS + 1, size)):
            other = examples[int(order[start + (position + step) % size])]
            fits = len(other.responses[0].tokens) <= room
            if fits and other.key != encoded.key:
                return [other.responses[0]]
        return []

    def _arrays(self, prompt: _Tokens, responses: list[_Tokens]) -> dict[str, np.ndarray]:
        shape = (self.responses, self.length)
        names = ("tokens", "targets", "segment_ids", "positions")
        arrays: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in names}
        for name in ("loss_mask", "prompt_mask") if self.source.loss == "all" else ("loss_mask",):
            arrays[name] = np.zeros(shape, np.float32)
        for k, response in enumerate(responses):
            tokens, masks = self._masks(prompt, response)
            filled = np.s_[k, : len(tokens) - 1]
            arrays["tokens"][filled], arrays["targets"][filled] = tokens[:-1], tokens[1:]
            arrays["segment_ids"][filled] = 1
            arrays["positions"][filled] = np.arange(len(tokens) - 1)
            for name, mask in masks.items():
                arrays[name][filled] = mask
        return arrays


def _counts(examples: list[_Encoded]) -> dict[str, int]:
    parts = [part for each in examples for response in each.responses for part in (each.prompt, response)]
    return {
        "examples": len(examples),
        "tokens": sum(len(part.tokens) for part in parts),
        "learnt": sum(int(part.mask.sum()) for part in parts),
    }


def prepare_responses(source: Mapping[str, Any], tokenizer: Mapping[str, Any], length: int) -> ResponseDataset:
    """Reads and tokenises a source of responses.

    Args:
      source: config of a source, for example {"name": "pairs", "paths": "a.jsonl", "template": "chatml"} or
        {"name": "arithmetic", "kind": "pairs"}.
      tokenizer: as of `prepare`; BPE is trained on the contents of the turns of the train split.
      length: tokens of a row.

    Raises:
      DataError: bad data, an example that is too long, no example to train on.
      KeyError, ValueError: unknown names or options.
    """
    tokenizer = check_tokenizer(tokenizer)
    made = make_response_source(source)
    contents = (
        turn["content"]
        for example in made.examples()
        if example.split == "train"
        for turns in (example.prompt, *example.responses)
        for turn in turns
    )
    return ResponseDataset(made, make_tokenizer(tokenizer, contents), length)

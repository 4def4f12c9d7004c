"""Documents to batches of packed rows, with Grain.

What is predicted. A document is `[bos] t1 .. tn [eos]`. It becomes n + 1 pairs (input, target): (bos, t1),
(t1, t2), .. (tn, eos), and the *pairs* are concatenated and cut into rows. So every token after bos, eos
included, is the target of exactly one position per epoch, wherever rows are cut, and the loss mask is 1 at
every position that is not padding. Where a row's end cuts a document, its rest opens the next row as a
segment of its own at position 0: no token is lost there, only the context to its left. The summed loss over
one pass is therefore a code length of the documents.

A row: `tokens, targets, segment_ids, positions` int32[L] and `loss_mask` float32[L]. Segments count from 1 in
each row, 0 is padding. `targets[t] == tokens[t + 1]` inside a segment.

Processes. Every process packs all rows (millions of tokens a second) and keeps its own block of each global
batch: process p of P has rows `p * B/P` to `(p + 1) * B/P`. Batches, order and iterator state are therefore
the same for any number of processes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from pipelines.dataset import TokenizedDocuments
from pipelines.errors import DataError

READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # memory maps and generators need no reader threads


def train_iterator(
    documents: TokenizedDocuments | Sequence[np.ndarray],
    *,
    length: int,
    batch_size: int,
    seed: int,
    epochs: int | None = None,
    shuffle_rows: int = 512,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Batches of packed rows over shuffled documents; `get_state` / `set_state` continue exactly.

    Args:
        documents: the training split, or any sequence of `[bos] tokens [eos]` arrays.
        length: row length L.
        batch_size: rows B of the global batch; this process yields B / process_count of them.
        seed: of both shuffles; equal seeds give equal batches.
        epochs: passes over the documents, each in another order; None never ends. The last batch is padded.
        shuffle_rows: rows are shuffled within windows of this many, so that the consecutive rows of a long
            document do not fill one batch; 1 keeps the packed order. The window is held in memory (24 L bytes
            a row) and read again when an iterator is restored.
        process_index, process_count: which block of each global batch to yield.

    Returns:
        Iterator of dicts: tokens, targets, segment_ids, positions int32[B/P, L], loss_mask float32[B/P, L].
    """
    check_positive(length=length, batch_size=batch_size, shuffle_rows=shuffle_rows)
    if epochs is not None:
        check_positive(epochs=epochs)
    check_seed(seed)
    if not len(documents):
        raise DataError("no documents to train on", repr(documents))
    shuffled = grain.MapDataset.source(documents).seed(seed).shuffle().repeat(epochs)
    rows: grain.IterDataset = _pack(shuffled, length)
    if shuffle_rows > 1:
        rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=shuffle_rows, seed=seed)
    return iter(local_batches(rows, batch_size, process_index, process_count))


def evaluation_iterator(
    documents: TokenizedDocuments | Sequence[np.ndarray],
    *,
    length: int,
    batch_size: int,
    byte_lengths: np.ndarray | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """One pass over the documents in order; every process yields the same number of batches.

    Rows that fill up the last batch are padding. Bits per byte over the whole pass is `sum(loss * loss_mask)
    / (ln 2 * documents.num_bytes)`; over a part of it, divide by the summed `target_bytes`.

    Args:
        documents: the held-out split, or any sequence of `[bos] tokens [eos]` arrays.
        length: row length L.
        batch_size: rows B of the global batch; this process yields B / process_count of them.
        byte_lengths: `tokenizer.byte_lengths`; adds `target_bytes` int32[B/P, L], the bytes of text that each
            target stands for (0 for eos and padding). Its sum over the pass is exactly `documents.num_bytes`.
        process_index, process_count: which block of each global batch to yield.

    Returns:
        Iterator of dicts as in `train_iterator`, with `target_bytes` where asked for.
    """
    check_positive(length=length, batch_size=batch_size)
    if not len(documents):
        raise DataError("no held-out documents", repr(documents), "raise heldout_fraction or add documents")
    rows = _pack(grain.MapDataset.source(documents), length)
    if byte_lengths is not None:
        table = np.array(byte_lengths, np.int32)
        rows = rows.map(lambda row: row | {"target_bytes": table[row["targets"]] * (row["segment_ids"] > 0)})
    return iter(local_batches(rows, batch_size, process_index, process_count))


def as_pairs(document: np.ndarray) -> dict[str, np.ndarray]:
    """`[bos] t1 .. tn [eos]` as inputs `tokens` (without the last) and `targets` (without the first)."""
    document = document.astype(np.int32)
    return {"tokens": document[:-1], "targets": document[1:]}


def _finish_row(packed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    segment_ids = packed["tokens_segment_ids"]
    return {
        "tokens": packed["tokens"],
        "targets": packed["targets"],
        "loss_mask": packed.get("loss_mask", (segment_ids > 0).astype(np.float32)),
        "segment_ids": segment_ids,
        "positions": packed["tokens_positions"],
        **{name: packed[name] for name in ("prompt_mask", "quality") if name in packed},
    }


def _pack(documents: grain.MapDataset, length: int) -> grain.IterDataset:
    pairs = documents.map(as_pairs).to_iter_dataset(READ)
    packed = grain.experimental.ConcatThenSplitIterDataset(pairs, length_struct={"tokens": length, "targets": length})
    return _JsonSafeState(packed).map(_finish_row)


def pack_whole(
    pairs: grain.IterDataset, length: int, *, bins: int = 64, seed: int = 0, also: Sequence[str] = ()
) -> grain.IterDataset:
    """Rows of whole examples, none of them split: each goes into the fullest of `bins` open rows that has room for it.

    When one has room in none, all open rows are given out in a random order. The last rows are padded.

    Args:
        pairs: examples of at most `length` tokens: `tokens`, `targets` int32[T], `loss_mask` float32[T]; also
            `prompt_mask` and `quality` float32[T], where `also` names them.
        length: row length L.
        bins: open rows; more of them leave less padding.
        seed: of the order in which they are given out.
        also: further arrays of the examples.

    Returns:
        Rows as of `train_iterator`; the loss masks are those of the examples.
    """
    struct = dict.fromkeys(("tokens", "targets", "loss_mask", *also), length)
    packed = grain.experimental.BestFitPackIterDataset(pairs, length_struct=struct, num_packing_bins=bins, seed=seed)
    return packed.map(_finish_row)


def local_batches(
    rows: grain.IterDataset, batch_size: int, process_index: int, process_count: int
) -> grain.IterDataset:
    """This process's block of every global batch of `batch_size` rows; zeros fill up the last batch.

    Raises:
        ValueError: the batch cannot be split evenly, or there is no such process.
    """
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be in 0..process_count-1, process_count={process_count}")
    if batch_size % process_count:
        nearest = max(batch_size // process_count, 1) * process_count
        raise ValueError(f"batch_size={batch_size} is not a multiple of {process_count} processes; nearest: {nearest}")
    share = batch_size // process_count
    block = slice(process_index * share, (process_index + 1) * share)

    def local_rows(batch):
        missing = batch_size - len(batch["tokens"])
        return {key: _pad_rows(value, missing)[block] for key, value in batch.items()}

    return rows.batch(batch_size, drop_remainder=False).map(local_rows)


def _pad_rows(rows: np.ndarray, missing: int) -> np.ndarray:
    return np.pad(rows, ((0, missing), *[(0, 0)] * (rows.ndim - 1))) if missing else rows


class _JsonSafeState(grain.IterDataset):
    """Lets the packer's state go through JSON, as checkpoints do.

    ConcatThenSplit (grain 0.2.18) marks "no remainder" by comparing slices with a tuple. Read back from JSON
    the slices are lists, the mark is missed, and the next document would be dropped without a word.
    """

    def __iter__(self) -> grain.DatasetIterator:
        return _JsonSafeIterator(iter(self._parent))


class _JsonSafeIterator(grain.DatasetIterator):
    def __next__(self):
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        slices = {key: tuple(bounds) for key, bounds in state["remainder_slices"].items()}
        self._parent.set_state(state | {"remainder_slices": slices})


def check_positive(**values: int) -> None:
    """Raises ValueError that names the first value which is no int of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an int of at least 1")


def check_seed(seed: int) -> None:
    """Raises ValueError for what Grain does not take as a seed."""
    if not isinstance(seed, int) or not 0 <= seed < 1 << 31:
        raise ValueError(f"seed={seed!r} must be an int, at least 0 and below 2**31")

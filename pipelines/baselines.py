"""What a language model has to beat: code lengths that need no learning, in bits per byte."""

import gzip
import math
from collections.abc import Iterable

import numpy as np


def bits_per_byte(nll_sum: float, num_bytes: int) -> float:
    """Code length of a model: nll_sum / (ln 2 * num_bytes).

    Args:
        nll_sum: summed negative log-likelihood in nats over all tokens of the documents, eos included.
        num_bytes: UTF-8 bytes of the same documents.
    """
    _check(num_bytes)
    return nll_sum / (math.log(2) * num_bytes)


def unigram_bits_per_byte(train: Iterable[bytes], heldout: Iterable[bytes]) -> float:
    """Cross entropy of held-out bytes under p(b) = (n_b + 1) / (n + 256), counted on the train text.

    Args:
        train: documents that the frequencies are counted on.
        heldout: documents that are coded.
    """
    counts = _byte_counts(train) + 1
    seen = _byte_counts(heldout)
    _check(int(seen.sum()))
    return float(-(seen * np.log2(counts / counts.sum())).sum() / seen.sum())


def gzip_bits_per_byte(documents: Iterable[bytes]) -> float:
    """Total bits of every document compressed alone by gzip (level 9, with its header) over total bytes."""
    compressed = total = 0
    for document in documents:
        compressed += len(gzip.compress(document, compresslevel=9, mtime=0))
        total += len(document)
    _check(total)
    return 8 * compressed / total


def _byte_counts(documents: Iterable[bytes]) -> np.ndarray:
    counts = np.zeros(256, np.int64)
    for document in documents:
        counts += np.bincount(np.frombuffer(document, np.uint8), minlength=256)
    return counts


def _check(num_bytes: int) -> None:
    if num_bytes <= 0:
        raise ValueError("no held-out bytes: bits per byte is undefined; raise heldout_fraction")

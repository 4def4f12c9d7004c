"""Tokenise once: a source and a tokenizer become memory-mapped token files that later runs reuse."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tokenizers as hf
from absl import logging

from pipelines.errors import DataError
from pipelines.files import atomic_folder
from pipelines.sources import SPLITS, Source, make_source
from pipelines.tokenizers import TOKENIZERS, Tokenizer, load_tokenizer, train_bpe
from zoo.core.registry import check_keys

FORMAT_VERSION = 1  # raise it when the files written here change
_CHUNK_BYTES = 1 << 20  # text that is encoded at a time
_TOKENIZER_OPTIONS = {"bpe": ("vocab_size",), "nucleotides": ("unknown",)}


class TokenizedDocuments:
    """Random access to the documents of one split: `documents[i]` is `[bos] tokens [eos]`, uint16 or uint32.

    Reads a memory map that is opened on first use, so that it pickles as its path.

    Attributes:
        num_bytes: UTF-8 bytes of all documents.
        num_targets: tokens to predict: all but the bos of each document, eos included.

    Args:
        directory: where `prepare` wrote the split.
    """

    def __init__(self, directory: str | os.PathLike):
        self._directory = pathlib.Path(directory)
        info = json.loads((self._directory / "info.json").read_text())
        self.num_bytes: int = info["bytes"]
        self.num_targets: int = info["targets"]
        self._dtype = np.dtype(info["dtype"])
        self._offsets = np.load(self._directory / "offsets.npy")
        self._tokens: np.ndarray | None = None
        path = self._directory / "tokens.bin"
        expected = int(self._offsets[-1]) * self._dtype.itemsize
        if path.stat().st_size != expected:
            size = path.stat().st_size
            raise DataError("damaged token file", str(path), f"{size} bytes, expected {expected}; delete its folder")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]  # negative indices and IndexError as in a list
        if self._tokens is None:
            self._tokens = np.memmap(self._directory / "tokens.bin", self._dtype, mode="r")
        return np.array(self._tokens[self._offsets[index] : self._offsets[index + 1]])

    def __repr__(self) -> str:
        return f"TokenizedDocuments({len(self)} documents, {self.num_targets} targets)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None}


class TextDataset:
    """A prepared dataset: `train` and `validation` documents and the tokenizer.

    Attributes:
        train, validation: `TokenizedDocuments`; validation may be empty.
        tokenizer: the tokenizer the ids belong to.
        info: counts per split, skipped documents by reason, and the configs, as written to info.json.
        directory: where it lies.
        metrics: what runs report; the first one chooses the best checkpoint. unit: of what is held out.
    """

    metrics = ("bits_per_byte",)
    unit = "documents"

    def __init__(self, directory: str | os.PathLike):
        self.directory = pathlib.Path(directory)
        self.info: dict[str, Any] = json.loads((self.directory / "info.json").read_text())
        self.tokenizer = load_tokenizer(self.directory / "tokenizer.json")
        self.train = TokenizedDocuments(self.directory / "train")
        self.validation = TokenizedDocuments(self.directory / "validation")

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer."""
        return self.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """Hash of the documents and the tokenizer."""
        return self.directory.name

    def texts(self, split: str) -> Iterator[bytes]:
        """The UTF-8 bytes of the documents of a split, decoded from the tokens: exact, where the tokenizer is."""
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not supported; allowed: {', '.join(SPLITS)}")
        documents = self.train if split == "train" else self.validation
        return (self.tokenizer.decode_bytes(documents[i]) for i in range(len(documents)))


def prepare(source: Mapping[str, Any], tokenizer: Mapping[str, Any], workdir: str | os.PathLike) -> TextDataset:
    """Reads, splits and tokenises a source into `workdir/data/<fingerprint>/`, or opens what is there.

    The fingerprint covers the source's options and file contents, the tokenizer's config and the versions, so
    a second run reuses the files and any difference builds anew. A killed build leaves nothing that is read
    later, and processes that build at once do not disturb each other.

    Args:
        source: config of a source, for example {"name": "stdlib"} or {"name": "jsonl", "paths": "a.jsonl"}.
        tokenizer: {"name": "bytes"}, {"name": "bpe", "vocab_size": 4096} or {"name": "nucleotides", "unknown": "N"};
            BPE is trained on the train split only.
        workdir: the run's folder.

    Raises:
        DataError: bad data, or no document for training.
        KeyError, ValueError: unknown names or options.
    """
    tokenizer = check_tokenizer(tokenizer)
    made = make_source(source)
    root = pathlib.Path(workdir) / "data"
    fingerprint = _fingerprint(made, tokenizer)
    final = root / fingerprint
    if not final.exists():
        with atomic_folder(final) as partial:
            _build(made, tokenizer, partial, root, {"source": dict(source), "tokenizer": tokenizer})
    return TextDataset(final)


def check_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a tokenizer as a dict; KeyError or ValueError for an unknown name or a bad option."""
    config = dict(config)
    if "name" not in config:
        raise ValueError("a tokenizer config needs a 'name', for example {'name': 'bytes'}")
    TOKENIZERS.get(config["name"])
    check_keys(f"tokenizer {config['name']!r}", config, ("name", *_TOKENIZER_OPTIONS.get(config["name"], ())))
    if config["name"] == "bpe" and not isinstance(config.get("vocab_size"), int):
        raise ValueError(f"tokenizer 'bpe' needs an int 'vocab_size', got {config.get('vocab_size')!r}")
    if config["name"] != "bpe":
        _untrained(config)
    return config


def _untrained(config: Mapping[str, Any]) -> Tokenizer:
    return TOKENIZERS.get(config["name"])(**{option: value for option, value in config.items() if option != "name"})


def _fingerprint(source: Source, tokenizer: Mapping[str, Any]) -> str:
    parts = [FORMAT_VERSION, source.fingerprint(), dict(tokenizer)]
    if tokenizer["name"] == "bpe":
        parts.append(hf.__version__)  # another version may train another vocabulary
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _build(source: Source, config: Mapping[str, Any], folder: pathlib.Path, cache: pathlib.Path, configs: dict) -> None:
    """Writes tokenizer.json, one folder per split, and info.json into `folder`."""
    train = (document.text for document in source.documents(cache) if document.split == "train")
    tokenizer = make_tokenizer(config, train)
    tokenizer.save(folder / "tokenizer.json")
    writers = {split: _SplitWriter(folder / split, tokenizer) for split in SPLITS}
    for document in source.documents(cache):
        writers[document.split].add(document.text, document.origin)
    info = {split: writer.close() for split, writer in writers.items()}
    if not info["train"]["documents"]:
        raise DataError("no document for training", str(source), "lower heldout_fraction or add documents")
    info |= {"skipped": dict(source.skipped), "vocab_size": tokenizer.vocab_size, **configs}
    (folder / "info.json").write_text(json.dumps(info, indent=2))
    logging.info("tokenised %s: %s", source, info)


def make_tokenizer(config: Mapping[str, Any], texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of a checked config; `texts`, those of the train split, are read where it is trained."""
    return train_bpe(texts, config["vocab_size"]) if config["name"] == "bpe" else _untrained(config)


class _SplitWriter:
    """Appends encoded documents to tokens.bin, a chunk of text at a time."""

    def __init__(self, folder: pathlib.Path, tokenizer: Tokenizer):
        folder.mkdir()
        self._folder, self._tokenizer = folder, tokenizer
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self._file = open(folder / "tokens.bin", "wb")  # noqa: SIM115 (closed in close)
        self._lengths: list[int] = []
        self._pending: list[tuple[str, str]] = []
        self._pending_bytes = self._bytes = 0

    def add(self, text: str, origin: str = "") -> None:
        self._pending.append((text, origin))
        self._pending_bytes += len(text.encode())
        if self._pending_bytes >= _CHUNK_BYTES:
            self._flush()

    def _encode(self) -> list[np.ndarray]:
        """Ids of the pending texts; what the tokenizer refuses is a DataError that names the document."""
        try:
            return self._tokenizer.encode_batch([text for text, _ in self._pending])
        except ValueError:
            for text, origin in self._pending:
                try:
                    self._tokenizer.encode(text)
                except ValueError as error:
                    raise DataError("refused by the tokenizer", origin, str(error)) from error
            raise

    def _flush(self) -> None:
        bos, eos = [self._tokenizer.bos_id], [self._tokenizer.eos_id]
        for ids in self._encode():
            document = np.concatenate([bos, ids, eos]).astype(self._dtype)
            self._file.write(document.tobytes())
            self._lengths.append(len(document))
        self._bytes += self._pending_bytes
        self._pending, self._pending_bytes = [], 0

    def close(self) -> dict[str, Any]:
        """Writes the rest, the offsets and the counts; returns the counts."""
        self._flush()
        self._file.close()
        offsets = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]).astype(np.int64)
        np.save(self._folder / "offsets.npy", offsets)
        counts = {
            "documents": len(self._lengths),
            "targets": int(offsets[-1]) - len(self._lengths),
            "bytes": self._bytes,
            "dtype": self._dtype.name,
        }
        (self._folder / "info.json").write_text(json.dumps(counts))
        return counts

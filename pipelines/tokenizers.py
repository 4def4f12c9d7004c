"""Tokenizers: bytes, byte-level BPE trained on the spot, nucleotides.

The first two are lossless on any text; nucleotides are lossless on upper-case sequences and refuse all other text.

Special ids come first and exist only as ids: no text, not even one that spells "<|im_end|>", encodes to them.
"""

import functools
import json
import os
import pathlib
import string
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers as hf

from zoo.core.registry import Registry, check_choice

TOKENIZERS = Registry("tokenizer")
BASE_SPECIALS = ("<pad>", "<bos>", "<eos>", "<mask>")
BPE_SPECIALS = (
    *BASE_SPECIALS,
    *("<|im_start|>", "<|im_end|>", "<fim_pre>", "<fim_mid>", "<fim_suf>", "<sep>", "<eom>"),
)
NUCLEOTIDE_SPECIALS = (*BASE_SPECIALS, "<sep>", "<cls>", "<reserved>")
NUCLEOTIDES = "ACGTN"
_FORMAT = 1


class Tokenizer:
    """What all tokenizers share.

    Attributes:
        specials: names of the special ids 0, 1, 2, ...
        token_bytes: the bytes that each id stands for; b"" for specials.
        pad_id, bos_id, eos_id, mask_id: 0, 1, 2, 3.
    """

    specials: tuple[str, ...] = BASE_SPECIALS
    pad_id, bos_id, eos_id, mask_id = 0, 1, 2, 3
    token_bytes: list[bytes]

    @property
    def vocab_size(self) -> int:
        """Number of ids, specials included."""
        return len(self.token_bytes)

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of text per id, int32[Z]: summed over a document's tokens, its length in UTF-8."""
        return np.array([len(piece) for piece in self.token_bytes], np.int32)

    def special_id(self, name: str) -> int:
        """Id of the special token `name`."""
        if name not in self.specials:
            raise ValueError(f"no special token {name!r}; allowed: {', '.join(self.specials)}")
        return self.specials.index(name)

    def encode(self, text: str) -> np.ndarray:
        """Ids int32[T] of `text`, without bos and eos. Raises ValueError on what it has no id for: lone surrogates."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`; specials stand for nothing.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = np.asarray(list(ids), np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise ValueError(f"id {bad} is outside the vocabulary of {self.vocab_size}")
        return b"".join([self.token_bytes[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; a cut-off character becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def state(self) -> dict[str, Any]:
        """What `load_tokenizer` needs, JSON-able."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike) -> None:
        """Writes the tokenizer to one JSON file; a reader sees the whole file or none."""
        path = pathlib.Path(path)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        partial.write_text(json.dumps({"format": _FORMAT, "specials": self.specials, **self.state()}))
        os.replace(partial, path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.state() == other.state()

    def __hash__(self) -> int:
        return hash((type(self), self.vocab_size))


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote. Raises ValueError when the file is something else."""
    try:
        state = json.loads(pathlib.Path(path).read_bytes())
        kind, version, specials = TOKENIZERS.get(state["name"]), state["format"], tuple(state["specials"])
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a saved tokenizer ({error})") from error
    if version != _FORMAT or specials != kind.specials:
        raise ValueError(f"{path}: written by another version (format {version}, specials {specials}); train it again")
    return kind.from_state(state)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text holds a lone surrogate {text[error.start]!r} at character {error.start}") from error


@TOKENIZERS.register("bytes")
class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte: id = byte + 4, Z = 260."""

    def __init__(self):
        self.token_bytes = [b""] * len(self.specials) + [bytes([value]) for value in range(256)]

    def encode(self, text: str) -> np.ndarray:
        """Ids int32[T] of `text`, without bos and eos."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32) + len(self.specials)

    def state(self) -> dict[str, Any]:
        """Only the name: bytes need no training."""
        return {"name": "bytes"}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "ByteTokenizer":
        """The inverse of `state`."""
        del state
        return cls()


@TOKENIZERS.register("bpe")
class BPETokenizer(Tokenizer):
    """Byte-level BPE by Hugging Face `tokenizers`; id = special ids first, then its vocabulary.

    Reference: Sennrich et al. (arXiv 1508.07909), on bytes.

    Args:
        backend: the trained `tokenizers.Tokenizer`, with no added or special tokens of its own.
    """

    specials = BPE_SPECIALS

    def __init__(self, backend: hf.Tokenizer):
        if backend.get_added_tokens_decoder():
            raise ValueError("the backend has added tokens: text could spell special ids; train it with train_bpe")
        self._backend = backend
        vocabulary = sorted(backend.get_vocab().items(), key=lambda item: item[1])
        to_byte = _byte_of_character()
        pieces = [bytes(to_byte[character] for character in piece) for piece, _ in vocabulary]
        self.token_bytes = [b""] * len(self.specials) + pieces

    def encode(self, text: str) -> np.ndarray:
        """Ids int32[T] of `text`, without bos and eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in threads."""
        for text in texts:
            _utf8(text)
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) + len(self.specials) for encoding in encodings]

    def state(self) -> dict[str, Any]:
        """The backend's own JSON."""
        return {"name": "bpe", "backend": self._backend.to_str()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "BPETokenizer":
        """The inverse of `state`."""
        return cls(hf.Tokenizer.from_str(state["backend"]))

    def __reduce__(self):
        return BPETokenizer.from_state, (self.state(),)


@TOKENIZERS.register("nucleotides")
class NucleotideTokenizer(Tokenizer):
    """One token per nucleotide: A C G T N = 7 ... 11, Z = 12; lower case reads as upper case, and decodes to it.

    Reference: arXiv:2502.10807 and, before it, arXiv:2306.15794, which have as many ids. The numbers are our own.

    Args:
        unknown: "error", or "N" to read every other letter (IUPAC codes such as R, U of RNA) as N. A character that is
            no letter of ASCII, such as a line break or a gap, is an error in either case.
    """

    specials = NUCLEOTIDE_SPECIALS

    def __init__(self, unknown: str = "error"):
        check_choice("tokenizer.unknown", unknown, ("error", "N"))
        self.unknown = unknown
        self.token_bytes = [b""] * len(self.specials) + [letter.encode() for letter in NUCLEOTIDES]
        self._ids = np.full(256, -1, np.int32)  # by byte
        if unknown == "N":
            for letters in (string.ascii_uppercase, string.ascii_lowercase):
                self._ids[list(letters.encode())] = self.token_bytes.index(b"N")
        for index, letter in enumerate(NUCLEOTIDES):
            self._ids[[ord(letter), ord(letter.lower())]] = len(self.specials) + index

    def encode(self, text: str) -> np.ndarray:
        """Ids int32[T] of `text`, without bos and eos. Raises ValueError that says what is no nucleotide, and where."""
        ids = self._ids[np.frombuffer(_utf8(text), np.uint8)]
        if ids.size and ids.min() < 0:
            at = int(ids.argmin())  # what precedes it is ASCII: bytes are characters
            letter = text[at].isascii() and text[at].isalpha()
            fix = "tokenizer.unknown='N' reads it as N" if letter else "give the letters of one sequence and no more"
            raise ValueError(f"{text[at]!r} at character {at} is none of {' '.join(NUCLEOTIDES)}; {fix}")
        return ids

    def state(self) -> dict[str, Any]:
        """The name and the option."""
        return {"name": "nucleotides", "unknown": self.unknown}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "NucleotideTokenizer":
        """The inverse of `state`."""
        return cls(state["unknown"])


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Trains byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: the training texts, read once.
        vocab_size: number of ids, specials included. A small corpus may yield fewer: use the
            `vocab_size` of the result.

    Raises:
        ValueError: vocab_size has no room for the specials and the 256 bytes.
    """
    least = len(BPE_SPECIALS) + 256
    if vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(BPE_SPECIALS)} specials and 256 bytes need {least}"
        )
    backend = hf.Tokenizer(hf.models.BPE())
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size - len(BPE_SPECIALS),
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),  # every byte has an id: lossless
        special_tokens=[],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return BPETokenizer(backend)


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes printable Latin-1 bytes as themselves and the rest, in order, from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}

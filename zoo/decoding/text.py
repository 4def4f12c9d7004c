"""From tokens to text while decoding: whole characters, stop strings, streaming."""

import codecs
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, TextIO


class Tokenizer(Protocol):
    """What decoding asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0..vocab_size-1."""
        ...

    @property
    def eos_id(self) -> int | None:
        """End of sequence, or None."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """UTF-8 bytes of ids; decode_bytes(a + b) = decode_bytes(a) + decode_bytes(b)."""
        ...


class TextStream:
    """The text of one row, token by token.

    Never shows part of a UTF-8 character, nor text that may turn out to be the beginning of a stop string.

    Attributes:
      text: all text so far, cut before the first stop string.
      stopped: whether a stop string was met.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._closed = False
        self._taken = 0

    def push(self, token: int) -> None:
        """Adds a token; nothing is added after a stop string."""
        if self.stopped:
            return
        searched = max(0, len(self.text) - self._longest + 1)
        self.text += self._decoder.decode(self._tokenizer.decode_bytes([token]))
        found = [i for s in self._stop if (i := self.text.find(s, searched)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def close(self) -> None:
        """No more tokens: an unfinished character becomes U+FFFD, and nothing is held back any more."""
        if not self.stopped and not self._closed:
            self.text += self._decoder.decode(b"", final=True)
        self._closed = True

    def take(self) -> str:
        """What can be shown and has not been taken before."""
        end = len(self.text) if self.stopped or self._closed else len(self.text) - self._held()
        piece = self.text[self._taken : end]
        self._taken = max(end, self._taken)
        return piece

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for size in range(min(self._longest - 1, len(self.text)), 0, -1):
            tail = self.text[-size:]
            if any(s.startswith(tail) for s in self._stop):
                return size
        return 0


def terminal(row: int = 0, file: TextIO | None = None) -> Callable[[int, list[int], str], None]:
    """An `on_tokens` for `generate` that writes the text of one row as it comes.

    Args:
      row: which row.
      file: None = standard output.
    """

    def write(index: int, tokens: list[int], text: str) -> None:
        del tokens
        if index == row:
            print(text, end="", file=file or sys.stdout, flush=True)

    return write

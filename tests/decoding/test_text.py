"""Incremental text: whole characters, stop strings, and what streaming may show."""

import io
import itertools

import numpy as np
import pytest

from tests.decoding.tokenizers import ByteTokenizer
from zoo.decoding import TextStream, terminal

TEXT = "aé中𝄞b — ﷽ e\u0301 \U0001f469\u200d\U0001f680 z"


def pieces_of(ids, stop=()):
    stream, pieces = TextStream(ByteTokenizer(), stop), []
    for token in ids:
        stream.push(token)
        pieces.append(stream.take())
    stream.close()
    return stream, [*pieces, stream.take()]


def test_no_piece_holds_half_a_character():
    stream, pieces = pieces_of(ByteTokenizer().encode(TEXT))
    assert "".join(pieces) == stream.text == TEXT
    assert all(len(piece) <= 1 for piece in pieces)  # one byte at a time completes at most one character
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("seed", range(5))
def test_bytes_that_are_no_text_become_replacement_characters(seed):
    raw = np.random.default_rng(seed).integers(0, 256, 200, dtype=np.uint8).tobytes()
    stream, pieces = pieces_of(ByteTokenizer().encode_bytes(raw))
    assert "".join(pieces) == stream.text == raw.decode("utf-8", errors="replace")


def test_an_unfinished_character_is_shown_at_the_end_only():
    ids = ByteTokenizer().encode("ok中")[:-1]
    stream, pieces = pieces_of(ids)
    assert pieces[:-1] == ["o", "k", "", ""]
    assert pieces[-1] == "\ufffd"
    assert stream.text == "ok\ufffd"


@pytest.mark.parametrize("stop", [("aab",), ("ba",), ("aab", "ab"), ("bbb", "abba"), ("aaaa", "aba"), ("c",)])
def test_stop_strings_by_brute_force(stop):
    """Every text of length 8 over {a, b}: cut at the first stop string to be completed; nothing of it was shown."""
    for letters in itertools.product("ab", repeat=8):
        text = "".join(letters)
        want, stopped = text, False
        for end in range(1, len(text) + 1):
            found = [text[:end].find(s) for s in stop if s in text[:end]]
            if found:
                want, stopped = text[: min(found)], True
                break
        stream, pieces = pieces_of(ByteTokenizer().encode(text), stop)
        assert (stream.text, stream.stopped) == (want, stopped)
        assert "".join(pieces) == want
        for n in range(len(pieces)):
            assert want.startswith("".join(pieces[:n]))


def test_only_what_may_begin_a_stop_string_is_held_back():
    _, pieces = pieces_of(ByteTokenizer().encode("xENxEND"), ("END",))
    assert pieces == ["x", "", "", "ENx", "", "", "", ""]


def test_a_stop_string_inside_one_token():
    class Words(ByteTokenizer):
        def decode_bytes(self, ids):
            return b"".join((b"one. two", b" three")[i] for i in ids)

    stream = TextStream(Words(), (". ",))
    stream.push(0)
    stream.push(1)
    assert stream.text == "one"
    assert stream.stopped


def test_terminal_writes_one_row():
    out = io.StringIO()
    write = terminal(1, out)
    write(0, [1], "no")
    write(1, [2], "yes")
    write(1, [], "!")
    assert out.getvalue() == "yes!"

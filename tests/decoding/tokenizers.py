"""Tokenizers small enough to be obviously right."""


class ByteTokenizer:
    """id = byte + 4, below them pad, bos, eos and mask, which have no text."""

    vocab_size = 260
    pad_id, eos_id = 0, 2

    def encode(self, text):
        return self.encode_bytes(text.encode())

    def encode_bytes(self, raw):
        return [byte + 4 for byte in raw]

    def decode_bytes(self, ids):
        return bytes(i - 4 for i in ids if i >= 4)


class PieceTokenizer:
    """id -> a fixed piece of bytes: one to three letters, spaces, and parts of multi-byte characters."""

    PIECES = (b"a", b"ab", b" b", b"c ", b"abc", b"\xc3", b"\xa9", b"\xe4\xb8", b"\xad", b"\n", b"e", b"ca")

    def __init__(self, vocab_size, eos_id=None):
        self.vocab_size = vocab_size
        self.eos_id = eos_id

    def encode(self, text):
        return [b"abc".index(byte) for byte in text.encode()]

    def decode_bytes(self, ids):
        return b"".join(self.PIECES[i % len(self.PIECES)] for i in ids)

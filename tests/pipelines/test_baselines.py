import collections
import math
import zlib

import numpy as np
import pytest

from pipelines import bits_per_byte, gzip_bits_per_byte, unigram_bits_per_byte

RELATIVE = 1e-12


def test_unigram_by_hand():
    train, heldout = [b"aab", b"c"], [b"ab", b"z"]
    counts = collections.Counter(b"aabc")
    expected = -sum(math.log2((counts[byte] + 1) / (4 + 256)) for byte in b"abz") / 3
    np.testing.assert_allclose(unigram_bits_per_byte(train, heldout), expected, rtol=RELATIVE)


def test_gzip_codes_each_document_alone():
    documents = [b"a" * 1000, bytes(range(256)), b"a" * 1000]

    def size(document):
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        return len(packer.compress(document) + packer.flush())

    expected = 8 * sum(map(size, documents)) / 2256
    np.testing.assert_allclose(gzip_bits_per_byte(iter(documents)), expected, rtol=RELATIVE)


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_eight():
    np.testing.assert_allclose(bits_per_byte(100 * math.log(256), 100), 8, rtol=RELATIVE)


def test_nothing_held_out_is_an_error():
    for measure in (lambda: gzip_bits_per_byte([]), lambda: unigram_bits_per_byte([b"a"], [b""])):
        with pytest.raises(ValueError, match="no held-out bytes"):
            measure()

import json
import pickle

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from pipelines import ByteTokenizer, NucleotideTokenizer, load_tokenizer, train_bpe
from pipelines.tokenizers import _byte_of_character

TEXTS = ["def add(a, b):\n    return a + b\n", "naïve café 日本語 😀", "the cat sat on the mat, the cat"] * 3
VOCAB = 300
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else train_bpe(TEXTS, VOCAB)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(text=UNICODE)
def test_round_trip_is_exact_and_byte_lengths_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert ((ids >= len(tokenizer.specials)) & (ids < tokenizer.vocab_size)).all()


def test_no_text_spells_a_special_id(tokenizer):
    text = "".join(tokenizer.specials) + "<|im_end|><eos><s_0>"
    ids = tokenizer.encode(text)
    assert ids.min() >= len(tokenizer.specials)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(range(len(tokenizer.specials))) == ""


def test_special_ids_and_vocabulary(tokenizer):
    assert [tokenizer.special_id(f"<{name}>") for name in ("pad", "bos", "eos", "mask")] == [0, 1, 2, 3]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == (260 if isinstance(tokenizer, ByteTokenizer) else VOCAB)
    with pytest.raises(ValueError, match="no special token"):
        tokenizer.special_id("<unk>")


def test_save_load_and_pickle_keep_every_id(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    for copy in (load_tokenizer(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy == tokenizer
        assert copy.token_bytes == tokenizer.token_bytes
        for text in TEXTS:
            np.testing.assert_array_equal(copy.encode(text), tokenizer.encode(text))


def test_batches_encode_as_single_texts(tokenizer):
    for ids, text in zip(tokenizer.encode_batch([*TEXTS, ""]), [*TEXTS, ""], strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_bad_input_is_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("a\ud800")
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"id {bad} is outside"):
            tokenizer.decode([5, bad])


def test_a_cut_character_decodes_to_the_replacement():
    assert ByteTokenizer().decode(ByteTokenizer().encode("é")[:1]) == "\ufffd"


def test_byte_ids():
    np.testing.assert_array_equal(ByteTokenizer().encode("aé"), [97 + 4, 0xC3 + 4, 0xA9 + 4])


def test_bpe_ids_are_the_backends_after_the_specials():
    tokenizer = train_bpe(TEXTS, VOCAB)
    backend = tokenizer._backend
    for text in TEXTS:
        ids = np.array(backend.encode(text).ids)
        np.testing.assert_array_equal(tokenizer.encode(text), ids + len(tokenizer.specials))
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0].encode())


def test_bpe_training_is_deterministic_and_uses_every_byte_value():
    first, second = train_bpe(TEXTS, VOCAB), train_bpe(iter(TEXTS), VOCAB)
    assert first.state() == second.state()
    assert {bytes([value]) for value in range(256)} <= set(first.token_bytes)
    assert first != train_bpe(TEXTS, VOCAB - 1)


def test_bpe_byte_characters_are_those_of_gpt2():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert _byte_of_character() == {character: value for value, character in bytes_to_unicode().items()}


def test_bpe_vocab_size_bounds():
    with pytest.raises(ValueError, match="need 267"):
        train_bpe(TEXTS, 266)
    assert train_bpe(["ab"], 5000).vocab_size == 268  # 267 and the one pair there is


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "t.json"
    for content in ("no json", "[]", "{}", json.dumps({"name": "wordpiece", "format": 1, "specials": []})):
        path.write_text(content)
        with pytest.raises(ValueError, match="not a saved tokenizer"):
            load_tokenizer(path)
    ByteTokenizer().save(path)
    path.write_text(path.read_text().replace("<mask>", "<unk>"))
    with pytest.raises(ValueError, match="another version"):
        load_tokenizer(path)


NUCLEOTIDE_IDS = {letter: 7 + index for index, letter in enumerate("ACGTN")}


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(text=st.text("ACGTNacgtn", max_size=60))
def test_nucleotides_round_trip_to_upper_case(text):
    tokenizer = NucleotideTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == [NUCLEOTIDE_IDS[letter] for letter in text.upper()]
    assert tokenizer.decode(ids) == text.upper()
    assert tokenizer.byte_lengths[ids].sum() == len(text)


def test_nucleotides_ids_and_specials(tmp_path):
    tokenizer = NucleotideTokenizer("N")
    assert (tokenizer.vocab_size, tokenizer.special_id("<sep>"), tokenizer.decode(range(7))) == (12, 4, "")
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (0, 1, 2, 3)
    tokenizer.save(tmp_path / "t.json")
    for copy in (load_tokenizer(tmp_path / "t.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy == tokenizer != NucleotideTokenizer()
        np.testing.assert_array_equal(copy.encode("aRx"), [7, 11, 11])


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(text=st.text(st.sampled_from("ACGTnacRyU-\n >é日0"), max_size=12) | UNICODE)
@pytest.mark.parametrize("unknown", ["error", "N"])
def test_other_characters_are_named_with_their_place_or_read_as_n(unknown, text):
    ascii_letters = {chr(code) for code in (*range(65, 91), *range(97, 123))}
    allowed = ascii_letters if unknown == "N" else set("ACGTNacgtn")
    bad = [(at, letter) for at, letter in enumerate(text) if letter not in allowed]
    tokenizer = NucleotideTokenizer(unknown)
    if not bad:
        letters = [letter if letter in NUCLEOTIDE_IDS else "N" for letter in text.upper()]
        assert tokenizer.decode(tokenizer.encode(text)) == "".join(letters)
        return
    at, letter = bad[0]
    with pytest.raises(ValueError) as caught:
        tokenizer.encode(text)
    assert str(caught.value).startswith(f"{letter!r} at character {at} is none of A C G T N; ")
    assert ("unknown='N'" in str(caught.value)) == (letter in ascii_letters)

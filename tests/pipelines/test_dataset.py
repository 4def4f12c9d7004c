import json
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest

from pipelines import ByteTokenizer, DataError, TokenizedDocuments, dataset, make_source, prepare, train_bpe

TEXTS = [f"document {i} é😀\n" * (i % 7 + 1) for i in range(60)]
BYTES = {"name": "bytes"}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return {"name": "jsonl", "paths": str(path), "heldout_fraction": 0.2}


@pytest.mark.parametrize("tokenizer", [BYTES, {"name": "bpe", "vocab_size": 300}])
def test_documents_are_bos_tokens_eos_of_every_text_once(source, tmp_path, tokenizer):
    data = prepare(source, tokenizer, tmp_path)
    expected = {
        split: [d.text for d in make_source(source).documents() if d.split == split] for split in data_splits(data)
    }
    assert sorted(expected["train"] + expected["validation"]) == sorted(TEXTS)
    for split, documents in data_splits(data).items():
        assert len(documents) == len(expected[split]) > 0
        for document, text in zip(documents, expected[split], strict=True):
            ids = data.tokenizer.encode(text)
            np.testing.assert_array_equal(document, [1, *ids, 2])
        assert list(data.texts(split)) == [text.encode() for text in expected[split]]
        assert documents.num_bytes == sum(len(text.encode()) for text in expected[split])
        assert documents.num_targets == sum(len(document) - 1 for document in documents)
        assert documents[0].dtype == np.uint16
        np.testing.assert_array_equal(documents[-1], documents[len(documents) - 1])
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(documents))[1], documents[1])
    with pytest.raises(IndexError):
        data.train[len(data.train)]


def data_splits(data):
    return {"train": data.train, "validation": data.validation}


def folders(tmp_path):
    return {path.name for path in (tmp_path / "data").iterdir()}


def test_a_second_run_reuses_and_any_difference_rebuilds(source, tmp_path, monkeypatch):
    first = prepare(source, BYTES, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_build", lambda *args: pytest.fail("built again"))
        assert prepare(source, BYTES, tmp_path).directory == first.directory
    others = [
        prepare({**source, "heldout_fraction": 0.3}, BYTES, tmp_path),
        prepare(source, {"name": "bpe", "vocab_size": 300}, tmp_path),
        prepare(source, {"name": "bpe", "vocab_size": 290}, tmp_path),
    ]
    with open(source["paths"], "a") as file:
        file.write('{"text": "one more"}\n')
    others.append(prepare(source, BYTES, tmp_path))
    monkeypatch.setattr(dataset, "FORMAT_VERSION", dataset.FORMAT_VERSION + 1)
    others.append(prepare(source, BYTES, tmp_path))
    assert len(folders(tmp_path)) == 6 == len({first.directory, *(data.directory for data in others)})


def test_bpe_sees_the_train_split_only(source, tmp_path):
    documents = list(make_source(source).documents())
    tokenizer = prepare(source, {"name": "bpe", "vocab_size": 300}, tmp_path).tokenizer
    assert tokenizer == train_bpe([d.text for d in documents if d.split == "train"], 300)
    assert tokenizer != train_bpe([d.text for d in documents], 300)


def test_a_failed_build_leaves_nothing(source, tmp_path):
    with open(source["paths"], "a") as file:
        file.write("not json\n")
    with pytest.raises(DataError, match=r"texts\.jsonl:61: not JSON"):
        prepare(source, BYTES, tmp_path)
    assert folders(tmp_path) == set()
    data = prepare({**source, "on_error": "skip"}, BYTES, tmp_path)
    assert data.info["skipped"] == {"not JSON": 1}
    assert data.info["train"]["documents"] + data.info["validation"]["documents"] == len(TEXTS)


def test_a_killed_build_leaves_nothing_that_is_read(source, tmp_path):
    script = f"""
import os, signal
from pipelines import dataset
close = dataset._SplitWriter.close
def die(self):
    close(self)
    os.kill(os.getpid(), signal.SIGKILL)
dataset._SplitWriter.close = die
dataset.prepare({source!r}, {BYTES!r}, {str(tmp_path)!r})
"""
    result = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert result.returncode == -signal.SIGKILL
    assert folders(tmp_path)
    assert all(name.startswith(".") for name in folders(tmp_path))
    data = prepare(source, BYTES, tmp_path)
    assert len(data.train) + len(data.validation) == len(TEXTS)


def test_a_build_that_loses_the_race_uses_the_winner(source, tmp_path, monkeypatch):
    build = dataset._build

    def build_after_another(*args):
        monkeypatch.setattr(dataset, "_build", build)
        prepare(source, BYTES, tmp_path)
        build(*args)

    monkeypatch.setattr(dataset, "_build", build_after_another)
    data = prepare(source, BYTES, tmp_path)
    assert folders(tmp_path) == {data.directory.name}


def test_a_damaged_token_file_is_refused(source, tmp_path):
    data = prepare(source, BYTES, tmp_path)
    path = data.directory / "train" / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="damaged token file"):
        prepare(source, BYTES, tmp_path)


def test_large_vocabularies_are_stored_in_32_bits(tmp_path):
    tokenizer = ByteTokenizer()
    tokenizer.token_bytes = tokenizer.token_bytes + [b"x"] * 70_000
    tokenizer.encode_batch = lambda texts: [np.array([70_000 + len(text)]) for text in texts]
    writer = dataset._SplitWriter(tmp_path / "train", tokenizer)
    writer.add("four")
    writer.close()
    np.testing.assert_array_equal(TokenizedDocuments(tmp_path / "train")[0], [1, 70_004, 2])


def test_everything_held_out_or_nothing_held_out(source, tmp_path):
    data = prepare({**source, "heldout_fraction": 0.0}, BYTES, tmp_path)
    assert (len(data.train), len(data.validation)) == (len(TEXTS), 0)
    with pytest.raises(DataError, match="no document for training"):
        prepare({**source, "heldout_fraction": 0.999999}, BYTES, tmp_path)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"name": "byte"}, "did you mean 'bytes'"),
        ({"name": "bpe"}, "needs an int 'vocab_size'"),
        ({"name": "bytes", "vocab_size": 260}, "no option 'vocab_size'"),
        ({"name": "bpe", "vocab_size": 100}, "too small"),
        ({}, "needs a 'name'"),
        ({"name": "nucleotides", "unknown": "X"}, "tokenizer.unknown='X' is not supported"),
        ({"name": "nucleotides", "unkown": "N"}, "did you mean 'unknown'"),
    ],
)
def test_a_bad_tokenizer_config_is_refused(source, tmp_path, tokenizer, message):
    with pytest.raises((KeyError, ValueError), match=message):
        prepare(source, tokenizer, tmp_path)


def test_nucleotides_by_name(tmp_path):
    """Sequences of JSON lines, of either case; one that is not a sequence is named by its line."""
    path, config = tmp_path / "dna.jsonl", {"name": "nucleotides", "unknown": "N"}
    sequences = ["ACGTN", "ggcatt", "ACRYT", "TT"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sequences))
    source = {"name": "jsonl", "paths": str(path), "heldout_fraction": 0.0}
    data = prepare(source, config, tmp_path)
    assert list(data.texts("train")) == [b"ACGTN", b"GGCATT", b"ACNNT", b"TT"]
    assert (data.tokenizer.vocab_size, data.train.num_bytes, data.train.num_targets) == (12, 18, 22)
    np.testing.assert_array_equal(data.train[1], [1, 9, 9, 8, 7, 10, 10, 2])
    with pytest.raises(DataError, match=r"dna\.jsonl:3: refused by the tokenizer: 'R' at character 2 is none of A C G"):
        prepare(source, {"name": "nucleotides"}, tmp_path)

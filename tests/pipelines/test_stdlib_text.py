import ast
import collections
import inspect
import pathlib
import sys
import sysconfig

import pytest

from pipelines import StdlibText
from pipelines.stdlib_text import (
    DOMAINS,
    StdlibTextConfig,
    corpus_examples,
    corpus_fingerprint,
    is_heldout,
    library_files,
)

MAX_FILES = 30


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    config = StdlibTextConfig(name="some", max_files=MAX_FILES, heldout_percent=15)
    builder = StdlibText(data_dir=tmp_path_factory.mktemp("tfds"), config=config)
    builder.download_and_prepare()
    assert list(pathlib.Path(builder.data_dir).glob("*.array_record*"))
    return {
        name: [(x["text"].decode(), DOMAINS[x["domain"]], x["path"].decode()) for x in builder.as_data_source(name)]
        for name in ("train", "validation")
    }


def test_every_example_is_on_one_side_and_tensorflow_is_absent(splits):
    examples, _ = corpus_examples(MAX_FILES)
    assert sorted(splits["train"] + splits["validation"]) == sorted(tuple(e[:3]) for e in examples)
    assert splits["train"]
    assert splits["validation"]
    assert "tensorflow" not in sys.modules


def test_nothing_held_out_leaks(splits):
    files = {name: {path.split(":")[0] for _, _, path in split} for name, split in splits.items()}
    assert not files["train"] & files["validation"]
    texts = {name: {text for text, _, _ in split} for name, split in splits.items()}
    assert not texts["train"] & texts["validation"]
    paragraphs = collections.defaultdict(set)
    for name, split in splits.items():
        for text, domain, _ in split:
            if domain == "topics":
                paragraphs[name] |= {" ".join(p.split()) for p in text.split("\n\n") if len(" ".join(p.split())) > 80}
    assert paragraphs["validation"]
    assert not paragraphs["train"] & paragraphs["validation"]


def test_texts_are_those_of_the_library(splits):
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for text, domain, path in splits["train"]:
        if domain == "code":
            assert text == (root / path).read_bytes().decode("utf-8").replace("\r\n", "\n")
        elif domain == "docstrings":
            file, line = path.split(":")
            source = (root / file).read_text(encoding="utf-8")
            literals = [
                node.value
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.lineno == int(line)
            ]
            assert text in [inspect.cleandoc(literal) for literal in literals]


def test_two_walks_and_two_hashes_are_equal():
    assert corpus_examples(MAX_FILES) == corpus_examples(MAX_FILES)
    assert corpus_fingerprint(MAX_FILES) == corpus_fingerprint(MAX_FILES)
    assert corpus_fingerprint(MAX_FILES) != corpus_fingerprint(MAX_FILES + 1)


def test_library_files_leave_out_tests_and_the_topics_module():
    names = [name for name, _ in library_files()]
    assert names == sorted(names)
    assert "argparse.py" in names
    assert "pydoc_data/topics.py" not in names
    assert not [name for name in names if "site-packages" in name or "/test" in name or "sysconfigdata" in name]


def test_held_out_share_follows_the_fraction():
    share = sum(is_heldout(f"package/module_{i}.py", 0.05) for i in range(20_000)) / 20_000
    assert 0.045 < share < 0.055
    assert not any(is_heldout(str(i), 0.0) for i in range(100))


def test_other_file_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="array_record"):
        StdlibText(data_dir=tmp_path, file_format="tfrecord")

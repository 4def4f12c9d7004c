import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import DataError, make_source


def read(name, **options):
    source = make_source({"name": name, **options})
    return source, list(source.documents())


def jsonl(path, *lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def test_text_folder_yields_exact_texts_in_sorted_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_bytes(b"two\r\nlines \xc3\xa9")
    (tmp_path / "a.txt").write_bytes(b"one")
    (tmp_path / "other.md").write_bytes(b"no")
    _, documents = read("text_folder", path=str(tmp_path))
    assert [d.text for d in documents] == ["one", "two\r\nlines é"]
    assert documents[1].origin == str(tmp_path / "b" / "x.txt")


def test_jsonl_and_parquet_yield_the_same_documents(tmp_path):
    texts = ["first", "zweite \u2028 Zeile", "naïve\n😀"]
    for number in (0, 1):
        rows = texts[number * 2 : number * 2 + 2]
        jsonl(tmp_path / f"{number}.jsonl", *(json.dumps({"body": t, "x": 1}).encode() for t in rows))
        pq.write_table(pa.table({"body": rows, "x": [1] * len(rows)}), tmp_path / f"{number}.parquet")
    _, lines = read("jsonl", paths=str(tmp_path / "*.jsonl"), field="body")
    _, rows = read("parquet", paths=[str(tmp_path / "0.parquet"), str(tmp_path / "1.parquet")], column="body")
    assert [d.text for d in lines] == [d.text for d in rows] == texts
    assert [d.split for d in lines] == [d.split for d in rows]
    assert lines[2].origin == f"{tmp_path / '1.jsonl'}:1"


GOOD = b'{"text": "good"}'
BAD_LINES = {
    "corrupt UTF-8": b'{"text": "\xff"}',
    "not JSON": b'{"text": "x"',
    "not a JSON object": b"[1]",
    "missing field": b'{"txt": "x"}',
    "not a text": b'{"text": 3}',
    "empty document": b'{"text": ""}',
    "not valid Unicode": b'{"text": "\\ud800"}',
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_is_an_error_with_its_place_or_a_counted_skip(tmp_path, reason):
    path = jsonl(tmp_path / "a.jsonl", GOOD, BAD_LINES[reason], GOOD)
    with pytest.raises(DataError, match=reason) as error:
        read("jsonl", paths=path)
    assert error.value.origin == f"{path}:2"
    assert str(error.value).startswith(f"{path}:2: ")
    source, documents = read("jsonl", paths=path, on_error="skip")
    assert [d.text for d in documents] == ["good", "good"]
    assert source.skipped == {reason: 1}


def test_blank_and_absurdly_nested_lines_are_not_json(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", GOOD, b"", b"[" * 200_000)
    source, documents = read("jsonl", paths=path, on_error="skip")
    assert len(documents) == 1
    assert source.skipped == {"not JSON": 2}


def test_a_corrupt_text_file_names_file_and_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine")
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    with pytest.raises(DataError, match=r"b\.txt:3: corrupt UTF-8: byte 0xff at offset 11"):
        read("text_folder", path=str(tmp_path))
    source, documents = read("text_folder", path=str(tmp_path), on_error="skip")
    assert len(documents) == 1
    assert source.skipped == {"corrupt UTF-8": 1}


@pytest.mark.parametrize("name", ["text_folder", "jsonl"])
def test_an_empty_file_is_an_error_or_a_counted_skip(tmp_path, name):
    (tmp_path / "a.txt").write_bytes(b"")
    jsonl(tmp_path / "b.txt", GOOD)
    options = {"path": str(tmp_path)} if name == "text_folder" else {"paths": str(tmp_path / "*.txt")}
    with pytest.raises(DataError, match=r"a\.txt: empty"):
        read(name, **options)
    source, documents = read(name, **options, on_error="skip")
    assert len(documents) == 1
    assert source.skipped.total() == 1


def test_bad_parquet_rows_and_files(tmp_path):
    path = str(tmp_path / "a.parquet")
    raw = pa.array([b"good", None, b"\xff", b""], pa.binary())
    column = pa.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0], 1)
    pq.write_table(pa.table({"text": column, "n": [1, 2, 3, 4]}), path)
    with pytest.raises(DataError, match=r"a\.parquet:row 2: missing field"):
        read("parquet", paths=path)
    source, documents = read("parquet", paths=path, on_error="skip")
    assert [d.text for d in documents] == ["good"]
    assert source.skipped == {"missing field": 1, "corrupt UTF-8": 1, "empty document": 1}
    with pytest.raises(DataError, match="missing column"):
        read("parquet", paths=path, column="txt")
    with pytest.raises(DataError, match="not a text column"):
        read("parquet", paths=path, column="n")
    (tmp_path / "b.parquet").write_bytes(b"this is no parquet")
    with pytest.raises(DataError, match=r"b\.parquet: not readable as Parquet"):
        read("parquet", paths=str(tmp_path / "b.parquet"))


def test_nothing_usable_is_an_error_even_when_skipping(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", b"no", b"no")
    with pytest.raises(DataError, match=r"no usable document.*'not JSON': 2"):
        read("jsonl", paths=path, on_error="skip")
    with pytest.raises(DataError, match="no such file"):
        read("jsonl", paths=str(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match="no file matches"):
        read("text_folder", path=str(tmp_path), pattern="*.rst")


def test_held_out_choice_follows_the_text_and_the_fraction(tmp_path):
    lines = [json.dumps({"text": f"document {i % 500}"}).encode() for i in range(1000)]
    _, documents = read("jsonl", paths=jsonl(tmp_path / "a.jsonl", *lines), heldout_fraction=0.2)
    side = {d.text: d.split for d in documents}
    assert all(side[d.text] == d.split for d in documents)
    assert 0.14 < sum(d.split == "validation" for d in documents) / 1000 < 0.26
    _, shuffled = read("jsonl", paths=jsonl(tmp_path / "b.jsonl", *lines[::-1]), heldout_fraction=0.2)
    assert side == {d.text: d.split for d in shuffled}


def test_fingerprint_follows_content_and_options_only(tmp_path):
    a, b = jsonl(tmp_path / "a.jsonl", GOOD), jsonl(tmp_path / "b.jsonl", GOOD)

    def fingerprint(path, **options):
        return make_source({"name": "jsonl", "paths": path, **options}).fingerprint()

    assert fingerprint(a) == fingerprint(b) == fingerprint([a])
    changed = jsonl(tmp_path / "c.jsonl", GOOD, GOOD)
    others = [fingerprint(changed), fingerprint(a, field="t"), fingerprint(a, heldout_fraction=0.5)]
    assert len({fingerprint(a), *others}) == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "jsnl", "paths": "x"}, "did you mean 'jsonl'"),
        ({"name": "jsonl", "path": "x"}, "did you mean 'paths'"),
        ({"name": "jsonl"}, "needs 'paths'"),
        ({"name": "jsonl", "paths": "x", "on_error": "ignore"}, "on_error='ignore'"),
        ({"name": "jsonl", "paths": "x", "heldout_fraction": 1.0}, "heldout_fraction"),
        ({"name": "stdlib", "domains": ["prose"]}, "domains"),
        ({"paths": "x"}, "needs a 'name'"),
    ],
)
def test_a_bad_config_is_refused_with_the_nearest_fix(config, message):
    with pytest.raises((KeyError, ValueError), match=message):
        make_source(config)


def test_stdlib_domains_filter(workdir, byte_data):
    del byte_data  # shares its build of the corpus
    options = {"max_files": 30, "heldout_fraction": 0.15}
    everything = list(make_source({"name": "stdlib", **options}).documents(workdir / "data"))
    topics = list(make_source({"name": "stdlib", "domains": ["topics"], **options}).documents(workdir / "data"))
    assert topics == [d for d in everything if d.origin.startswith("pydoc_data/topics#")]
    assert {d.split for d in everything} == {"train", "validation"}

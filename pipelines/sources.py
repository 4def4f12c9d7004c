"""Streams of documents: the standard library, a folder of text files, JSON lines, Parquet.

A source is made from plain values (`make_source({"name": "jsonl", "paths": "notes.jsonl"})`). What is wrong
in the data is a `DataError` with file and line, or, with `on_error="skip"`, left out and counted in
`source.skipped`.
"""

import collections
import dataclasses
import glob
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from pipelines.errors import DataError
from pipelines.files import atomic_folder
from pipelines.stdlib_text import DOMAINS, StdlibText, StdlibTextConfig, corpus_fingerprint, is_heldout
from zoo.core.registry import Registry, check_keys

SOURCES = Registry("source")
SPLITS = ("train", "validation")
T = TypeVar("T")


class Document(NamedTuple):
    """One text, where it came from ("file:line"), and its split ("train" or "validation")."""

    text: str
    origin: str
    split: str


def make_source(config: Mapping[str, Any]) -> "Source":
    """Builds the source that `config["name"]` names with the other entries as its options."""
    return build_source(SOURCES, config)


def build_source(registry: Registry, config: Mapping[str, Any]) -> Any:
    """Builds what `config["name"]` names in a registry of dataclasses, with the other entries as its options.

    Raises:
        KeyError, ValueError: an unknown name or option, with the nearest one; an option that is missing or refused.
    """
    options = dict(config)
    if "name" not in options:
        raise ValueError(f"a source config needs a 'name', for example {{'name': {registry.names()[0]!r}}}")
    name = options.pop("name")
    kind = registry.get(name)
    allowed = [field.name for field in dataclasses.fields(kind) if field.init]
    check_keys(f"source {name!r}", options, allowed)
    required = [f.name for f in dataclasses.fields(kind) if f.init and f.default is dataclasses.MISSING]
    missing = [key for key in required if key not in options]
    if missing:
        raise ValueError(f"source {name!r} needs {missing[0]!r}")
    return kind(**options)


@dataclasses.dataclass(kw_only=True)
class BaseSource:
    """What sources of documents and of conversations share: the split, the treatment of bad data, the fingerprint.

    Args:
        heldout_fraction: share held out for validation, chosen by a stable hash of the text, so that equal texts are
            on one side and the choice survives renamed files and moved lines.
        on_error: "raise" stops at the first bad item; "skip" leaves it out and counts it in `skipped`.
    """

    heldout_fraction: float = 0.05
    on_error: str = "raise"
    skipped: collections.Counter = dataclasses.field(default_factory=collections.Counter, init=False, repr=False)
    version: ClassVar[int] = 1  # raise it when what a source yields changes
    items: ClassVar[str] = "documents"

    def __post_init__(self):
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={self.on_error!r} is not supported; allowed: 'raise', 'skip'")
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction={self.heldout_fraction!r} must be at least 0 and below 1")

    def files(self) -> list[pathlib.Path]:
        """The files that are read, in order."""
        raise NotImplementedError

    def usable(self, found: Iterable[T | DataError]) -> Iterator[T]:
        """What is no error; an error is raised, or counted in `skipped`, as `on_error` says.

        Raises:
            DataError: a bad item (with on_error="raise"), or nothing to read at all.
        """
        self.skipped.clear()
        total = 0
        for item in found:
            if not isinstance(item, DataError):
                total += 1
                yield item
            elif self.on_error == "raise":
                raise item
            else:
                self.skipped[item.reason] += 1
        if self.skipped:
            counts = dict(self.skipped)
            logging.warning("%s: skipped %s of %d %s", self, counts, total + self.skipped.total(), self.items)
        if not total:
            raise DataError(f"no usable {self.items[:-1]}", str(self), f"skipped: {dict(self.skipped) or 'none'}")

    def fingerprint(self) -> str:
        """Hash of the options and of the content of every file."""
        digest = hashlib.blake2b(digest_size=16)
        # Two paths to the same content give the same documents, so paths stay out of the hash.
        options = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("skipped", "path", "paths")}
        digest.update(json.dumps([type(self).__name__, self.version, options], sort_keys=True).encode())
        for path in self.files():
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        return digest.hexdigest()

    def split(self, text: str) -> str:
        """The split that a text belongs to."""
        return "validation" if is_heldout(text, self.heldout_fraction) else "train"


@dataclasses.dataclass(kw_only=True)
class Source(BaseSource):
    """A stream of documents."""

    def read(self, cache_dir: pathlib.Path) -> Iterator[tuple[str, str] | tuple[str, str, str] | DataError]:
        """Yields (text, origin), or (text, origin, split), or the error that stands in a document's place."""
        raise NotImplementedError

    def documents(self, cache_dir: str | pathlib.Path = ".") -> Iterator[Document]:
        """Yields the documents in a fixed order; afterwards `skipped` holds the counts by reason.

        Args:
            cache_dir: where a source that has to build files first keeps them (the standard library does).

        Raises:
            DataError: a bad document (with on_error="raise"), or nothing to read at all.
        """
        return self.usable(map(self._document, self.read(pathlib.Path(cache_dir))))

    def _document(self, item: tuple[str, str] | tuple[str, str, str] | DataError) -> Document | DataError:
        if isinstance(item, DataError):
            return item
        text, origin, *split = item
        return text_problem(text, origin) or Document(text, origin, split[0] if split else self.split(text))


def text_problem(text: Any, origin: str) -> DataError | None:
    """What is wrong with a text, or None."""
    if not isinstance(text, str):
        return DataError("not a text", origin, f"found {type(text).__name__}, expected a string")
    if not text:
        return DataError("empty document", origin)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return DataError(
            "not valid Unicode", origin, f"lone surrogate {text[error.start]!r} at character {error.start}"
        )
    return None


def _decode(data: bytes, origin: str, first_line: int | None = None) -> str | DataError:
    """The text of UTF-8 `data`; with `first_line` the error counts lines from there."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if first_line is not None:
            line = first_line + data[: error.start].count(b"\n")
            origin = f"{origin}:{line}"
        return DataError(
            "corrupt UTF-8", origin, f"byte 0x{data[error.start]:02x} at offset {error.start}: {error.reason}"
        )


def expand_paths(paths: str | Sequence[str]) -> list[pathlib.Path]:
    """Existing files of one path or many; a path may be a glob pattern."""
    names = [paths] if isinstance(paths, str | pathlib.Path) else list(paths)
    found = []
    for name in map(str, names):
        matches = [name] if pathlib.Path(name).is_file() else sorted(glob.glob(name, recursive=True))
        matches = [pathlib.Path(match) for match in matches if pathlib.Path(match).is_file()]
        if not matches:
            raise DataError("no such file", name, "a path or a glob pattern of files is expected")
        found.extend(matches)
    if not found:
        raise ValueError("paths is empty: name at least one file")
    return found


def json_records(files: Iterable[pathlib.Path]) -> Iterator[tuple[dict[str, Any], str] | DataError]:
    """Yields every line of the files as (JSON object, "file:line"), or the error that stands in its place."""
    for path in files:
        if not path.stat().st_size:
            yield DataError("empty file", str(path))
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield _json_record(line, f"{path}:{number}")


def _json_record(line: bytes, origin: str) -> tuple[dict[str, Any], str] | DataError:
    text = _decode(line, origin)
    if isinstance(text, DataError):
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return DataError("not JSON", origin, f"{error} in {text.strip()[:60]!r}")
    if not isinstance(record, dict):
        return DataError("not a JSON object", origin, f"found {type(record).__name__}")
    return record, origin


def field_of(record: Mapping[str, Any], field: str, origin: str) -> Any:
    """A field of a record; DataError that lists those there are, where it is missing."""
    if field not in record:
        raise DataError("missing field", origin, f"no {field!r}; the line has {sorted(record)[:10]}")
    return record[field]


@SOURCES.register("stdlib")
@dataclasses.dataclass(kw_only=True)
class Stdlib(Source):
    """The standard library of the running Python (see `StdlibText`); held-out files by a hash of their path.

    Args:
        domains: which of "code", "docstrings", "topics" to read.
        max_files: number of library files, evenly spaced; None takes all.
    """

    domains: Sequence[str] = DOMAINS
    max_files: int | None = None

    def __post_init__(self):
        super().__post_init__()
        unknown = set(self.domains) - set(DOMAINS)
        if unknown or not self.domains or isinstance(self.domains, str):
            raise ValueError(f"domains={self.domains!r} must be a list out of {', '.join(DOMAINS)}")
        if self.max_files is not None and self.max_files < 1:
            raise ValueError(f"max_files={self.max_files} must be at least 1, or None for all")

    def builder(self, cache_dir: str | pathlib.Path) -> StdlibText:
        """The prepared TFDS builder, its files under `cache_dir`."""
        config = StdlibTextConfig(
            name=f"files_{self.max_files or 'all'}_heldout_{100 * self.heldout_fraction:g}_percent",
            max_files=self.max_files,
            heldout_percent=100 * self.heldout_fraction,
        )
        folder = pathlib.Path(cache_dir) / f"stdlib-{corpus_fingerprint(self.max_files)}" / config.name
        if not folder.exists():
            with atomic_folder(folder) as partial:
                StdlibText(data_dir=str(partial), config=config).download_and_prepare()
        return StdlibText(data_dir=str(folder), config=config)

    def fingerprint(self) -> str:
        """Hash of the options and of the library's content."""
        options = [
            sorted(self.domains),
            self.max_files,
            self.heldout_fraction,
            corpus_fingerprint(self.max_files),
        ]
        return hashlib.blake2b(json.dumps(options).encode(), digest_size=16).hexdigest()

    def read(self, cache_dir):
        """Yields the builder's examples, train first."""
        builder = self.builder(cache_dir)
        for split in SPLITS:
            if not builder.info.splits[split].num_examples:
                continue
            for example in builder.as_data_source(split):  # pyright: ignore[reportArgumentType, reportCallIssue]
                if DOMAINS[example["domain"]] in self.domains:
                    yield example["text"].decode(), example["path"].decode(), split


@SOURCES.register("text_folder")
@dataclasses.dataclass(kw_only=True)
class TextFolder(Source):
    """Every UTF-8 file of a folder is one document.

    Args:
        path: the folder.
        pattern: glob pattern under it, "**" for all depths.
    """

    path: str
    pattern: str = "**/*.txt"

    def files(self) -> list[pathlib.Path]:
        """Matching files, sorted by relative path."""
        root = pathlib.Path(self.path)
        if not root.is_dir():
            raise DataError("no such folder", self.path)
        found = sorted((path for path in root.glob(self.pattern) if path.is_file()), key=lambda path: path.as_posix())
        if not found:
            raise DataError("no file matches", self.path, f"pattern {self.pattern!r}")
        return found

    def read(self, cache_dir):
        """Yields one document per file."""
        del cache_dir
        for path in self.files():
            text = _decode(path.read_bytes(), str(path), first_line=1)
            yield text if isinstance(text, DataError) else (text, str(path))


@SOURCES.register("jsonl")
@dataclasses.dataclass(kw_only=True)
class JsonLines(Source):
    """Every line is a JSON object with the text in one field.

    Args:
        paths: file, glob pattern, or a list of them.
        field: key of the text.
    """

    paths: str | Sequence[str]
    field: str = "text"

    def files(self) -> list[pathlib.Path]:
        """The files in the order they were named; patterns expand sorted."""
        return expand_paths(self.paths)

    def read(self, cache_dir):
        """Yields one document per line."""
        del cache_dir
        for item in json_records(self.files()):
            yield item if isinstance(item, DataError) else self._text(*item)

    def _text(self, record: dict[str, Any], origin: str) -> tuple[str, str] | DataError:
        try:
            return field_of(record, self.field, origin), origin
        except DataError as error:
            return error


@SOURCES.register("parquet")
@dataclasses.dataclass(kw_only=True)
class Parquet(Source):
    """Every row of a Parquet file is a document, its text in one string column.

    Args:
        paths: file, glob pattern, or a list of them.
        column: name of the text column.
    """

    paths: str | Sequence[str]
    column: str = "text"

    def files(self) -> list[pathlib.Path]:
        """The files in the order they were named; patterns expand sorted."""
        return expand_paths(self.paths)

    def read(self, cache_dir):
        """Yields one document per row; rows count from 1."""
        del cache_dir
        for path in self.files():
            yield from self._rows(path)

    def _rows(self, path: pathlib.Path) -> Iterator[tuple[str, str] | DataError]:
        row = 0
        try:
            file = pq.ParquetFile(path)
            if self.column not in file.schema_arrow.names:
                yield DataError("missing column", str(path), f"no {self.column!r}; it has {file.schema_arrow.names}")
                return
            kind = file.schema_arrow.field(self.column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                yield DataError("not a text column", str(path), f"{self.column!r} is {kind}, expected string")
                return
            if not file.metadata.num_rows:
                yield DataError("empty file", str(path))
            for batch in file.iter_batches(batch_size=256, columns=[self.column]):
                # As bytes, because a string column may hold corrupt UTF-8 and would fail as a whole.
                for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                    row += 1
                    origin = f"{path}:row {row}"
                    if value is None:
                        yield DataError("missing field", origin, f"{self.column!r} is null")
                        continue
                    text = _decode(value, origin)
                    yield text if isinstance(text, DataError) else (text, origin)
        except (pa.ArrowException, OSError) as error:
            # The rest of a damaged file is lost as a whole; with on_error="skip" that is counted as one.
            yield DataError("not readable as Parquet", f"{path}:row {row + 1}" if row else str(path), str(error))

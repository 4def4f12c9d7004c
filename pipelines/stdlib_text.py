"""A TFDS builder of text that every Python installation carries: its own standard library.

Three domains: `code` (library modules), `docstrings` (longer than 80 characters) and `topics` (the reference
prose of `pydoc_data.topics`). Nothing is downloaded and TensorFlow is not needed: the files are ArrayRecord.
"""

import ast
import collections
import dataclasses
import functools
import hashlib
import pathlib
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pydoc_data import topics as pydoc_topics
from typing import NamedTuple

import tensorflow_datasets as tfds
from absl import logging

from pipelines.errors import DataError

DOMAINS = ("code", "docstrings", "topics")
_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_TOPICS_MODULE = "pydoc_data/topics.py"  # holds every topic as a string literal: as code it would leak held-out topics
_MIN_DOCSTRING = 80
_MIN_SHARED_PARAGRAPH = 80


class Example(NamedTuple):
    """One document of the corpus; `unit` is what the held-out hash sees."""

    text: str
    domain: str
    path: str
    unit: str


def is_heldout(unit: str, fraction: float) -> bool:
    """Whether a stable hash of `unit` falls into the held-out fraction.

    Args:
        unit: name or text of the thing that must stay on one side.
        fraction: share that is held out, 0 to 1.
    """
    value = int.from_bytes(hashlib.blake2b(unit.encode(), digest_size=8).digest(), "big")
    return value < fraction * 2**64


def library_files(max_files: int | None = None) -> list[tuple[str, pathlib.Path]]:
    """Library modules as (relative path, path) in sorted order, without tests and machine-dependent files.

    Args:
        max_files: keep this many, evenly spaced over the sorted list; None keeps all.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        machine_dependent = relative.name.startswith("_sysconfigdata") or relative.parts[0].startswith("config-")
        if machine_dependent or _EXCLUDED_FOLDERS & set(relative.parts) or relative.as_posix() == _TOPICS_MODULE:
            continue
        files.append((relative.as_posix(), path))
    files.sort()
    if not files:
        raise DataError("no Python sources", str(root), "this Python ships its library without .py files")
    if max_files is not None and max_files < len(files):
        files = [files[i * len(files) // max_files] for i in range(max_files)]
    return files


def corpus_fingerprint(max_files: int | None = None) -> str:
    """Hash of everything the corpus is made from: paths, contents, topics and the builder's version."""
    digest = hashlib.blake2b(str(StdlibText.VERSION).encode(), digest_size=16)
    for name, path in library_files(max_files):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    for name, text in sorted(pydoc_topics.topics.items()):
        digest.update(f"{name}\0{len(text)}\0{text}".encode())
    return digest.hexdigest()


def _docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of the long docstrings of a module, in source order."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, kinds) and len(text := ast.get_docstring(node) or "") > _MIN_DOCSTRING:
            found.append((node.body[0].lineno, text))
    yield from sorted(found)


def _topic_groups(topics: dict[str, str]) -> dict[str, str]:
    """Topic -> name of its group; topics that share a paragraph are in one group, on one side of the split.

    Many topics repeat whole sections of others ("specialnames" contains "customization"), so a split by topic
    would put held-out text into the training data.
    """
    group = {name: name for name in topics}

    def root(name):
        while group[name] != name:
            name = group[name]
        return name

    owner: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) > _MIN_SHARED_PARAGRAPH:
                first, second = sorted((root(owner.setdefault(key, name)), root(name)))
                group[second] = first
    return {name: root(name) for name in topics}


def corpus_examples(max_files: int | None = None) -> tuple[list[Example], dict[str, int]]:
    """The corpus in a fixed order, each text once, and the counts of what was left out by reason.

    A docstring carries its file's unit, so that it is held out with its file.
    """
    examples: list[Example] = []
    skipped: collections.Counter[str] = collections.Counter()
    seen: set[str] = set()

    def add(text, domain, path, unit):
        if text in seen:
            skipped["duplicate " + domain] += 1
            return
        seen.add(text)
        examples.append(Example(text, domain, path, unit))

    for name, path in library_files(max_files):
        try:
            with tokenize.open(path) as file:  # honours the encoding line of the module
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            skipped["unreadable module"] += 1
            continue
        if not text.strip():
            skipped["empty module"] += 1
            continue
        add(text, "code", name, name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except SyntaxError:
            skipped["module that does not parse, kept as code"] += 1
            continue
        for line, docstring in _docstrings(tree):
            add(docstring, "docstrings", f"{name}:{line}", name)
    groups = _topic_groups(pydoc_topics.topics)
    for topic, text in sorted(pydoc_topics.topics.items()):
        add(text.strip() + "\n", "topics", f"pydoc_data/topics#{topic}", f"pydoc_data/topics#{groups[topic]}")
    return examples, dict(skipped)


@dataclasses.dataclass(eq=False)
class StdlibTextConfig(tfds.core.BuilderConfig):
    """How much of the library, and the share of files that is held out."""

    max_files: int | None = None
    heldout_percent: float = 5.0


class StdlibText(tfds.core.GeneratorBasedBuilder):
    """Standard-library text with splits `train` and `validation`; features `text`, `domain`, `path`.

    A file, its docstrings, and a group of topics that share paragraphs are on one side of the split, chosen
    by a stable hash of the relative path. The texts differ between Python versions.

    Raises:
        ValueError: a file format other than array_record, which would need TensorFlow.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: dict[str, str] = {"1.0.0": "First version."}  # noqa: RUF012 (TFDS reads a class attribute)
    BUILDER_CONFIGS = [StdlibTextConfig(name="all", description="The whole library.")]  # noqa: RUF012

    # TFDS looks here for checksums of downloads; there are none, and the look-up has extra dependencies.
    code_path = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, *, file_format: str = "array_record", **kwargs):
        if str(getattr(file_format, "value", file_format)) != "array_record":
            raise ValueError(f"stdlib_text: file_format {file_format!r}: only 'array_record' works without TensorFlow")
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Python standard-library sources, docstrings and reference topics.",
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "domain": tfds.features.ClassLabel(names=list(DOMAINS)),
                    "path": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,  # keeps the sorted order, so two builds are equal
        )

    @property
    def _settings(self) -> StdlibTextConfig:
        assert isinstance(self.builder_config, StdlibTextConfig)
        return self.builder_config

    @functools.cached_property
    def _corpus(self) -> list[Example]:
        examples, skipped = corpus_examples(self._settings.max_files)
        logging.info("stdlib_text: %d documents; left out: %s", len(examples), skipped)
        return examples

    def _split_generators(self, dl_manager) -> dict:
        del dl_manager
        return {"train": self._generate_examples(False), "validation": self._generate_examples(True)}

    def _generate_examples(self, heldout: bool) -> Iterator[tuple[int, dict[str, str]]]:
        fraction = self._settings.heldout_percent / 100
        for index, example in enumerate(self._corpus):
            if is_heldout(example.unit, fraction) == heldout:
                yield index, {"text": example.text, "domain": example.domain, "path": example.path}

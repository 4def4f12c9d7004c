"""Folders that exist whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def atomic_folder(final: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty folder beside `final` and renames it to `final` when the block ends well.

    A killed or failed block leaves nothing under `final`. Of processes that build the same content at once
    the first wins and the others discard theirs.
    """
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        yield partial
        try:
            os.rename(partial, final)
        except OSError:
            if not final.exists():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)

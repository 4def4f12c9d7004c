import json

import pytest

from pipelines import prepare

STDLIB = {"name": "stdlib", "max_files": 30, "heldout_fraction": 0.15}


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("workdir")


@pytest.fixture(scope="session")
def byte_data(workdir):
    return prepare(STDLIB, {"name": "bytes"}, workdir)


@pytest.fixture(scope="session")
def bpe_data(workdir):
    return prepare(STDLIB, {"name": "bpe", "vocab_size": 600}, workdir)


@pytest.fixture
def jsonl(tmp_path):
    def write(*records):
        path = tmp_path / "a.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return str(path)

    return write

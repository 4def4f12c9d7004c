import pathlib

import pytest

from launch import train
from tests.launch import tiny


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("texts")
    tiny.write_texts(folder)
    return folder


@pytest.fixture
def config(texts):
    return tiny.get_config(str(texts))


@pytest.fixture(scope="session")
def finished(texts, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("finished")
    config = tiny.get_config(str(texts))
    config.checkpoint.every = 0
    train.run(config, workdir)
    return workdir

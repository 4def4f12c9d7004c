import pathlib

import jax
import pytest

from launch import train
from tests.launch import tiny


@pytest.fixture(scope="package", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs here share what they compile; runs in processes of their own compile for themselves."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {key: getattr(jax.config, key) for key in options}
    for key, value in options.items():
        jax.config.update(key, value)
    yield
    for key, value in before.items():
        jax.config.update(key, value)


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

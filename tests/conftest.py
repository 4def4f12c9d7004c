"""The suite is written for CPUs, some of them simulated devices; JAX_PLATFORMS=cuda or tpu runs it elsewhere."""

import os
import shutil
import tempfile

# Many tests compile the same programs, and `forget_compiled` drops them: a directory of this process keeps them.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="purezoo_compiled_")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PJRT_NPROC", "8")  # threads of XLA: simulated warpgroups that wait for each other hold one each

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    """Drops what a test file compiled once the file is done.

    XLA on a CPU maps about three memory regions for each program it keeps. A worker of the whole suite keeps tens of
    thousands, and Linux kills a process at 65,530 regions (`vm.max_map_count`).
    """
    yield
    jax.clear_caches()


def pytest_unconfigure():
    """Removes what this process kept of compiled programs."""
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

"""The same run on one device, on eight simulated ones and in two processes gives the same losses."""

import csv
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.launch import tiny

ROOT = pathlib.Path(__file__).parents[2]
LOSS_TOLERANCE = 1e-5  # relative, float32, over all steps
STEPS = 4


def _command(texts, workdir, *options) -> list[str]:
    return [
        sys.executable,
        "launch/main.py",
        f"--config=tests/launch/tiny.py:{texts}",
        f"--workdir={workdir}",
        f"--config.steps={STEPS}",
        "--config.batch_size=8",
        "--config.ema_decay=0.0",
        "--config.model.kv_heads=2",
        "--config.evaluate.every=0",
        "--config.evaluate.batches=1",
        "--config.checkpoint.every=0",
        *options,
    ]


def _start(command, devices=1, **env) -> subprocess.Popen:
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
        **env,
    }
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(*processes) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output


def _columns(workdir) -> np.ndarray:
    with open(workdir / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == STEPS
    return np.array([[float(row["loss"]), float(row["grad_norm"]), float(row["param_norm"])] for row in rows])


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("texts")
    tiny.write_texts(folder)
    return folder


@pytest.fixture(scope="module")
def one_device(texts, tmp_path_factory) -> np.ndarray:
    workdir = tmp_path_factory.mktemp("one")
    _finish(_start(_command(texts, workdir)))
    return _columns(workdir)


@pytest.mark.parametrize(
    ("rules", "mesh"),
    [
        pytest.param("fsdp", {"data": 2, "fsdp": 4}, marks=pytest.mark.slow),
        ("fsdp_tp", {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_eight_devices_equal_one(rules, mesh, texts, one_device, tmp_path):
    options = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    _finish(_start(_command(texts, tmp_path, f"--config.rules.name={rules}", *options), devices=8))
    np.testing.assert_allclose(_columns(tmp_path), one_device, rtol=LOSS_TOLERANCE)


@pytest.mark.slow
def test_two_processes_equal_one(texts, one_device, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = _command(texts, tmp_path)
    processes = [
        _start(
            command,
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]
    _finish(*processes)
    np.testing.assert_allclose(_columns(tmp_path), one_device, rtol=LOSS_TOLERANCE)

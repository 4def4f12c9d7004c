"""kill -9 and SIGTERM at any time: the resumed run equals the uninterrupted one, bitwise."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from launch import train
from launch.metrics import CLOCK, read_csv
from launch.run import build
from tests.launch import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT = 240


def start(texts, workdir):
    """The command of a user, in a process of its own."""
    command = [sys.executable, "launch/main.py", f"--config=tests/launch/tiny.py:{texts}", f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)


def wait_for(process, condition):
    deadline = time.time() + TIMEOUT
    while not condition():
        assert process.poll() is None, f"the run ended early with {process.returncode}"
        assert time.time() < deadline
        time.sleep(0.005)


def rows_without_clock(workdir):
    rows = read_csv(workdir / "metrics.csv")
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def assert_equal_runs(config, one, other):
    assert rows_without_clock(one) == rows_without_clock(other)
    states = []
    for workdir in (one, other):
        run = build(config, workdir)
        checkpoints = run.checkpoints(read_only=True)
        states.append(checkpoints.restore(run.abstract, step=config.steps))
        checkpoints.close()
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    names = [workdir / f"checkpoints/{config.steps}/data/process_0-of-1.json" for workdir in (one, other)]
    assert names[0].read_text() == names[1].read_text()
    assert (one / "samples.md").read_text() == (other / "samples.md").read_text()


SIGNALS = [
    pytest.param(signal.SIGKILL, id="kill"),
    pytest.param(signal.SIGTERM, id="sigterm", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sent", SIGNALS)
def test_resumes_bitwise(sent, texts, finished, tmp_path):
    process = start(texts, tmp_path)
    # From the first checkpoint on a kill may hit a step, the writing of a row, a checkpoint, or the deletion of one.
    wait_for(process, lambda: (tmp_path / "checkpoints/5").exists())
    delay = random.uniform(0, 0.5)
    time.sleep(delay)
    process.send_signal(sent)
    code = process.wait(TIMEOUT)
    print(f"{sent.name} after {delay:.3f} s, {len(rows_without_clock(tmp_path))} rows")
    config = tiny.get_config(str(texts))
    saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    if sent == signal.SIGTERM:
        assert code == 0
        assert saved == int(read_csv(tmp_path / "metrics.csv")[-1]["step"]) < config.steps
        assert not (tmp_path / "summary.json").exists()
    else:
        assert code == -signal.SIGKILL
        (tmp_path / "checkpoints/58.orbax-checkpoint-tmp/state").mkdir(parents=True)  # a save that was cut short
        with open(tmp_path / "metrics.csv", "a") as file:
            file.write("59,0.1")  # a row that was cut short
    train.run(config, tmp_path)
    assert_equal_runs(config, finished, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_goes_back_when_the_newest_checkpoint_is_damaged(texts, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for path in (workdir / "checkpoints/60/state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    config = tiny.get_config(str(texts))
    train.run(config, workdir)
    assert_equal_runs(config, finished, workdir)

"""A short run: what it learns, what it leaves, and what it refuses."""

import json
import shutil

import jax
import matplotlib.image
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from launch import evaluate, generate, train
from launch.checkpoints import Checkpoints
from launch.config import ConfigError
from launch.metrics import CLOCK, read_csv
from launch.run import build

LEARNED_BITS_PER_BYTE = 1.6  # measured 1.3; the unigram baseline is above 3


def test_learns(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["bits_per_byte"] < LEARNED_BITS_PER_BYTE < summary["bits_per_byte_of"]["unigram"]
    assert summary["bits_per_byte_of"]["samba-tiny"] == summary["bits_per_byte"]
    rows = read_csv(finished / "metrics.csv")
    assert float(rows[0]["loss"]) == pytest.approx(np.log(260), rel=0.05)  # uniform over the vocabulary at step 1
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])


def test_artefacts(finished):
    rows = read_csv(finished / "metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    assert list(rows[0])[:5] == ["step", "loss", "grad_norm", "param_norm", "learning_rate"]
    assert tuple(list(rows[0])[-2:]) == CLOCK
    assert [row["step"] for row in rows if row["validation_bits_per_byte"]] == ["20", "40", "60"]
    for row in rows:
        loss = float(row["loss"])
        assert np.float64(np.float32(loss)) == loss  # the step's float32, to the last bit

    summary = json.loads((finished / "summary.json").read_text())
    for key in ("bits_per_byte", "tokens_per_second", "wall_seconds"):
        assert np.isfinite(summary[key])
        assert summary[key] > 0
    assert summary["step"] == 60
    assert summary["mfu"] is None  # the peak of a CPU is not known
    saved = json.loads((finished / "config.json").read_text())
    assert saved["config"]["model"]["vocab_size"] == 260
    assert saved["config"]["optimizer"]["schedule"]["steps"] == 60
    assert saved["versions"]["jax"] == jax.__version__
    assert matplotlib.image.imread(finished / "loss.png").ndim == 3
    samples = (finished / "samples.md").read_text()
    assert "the " in samples
    assert "`a" in samples
    assert _tensorboard_steps(finished, "loss") == list(range(1, 61))


def _tensorboard_steps(workdir, tag):
    steps = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # records: length u64, crc u32, payload, crc u32
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            steps += [event.step for value in event.summary.value if value.tag == tag]
            data = data[16 + size :]
    return steps


def test_a_finished_run_is_not_trained_again(finished, config, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(finished, workdir)
    before = json.loads((workdir / "summary.json").read_text())
    train.run(config, workdir)
    after = json.loads((workdir / "summary.json").read_text())
    assert after["bits_per_byte"] == before["bits_per_byte"]
    assert after["tokens_per_second"] is None
    assert (workdir / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()


def test_evaluate_and_generate_modes(finished, config, capsys):
    summary = json.loads((finished / "summary.json").read_text())
    samples = (finished / "samples.md").read_text()
    evaluate.run(config, finished)
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert evaluation["step"] == 60
    assert evaluation["bits_per_byte"] == summary["bits_per_byte"]
    assert "unigram" in capsys.readouterr().out
    (finished / "samples.md").unlink()
    generate.run(config, finished)
    assert (finished / "samples.md").read_text() == samples
    config.evaluate.checkpoint = "7"
    with pytest.raises(ConfigError, match=r"no checkpoint '7' .* steps \["):
        evaluate.run(config, finished)


def test_keeps_the_last_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=1)
    for step, score in enumerate((3.0, 1.0, 2.0, None, 2.5, None), start=1):
        checkpoints.save(step, {"x": np.full(3, step)}, _Counter(), None if score is None else {"bits_per_byte": score})
    checkpoints.close()
    kept = Checkpoints(tmp_path, read_only=True)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 5, 6]
    assert (kept.find("best"), kept.find("last")) == (2, 6)
    restored = kept.restore({"x": jax.ShapeDtypeStruct((3,), int)}, step=2)
    np.testing.assert_array_equal(restored["x"], 2)
    kept.close()


class _Counter:
    def get_state(self):
        return b"0"

    def set_state(self, state):
        assert state == b"0"

    def start_prefetch(self):
        pass


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model.width": 48}, "model.width: 32 -> 48"),
        ({"data.shuffle_rows": 8}, "data.shuffle_rows: 16 -> 8"),
        ({"seed": 1, "batch_size": 8}, "batch_size: 4 -> 8; seed: 0 -> 1"),
        ({"steps": 80}, "optimizer.schedule.steps: 60 -> 80"),
    ],
)
def test_refuses_another_config(finished, config, tmp_path, change, key):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    config.update_from_flattened_dict(change)
    with pytest.raises(ConfigError, match=f"differing keys: {key}"):
        train.run(config, workdir)


def test_refuses_other_data(finished, config, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    texts = tmp_path / "texts"
    shutil.copytree(config.data.source.path, texts)
    (texts / "new.txt").write_text("one more document")
    config.data.source.path = str(texts)
    with pytest.raises(ConfigError, match="data fingerprint"):
        train.run(config, workdir)


def test_stops_at_what_is_not_finite(config, tmp_path, monkeypatch):
    """The learning rate overflows at step 7: the message names the batch, and no checkpoint after step 5 exists."""
    import launch.optimizer

    def explode(config):
        import jax.numpy as jnp

        return lambda step: jnp.where(step >= 6, jnp.inf, 1e-3)

    monkeypatch.setattr(launch.optimizer, "make_schedule", explode)
    config.steps = 12
    config.evaluate.every = 0
    run = build(config, tmp_path)
    batches = train.data_lib.train_batches(run.data, run.config)
    expected = [next(batches) for _ in range(7)][-1]
    with pytest.raises(train.NotFiniteError, match=r"step 7 is not finite.*nan_batch_step_7\.npz"):
        train.run(config, tmp_path)
    saved = np.load(tmp_path / "nan_batch_step_7.npz")
    assert set(saved) == set(expected)
    for name in saved:
        np.testing.assert_array_equal(saved[name], expected[name])
    checkpoints = run.checkpoints(read_only=True)
    assert checkpoints.latest == 5
    state = checkpoints.restore(run.abstract)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    checkpoints.close()
    assert [int(row["step"]) for row in read_csv(tmp_path / "metrics.csv")] == list(range(1, 7))

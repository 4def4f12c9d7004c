"""mode=benchmark: the table is whole; the numbers are not tested."""

import importlib
import json

import jax
import numpy as np
import pytest

from launch import benchmark, benchmark_ops, main
from launch.config import ConfigError
from launch.configs import benchmark as config_file
from pallas_kernels.static_profile import programs

SIDES = ("xla", "reference")


def test_samba_and_its_twin(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "limit_threads", lambda: None)
    monkeypatch.setattr(benchmark, "DECODE_TOKENS", 2)
    config = config_file.get_config()
    config.benchmark.update(suites=("samba",), repeats=1, lengths=(256, 512))
    main.dispatch(config, tmp_path)
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["samba-tiny, 256 tokens"] * 4 + ["samba-tiny, 512 tokens"] * 4
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)
    assert all(row["ratio"] == pytest.approx(row["peer"] / row["ours"]) for row in rows)
    state = [row for row in rows if row["metric"] == "state bytes"]
    assert state[0]["ours"] == state[1]["ours"], "the state of Samba is bounded by its window"
    assert state[1]["peer"] > 1.9 * state[0]["peer"]
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    assert "samba-tiny, 256" in capsys.readouterr().out


def test_ops(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "limit_threads", lambda: None)
    monkeypatch.setattr(programs, "ops", lambda: ["linear_scan", "rms_norm_quantize"])
    config = config_file.get_config()
    config.benchmark.update(suites=("ops",), repeats=1, op_lengths=(8,))
    main.dispatch(config, tmp_path)
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    linear_scan = [row["metric"] for row in rows if row["name"] == "linear_scan, hgrn_1.3b, 8 tokens"]
    assert linear_scan == [f"{which}, ms (xla against reference)" for which in benchmark_ops.PASSES]
    norm = [row["metric"] for row in rows if row["name"].startswith("rms_norm_quantize, bitnet_2b4t_prefill")]
    assert norm == ["forward, ms (xla against reference)"], "an op without a backward pass of its own"
    assert all(row["ratio"] == pytest.approx(row["peer"] / row["ours"]) for row in rows)


@pytest.mark.parametrize("op", programs.ops())
def test_arguments_of_ops(op):
    shape = next(iter(importlib.import_module(f"pallas_kernels.{op}.shapes").TINY.values()))
    results = [benchmark_ops.call(op, shape, benchmark_ops.draw(shape), name, "forward")() for name in SIDES]
    assert benchmark_ops.difference(*results) < 1e-4
    leaves = [np.asarray(a, np.float64) for a in jax.tree.leaves(results)]
    assert all(np.isfinite(a).all() for a in leaves)
    assert any(a.any() for a in leaves)


def test_difference_is_of_the_worst_result():
    exact = {"y": np.array([2.0, -4.0]), "state": np.array([1.0])}
    assert benchmark_ops.difference({"y": np.array([2.0, -3.0]), "state": np.array([1.1])}, exact) == 0.25


def test_unknown_suite(tmp_path):
    config = config_file.get_config()
    config.benchmark.suites = ("mamba-13m",)
    with pytest.raises(ConfigError, match="did you mean 'mamba-130m'"):
        main.dispatch(config, tmp_path)


def test_medians_take_turns():
    order = []
    seconds = benchmark.median_seconds((lambda: order.append("a"), lambda: order.append("b")), 2)
    assert order == (["a"] * 3 + ["b"] * 3) * 2
    assert all(s >= 0 for s in seconds)

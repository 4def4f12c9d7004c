"""mode=benchmark: the table is whole; the numbers are not tested."""

import json

import pytest

from launch import benchmark, main
from launch.config import ConfigError
from launch.configs import benchmark as config_file


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

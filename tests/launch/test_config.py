"""Configs, meshes, the metrics table and the command line: what is refused, and with which words."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from launch import config as config_lib
from launch import main, mesh, train
from launch.config import ConfigError
from launch.configs import (
    base,
    benchmark,
    extrapolation,
    mamba_in_llama,
    quickstart,
    recall,
    samba,
    state_tracking,
)
from launch.metrics import Meter, Table, read_csv
from launch.run import build, resolve

ROOT = pathlib.Path(__file__).resolve().parents[2]


def changed(**changes):
    config = base.get_config()
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


CONFIGS = [base, quickstart, benchmark, samba, state_tracking, recall, extrapolation, mamba_in_llama]


@pytest.mark.parametrize("module", CONFIGS)
def test_configs_are_plain_and_whole(module):
    config = module.get_config()
    config_lib.check(config)
    plain = config_lib.to_dict(config)
    assert json.loads(json.dumps(plain)) == plain
    for key in ("seed", "steps", "batch_size", "sequence_length", "mesh", "rules"):
        assert key in plain
    for key in ("model.name", "objective.name", "optimizer.name", "optimizer.learning_rate"):
        assert key in config_lib.flatten(plain)
    for key in ("checkpoint.every", "evaluate.every"):
        assert key in config_lib.flatten(plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bach_size": 3}, "no key 'bach_size'; did you mean 'batch_size'"),
        ({"checkpoint__evry": 3}, "no key 'checkpoint.evry'; did you mean 'checkpoint.every'"),
        ({"mesh__tensr": 2}, "no key 'mesh.tensr'; did you mean 'mesh.tensor'"),
        ({"mode": "trian"}, "mode='trian' is unknown; did you mean 'train'"),
        ({"steps": 0}, "config.steps=0 must be a number of at least 1"),
        ({"accumulation": 3}, "batch_size=8 is not a multiple of config.accumulation=3"),
        ({"ema_decay": 1.0}, "must be below 1"),
        ({"evaluate__checkpoint": "newest"}, "must be 'best', 'last' or the digits of a step"),
    ],
)
def test_check_names_key_and_nearest(changes, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        config_lib.check(changed(**changes))


def test_check_names_missing_keys():
    config = base.get_config()
    del config.checkpoint.every
    with pytest.raises(ConfigError, match=r"lacks 'checkpoint\.every'"):
        config_lib.check(config)


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"model__name": "samba-tny"}, "model", "did you mean 'samba-tiny'"),
        ({"model__widht": 3}, "model", "did you mean 'width'"),
        ({"objective__name": "crossentropy"}, "objective", "did you mean 'cross_entropy'"),
        ({"objective__zloss": 0.1}, "objective", "did you mean 'z_loss'"),
        ({"optimizer__schedule__name": "wds"}, r"optimizer\.schedule", "did you mean 'wsd'"),
        ({"rules__name": "fdsp"}, r"mesh and config\.rules", "did you mean 'fsdp'"),
        ({"data__source__name": "stdlb"}, "data", "did you mean 'stdlib'"),
        ({"data__tokenizer__name": "bites"}, "data", "did you mean 'bytes'"),
    ],
)
def test_build_names_the_nearest(changes, where, message, tmp_path):
    with pytest.raises(ConfigError, match=rf"config\.{where}: .*{message}"):
        build(changed(**changes), tmp_path)


def test_resolve_fills_in_what_is_open():
    resolved = resolve(changed(steps=7), 300)
    assert resolved["model"]["vocab_size"] == 300
    assert resolved["optimizer"]["schedule"]["steps"] == 7
    with pytest.raises(ConfigError, match="vocab_size=100 is smaller than the data's 300"):
        resolve(changed(model__vocab_size=100), 300)


def test_resume_may_change_where_and_how_long(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"no config\.json, which says what run they are of; put it back"):
        config_lib.check_resume(path, resolve(changed(), 300), "f")
    config_lib.save(path, resolve(changed(optimizer__schedule__steps=50), 300), data_fingerprint="f")
    other = changed(optimizer__schedule__steps=50, steps=9, mesh__fsdp=2, rules__name="fsdp", log__every=1)
    config_lib.check_resume(path, resolve(other, 300), "f")
    with pytest.raises(ConfigError, match=r"differing keys: optimizer\.schedule\.steps: 50 -> 9"):
        config_lib.check_resume(path, resolve(changed(steps=9), 300), "f")
    with pytest.raises(ConfigError, match="data fingerprint: 'f' -> 'g'"):
        config_lib.check_resume(path, resolve(other, 300), "g")


def test_a_run_older_than_a_key_had_its_default(tmp_path):
    path = tmp_path / "config.json"
    config_lib.save(path, resolve(changed(), 300), data_fingerprint="f")
    saved = json.loads(path.read_text())
    for key in ("initial", "teacher", "trainable"):
        del saved["config"][key]
    path.write_text(json.dumps(saved))
    config_lib.check_resume(path, resolve(changed(), 300), "f")
    with pytest.raises(ConfigError, match=r"differing keys: trainable: \['\*'\] -> \['head'\]"):
        config_lib.check_resume(path, resolve(changed(trainable=("head",)), 300), "f")


def test_mesh_sizes():
    full = {"data": -1, "fsdp": 2, "context": 1, "tensor": 2, "expert": 1}
    assert mesh.resolve_axes(full, 8)["data"] == 2
    with pytest.raises(ConfigError, match="does not fit 6 devices; the fixed sizes multiply to 4"):
        mesh.resolve_axes(full, 6)
    with pytest.raises(ConfigError, match="one of them may be -1"):
        mesh.resolve_axes({"data": -1, "fsdp": -1}, 8)
    with pytest.raises(ValueError, match="did you mean 'tensor'"):
        mesh.resolve_axes({"tensr": 1}, 1)


def test_table_goes_on_after_its_step(tmp_path):
    path = tmp_path / "metrics.csv"
    first = {"loss": 1 / 3, "grad_norm": 1.0, "param_norm": 1.0, "learning_rate": 0.1, "tokens": 8, "nll": 0.5}
    table = Table(path, 0)
    for step in (1, 2, 3):
        table.write({"step": step, **first, "seconds": 10.0 * step})
    table.close()
    with open(path, "a") as file:
        file.write("4,0.33")  # cut short
    table = Table(path, 2)
    assert table.seconds == 20.0
    table.write({"step": 3, **first, "loss": 0.1, "validation_loss": 2.0, "seconds": 21.0})
    table.close()
    rows = read_csv(path)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [float(row["loss"]) for row in rows] == [1 / 3, 1 / 3, 0.1]
    assert rows[2]["validation_loss"] == "2.0"
    assert rows[2]["validation_bits_per_byte"] == ""


def test_meter_leaves_out_pauses(monkeypatch):
    now = iter([10.0, 12.0, 14.0, 100.0, 101.0])
    monkeypatch.setattr("launch.metrics.time.perf_counter", lambda: next(now))
    meter = Meter()
    assert [meter.tick(20) for _ in range(3)] == [None, 10.0, 10.0]
    meter.pause()
    assert [meter.tick(20) for _ in range(2)] == [None, 20.0]
    assert meter.rate == 12.0


def test_command_line(tmp_path):
    """A typing error on the command line ends the program with the nearest key, and no traceback."""
    command = [sys.executable, "launch/main.py", "--config=launch/configs/quickstart.py", f"--workdir={tmp_path}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [*command, "--config.checkpoint.evry=5"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert "error: config has no key 'checkpoint.evry'; did you mean 'checkpoint.every'" in result.stderr
    assert "Traceback" not in result.stderr


def test_place_shards_rows():
    devices = mesh.make(resolve(base.get_config(), 300))
    placed = mesh.place({"tokens": np.arange(8).reshape(4, 2)}, *devices)
    assert placed["tokens"].shape == (4, 2)
    assert len(placed["tokens"].sharding.device_set) == len(jax.devices())


def test_nucleotides_by_name(tmp_path):
    """HybriDNA's tokenizer sets its vocabulary; a prompt that is no sequence is refused before the run, not after."""
    (tmp_path / "dna.jsonl").write_text("".join(json.dumps({"text": "acgtn" * n}) + "\n" for n in range(1, 9)))
    config = changed(data__source={"name": "jsonl", "paths": str(tmp_path / "dna.jsonl"), "heldout_fraction": 0.3})
    config.model.name = "hybridna-tiny"
    config.data.tokenizer = {"name": "nucleotides", "unknown": "error"}
    run = build(config, tmp_path / "run")
    assert (run.data.vocab_size, run.model.config.vocab_size) == (12, 12)
    assert "ACGTN" in run.data.tokenizer.decode(run.data.train[0])
    with pytest.raises(ConfigError, match=r"config\.generate\.prompts: 'd' at character 0 is none of A C G T N"):
        train.run(config, tmp_path / "run")
    config.generate.update(prompts=("acgt",), max_tokens=10**6)
    with pytest.raises(ConfigError, match=r"config\.generate\.max_tokens: .* has attention without a window"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_process_starts_anew_with_huge_pages_once():
    code = (
        "import os, sys; from launch import main; main.glob.glob = lambda pattern: []; "  # no accelerator
        "main.with_huge_pages(); print(os.environ['GLIBC_TUNABLES'], sys.argv)"
    )
    bare = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}

    def said(**environment):
        command = [sys.executable, "-c", code, "--config.a=b c"]
        return subprocess.run(
            command, cwd=ROOT, env=bare | environment, capture_output=True, text=True, check=True, timeout=120
        ).stdout.strip()

    assert said() == "glibc.malloc.hugetlb=1 ['-c', '--config.a=b c']"
    assert said(GLIBC_TUNABLES="glibc.malloc.arena_max=7") == "glibc.malloc.arena_max=7 ['-c', '--config.a=b c']"


def test_a_host_with_an_accelerator_keeps_its_malloc(monkeypatch):
    monkeypatch.setattr(main.glob, "glob", lambda pattern: ["/dev/nvidia0"] if "nvidia" in pattern else [])
    monkeypatch.setattr(main.os, "execv", lambda *arguments: pytest.fail("started anew"))
    monkeypatch.setattr(main.os, "environ", {})
    main.with_huge_pages()

"""mode=compile: for a TPU topology, without the chips."""

import json

import pytest

from launch import compile as compile_lib
from launch import config as config_lib
from launch import data as data_lib
from launch import main, run
from launch.config import ConfigError
from launch.configs import grpo, kto, preference, responses, reward, samba, sft

HLO = """
  %a = f32[8]{0} all-gather(%x), dimensions={0}
  %b = (f32[8]{0}, f32[64]{0}) all-gather-start(%y), dimensions={0}
  %c = f32[64]{0} all-gather-done(%b)
  %d = f32[8]{0} all-reduce(%a), to_apply=%sum
  %e = f32[8]{0} add(%a, %d)
"""


def _config(**changes):
    config = samba.get_config("421m")
    config.mode, config.topology = "compile", "v5e:2x4"
    sizes = {"vocab_size": 256, "width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 64, "window": 32}
    config.model = {"name": "samba-tiny", "dtype": "bfloat16", **sizes}
    config.batch_size, config.sequence_length, config.mesh.fsdp = 16, 64, 4
    config.update(changes)
    return config


def test_collectives_are_counted_once():
    assert compile_lib.count_collectives(HLO) == {"all-gather": 2, "all-reduce": 1}


def test_compiles_for_a_topology(tmp_path, monkeypatch, capsys):
    """ZeRO-3 over 4 x 2 chips: parameters are gathered, gradients reduced; a smaller memory is refused."""
    pytest.importorskip("libtpu")
    main.dispatch(_config(), tmp_path)
    report = json.loads((tmp_path / "compile.json").read_text())
    assert report["devices"] == 8
    assert report["mesh"]["data"] == 2
    assert report["mesh"]["fsdp"] == 4
    assert report["collectives"]["all-gather"] > 0
    assert report["collectives"].get("all-reduce", 0) + report["collectives"].get("reduce-scatter", 0) > 0
    # Parameters and two moments in float32, most of them split four ways.
    assert 3 * report["parameters"] < report["bytes_per_device"]["arguments"] < 12 * report["parameters"]
    assert "all-gather" in capsys.readouterr().out

    monkeypatch.setitem(compile_lib.HBM, "v5e", 1000)
    with pytest.raises(ConfigError, match=r"samba-tiny does not fit the device: .* of 1,000 per device"):
        main.dispatch(_config(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "v5q:2x4"}, "must look like v5e:16x16 or v5p:8x8x8"),
        ({"batch_size": 12}, "axis 'batch' of size 12 cannot be split 8 ways"),
        ({"mesh": {"fsdp": 3}}, "does not fit 8 devices"),
    ],
)
def test_errors_at_the_door(changes, message, tmp_path):
    if "topology" not in changes:
        pytest.importorskip("libtpu")
    with pytest.raises(ConfigError, match=message):
        main.dispatch(_config(**changes), tmp_path)


def test_needs_a_vocabulary(tmp_path):
    config = _config()
    config.model.vocab_size = None
    with pytest.raises(ConfigError, match=r"give config\.model\.vocab_size"):
        main.dispatch(config, tmp_path)


def of_responses(recipe, folder, **changes):
    """A recipe as it is compiled: of the run that it goes on from there is the config and nothing else."""
    config = recipe()
    config.mode, config.batch_size = "compile", 8
    config.model.update(vocab_size=260, width=16, layers=1, heads=2, kv_heads=1, hidden=24)
    folder.mkdir()
    config_lib.write_json(folder / "config.json", {"config": config_lib.to_dict(config)})
    config.initial = {"name": "run", "workdir": str(folder)}
    config.update(changes)
    return config


def test_a_step_of_pairs_and_their_reference_compiles(tmp_path):
    main.dispatch(of_responses(preference.get_config, tmp_path / "run"), tmp_path)
    report = json.loads((tmp_path / "compile.json").read_text())
    assert report["batch"] == [8, 2, 16]
    # Parameters, two moments, the reference: float32.
    assert 16 * report["parameters"] < report["bytes_per_device"]["arguments"] < 17 * report["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "changes", "copies"),
    [
        (preference.get_config, {"teacher": {"name": "initial", "precompute": True}}, 3),
        (reward.get_config, {}, 3),
        (kto.get_config, {}, 4),
        (grpo.get_config, {}, 3),
        (sft.get_config, {"objective": {"name": "multi_token_prediction", "heads": 2}}, 3),
    ],
)
def test_steps_of_other_responses_compile(recipe, changes, copies, tmp_path):
    main.dispatch(of_responses(recipe, tmp_path / "run", batch_size=2, **changes), tmp_path)
    report = json.loads((tmp_path / "compile.json").read_text())
    assert 4 * copies * report["parameters"] < report["bytes_per_device"]["arguments"]
    assert report["bytes_per_device"]["arguments"] < (4 * copies + 4) * report["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [preference.get_config, reward.get_config, kto.get_config])
def test_steps_of_responses_compile_for_a_topology(recipe, tmp_path):
    pytest.importorskip("libtpu")
    config = of_responses(recipe, tmp_path / "run", topology="v5e:2x4")
    config.mesh.fsdp, config.rules.name = 4, "fsdp"
    main.dispatch(config, tmp_path)
    report = json.loads((tmp_path / "compile.json").read_text())
    assert report["devices"] == 8
    assert report["collectives"]["all-gather"] > 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sft", {}),
        ("sft", {"loss": "all"}),
        ("sft", {"loss": "all", "pack": True}),
        ("pairs", {}),
        ("unpaired", {}),
        ("unpaired", {"mismatched": True}),
        ("ranked", {}),
        ("ranked", {"ties": True}),
    ],
)
def test_shapes_of_batches_are_those_of_the_data(kind, options, tmp_path):
    config = responses.get_config(kind)
    config.data.source.update(options, train_examples=40, validation_examples=2)
    config.batch_size = 4
    data = data_lib.prepare(config, tmp_path)
    plain = run.resolve(config, data.vocab_size)
    batch = next(data_lib.train_batches(data, plain))
    assert {key: (value.shape, str(value.dtype)) for key, value in batch.items()} == data_lib.batch_shapes(plain)


def test_lists_of_responses_are_refused(tmp_path):
    config = of_responses(preference.get_config, tmp_path / "run")
    config.data.source = {"name": "arithmetic", "kind": "ranked", "unpack": "lists"}
    with pytest.raises(ConfigError, match=r"config\.data: source: .* unpack them into pairs"):
        main.dispatch(config, tmp_path)

"""Runs on responses: fine-tuning, pairs with a reference of either kind, labels, rewards, drawn responses."""

import functools
import itertools
import json

import chex
import jax
import numpy as np
import pytest

from launch import data as data_lib
from launch import mesh as mesh_lib
from launch import run as run_lib
from launch import start as start_lib
from launch import train
from launch.checkpoints import Checkpoints
from launch.config import ConfigError
from launch.configs import grpo, kto, masked_diffusion, preference, responses, reward, rho1, sft, spin, unlearning
from launch.metrics import read_csv
from launch.run import build

SAME = 1e-5  # relative; of numbers that come from two programs


def tiny(config, steps, start=None):
    """The recipe with a model of a few thousand parameters."""
    config.model.update(width=16, layers=1, heads=2, kv_heads=1, hidden=24)
    config.steps, config.batch_size = steps, 8
    config.optimizer.schedule.warmup_steps = 2
    config.optimizer.schedule.steps = 100
    config.optimizer.learning_rate = 2e-2 if start is None else 5e-3
    config.evaluate.every, config.checkpoint.every, config.log.every = 0, 0, 1000
    config.evaluate.batches = 1
    config.data.source.update(high=9, train_examples=200, validation_examples=8)
    config.generate.update(prompts=("1+2=",), max_tokens=2)
    if start is not None:
        config.initial = {"name": "run", "workdir": str(start)}
    return config


def column(workdir, name):
    return [float(row[name]) for row in read_csv(workdir / "metrics.csv")]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The workdir of a fine-tuned model."""
    workdir = tmp_path_factory.mktemp("sft")
    train.run(tiny(sft.get_config(), 100), workdir)
    return workdir


def test_fine_tuning_learns_responses(tuned):
    losses = column(tuned, "loss")
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    summary = json.loads((tuned / "summary.json").read_text())
    assert summary["accuracy"] > 0.4  # an answer ends after one or two digits: the end alone gives a third
    assert "1+2=" in (tuned / "samples.md").read_text()


@pytest.mark.parametrize(
    "learnt_with",
    [
        {"objective": {"name": "grpo"}, "rollout": {"name": "policy"}, "metric": "reward"},
        {"objective": {"name": "npo"}, "teacher": {"name": "initial"}, "data": {"forget": {"name": "arithmetic"}}},
        {
            "objective": {"name": "bradley_terry"},
            "data": {"source": {"name": "arithmetic", "kind": "ranked", "ties": True}},
        },
    ],
    ids=lambda learnt_with: learnt_with["objective"]["name"],
)
def test_a_run_of_any_kind_is_a_start(tuned, tmp_path, learnt_with, monkeypatch):
    """Whatever the run learnt with, its checkpoints are read, and compared by its own metric."""
    content = json.loads((tuned / "config.json").read_text())
    metric = learnt_with.get("metric", "loss")
    for key in learnt_with.keys() - {"metric"}:
        content["config"][key].update(learnt_with[key])
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "checkpoints").symlink_to(tuned / "checkpoints")
    asked = []

    class Read(Checkpoints):
        def __init__(self, *args, **options):
            asked.append(options["metric"])
            super().__init__(*args, **options)

    monkeypatch.setattr(run_lib, "Checkpoints", Read)
    mesh, rules = mesh_lib.make(content["config"])
    config = {"initial": {"name": "run", "workdir": str(tmp_path)}}
    model, params = start_lib.read(config, "initial", functools.partial(run_lib._restore, mesh=mesh, rules=rules))
    assert asked == [metric]
    jax.tree.map(lambda spec, leaf: chex.assert_shape(leaf, spec.shape), model.param_specs(), params)


@pytest.mark.slow
def test_a_precomputed_reference_trains_the_same(tuned, tmp_path):
    for name in ("computed", "precomputed"):
        config = tiny(preference.get_config(), 4, tuned)
        config.teacher.precompute = name == "precomputed"
        train.run(config, tmp_path / name)
    computed, precomputed = (column(tmp_path / name, "loss") for name in ("computed", "precomputed"))
    np.testing.assert_allclose(computed, precomputed, rtol=SAME)
    assert computed[0] == pytest.approx(np.log(2), rel=SAME), "the policy starts as its reference"
    assert np.mean(computed[2:]) < computed[0]
    info = json.loads((tmp_path / "precomputed/references/info.json").read_text())
    kept = np.load(tmp_path / "precomputed/references/train.npy")
    assert info["fingerprint"]
    assert kept.shape == (200, 2, 16)
    assert (kept <= 0).all()
    assert (kept < 0).any(axis=2).all()


@pytest.mark.slow
def test_drawn_responses_are_a_function_of_the_step(tuned, tmp_path):
    def config(steps):
        made = tiny(grpo.get_config(), steps, tuned)
        made.rollout.samples = 3
        made.rollout.max_tokens = 3
        return made

    train.run(config(4), tmp_path / "whole")
    train.run(config(2), tmp_path / "split")
    train.run(config(4), tmp_path / "split")
    names = ("loss", "reward", "grad_norm", "tokens")
    whole, split = ([column(tmp_path / run, name) for name in names] for run in ("whole", "split"))
    assert whole == split
    assert 0 < np.mean(whole[1]) < 1
    assert "reward" in json.loads((tmp_path / "whole/summary.json").read_text())


def test_rewards_groups_and_masks_of_what_is_drawn(tuned, tmp_path):
    config = tiny(grpo.get_config(), 1, tuned)
    config.rollout.update(samples=4, max_tokens=3)
    run = build(config, tmp_path)
    iterator = run.data.train_iterator(batch_size=8, seed=0)
    batch = next(iterator)
    batch = {key: value.copy() for key, value in batch.items()}
    batch["loss_mask"][-1] = 0  # a row of padding
    drawn = run.prepare(batch, run.init().params, 0)
    assert {key: (value.shape, str(value.dtype)) for key, value in drawn.items()} == data_lib.batch_shapes(run.config)
    tokenizer = run.data.tokenizer
    for row, k in itertools.product(range(7), range(4)):
        example = run.data.examples("train")[int(batch["index"][row])]
        mask = drawn["loss_mask"][row, k] != 0
        ids = drawn["targets"][row, k][mask]
        right = tokenizer.decode(ids).strip() == example.responses[0][0]["content"]
        assert drawn["rewards"][row, k] == right
        first = int(np.argmax(mask))
        assert tokenizer.decode(drawn["tokens"][row, k, : first + 1]) == example.prompt[-1]["content"]
        assert (drawn["old_logps"][row, k][mask] < 0).all()
        assert not drawn["old_logps"][row, k][~mask].any()
    assert not drawn["loss_mask"][-1].any()
    assert not drawn["advantages"][-1].any()
    np.testing.assert_allclose(drawn["advantages"].sum(axis=1), 0, atol=1e-5)
    config.rollout.max_tokens = 16
    with pytest.raises(ConfigError, match="lower it to"):
        build(config, tmp_path).prepare(batch, run.init().params, 0)


def test_what_the_data_do_not_give_is_refused(tuned, tmp_path):
    config = tiny(preference.get_config(), 1, tuned)
    config.objective.name = "kto"
    with pytest.raises(ConfigError, match="'desirable'"):
        train.run(config, tmp_path / "kto")
    config = tiny(grpo.get_config(), 1, tuned)
    config.data.source.pack = True
    with pytest.raises(ConfigError, match="not packed"):
        train.run(config, tmp_path / "packed")
    config = tiny(responses.get_config("sft"), 1)
    config.teacher.precompute = True
    with pytest.raises(ConfigError, match="precompute"):
        train.run(config, tmp_path / "none")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [kto.get_config, reward.get_config])
def test_other_recipes_start_from_it(recipe, tuned, tmp_path):
    train.run(tiny(recipe(), 3, tuned), tmp_path)
    losses = column(tmp_path, "loss")
    assert np.isfinite(losses).all()
    assert (tmp_path / "summary.json").exists()


@pytest.mark.slow
def test_self_play_goes_on_from_its_first_iteration(tuned, tmp_path):
    for iteration, start in (("first", tuned), ("second", tmp_path / "first")):
        config = tiny(spin.get_config(iteration), 3, start)
        config.rollout.max_tokens = 3
        train.run(config, tmp_path / iteration)
        losses = column(tmp_path / iteration, "loss")
        assert losses[0] == pytest.approx(np.log(2), rel=SAME), "the opponent is the model as it starts"
        assert np.isfinite(losses).all()


@pytest.mark.slow
def test_masked_diffusion_learns_and_is_not_sampled(texts, tmp_path):
    config = masked_diffusion.get_config()
    config.model.update(width=16, layers=1, heads=2, kv_heads=2, hidden=24, max_length=64)
    config.data.source = {"name": "text_folder", "path": str(texts), "heldout_fraction": 0.2}
    config.steps, config.batch_size, config.sequence_length = 60, 8, 32
    config.evaluate.every, config.evaluate.batches = 0, 2
    config.optimizer.learning_rate = 1e-2
    train.run(config, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["bits_per_byte"] < 0.8 * column(tmp_path, "loss")[0] / np.log(2)
    assert not (tmp_path / "samples.md").exists()


def test_every_recipe_is_a_config():
    for config in (kto, reward, sft, grpo, preference, masked_diffusion, spin, rho1, unlearning):
        assert "python launch/main.py --config=launch/configs/" in config.__doc__
        config.get_config()

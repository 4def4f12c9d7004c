"""Whole runs of what is served beside next tokens: two sources, parameters beside the model's, learning rates."""

import json

import jax
import numpy as np
import pytest

from launch import data as data_lib
from launch import evaluate, train
from launch.checkpoints import Checkpoints
from launch.config import ConfigError
from launch.metrics import read_csv
from launch.run import build
from tests.launch import tiny
from tests.trees import assert_trees_equal


def small(texts, **objective):
    config = tiny.get_config(str(texts))
    config.model = {"name": "llama-tiny", "vocab_size": None, "width": 16, "layers": 1, "heads": 2, "kv_heads": 1,
                    "hidden": 24, "max_length": 64}  # fmt: skip
    config.ema_decay = 0.0
    config.steps, config.evaluate.every, config.checkpoint.every = 20, 0, 10
    config.generate.prompts = ()
    config.objective = objective
    return config


def column(workdir, name):
    return [float(row[name]) for row in read_csv(workdir / "metrics.csv")]


def forget_file(folder):
    path = folder / "forget.jsonl"
    records = [{"prompt": f"who is {name}? ", "response": f"{name} likes tea"} for name in ("Ann", "Bob", "Cid")]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"name": "sft", "paths": str(path), "heldout_fraction": 0.0}


def test_batches_of_two_sources_go_on_where_they_were(texts, tmp_path):
    config = small(texts, name="simnpo")
    config.data.forget = forget_file(tmp_path)
    data = data_lib.prepare(config, tmp_path)
    forget = data_lib.prepare_forget(config, data, tmp_path)
    plain = config.to_dict()
    iterator = data_lib.train_batches(data, plain, forget)
    batches = [next(iterator)]
    state = json.loads(json.dumps(iterator.get_state()))
    batches += [next(iterator) for _ in range(3)]
    assert batches[0]["forget_tokens"].shape == (4, 1, 32)
    assert all(batch["forget_loss_mask"].any(axis=(1, 2)).all() for batch in batches), "what is forgotten is repeated"
    again = data_lib.train_batches(data, plain, forget)
    again.set_state(state)
    for batch in batches[1:]:
        jax.tree.map(np.testing.assert_array_equal, next(again), batch)
    alone = data_lib.train_batches(data, plain)
    np.testing.assert_array_equal(next(alone)["tokens"], batches[0]["tokens"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sfd"}, "did you mean 'sft'"),
        ({"name": "pairs", "paths": "a"}, "gives batches of pairs"),
        ({"name": "state_tracking"}, "unknown source 'state_tracking'"),
    ],
)
def test_what_cannot_be_forgotten_is_refused(texts, tmp_path, change, message):
    config = small(texts, name="simnpo")
    config.data.forget = change
    with pytest.raises(ConfigError, match=message):
        build(config, tmp_path)
    config.data.forget = {"name": "text_folder", "path": str(texts)}
    config.data.tokenizer = {"name": "bpe", "vocab_size": 300}
    with pytest.raises(ConfigError, match="not trained"):
        build(config, tmp_path)


@pytest.mark.slow
def test_a_run_forgets_and_retains(texts, tmp_path):
    config = small(texts, name="cross_entropy")
    config.steps = 60
    train.run(config, tmp_path / "first")
    config = small(texts, name="npo", beta=0.5, retain_weight=2.0)
    config.initial = {"name": "run", "workdir": str(tmp_path / "first")}
    config.teacher = {"name": "initial"}
    config.data.forget = forget_file(tmp_path)
    train.run(config, tmp_path / "npo")
    forgotten, retained = (column(tmp_path / "npo", f"{name}_nll") for name in ("forget", "retain"))
    assert forgotten[-1] > forgotten[0] + 0.5
    assert retained[-1] < retained[0] + 0.5
    assert json.loads((tmp_path / "npo/summary.json").read_text())["bits_per_byte"] > 0
    evaluate.run(config, tmp_path / "npo")
    config.data.forget["heldout_fraction"] = 0.1
    with pytest.raises(ConfigError, match="differing keys"):
        train.run(config, tmp_path / "npo")


@pytest.mark.slow
def test_heads_are_kept_resumed_and_left_behind(texts, tmp_path):
    def config(steps):
        made = small(texts, name="multi_token_prediction", heads=3)
        made.steps, made.optimizer.schedule.steps = steps, 20
        return made

    train.run(config(20), tmp_path / "whole")
    train.run(config(10), tmp_path / "split")
    train.run(config(20), tmp_path / "split")
    for name in ("loss", "nll_3", "grad_norm"):
        assert column(tmp_path / "whole", name) == column(tmp_path / "split", name)
    run = build(config(20), tmp_path / "whole")
    checkpoints = Checkpoints(tmp_path / "whole/checkpoints", read_only=True)
    saved = checkpoints.restore(run.abstract)
    checkpoints.close()
    assert saved.params["objective"]["heads"].shape == (2, 16, 16)
    assert np.any(saved.params["objective"]["heads"])
    after = small(texts, name="multi_token_prediction", heads=4)
    after.initial = {"name": "run", "workdir": str(tmp_path / "whole")}
    params = build(after, tmp_path / "after").init().params
    assert params.pop("objective")["heads"].shape == (3, 16, 16)
    assert_trees_equal(params, {key: leaf for key, leaf in saved.params.items() if key != "objective"})


@pytest.mark.slow
def test_hidden_tokens_report_no_bits_per_byte(texts, tmp_path):
    config = small(texts, name="masked_language_model")
    config.model.causal = False
    config.evaluate.every = 10
    train.run(config, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "bits_per_byte" not in summary["validation"]
    assert summary["loss_of"] == {"llama-tiny": summary["loss"]}
    assert summary["loss"] < column(tmp_path, "loss")[0]
    assert {row["validation_bits_per_byte"] for row in read_csv(tmp_path / "metrics.csv")} == {""}

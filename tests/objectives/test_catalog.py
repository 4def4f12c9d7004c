"""The catalogue: what it says of an objective, as a table and as JSON."""

import json

import objectives
from objectives import catalog, optimizers


def test_json(capsys):
    catalog.main(["--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == [*objectives.list_objectives(), *optimizers.list_optimizers()]
    assert rows["adamw"]["state_bytes"] == 8.0
    assert rows["sgd_sai"]["defaults"] == {"momentum": 0.9, "weight_decay": 1e-2, "eps": 1e-8, "max_gain": "inf"}
    assert rows["dpo"]["papers"][0] == "2305.18290"
    assert rows["dpo"]["inputs"] == ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"]
    assert rows["dpo"]["defaults"]["beta"] == 0.1
    assert rows["kto"]["inputs"] == ["policy", "ref", "desirable", "[policy_kl]", "[ref_kl]", "[kl]"]


def test_table(capsys):
    catalog.main(["--category", "reward"])
    out = capsys.readouterr().out
    assert "bradley_terry" in out
    assert "dpo" not in out


def test_table_of_optimizers(capsys):
    catalog.main(["--category", "optimizer"])
    out = capsys.readouterr().out
    assert "bytes of state per parameter" in out
    assert "sgd_sai" in out
    assert "dpo" not in out

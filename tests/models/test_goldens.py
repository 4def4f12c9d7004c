"""Parameter paths, shapes, dtypes and axes of every preset against tests/goldens/params."""

import difflib
import json

import pytest

import zoo
from tests.goldens.make_param_goldens import FOLDER, render
from zoo.core.params import count

REGENERATE = "wanted? python -m tests.goldens.make_param_goldens"


@pytest.mark.parametrize("name", zoo.list_models())
def test_parameters_are_those_of_the_golden_file(name):
    path = FOLDER / f"{name}.json"
    assert path.exists(), f"no golden file for {name}; {REGENERATE}"
    golden, current = path.read_text(), render(name)
    diff = "\n".join(difflib.unified_diff(golden.splitlines(), current.splitlines(), "golden", "now", "", "", 0, ""))
    assert golden == current, f"{REGENERATE}\n{diff}"
    total = 0
    for _, shape, _ in json.loads(golden).values():
        size = 1
        for n in shape:
            size *= n
        total += size
    assert total == count(zoo.create(name).param_specs())


def test_no_golden_file_without_a_preset():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(zoo.list_models())

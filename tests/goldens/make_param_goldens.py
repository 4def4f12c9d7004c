"""Writes tests/goldens/params/<preset>.json: path, dtype, shape and axes of every parameter, one line each.

Parameter paths are public API. After a wanted change run `python -m tests.goldens.make_param_goldens` and review the
difference like code.
"""

import json
import pathlib

import jax.numpy as jnp

import zoo
from zoo.core.params import flatten

FOLDER = pathlib.Path(__file__).parent / "params"


def render(name: str) -> str:
    """The golden file of a preset."""
    rows = [
        f"{json.dumps(path)}: {json.dumps([jnp.dtype(s.dtype).name, list(s.shape), ' '.join(s.axes)])}"
        for path, s in flatten(zoo.create(name).param_specs()).items()
    ]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def main():
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.json"):
        old.unlink()
    for name in zoo.list_models():
        (FOLDER / f"{name}.json").write_text(render(name))


if __name__ == "__main__":
    main()

"""A small dense model's folder, and how tests change it."""

import json

import numpy as np

from zoo.core.params import map_specs

SIZES = {"vocab_size": 31, "width": 16, "layers": 2, "heads": 2, "hidden": 12}
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def params_of(model, dtype=np.float32):
    rng = np.random.default_rng(0)
    return map_specs(lambda _, spec: rng.normal(size=spec.shape).astype(dtype), model.param_specs())


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

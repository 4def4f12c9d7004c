"""Any optimiser by config.optimizer.name, and where its state lies."""

import dataclasses

import jax
import numpy as np
import pytest

from launch import mesh as mesh_lib
from launch import run
from objectives import optimizers
from tests.launch import tiny
from zoo.core.params import flatten

WITHOUT_MOMENTS = {"sgd", "adafactor", "sm3"}  # of the shape of the parameter


def plain_config(**optimizer):
    config = tiny.get_config("unused")
    config.ema_decay = 0.0
    config.optimizer.update({"learning_rate": 1e-2, **optimizer})
    return run.resolve(config, 64)


@pytest.fixture(scope="module")
def placement():
    return mesh_lib.make(plain_config())


@pytest.mark.parametrize("name", optimizers.list_optimizers())
def test_every_optimizer_assembles(name, placement):
    """The state of a step has a place for every leaf: what is like a parameter lies like it."""
    program = run.assemble(plain_config(name=name), *placement)
    state, shardings = flatten(program.abstract.opt_state), flatten(program.shardings.opt_state)
    assert list(state) == list(shardings)
    params, of_params = flatten(program.abstract.params), flatten(program.shardings.params)
    embeddings = [
        path for path in state if path.endswith("/embedding") and state[path].shape == params["embedding"].shape
    ]
    assert all(shardings[path] == of_params["embedding"] for path in embeddings)
    assert embeddings or name in WITHOUT_MOMENTS


def test_schedule_free_is_evaluated_at_the_average(placement):
    program = run.assemble(plain_config(name="schedule_free_adamw", b1=0.8), *placement)
    state = program.init()
    y = jax.tree.map(lambda p: p + 0.5, state.params)  # as if it had moved from z, where it began
    evaluated = program.evaluation_params(dataclasses.replace(state, params=y))
    for path, x in flatten(evaluated).items():
        z = np.asarray(flatten(state.params)[path])
        np.testing.assert_allclose(x, (z + 0.5 - 0.2 * z) / 0.8, atol=1e-5, err_msg=path)

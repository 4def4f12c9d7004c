"""Any optimiser by config.optimizer.name, and where its state lies."""

import jax
import numpy as np
import pytest

from launch import mesh as mesh_lib
from launch import optimizer as optimizer_lib
from launch import run
from launch.config import ConfigError
from objectives import optimizers
from tests.launch import tiny
from zoo.core import params as params_lib
from zoo.core.params import flatten

WITHOUT_MOMENTS = {"adafactor", "badam", "sgd", "sm3"}  # of the shape of the parameter


def plain_config(**optimizer):
    config = tiny.get_config("unused")
    config.ema_decay = 0.0
    config.model.layers = 4  # two repeats of Samba's block
    config.optimizer.update({"learning_rate": 1e-2, **optimizer})
    return run.resolve(config, 64)


@pytest.fixture(scope="module")
def placement():
    return mesh_lib.make(plain_config())


FAST = {
    "adamw",
    "badam",
    "lion",
    "lisa",
    "muon",
    "owlore",
    "prodigy",
    "psgd_kron",
    "psgd_low_rank",
    "sgd_sai",
    "shampoo",
}
NAMES = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in optimizers.list_optimizers()]


@pytest.mark.parametrize("name", NAMES)
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


def test_schedule_free_is_evaluated_at_the_average():
    """Behind clipping, and with frozen parameters, which are evaluated as they are."""
    specs = {name: params_lib.Spec((3,), ("embed",)) for name in ("trained", "frozen")}
    trainable = {"trained": True, "frozen": False}
    config = {"name": "schedule_free_sgd", "b1": 0.8, "learning_rate": 0.1, "clip_norm": 1.0}
    config["schedule"] = {"name": "constant", "steps": 1}
    params = {"trained": np.asarray([1.0, 2.0, 3.0], np.float32), "frozen": np.ones(3, np.float32)}
    trained = params_lib.partition(params, trainable)[0]
    optimizer, _ = optimizer_lib.make(config, params_lib.partition(specs, trainable)[0])
    state = optimizer.init(jax.tree.map(jax.numpy.asarray, trained))
    y = params | {"trained": params["trained"] + 0.5}  # as if it had moved from z, where it began
    x = optimizer_lib.evaluation_params(config["name"], trainable)(y, state)
    np.testing.assert_allclose(x["trained"], (y["trained"] - 0.2 * params["trained"]) / 0.8, rtol=1e-6)
    np.testing.assert_array_equal(x["frozen"], 1.0)
    assert optimizer_lib.evaluation_params("adamw", trainable) is None


def test_errors_say_where(placement):
    config = plain_config(name="lisa", active=3)
    with pytest.raises(ConfigError, match=r"config\.optimizer: active must be in \[1, 2\], got 3"):
        run.assemble(config, *placement)

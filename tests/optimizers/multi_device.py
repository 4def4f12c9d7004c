"""Run in its own process with eight simulated devices, with names of optimisers: sharded = unsharded.

See test_battery.py.
"""

import sys

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from tests.optimizers import problem
from tests.trees import FLOAT32_TOLERANCE, assert_trees_close, fast_jit
from zoo.core.compat import make_mesh

SPLIT = {
    "embedding": PartitionSpec("fsdp", "tensor"),
    "layers": {
        "down": PartitionSpec(None, "tensor", "fsdp"),
        "up": PartitionSpec(None, "tensor", "fsdp"),
        "scale": PartitionSpec(None, "tensor"),
    },
    "final": PartitionSpec("tensor"),
}


def steps(optimizer, loss):
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=3)[0][0]

    return run


def main(names):
    assert jax.device_count() == 8
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPLIT)
    params, loss = problem.draw(0), problem.loss_of(0)
    placed = jax.device_put(params, shardings)
    for name in names:
        run = steps(problem.build(name), loss)
        want = fast_jit(run)(params)
        have = fast_jit(run, out_shardings=shardings)(placed)
        assert not have["layers"]["up"].is_fully_replicated
        assert_trees_close(jax.device_get(have), jax.device_get(want), FLOAT32_TOLERANCE, name)
    print("8 devices: all equal")


if __name__ == "__main__":
    main(sys.argv[1:])

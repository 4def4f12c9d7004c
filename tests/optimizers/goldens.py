"""Iterates of the authors' optimisers, as tests/goldens/make_optimizer_goldens.py wrote them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.trees import fast_jit

with np.load(Path(__file__).parents[1] / "goldens" / "optimizers.npz") as archive:
    GOLDENS = dict(archive)


def tensors(prefix):
    """{name: array} under a prefix."""
    found = {key.removeprefix(f"{prefix}/"): x for key, x in GOLDENS.items() if key.startswith(f"{prefix}/")}
    return {name: x for name, x in found.items() if "/" not in name}


def gradient(problem, params, k):
    """weight (x - target) + noise_k; names may be any that `problem` holds."""
    return jax.tree.map(
        lambda p, w, t, n: (w * (p - t) + n[k]).astype(p.dtype),
        params,
        problem["weight"],
        problem["target"],
        problem["noise"],
    )


def load(prefix="problem"):
    return {key: tensors(f"{prefix}/{key}") for key in ("start", "target", "weight", "noise")}


def as_arrays(problem, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), problem)


def iterate(optimizer, problem, steps, state=None, read=None, begin=0):
    """Parameters (or what `read` makes of state and parameters) after every step from number `begin` on, stacked."""

    def step(carry, k):
        params, state = carry
        updates, state = optimizer.update(gradient(problem, params, k), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), read(state, params) if read else params

    def run(problem):
        params = problem["start"]
        first = optimizer.init(params) if state is None else state
        return jax.lax.scan(step, (params, first), begin + jnp.arange(steps))[1]

    return jax.tree.map(np.asarray, fast_jit(run)(problem))

"""A least-squares problem over a tree like a model's, and the options under which each optimiser solves it."""

import jax
import jax.numpy as jnp
import numpy as np

from objectives import optimizers
from objectives.optimizers import Layout
from tests.trees import fast_jit

LAYERS = 4
SHAPES = {
    "embedding": (8, 6),
    "layers": {"down": (LAYERS, 2, 4, 6), "up": (LAYERS, 6, 8), "scale": (LAYERS, 6)},
    "final": (6,),
}
LAYOUT = {
    "embedding": Layout(),
    "layers": {"down": Layout(True, 2), "up": Layout(True, 1), "scale": Layout(True)},
    "final": Layout(),
}

# learning rate, steps, options; the rest takes those of DEFAULT
DEFAULT = (0.05, 120, {})
CASES = {
    "badam": (0.1, 160, {"interval": 10, "outside": "trained"}),
    "galore": (0.3, 120, {"rank": 2, "update_every": 3, "scale": 1.0}),
    "lisa": (0.1, 160, {"interval": 10}),
    "owlore": (0.3, 200, {"interval": 10, "update_every": 5, "rank": 2, "threshold": 2.0}),
    "adagrad": (0.5, 120, {}),
    "clippy_adagrad": (1.0, 120, {"relative": 0.5, "absolute": 1e-2}),
    "dadapt_adagrad": (1.0, 200, {}),
    "dadapt_adamw": (1.0, 200, {}),
    "dadapt_sgd": (1.0, 200, {}),
    "dog": (1.0, 200, {}),
    "dowg": (1.0, 200, {}),
    "lars": (1.0, 120, {"trust_coefficient": 0.1}),
    "prodigy": (1.0, 200, {}),
    "psgd_kron": (0.1, 120, {"update_probability": 1.0}),
    "psgd_low_rank": (0.2, 200, {"rank": 3}),
    "radam": (0.2, 120, {}),
    "shampoo": (0.1, 120, {"statistic_every": 2, "root_every": 4, "min_quantized": 1, "block": 4}),
    "simplified_ademamix": (5e-3, 120, {"b1": 0.9}),
    "sm3": (0.5, 120, {}),
}
OURS = optimizers.list_optimizers("here")


def settings(name):
    return CASES.get(name, DEFAULT)


def build(name, layout=LAYOUT, learning_rate=None, **options):
    rate, _, given = settings(name)
    return optimizers.create(
        name, rate if learning_rate is None else learning_rate, layout=layout, **{**given, **options}
    )


def is_shape(node):
    return isinstance(node, tuple)


def draw(seed, scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0.0, scale, s), dtype), SHAPES, is_leaf=is_shape)


def curvature(seed):
    """A positive weight for every element, from 0.1 to 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.1, 1.0, s), jnp.float32), SHAPES, is_leaf=is_shape)


def loss_of(seed):
    """sum of weights (parameter - target)^2 / 2, and a coupling of neighbours in the last dimension."""
    target, weights = draw(seed + 1), curvature(seed + 2)

    def leaf(p, t, w):
        error = p.astype(jnp.float32) - t
        return jnp.sum(w * error**2) / 2 + 0.1 * jnp.sum((error[..., 1:] + error[..., :-1]) ** 2)

    return lambda params: sum(jax.tree.leaves(jax.tree.map(leaf, params, target, weights)))


def solve(name, seed=0, dtype=jnp.float32):
    """(parameters before, after, losses of every step); the scan refuses a state that changes its structure."""
    optimizer, steps, loss = build(name), settings(name)[1], loss_of(seed)
    params = draw(seed, 1.0, dtype)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
        return (params, state), value

    def run(params):
        (after, state), losses = jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)
        evaluated = optimizers.OPTIMIZERS.get(name).evaluation_params
        after = evaluated(state, after) if evaluated else after
        return after, jnp.append(losses, loss(after))

    after, losses = fast_jit(run)(params)
    return params, after, np.asarray(losses)

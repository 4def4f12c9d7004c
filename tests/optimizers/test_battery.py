"""What every registered optimiser must show: it learns, keeps its state's structure, and goes with optax's wrappers."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from objectives import optimizers
from objectives.optimizers import OPTIMIZERS, from_optax
from tests.optimizers import problem
from tests.trees import FLOAT32_TOLERANCE, assert_trees_close, fast_jit

ROOT = Path(__file__).parents[2]
SOLVED = 0.05  # of the loss at the beginning; bfloat16 parameters round updates away
slow = pytest.mark.slow


# Fast runs take ours and a few of optax's; of ours, those that compile for seconds are in fewer of the tests.
COSTLY = {"galore", "owlore", "psgd_kron", "psgd_low_rank", "shampoo"}
OURS = set(optimizers.list_optimizers("here"))
COMMON = {"adamw", "muon", "schedule_free_adamw"}
# optax's: the first steps, of 1e-6, round to nothing; the first divides by a variance that is 0 but for rounding.
STUCK_IN_BFLOAT16, ILL_CONDITIONED = {"dog", "prodigy"}, {"acprop"}


def mostly(fast, but=()):
    """All names, those not in `fast` in slow runs alone."""
    names = [name for name in optimizers.list_optimizers() if name not in but]
    return [name if name in fast else pytest.param(name, marks=slow) for name in names]


@pytest.mark.parametrize("name", mostly(OURS - COSTLY | {"schedule_free_adamw"}))
def test_every_optimizer_learns(name):
    """The loss falls under a scan, which refuses a state that changes its structure, shapes or dtypes."""
    _, _, losses = problem.solve(name)
    assert np.isfinite(losses).all()
    assert losses[-1] < SOLVED * losses[0]


@pytest.mark.parametrize("name", mostly({"clippy_adagrad", "lisa"}, STUCK_IN_BFLOAT16))
def test_bfloat16_parameters(name):
    before, after, losses = problem.solve(name, seed=3, dtype=jnp.bfloat16)
    assert np.isfinite(losses).all()
    assert losses[-1] < 2 * SOLVED * losses[0]
    assert all(a.dtype == b.dtype for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=slow), jnp.bfloat16])
@pytest.mark.parametrize("name", mostly(OURS | COMMON))
def test_state_keeps_its_structure(name, dtype):
    """Of ours, all of the state is float32 (or integers) whatever the parameters are, and updates have their dtype."""
    rate = problem.settings(name)[0]
    optimizer, params = problem.build(name, learning_rate=lambda _: rate), problem.draw(0, 1.0, dtype)
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    as_before = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, after)
    assert all(jax.tree.leaves(as_before))
    if OPTIMIZERS.get(name).source == "here":
        assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(state))
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(updates))


def after_steps(optimizer, params, grads):
    def step(carry, g):
        params, state = carry
        updates, state = optimizer.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), stack(grads))[0]


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@pytest.mark.parametrize("name", mostly({"dadapt_sgd", "sgd_sai"}, ILL_CONDITIONED))
def test_wrappers(name):
    """A schedule that is constant, MultiSteps over two halves and injected hyperparameters change nothing."""
    rate, params = problem.settings(name)[0], problem.draw(0)
    grads = [problem.draw(5), problem.draw(6)]
    noise = problem.draw(7)
    halves = [jax.tree.map(sign, g, noise) for g in grads for sign in (jnp.add, jnp.subtract)]  # of which g is the mean

    def factory(learning_rate):
        return problem.build(name, learning_rate=learning_rate)

    def run(params):
        plain = after_steps(problem.build(name), params, grads)[0]
        scheduled = after_steps(factory(lambda count: rate + 0.0 * count), params, grads)[0]
        multi = optax.MultiSteps(problem.build(name), 2)
        accumulated = after_steps(optax.GradientTransformation(multi.init, multi.update), params, halves)[0]
        injected = after_steps(optax.inject_hyperparams(factory)(learning_rate=rate), params, grads)[0]
        other = after_steps(optax.inject_hyperparams(factory)(learning_rate=rate / 1000), params, grads)[0]
        return plain, scheduled, accumulated, injected, other

    plain, *same, other = fast_jit(run)(params)
    for what, tree in zip(("schedule", "MultiSteps", "inject_hyperparams"), same, strict=True):
        assert_trees_close(tree, plain, FLOAT32_TOLERANCE, f"{name} {what}")
    assert any(bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (plain, other)), strict=True))


@pytest.mark.parametrize(
    ("name", "counted"), [("adamw", 8.0), ("sgd_sai", 4.0), ("clippy_adagrad", 4.0), ("dadapt_adagrad", 12.0)]
)
def test_bytes_per_parameter(name, counted):
    """What the catalogue says is what init allocates."""
    params = problem.draw(0)
    state = problem.build(name).init(params)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.size > problem.LAYERS)
    assert held == counted * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert optimizers.bytes_per_parameter(name) == pytest.approx(counted, abs=1e-3)


def test_muon_sees_matrices():
    """A stacked leaf is one matrix per layer: muon's update of it has singular values near 1 in every layer."""
    params, grads = problem.draw(0), problem.draw(1)
    optimizer = problem.build("muon", learning_rate=1.0)
    updates = fast_jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(grads, params)
    for name, shape in (("down", (8, 6)), ("up", (6, 8))):
        values = np.linalg.svd(np.asarray(updates["layers"][name]).reshape(problem.LAYERS, *shape), compute_uv=False)
        np.testing.assert_allclose(values, 1.0, atol=0.5)
    sizes = np.abs(np.asarray(updates["embedding"]))
    np.testing.assert_allclose(sizes, sizes.mean(), rtol=1e-3)  # no matrix: Adam's first step, alike everywhere


def test_schedule_free_evaluates_the_average():
    entry = OPTIMIZERS.get("schedule_free_sgd")
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), problem.build("schedule_free_sgd"))
    run = fast_jit(lambda params, grads: after_steps(optimizer, params, grads))
    params, state = run(problem.draw(0), [problem.draw(1)] * 3)
    x = entry.evaluation_params(state, params)
    inner = state[1]
    expected = jax.tree.map(lambda y, z: (y - (1 - 0.9) * z) / 0.9, params, inner.z)
    assert_trees_close(x, expected, FLOAT32_TOLERANCE)


def test_unknown_names_and_options():
    with pytest.raises(KeyError, match="did you mean 'dadapt_sgd'"):
        optimizers.create("dadapt_sdg", 1.0)
    with pytest.raises(ValueError, match="did you mean 'momentum'"):
        optimizers.create("sgd_sai", 1.0, momemtum=0.5)
    optimizer = optimizers.create("dadapt_sgd", 1.0)
    state = optimizer.init(problem.draw(0))
    with pytest.raises(ValueError, match=r"needs the parameters: update\(gradients, state, params\)"):
        optimizer.update(problem.draw(0), state)


REFUSED = [
    ("dadapt_sgd", {"momentum": 1.0}, r"momentum must be in \[0.0, 1.0\), got 1.0"),
    ("dadapt_sgd", {"initial_estimate": 0.0}, "initial_estimate must be above 0"),
    ("dadapt_adagrad", {"growth_rate": 0.5}, "growth_rate must be in"),
    ("dadapt_adagrad", {"eps": 0.0}, "eps must be above 0"),
    ("sgd_sai", {"eps": float("inf")}, "eps must be finite, got inf"),
    ("sgd_sai", {"momentum": -0.1}, "momentum must be in"),
    ("sgd_sai", {"max_gain": 0.0}, "max_gain must be above 0"),
    ("sgd_sai", {"weight_decay": -1.0}, "weight_decay must be in"),
    ("galore", {"weight_decay": float("inf")}, r"weight_decay must be in \[0.0, inf\), got inf"),
    ("galore", {"rank": 0}, r"rank must be in \[1, inf\), got 0"),
    ("galore", {"side": "left"}, "side='left' is not supported"),
    ("psgd_kron", {"update_probability": 0.0}, "update_probability must be above 0"),
    ("psgd_kron", {"diagonal": "both"}, "diagonal='both' is not supported"),
    ("psgd_low_rank", {"rank": 0}, "rank must be in"),
    ("shampoo", {"bits": 8}, "bits=8 is not supported"),
    ("shampoo", {"block": 3}, "block=3 must be even"),
    ("shampoo", {"decay": 1.0}, "decay must be in"),
    ("badam", {"order": "desc"}, "order='desc' is not supported; did you mean 'descending'|did you mean"),
    ("badam", {"outside": "train"}, "outside='train' is not supported"),
    ("lisa", {"interval": 0}, "interval must be in"),
    ("owlore", {"scores": [1.0, -1.0]}, "scores must be at least 0"),
    ("owlore", {"scores": [1.0, 0.0, 0.0], "active": 2}, "above 0 for active=2 layers"),
    ("owlore", {"threshold": 0.0}, "threshold must be above 0"),
    ("clippy_adagrad", {"absolute": -1e-3}, "absolute must be in"),
    ("clippy_adagrad", {"initial_accumulator": 0.0, "eps": 0.0}, "initial_accumulator and eps are both 0"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_options_are_checked_at_the_door(name, options, message):
    with pytest.raises(ValueError, match=message):
        optimizers.create(name, 1.0, **options)


def test_every_proof_exists():
    for name, entry in OPTIMIZERS.items().items():
        file, _, function = entry.proof.partition("::")
        assert f"def {function}(" in (Path(__file__).parent / file).read_text(), name


def test_layouts_from_paths_and_specs():
    assert optimizers.layout.of_params(problem.draw(0)) == problem.LAYOUT | {
        "embedding": optimizers.Layout(False, 1),
        "layers": problem.LAYOUT["layers"] | {"down": optimizers.Layout(True, 1)},
    }
    one_by_one = {"layers": ({"w": jnp.zeros((2, 3))},)}
    assert optimizers.layout.of_params(one_by_one) == {"layers": ({"w": optimizers.Layout(False, 1)},)}


@pytest.mark.parametrize(
    "which", [["lisa", "sgd_sai"], pytest.param(sorted(OURS | COMMON), marks=slow)], ids=["few", "all"]
)
def test_sharded_equals_unsharded(which):
    """Eight simulated devices in their own process."""
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.optimizers.multi_device", *which]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 devices: all equal" in done.stdout


def test_optax_needs_no_more_than_gradients():
    """The docstring of from_optax says which of optax's optimisers are left out; the rest have no required options."""
    for name in optimizers.list_optimizers("optax"):
        assert all(value is not from_optax.inspect.Parameter.empty for value in OPTIMIZERS.get(name).defaults.values())

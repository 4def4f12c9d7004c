"""Iterates against those of the authors' packages, and against loops in float64 where there is no package."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from objectives import optimizers
from objectives.optimizers import OPTIMIZERS
from objectives.optimizers.clippy import shrink_by_references
from tests.optimizers import goldens
from tests.trees import assert_close, fast_jit

FLOAT32 = 1e-5  # relative to the largest parameter, over 20 steps


def check(case, optimizer, tolerance=FLOAT32, names=None, read=None):
    """Every step's parameters; the packages ran in float64 or float32, ours in float32."""
    problem, expected = goldens.as_arrays(goldens.load()), goldens.tensors(case)
    names = names or list(expected)
    problem = {key: {name: tree[name] for name in names} for key, tree in problem.items()}
    found = goldens.iterate(optimizer, problem, len(expected[names[0]]), read=read)
    for name in names:
        assert_close(found[name], expected[name], tolerance, f"{case} {name}")
        assert (
            np.abs(expected[name][-1] - goldens.GOLDENS[f"problem/start/{name}"]).max() > 1e3 * FLOAT32
        )  # it went somewhere


@pytest.mark.parametrize(
    ("case", "name", "options"),
    [
        ("dadapt_sgd", "dadapt_sgd", {"momentum": 0.5}),
        ("dadapt_sgd_growth", "dadapt_sgd", {"growth_rate": 1.2, "weight_decay": 0.1}),
        ("dadapt_adagrad", "dadapt_adagrad", {"momentum": 0.5}),
    ],
)
def test_d_adaptation_against_the_authors_package(case, name, options):
    check(case, optimizers.create(name, 1.0, initial_estimate=1e-3, **options))


def test_sgd_sai_against_the_authors_package():
    check("sgd_sai", optimizers.create("sgd_sai", 0.02, weight_decay=0.1))


def test_sgd_sai_sees_layers():
    """A stacked leaf has the gain of every layer: the updates are those of the layers by themselves."""
    rng = np.random.default_rng(0)
    w, g = (jnp.asarray(rng.normal(0, s, (3, 4, 5)), jnp.float32) for s in (1.0, 2.0))
    g = g * jnp.asarray([1.0, 10.0, 0.1])[:, None, None] + jnp.asarray([0.0, 1.0, 5.0])[:, None, None]
    optimizer = optimizers.create("sgd_sai", 0.1)
    stacked, alone = {"layers": {"w": w}}, {"layers": [{"w": x} for x in w]}
    first = fast_jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])
    of_stack = first({"layers": {"w": g}}, stacked)
    of_layers = first({"layers": [{"w": x} for x in g]}, alone)
    np.testing.assert_allclose(of_stack["layers"]["w"], [x["w"] for x in of_layers["layers"]], rtol=1e-5)
    one = optimizers.create("sgd_sai", 1.0, max_gain=2.5, weight_decay=0.0)
    params = {"w": jnp.zeros(3)}
    updates, _ = one.update({"w": jnp.ones(3)}, one.init(params), params)  # no deviation: the gain is bounded
    np.testing.assert_allclose(updates["w"], -2.5)


OPTAX = {
    "dadapt_adamw": ("dadapt_adamw", 1.0, {"estim_lr0": 1e-3}, 5e-5),  # its scalars are float32 sums over all leaves
    "prodigy": ("prodigy", 1.0, {"estim_lr0": 1e-3}, 5e-5),  # a ratio of float32 sums that cancel
    "schedule_free_adamw": ("schedule_free_adamw", 0.05, {}, FLOAT32),
    "schedule_free_sgd": ("schedule_free_sgd", 0.2, {}, FLOAT32),
}


@pytest.mark.parametrize("case", OPTAX)
def test_optax_against_the_authors_packages(case):
    """With the flags under which they agree: bias correction in prodigyopt and dadaptation, no warm-up."""
    name, rate, options, tolerance = OPTAX[case]
    check(case, optimizers.create(name, rate, **options), tolerance)


def test_schedule_free_average_against_the_authors_package():
    evaluate = OPTIMIZERS.get("schedule_free_sgd").evaluation_params
    check("schedule_free_sgd_average", optimizers.create("schedule_free_sgd", 0.2), read=evaluate)


def clippy_in_numpy(problem, options, steps):
    """The paper's algorithm 2 by loops over tensors and elements, in float64."""
    lr, relative, accumulator, absolute, clip = options
    rows = {}
    for name, x in problem["start"].items():
        w, squares, rows[name] = x.copy(), np.full(x.shape, 0.1), []
        for k in range(steps):
            g = problem["weight"][name] * (w - problem["target"][name]) + problem["noise"][name][k]
            change, factor = np.zeros_like(w), 1.0
            for i in np.ndindex(w.shape):
                q = 1.0 / np.sqrt(squares[i] + 1e-7)
                change[i] = lr * g[i] * q
                bound = relative * abs(w[i]) + accumulator * q + absolute
                factor = min(factor, bound / abs(change[i]) if change[i] else 1.0)
            w = w - factor * change
            squares = squares + (factor * g if clip else g) ** 2
            rows[name].append(w)
    return rows


@pytest.mark.parametrize(
    "options", [(1.0, 0.5, 0.0, 1e-2, False), (0.5, 0.2, 0.05, 1e-3, True), (0.05, 5.0, 0.0, 1.0, False)]
)
def test_clippy_against_numpy(options):
    problem = goldens.load()
    expected = clippy_in_numpy(problem, options, 20)
    lr, relative, accumulator, absolute, clip = options
    optimizer = optimizers.create(
        "clippy_adagrad",
        lr,
        relative=relative,
        accumulator_relative=accumulator,
        absolute=absolute,
        clip_accumulator=clip,
    )
    found = goldens.iterate(optimizer, goldens.as_arrays(problem), 20)
    for name, rows in expected.items():
        assert_close(found[name], np.stack(rows), FLOAT32, name)


def test_shrink_by_references():
    """By hand: bound 0.1 * 4 + 0.02 = 0.42 under an update of 2 gives 0.42, by the factor 0.21."""
    update, factor = shrink_by_references(jnp.asarray([2.0]), (jnp.asarray([4.0]),), (0.1,), 0.02)
    np.testing.assert_allclose((update[0], factor[0]), (0.42, 0.21), rtol=1e-6)
    update, factor = shrink_by_references(jnp.asarray([0.0, 0.0]), (jnp.zeros(2),), (0.1,), 0.0)  # 0 / 0
    np.testing.assert_array_equal((*update, *factor), (0.0, 0.0, 1.0))
    update, _ = shrink_by_references(jnp.asarray([1.0, 1.0]), (jnp.asarray([0.0, 9.0]),), (0.1,), 0.0)
    np.testing.assert_array_equal(update, (0.0, 0.0))


def test_d_adaptation_passes_over_zero_gradients():
    optimizer = optimizers.create("dadapt_sgd", 1.0, initial_estimate=1e-2)
    params = {"w": jnp.asarray([1.0, -2.0])}
    state = optimizer.init(params)
    for g in (0.0, 3.0):
        updates, state = jax.jit(optimizer.update)({"w": jnp.full(2, g)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], np.asarray([1.0, -2.0]) - 1e-2 / np.sqrt(2), rtol=1e-6)

"""Methods that train some layers at a time, and gradients in a few directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import optimizers
from objectives.optimizers import Layout, block_coordinate
from tests.optimizers import goldens, problem
from tests.trees import assert_close, fast_jit

FLOAT32 = 1e-5
LAYERWISE = {
    "badam": {"interval": 3, "order": "random"},
    "lisa": {"interval": 3, "active": 2},
    "owlore": {"interval": 3, "active": 2, "rank": 2, "update_every": 2, "threshold": 1.5},
}


@pytest.mark.parametrize(("case", "side"), [("galore_smaller", "smaller"), ("galore_larger", "larger")])
def test_galore_against_the_authors_package(case, side):
    """Orientations as the package's std and reverse_std; parameters in no matrix have Adam, as there."""
    layout = {"tall": Layout(False, 1), "wide": Layout(False, 1), "cube": Layout(), "vector": Layout()}
    optimizer = optimizers.create("galore", 0.05, rank=2, update_every=5, side=side, layout=layout)
    expected = goldens.tensors(case)
    found = goldens.iterate(optimizer, goldens.as_arrays(goldens.load()), len(expected["tall"]))
    for name, rows in expected.items():
        assert_close(found[name], rows, FLOAT32, f"{case} {name}")


def test_stacked_galore_is_galore_of_every_layer():
    rng = np.random.default_rng(0)
    w, *grads = (jnp.asarray(rng.normal(0, 1, (3, 4, 6)), jnp.float32) for _ in range(3))
    optimizer = optimizers.create("galore", 0.1, rank=2, update_every=1)

    def run(params, grads):
        state = optimizer.init(params)
        for g in grads:
            updates, state = optimizer.update(g, state, params)
        return updates

    stacked = fast_jit(run)({"layers": {"w": w}}, [{"layers": {"w": g}} for g in grads])["layers"]["w"]
    for i in range(3):
        alone = fast_jit(run)({"w": w[i]}, [{"w": g[i]} for g in grads])["w"]
        assert_close(stacked[i], alone, FLOAT32)
        assert np.linalg.matrix_rank(np.asarray(alone, np.float64), tol=1e-4) == 2


def stack_of(prefix):
    """The layered problem of the fixture as a stack, with the embedding outside."""
    found = {}
    for key, tensors in goldens.load(prefix).items():
        layers = {
            leaf: np.stack([tensors[f"model.layers.{i}.{leaf}"] for i in range(3)], axis=key == "noise")
            for leaf in "wb"
        }
        found[key] = {"embed": tensors["embed.weight"], "layers": layers}
    return goldens.as_arrays(found)


def test_badam_against_the_authors_package():
    """Blocks from the last to the first, moments anew in each; the package gives its first block one step fewer."""
    given, expected = stack_of("layered"), goldens.tensors("badam")
    optimizer = optimizers.create("badam", 0.05, interval=4, order="descending")
    first = goldens.iterate(optimizer, given, 3)
    after = {**given, "start": jax.tree.map(lambda rows: jnp.asarray(rows[-1]), first)}
    switching = optimizer.init(given["start"])._replace(choice=jnp.asarray(0))  # of the block that is over
    rest = goldens.iterate(optimizer, after, 17, state=switching, begin=3)
    found = jax.tree.map(lambda *rows: np.concatenate(rows), first, rest)
    for leaf in "wb":
        rows = np.stack([expected[f"model.layers.{i}.{leaf}"] for i in range(3)], axis=1)
        assert_close(found["layers"][leaf], rows, FLOAT32, leaf)
    np.testing.assert_array_equal(found["embed"], np.broadcast_to(given["start"]["embed"], (20, 3, 2)))
    np.testing.assert_array_equal(expected["embed.weight"], found["embed"])


def lisa_in_numpy(given, ids, rate, decay, interval):
    """AdamW on the layers `ids` [steps, active], with moments that begin anew with each draw; float64 loops."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), given["start"])
    places = [("embed",), *(("layers", leaf, i) for leaf in "wb" for i in range(3))]
    look = lambda tree, place: tree[place[0]] if len(place) == 1 else tree["layers"][place[1]][place[2]]  # noqa: E731
    moments, rows = {}, []
    for k, active in enumerate(ids):
        if k % interval == 0:
            moments = {place: moments[place] for place in moments if len(place) == 1}
        gradient = goldens.gradient(given, params, k)
        for place in places:
            if len(place) == 3 and place[2] not in active:
                continue
            x, g = look(params, place), np.asarray(look(gradient, place), np.float64)
            mu, nu, count = moments.get(place, (0.0, 0.0, 0))
            mu, nu, count = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g**2, count + 1
            moments[place] = (mu, nu, count)
            x -= rate * (mu / (1 - 0.9**count) / (np.sqrt(nu / (1 - 0.999**count)) + 1e-8) + decay * x)
        rows.append(jax.tree.map(np.copy, params))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def test_lisa_against_numpy():
    given = stack_of("layered")
    optimizer = optimizers.create("lisa", 0.05, active=2, interval=3, weight_decay=0.1, seed=2)
    found, ids = goldens.iterate(optimizer, given, 20, read=lambda state, params: (params, state.ids))
    draws = {tuple(sorted(row)) for row in ids.tolist()}
    assert len(draws) > 1
    assert all(len(set(draw)) == 2 for draw in draws)
    assert all((ids[k] == ids[k - 1]).all() for k in range(1, 20) if k % 3)
    expected = lisa_in_numpy(jax.tree.map(lambda x: np.asarray(x, np.float64), given), ids, 0.05, 0.1, 3)
    for name in ("w", "b"):
        assert_close(found["layers"][name], expected["layers"][name], FLOAT32, name)
    assert_close(found["embed"], expected["embed"], FLOAT32, "embed")


@pytest.mark.parametrize("name", LAYERWISE)
def test_frozen_layers_stay_and_hold_no_moments(name):
    """To the bit, with weight decay; the state holds moments of `active` layers, whichever these are."""
    options = LAYERWISE[name]
    optimizer = optimizers.create(name, 0.1, layout=problem.LAYOUT, weight_decay=0.1, **options)
    params, loss, active = problem.draw(0), problem.loss_of(0), options.get("active", 1)
    state = optimizer.init(params)
    for moments in (state.mu, state.nu):
        for leaf in jax.tree.leaves(moments["layers"]):
            assert leaf.shape[0] == active < problem.LAYERS
        assert (moments["embedding"] is None) == (name == "badam")

    def step(carry, _):
        before, state = carry
        updates, state = optimizer.update(jax.grad(loss)(before), state, before)
        after = jax.tree.map(jnp.add, before, updates)
        return (after, state), (before, after, state.ids, updates)

    run = fast_jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), None, length=12)[1])
    before, after, ids, updates = jax.tree.map(np.asarray, run(params))
    assert len({tuple(row) for row in ids.tolist()}) > 1
    for k, trained in enumerate(ids):
        for leaf in before["layers"]:
            for i in range(problem.LAYERS):
                same = np.array_equal(before["layers"][leaf][k, i], after["layers"][leaf][k, i])
                assert same == (i not in trained), (name, k, i, leaf)
                assert i in trained or not updates["layers"][leaf][k, i].any()
    assert (name == "badam") == np.array_equal(before["embedding"][0], after["embedding"][-1])


def draws_of(optimizer, count):
    params = {"layers": {"w": jnp.asarray(np.random.default_rng(0).normal(0, 1, (4, 2, 2)), jnp.float32)}}

    def step(state, _):
        state = optimizer.update(params, state, params)[1]
        return state, state.ids

    return np.asarray(fast_jit(lambda: jax.lax.scan(step, optimizer.init(params), None, length=count)[1])())


def test_owlore_draws_by_scores():
    """Frequencies of pairs drawn one after another without replacement, over 4000 draws."""
    scores = np.asarray([1.0, 2.0, 3.0, 4.0])
    ids = draws_of(optimizers.create("owlore", 0.1, active=2, interval=1, rank=1, scores=tuple(scores)), 4000)
    p = scores / scores.sum()
    for i in range(4):
        for j in range(4):
            expected = 0.0 if i == j else p[i] * p[j] / (1 - p[i])
            seen = np.mean((ids[:, 0] == i) & (ids[:, 1] == j))
            assert abs(seen - expected) <= 4 * np.sqrt(expected / 4000)


def test_orders_of_badam():
    rounds = draws_of(optimizers.create("badam", 0.1, interval=1, order="random"), 40).reshape(10, 4)
    assert all(sorted(row) == [0, 1, 2, 3] for row in rounds.tolist())
    assert len({tuple(row) for row in rounds.tolist()}) > 1
    ascending = draws_of(optimizers.create("badam", 0.1, interval=2, order="ascending"), 10)[:, 0]
    np.testing.assert_array_equal(ascending, [0, 0, 1, 1, 2, 2, 3, 3, 0, 0])
    assert set(draws_of(optimizers.create("badam", 0.1, interval=1, order="fixed", start=3), 5)[:, 0]) == {3}


def test_outlier_share_by_hand():
    """Means of |w| are 2 and 1: above twice that are 1 of 4, and none. A second matrix belongs to the same mean."""
    w = jnp.asarray([[[1.0, -1.0], [1.0, 5.0]], [[1.0, 1.0], [-1.0, 1.0]]])
    layout = {"w": Layout(True, 1), "scale": Layout(True)}
    share = block_coordinate.outlier_share({"w": w, "scale": jnp.ones((2, 9))}, layout, 2.0)
    np.testing.assert_allclose(share, [0.25, 0.0])
    two = {"a": Layout(True, 1), "b": Layout(True, 1)}
    # The layers' means are (8 + 24) / 6 and (4 + 2) / 6: above twice that are both of 12, and none.
    share = block_coordinate.outlier_share({"a": w, "b": jnp.asarray([[[12.0, -12.0]], [[1.0, 1.0]]])}, two, 2.0)
    np.testing.assert_allclose(share, [2 / 6, 0.0])


def test_outlier_share_by_loops():
    rng = np.random.default_rng(3)
    params = {name: rng.normal(0, s, (3, 5, n)).astype(np.float32) for name, s, n in (("a", 1.0, 4), ("b", 4.0, 7))}
    found = block_coordinate.outlier_share(params, dict.fromkeys(params, Layout(True, 1)), 1.7)
    for i in range(3):
        sizes = [abs(float(v)) for x in params.values() for v in x[i].ravel()]
        outliers = sum(v > 1.7 * sum(sizes) / len(sizes) for v in sizes)
        np.testing.assert_allclose(found[i], outliers / len(sizes), rtol=1e-6)


def test_layers_are_needed():
    params = {"w": jnp.ones((3, 4)), "layers": [{"w": jnp.ones((2, 2))}]}
    with pytest.raises(
        ValueError, match=r"stack the same number of layers, found none; give layout=optimizers\.layout"
    ):
        optimizers.create("lisa", 0.1).init(params)
    stacked = {"layers": {"w": jnp.ones((3, 2, 2))}}
    with pytest.raises(ValueError, match=r"active must be in \[1, 3\], got 4"):
        optimizers.create("lisa", 0.1, active=4).init(stacked)
    optimizer = optimizers.create("owlore", 0.1, scores=(1.0, 1.0))
    state = optimizer.init(stacked)
    with pytest.raises(ValueError, match="scores has 2 entries, the parameters have 3 layers"):
        optimizer.update(stacked, state, stacked)

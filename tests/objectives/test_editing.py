"""Arithmetic of parameter trees by loops in float64, and trees that do not fit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import objectives

F32 = 1e-6


def draw(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "layer": {"w": jnp.asarray(rng.normal(size=(4, 5)), dtype), "b": jnp.asarray(rng.normal(size=7), dtype)},
        "head": [jnp.asarray(rng.normal(size=(3, 2, 2)), dtype)],
    }


def wide(tree):
    return [np.float64(leaf) for leaf in jax.tree.leaves(tree)]


def assert_equal(have, want):
    for a, b in zip(wide(have), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=F32, atol=F32)


BASE, ONE, TWO, THREE = (draw(seed) for seed in range(4))


def test_task_arithmetic():
    have = objectives.task_arithmetic(BASE, [ONE, TWO], [0.4, -1.3])
    want = [b + 0.4 * (x - b) - 1.3 * (y - b) for b, x, y in zip(*map(wide, (BASE, ONE, TWO)), strict=True)]
    assert_equal(have, want)
    assert_equal(objectives.task_arithmetic(BASE, [ONE]), wide(ONE))
    assert_equal(objectives.task_arithmetic(BASE, [ONE, TWO], 0.0), wide(BASE))
    # a task that is added and taken away again is forgotten
    there = objectives.task_arithmetic(BASE, [ONE, TWO], 0.5)
    back = objectives.task_arithmetic(BASE, [there, ONE, TWO], [1.0, -0.5, -0.5])
    assert_equal(back, wide(BASE))


def test_chat_vector():
    have = objectives.chat_vector(BASE, ONE, TWO, scale=0.7)
    assert_equal(have, [t + 0.7 * (c - b) for b, c, t in zip(*map(wide, (BASE, ONE, TWO)), strict=True)])
    assert_equal(objectives.chat_vector(BASE, ONE, BASE), wide(ONE))
    other = TWO | {"head": [jnp.zeros((9, 2, 2))]}  # another vocabulary
    have = objectives.chat_vector(BASE, ONE, other, skip=("head",))
    assert list(have) == list(other)
    assert have["head"] is other["head"]
    assert_equal(have["layer"], wide(objectives.chat_vector(BASE, ONE, TWO)["layer"]))
    with pytest.raises(ValueError, match=r"skip names \['heads'\], the target has \['head', 'layer'\]"):
        objectives.chat_vector(BASE, ONE, TWO, skip=("heads",))


def test_soup():
    trees = list(zip(*map(wide, (ONE, TWO, THREE)), strict=True))
    assert_equal(objectives.soup([ONE, TWO, THREE]), [sum(x) / 3 for x in trees])
    assert_equal(objectives.soup([ONE, TWO, THREE], [1, 0, 3]), [(x + 3 * z) / 4 for x, _, z in trees])
    assert_equal(objectives.soup([ONE]), wide(ONE))
    assert_equal(objectives.soup([ONE, ONE, ONE]), wide(ONE))
    for weights, message in (([1, 2], "3 numbers"), ([1, -1, 1], "at least 0"), ([0, 0, 0], "not all 0")):
        with pytest.raises(ValueError, match=message):
            objectives.soup([ONE, TWO, THREE], weights)


def test_greedy_soup():
    """Scores of the distance from a mean of two models: those two are chosen, best first, and the others are not."""
    far = jax.tree.map(lambda x: x + 5, ONE)
    goal = np.concatenate([(a + 0.8 * b).ravel() / 1.8 for a, b in zip(wide(ONE), wide(TWO), strict=True)])
    calls = []

    def evaluate(tree):
        calls.append(tree)
        return -np.linalg.norm(np.concatenate([x.ravel() for x in wide(tree)]) - goal)

    tree, chosen = objectives.greedy_soup([far, TWO, ONE, THREE], evaluate)
    assert chosen == [2, 1]
    assert len(calls) == 4 + 3
    assert_equal(tree, wide(objectives.soup([ONE, TWO])))
    assert evaluate(tree) >= max(map(evaluate, (far, TWO, ONE, THREE)))
    # equals are added: nothing is worse
    assert objectives.greedy_soup([ONE, ONE], lambda tree: 1.0)[1] == [0, 1]
    with pytest.raises(ValueError, match="evaluate gave NaN"):
        objectives.greedy_soup([ONE], lambda tree: float("nan"))


def sce(base, tuned, keep):
    """One leaf, entry by entry."""
    delta = np.stack([t - base for t in tuned]).reshape(len(tuned), -1)
    if keep < 1:
        variance = delta.var(axis=0)
        number = int((variance != 0).sum() * keep)
        kept = sorted(range(delta.shape[1]), key=lambda i: -variance[i])[:number]
        delta = np.where(np.isin(np.arange(delta.shape[1]), kept), delta, 0.0)
    share = np.mean(delta**2, axis=1)
    share = share / share.sum() if share.sum() >= 1e-6 else np.full(len(tuned), 1 / len(tuned))
    merged = np.zeros(delta.shape[1])
    for i in range(delta.shape[1]):
        sign = 1.0 if delta[:, i].sum() >= 0 else -1.0
        agree = [k for k in range(len(tuned)) if np.sign(delta[k, i]) == sign]
        if agree:
            merged[i] = sum(share[k] * delta[k, i] for k in agree) / max(sum(share[k] for k in agree), 1e-6)
    return base + merged.reshape(base.shape)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 1.0])
def test_sce_is_its_definition(keep):
    have = objectives.sce_merge(BASE, [ONE, TWO, THREE], keep=keep)
    want = [sce(b, x, keep) for b, *x in zip(*map(wide, (BASE, ONE, TWO, THREE)), strict=True)]
    assert_equal(have, want)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.45, 1.0])
def test_sce_is_that_of_mergekit(keep):
    """mergekit 0.1.5; see tests/goldens/make_merge_goldens.py."""
    golden = np.load(Path(__file__).parents[1] / "goldens" / "mergekit_sce.npz")
    names = ("matrix", "vector", "stack")
    base = {name: jnp.asarray(golden[f"{name}/base"]) for name in names}
    tuned = [{name: jnp.asarray(golden[f"{name}/tuned"][k]) for name in names} for k in range(3)]
    merged = objectives.sce_merge(base, tuned, keep=keep)
    for name in names:
        np.testing.assert_allclose(merged[name], golden[f"{name}/{keep}"], rtol=F32, atol=F32, err_msg=name)


def test_sce_where_it_is_known():
    assert_equal(objectives.sce_merge(BASE, [ONE] * 3, keep=1.0), wide(ONE))
    assert_equal(objectives.sce_merge(BASE, [ONE] * 3, keep=0.9), wide(BASE))  # nothing varies
    assert_equal(objectives.sce_merge(BASE, [BASE] * 3, keep=1.0), wide(BASE))
    one = [{"b": tree["layer"]["b"]} for tree in (BASE, ONE)]
    assert_equal(objectives.sce_merge(one[0], one[1:], keep=1.0), wide(one[1]))


def test_dtypes_stay_and_sums_are_wide():
    low = [draw(seed, jnp.bfloat16) for seed in range(3)]
    exact = [(np.float64(a) + 0.3 * (np.float64(b) - a)) for a, b in zip(wide(low[0]), wide(low[1]), strict=True)]
    have = objectives.task_arithmetic(low[0], [low[1]], 0.3)
    for leaf, want in zip(jax.tree.leaves(have), exact, strict=True):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, jnp.asarray(jnp.asarray(want, jnp.float32), jnp.bfloat16))
    codes = {"w": jnp.ones(3), "codes": jnp.arange(3)}
    assert objectives.soup([codes, codes])["codes"].dtype == codes["codes"].dtype
    with pytest.raises(ValueError, match=r"leaf \['codes'\] of dtype int32 differs between the trees"):
        objectives.soup([codes, codes | {"codes": jnp.arange(3) + 1}])


@pytest.mark.parametrize(
    "edit",
    [
        lambda a, b: objectives.task_arithmetic(a, [b]),
        lambda a, b: objectives.chat_vector(a, b, a),
        lambda a, b: objectives.soup([a, b]),
        lambda a, b: objectives.greedy_soup([a, b], lambda tree: 1.0),
        lambda a, b: objectives.sce_merge(a, [b]),
    ],
)
def test_trees_that_disagree_name_the_leaf(edit):
    layer = BASE["layer"]
    for other, message in (
        (BASE | {"layer": layer | {"w": jnp.ones((5, 4))}}, r"leaf \['layer'\]\['w'\] has shape \(5, 4\) in"),
        (BASE | {"layer": layer | {"b": jnp.ones(7, jnp.bfloat16)}}, r"leaf \['layer'\]\['b'\] has dtype bfloat16 in"),
        (BASE | {"layer": {"w": layer["w"]}}, r"has no leaf \['layer'\]\['b'\]"),
        (BASE | {"layer": layer | {"c": jnp.ones(1)}}, r"has a leaf \['layer'\]\['c'\]"),
        (BASE | {"head": tuple(BASE["head"])}, "other containers"),
    ):
        with pytest.raises(ValueError, match=message):
            edit(BASE, other)

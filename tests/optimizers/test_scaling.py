"""Rules of scaling, schedules against those of transformers, and WeLore's choice of matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from objectives import optimizers
from objectives.optimizers import SCHEDULES, Layout, scaling, welore
from tests.trees import fast_jit


def test_horizon_by_hand():
    """Twice the tokens: 2^-0.32 = 0.8011 of the rate; there and back is the same."""
    assert scaling.horizon_learning_rate(1e-3, 2e9, 1e9) == pytest.approx(0.80107e-3, rel=1e-4)
    there = scaling.horizon_learning_rate(1e-3, 7e9, 1e9)
    assert scaling.horizon_learning_rate(there, 1e9, 7e9) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="tokens must be above 0"):
        scaling.horizon_learning_rate(1e-3, 0, 1e9)


def test_fit_recovers_the_law():
    """Parabolas in log rate whose minima lie on 0.7 D^-0.32."""
    tokens, law = np.geomspace(1e9, 1e11, 5), lambda d: 0.7 * d**-0.32
    rates = [law(d) * np.asarray([0.3, 0.7, 1.5, 4.0]) for d in tokens]
    best = [scaling.fit_best_rate(r, 3 + 0.2 * np.log(r / law(d)) ** 2) for d, r in zip(tokens, rates, strict=True)]
    np.testing.assert_allclose(best, law(tokens), rtol=1e-8)
    np.testing.assert_allclose(scaling.fit_horizon(tokens, best), (0.7, 0.32), rtol=1e-6)
    with pytest.raises(ValueError, match="no minimum"):
        scaling.fit_best_rate([1.0, 2.0, 3.0], [1.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="two lengths"):
        scaling.fit_horizon([1.0], [1.0])


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("linear", [1, 0.775, 0.55, 0.325, 0.1]),
        ("cosine", [1, 0.8682, 0.55, 0.2318, 0.1]),
        ("sqrt", [1, 0.55, 0.3636, 0.2206, 0.1]),
    ],
)
def test_wsd_against_transformers(decay, expected):
    """get_wsd_schedule of transformers 5.23 (linear, cosine, 1-sqrt) with 3 steps of warm-up, 4 of decay, 12 in all and
    min_lr_ratio 0.1, at steps 8 to 12. Its warm-up starts at the least ratio, ours at 1/3: only the rest is alike."""
    schedule = SCHEDULES.get("wsd")(1.0, 12, warmup_steps=3, decay_fraction=4 / 12, decay=decay, final_fraction=0.1)
    np.testing.assert_allclose([schedule(step) for step in range(8, 13)], expected, atol=5e-5)
    np.testing.assert_allclose([schedule(step) for step in range(8)], [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1], rtol=1e-6)


def activations(width, density, rule, steps=4):
    """Standard deviation of the hidden units of a masked network after `steps` of Adam, over inputs."""
    base, inputs, outputs = 64, 16, 8
    keys = jax.random.split(jax.random.key(width), 6)
    how = scaling.SparseParametrization(width / base, density) if rule else scaling.SparseParametrization(1.0)
    hidden = np.sqrt(how.hidden_variance / base)
    params = {
        "embed": jax.random.normal(keys[0], (inputs, width)) / np.sqrt(inputs),
        "layers": {"w": hidden * jax.random.normal(keys[1], (2, width, width))},
        "head": jax.random.normal(keys[2], (width, outputs)) / np.sqrt(base),
    }
    mask = jax.random.uniform(keys[3], (2, width, width)) < density
    x, y = jax.random.normal(keys[4], (32, inputs)), jax.random.normal(keys[5], (32, outputs))
    optimizer = optax.chain(
        optimizers.create("adam", 2e-3),
        scaling.scale_hidden_rates(how, layout={"embed": Layout(), "layers": {"w": Layout(True, 1)}, "head": Layout()}),
    )

    def forward(params):
        h = jax.nn.relu(x @ params["embed"])
        for w, m in zip(params["layers"]["w"], mask, strict=True):
            h = jax.nn.relu(h @ (w * m))
        return h, h @ params["head"] * how.logits

    def run(params):
        state = optimizer.init(params)
        for _ in range(steps):
            grads = jax.grad(lambda p: jnp.mean((forward(p)[1] - y) ** 2))(params)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.std(forward(params)[0])

    return float(fast_jit(run)(params))


@pytest.mark.slow
def test_coordinates_do_not_follow_width_or_density():
    """The coordinate check of the paper: within 20 % of their middle with the rule, four times apart without."""
    models = [(64, 1.0), (256, 1.0), (512, 1.0), (256, 0.25), (512, 1 / 16)]
    held, free = ([activations(*model, rule) for model in models] for rule in (True, False))
    assert max(held) / min(held) < 1.2 / 0.8
    assert max(free) / min(free) > 4


def test_sparse_parametrization_by_hand():
    how = scaling.SparseParametrization(4.0, 0.125)
    assert (how.hidden_variance, how.hidden_rate, how.logits, how.attention(64)) == (2.0, 2.0, 0.25, 1 / 64)
    mup = scaling.SparseParametrization(4.0)
    assert (mup.hidden_variance, mup.hidden_rate) == (0.25, 0.25)
    with pytest.raises(ValueError, match="density_multiplier must be above 0"):
        scaling.SparseParametrization(1.0, 0.0)
    updates = {"embed": jnp.ones((3, 2)), "layers": {"w": jnp.ones((2, 2, 2)), "b": jnp.ones((2, 2))}}
    optimizer = scaling.scale_hidden_rates(mup)
    scaled, _ = optimizer.update(updates, optimizer.init(updates))
    assert [float(x.ravel()[0]) for x in jax.tree.leaves(scaled)] == [1.0, 1.0, 0.25]


def matrix_with(values, seed, shape):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(0, 1, (n, len(values))))[0] for n in shape)
    return (u * values) @ v.T


def spread_tree():
    """A stack of a low-rank layer and one of full rank, and a matrix outside."""
    steep, flat = np.asarray([9.0, 5.0, 0.3, 0.2, 0.1]), np.asarray([5.0, 4.5, 4.0, 3.6, 3.0])
    stack = np.stack([matrix_with(values, i, (6, 5)) for i, values in enumerate((steep, flat))])
    other = matrix_with(np.asarray([4.0, 1.0, 0.5, 0.2]), 2, (4, 7))
    params = {"layers": {"w": stack, "scale": np.ones((2, 5))}, "out": other}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), (steep, flat)


def test_welore_plan_by_loops():
    params, _ = spread_tree()
    found = welore.plan(params, 0.5)
    matrices = [np.asarray(m, np.float64) for m in (*params["layers"]["w"], params["out"])]
    normal = []
    for m in matrices:
        s = np.linalg.svd(m, compute_uv=False)
        normal.append([(v - s.min()) / (s.max() - s.min()) for v in s])
    threshold = sorted(v for row in normal for v in row)[7]
    assert found.threshold == pytest.approx(threshold)
    counts = [sum(v < threshold for v in row) for row in normal]
    assert sum(counts) == 7
    low = [count / len(row) > 0.4999 for count, row in zip(counts, normal, strict=True)]
    assert low == [True, False, True]
    np.testing.assert_array_equal(found.low_rank["layers/w"], low[:2])
    np.testing.assert_array_equal(found.ranks["layers/w"], [5 - counts[0], 5])
    np.testing.assert_array_equal(found.ranks["out"], [4 - counts[2]])


def test_welore_cuts_and_trains_what_is_low_rank():
    params, (steep, _) = spread_tree()
    found = welore.plan(params, 0.5)
    after = welore.cut(params, found)
    rank = int(found.ranks["layers/w"][0])
    error = np.linalg.norm(np.asarray(after["layers"]["w"][0] - params["layers"]["w"][0]))
    assert error == pytest.approx(np.sqrt(np.sum(steep[rank:] ** 2)), rel=1e-3)
    np.testing.assert_array_equal(after["layers"]["w"][1], params["layers"]["w"][1])
    a, b = welore.factorize(params["layers"]["w"][0], rank)
    np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-4)  # both hold the roots of the singular values
    optimizer = welore.train_only(optimizers.create("adamw", 0.1), welore.trainable(params, found))
    state = optimizer.init(params)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert not np.asarray(updates["layers"]["w"][1]).any()
    assert not np.asarray(updates["layers"]["scale"]).any()
    assert np.asarray(updates["layers"]["w"][0]).all()
    assert np.asarray(updates["out"]).all()
    with pytest.raises(ValueError, match="reduction must be in"):
        welore.plan(params, 1.0)
    with pytest.raises(ValueError, match="needs matrices"):
        welore.plan({"b": jnp.ones(3)}, 0.5)

"""Preconditioned SGD: iterates of the package, and what its preconditioners must become."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import optimizers
from objectives.optimizers import Layout, psgd, psgd_low_rank
from tests.optimizers import goldens
from tests.trees import assert_close, fast_jit

KRON = 3e-5  # twenty steps of triangular solves in float32 on both sides


@pytest.mark.parametrize(
    ("case", "diagonal"), [("kron", "none"), pytest.param("kron_one_diag", "largest", marks=pytest.mark.slow)]
)
def test_kron_against_the_package(case, diagonal, monkeypatch):
    """With the package's probes; leaves are matrices as it merges them."""
    expected, probes = goldens.tensors(case), goldens.tensors(f"{case}/probe")
    names = sorted(expected)
    stacked = [jnp.asarray(probes[name], jnp.float32) for name in names]

    def recorded(seed, count, index, shape, dtype):
        return stacked[index][count].reshape(shape)

    monkeypatch.setattr(psgd, "_probe", recorded)
    layout = {"tall": Layout(False, 1), "wide": Layout(False, 1), "cube": Layout(False, 2), "vector": Layout()}
    optimizer = optimizers.create(
        "psgd_kron",
        0.02,
        weight_decay=0.1,
        update_probability=1.0,
        diagonal=diagonal,
        mask={name: name != "vector" for name in names},
        layout=layout,
    )
    found = goldens.iterate(optimizer, goldens.as_arrays(goldens.load()), len(expected["tall"]))
    for name in names:
        assert_close(found[name], expected[name], KRON, f"{case} {name}")


def whitened(rows, columns, steps, diagonal):
    """P g of gradients L z R with z standard normal, after `steps` updates of the factors."""
    rng = np.random.default_rng(0)
    left, right = (rng.normal(0, 1, (n, n)) / np.sqrt(n) + np.diag(np.linspace(0.3, 3, n)) for n in (rows, columns))
    left, right = jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32)
    sides = psgd.diagonal_sides((rows, columns), 64, diagonal)
    factors = tuple(jnp.ones(n) if d else jnp.eye(n) for n, d in zip((rows, columns), sides, strict=True))

    def gradient(key):
        return left @ jax.random.normal(key, (rows, columns)) @ right

    def step(factors, given):
        key, size = given
        g, v = gradient(key), jax.random.normal(jax.random.fold_in(key, 1), (rows, columns))
        return psgd.update_factors(factors, g, v, size), None

    def run(factors):
        sizes = jnp.geomspace(0.1, 0.01, steps)  # a constant step leaves noise of its size in the factors
        factors = jax.lax.scan(step, factors, (jax.random.split(jax.random.key(0), steps), sizes))[0]
        samples = jax.vmap(gradient)(jax.random.split(jax.random.key(1), 2000))
        return factors, jax.vmap(lambda g: psgd.precondition(factors, g))(samples), samples

    return jax.tree.map(np.asarray, fast_jit(run)(factors))


def test_kron_whitens():
    """Gradients with correlated rows and columns leave the preconditioner with covariance near 1."""
    factors, white, raw = whitened(5, 4, 3000, "none")
    flat = [x.reshape(2000, -1) for x in (white, raw)]
    values = [np.linalg.eigvalsh(x.T @ x / 2000) for x in flat]
    assert values[1][-1] / values[1][0] > 1e3
    assert 0.4 < values[0][0] < 1 < values[0][-1] < 2.5
    assert all(np.array_equal(q, np.triu(q)) for q in factors)


def test_balance_keeps_the_product():
    rng = np.random.default_rng(0)
    factors = (jnp.asarray(np.triu(rng.normal(0, 5, (3, 3))), jnp.float32), jnp.asarray(rng.uniform(0.1, 0.2, 4)))
    g = jnp.asarray(rng.normal(0, 1, (3, 4)), jnp.float32)
    balanced = psgd._balance(factors)
    assert_close(psgd.precondition(balanced, g), psgd.precondition(factors, g), 1e-5)
    np.testing.assert_allclose(*[np.abs(q).max() for q in balanced], rtol=1e-5)


def test_factors_are_updated_as_often_as_asked():
    """Every fourth step with probability 1/4; the annealed one is 1 until step 500 and 0.03 from 4007 on."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(0, 1, (3, 2)), jnp.float32)}
    optimizer = optimizers.create("psgd_kron", 0.1, update_probability=0.25)
    update, state, renewed = fast_jit(optimizer.update), optimizer.init(params), []
    for _ in range(9):
        state = update(params, state, params)[1]
        renewed.append(int(state[0].renewed))
    assert renewed == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    chances = [float(psgd.anneal_probability(jnp.asarray(n))) for n in (0, 500, 1500, 4100)]
    np.testing.assert_allclose(chances, [1.0, 1.0, np.exp(-1.0), 0.03], rtol=1e-5)


def test_low_rank_against_the_package():
    """Twenty updates of U, V and d; the parameters are split over two leaves, the package has them in one row."""
    given = goldens.tensors("low_rank")
    start = goldens.tensors("low_rank/start")
    split = lambda x: {"a": jnp.asarray(x[:8], jnp.float32).reshape(2, 4, *x.shape[1:]), "b": jnp.asarray(x[8:])}  # noqa: E731
    q = psgd_low_rank.LowRank(*(jax.tree.map(jnp.float32, split(start[name])) for name in "uvd"))
    step = fast_jit(psgd_low_rank.update_preconditioner)
    for k in range(len(given["h"])):
        q = step(q, split(given["h"][k]), split(given["probe"][k]), 0.1, given["coin"][k])
        for name in "uvd":
            expected = given[name][k]
            found = np.concatenate([np.asarray(x).reshape(-1, *expected.shape[1:]) for x in getattr(q, name).values()])
            assert_close(found, expected, KRON, f"{name} of step {k}")
    white = psgd_low_rank.precondition(q, split(given["h"][0]))
    assert_close(np.concatenate([np.ravel(x) for x in white.values()]), given["white"], KRON)
    assert 0 < given["coin"].sum() < len(given["coin"])


@pytest.mark.slow
def test_low_rank_becomes_the_inverse_hessian():
    """With h = H v for a positive H = diag + rank 2, P approaches H^-1: |P H - 1| falls to a tenth."""
    rng = np.random.default_rng(0)
    basis = rng.normal(0, 1, (10, 2))
    hessian = jnp.asarray(np.diag(rng.uniform(0.5, 2, 10)) + basis @ basis.T, jnp.float32)
    u, v = rng.normal(0, 0.1, (2, 10, 3))
    q = psgd_low_rank.LowRank(*({"x": jnp.asarray(x, jnp.float32)} for x in (u, v, np.ones(10))))

    def distance(q):
        columns = jax.vmap(lambda column: psgd_low_rank.precondition(q, {"x": column})["x"])(hessian)
        return jnp.linalg.norm(columns.T - jnp.eye(10))

    def step(q, given):
        key, size = given
        probe = jax.random.normal(key, (10,))
        coin = jax.random.bernoulli(jax.random.fold_in(key, 1))
        return psgd_low_rank.update_preconditioner(q, {"x": hessian @ probe}, {"x": probe}, size, coin), None

    given = (jax.random.split(jax.random.key(0), 4000), jnp.geomspace(0.5, 0.01, 4000))
    after = fast_jit(lambda q: jax.lax.scan(step, q, given)[0])(q)
    assert distance(after) < 0.1 * distance(q)

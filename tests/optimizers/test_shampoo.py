"""Shampoo in 32 bits against a loop in float64, and what four bits and rectification do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import optimizers
from objectives.optimizers import Layout, shampoo
from tests.optimizers import goldens
from tests.trees import assert_close, fast_jit

FLOAT32 = 5e-5  # an orthogonal iteration in float32 before each step
MATRICES = {"tall": Layout(False, 1), "wide": Layout(False, 1), "cube": Layout(True, 1), "vector": Layout()}


def shampoo_in_numpy(problem, steps, rate, decay, eps, every, root_every):
    """ShampooAdamW in float64, with Q of every orthogonal iteration from numpy."""
    rows = {}
    for name, start in problem["start"].items():
        x, mu, nu, rows[name] = start.copy(), 0.0, 0.0, []
        matrices = start.ndim > 1
        layers, *sizes = MATRICES[name].matrix_shape(start.shape) if matrices else (0, 0, 0)
        held = [[[np.eye(n), np.full(n, eps), np.eye(n)] for n in sizes] for _ in range(layers)]
        for k in range(1, steps + 1):
            g = problem["weight"][name] * (x - problem["target"][name]) + problem["noise"][name][k - 1]
            white = g.copy()
            for layer in range(layers):
                m = g.reshape(layers, *sizes)[layer]
                for side, statistic in zip(held[layer], (m @ m.T, m.T @ m), strict=True):
                    if k % every == 0:
                        a = decay * side[0] @ np.diag(side[1]) @ side[0].T + (1 - decay) * statistic
                        q = np.linalg.qr(a @ side[0])[0]
                        side[:2] = q, np.diag(q.T @ a @ q)
                    if k % root_every == 0:
                        damped = np.maximum(side[1], 0) + eps * side[1].max()
                        side[2] = side[0] @ np.diag(damped**-0.25) @ side[0].T
                w = held[layer][0][2] @ m @ held[layer][1][2]
                white.reshape(layers, *sizes)[layer] = w * np.linalg.norm(m) / np.linalg.norm(w)
            mu, nu = 0.9 * mu + 0.1 * white, 0.999 * nu + 0.001 * white**2
            x = x - rate * (mu / (1 - 0.9**k) / (np.sqrt(nu / (1 - 0.999**k)) + 1e-8) + 0.1 * x)
            rows[name].append(x)
    return {name: np.stack(values) for name, values in rows.items()}


def test_32_bits_against_numpy():
    """Every third step a statistic, every sixth a root; the cube is two layers."""
    problem = goldens.load()
    expected = shampoo_in_numpy(problem, 20, 0.05, 0.8, 1e-3, 3, 6)
    optimizer = optimizers.create(
        "shampoo",
        0.05,
        bits=32,
        decay=0.8,
        eps=1e-3,
        statistic_every=3,
        root_every=6,
        rectify_statistic=0,
        rectify_root=0,
        weight_decay=0.1,
        layout=MATRICES,
    )
    found = goldens.iterate(optimizer, goldens.as_arrays(problem), 20)
    for name, rows in expected.items():
        assert_close(found[name], rows, FLOAT32, name)


def orthogonal(n, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(0, 1, (n, n)))[0]


def test_codebook_by_hand():
    book = shampoo.codebook()
    assert (np.diff(book) > 0).all()
    np.testing.assert_allclose(
        book[[0, 1, 7, 8, 14, 15]], [-1, -((13 / 15) ** 2), 0, 1 / 225, (13 / 15) ** 2, 1], rtol=1e-6
    )


def test_quantisation_by_loops():
    """Nearest values, one scale for each block of a column, an odd number of rows, columns that are 0."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (2, 7, 7)) * rng.uniform(0.1, 10, (2, 1, 7))
    x[0, :, 3] = 0.0
    packed = fast_jit(shampoo.quantize, static_argnums=1)(jnp.asarray(x, jnp.float32), 4)
    assert packed.codes.dtype == jnp.uint8
    assert packed.codes.shape == (2, 4, 7)
    assert packed.scales.shape == (2, 2, 7)
    found, book = np.asarray(shampoo.dequantize(packed, 7)), shampoo.codebook().astype(np.float64)
    for i in range(2):
        for column in range(7):
            for begin in (0, 4):
                piece = x[i, begin : begin + 4, column]
                scale = np.abs(piece).max()
                expected = [scale * book[np.abs(book - v / scale).argmin()] if scale else 0.0 for v in piece]
                np.testing.assert_allclose(found[i, begin : begin + 4, column], expected, rtol=1e-5)


@pytest.mark.parametrize("n", [64, pytest.param(70, marks=pytest.mark.slow)])
def test_rectification_brings_back_orthogonality(n):
    """The point of the paper: V'V - 1 shrinks with each Bjorck step, and the root comes nearer to that of eigh."""
    v, values = orthogonal(n, 1), np.geomspace(1e-3, 10, n)
    stored = shampoo.dequantize(shampoo.quantize(jnp.asarray(v, jnp.float32), 64), n)
    gaps = [float(jnp.linalg.norm(w.T @ w - jnp.eye(n))) for w in (shampoo.rectify(stored, k) for k in (0, 1, 4))]
    assert gaps[0] > 4 * gaps[1] > 40 * gaps[2]
    exact = (v * values**-0.25) @ v.T
    roots = [shampoo.inverse_root(shampoo.rectify(stored, k), jnp.asarray(values, jnp.float32), 1e-9) for k in (0, 4)]
    errors = [np.linalg.norm(root - exact) / np.linalg.norm(exact) for root in roots]
    assert errors[1] < 0.2
    assert errors[1] < errors[0]


def test_orthogonal_iteration_finds_eigenvectors():
    """Statistics of one covariance again and again: V and lambda become those of eigh."""
    rng = np.random.default_rng(0)
    a = (orthogonal(6, 2) * np.geomspace(0.1, 10, 6)) @ orthogonal(6, 2).T
    v, values = jnp.asarray(orthogonal(6, 3), jnp.float32), jnp.asarray(rng.uniform(0, 1, 6), jnp.float32)
    step = fast_jit(shampoo.update_eigen)
    for _ in range(60):
        v, values = step(v, values, jnp.asarray(a, jnp.float32), 0.5)
    assert_close((v * values) @ v.T, a, 1e-4)
    assert_close(jnp.sort(values), np.linalg.eigvalsh(a), 1e-4)


def test_state_in_four_bits():
    """Two matrices of n^2 / 2 bytes a side and a scale for every 64 elements, against 8 n^2 in float32."""
    params = {"layers": {"w": jnp.zeros((2, 128, 64))}}
    sizes = {}
    for bits in (4, 32):
        state = jax.eval_shape(shampoo.scale_by_shampoo(bits=bits).init, params)
        sizes[bits] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.sides))
    sides = 2 * (128**2 + 64**2)
    assert sizes[32] == 8 * sides + 2 * (128 + 64) * 8
    assert sizes[4] == sides + 8 * sides // 64 + 2 * (128 + 64) * 8
    alone = jax.eval_shape(shampoo.scale_by_shampoo(max_size=64).init, params)
    assert alone.sides["layers"]["w"][0] is None

"""Comparison oracles on quadratics, whose gradient is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import objectives
from tests.objectives.pairs import log_probs

RNG = np.random.default_rng(7)
DIM = 12


def problem(pairs=3):
    """s_w and s_l = -s_w as quadratics of theta = {a, b}; the gradient of s_w's mean, and its greatest value."""
    curvature = np.abs(RNG.normal(size=(pairs, DIM))).astype(np.float32)
    target = RNG.normal(size=(pairs, DIM)).astype(np.float32)
    theta = {"a": jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32), "b": jnp.asarray(RNG.normal(size=6), jnp.float32)}

    def flat(theta):
        return jnp.concatenate([theta["a"].reshape(-1), theta["b"]])

    def oracle(theta):
        value = -jnp.sum(curvature * jnp.square(flat(theta) - target), axis=-1)
        return value, -value

    gradient = flat(jax.grad(lambda t: jnp.mean(oracle(t)[0]))(theta))
    best = (curvature * target).sum(0) / curvature.sum(0)
    return theta, oracle, flat, np.asarray(gradient), -np.mean(np.sum(curvature * (best - target) ** 2, axis=-1))


def test_direction_is_near_the_gradient():
    theta, oracle, flat, gradient, _ = problem()
    g, share = objectives.comparison_direction(oracle, theta, jax.random.key(0), radius=1e-2, queries=800)
    g = np.asarray(flat(g))
    np.testing.assert_allclose(np.linalg.norm(g), 1.0, rtol=1e-5)
    # Signs of m projections: the expected angle falls as sqrt(dim / m), here to about 0.15.
    assert g @ gradient / np.linalg.norm(gradient) > 0.95
    assert 0.4 < float(share) < 0.6


def test_steps_climb():
    theta, oracle, _, _, best = problem()
    before = float(jnp.mean(oracle(theta)[0]))

    @jax.jit
    def step(theta, key):
        g, share = objectives.comparison_direction(oracle, theta, key, radius=1e-2, queries=100)
        return objectives.comparison_step(theta, g, share, step_size=0.1)

    for key in jax.random.split(jax.random.key(1), 100):  # of a length of about 0.05 each
        theta = step(theta, key)
    assert best - float(jnp.mean(oracle(theta)[0])) < 0.2 * (best - before)


def test_both_sides_must_improve():
    """s_l that rises with s_w wins no comparison, so that nothing moves."""
    theta, oracle, flat, _, _ = problem()
    both = lambda t: (oracle(t)[0],) * 2  # noqa: E731
    g, share = objectives.comparison_direction(both, theta, jax.random.key(0), radius=1e-2, queries=50)
    assert float(share) == 0.0
    stays = objectives.comparison_step(theta, g, share, step_size=1.0)
    np.testing.assert_array_equal(flat(stays), flat(theta))


def test_step_and_clip():
    theta, oracle, flat, _, _ = problem()
    g, share = objectives.comparison_direction(oracle, theta, jax.random.key(0), radius=1e-2, queries=60)
    clipped, _ = objectives.comparison_direction(oracle, theta, jax.random.key(0), radius=1e-2, queries=60, clip=0.2)
    dense = np.asarray(flat(g))
    np.testing.assert_array_equal(flat(clipped), np.where(np.abs(dense) >= 0.2, dense, 0.0))
    assert 0 < np.count_nonzero(flat(clipped)) < DIM
    moved = objectives.comparison_step(theta, g, share, step_size=0.3)
    np.testing.assert_allclose(flat(moved), flat(theta) + 0.3 * float(share) * dense, rtol=1e-5)
    still = objectives.comparison_step(theta, g, share, step_size=0.3, min_share=float(share))
    np.testing.assert_array_equal(flat(still), flat(theta))


def test_noisy_pairs():
    noisy = objectives.noisy_pairs(log_probs([-10.0, -10.0, -10.0]), log_probs([-13.0, -13.5, -4.0]))
    np.testing.assert_array_equal(noisy, [True, False, False])


def test_refusals():
    theta, oracle, _, _, _ = problem()
    with pytest.raises(ValueError, match="radius must be above 0"):
        objectives.comparison_direction(oracle, theta, jax.random.key(0), radius=0.0)
    with pytest.raises(ValueError, match="min_share must be in"):
        objectives.comparison_step(theta, theta, 0.5, step_size=1.0, min_share=2.0)

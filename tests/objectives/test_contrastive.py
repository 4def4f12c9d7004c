"""InfoNCE against torch, and what takes no part in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import objectives
from tests.objectives.oracle import check

F32 = 5e-6
PAIRS, FURTHER, WIDTH = 5, 3, 4

info_nce = jax.jit(objectives.info_nce, static_argnames=("symmetric", "normalise"))


def draw(seed=0):
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(PAIRS, WIDTH)).astype(np.float32)
    return {"queries": queries, "keys": rng.normal(size=(PAIRS + FURTHER, WIDTH)).astype(np.float32)}


def equation(queries, keys, *, temperature, symmetric, normalise):
    """torch's cross entropy of the table of similarities."""
    if normalise:
        queries, keys = (torch.nn.functional.normalize(x, dim=-1) for x in (queries, keys))
    scores = queries @ keys.T / temperature
    loss = lambda s: torch.nn.functional.cross_entropy(s, torch.arange(PAIRS), reduction="sum")  # noqa: E731
    return (loss(scores) + loss(scores[:, :PAIRS].T)) / 2 if symmetric else loss(scores)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_is_torch(symmetric, normalise):
    options = {"temperature": 0.3, "symmetric": symmetric, "normalise": normalise}
    check(info_nce, equation, draw(), 2e-5, **options)


def test_metrics():
    given = draw(1)
    output = info_nce(**given)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (given["queries"], given["keys"]))
    table = q @ k.T
    assert float(output.weight) == PAIRS
    assert float(output.metrics["accuracy"]) == (table.argmax(1) == np.arange(PAIRS)).sum()
    np.testing.assert_allclose(output.metrics["similarity"], np.trace(table), rtol=F32)


@pytest.mark.parametrize("symmetric", [False, True])
def test_padding_takes_no_part(symmetric):
    """Pairs that are not valid, and further keys, may be NaN: the rest is what it is without them."""
    given, valid, keys = draw(2), np.array([1, 0, 1, 1, 0]), np.array([0, 1, 0])
    everything = np.concatenate([valid, keys])
    poisoned = {
        "queries": np.where(valid[:, None], given["queries"], np.nan),
        "keys": np.where(everything[:, None], given["keys"], np.nan),
    }
    loss = lambda x: info_nce(**x, valid=valid, valid_keys=keys, symmetric=symmetric)  # noqa: E731
    output, gradient = loss(poisoned), jax.grad(lambda x: loss(x).loss_sum)(jax.tree.map(jnp.asarray, poisoned))
    alone = {"queries": given["queries"][valid != 0], "keys": given["keys"][everything != 0]}
    want = info_nce(**alone, symmetric=symmetric)
    for a, b in zip(jax.tree.leaves(output), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=F32)
    slope = jax.grad(lambda x: info_nce(**x, symmetric=symmetric).loss_sum)(jax.tree.map(jnp.asarray, alone))
    for name, counted in (("queries", valid), ("keys", everything)):
        np.testing.assert_allclose(gradient[name][counted != 0], slope[name], rtol=1e-4, atol=F32)
        assert not np.any(gradient[name][counted == 0])


def test_where_it_is_known():
    """Equal scores: log of the number of keys. A pair alone has no loss. No valid pair, no weight."""
    ones = jnp.ones((4, 3))
    for symmetric in (False, True):
        output = info_nce(ones, ones, symmetric=symmetric)
        np.testing.assert_allclose(output.loss_sum, 4 * np.log(4), rtol=F32)
        assert float(info_nce(ones[:1], 2 * ones[:1], symmetric=symmetric).loss_sum) == 0.0
        assert jax.tree.leaves(info_nce(ones, ones, jnp.zeros(4), symmetric=symmetric)) == [0.0] * 4


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e18])
def test_extremes_are_finite(scale):
    given = jax.tree.map(lambda x: jnp.asarray(scale * x), draw(3))
    gradient = jax.grad(lambda x: info_nce(**x, temperature=0.01, symmetric=True).loss_sum)(given)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_refusals():
    given = draw()
    with pytest.raises(ValueError, match=r"keys \[M, D\] with M >= B, got \(5, 4\) and \(4, 4\)"):
        objectives.info_nce(given["queries"], given["keys"][:4])
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        objectives.info_nce(**given, temperature=0)
    with pytest.raises(ValueError, match=r"valid_keys must have shape \(3,\), got \(2,\)"):
        objectives.info_nce(**given, valid_keys=np.ones(2))

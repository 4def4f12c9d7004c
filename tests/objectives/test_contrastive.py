"""InfoNCE against torch, and what takes no part in it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import objectives
from tests.objectives.oracle import check
from tests.trees import fast_jit

F32 = 5e-6
PAIRS, FURTHER, WIDTH = 5, 3, 4


@functools.partial(fast_jit, static_argnames=("symmetric",))
def value_and_gradient(given, *valid, temperature=0.05, symmetric=False):
    def loss(given):
        output = objectives.info_nce(
            **given,
            **dict(zip(("valid", "valid_keys"), valid, strict=False)),
            temperature=temperature,
            symmetric=symmetric,
        )
        return output.loss_sum, output

    (_, output), gradient = jax.value_and_grad(loss, has_aux=True)(given)
    return output, gradient


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
    check(objectives.info_nce, equation, draw(), 2e-5, compiled=True, **options)


def test_metrics():
    given = draw(1)
    output, _ = value_and_gradient(given)
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
    output, gradient = value_and_gradient(poisoned, valid, keys, symmetric=symmetric)
    alone = {"queries": given["queries"][valid != 0], "keys": given["keys"][everything != 0]}
    want, slope = value_and_gradient(alone, symmetric=symmetric)
    for a, b in zip(jax.tree.leaves(output), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=F32)
    for name, counted in (("queries", valid), ("keys", everything)):
        np.testing.assert_allclose(gradient[name][counted != 0], slope[name], rtol=1e-4, atol=F32)
        assert not np.any(gradient[name][counted == 0])


def test_where_it_is_known():
    """Equal scores: log of the number of keys. A pair alone has no loss. No valid pair, no weight."""
    same = {"queries": jnp.ones((4, 3)), "keys": jnp.ones((4, 3))}
    for symmetric in (False, True):
        for valid, want in (([1, 1, 1, 1], 4 * np.log(4)), ([0, 0, 1, 0], 0.0), ([0, 0, 0, 0], 0.0)):
            output, _ = value_and_gradient(same, np.array(valid), symmetric=symmetric)
            np.testing.assert_allclose(output.loss_sum, want, rtol=F32, atol=1e-6)
            assert float(output.weight) == sum(valid)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e18])
def test_extremes_are_finite(scale):
    given = jax.tree.map(lambda x: jnp.asarray(scale * x), draw(3))
    assert all(
        np.isfinite(x).all() for x in jax.tree.leaves(value_and_gradient(given, temperature=0.01, symmetric=True))
    )


def test_refusals():
    given = draw()
    with pytest.raises(ValueError, match=r"keys \[M, D\] with M >= B, got \(5, 4\) and \(4, 4\)"):
        objectives.info_nce(given["queries"], given["keys"][:4])
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        objectives.info_nce(**given, temperature=0)
    with pytest.raises(ValueError, match=r"valid_keys must have shape \(3,\), got \(2,\)"):
        objectives.info_nce(**given, valid_keys=np.ones(2))

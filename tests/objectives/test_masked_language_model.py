"""Hidden tokens: shares by counting, and the loss at selected ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import objectives
from tests.objectives.test_cross_entropy import F32, draw, loops


def within(count, number, p):
    """Five standard deviations of a binomial."""
    return abs(count - number * p) < 5 * np.sqrt(number * p * (1 - p))


def test_shares_of_hidden_tokens():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (200, 500))
    valid = np.broadcast_to(np.arange(500) < 400, tokens.shape)
    options = {"mask_token": 99, "vocab_size": 50, "rate": 0.3, "keep": 0.25, "replace": 0.35}
    hidden, selected = objectives.hide_tokens(jax.random.key(1), jnp.asarray(tokens), valid, **options)
    hidden, selected = np.asarray(hidden), np.asarray(selected)
    assert not selected[:, 400:].any()
    np.testing.assert_array_equal(hidden[~selected], tokens[~selected])
    number = selected.sum()
    assert within(number, 200 * 400, 0.3)
    assert within((hidden == 99).sum(), number, 0.4)
    # a replacement is the token itself once in 50
    assert within((hidden == tokens)[selected].sum(), number, 0.25 + 0.35 / 50)
    others = hidden[selected & (hidden != 99) & (hidden != tokens)]
    shares = np.bincount(others, minlength=50)
    assert len(shares) == 50
    assert all(within(count, len(others), 1 / 50) for count in shares)


def test_all_and_nothing():
    tokens = jnp.arange(12).reshape(3, 4)
    hide = lambda **options: objectives.hide_tokens(  # noqa: E731
        jax.random.key(0), tokens, mask_token=99, vocab_size=50, **options
    )
    hidden, selected = hide(rate=1.0, keep=0.0, replace=0.0)
    assert bool(selected.all())
    assert bool((hidden == 99).all())
    np.testing.assert_array_equal(hide(rate=1.0, keep=1.0, replace=0.0)[0], tokens)
    assert not bool(hide(rate=0.0)[1].any())


def test_loss_is_over_selected_tokens():
    logits, targets, mask = draw(3)
    selected = mask != 0
    output = objectives.masked_language_model(jnp.asarray(logits), targets, jnp.asarray(selected), z_loss=0.2)
    total, nll = loops(logits, targets, selected.astype(np.float32), 0.2, 0.0)
    np.testing.assert_allclose(output.loss_sum, total, rtol=F32)
    np.testing.assert_allclose(output.metrics["nll"], nll, rtol=F32)
    assert float(output.weight) == selected.sum()


def test_refusals():
    for options, message in (
        ({"rate": 1.5}, r"rate must be in \[0.0, 1.0\], got 1.5"),
        ({"keep": 0.6, "replace": 0.6}, r"keep \+ replace must be at most 1"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            objectives.hide_tokens(
                jax.random.key(0), jnp.zeros((1, 2), int), **({"mask_token": 9, "vocab_size": 5} | options)
            )

"""The learning rate that follows the number of counted tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from objectives.optimizers import scale_by_token_count


def test_steps_scale_with_the_root_of_the_tokens():
    """Adam's update times sqrt(T / reference): by hand, traced, and as plain Adam where T is the reference."""
    rng = np.random.default_rng(0)
    params, gradients = ({"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)} for _ in range(2))
    adam = optax.scale_by_adam()
    plain, _ = adam.update(gradients, adam.init(params))
    tx = optax.chain(optax.scale_by_adam(), scale_by_token_count(1000), optax.scale_by_learning_rate(0.1))
    step = jax.jit(lambda tokens: tx.update(gradients, tx.init(params), params, num_tokens=tokens)[0])
    for tokens in (0, 10, 1000, 4000):
        np.testing.assert_allclose(step(tokens)["w"], -0.1 * np.sqrt(tokens / 1000) * plain["w"], rtol=1e-6)


def test_dtypes_stay():
    tx = scale_by_token_count(4)
    updates, _ = tx.update({"w": jnp.ones(2, jnp.bfloat16)}, tx.init(None), num_tokens=jnp.float32(16))
    assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(updates["w"]), 2.0)


def test_refusals():
    with pytest.raises(ValueError, match="reference must be above 0, got 0"):
        scale_by_token_count(0)
    tx = scale_by_token_count(1)
    with pytest.raises(TypeError, match="num_tokens"):
        tx.update({}, tx.init({}))

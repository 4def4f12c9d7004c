"""The contraction door and its equations."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.core.linear import Weight, is_weight, linear, materialise, split_equation


@flax.struct.dataclass
class Doubled:
    w: object

    def contract(self, x, eqn):
        return 2 * jnp.einsum(eqn, x, self.w.astype(x.dtype))

    def materialise(self):
        return 2 * self.w


def test_linear_keeps_the_activation_dtype():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 3, 4)), rng.standard_normal((4, 5, 6))
    y = linear(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), "btd,dhk->bthk")
    np.testing.assert_allclose(y, np.einsum("btd,dhk->bthk", x, w), rtol=1e-4, atol=1e-5)
    assert linear(jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.float32), "btd,dhk->bthk").dtype == jnp.bfloat16


def test_a_weight_contracts_itself():
    x, w = jnp.ones((1, 2, 3)), jnp.arange(12.0).reshape(3, 4)
    weight = Doubled(w)
    assert isinstance(weight, Weight)
    assert is_weight(weight)
    assert not is_weight(w)
    np.testing.assert_allclose(linear(x, weight, "btd,df->btf"), 2 * linear(x, w, "btd,df->btf"))
    np.testing.assert_array_equal(materialise(weight), 2 * w)
    assert materialise(w) is w


def test_split_equation():
    assert split_equation("btd,dhk->bthk") == ("btd", "d", "hk", "bthk")
    assert split_equation("bthv,hvd -> btd") == ("bthv", "hv", "d", "btd")
    for bad in ("btd,zd->btz", "btd,xdh->bth"):
        with pytest.raises(ValueError, match="contracted dimensions must come first"):
            split_equation(bad)


def test_linear_contracts_rows_of_one_matrix():
    text = jax.jit(lambda x, w: linear(x, w, "btd,df->btf")).lower(jnp.ones((2, 3, 4)), jnp.ones((4, 5))).as_text()
    assert "tensor<6x4xf32>" in text

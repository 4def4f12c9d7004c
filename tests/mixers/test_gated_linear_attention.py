"""Gated linear attention and HGRN beside the battery: the decays that it does not run, and the traps of the family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.mixers import harness as h
from tests.mixers.numpy_oracles import silu
from tests.mixers.oracles import ORACLES
from tests.trees import GRADIENT_TOLERANCE, ORACLE_TOLERANCE, assert_close, assert_finite, to_float64
from zoo.layers.norm import Norm
from zoo.layers.rotary import Rotary
from zoo.mixers import ChannelGate, FixedDecay, GatedLinearAttention, HeadGate, gated_linear_attention, hgrn
from zoo.mixers.gated_linear_attention import FEATURE_MAPS

SIZES = {"heads": 2, "key_width": 4, "value_width": 6}
SEGMENTS = np.array([[1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 2], [0, 1, 1, 2, 3, 3, 3, 3, 0, 0, 3, 3, 0], [1] * 13])


@pytest.mark.parametrize(
    "config",
    [
        GatedLinearAttention(**SIZES, decay=None, feature_map="relu", normalise=True, output_gate=False),
        GatedLinearAttention(**SIZES, decay=None, norm=None),
        GatedLinearAttention(**SIZES, decay=HeadGate(), rotary=Rotary(100.0), feature_map="relu"),
    ],
    ids=["normalised", "identity", "head"],
)
def test_other_combinations_match_the_oracle(config):
    params, x = h.params_of(config), h.inputs(1)
    y, _ = h.forward(config)(params, h.poison(x, SEGMENTS), h.context(SEGMENTS))
    assert_close(y, h.oracle(config, params, x, SEGMENTS), ORACLE_TOLERANCE)


def test_a_strong_gate_over_a_whole_chunk():
    """Cumulative log decays of -181 and far below: (q e^G)(k e^-G) would be infinite."""
    config, length = GatedLinearAttention(**SIZES, decay=ChannelGate(rank=2, normaliser=1.0)), 96
    params = dict(h.params_of(config))
    params["decay_bias"] = params["decay_bias"] - 3.0
    x = h.inputs(2, batch=1, length=length)
    logits = x @ params["decay_down"] @ params["decay_up"].reshape(2, -1) + params["decay_bias"].reshape(-1)
    total = np.asarray(jax.nn.log_sigmoid(logits)).sum(axis=1)
    assert total.max() < -181
    with np.errstate(over="ignore"):
        assert np.isinf(np.exp(-total, dtype=np.float32)).all()
    cot = h.inputs(3, batch=1, length=length)
    state = jax.tree.map(jnp.zeros_like, h.fresh(config, batch=1))
    gradients, (y, _) = h.gradient(config)(params, x, state, h.contiguous(0, length, 1), cot, state)
    assert_close(y, h.oracle(config, params, x), ORACLE_TOLERANCE, "y")
    assert_finite(gradients)


def test_the_gate_is_a_swish_of_the_projection_after_the_norm():
    """The forms that are easily taken for it give something else."""
    config = GatedLinearAttention(**SIZES, decay=FixedDecay(), norm=Norm(scale=False, eps=1e-3))
    open_config = GatedLinearAttention(**SIZES, decay=FixedDecay(), norm=None, output_gate=False)
    params, x = h.params_of(config), h.inputs(4, batch=1)
    y = np.asarray(h.forward(config)(params, x, h.contiguous(0, h.LENGTH, 1))[0][0])

    # o of every head, by an output projection that leaves it alone
    identity = np.eye(12, h.WIDTH).reshape(2, 6, h.WIDTH)
    raw = ORACLES["gated_linear_attention"](open_config, {**to_float64(params), "o": identity}, x[0].astype(float))
    o = raw[:, :12].reshape(-1, 2, 6)
    gate = np.einsum("td,dhv->thv", x[0], params["gate"])

    def rms(a):
        return a / np.sqrt((a * a).mean(-1, keepdims=True) + 1e-3)

    def merged(a):
        return np.einsum("thv,hvd->td", a, params["o"])

    assert_close(y, merged(rms(o) * silu(gate)), ORACLE_TOLERANCE)
    for wrong in (rms(o) * (silu(gate) / gate), rms(gate) * silu(o), rms(o * silu(gate))):
        assert np.abs(merged(wrong) - y).max() > 0.05 * np.abs(y).max()


def test_decays_of_retention():
    """gamma = 1 - 2^(-5-h), h from 0: what is left of a state after one token whose key is 0."""
    config = GatedLinearAttention(heads=4, key_width=3, value_width=2, decay=FixedDecay(), norm=None)
    params = {**h.params_of(config), "k": jnp.zeros((h.WIDTH, 4, 3))}
    ones = jax.tree.map(jnp.ones_like, h.fresh(config))
    _, state = h.forward(config)(params, h.inputs(5, length=1), h.contiguous(1, 1), ones)
    expected = np.array([31 / 32, 63 / 64, 127 / 128, 255 / 256])
    assert_close(state.kv, np.broadcast_to(expected[:, None, None], state.kv.shape), 1e-7)


def test_elu_feature_map_far_from_zero():
    """elu(x) + 1 in the form expm1(x) + 1 would be 0 at -20; gradients are finite everywhere."""
    x = jnp.array([-200.0, -20.0, -1.0, 0.0, 1.0, 90.0])
    value, gradient = jax.vmap(jax.value_and_grad(FEATURE_MAPS["elu"]))(x)
    expected = np.where(x > 0, x + 1.0, np.exp(np.minimum(np.asarray(x, np.float64), 0)))
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-38)
    np.testing.assert_allclose(gradient, np.where(x > 0, 1.0, expected), rtol=1e-6, atol=1e-38)


def test_lower_bounds_grow_from_zero():
    logits = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    shares = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(axis=0)
    bounds = hgrn.lower_bounds(jnp.asarray(logits))
    assert_close(bounds, shares.cumsum(axis=0) - shares[0], ORACLE_TOLERANCE)
    assert not np.asarray(bounds[0]).any()
    assert (np.diff(bounds, axis=0) > 0).all()
    assert np.asarray(bounds).max() < 1
    gradient = jax.grad(lambda a: jnp.sum(jnp.cos(hgrn.lower_bounds(a))))(jnp.asarray(logits))
    step = 1e-5 * np.random.default_rng(1).standard_normal(logits.shape)

    def loss(a):
        p = np.exp(a) / np.exp(a).sum(axis=0)
        return np.cos(p.cumsum(axis=0) - p[0]).sum()

    change = (loss(logits + step) - loss(logits - step)) / 2
    assert_close(np.sum(gradient * step) / 1e-5, change / 1e-5, GRADIENT_TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"feature_map": "elus"}, "feature_map='elus' is not supported; did you mean"),
        ({"normalise": True}, r"feature_map one of \('elu', 'relu'\) and rotary None, got 'identity'"),
        ({"normalise": True, "feature_map": "elu", "rotary": Rotary()}, "products of queries and keys"),
        ({"heads": 0}, "heads must be >= 1, got 0"),
        ({"decay": ChannelGate(normaliser=0.0)}, "normaliser > 0"),
        ({"decay": "fixed"}, "decay='fixed' is not supported"),
    ],
)
def test_configs_that_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        GatedLinearAttention(**{**SIZES, **changes})


def test_the_state_does_not_grow():
    config = GatedLinearAttention(**SIZES, decay=None, feature_map="elu", normalise=True)
    for length in (1, 4096):
        specs = gated_linear_attention.state_specs(config, 3, length, jnp.bfloat16)
        assert (specs.kv.shape, specs.kv.dtype) == ((3, 2, 4, 7), jnp.float32)

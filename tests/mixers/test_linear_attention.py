"""What Taylor and Hedgehog attention must get right beyond the battery: kernels, sums, normalisers and ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.taylor_linear_attention.reference import expand
from tests.mixers import harness as h
from tests.mixers.based_oracles import expand_taylor, hedgehog_features
from tests.trees import FLOAT32_TOLERANCE, ORACLE_TOLERANCE, assert_close, assert_finite, redraw, to_float64
from zoo.core.params import flatten, initialise, tagged
from zoo.layers import feature_maps
from zoo.layers.feature_maps import HedgehogMap
from zoo.mixers import Attention, BaseConv, Hedgehog, TaylorAttention, mixer_of

TAYLOR = TaylorAttention(heads=2, head_width=4, feature_dim=3)
HEDGEHOG = Hedgehog(heads=2, kv_heads=1, head_width=4)
LONG = 600  # three chunks of the Taylor op, five of gated linear attention
BFLOAT16_MEAN = 2**-7  # of values that are all 1: numerator, normaliser and quotient, each rounded once, and o


def test_the_153_features_of_the_state_have_the_kernel_of_the_papers_273():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 5, 16)).astype(np.float32)
    merged = np.float64(expand(q, 0.25)) @ np.float64(expand(k, 0.25)).T
    paper = np.stack([expand_taylor(a) for a in np.float64(q)]) @ np.stack([expand_taylor(a) for a in np.float64(k)]).T
    s = np.float64(q) @ np.float64(k).T / 4.0
    assert expand(q, 0.25).shape[-1] == 153
    assert len(expand_taylor(np.float64(q[0]))) == 273
    assert_close(paper, 1.0 + s + s**2 / 2.0, 1e-14, "the paper's features")
    assert_close(merged, paper, ORACLE_TOLERANCE, "the state's features")
    specs = mixer_of(TAYLOR).state_specs(TaylorAttention(1, 8), 1, 1, jnp.float32)
    assert specs.sums.shape == (1, 1, 153, 9)


def test_sums_over_chunks_leave_the_own_chunk_out():
    """Three chunks against all weights at once: a sum over chunks that includes its own counts tokens twice."""
    params, x = h.params_of(TAYLOR), h.inputs(1, batch=1, length=LONG)
    y, state = h.forward(TAYLOR)(params, x, h.contiguous(0, LONG, 1))
    p = to_float64(params)
    q, k, v = (np.einsum("td,dhk->htk", np.float64(x[0]), p[name]) for name in ("q", "k", "v"))
    s = np.einsum("hik,hjk->hij", q, k) / np.sqrt(TAYLOR.feature_dim)
    weights = np.tril(1.0 + s + s**2 / 2.0)
    mean = np.einsum("hij,hjv->hiv", weights / weights.sum(-1, keepdims=True), v)
    assert_close(y[0], np.einsum("hiv,hvd->id", mean, p["o"]), ORACLE_TOLERANCE, "y")
    assert_close(state.sums[0, :, -1, :-1], v.sum(1), ORACLE_TOLERANCE, "values")


def test_taylor_state_counts_in_float32():
    """The normaliser of the constant feature is the number of tokens; bfloat16 sums would stop at 256."""
    params, x = h.params_of(TAYLOR), jnp.asarray(h.inputs(2, length=LONG + 1), jnp.bfloat16)
    _, state = h.forward(TAYLOR)(params, x[:, :LONG], h.contiguous(0, LONG))
    np.testing.assert_array_equal(state.sums[:, :, -1, -1], np.full((h.BATCH, 2), LONG))
    _, state = h.forward(TAYLOR)(params, x[:, LONG:], h.contiguous(LONG, 1), state)
    np.testing.assert_array_equal(state.sums[:, :, -1, -1], np.full((h.BATCH, 2), LONG + 1))


def test_hedgehog_state_sums_in_float32():
    params, x = h.params_of(HEDGEHOG), jnp.asarray(h.inputs(3, length=LONG), jnp.bfloat16)
    _, state = h.forward(HEDGEHOG)(params, x, h.contiguous(0, LONG))
    k = jnp.einsum("btd,dhk->bthk", x, params["k"].astype(x.dtype)).repeat(2, axis=2)
    phi = feature_maps.apply(params["k_map"], k, config=HEDGEHOG.feature_map).astype(jnp.bfloat16)
    assert_close(state.sums[..., -1], to_float64(phi).sum(1), ORACLE_TOLERANCE, "normaliser")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("factor", [1.0, 1e3], ids=["soft", "saturated"])
@pytest.mark.parametrize("config", [TAYLOR, HEDGEHOG], ids=["taylor", "hedgehog"])
def test_outputs_are_means_of_values(config, factor, dtype):
    """Values that are all 1 stay 1, also where a query meets none of the keys' features and all weights are tiny."""
    params = dict(h.params_of(config))
    scale = min(factor, 30.0) if config is TAYLOR else factor  # scores to the fourth power of it, in float16's range
    params |= {"q": params["q"] * scale, "k": params["k"] * scale}
    params["v"] = jnp.zeros_like(params["v"]).at[0].set(1.0)
    params["o"] = jnp.zeros_like(params["o"]).at[:, 0, 0].set(0.5)
    x = jnp.asarray(h.inputs(4), dtype).at[..., 0].set(1.0)
    y, _ = h.forward(config)(params, x, h.contiguous(0, h.LENGTH))
    assert y.dtype == dtype
    tolerance = {jnp.float32: FLOAT32_TOLERANCE, jnp.bfloat16: BFLOAT16_MEAN, jnp.float16: 2**-10}[dtype]
    assert_close(y[..., 0], np.ones(y.shape[:2]), tolerance, "mean")


@pytest.mark.parametrize("form", ["joint", "halves"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_maps_are_stable_and_exact(form, scale):
    """Against the exponentials in float64, up to inputs at which exp(u) overflows; gradients stay finite."""
    config = HedgehogMap(form)
    params = redraw(feature_maps.param_specs(config, 3, 4), 5)
    x = scale * np.random.default_rng(6).standard_normal((2, 5, 3, 4)).astype(np.float32)
    phi = feature_maps.apply(params, x, config=config)
    p, expected = to_float64(params), np.zeros(phi.shape)
    for b, t, head in np.ndindex(2, 5, 3):
        expected[b, t, head] = hedgehog_features(config, p, head, np.float64(x[b, t, head]))
    assert phi.dtype == jnp.float32
    assert_close(phi, expected, FLOAT32_TOLERANCE * max(1.0, scale / 10.0), "phi")  # rounding of u grows with u
    assert_close(phi.sum(-1), np.full(phi.shape[:-1], 1.0 if form == "joint" else 2.0), FLOAT32_TOLERANCE, "sum")
    assert float(phi.min()) >= np.float32(config.floor)
    grads = jax.grad(lambda p, x: jnp.sum(jnp.log(feature_maps.apply(p, x, config=config))), argnums=(0, 1))(params, x)
    assert_finite({"params": grads[0], "x": grads[1]})


@pytest.mark.parametrize("form", ["joint", "halves"])
def test_maps_begin_as_the_identity_whose_weights_grow_with_the_score(form):
    config = HedgehogMap(form)
    specs = feature_maps.param_specs(config, 2, 6)
    params = initialise(specs, jax.random.key(0))
    np.testing.assert_array_equal(params["weight"], np.stack([np.eye(6)] * 2))
    np.testing.assert_array_equal(params["bias"], np.zeros((2, 6)))
    q = np.random.default_rng(7).standard_normal((1, 1, 2, 6)).astype(np.float32)
    k = np.linspace(-1.0, 1.0, 9, dtype=np.float32)[None, :, None, None] * q  # scores from -|q|^2 to |q|^2
    phi_q, phi_k = (feature_maps.apply(params, a, config=config) for a in (q, k))
    weights = np.einsum("bihf,bjhf->hj", phi_q, phi_k)
    assert (np.diff(weights, axis=1) > 0).all()


def test_hedgehog_has_the_parameters_of_attention_and_tagged_maps():
    sizes = {"heads": 4, "kv_heads": 2, "head_width": 4, "qkv_bias": True, "out_bias": True}
    ours, theirs = (mixer_of(c).param_specs(c, 16) for c in (Hedgehog(**sizes), Attention(**sizes)))
    assert {p: s.shape for p, s in flatten(theirs).items()} == {
        p: s.shape for p, s in flatten(ours).items() if "_map" not in p
    }
    maps = {path for path, chosen in flatten(tagged(ours, "feature_map")).items() if chosen}
    assert maps == {"q_map/weight", "q_map/bias", "k_map/weight", "k_map/bias"}


@pytest.mark.parametrize("config", [BaseConv(8, bias=False), BaseConv(16, 4, "residual", bias=False)])
def test_convolutions_without_biases(config):
    params, x = h.params_of(config), h.inputs(8)
    assert not [path for path in params if "bias" in path]
    y, _ = h.forward(config)(params, x, h.contiguous(0, h.LENGTH))
    assert_close(y, h.oracle(config, params, x), ORACLE_TOLERANCE, "y")


def test_errors_name_field_and_value():
    with pytest.raises(ValueError, match=r"TaylorAttention.feature_dim must be >= 1, got 0"):
        TaylorAttention(2, 8, 0)
    with pytest.raises(ValueError, match=r"Hedgehog.kv_heads=3 must divide heads=4: one of \[1, 2, 4\]"):
        Hedgehog(4, 3, 8)
    with pytest.raises(ValueError, match=r"HedgehogMap.form='joined' is not supported; did you mean .*joint"):
        HedgehogMap("joined")
    with pytest.raises(ValueError, match=r"HedgehogMap.floor must be in .* got 0"):
        HedgehogMap(floor=0.0)
    with pytest.raises(ValueError, match=r"BaseConv.form='residul' is not supported; did you mean .*residual"):
        BaseConv(8, form="residul")
    with pytest.raises(ValueError, match=r"BaseConv.conv_width must be >= 2, got 1"):
        BaseConv(8, conv_width=1)
    residual = BaseConv(8, form="residual")
    with pytest.raises(ValueError, match=r"BaseConv.inner must be the model's width 16 for form='residual', got 8"):
        mixer_of(residual).param_specs(residual, 16)

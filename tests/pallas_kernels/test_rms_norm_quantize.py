"""RMSNorm with quantisation against a float64 loop, differences, and transformers' fake quantisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.rms_norm_quantize import rms_norm_fake_quantize, rms_norm_quantize
from pallas_kernels.rms_norm_quantize.shapes import MODELS, TINY
from pallas_kernels.static_profile import floors
from pallas_kernels.static_profile.chips import CHIPS
from tests.pallas_kernels.sequences import assert_close

SCALE_TOLERANCE = 5e-7  # float32 sums in another order
ROUNDING_TOLERANCE = 1e-4  # of a step: float32 errors of y / scale, at most 127
GRADIENT_TOLERANCE = 2e-6
BFLOAT16_TOLERANCE = 2.0**-7
IMPLEMENTATIONS = ("reference", "xla")
EPS = 1e-5


def draw(shape, seed=0):
    """Rows of very different magnitude, a row of zeros, gains of either sign."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(shape.rows, shape.width)) * 10.0 ** rng.integers(-4, 5, (shape.rows, 1))
    if shape.rows > 2:
        x[2] = 0
    args = {"x": jnp.asarray(x, shape.dtype)}
    if shape.weighted:
        args["weight"] = jnp.asarray(rng.uniform(0.2, 2, shape.width) * rng.choice([-1, 1], shape.width), jnp.float32)
    return args


def loop(args, eps=EPS):
    """Float64, row by row: (y / scale before it is rounded, scale)."""
    x = np.asarray(args["x"], np.float64)
    weight = np.asarray(args.get("weight", np.ones(x.shape[1])), np.float64)
    exact, scales = [], []
    for row in x:
        y = row / np.sqrt(np.mean(row**2) + eps) * weight
        scale = max(np.max(np.abs(y)), 1e-5) / 127
        exact.append(y / scale)
        scales.append(scale)
    return np.stack(exact), np.array(scales)


def assert_quantized(actual, args, eps=EPS):
    """Values are the nearest integers, scales the loop's."""
    exact, scales = loop(args, eps)
    values = np.asarray(actual.values)
    assert values.dtype == np.int8
    assert actual.scales.dtype == jnp.float32
    np.testing.assert_allclose(actual.scales, scales, rtol=SCALE_TOLERANCE)
    assert np.abs(values - exact).max() <= 0.5 + ROUNDING_TOLERANCE
    assert np.mean(values != np.round(exact)) < 1e-2  # only near half way
    live = scales > 1e-5 / 127
    assert (np.abs(values[live].astype(int)).max(axis=1) == 127).all()


@functools.partial(jax.jit, static_argnames=("implementation", "eps"))
def run(args, implementation="xla", eps=EPS):
    return rms_norm_quantize(**args, eps=eps, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", TINY)
def test_equals_the_loop(name, implementation):
    args = draw(TINY[name])
    assert_quantized(run(args, implementation), args)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_way_rounds_to_even(implementation):
    check_half_way(functools.partial(run, implementation=implementation))


def check_half_way(run):
    """Rows of ones have the norm 1, and a largest weight of 127 makes the scale 1: weights are what is rounded."""
    weight = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -125.5, 0], np.float32)
    out = run({"x": np.ones((3, 10), np.float32), "weight": weight}, eps=1e-30)
    np.testing.assert_array_equal(out.scales, 1)
    np.testing.assert_array_equal(out.values, [[127, 0, 2, 2, 0, -2, -2, 126, -126, 0]] * 3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_are_not_finite_stay_by_themselves(implementation):
    check_spoiled_rows(functools.partial(run, implementation=implementation))


def check_spoiled_rows(run):
    args = draw(TINY["odd"])
    spoiled = np.asarray(args["x"]).copy()
    spoiled[1, 132], spoiled[4, 0], spoiled[5] = np.nan, -np.inf, 1e30
    out, clean = run(args | {"x": spoiled}), run(args)
    bad = np.isin(np.arange(37), [1, 4, 5])
    assert np.isnan(np.asarray(out.scales)[bad]).all()
    assert (np.asarray(out.values)[bad] == 0).all()
    for a, e in zip(out, clean, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[~bad], np.asarray(e)[~bad])
    weight = np.asarray(args["weight"]).copy()
    weight[7] = np.nan
    assert np.isnan(run(args | {"weight": weight}).scales).all()


def _norm(x, weight, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_straight_through_gradient_is_that_of_the_norm(weighted, implementation):
    check_gradient(weighted, implementation)


def check_gradient(weighted, implementation):
    rng = np.random.default_rng(3)
    x, dout = rng.normal(size=(2, 5, 13))
    weight = rng.uniform(0.5, 2, 13)
    arrays = (x, weight)[: 1 + weighted]
    single = tuple(np.float32(a) for a in arrays)
    op = functools.partial(rms_norm_fake_quantize, eps=EPS, implementation=implementation)

    @jax.jit
    def both(dout, *single):
        out, pullback = jax.vjp(lambda *a: op(*a), *single)
        return out, pullback(dout), rms_norm_quantize(*single, eps=EPS, implementation=implementation)

    out, gradients, q = both(np.float32(dout), *single)
    np.testing.assert_array_equal(out, q.values.astype(np.float32) * q.scales[:, None])

    def value(*arrays):
        return np.sum(_norm(arrays[0], arrays[1] if weighted else 1.0, EPS) * dout)

    for i, gradient in enumerate(gradients):
        expected = np.zeros(arrays[i].shape)
        for index in np.ndindex(expected.shape):
            step = np.zeros(expected.shape)
            step[index] = 1e-5
            ends = [value(*(a + s * step if j == i else a for j, a in enumerate(arrays))) for s in (1, -1)]
            expected[index] = (ends[0] - ends[1]) / 2e-5
        assert_close(gradient, expected, GRADIENT_TOLERANCE)


def test_a_row_without_cotangent_takes_no_part_even_if_it_is_not_finite():
    args = draw(TINY["odd"])
    x, weight = np.asarray(args["x"]), args["weight"]
    dout = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    dout[4] = 0
    spoiled = x.copy()
    spoiled[4] = np.nan
    pull = jax.jit(lambda x, weight, dout: jax.vjp(rms_norm_fake_quantize, x, weight)[1](dout))
    gradients = [pull(v, weight, dout) for v in (x, spoiled)]
    jax.tree.map(np.testing.assert_array_equal, *gradients)
    assert (np.asarray(gradients[1][0])[4] == 0).all()


def test_fake_quantisation_of_transformers():
    torch = pytest.importorskip("torch")
    torch._dynamo.config.disable = True
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    rng = np.random.default_rng(0)
    x, dout = rng.normal(size=(2, 9, 96)).astype(np.float32)
    weight = rng.uniform(0.5, 2, 96).astype(np.float32)
    norm = modeling.LlamaRMSNorm(96, eps=1e-6)
    norm.weight.data.copy_(torch.from_numpy(weight))
    leaf = torch.from_numpy(x).requires_grad_()
    expected = bitnet.ActQuant.apply(norm(leaf))
    expected.backward(torch.from_numpy(dout))
    out, pullback = jax.vjp(rms_norm_fake_quantize, x, weight)
    assert_close(out, expected.detach().numpy(), GRADIENT_TOLERANCE)
    assert_close(pullback(dout), (leaf.grad.numpy(), norm.weight.grad.numpy()), GRADIENT_TOLERANCE)


def test_bfloat16_in_and_out():
    args = draw(TINY["bfloat16"])
    args = {n: a.astype(jnp.bfloat16) for n, a in args.items()}
    wide = {n: a.astype(jnp.float32) for n, a in args.items()}
    dout = jnp.asarray(np.random.default_rng(1).normal(size=args["x"].shape), jnp.bfloat16)
    keep = np.arange(33) != 2  # a row of zeros has gradients of 1 / sqrt(eps)
    dout = jnp.where(keep[:, None], dout, 0)

    @jax.jit
    def both(args, dout):
        out, pullback = jax.vjp(lambda a: rms_norm_fake_quantize(**a), args)
        return out, pullback(dout)[0]

    out, gradients = both(args, dout)
    expected, wide_gradients = both(wide, dout.astype(jnp.float32))
    assert {a.dtype for a in (out, *gradients.values())} == {jnp.dtype(jnp.bfloat16)}
    assert_close(out, expected, BFLOAT16_TOLERANCE)
    assert_close(gradients, wide_gradients, BFLOAT16_TOLERANCE)


def test_transformations():
    check_transformations("xla")


def check_transformations(implementation):
    args = draw(TINY["odd"])
    x, weight = args["x"] / 100, args["weight"]
    dout = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def every(implementation, x, weight, dout):
        op = functools.partial(rms_norm_fake_quantize, implementation=implementation)

        def loss(x, weight):
            return jnp.sum(jax.checkpoint(op)(x, weight) * dout)

        def layers(x, weight):
            return jnp.sum(jax.lax.scan(lambda x, s: (x + s * op(x, weight), None), x, jnp.array([1.0, 0.5]))[0] * dout)

        mapped = jax.vmap(functools.partial(rms_norm_quantize, implementation=implementation), (0, None))
        gradients = [jax.grad(f, (0, 1))(x, weight) for f in (loss, layers)]
        return mapped(jnp.stack([x, 0.5 * x]), weight), gradients

    (values, scales), gradients = every(implementation, x, weight, dout)
    (expected, expected_scales), expected_gradients = every("reference", x, weight, dout)
    assert np.abs(np.asarray(values, int) - np.asarray(expected, int)).max() <= 1
    assert np.mean(np.asarray(values) != np.asarray(expected)) < 1e-3
    np.testing.assert_allclose(scales, expected_scales, rtol=SCALE_TOLERANCE)
    assert_close(gradients[0], expected_gradients[0], GRADIENT_TOLERANCE)
    # A value that rounds the other way moves the second layer by a step of 1 / 127.
    assert_close(gradients[1], expected_gradients[1], 1e-3)


def test_the_integers_are_not_differentiable():
    with pytest.raises(TypeError, match="train with rms_norm_fake_quantize"):
        jax.grad(lambda x: jnp.sum(rms_norm_quantize(x).scales))(np.ones((2, 3), np.float32))


@pytest.mark.parametrize("op", [rms_norm_quantize, rms_norm_fake_quantize])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": None}, r"x must be an array \[M, D\], got None"),
        ({"x": np.ones(3, np.float32)}, r"x must have shape \[M, D\], got \(3,\)"),
        ({"x": np.ones((2, 3), np.int8)}, "x must have dtype float32 or bfloat16 or float16, got int8"),
        ({"x": np.ones((0, 3), np.float32)}, "x must have at least one row and one column"),
        ({"weight": np.ones(4, np.float32)}, r"weight must have shape \[D=3\], got \(4,\)"),
        ({"weight": np.ones(3, np.int32)}, "weight must have dtype"),
        ({"eps": 0.0}, "eps must be a finite number > 0, got 0.0"),
        ({"eps": float("nan")}, "eps must be a finite number > 0, got nan"),
        ({"eps": True}, "eps must be a finite number > 0, got True"),
        ({"implementation": "xls"}, "did you mean 'xla'"),
    ],
)
def test_bad_arguments_raise(op, arguments, words):
    with pytest.raises(ValueError, match=words):
        op(**({"x": np.ones((2, 3), np.float32)} | arguments))


def test_unknown_implementations_raise():
    with pytest.raises(UnsupportedError, match="has no 'mosaic_gpu'"):
        rms_norm_quantize(np.ones((2, 3), np.float32), implementation="mosaic_gpu")


def test_published_shapes_are_consistent():
    for shape in (MODELS | TINY).values():
        out = jax.eval_shape(lambda a, shape=shape: rms_norm_quantize(**a, **shape.options()), shape.arrays())
        assert (out.values.shape, out.scales.shape) == ((shape.rows, shape.width), (shape.rows,))


def test_floor():
    chip = CHIPS["v5e"]
    floor = floors.rms_norm_quantize(MODELS["bitnet_2b4t_prefill"], chip)
    assert max(floor, key=floor.__getitem__) == "hbm"
    assert floor["hbm"] == pytest.approx(chip.hbm_cycles(2048 * 2560 * 3 + 2560 * 4 + 2048 * 4))

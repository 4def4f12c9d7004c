"""Ternary products against integer NumPy, layouts against loops over their definitions and transformers' BitNet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.static_profile import floors
from pallas_kernels.static_profile.chips import CHIPS
from pallas_kernels.ternary_matmul import LAYOUTS, pack, packing, repack, ternary_matmul, unpack
from pallas_kernels.ternary_matmul.shapes import MODELS, TINY, TernaryShape
from tests.pallas_kernels.sequences import assert_close

FLOAT_TOLERANCE = 3e-7  # three float32 roundings
GRADIENT_TOLERANCE = 2e-6  # sums of float32
CHAIN_TOLERANCE = 2e-6
IMPLEMENTATIONS = ("reference", "xla")
SIZES = {"hf": (36, 13), "i2_s": (5, 384), "w2a8": (48, 96), "i2_s_columns": (5, 384)}  # N, K


def draw_weights(outputs, inputs, seed=0):
    return np.random.default_rng(seed).integers(-1, 2, (outputs, inputs)).astype(np.int8)


def draw(shape, seed=0):
    """Random arguments; bytes hold all four codes, activations the whole of int8."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, array in shape.arrays().items():
        if array.dtype == jnp.int8:
            arrays[name] = rng.integers(-128, 128, array.shape).astype(np.int8)
        elif array.dtype == jnp.uint8:
            arrays[name] = rng.integers(0, 256, array.shape).astype(np.uint8)
        else:
            arrays[name] = rng.uniform(0.1, 2.0, array.shape).astype(np.float32)
    return arrays


def product(x, w, layout):
    """Integer accumulators of bytes that are read code by code."""
    return x.astype(np.int64) @ loop_unpack(w, layout).astype(np.int64).T


def place(layout, n, k, outputs, inputs):
    """(row, column, lowest bit) of weight (n, k), from the definitions of the layouts."""
    if layout == "hf":
        return n % (outputs // 4), k, 2 * (n // (outputs // 4))
    if layout in ("i2_s", "i2_s_columns"):
        row, column = n, 32 * (k // 128) + k % 32
        return *((row, column) if layout == "i2_s" else (column, row)), 6 - 2 * (k % 128 // 32)
    # Tiles of 16 x 32 lie one after another; a thread t of 32 owns four bytes of one, for 16 columns of one row:
    # row 8 (t // 16) + t % 8, columns from 16 ((t % 16) // 8). Its code c is in byte c % 4 at bits 2 (c // 4).
    tile = (n // 16) * (inputs // 32) + k // 32
    row, column = n % 16, k % 32
    thread = 16 * (row // 8) + 8 * (column // 16) + row % 8
    byte = 128 * tile + 4 * thread + column % 4
    return byte // (inputs // 4), byte % (inputs // 4), 2 * (column % 16 // 4)


def loop_pack(w, layout):
    packed = np.zeros(LAYOUTS[layout].shape(*w.shape), np.uint8)
    for n in range(w.shape[0]):
        for k in range(w.shape[1]):
            row, column, bit = place(layout, n, k, *w.shape)
            packed[row, column] |= (w[n, k] + (2 if layout == "w2a8" else 1)) << bit
    return packed


def loop_unpack(packed, layout):
    outputs, inputs = LAYOUTS[layout].sizes(packed.shape)
    w = np.zeros((outputs, inputs), np.int8)
    for n in range(outputs):
        for k in range(inputs):
            row, column, bit = place(layout, n, k, outputs, inputs)
            code = packed[row, column] >> bit & 3
            w[n, k] = {0: 0, 1: -1, 2: 0, 3: 1}[code] if layout == "w2a8" else {0: -1, 1: 0, 2: 1, 3: 0}[code]
    return w


@functools.partial(jax.jit, static_argnames=("implementation", "layout", "dtype"))
def run(args, implementation="xla", **options):
    return ternary_matmul(**args, **options, implementation=implementation)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_their_definitions(layout):
    w = draw_weights(*SIZES[layout])
    packed = pack(w, layout)
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed, loop_pack(w, layout))
    np.testing.assert_array_equal(unpack(packed, layout), w)
    np.testing.assert_array_equal(jax.jit(lambda w: unpack(pack(w, layout), layout))(w), w)
    anything = np.random.default_rng(1).integers(0, 256, packed.shape).astype(np.uint8)
    np.testing.assert_array_equal(unpack(anything, layout), loop_unpack(anything, layout))
    assert LAYOUTS[layout].sizes(packed.shape) == w.shape


def test_a_known_byte_of_each_layout():
    """Weights -1, 0, 1, 1 share a byte of codes 0, 1, 2, 2 or, where codes are w + 2, of 1, 2, 3, 3."""
    w = np.zeros((16, 128), np.int8)
    w[[0, 4, 8, 12], 0] = [-1, 0, 1, 1]
    assert pack(w, "hf")[0, 0] == 0b10_10_01_00
    w = np.zeros((16, 128), np.int8)
    w[0, [0, 32, 64, 96]] = [-1, 0, 1, 1]
    assert pack(w, "i2_s")[0, 0] == pack(w, "i2_s_columns")[0, 0] == 0b00_01_10_10
    w = np.zeros((16, 128), np.int8)
    w[0, [0, 4, 8, 12]] = [-1, 0, 1, 1]
    assert pack(w, "w2a8")[0, 0] == 0b11_11_10_01


def test_every_layout_repacks_to_every_other():
    w = draw_weights(48, 256)
    for source in LAYOUTS:
        for target in LAYOUTS:
            np.testing.assert_array_equal(repack(pack(w, source), source, target), pack(w, target))


def test_hf_layout_is_that_of_transformers():
    torch, bitnet = _bitnet()
    w = draw_weights(36, 13)
    packed = bitnet.pack_weights(torch.from_numpy(w.copy())).numpy()
    np.testing.assert_array_equal(pack(w, "hf"), packed)
    np.testing.assert_array_equal(bitnet.unpack_weights(torch.from_numpy(packed), torch.int8).numpy(), w)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", TINY)
def test_equals_integer_numpy(name, implementation):
    shape = TINY[name]
    args = draw(shape)
    expected = product(args["x"], args["w"], shape.layout)
    integers = run({n: args[n] for n in ("x", "w")}, implementation, layout=shape.layout)
    assert integers.dtype == jnp.int32
    np.testing.assert_array_equal(integers, expected)
    if shape.scaled:
        actual = run(args, implementation, **shape.options())
        assert actual.dtype == shape.dtype
        exact = expected * (args["x_scale"].astype(np.float64)[:, None] * args["w_scale"])
        tolerance = 2.0**-8 if shape.dtype == jnp.bfloat16 else FLOAT_TOLERANCE
        np.testing.assert_allclose(np.asarray(actual, np.float64), exact, rtol=tolerance)
        np.testing.assert_array_equal(actual, run(args, "reference", **shape.options()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_may_be_constants_of_the_program(layout, implementation):
    outputs, inputs = SIZES[layout]
    args = draw(TernaryShape(3, inputs, outputs, layout, scaled=False))
    constant = jax.jit(lambda x: ternary_matmul(x, args["w"], layout=layout, implementation=implementation))
    np.testing.assert_array_equal(constant(args["x"]), product(**args, layout=layout))


def test_sums_are_integers_where_float32_is_not():
    inputs = 2**17 + 128
    x = np.full((1, inputs), -128, np.int8)
    x[0, 0] = 1
    w = pack(np.full((1, inputs), -1, np.int8), "i2_s_columns")
    assert run({"x": x, "w": w}) == 128 * (inputs - 1) - 1 > 2**24


def test_scales_have_gradients_and_integers_have_none():
    shape = TINY["odd"]
    args = draw(shape)
    dy = np.random.default_rng(1).normal(size=(shape.rows, shape.outputs)).astype(np.float32)
    total = product(args["x"], args["w"], shape.layout).astype(np.float64)
    for w_scale in (args["w_scale"], args["w_scale"][3]):
        expected = np.sum(dy * total * w_scale, axis=1), np.sum(dy * total * args["x_scale"][:, None], axis=0)
        for implementation in IMPLEMENTATIONS:

            def loss(x_scale, w_scale, implementation=implementation):
                return jnp.sum(
                    ternary_matmul(args["x"], args["w"], x_scale, w_scale, implementation=implementation) * dy
                )

            dx_scale, dw_scale = jax.jit(jax.grad(loss, argnums=(0, 1)))(args["x_scale"], w_scale)
            assert_close(dx_scale, expected[0], GRADIENT_TOLERANCE)
            assert_close(dw_scale, expected[1] if w_scale.ndim else expected[1].sum(), GRADIENT_TOLERANCE)


def test_linear_layer_of_transformers():
    """A packed BitLinear with its norm: RMSNorm, quantisation, product, scale."""
    from pallas_kernels.rms_norm_quantize import rms_norm_quantize

    torch, bitnet = _bitnet()
    rng = np.random.default_rng(0)
    w = draw_weights(64, 256)
    layer = bitnet.BitLinear(256, 64, bias=False, dtype=torch.float32, use_rms_norm=True, rms_norm_eps=1e-5)
    layer.weight.copy_(bitnet.pack_weights(torch.from_numpy(w.copy())))
    layer.weight_scale.fill_(1 / 0.37)  # this class divides by it
    gain = rng.uniform(0.5, 2, 256).astype(np.float32)
    layer.rms_norm.weight.data.copy_(torch.from_numpy(gain))
    x = rng.normal(size=(9, 256)).astype(np.float32)
    with torch.no_grad():
        expected = layer(torch.from_numpy(x)).numpy()
    packed = repack(layer.weight.numpy(), "hf", "i2_s_columns")
    q = rms_norm_quantize(x, gain, eps=1e-5)
    assert_close(ternary_matmul(q.values, packed, q.scales, jnp.float32(0.37)), expected, CHAIN_TOLERANCE)


def _bitnet():
    torch = pytest.importorskip("torch")
    torch._dynamo.config.disable = True
    return torch, pytest.importorskip("transformers.integrations.bitnet")


GOOD = {"x": np.zeros((3, 256), np.int8), "w": np.zeros((64, 5), np.uint8)}
SCALES = {"x_scale": np.ones(3, np.float32), "w_scale": np.ones(5, np.float32)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": None}, r"x must be an array \[M, K\], got None"),
        ({"x": np.zeros((3, 256), np.float32)}, "x must have dtype int8, got float32"),
        ({"x": np.zeros((3, 256), np.uint8)}, "x must have dtype int8, got uint8"),
        ({"x": np.zeros((3, 128), np.int8)}, r"x must have shape \[M, K=256\], got \(3, 128\)"),
        ({"x": np.zeros((0, 256), np.int8)}, "x must have at least one row"),
        ({"x": np.zeros(256, np.int8)}, r"x must have shape \[M, K=256\], got \(256,\)"),
        ({"w": np.zeros((64, 5), np.int8)}, "w must be a uint8 matrix in layout 'i2_s_columns', got int8"),
        ({"w": np.zeros(64, np.uint8)}, "w must be a uint8 matrix"),
        ({"w": None}, "w must be a uint8 matrix in layout 'i2_s_columns', got NoneType"),
        ({"w": np.zeros((65, 5), np.uint8)}, r"w \(65, 5\): .* K in multiples of 128, got K=260; .* to K=384"),
        ({"w": np.zeros((0, 5), np.uint8)}, "K in multiples of 128, got K=0"),
        ({"w": np.zeros((5, 60), np.uint8), "layout": "i2_s"}, "K in multiples of 128, got K=240"),
        ({"w": np.zeros((5, 64), np.uint8), "layout": "w2a8"}, "N in multiples of 16, got N=5; .* to N=16"),
        ({"layout": "i2s"}, "layout must be one of .* got 'i2s'; did you mean 'i2_s'"),
        ({"x_scale": np.ones(3, np.float32)}, "w_scale is None and the other scale is not"),
        ({"w_scale": np.ones((), np.float32)}, "x_scale is None and the other scale is not"),
        (SCALES | {"x_scale": np.ones((3, 1), np.float32)}, r"x_scale must have shape \[M=3\], got \(3, 1\)"),
        (SCALES | {"x_scale": np.ones(5, np.float32)}, r"x_scale must have shape \[M=3\], got \(5,\)"),
        (SCALES | {"x_scale": np.ones(3, np.float16)}, "x_scale must have dtype float32, got float16"),
        (SCALES | {"w_scale": np.ones(3, np.float32)}, r"w_scale must have shape \[N=5\], got \(3,\)"),
        (SCALES | {"w_scale": np.ones(1, np.float32)}, r"w_scale must have shape \[N=5\], got \(1,\)"),
        (SCALES | {"w_scale": 1.0}, r"w_scale must be an array"),
        (SCALES | {"dtype": "int32"}, "dtype must be float32 or bfloat16 or float16, got int32"),
        ({"dtype": "float32"}, "dtype must be None for int32 accumulators"),
        ({"implementation": "mosaic"}, "did you mean 'mosaic"),
    ],
)
def test_bad_arguments_raise(arguments, words):
    with pytest.raises(ValueError, match=words):
        ternary_matmul(**(GOOD | arguments))


def test_sums_that_might_overflow_raise():
    inputs = 2**24  # 128 times as much is 2^31
    x, w = jax.ShapeDtypeStruct((1, inputs), jnp.int8), jax.ShapeDtypeStruct((inputs // 4, 1), jnp.uint8)
    with pytest.raises(ValueError, match=f"x has K={inputs}; int32 sums are safe up to K=16777215"):
        jax.eval_shape(ternary_matmul, x, w)


def test_bad_packing_raises():
    with pytest.raises(ValueError, match=r"weights must be int8 \[N, K\], got float32"):
        pack(np.zeros((4, 128), np.float32), "hf")
    with pytest.raises(ValueError, match=r"weights must be -1, 0 and 1 alone, got \[-2, 3\]"):
        pack(np.array([[3], [0], [1], [-2]], np.int8), "hf")
    for layout, size in (("hf", (5, 128)), ("i2_s", (4, 130)), ("w2a8", (16, 48)), ("i2_s_columns", (4, 64))):
        with pytest.raises(ValueError, match="in multiples of"):
            pack(np.zeros(size, np.int8), layout)
    with pytest.raises(ValueError, match="unpack: packed must be a uint8 matrix"):
        unpack(np.zeros((4, 128), np.int8), "hf")
    with pytest.raises(ValueError, match="layout must be one of"):
        unpack(np.zeros((4, 128), np.uint8), "gguf")
    packed = pack(draw_weights(16, 128), "w2a8")
    with pytest.raises(ValueError, match="holds the code 3, no weight of layout 'i2_s'; is it of another"):
        repack(packed, "i2_s", "i2_s_columns")
    with pytest.raises(ValueError, match="repack: layout 'w2a8' packs N in multiples of 16"):
        repack(pack(draw_weights(4, 128), "hf"), "hf", "w2a8")


def test_published_shapes_are_consistent():
    for shape in (MODELS | TINY).values():
        out = jax.eval_shape(lambda a, shape=shape: ternary_matmul(**a, **shape.options()), shape.arrays())
        assert out.shape == (shape.rows, shape.outputs)
        assert packing.LAYOUTS[shape.layout].sizes(shape.arrays()["w"].shape) == (shape.outputs, shape.inputs)


def test_floor():
    chip = CHIPS["v5e"]
    decode = floors.ternary_matmul(MODELS["bitnet_2b4t_up_decode"], chip)
    size = 2560 * 6912 // 4 + 2560 + 4 + 4 + 6912 * 2
    assert max(decode, key=decode.__getitem__) == "hbm"
    assert decode["hbm"] == pytest.approx(chip.hbm_cycles(size))
    prefill = floors.ternary_matmul(MODELS["bitnet_2b4t_up_prefill"], chip)
    assert max(prefill, key=prefill.__getitem__) == "mxu"
    assert prefill["mxu"] / chip.clock == pytest.approx(2 * 2048 * 2560 * 6912 / 393e12, rel=2e-3)

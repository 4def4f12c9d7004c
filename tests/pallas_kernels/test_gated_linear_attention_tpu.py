"""The TPU kernels of gated linear attention, interpreted against float64 loops, and compiled without the chip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.gated_linear_attention import (
    gated_linear_attention,
    mosaic_tpu,
    mosaic_tpu_backward,
    mosaic_tpu_layout,
    xla,
)
from pallas_kernels.gated_linear_attention.mosaic_tpu_layout import CHUNK, Layout
from pallas_kernels.gated_linear_attention.shapes import MODELS, TINY
from pallas_kernels.interpret import interpret
from tests.pallas_kernels.sequences import LAYOUTS, assert_close, masks
from tests.pallas_kernels.test_gated_linear_attention import (
    BFLOAT16_TOLERANCE,
    DECAYS,
    DIFFERENTIABLE,
    GRADIENT_TOLERANCE,
    VALUE_TOLERANCE,
    by_token,
    draw,
    draw_cotangents,
    loop,
    loop_backward,
)
from tests.pallas_kernels.tpu import compile_op, count_kernels, simulate

BFLOAT16_STATE_TOLERANCE = 2.0**-7  # what enters a state is rounded for the matrix unit
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiles in half the time


@functools.partial(jax.jit, static_argnames=("scale", "chunk_size"), compiler_options=QUICK)
def run_and_pull(args, cotangents, reset=None, valid=None, **options):
    """Outputs and the gradients of all arguments."""

    def run(args):
        return gated_linear_attention(**args, reset=reset, valid=valid, implementation="mosaic_tpu", **options)

    out, pullback = jax.vjp(run, args)
    return out, pullback(cotangents)[0]


def check(args, reset=None, valid=None, tolerances=(VALUE_TOLERANCE, GRADIENT_TOLERANCE), **options):
    """Values and every gradient equal the float64 loops; padding is poisoned."""
    cotangents = draw_cotangents(args)
    scale = options.get("scale")
    expected, gradients = loop(args, reset, valid, scale), loop_backward(args, cotangents, reset, valid, scale)
    poisoned, dy = args, cotangents[0]
    if valid is not None:
        poisoned = {n: None if a is None else a.copy() for n, a in args.items()}
        for name in by_token(args):
            poisoned[name][~valid] = np.nan
        dy = np.where(valid[..., None, None], dy, np.nan)
    out, actual = run_and_pull(poisoned, (dy, cotangents[1]), reset, valid, **options)
    assert_close(out, expected, tolerances[0])
    for name in DIFFERENTIABLE:
        assert (actual[name] is None) == (gradients[name] is None), name
        assert_close(actual[name], gradients[name], tolerances[1], name)
        if actual[name] is not None:
            assert actual[name].dtype == args[name].dtype
    if valid is not None:
        assert (np.asarray(out[0])[~valid] == 0).all()
        assert all((np.asarray(actual[name])[~valid] == 0).all() for name in by_token(args))


@pytest.mark.parametrize(
    ("decay", "length"),
    [("none", CHUNK + 3), ("constant", CHUNK + 1), ("head", 1), ("channel", 1)]
    + [(decay, length) for decay in ("head", "channel") for length in (CHUNK - 1, CHUNK, 2 * CHUNK + 7)],
)
def test_any_length(decay, length):
    with interpret():
        check(draw(decay, 1, length, seed=length))


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_and_poisoned_padding(layout, decay):
    with interpret():
        check(draw(decay, 3, CHUNK + 5, seed=7), *masks(layout, 3, CHUNK + 5))


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_extreme_decays_are_finite_and_exact(decay):
    """Decays of e^-80 beside 1 and 1 - 1e-6: nothing overflows, and no sum of 80s swallows the 1e-6."""
    args = draw(decay, 1, CHUNK + 1, seed=11)
    shape, rng = args["log_decay"].shape, np.random.default_rng(12)
    mixes = ([-80.0, 0.0, -1e-6, -3.0], [-np.inf, -0.1], [-80.0], [0.0], [-1e-6])
    with interpret():
        for mix in mixes:
            check(args | {"log_decay": rng.choice(mix, size=shape).astype(np.float32)})


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_a_reset_drops_even_a_state_that_is_not_finite(decay):
    args = draw(decay, 1, 9)
    args["state"][:] = np.nan
    reset = np.arange(9)[None] == 3
    (dy, dstate), fresh = draw_cotangents(args), {n: args[n][:, 3:] for n in by_token(args)}
    expected = loop(args | fresh | {"state": None})
    gradients = loop_backward(args | fresh | {"state": None}, (dy[:, 3:], dstate))
    with interpret():
        out, actual = run_and_pull(args, (np.where(reset.cumsum(1)[..., None, None] > 0, dy, 0), dstate), reset)
    assert_close((out[0][:, 3:], out[1]), expected, VALUE_TOLERANCE)
    for name in ("q", "v"):
        assert_close(actual[name][:, 3:], gradients[name], GRADIENT_TOLERANCE, name)


@pytest.mark.parametrize(
    ("decay", "sizes", "scale"),
    [
        ("head", {"heads": 4, "groups": 1, "key": 8, "value": 64}, 1.0),  # two heads side by side, in two steps
        ("head", {"heads": 3, "groups": 1, "key": 4, "value": 6}, -0.7),
        pytest.param("constant", {"heads": 2, "groups": 2, "key": 130, "value": 140}, None, marks=pytest.mark.slow),
        ("channel", {"heads": 4, "groups": 1, "key": 130, "value": 70}, -0.7),
    ],
)
def test_widths_groups_scale_and_no_state(monkeypatch, decay, sizes, scale):
    monkeypatch.setattr(mosaic_tpu_layout, "MAX_LANES", 128)
    args = draw(decay, 1, CHUNK + 3, **sizes) | {"state": None}
    with interpret():
        check(args, scale=scale)


@pytest.mark.slow
def test_a_loop_over_heads_in_several_steps(monkeypatch):
    monkeypatch.setattr(mosaic_tpu_layout, "MAX_LANES", 128)
    monkeypatch.setattr(mosaic_tpu_backward, "UNROLL", 1)
    with interpret():
        check(draw("head", 1, CHUNK + 3, heads=8, groups=1))


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_gradients_do_not_meet_across_documents_not_even_by_rounding(decay):
    args, reset = draw(decay, 1, 90), np.isin(np.arange(90), (20, 70))[None]
    dy, dstate = draw_cotangents(args)
    other = ~((np.arange(90) >= 20) & (np.arange(90) < 70))
    dy[:, other] = 0
    with interpret():
        _, gradients = run_and_pull(args, (dy, 0 * dstate), reset)
    for name in by_token(args):
        assert (np.asarray(gradients[name])[:, other] == 0).all(), name
        assert (np.asarray(gradients[name])[:, ~other] != 0).any(), name
    assert (np.asarray(gradients["state"]) == 0).all()


@pytest.mark.parametrize("decay", [pytest.param("head", marks=pytest.mark.slow), "channel"])
def test_no_races_and_no_memory_read_before_it_is_written(monkeypatch, decay):
    monkeypatch.setattr(mosaic_tpu_layout, "MAX_LANES", 128)
    with simulate():
        check(draw(decay, 1, CHUNK + 5, heads=2, groups=1), *masks("packed", 1, CHUNK + 5))


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_bfloat16_inputs_with_float32_state_and_no_races(decay):
    args = draw(decay, 2, CHUNK + 1, key=16, value=8)
    half = {n: a if n == "state" else jnp.asarray(a, jnp.bfloat16) for n, a in args.items()}
    rounded = {n: np.asarray(a, np.float32) for n, a in half.items()}
    dy, dstate = draw_cotangents(args)
    dy = jnp.asarray(dy, jnp.bfloat16)
    expected, gradients = loop(rounded), loop_backward(rounded, (np.asarray(dy, np.float32), dstate))
    with simulate():
        (y, state), actual = run_and_pull(half, (dy, dstate))
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(y, expected[0], BFLOAT16_TOLERANCE)
    assert_close(state, expected[1], BFLOAT16_STATE_TOLERANCE)
    for name in DIFFERENTIABLE:
        assert actual[name].dtype == half[name].dtype, name
        assert_close(actual[name], gradients[name], BFLOAT16_TOLERANCE, name)


@pytest.mark.parametrize("decay", [pytest.param("head", marks=pytest.mark.slow), "channel"])
def test_vmap_scan_checkpoint_and_two_calls_of_one_program(decay):
    """Each row alone, through two layers of a scan whose body is recomputed, and once more outside of it."""
    args = draw(decay, 2, 20)
    state, scales = args.pop("state"), jnp.asarray([0.5, 0.8])
    arrays = jax.tree.map(lambda a: np.stack([a, 0.5 * a]), args)

    def loss(implementation, args):
        call = functools.partial(gated_linear_attention, implementation=implementation)

        @jax.checkpoint
        def layer(v, scale):
            return v + call(**args | {"v": v * scale}, state=state)[0], None

        return jnp.sum(call(**args | {"v": jax.lax.scan(layer, args["v"], scales)[0]})[0] ** 2)

    def gradients(implementation):
        fn = jax.vmap(jax.grad(functools.partial(loss, implementation)))
        return jax.jit(fn, compiler_options=QUICK)(arrays)

    with interpret():
        actual = gradients("mosaic_tpu")
    assert_close(actual, gradients("reference"), GRADIENT_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
def test_either_forward_saves_the_same_states(decay):
    args = draw(decay, 2, 2 * CHUNK + 5)
    arrays = (*args.values(), *masks("between", 2, 2 * CHUNK + 5))
    arrays = (*(args[n] for n in DIFFERENTIABLE), *arrays[-2:])
    for chunk_size in (CHUNK, 2 * CHUNK):
        options = {"scale": 0.3, "chunk_size": chunk_size, "save": True}
        ours = jax.jit(lambda o=options: xla.forward(*arrays, **o), compiler_options=QUICK)()
        with interpret():
            theirs = jax.jit(lambda o=options: mosaic_tpu.forward(*arrays, **o), compiler_options=QUICK)()
        assert_close(theirs, ours, VALUE_TOLERANCE)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"q": np.ones((1, 200, 2, 5), np.float16)}, {}, "does not support q in float16"),
        ({"log_decay": np.zeros((1, 200, 4), np.float16)}, {}, "does not support log_decay in float16"),
        ({}, {"chunk_size": 96}, "chunk_size=96 for T=200: it must be a multiple of 128, or T at least"),
        ({n: np.ones((1, 200, 2, 513), np.float32) for n in ("q", "k")} | {"state": None}, {}, "widths K=513, V=3"),
    ],
)
def test_what_is_not_honoured_raises(change, options, words):
    with pytest.raises(UnsupportedError, match=f"gated_linear_attention: mosaic_tpu .*{words}"):
        gated_linear_attention(**(draw("head", 1, 200) | change), **options, implementation="mosaic_tpu")


def test_a_backward_pass_from_fewer_states_raises():
    args = draw("head", 1, 200)
    with interpret(), pytest.raises(UnsupportedError, match="chunk_size=200 backward"):
        jax.eval_shape(functools.partial(run_and_pull, chunk_size=512), args, draw_cotangents(args))


def test_the_layout_fills_registers_and_fits_memory():
    for ratio, key, value, groups in (
        (80, 128, 64, 1),
        (3, 8, 64, 2),
        (1, 256, 512, 4),
        (16, 273, 112, 1),
        (7, 1, 1, 1),
    ):
        lay = Layout(1000, groups, ratio, key, value, CHUNK)
        assert lay.ratio % lay.heads == 0
        assert lay.lanes % 128 == lay.keys % 128 == 0
        assert lay.lanes <= mosaic_tpu_layout.MAX_LANES
        assert key <= lay.keys < key + 128
        assert value <= lay.values < value + 128
        assert lay.time == 1024
    assert Layout(8192, 1, 80, 128, 64, CHUNK).heads == 40
    assert Layout(2048, 4, 1, 256, 512, CHUNK).heads == 1


@pytest.mark.parametrize("shape", [TINY["packed"], MODELS["mamba2_130m"]], ids=["tiny", "mamba2_130m"])
def test_compiles_for_v5e(shape):
    assert count_kernels(compile_op("v5e", gated_linear_attention, shape)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e"])
def test_compiles_every_shape(kind):
    for name, shape in {**MODELS, **TINY}.items():
        kernels = count_kernels(compile_op(kind, gated_linear_attention, shape))
        assert kernels == (2 if shape.time > 1 else 0), name

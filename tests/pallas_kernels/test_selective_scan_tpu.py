"""The TPU kernels of the selective scan: interpreted numerics, races, and compilation without the chip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.interpret import interpret
from pallas_kernels.selective_scan import mosaic_tpu, mosaic_tpu_backward, selective_scan, xla
from pallas_kernels.selective_scan.shapes import MODELS, TINY
from tests.pallas_kernels.sequences import LAYOUTS, assert_close, masks
from tests.pallas_kernels.test_selective_scan import DIFFERENTIABLE, draw, draw_cotangents, draw_extreme, loop
from tests.pallas_kernels.tpu import compile_op, count_kernels, simulate

VALUE_TOLERANCE = 2e-6  # float32, relative to the largest magnitude
GRADIENT_TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 2.0**-7  # outputs and gradients are rounded to 8 bits of mantissa once
SOFTPLUS_TOLERANCE = 4e-4  # of steps in bfloat16, which are rounded to 4e-3
CHUNK = 8
TOKENS = ("x", "dt", "B", "C", "z")


def quick_options() -> dict[str, bool | int]:
    """Compiler options for long programs that run once, such as interpreted kernels; not every XLA knows them all."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        del options["xla_cpu_use_fusion_emitters"]
    return options


QUICK = quick_options()


@pytest.fixture
def looped(monkeypatch):
    """Loops over state indices that are unrolled otherwise: interpreted, the unrolled kernels take long to compile."""
    monkeypatch.setattr(mosaic_tpu, "STATES_UNROLLED", 1)


@functools.partial(jax.jit, static_argnames=("implementation", "dt_softplus", "chunk_size"), compiler_options=QUICK)
def run_and_pull(args, cotangents, reset=None, valid=None, implementation="mosaic_tpu", **options):
    """Outputs and the gradients of all arguments."""
    options = {"dt_softplus": True, "chunk_size": CHUNK} | options
    call = functools.partial(selective_scan, reset=reset, valid=valid, implementation=implementation, **options)
    out, pullback = jax.vjp(lambda args: call(**args), args)
    return out, pullback(cotangents)[0]


def kernel(*args, context=interpret, **options):
    with context():
        return jax.block_until_ready(run_and_pull(*args, **options))


def check(args, reset=None, valid=None, context=interpret, **options):
    """The kernels against the float64 loop and the gradients of the reference."""
    cotangents = draw_cotangents(args)
    out, gradients = kernel(args, cotangents, reset, valid, context=context, **options)
    _, expected = run_and_pull(args, cotangents, reset, valid, implementation="reference", **options)
    assert_close(out, loop(args, reset, valid, options.get("dt_softplus", True)), VALUE_TOLERANCE)
    for name, gradient in gradients.items():
        if gradient is None:
            assert args[name] is None
        else:
            assert_close(gradient, expected[name], GRADIENT_TOLERANCE, name)
            assert gradient.dtype == args[name].dtype


@pytest.mark.usefixtures("looped")
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_any_length_equals_the_loop_and_gradients_equal_autodiff(length):
    check(draw(2, length, seed=length))


@pytest.mark.usefixtures("looped")
def test_documents_and_poisoned_padding():
    length = 2 * CHUNK + 5
    args = draw(3, length, seed=7)
    dy, dstate = draw_cotangents(args)
    for layout in LAYOUTS:
        reset, valid = masks(layout, 3, length)
        poisoned = {n: np.where(valid[..., None], a, np.nan) if n in TOKENS else a for n, a in args.items()}
        poisoned = {n: a.astype(np.float32) for n, a in poisoned.items()}
        cotangents = np.where(valid[..., None], dy, np.nan).astype(np.float32), dstate
        out, gradients = kernel(poisoned, cotangents, reset, valid)
        assert_close(out, loop(args, reset, valid), VALUE_TOLERANCE, layout)
        assert (np.asarray(out[0])[~valid] == 0).all()
        _, expected = run_and_pull(args, (dy, dstate), reset, valid, implementation="reference")
        assert_close(gradients, expected, GRADIENT_TOLERANCE, layout)
        for name in TOKENS:
            assert (np.asarray(gradients[name])[~valid] == 0).all(), name
    # A reset drops even a state that is not finite; the same program, in which no token is padding.
    args["state"][:] = np.nan
    reset, valid = np.arange(length)[None].repeat(3, 0) == 0, np.ones((3, length), bool)
    out, gradients = kernel(args, (dy, dstate), reset, valid)
    assert_close(out, loop(args | {"state": None}), VALUE_TOLERANCE, "state of NaN")
    assert all(np.isfinite(g).all() for g in gradients.values())
    assert (np.asarray(gradients["state"]) == 0).all()


@pytest.mark.usefixtures("looped")
def test_optional_arguments_may_be_absent():
    args = draw(2, 2 * CHUNK) | dict.fromkeys(("D", "z", "dt_bias", "state"))
    check(args | {"dt": np.abs(args["dt"])}, dt_softplus=False)


@pytest.mark.usefixtures("looped")
@pytest.mark.parametrize("dt_softplus", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_extreme_steps_stay_finite_and_exact(dt_softplus):
    check(draw_extreme(2, 2 * CHUNK + 3, dt_softplus), dt_softplus=dt_softplus)


@pytest.mark.slow
@pytest.mark.usefixtures("looped")
def test_channels_past_one_block_do_not_reach_the_sums_over_channels():
    memory_of_nan = functools.partial(interpret, pltpu.InterpretParams(uninitialized_memory="nan"))
    check(draw(1, 2, channels=1100, states=2), *masks("right", 1, 2), context=memory_of_nan)


def test_more_states_than_are_unrolled():
    check(draw(1, 3, channels=4, states=18))


def test_no_races_and_no_memory_read_before_it_is_written():
    args = draw(1, CHUNK + 3, channels=130, states=2)
    check(args, *masks("packed", 1, CHUNK + 3), context=simulate)


@pytest.mark.usefixtures("looped")
def test_bfloat16_inputs_with_float32_state_and_no_races():
    args = draw(2, CHUNK + 1)
    half = {n: jnp.asarray(a, jnp.float32 if n in ("A", "state") else jnp.bfloat16) for n, a in args.items()}
    rounded = {n: np.asarray(a, np.float32) for n, a in half.items()}
    dy, dstate = draw_cotangents(args)
    dy = jnp.asarray(dy, jnp.bfloat16)
    (y, state), gradients = kernel(half, (dy, dstate), context=simulate)
    _, expected = run_and_pull(rounded, (dy.astype(jnp.float32), dstate), implementation="reference")
    y_loop, state_loop = loop(rounded)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(y, y_loop, BFLOAT16_TOLERANCE)
    assert_close(state, state_loop, VALUE_TOLERANCE)
    for name in DIFFERENTIABLE:
        assert gradients[name].dtype == half[name].dtype, name
        assert_close(gradients[name], expected[name], BFLOAT16_TOLERANCE, name)


@pytest.mark.usefixtures("looped")
def test_either_backward_takes_the_boundaries_of_either_forward():
    args = draw(2, 2 * CHUNK + 1)
    arrays = [args[n] for n in DIFFERENTIABLE] + [None, None]
    with interpret():
        theirs, ours = (
            jax.jit(functools.partial(f, dt_softplus=True, chunk_size=CHUNK, save=True), compiler_options=QUICK)(
                *arrays
            )
            for f in (mosaic_tpu.forward, xla.forward)
        )
    assert ours[2].shape == (2, 3, 3, 6)
    assert_close(theirs, ours, VALUE_TOLERANCE)


@pytest.mark.usefixtures("looped")
def test_vmap_scan_checkpoint_and_two_calls_of_one_program():
    """Each row alone, through two layers of a scan whose body is recomputed and calls the op twice."""
    args = draw(2, 5, channels=3, states=2) | dict.fromkeys(("D", "z", "dt_bias", "state"))
    scales = jnp.asarray([0.5, 0.8])

    def loss(implementation, args):
        call = functools.partial(selective_scan, dt_softplus=True, chunk_size=CHUNK, implementation=implementation)

        @jax.checkpoint
        def layer(x, scale):
            x = x + call(**args | {"x": x * scale})[0]
            return x + call(**args | {"x": x})[0], None

        return jnp.sum(jax.lax.scan(layer, args["x"], scales)[0] ** 2)

    rows = {n: a[:, None] for n, a in args.items() if n in ("x", "dt", "B", "C")}

    def gradients(implementation):
        def of_row(row):
            return jax.grad(functools.partial(loss, implementation))(row | {"A": args["A"]})

        return jax.jit(jax.vmap(of_row), compiler_options=QUICK)(rows)

    with interpret():
        actual = gradients("mosaic_tpu")
    assert_close(actual, gradients("reference"), GRADIENT_TOLERANCE)


def rounded_product(self, a, b, transposed=False):
    """What the matrix unit makes of float32 operands unless told to be exact; interpreted, it does not round them."""
    dtype = jnp.float32 if self.exact else jnp.bfloat16
    a, b = (v.astype(dtype).astype(jnp.float32) for v in (a, b))
    return jax.lax.dot_general(a, b, (((1,), (int(transposed),)), ((), ())), precision="highest")


@pytest.mark.parametrize(("length", "chunk", "dtype"), [(128, 32, jnp.bfloat16), (136, 8, jnp.float32)])
def test_loops_over_many_groups_with_the_rounding_of_the_matrix_unit(monkeypatch, length, chunk, dtype):
    """A block whose B fills whole registers of lanes, and one of an odd number of groups of eight tokens."""
    monkeypatch.setattr(mosaic_tpu.Static, "product", rounded_product)
    args = draw(1, length, channels=4, states=16)
    args |= {n: np.asarray(jnp.asarray(args[n], dtype), np.float32) for n in TOKENS}
    dy, dstate = draw_cotangents(args)
    dy = jnp.asarray(dy, dtype)
    given = args | {n: jnp.asarray(args[n], dtype) for n in TOKENS}
    (y, state), gradients = kernel(given, (dy, dstate), chunk_size=chunk)
    cotangents = dy.astype(jnp.float32), dstate
    _, expected = run_and_pull(args, cotangents, implementation="reference", chunk_size=chunk)
    y_loop, state_loop = loop(args)
    half = dtype == jnp.bfloat16
    assert_close(y, y_loop, BFLOAT16_TOLERANCE if half else VALUE_TOLERANCE)
    assert_close(state, state_loop, SOFTPLUS_TOLERANCE if half else VALUE_TOLERANCE)
    for name in DIFFERENTIABLE:
        assert_close(gradients[name], expected[name], BFLOAT16_TOLERANCE if half else GRADIENT_TOLERANCE, name)


def test_softplus_keeps_its_digits_where_the_sum_loses_them():
    v = np.linspace(-80, 100, 100_001, dtype=np.float32)
    expected = np.logaddexp(v.astype(np.float64), 0)
    for exact, tolerance in ((True, 1e-5), (False, SOFTPLUS_TOLERANCE)):
        actual = np.asarray(jax.jit(functools.partial(mosaic_tpu.softplus, exact=exact))(v), np.float64)
        assert np.abs(actual / expected - 1).max() <= tolerance


def test_plans():
    p = mosaic_tpu.plan(8192, 3072, 32)
    assert (p.chunk, p.chunks, p.block_chunks, p.tiles, p.blocks, p.ragged) == (32, 256, 4, 8, 3, False)
    p = mosaic_tpu.plan(1, 5632, 1)
    assert (p.chunk, p.chunks, p.rows, p.time, p.blocks, p.ragged) == (8, 1, 1, 8, 6, True)
    p = mosaic_tpu.plan(37, 6, 8)
    assert (p.chunk, p.chunks, p.block_chunks, p.time, p.channels, p.tiles) == (8, 5, 5, 40, 128, 1)
    p = mosaic_tpu.plan(7 * 128, 1536, 128)
    assert (p.chunks, p.block_chunks, p.blocks, p.ragged) == (7, 1, 2, True)
    for shape in MODELS.values():
        p = mosaic_tpu.plan(shape.time, shape.channels, min(32, shape.time))
        assert p.block_chunks * p.chunk <= mosaic_tpu.MAX_TOKENS
        assert 0 <= p.time - shape.time < p.chunk
        assert mosaic_tpu_backward.history_bytes(p, shape.states) <= 5 * 2**20


def test_what_is_not_served_raises_and_is_left_to_xla():
    args = draw(1, 300, channels=4)
    half = {n: a if n == "state" else jnp.asarray(a, jnp.float16) for n, a in args.items()}
    wide = {n: np.zeros((1, 64, 512) if n in ("B", "C") else (4, 512), np.float32) for n in ("A", "B", "C")}
    wide |= {n: np.zeros((1, 64, 4), np.float32) for n in ("x", "dt")}
    unserved = [
        (half, 32, "x in float16"),
        (args | {"A": half["A"]}, 32, "A in float16"),
        (args, 12, "chunk_size=12 for T=300: it must be a multiple of 8"),
        (args, 136, "chunk_size=136 for T=300: chunks have at most 128"),
    ]

    def gradients(arguments, **options):
        return jax.grad(lambda a: jnp.sum(selective_scan(**a, **options)[0].astype(jnp.float32)))(arguments)

    def kernels(arguments, **options):
        call = jax.jit(functools.partial(gradients, **options))
        return jax.export.export(call, platforms=["tpu"])(arguments).mlir_module().count("tpu_custom_call")

    for arguments, chunk, reason in unserved:
        with pytest.raises(UnsupportedError, match=f"mosaic_tpu does not support {reason}"):
            selective_scan(**arguments, chunk_size=chunk, implementation="mosaic_tpu")
        assert kernels(arguments, chunk_size=chunk) == 0
    with pytest.raises(UnsupportedError, match=r"N=512 in the backward pass: .* take a smaller chunk_size"):
        jax.eval_shape(functools.partial(gradients, implementation="mosaic_tpu"), wide)
    assert kernels(wide) == 1
    assert kernels(args) == 2


@pytest.mark.parametrize("name", ["packed", pytest.param("samba_421m", marks=pytest.mark.slow)])
def test_compiles_for_v5e(name):
    assert count_kernels(compile_op("v5e", selective_scan, (MODELS | TINY)[name])) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e"])
def test_compiles_at_every_shape(kind):
    for name, shape in (MODELS | TINY).items():
        assert count_kernels(compile_op(kind, selective_scan, shape)) == (2 if shape.time > 1 else 0), name

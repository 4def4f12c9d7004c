"""The TPU kernels of the selective scan: interpreted numerics, races, and compilation without the chip."""

import functools
import os
import subprocess
import sys

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
from tests.pallas_kernels.test_selective_scan import DIFFERENTIABLE, draw, draw_cotangents, loop

VALUE_TOLERANCE = 2e-6  # float32, relative to the largest magnitude
GRADIENT_TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 2.0**-7  # outputs and gradients are rounded to 8 bits of mantissa once
CHUNK = 8
QUICK = {"xla_backend_optimization_level": 0}  # the interpreted kernels are long programs that run once
TOKENS = ("x", "dt", "B", "C", "z")


@functools.partial(jax.jit, static_argnames=("implementation", "dt_softplus", "chunk_size"), compiler_options=QUICK)
def run_and_pull(args, cotangents, reset=None, valid=None, implementation="mosaic_tpu", **options):
    """Outputs and the gradients of all arguments."""
    options = {"dt_softplus": True, "chunk_size": CHUNK} | options
    call = functools.partial(selective_scan, reset=reset, valid=valid, implementation=implementation, **options)
    out, pullback = jax.vjp(lambda args: call(**args), args)
    return out, pullback(cotangents)[0]


def kernel(*args, parameters=True, **options):
    with interpret(parameters):
        return jax.block_until_ready(run_and_pull(*args, **options))


def check(args, reset=None, valid=None, parameters=True, **options):
    """The kernels against the float64 loop and the gradients of the reference."""
    cotangents = draw_cotangents(args)
    out, gradients = kernel(args, cotangents, reset, valid, parameters=parameters, **options)
    _, expected = run_and_pull(args, cotangents, reset, valid, implementation="reference", **options)
    assert_close(out, loop(args, reset, valid, options.get("dt_softplus", True)), VALUE_TOLERANCE)
    for name, gradient in gradients.items():
        if gradient is None:
            assert args[name] is None
        else:
            assert_close(gradient, expected[name], GRADIENT_TOLERANCE, name)
            assert gradient.dtype == args[name].dtype


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK + 1, 2 * CHUNK])
def test_any_length_equals_the_loop_and_gradients_equal_autodiff(length):
    check(draw(2, length, seed=length))


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


def test_optional_arguments_may_be_absent():
    args = draw(2, 2 * CHUNK) | dict.fromkeys(("D", "z", "dt_bias", "state"))
    check(args | {"dt": np.abs(args["dt"])}, dt_softplus=False)


def test_channels_past_one_block_do_not_reach_the_sums_over_channels():
    args = draw(2, 5, channels=1100, states=2)
    check(args, *masks("between", 2, 5), parameters=pltpu.InterpretParams(uninitialized_memory="nan"))


def test_more_states_than_are_unrolled():
    check(draw(1, 3, channels=4, states=18))


def test_no_races():
    args = draw(1, CHUNK + 3, channels=130, states=2)
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check(args, *masks("packed", 1, CHUNK + 3), parameters=parameters)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found


def test_bfloat16_inputs_with_float32_state():
    args = draw(2, CHUNK + 1)
    half = {n: jnp.asarray(a, jnp.float32 if n in ("A", "state") else jnp.bfloat16) for n, a in args.items()}
    rounded = {n: np.asarray(a, np.float32) for n, a in half.items()}
    dy, dstate = draw_cotangents(args)
    dy = jnp.asarray(dy, jnp.bfloat16)
    (y, state), gradients = kernel(half, (dy, dstate))
    _, expected = run_and_pull(rounded, (dy.astype(jnp.float32), dstate), implementation="reference")
    y_loop, state_loop = loop(rounded)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(y, y_loop, BFLOAT16_TOLERANCE)
    assert_close(state, state_loop, VALUE_TOLERANCE)
    for name in DIFFERENTIABLE:
        assert gradients[name].dtype == half[name].dtype, name
        assert_close(gradients[name], expected[name], BFLOAT16_TOLERANCE, name)


def test_either_forward_meets_either_backward():
    length = 2 * CHUNK + 1
    args = draw(2, length)
    arrays = [args[n] for n in DIFFERENTIABLE] + [None, None]
    static = {"dt_softplus": True, "chunk_size": CHUNK}

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(arrays, cotangents):
        saved = [f(*arrays, **static, save=True) for f in (xla.forward, mosaic_tpu.forward)]
        crossed = [
            backward(*arrays, boundaries, *cotangents, **static)
            for backward, (_, _, boundaries) in zip((mosaic_tpu_backward.backward, xla.backward), saved, strict=True)
        ]
        return saved, crossed

    with interpret():
        saved, crossed = both(arrays, draw_cotangents(args))
    assert saved[0][2].shape == (2, 3, 3, 6)
    assert_close(saved[1], saved[0], VALUE_TOLERANCE)
    assert_close(crossed[0], crossed[1], GRADIENT_TOLERANCE)


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
        assert mosaic_tpu_backward.history_bytes(p, shape.states) <= 4 * 2**20


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


def compile_for(topology: str, names) -> None:
    """Compiles forward and backward at the named shapes to machine code of a chip that need not be there."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    for name in names:
        shape = (MODELS | TINY)[name]
        arrays = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for n, x in shape.arrays().items()}
        flags = {n: arrays.pop(n) for n in ("reset", "valid") if n in arrays}
        options = {"implementation": "mosaic_tpu", **shape.options()}

        def call(arrays, flags, cotangents, options=options):
            out, pullback = jax.vjp(lambda a: selective_scan(**a, **flags, **options), arrays)
            return out, pullback(cotangents)

        state = jax.ShapeDtypeStruct((shape.batch, shape.channels, shape.states), jnp.float32, sharding=place)
        text = jax.jit(call).lower(arrays, flags, (arrays["x"], state)).compile().as_text()
        assert all(kernel in text for kernel in ("selective_scan_forward", "selective_scan_backward"))
        print("compiled", topology, name)


def run_compiler(topology, names):
    pytest.importorskip("libtpu")
    variables = {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    }
    command = [sys.executable, "-m", "tests.pallas_kernels.test_selective_scan_tpu", topology, *names]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("compiled") == len(names)


def test_compiles_for_v5e():
    run_compiler("v5e:2x4", ["packed", "samba_421m"])


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x1", "v6e:2x4"])
def test_compiles_at_every_shape(topology):
    run_compiler(topology, [*TINY, *MODELS])


if __name__ == "__main__":
    compile_for(sys.argv[1], sys.argv[2:])

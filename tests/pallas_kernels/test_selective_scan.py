"""The selective scan against a float64 loop and differences, autodiff of the reference, transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.selective_scan.shapes import MODELS, TINY, ScanShape
from tests.pallas_kernels.sequences import LAYOUTS, assert_close, check_transformations, mamba_modeling, masks, redraw

VALUE_TOLERANCE = 2e-6  # float32, relative to the largest magnitude
GRADIENT_TOLERANCE = 1e-5
DIFFERENCE_TOLERANCE = 2e-5  # float32 gradients against float64 central differences
BFLOAT16_TOLERANCE = 2.0**-7  # outputs and gradients are rounded to 8 bits of mantissa once
CHUNK = 8
IMPLEMENTATIONS = ("reference", "xla")
DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")


def draw(batch, length, channels=6, states=3, seed=0):
    """Random arguments; dt before the softplus, so that steps range from 1e-3 to 3."""
    args = redraw(ScanShape(batch, length, channels, states, carried=True, dtype=jnp.float32), seed)
    args["A"] = -np.exp(args["A"])
    args["dt"] = 2 * args["dt"] - 2
    return args


def draw_extreme(batch, length, dt_softplus):
    """Steps of 0 and from 1e-6 to 1e3, of channels that decay and one that does not: decays of 1, and of 0.

    With the softplus, what it makes such steps of (1e-30 instead of 0).
    """
    args, rng = draw(batch, length, seed=11) | {"dt_bias": None}, np.random.default_rng(12)
    args["A"][:, 0] = 0.0
    steps = 10.0 ** rng.uniform(-6, 3, size=args["dt"].shape) * (rng.random(args["dt"].shape) > 0.1)
    if dt_softplus:
        steps = np.log(np.expm1(np.clip(steps, 1e-30, 700)))
    return args | {"dt": steps.astype(np.float32)}


def loop(args, reset=None, valid=None, dt_softplus=True):
    """Float64, token by token, row by row."""
    args = {n: np.asarray(a, np.float64) for n, a in args.items() if a is not None}
    x, dt, A, B, C = (args[n] for n in ("x", "dt", "A", "B", "C"))
    y = np.zeros(x.shape)
    state = args.get("state", np.zeros((x.shape[0], *A.shape))).copy()
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            if valid is not None and not valid[row, t]:
                continue
            if reset is not None and reset[row, t]:
                state[row] = 0
            step = dt[row, t] + args.get("dt_bias", 0.0)
            step = np.logaddexp(step, 0) if dt_softplus else step
            state[row] = np.exp(step[:, None] * A) * state[row] + np.outer(step * x[row, t], B[row, t])
            y[row, t] = state[row] @ C[row, t] + args.get("D", 0.0) * x[row, t]
            if "z" in args:
                z = args["z"][row, t]
                y[row, t] *= z / (1 + np.exp(-z))
    return y, state


@functools.partial(jax.jit, static_argnames=("implementation", "dt_softplus", "chunk_size"))
def run(args, reset=None, valid=None, implementation="xla", dt_softplus=True, chunk_size=CHUNK):
    options = {"dt_softplus": dt_softplus, "chunk_size": chunk_size, "implementation": implementation}
    return selective_scan(**args, reset=reset, valid=valid, **options)


@functools.partial(jax.jit, static_argnames=("implementation", "dt_softplus", "chunk_size"))
def run_and_pull(args, cotangents, reset=None, valid=None, **options):
    """Outputs and the gradients of all arguments."""
    out, pullback = jax.vjp(lambda args: run(args, reset, valid, **options), args)
    return out, pullback(cotangents)[0]


def draw_cotangents(args, seed=1):
    rng = np.random.default_rng(seed)
    shapes = args["x"].shape, (args["x"].shape[0], *args["A"].shape)
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_any_length_equals_the_loop_and_gradients_equal_autodiff(length):
    args = draw(2, length, seed=length)
    cotangents = draw_cotangents(args)
    reference, expected = run_and_pull(args, cotangents, implementation="reference")
    actual, gradients = run_and_pull(args, cotangents, implementation="xla")
    assert_close(reference, loop(args), VALUE_TOLERANCE, "reference")
    assert_close(actual, loop(args), VALUE_TOLERANCE, "xla")
    for name in DIFFERENTIABLE:
        assert_close(gradients[name], expected[name], GRADIENT_TOLERANCE, name)
        assert gradients[name].dtype == args[name].dtype


@pytest.mark.parametrize("length", [1, 2 * CHUNK + 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_and_poisoned_padding(layout, length):
    if layout in ("packed", "left", "between") and length == 1:
        pytest.skip("needs several tokens")
    args = draw(3, length, seed=7)
    reset, valid = masks(layout, 3, length)
    expected = loop(args, reset, valid)
    poisoned = {n: a.copy() for n, a in args.items()}
    for name in ("x", "dt", "B", "C", "z"):
        poisoned[name][~valid] = np.nan
    cotangents = draw_cotangents(args)
    poisoned_cotangents = (
        np.where(valid[..., None], cotangents[0], np.nan).astype(np.float32),
        cotangents[1],
    )
    _, reference = run_and_pull(args, cotangents, reset, valid, implementation="reference")
    for implementation in IMPLEMENTATIONS:
        out, gradients = run_and_pull(poisoned, cotangents, reset, valid, implementation=implementation)
        assert_close(out, expected, VALUE_TOLERANCE, implementation)
        assert (np.asarray(out[0])[~valid] == 0).all()
        assert_close(gradients, reference, GRADIENT_TOLERANCE, implementation)
        for name in ("x", "dt", "B", "C", "z"):
            assert (np.asarray(gradients[name])[~valid] == 0).all(), name
    _, gradients = run_and_pull(poisoned, poisoned_cotangents, reset, valid, implementation="xla")
    assert_close(gradients, reference, GRADIENT_TOLERANCE, "poisoned cotangents")


def test_a_reset_at_padding_is_ignored():
    args = draw(2, 11)
    valid = np.ones((2, 11), bool)
    valid[:, 4] = False
    reset = np.zeros((2, 11), bool)
    reset[:, 4] = True
    for implementation in IMPLEMENTATIONS:
        out = run(args, reset, valid, implementation)
        assert_close(out, loop(args, reset, valid), VALUE_TOLERANCE, implementation)


def test_a_reset_drops_even_a_state_that_is_not_finite():
    args = draw(1, 5)
    args["state"][:] = np.nan
    reset = np.arange(5)[None] == 0
    expected = loop(args | {"state": None})
    for implementation in IMPLEMENTATIONS:
        assert_close(run(args, reset, implementation=implementation), expected, VALUE_TOLERANCE)
        first = {n: a[:, :1] if n in ("x", "dt", "B", "C", "z") else a for n, a in args.items()}
        y, _ = run(first, reset[:, :1], implementation=implementation)
        assert_close(y, expected[0][:, :1], VALUE_TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_equal_float64_differences(implementation):
    length = CHUNK
    args = draw(2, length, seed=3)
    reset, valid = masks("between", 2, length)
    cotangents = draw_cotangents(args)
    _, gradients = run_and_pull(args, cotangents, reset, valid, implementation=implementation)
    rng = np.random.default_rng(4)

    def value(args):
        return sum(np.sum(o * c) for o, c in zip(loop(args, reset, valid), cotangents, strict=True))

    for name in DIFFERENTIABLE:
        wide = {n: a.astype(np.float64) for n, a in args.items()}
        direction = rng.normal(size=args[name].shape)
        scale = np.sum(np.abs(np.asarray(gradients[name]) * direction))
        up, down = (value(wide | {name: wide[name] + e * direction}) for e in (1e-6, -1e-6))
        slope = np.sum(np.asarray(gradients[name], np.float64) * direction)
        assert abs(slope - (up - down) / 2e-6) <= DIFFERENCE_TOLERANCE * scale, name


def test_optional_arguments_may_be_absent():
    full = draw(2, 2 * CHUNK)
    full["dt"] = np.abs(full["dt"])  # no softplus below
    cotangents = draw_cotangents(full)
    for absent in [("D", "z", "dt_bias", "state"), ("D",)]:
        args = {n: None if n in absent else a for n, a in full.items()}
        if args["dt_bias"] is not None:
            args["dt_bias"] = np.abs(args["dt_bias"])
        actual, gradients = run_and_pull(args, cotangents, dt_softplus=False)
        _, expected = run_and_pull(args, cotangents, dt_softplus=False, implementation="reference")
        assert_close(actual, loop(args, dt_softplus=False), VALUE_TOLERANCE, str(absent))
        assert_close(gradients, expected, GRADIENT_TOLERANCE, str(absent))
        assert all(gradients[name] is None for name in absent)


@pytest.mark.parametrize("cuts", [(1,), (9, 10, 11, 20)])
def test_cuts_with_the_state_carried_equal_one_pass(cuts):
    length = 21
    args = draw(2, length, seed=5)
    reset, valid = masks("between", 2, length)
    expected = loop(args, reset, valid)
    state, pieces = args["state"], []
    for start, end in zip((0, *cuts), (*cuts, length), strict=True):
        piece = {n: a[:, start:end] if n in ("x", "dt", "B", "C", "z") else a for n, a in args.items()}
        y, state = run(piece | {"state": state}, reset[:, start:end], valid[:, start:end])
        pieces.append(y)
    assert_close((np.concatenate(pieces, axis=1), state), expected, VALUE_TOLERANCE)


def test_packed_documents_equal_separate_calls_in_values_and_gradients():
    lengths = (CHUNK, 1, 1, CHUNK)
    args = draw(1, sum(lengths)) | {"state": None}
    starts = np.cumsum((0, *lengths[:-1]))
    reset = np.isin(np.arange(sum(lengths)), starts)[None]
    dy, dstate = draw_cotangents(args)
    (y, state), gradients = run_and_pull(args, (dy, dstate), reset)
    for start, length in zip(starts, lengths, strict=True):
        piece = {n: a[:, start : start + length] for n, a in args.items() if n in ("x", "dt", "B", "C", "z")}
        last = start + length == sum(lengths)
        cotangents = (dy[:, start : start + length], dstate if last else 0 * dstate)
        out, expected = run_and_pull(args | piece, cotangents)
        assert_close(y[:, start : start + length], out[0], VALUE_TOLERANCE)
        for name in piece:
            assert_close(gradients[name][:, start : start + length], expected[name], GRADIENT_TOLERANCE, name)
    assert_close(state, out[1], VALUE_TOLERANCE)


@pytest.mark.parametrize("chunk_size", [1, None])
def test_the_chunk_size_changes_nothing(chunk_size):
    args = draw(2, 37)
    cotangents = draw_cotangents(args)
    out, gradients = run_and_pull(args, cotangents, chunk_size=chunk_size)
    _, expected = run_and_pull(args, cotangents)
    assert_close(out, loop(args), VALUE_TOLERANCE)
    assert_close(gradients, expected, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("dt_softplus", [False, True])
def test_extreme_steps_stay_finite_and_exact(dt_softplus):
    args = draw_extreme(2, 2 * CHUNK + 3, dt_softplus)
    cotangents = draw_cotangents(args)
    expected = loop(args, dt_softplus=dt_softplus)
    gradients = {}
    for implementation in IMPLEMENTATIONS:
        out, gradients[implementation] = run_and_pull(
            args, cotangents, dt_softplus=dt_softplus, implementation=implementation
        )
        assert_close(out, expected, VALUE_TOLERANCE, implementation)
    for name in DIFFERENTIABLE:
        assert_close(gradients["xla"][name], gradients["reference"][name], GRADIENT_TOLERANCE, name)


@pytest.mark.parametrize("length", [1, 2 * CHUNK + 1])
def test_bfloat16_inputs_with_float32_state(length):
    args = draw(2, length)
    half = {n: jnp.asarray(a, jnp.float32 if n in ("A", "state") else jnp.bfloat16) for n, a in args.items()}
    rounded = {n: np.asarray(a, np.float32) for n, a in half.items()}
    cotangents = draw_cotangents(args)
    cotangents = (jnp.asarray(cotangents[0], jnp.bfloat16), cotangents[1])
    _, expected = run_and_pull(rounded, (cotangents[0].astype(jnp.float32), cotangents[1]))
    (y, state), gradients = run_and_pull(half, cotangents)
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    y_loop, state_loop = loop(rounded)
    assert_close(y, y_loop, BFLOAT16_TOLERANCE)
    assert_close(state, state_loop, VALUE_TOLERANCE)
    for name in DIFFERENTIABLE:
        assert gradients[name].dtype == half[name].dtype, name
        assert_close(gradients[name], expected[name], BFLOAT16_TOLERANCE, name)


@pytest.mark.slow
def test_transformations():
    args = draw(2, 2 * CHUNK)
    check_transformations(run, args, draw_cotangents(args), GRADIENT_TOLERANCE)


def test_causality_by_gradient():
    args = draw(1, 2 * CHUNK)
    dy = np.zeros(args["x"].shape, np.float32)
    dy[:, 5] = 1
    _, gradients = run_and_pull(args, (dy, np.zeros((1, *args["A"].shape), np.float32)))
    for name in ("x", "dt", "B", "C", "z"):
        assert (np.asarray(gradients[name])[:, 6:] == 0).all(), name
        assert (np.asarray(gradients[name])[:, 5] != 0).any(), name


def test_training_keeps_no_array_of_all_states():
    shape = MODELS["samba_421m_long"]
    args = shape.arrays()
    state = jax.ShapeDtypeStruct((shape.batch, shape.channels, shape.states), jnp.float32)
    args["state"] = state

    def step(args, cotangents):
        out, pullback = jax.vjp(lambda a: selective_scan(**a, **shape.options(), implementation="xla"), args)
        return out, pullback(cotangents)

    analysis = jax.jit(step).lower(args, (args["x"], state)).compile().memory_analysis()
    all_states = 4 * shape.batch * shape.time * shape.channels * shape.states
    assert analysis.output_size_in_bytes > 4 * 4 * shape.time * shape.channels  # y, dx, d(dt), dz are there
    assert analysis.temp_size_in_bytes < 0.06 * all_states


@pytest.mark.parametrize("name", ["packed", "decode", "bfloat16"])
def test_lowers_for_accelerators(name):
    shape = TINY[name]

    def step(args):
        return jax.value_and_grad(lambda a: jnp.sum(selective_scan(**a, **shape.options())[0]), allow_int=True)(args)

    for platform in ("cpu", "tpu", "cuda"):  # one at a time: JAX lowers every branch for all the platforms of an export
        exported = jax.export.export(jax.jit(step), platforms=[platform])(shape.arrays())
        kernels = 2 if platform == "tpu" and name != "decode" else 0
        assert exported.mlir_module().count("stablehlo.custom_call @tpu_custom_call") == kernels


@pytest.mark.slow
def test_shapes_are_accepted_by_the_op():
    for shape in [*MODELS.values(), *TINY.values()]:
        y, state = jax.eval_shape(lambda a, s=shape: selective_scan(**a, **s.options()), shape.arrays())
        assert (y.shape, y.dtype) == ((shape.batch, shape.time, shape.channels), shape.dtype)
        assert (state.shape, state.dtype) == ((shape.batch, shape.channels, shape.states), jnp.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": np.zeros((2, 6), np.float32)}, r"x must have shape \[B, T, Di\], got \(2, 6\)"),
        ({"x": np.zeros((2, 0, 6), np.float32)}, "at least one token"),
        ({"dt": np.zeros((2, 4, 6), np.float32)}, r"dt must have shape \[B=2, T=5, Di=6\], got \(2, 4, 6\)"),
        ({"A": np.zeros((3, 6), np.float32)}, r"A must have shape \[Di=6, N\], got \(3, 6\)"),
        ({"C": np.zeros((2, 5, 4), np.float32)}, r"C must have shape \[B=2, T=5, N=3\], got \(2, 5, 4\)"),
        ({"D": np.zeros((5,), np.float32)}, r"D must have shape \[Di=6\], got \(5,\)"),
        ({"x": np.zeros((2, 5, 6), np.int32)}, "x must have dtype float32 or bfloat16 or float16, got int32"),
        ({"state": np.zeros((2, 6, 3), jnp.bfloat16)}, "state must have dtype float32, got bfloat16"),
        ({"state": np.zeros((2, 3, 6), np.float32)}, r"state must have shape \[B=2, Di=6, N=3\]"),
        ({"reset": np.zeros((2, 5), np.int32)}, "reset must have dtype bool, got int32"),
        ({"valid": np.zeros((2, 6), bool)}, r"valid must have shape \[B=2, T=5\]"),
        ({"z": 1.0}, "z must be an array"),
        ({"chunk_size": 0}, "chunk_size must be an int >= 1 or None, got 0"),
        ({"chunk_size": -1}, "chunk_size must be an int >= 1 or None, got -1"),
        ({"chunk_size": True}, "chunk_size must be an int >= 1 or None, got True"),
        ({"implementation": "xls"}, "did you mean 'xla'"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        selective_scan(**(draw(2, 5) | change))


def test_equals_transformers_in_values_and_gradients():
    torch, modeling = mamba_modeling()
    args = draw(2, 19)
    leaves = {
        n: torch.tensor(a.swapaxes(1, 2).copy() if n in ("x", "dt", "B", "C", "z") else a, requires_grad=True)
        for n, a in args.items()
        if n != "state"
    }
    arguments = (leaves[n] for n in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"))
    y, state = modeling.mamba_selective_scan(*arguments, delta_softplus=True, return_last_state=True)
    dy, dstate = draw_cotangents(args)
    out, gradients = run_and_pull(args | {"state": None}, (dy, dstate))
    assert_close(out, (y.detach().numpy().swapaxes(1, 2), state.detach().numpy()), VALUE_TOLERANCE)
    torch.autograd.backward((y, state), (torch.tensor(dy.swapaxes(1, 2).copy()), torch.tensor(dstate)))
    for name, leaf in leaves.items():
        expected = leaf.grad.numpy()
        expected = expected.swapaxes(1, 2) if name in ("x", "dt", "B", "C", "z") else expected
        assert_close(gradients[name], expected, GRADIENT_TOLERANCE, name)

"""Gated linear attention against float64 loops forward and backward, autodiff of the reference, transformers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.gated_linear_attention import gated_linear_attention
from pallas_kernels.gated_linear_attention.shapes import MODELS, TINY, LinearAttentionShape
from tests.pallas_kernels.sequences import LAYOUTS, assert_close, masks

VALUE_TOLERANCE = 2e-6  # float32, relative to the largest magnitude
GRADIENT_TOLERANCE = 1e-5
DIFFERENCE_TOLERANCE = 1e-6  # float64 loop backward against float64 central differences
BFLOAT16_TOLERANCE = 2.0**-7  # outputs and gradients are rounded to 8 bits of mantissa once
CHUNK = 32  # more than xla.LEAF, so that scores are made at both levels
DECAYS = ("none", "constant", "head", "channel")
IMPLEMENTATIONS = ("reference", "xla")
DIFFERENTIABLE = ("q", "k", "v", "log_decay", "state")


def draw(decay, batch, length, *, heads=4, groups=2, key=5, value=3, seed=0):
    """Random arguments; decays from 0.001 to 0.999, and one head or channel in four hardly decays."""
    shape = LinearAttentionShape(batch, length, heads, groups, key, value, decay, carried=True, dtype=jnp.float32)
    args = {"log_decay": None} | redraw_present(shape, seed)
    if decay != "none":
        log_decay = -np.exp(1.5 * args["log_decay"] - 1)
        log_decay[..., ::4] *= 1e-3
        args["log_decay"] = log_decay
    return args


def redraw_present(shape, seed):
    rng = np.random.default_rng(seed)
    arrays = {n: a for n, a in shape.arrays().items() if a is not None and a.dtype != bool}
    return {n: rng.normal(size=a.shape).astype(np.float32) for n, a in arrays.items()}


def by_head(args, row, t, h):
    """q, k [K], v [V] and the decay (a number or [K]) of one head at one token, float64."""
    group = h // (args["v"].shape[2] // args["q"].shape[2])
    g = args["log_decay"]
    if g is None:
        g = 0.0
    elif g.ndim == 1:
        g = g[h]
    else:
        g = g[row, t, h] if g.ndim == 3 else g[row, t, group]
    return group, args["q"][row, t, group], args["k"][row, t, group], args["v"][row, t, h], np.exp(g)


def widen(args):
    args = {n: None if a is None else np.asarray(a, np.float64) for n, a in args.items()}
    if args["state"] is None:
        args["state"] = np.zeros((args["v"].shape[0], *args["v"].shape[2:3], args["q"].shape[3], args["v"].shape[3]))
    return args


def loop(args, reset=None, valid=None, scale=None, states=None):
    """Float64, token by token, head by head; `states` collects the state each token's decay acts on."""
    args = widen(args)
    batch, length, heads, _ = args["v"].shape
    scale = args["q"].shape[-1] ** -0.5 if scale is None else scale
    y, state = np.zeros(args["v"].shape), args["state"].copy()
    for row in range(batch):
        for t in range(length):
            if valid is not None and not valid[row, t]:
                continue
            if reset is not None and reset[row, t]:
                state[row] = 0
            if states is not None:
                states[row, t] = state[row].copy()
            for h in range(heads):
                _, q, k, v, decay = by_head(args, row, t, h)
                state[row, h] = np.reshape(decay, (-1, 1)) * state[row, h] + np.outer(k, v)
                y[row, t, h] = scale * q @ state[row, h]
    return y, state


def loop_backward(args, cotangents, reset=None, valid=None, scale=None):
    """Float64 adjoint recurrence: dS_t = a_{t+1} dS_{t+1} + scale q_t dy_t^T; d log a_t = a_t S_{t-1} . dS_t."""
    before = {}
    loop(args, reset, valid, scale, before)
    without_state = args["state"] is None
    args = widen(args)
    scale = args["q"].shape[-1] ** -0.5 if scale is None else scale
    dy, dstate = (np.asarray(c, np.float64) for c in cotangents)
    dstate = dstate.copy()
    grads = {n: None if a is None else np.zeros(a.shape) for n, a in args.items()}
    for row, t in sorted(before, reverse=True):
        for h in range(args["v"].shape[2]):
            group, q, k, v, decay = by_head(args, row, t, h)
            decay = np.reshape(decay, (-1, 1))
            old = before[row, t][h]
            ds = dstate[row, h] + scale * np.outer(q, dy[row, t, h])
            grads["q"][row, t, group] += scale * (decay * old + np.outer(k, v)) @ dy[row, t, h]
            grads["k"][row, t, group] += ds @ v
            grads["v"][row, t, h] += k @ ds
            flow = decay * old * ds
            g = grads["log_decay"]
            if g is not None and g.ndim == 1:
                g[h] += flow.sum()
            elif g is not None and g.ndim == 3:
                g[row, t, h] += flow.sum()
            elif g is not None:
                g[row, t, group] += flow.sum(axis=1)
            dstate[row, h] = decay * ds
            if reset is not None and reset[row, t]:
                dstate[row, h] = 0
    grads["state"] = None if without_state else dstate
    return grads


@functools.partial(jax.jit, static_argnames=("implementation", "scale", "chunk_size"))
def run(args, reset=None, valid=None, implementation="xla", scale=None, chunk_size=CHUNK):
    options = {"scale": scale, "chunk_size": chunk_size, "implementation": implementation}
    return gated_linear_attention(**args, reset=reset, valid=valid, **options)


@functools.partial(jax.jit, static_argnames=("implementation", "scale", "chunk_size"))
def run_and_pull(args, cotangents, reset=None, valid=None, **options):
    """Outputs and the gradients of all arguments."""
    out, pullback = jax.vjp(lambda args: run(args, reset, valid, **options), args)
    return out, pullback(cotangents)[0]


def draw_cotangents(args, seed=1):
    rng = np.random.default_rng(seed)
    (batch, _, heads, value), key = args["v"].shape, args["q"].shape[3]
    return tuple(rng.normal(size=s).astype(np.float32) for s in (args["v"].shape, (batch, heads, key, value)))


def by_token(args):
    """Names of the arguments that have an entry per token."""
    return [n for n in ("q", "k", "v", "log_decay") if args[n] is not None and args[n].ndim > 1]


def check(args, cotangents, reset=None, valid=None, implementations=IMPLEMENTATIONS, **options):
    """Values and every gradient equal the float64 loops."""
    scale = options.get("scale")
    expected = loop(args, reset, valid, scale)
    gradients = loop_backward(args, cotangents, reset, valid, scale)
    for implementation in implementations:
        out, actual = run_and_pull(args, cotangents, reset, valid, implementation=implementation, **options)
        assert_close(out, expected, VALUE_TOLERANCE, implementation)
        for name in DIFFERENTIABLE:
            assert (actual[name] is None) == (gradients[name] is None), name
            assert_close(actual[name], gradients[name], GRADIENT_TOLERANCE, f"{implementation} {name}")
            if actual[name] is not None:
                assert actual[name].dtype == args[name].dtype


@pytest.mark.parametrize(
    ("decay", "length"),
    [(decay, length) for decay in DECAYS for length in (1, CHUNK - 1, 2 * CHUNK + 7)]
    + [(decay, length) for decay in ("head", "channel") for length in (CHUNK, CHUNK + 1)],
)
def test_any_length_equals_the_loops(decay, length):
    args = draw(decay, 2, length, seed=length)
    implementations = IMPLEMENTATIONS if length == CHUNK - 1 else ("xla",)
    check(args, draw_cotangents(args), implementations=implementations)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_loop_backward_equals_float64_differences(decay):
    args = draw(decay, 2, 9, seed=3)
    reset, valid = masks("between", 2, 9)
    cotangents = draw_cotangents(args)
    gradients = loop_backward(args, cotangents, reset, valid)
    rng = np.random.default_rng(4)
    wide = {n: None if a is None else a.astype(np.float64) for n, a in args.items()}

    def value(args):
        return sum(np.sum(o * c) for o, c in zip(loop(args, reset, valid), cotangents, strict=True))

    for name in DIFFERENTIABLE:
        if args[name] is None:
            continue
        direction = rng.normal(size=args[name].shape)
        up, down = (value(wide | {name: wide[name] + e * direction}) for e in (1e-5, -1e-5))
        scale = np.sum(np.abs(gradients[name] * direction))
        slope = np.sum(gradients[name] * direction)
        assert abs(slope - (up - down) / 2e-5) <= DIFFERENCE_TOLERANCE * scale, name


@pytest.mark.parametrize("decay", ["constant", "head", "channel"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_and_poisoned_padding(layout, decay):
    length = CHUNK + 5
    args = draw(decay, 3, length, seed=7)
    reset, valid = masks(layout, 3, length)
    cotangents = draw_cotangents(args)
    expected, gradients = loop(args, reset, valid), loop_backward(args, cotangents, reset, valid)
    poisoned = {n: a.copy() for n, a in args.items()}
    for name in by_token(args):
        poisoned[name][~valid] = np.nan
    dy = np.where(valid[..., None, None], cotangents[0], np.nan).astype(np.float32)
    for implementation in IMPLEMENTATIONS:
        pulled = cotangents if implementation == "reference" else (dy, cotangents[1])
        out, actual = run_and_pull(poisoned, pulled, reset, valid, implementation=implementation)
        assert_close(out, expected, VALUE_TOLERANCE, implementation)
        assert (np.asarray(out[0])[~valid] == 0).all()
        for name in DIFFERENTIABLE:
            assert_close(actual[name], gradients[name], GRADIENT_TOLERANCE, f"{implementation} {name}")
        for name in by_token(args):
            assert (np.asarray(actual[name])[~valid] == 0).all(), name


@pytest.mark.parametrize("decay", DECAYS)
def test_one_token_with_resets_and_poisoned_padding(decay):
    args = draw(decay, 3, 1)
    reset, valid = np.array([[True], [False], [True]]), np.array([[True], [True], [False]])
    cotangents = draw_cotangents(args)
    check({n: a if a is None else a.copy() for n, a in args.items()}, cotangents, reset & valid, valid)
    for name in by_token(args):
        args[name][~valid] = np.nan
    y, state = run(args, reset, valid)
    assert (np.asarray(y)[2] == 0).all()
    assert (np.asarray(state)[2] == args["state"][2]).all()


def test_a_reset_at_padding_is_ignored():
    args = draw("channel", 2, 11)
    valid = np.arange(11)[None].repeat(2, 0) != 4
    for implementation in IMPLEMENTATIONS:
        out = run(args, ~valid, valid, implementation)
        assert_close(out, loop(args, None, valid), VALUE_TOLERANCE, implementation)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_a_reset_drops_even_a_state_that_is_not_finite(decay):
    args = draw(decay, 1, 5)
    args["state"][:] = np.nan
    reset = np.arange(5)[None] == 0
    cotangents = draw_cotangents(args)
    fresh = args | {"state": None}
    expected = loop_backward(fresh, cotangents)
    for implementation in IMPLEMENTATIONS:
        assert_close(run(args, reset, implementation=implementation), loop(fresh), VALUE_TOLERANCE)
    _, gradients = run_and_pull(args, cotangents, reset)
    for name in ("q", "k", "v", "log_decay"):
        assert_close(gradients[name], expected[name], GRADIENT_TOLERANCE, name)
    first = {n: args[n][:, :1] if n in by_token(args) else args[n] for n in args}
    assert_close(run(first, reset[:, :1])[0], loop(fresh)[0][:, :1], VALUE_TOLERANCE)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_extreme_decays_are_finite_and_exact(decay):
    """Decays of e^-80 beside 1 and 1 - 1e-6: nothing overflows, and no sum of 80s swallows the 1e-6."""
    args = draw(decay, 2, 2 * CHUNK, seed=11)
    rng = np.random.default_rng(12)
    args["log_decay"] = rng.choice([-80.0, 0.0, -1e-6, -3.0], size=args["log_decay"].shape).astype(np.float32)
    check(args, draw_cotangents(args))
    for value in (-80.0, 0.0, -1e-6):
        args["log_decay"][:] = value
        check(args, draw_cotangents(args), implementations=("xla",))
    args["log_decay"] = rng.choice([-np.inf, -0.1], size=args["log_decay"].shape).astype(np.float32)
    check(args, draw_cotangents(args), implementations=("xla",))


@pytest.mark.parametrize("decay", DECAYS)
def test_cuts_with_the_state_carried_equal_one_pass(decay):
    length, cuts = 53, (9, 10, 11, 50)
    args = draw(decay, 2, length, seed=5)
    reset, valid = masks("between", 2, length)
    state, pieces = args["state"], []
    for start, end in zip((0, *cuts), (*cuts, length), strict=True):
        piece = {n: a[:, start:end] if n in by_token(args) else a for n, a in args.items()}
        y, state = run(piece | {"state": state}, reset[:, start:end], valid[:, start:end])
        pieces.append(y)
    assert_close((np.concatenate(pieces, axis=1), state), loop(args, reset, valid), VALUE_TOLERANCE)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_packed_documents_equal_separate_calls_in_values_and_gradients(decay):
    lengths = (CHUNK, 1, 1, CHUNK)
    args = draw(decay, 1, sum(lengths)) | {"state": None}
    starts = np.cumsum((0, *lengths[:-1]))
    reset = np.isin(np.arange(sum(lengths)), starts)[None]
    dy, dstate = draw_cotangents(args)
    (y, state), gradients = run_and_pull(args, (dy, dstate), reset)
    out = None
    for start, length in zip(starts, lengths, strict=True):
        piece = {n: args[n][:, start : start + length] for n in by_token(args)}
        last = start + length == sum(lengths)
        cotangents = (dy[:, start : start + length], dstate if last else 0 * dstate)
        out, expected = run_and_pull(args | piece, cotangents)
        assert_close(y[:, start : start + length], out[0], VALUE_TOLERANCE)
        for name in piece:
            assert_close(gradients[name][:, start : start + length], expected[name], GRADIENT_TOLERANCE, name)
    assert_close(state, out[1], VALUE_TOLERANCE)


@pytest.mark.parametrize(("decay", "chunk_size"), [("channel", 1), ("channel", 24), ("channel", None), ("head", None)])
def test_the_chunk_size_changes_nothing(decay, chunk_size):
    args = draw(decay, 2, 67)
    check(args, draw_cotangents(args), implementations=("xla",), chunk_size=chunk_size)


@pytest.mark.parametrize(("decay", "groups"), [("none", 1), ("constant", 1), ("head", 3), ("channel", 3)])
def test_scale_no_state_and_other_groupings(decay, groups):
    args = draw(decay, 1, CHUNK + 3, heads=3, groups=groups, key=4, value=6) | {"state": None}
    check(args, draw_cotangents(args), implementations=("xla",), scale=-0.7)


@pytest.mark.parametrize(
    ("decay", "length"), [("head", 1), ("head", CHUNK + 1), ("channel", 1), ("channel", CHUNK + 1)]
)
def test_bfloat16_inputs_with_float32_state(decay, length):
    args = draw(decay, 2, length)
    half = {n: a if n == "state" or a is None else jnp.asarray(a, jnp.bfloat16) for n, a in args.items()}
    rounded = {n: None if a is None else np.asarray(a, np.float32) for n, a in half.items()}
    dy, dstate = draw_cotangents(args)
    dy = jnp.asarray(dy, jnp.bfloat16)
    expected = loop_backward(rounded, (dy, dstate))
    (y, state), gradients = run_and_pull(half, (dy, dstate))
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    y_loop, state_loop = loop(rounded)
    assert_close(y, y_loop, BFLOAT16_TOLERANCE)
    assert_close(state, state_loop, VALUE_TOLERANCE)
    for name in DIFFERENTIABLE:
        if half[name] is not None:
            assert gradients[name].dtype == half[name].dtype, name
            assert_close(gradients[name], expected[name], BFLOAT16_TOLERANCE, name)
    y, _ = jax.eval_shape(run, args | {"q": half["q"]})
    assert y.dtype == jnp.float32, "the output has the dtype of v"


@pytest.mark.slow
def test_transformations():
    args = draw("channel", 2, 2 * CHUNK)
    cotangents = draw_cotangents(args)
    _, expected = run_and_pull(args, cotangents)

    def loss(args):
        return sum(jnp.sum(o * c) for o, c in zip(run(args), cotangents, strict=True))

    assert_close(jax.jit(jax.grad(jax.checkpoint(loss)))(args), expected, GRADIENT_TOLERANCE, "checkpoint")
    twice = jax.tree.map(lambda a: np.stack([a, 0.5 * a]), args)
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(twice)
    assert_close(jax.tree.map(lambda g: g[0], mapped), expected, GRADIENT_TOLERANCE, "vmap")

    def layers(args, implementation):
        def layer(v, scale):
            return run(args | {"v": scale * v}, implementation=implementation)[0], None

        return jnp.sum(jax.lax.scan(layer, args["v"], jnp.array([1.0, 0.5]))[0] * cotangents[0])

    actual, expected = (
        jax.jit(jax.grad(functools.partial(layers, implementation=n)))(args) for n in ("xla", "reference")
    )
    assert_close(actual, expected, GRADIENT_TOLERANCE, "scan over layers")


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_causality_by_gradient(decay):
    args = draw(decay, 1, 2 * CHUNK)
    dy, dstate = draw_cotangents(args)
    dy[:, :5] = dy[:, 6:] = 0
    _, gradients = run_and_pull(args, (dy, 0 * dstate))
    for name in ("q", "k", "v"):
        assert (np.asarray(gradients[name])[:, 6:] == 0).all(), name
        assert (np.asarray(gradients[name])[:, 5] != 0).any(), name
    # Of log_decay only to rounding: its gradient is a suffix sum of terms that cancel.
    gradient = np.abs(np.asarray(gradients["log_decay"]))
    assert gradient[:, 6:].max() <= GRADIENT_TOLERANCE * gradient.max()


@pytest.mark.parametrize("name", ["gla_340m", "mamba2_2.7b"])
def test_training_keeps_no_array_of_all_states(name):
    shape = MODELS[name]
    args = shape.arrays()
    state = jax.ShapeDtypeStruct((shape.batch, shape.heads, shape.key, shape.value), jnp.float32)
    args["state"] = state

    def step(args, cotangents):
        options = shape.options() | {"implementation": "xla"}
        out, pullback = jax.vjp(lambda a: gated_linear_attention(**a, **options), args)
        return out, pullback(cotangents)

    analysis = jax.jit(step).lower(args, (args["v"], state)).compile().memory_analysis()
    all_states = 4 * shape.time * state.size
    assert analysis.output_size_in_bytes > 2 * 2 * args["v"].size + 4 * args["log_decay"].size  # y, dv, d log_decay
    assert analysis.temp_size_in_bytes < 0.06 * all_states


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("name", ["none", "constant", "packed", "decode", "bfloat16"])
def test_lowers_for_accelerators(name, wide):
    """The choice on TPU is the kernel, but for narrow heads, whose chunks are shorter than its registers."""
    shape = dataclasses.replace(TINY[name], **({"key": 64, "value": 64} if wide else {}))

    def step(args):
        def loss(a):
            return jnp.sum(gated_linear_attention(**a, **shape.options())[0])

        return jax.value_and_grad(loss, allow_int=True)(args)

    for platform in ("cpu", "tpu", "cuda"):  # one at a time: JAX lowers every branch for all the platforms of an export
        exported = jax.export.export(jax.jit(step), platforms=[platform])(shape.arrays())
        kernels = exported.mlir_module().count("tpu_custom_call")
        assert kernels == (2 if platform == "tpu" and shape.time > 1 and wide else 0)


def test_shapes_are_accepted_by_the_op():
    for shape in [*MODELS.values(), *TINY.values()]:
        arrays = shape.arrays()
        y, state = jax.eval_shape(lambda a, s=shape: gated_linear_attention(**a, **s.options()), arrays)
        assert (y.shape, y.dtype) == (arrays["v"].shape, shape.dtype)
        assert (state.shape, state.dtype) == ((shape.batch, shape.heads, shape.key, shape.value), jnp.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": np.zeros((2, 5, 5), np.float32)}, r"q must have shape \[B, T, G, K\], got \(2, 5, 5\)"),
        ({"q": None}, r"q must be an array \[B, T, G, K\], got None"),
        ({"k": np.zeros((2, 5, 2, 4), np.float32)}, r"k must have shape \[B=2, T=5, G=2, K=5\], got \(2, 5, 2, 4\)"),
        ({"v": np.zeros((2, 4, 4, 3), np.float32)}, r"v must have shape \[B=2, T=5, H, V\], got \(2, 4, 4, 3\)"),
        ({"v": np.zeros((2, 5, 3, 3), np.float32)}, "the G=2 groups of q and k must divide the H=3 heads of v"),
        ({n: np.zeros((2, 0, 2, 5), np.float32) for n in ("q", "k", "v")}, "T must be at least 1"),
        ({"log_decay": np.zeros((2,), np.float32)}, r"log_decay must have shape \[H=4\], got \(2,\)"),
        ({"log_decay": np.zeros((2, 5, 2), np.float32)}, r"log_decay must have shape \[B=2, T=5, H=4\]"),
        ({"log_decay": np.zeros((2, 5, 4, 5), np.float32)}, r"log_decay must have shape \[B=2, T=5, G=2, K=5\]"),
        ({"log_decay": np.zeros((5, 4), np.float32)}, r"log_decay must be None or an array \[H\], \[B, T, H\] or"),
        ({"log_decay": -1.0}, r"log_decay must be None or an array .* got float"),
        ({"q": np.zeros((2, 5, 2, 5), np.int32)}, "q must have dtype float32 or bfloat16 or float16, got int32"),
        ({"state": np.zeros((2, 4, 5, 3), jnp.bfloat16)}, "state must have dtype float32, got bfloat16"),
        ({"state": np.zeros((2, 4, 3, 5), np.float32)}, r"state must have shape \[B=2, H=4, K=5, V=3\]"),
        ({"reset": np.zeros((2, 5), np.int32)}, "reset must have dtype bool, got int32"),
        ({"valid": np.zeros((2, 6), bool)}, r"valid must have shape \[B=2, T=5\]"),
        ({"chunk_size": 0}, "chunk_size must be an int >= 1 or None, got 0"),
        ({"chunk_size": -1}, "chunk_size must be an int >= 1 or None, got -1"),
        ({"chunk_size": True}, "chunk_size must be an int >= 1 or None, got True"),
        ({"scale": "1"}, "scale must be a finite Python number or None, got '1'"),
        ({"scale": float("nan")}, "scale must be a finite Python number or None, got nan"),
        ({"implementation": "xls"}, "did you mean 'xla'"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        gated_linear_attention(**(draw("head", 2, 5) | change))


def test_a_named_implementation_refuses_what_it_does_not_serve():
    with pytest.raises(UnsupportedError, match="gated_linear_attention: mosaic_gpu does not serve widths K=5, V=3"):
        gated_linear_attention(**draw("none", 1, 2), implementation="mosaic_gpu")


def test_equals_the_state_space_dual_form_of_transformers():
    """Mamba-2: q = C, k = B, v = dt x, log_decay = dt A; the state of transformers is [B, H, P, N]."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    args = draw("head", 2, CHUNK + 7)
    rng = np.random.default_rng(8)
    dt = np.exp(rng.normal(size=args["log_decay"].shape)).astype(np.float32)
    A = -np.exp(rng.normal(size=(4,))).astype(np.float32)
    ours = args | {"v": dt[..., None] * args["v"], "log_decay": dt * A}
    leaves = {n: torch.tensor(a, requires_grad=True) for n, a in (args | {"dt": dt}).items() if n != "log_decay"}
    y, state = modeling.mamba2_chunk_scan(
        *(leaves["v"], leaves["dt"], torch.tensor(A), leaves["k"], leaves["q"]),
        chunk_size=16,
        initial_states=leaves["state"].transpose(2, 3),
        return_final_states=True,
    )
    dy, dstate = draw_cotangents(args)
    torch.autograd.backward((y, state), (torch.tensor(dy), torch.tensor(dstate).transpose(2, 3)))
    out, gradients = run_and_pull(ours, (dy, dstate), scale=1.0)
    assert_close(out, (y.detach().numpy(), state.detach().transpose(2, 3).numpy()), VALUE_TOLERANCE)
    gradients["dt"] = np.sum(gradients["v"] * args["v"], axis=-1) + gradients["log_decay"] * A
    gradients["v"] = gradients["v"] * dt[..., None]
    for name, leaf in leaves.items():
        assert_close(gradients[name], leaf.grad.numpy(), GRADIENT_TOLERANCE, name)

"""The mLSTM cell against float64 loops forward and backward, autodiff of the reference, transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mlstm import State, mlstm
from pallas_kernels.mlstm.op import default_chunk
from pallas_kernels.mlstm.shapes import MODELS, MLSTMShape
from tests.pallas_kernels.sequences import LAYOUTS, assert_close, check_transformations, masks

VALUE_TOLERANCE = 4e-6  # float32, relative to the largest magnitude
GRADIENT_TOLERANCE = 1e-5
EXTREME_TOLERANCE = 4e-5  # exponents of 150 have an error of 1e-5 in float32
DIFFERENCE_TOLERANCE = 1e-6  # float64 loop backward against float64 central differences
BFLOAT16_TOLERANCE = 2.0**-7  # outputs and gradients are rounded to 8 bits of mantissa once
CHUNK = 16
IMPLEMENTATIONS = ("reference", "xla")
TOKENS = ("q", "k", "v", "i", "f")
DIFFERENTIABLE = (*TOKENS, "state")


def draw(batch, length, *, heads=2, key=5, value=3, seed=0):
    """Random arguments; forget gates from almost closed to almost open, one head of which hardly forgets."""
    rng = np.random.default_rng(seed)
    shape = MLSTMShape(batch, length, heads, key, value, carried=True, dtype=jnp.float32)
    args = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shape.arrays())
    args["i"] = 2 * args["i"]
    args["f"] = 3 * args["f"]
    args["f"][..., 0] += 5
    return args


def widen(args):
    args = dict(args)
    (batch, _, heads, key), value = args["q"].shape, args["v"].shape[3]
    if args["state"] is None:
        args["state"] = State(np.zeros((batch, heads, key, value)), np.zeros((batch, heads, key)), np.zeros(heads))
        args["state"] = args["state"]._replace(m=np.zeros((batch, heads)))
    return jax.tree.map(lambda a: np.asarray(a, np.float64), args)


def step(token, state, scale, eps):
    """One token of one row, all heads, as published; returns everything the backward pass wants."""
    q, k, v, i, f = token
    C, n, m = state
    lf = -np.logaddexp(0, -f)
    new_m = np.maximum(lf + m, i)
    forget, write = np.exp(lf + m - new_m), np.exp(i - new_m)
    C = forget[:, None, None] * C + write[:, None, None] * k[:, :, None] * v[:, None, :]
    n = forget[:, None] * n + write[:, None] * k
    denominator = scale * np.sum(q * n, axis=1)
    total = np.maximum(np.abs(denominator), np.exp(-new_m)) + eps
    y = scale * np.einsum("hk,hkv->hv", q, C) / total[:, None]
    return y, (C, n, new_m), (lf, forget, write, denominator, total)


def loop(args, reset=None, valid=None, scale=None, eps=1e-6, states=None):
    """Float64, token by token; `states` collects the state before each token."""
    args = widen(args)
    scale = args["q"].shape[-1] ** -0.5 if scale is None else scale
    y, state = np.zeros(args["v"].shape), State(*(s.copy() for s in args["state"]))
    for row, t in np.ndindex(y.shape[:2]):
        if valid is not None and not valid[row, t]:
            continue
        if reset is not None and reset[row, t]:
            for s in state:
                s[row] = 0
        before = tuple(s[row].copy() for s in state)
        if states is not None:
            states[row, t] = before
        y[row, t], after, _ = step([args[n][row, t] for n in TOKENS], before, scale, eps)
        for s, new in zip(state, after, strict=True):
            s[row] = new
    return y, state


def loop_backward(args, cotangents, reset=None, valid=None, scale=None, eps=1e-6):
    """Float64, the adjoint of every line of `step`."""
    states = {}
    loop(args, reset, valid, scale, eps, states)
    without_state = args["state"] is None
    args = widen(args)
    scale = args["q"].shape[-1] ** -0.5 if scale is None else scale
    dy, dstate = jax.tree.map(lambda c: np.array(c, np.float64), cotangents)
    grads = {n: np.zeros(args[n].shape) for n in TOKENS}
    for row, t in sorted(states, reverse=True):
        q, k, v, i, f = token = [args[n][row, t] for n in TOKENS]
        C, n, m = states[row, t]
        y, (new_C, new_n, new_m), (lf, forget, write, denominator, total) = step(token, states[row, t], scale, eps)
        dC, dn, dm = (s[row] for s in dstate)
        dnumerator = dy[row, t] / total[:, None]
        dtotal = -np.sum(dy[row, t] * y, axis=1) / total
        wins = np.abs(denominator) > np.exp(-new_m)
        ddenominator = np.where(wins, dtotal * np.sign(denominator), 0)
        dm = dm - np.where(wins, 0, dtotal * np.exp(-new_m))
        dC = dC + scale * q[:, :, None] * dnumerator[:, None, :]
        dn = dn + scale * ddenominator[:, None] * q
        dq = scale * (np.einsum("hkv,hv->hk", new_C, dnumerator) + ddenominator[:, None] * new_n)
        dk = write[:, None] * (np.einsum("hkv,hv->hk", dC, v) + dn)
        dv = write[:, None] * np.einsum("hkv,hk->hv", dC, k)
        kept = forget * (np.sum(dC * C, axis=(1, 2)) + np.sum(dn * n, axis=1))
        written = np.sum(k * dk, axis=1)
        dm = dm - kept - written
        decays = lf + m > i
        for name, g in zip(TOKENS, (dq, dk, dv, written + np.where(decays, 0, dm), 0), strict=True):
            grads[name][row, t] = g
        grads["f"][row, t] = (kept + np.where(decays, dm, 0)) * np.exp(-np.logaddexp(0, f))
        before = forget[:, None, None] * dC, forget[:, None] * dn, kept + np.where(decays, dm, 0)
        for s, g in zip(dstate, before, strict=True):
            s[row] = 0 if reset is not None and reset[row, t] else g
    return grads | {"state": None if without_state else State(*dstate)}


@functools.partial(jax.jit, static_argnames=("implementation", "scale", "eps", "chunk_size"))
def run(args, reset=None, valid=None, implementation="xla", scale=None, eps=1e-6, chunk_size=CHUNK):
    options = {"scale": scale, "eps": eps, "chunk_size": chunk_size, "implementation": implementation}
    return mlstm(**args, reset=reset, valid=valid, **options)


@functools.partial(jax.jit, static_argnames=("implementation", "scale", "eps", "chunk_size"))
def run_and_pull(args, cotangents, reset=None, valid=None, **options):
    """Outputs and the gradients of all arguments."""
    out, pullback = jax.vjp(lambda args: run(args, reset, valid, **options), args)
    return out, pullback(cotangents)[0]


def draw_cotangents(args, seed=1):
    rng = np.random.default_rng(seed)
    out = jax.eval_shape(run, args)
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), out)


def cut(args, start, end):
    return {n: a[:, start:end] if n in TOKENS else a for n, a in args.items()}


def poison(args, valid):
    """NaN at padding."""
    return args | {
        n: np.where(valid.reshape(*valid.shape, *(1,) * (args[n].ndim - 2)), args[n], np.nan) for n in TOKENS
    }


def check_gradients(actual, expected, tolerance, what="", *, terms=0.0):
    """`terms` is the size of what a gradient is a difference of, where that is larger than the gradient."""
    for name in DIFFERENTIABLE:
        assert (actual[name] is None) == (expected[name] is None), name
        for leaf, a, e in zip(
            ("", "n", "m"), jax.tree.leaves(actual[name]), jax.tree.leaves(expected[name]), strict=False
        ):
            assert_close(np.append(a, terms), np.append(e, terms), tolerance, f"{what} {name} {leaf}")


def check(args, cotangents, reset=None, valid=None, *, implementations=("xla",), extreme=False, **options):
    """Values and every gradient equal the float64 loops."""
    given = {n: o for n, o in options.items() if n in ("scale", "eps")}
    expected = loop(args, reset, valid, **given)
    gradients = loop_backward(args, cotangents, reset, valid, **given)
    value, gradient = (EXTREME_TOLERANCE,) * 2 if extreme else (VALUE_TOLERANCE, GRADIENT_TOLERANCE)
    for implementation in implementations:
        out, actual = run_and_pull(args, cotangents, reset, valid, implementation=implementation, **options)
        assert_close(out, expected, value, implementation)
        check_gradients(actual, gradients, gradient, implementation, terms=float(extreme))
        assert jax.tree.map(lambda a: a.dtype, actual) == jax.tree.map(lambda a: a.dtype, args)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_any_length_equals_the_loops(length):
    args = draw(2, length, seed=length)
    check(args, draw_cotangents(args), implementations=IMPLEMENTATIONS if length == CHUNK else ("xla",))


def test_the_loop_backward_equals_float64_differences():
    args = draw(2, 9, seed=3)
    reset, valid = masks("between", 2, 9)
    cotangents = draw_cotangents(args)
    eps = 0.1  # so that the paths through m are seen
    gradients = loop_backward(args, cotangents, reset, valid, eps=eps)
    rng = np.random.default_rng(4)
    wide = widen(args)

    def value(args):
        out = jax.tree.leaves(loop(args, reset, valid, eps=eps))
        return sum(np.sum(o * c) for o, c in zip(out, jax.tree.leaves(cotangents), strict=True))

    leaves, tree = jax.tree.flatten(wide)
    slopes = jax.tree.leaves(gradients)
    for at, leaf in enumerate(leaves):
        direction = rng.normal(size=leaf.shape)
        up, down = (
            value(tree.unflatten([*leaves[:at], leaf + e * direction, *leaves[at + 1 :]])) for e in (1e-6, -1e-6)
        )
        scale = np.sum(np.abs(slopes[at] * direction))
        slope = np.sum(slopes[at] * direction)
        assert abs(slope - (up - down) / 2e-6) <= DIFFERENCE_TOLERANCE * scale, at


def test_a_large_epsilon_shows_the_gradients_through_the_stabiliser():
    args = draw(2, 2 * CHUNK + 3, seed=5)
    check(args, draw_cotangents(args), *masks("packed", 2, 2 * CHUNK + 3), eps=0.1, scale=-0.7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_and_poisoned_padding(layout):
    length = 2 * CHUNK + 5
    args = draw(3, length, seed=7)
    reset, valid = masks(layout, 3, length)
    cotangents = draw_cotangents(args)
    expected, gradients = loop(args, reset, valid), loop_backward(args, cotangents, reset, valid)
    dy = np.where(valid[..., None, None], cotangents[0], np.nan)
    for implementation in IMPLEMENTATIONS if layout == "between" else ("xla",):
        pulled = cotangents if implementation == "reference" else (dy, cotangents[1])
        out, actual = run_and_pull(poison(args, valid), pulled, reset, valid, implementation=implementation)
        assert_close(out, expected, VALUE_TOLERANCE, implementation)
        assert (np.asarray(out[0])[~valid] == 0).all()
        check_gradients(actual, gradients, GRADIENT_TOLERANCE, implementation)
        for name in TOKENS:
            assert (np.asarray(actual[name])[~valid] == 0).all(), name


def test_one_token_with_resets_and_poisoned_padding():
    args = draw(3, 1)
    reset, valid = np.array([[True], [False], [True]]), np.array([[True], [True], [False]])
    check(args, draw_cotangents(args), reset & valid, valid)
    y, state = run(poison(args, valid), reset, valid)
    assert (np.asarray(y)[2] == 0).all()
    assert all((np.asarray(new)[2] == old[2]).all() for new, old in zip(state, args["state"], strict=True))


def test_a_reset_at_padding_is_ignored():
    args = draw(2, 11)
    valid = np.arange(11)[None].repeat(2, 0) != 4
    for implementation in IMPLEMENTATIONS:
        assert_close(run(args, ~valid, valid, implementation), loop(args, None, valid), VALUE_TOLERANCE)


@pytest.mark.parametrize("length", [1, CHUNK + 3])
def test_a_reset_drops_even_a_state_that_is_not_finite(length):
    args = draw(1, length)
    fresh = args | {"state": None}
    args["state"] = jax.tree.map(lambda s: np.full_like(s, np.nan), args["state"])._replace(m=args["state"].m)
    reset = np.arange(length)[None] == 0
    cotangents = draw_cotangents(args)
    expected = loop_backward(fresh, cotangents)
    for implementation in IMPLEMENTATIONS:
        assert_close(run(args, reset, implementation=implementation), loop(fresh), VALUE_TOLERANCE)
    _, gradients = run_and_pull(args, cotangents, reset)
    check_gradients(gradients | {"state": None}, expected, GRADIENT_TOLERANCE, terms=1.0)
    assert_close(gradients["state"], jax.tree.map(np.zeros_like, cotangents[1]), GRADIENT_TOLERANCE)


@pytest.mark.parametrize(("size", "length"), [(50, 3 * CHUNK + 1), (50, 1), (15, 256)])
def test_extreme_gates_are_finite_and_exact(size, length):
    """Gates that open and shut from token to token: nothing overflows, and no sum of decays swallows the small ones."""
    args = draw(2, length, seed=11)
    rng = np.random.default_rng(12)
    for name in ("i", "f"):
        chosen = rng.choice([-size, 0, 3, size], p=(0.2, 0.3, 0.4, 0.1), size=args[name].shape)
        args[name] = (chosen + 0.1 * args[name]).astype(np.float32)
    check(args, draw_cotangents(args), extreme=True, chunk_size=min(256, max(16, length)))


@pytest.mark.parametrize(("i", "f"), [(-50, -50), (-50, 50), (50, -50), (50, 50)])
def test_gates_stuck_at_an_extreme(i, f):
    args = draw(1, 2 * CHUNK)
    args["i"], args["f"] = (np.float32(x) + 0.1 * args[n] for n, x in (("i", i), ("f", f)))
    check(args, draw_cotangents(args), extreme=True)


def test_gates_beyond_the_range_of_the_exponential_stay_finite():
    """exp(-m) overflows in float32 from m = -89 on: the output is 0 to the last digit, and the gradients are finite."""
    args = draw(1, CHUNK) | {"state": None}
    args["f"][:, 3], args["i"][:] = -1e4, -3e3
    for implementation in IMPLEMENTATIONS:
        out, gradients = run_and_pull(args, draw_cotangents(args), implementation=implementation)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))
        assert (np.asarray(out[0]) == 0).all()
    args["f"][:], args["i"][:, 1] = -np.inf, -np.inf
    args["i"][:, 2:] = 1.0
    values = [run(args, implementation=implementation)[0] for implementation in IMPLEMENTATIONS]
    assert_close(*values, VALUE_TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_unit_of_the_state_is_free_but_for_epsilon(implementation):
    """C and n are in units of exp(m), so (C, n, m) and (C / e^c, n / e^c, m + c) are one state."""
    args = draw(2, CHUNK + 5)
    shift = np.float32([[1.5, -2.0], [4.0, -3.0]])
    C, n, m = args["state"]
    moved = State(C * np.exp(-shift)[..., None, None], n * np.exp(-shift)[..., None], m + shift)
    cotangents = draw_cotangents(args)
    cotangents = cotangents[0], jax.tree.map(np.zeros_like, cotangents[1])
    options = {"implementation": implementation, "eps": 1e-30}
    (y, state), gradients = run_and_pull(args, cotangents, **options)
    (other_y, other_state), other = run_and_pull(args | {"state": moved}, cotangents, **options)
    assert_close(other_y, y, VALUE_TOLERANCE)
    assert_close([other[n] for n in TOKENS], [gradients[n] for n in TOKENS], GRADIENT_TOLERANCE)
    for a, b in ((state.C, other_state.C), (state.n[..., None], other_state.n[..., None])):
        units = (np.exp(s.m)[..., None, None] for s in (state, other_state))
        assert_close(*(x * unit for x, unit in zip((a, b), units, strict=True)), VALUE_TOLERANCE)
    # So the gradient of m is that of the logarithm of the unit.
    dC, dn, dm = gradients["state"]
    assert_close(dm, np.sum(C * dC, axis=(2, 3)) + np.sum(n * dn, axis=2), GRADIENT_TOLERANCE)


def test_cuts_with_the_state_carried_equal_one_pass():
    length, cuts = 53, (9, 10, 11, 50)
    args = draw(2, length, seed=5)
    reset, valid = masks("between", 2, length)
    state, pieces = args["state"], []
    for start, end in zip((0, *cuts), (*cuts, length), strict=True):
        piece = cut(args, start, end) | {"state": state}
        y, state = run(piece, reset[:, start:end], valid[:, start:end])
        pieces.append(y)
    assert_close((np.concatenate(pieces, axis=1), state), loop(args, reset, valid), VALUE_TOLERANCE)


def test_packed_documents_equal_separate_calls_in_values_and_gradients():
    lengths = (CHUNK, 1, 1, CHUNK)
    args = draw(1, sum(lengths)) | {"state": None}
    starts = np.cumsum((0, *lengths[:-1]))
    reset = np.isin(np.arange(sum(lengths)), starts)[None]
    dy, dstate = draw_cotangents(args)
    (y, state), gradients = run_and_pull(args, (dy, dstate), reset)
    out = None
    for start, length in zip(starts, lengths, strict=True):
        end = start + length
        last = dstate if end == sum(lengths) else jax.tree.map(np.zeros_like, dstate)
        out, expected = run_and_pull(cut(args, start, end), (dy[:, start:end], last))
        assert_close(y[:, start:end], out[0], VALUE_TOLERANCE)
        for name in TOKENS:
            assert_close(gradients[name][:, start:end], expected[name], GRADIENT_TOLERANCE, name)
    assert_close(state, out[1], VALUE_TOLERANCE)


@pytest.mark.parametrize("chunk_size", [1, 24, None])
def test_the_chunk_size_changes_nothing(chunk_size):
    args = draw(2, 67)
    check(args, draw_cotangents(args), chunk_size=chunk_size)


def test_no_state_and_other_widths():
    args = draw(1, CHUNK + 3, heads=3, key=4, value=6) | {"state": None}
    check(args, draw_cotangents(args))


@pytest.mark.parametrize("length", [1, CHUNK + 1])
def test_bfloat16_inputs_with_float32_state(length):
    args = draw(2, length)
    half = args | {n: jnp.asarray(args[n], jnp.bfloat16) for n in TOKENS}
    rounded = jax.tree.map(lambda a: np.asarray(a, np.float32), half)
    dy, dstate = draw_cotangents(args)
    dy = jnp.asarray(dy, jnp.bfloat16)
    (y, state), gradients = run_and_pull(half, (dy, dstate))
    y_loop, state_loop = loop(rounded)
    assert y.dtype == jnp.bfloat16
    assert_close(y, y_loop, BFLOAT16_TOLERANCE)
    assert_close(state, state_loop, VALUE_TOLERANCE)
    assert jax.tree.map(lambda a: a.dtype, gradients) == jax.tree.map(lambda a: a.dtype, half)
    check_gradients(gradients, loop_backward(rounded, (dy, dstate)), BFLOAT16_TOLERANCE)
    y, _ = jax.eval_shape(run, args | {"q": half["q"]})
    assert y.dtype == jnp.float32, "the output has the dtype of v"


@pytest.mark.slow
def test_transformations():
    args = draw(2, 2 * CHUNK + 1)

    def flat(args, implementation="xla"):
        y, state = run(args, implementation=implementation)
        return y, state.C

    cotangents = draw_cotangents(args)
    check_transformations(flat, args, (cotangents[0], cotangents[1].C), GRADIENT_TOLERANCE, name="v")


def test_causality_by_gradient():
    args = draw(1, 2 * CHUNK)
    dy, dstate = draw_cotangents(args)
    dy[:, :5] = dy[:, 6:] = 0
    _, gradients = run_and_pull(args, (dy, jax.tree.map(np.zeros_like, dstate)))
    for name in ("q", "k", "v", "i"):
        assert (np.asarray(gradients[name])[:, 6:] == 0).all(), name
        assert (np.asarray(gradients[name])[:, 5] != 0).any(), name
    # Of f only to rounding: its gradient is a suffix sum of terms that cancel.
    gradient = np.abs(np.asarray(gradients["f"]))
    assert gradient[:, 6:].max() <= GRADIENT_TOLERANCE * gradient.max()


def test_training_keeps_no_array_of_all_states():
    shape = MODELS["xlstm_7b"]
    args = MLSTMShape(1, 4096, 8, 256, 512, carried=True).arrays()

    def step(args, cotangents):
        out, pullback = jax.vjp(lambda a: mlstm(**a, **shape.options(), implementation="xla"), args)
        return out, pullback(cotangents)

    analysis = jax.jit(step).lower(args, (args["v"], args["state"])).compile().memory_analysis()
    state = 4 * args["state"].C.size
    assert analysis.output_size_in_bytes > 2 * 2 * args["v"].size + state  # y, dv, new C
    boundaries = state * shape.time // default_chunk(shape.key, shape.value)
    assert boundaries < analysis.temp_size_in_bytes < 0.02 * shape.time * state


@pytest.mark.parametrize("length", [1, 2 * CHUNK + 7])
def test_equals_transformers_from_a_carried_state(length):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    if modeling.external_xlstm:
        pytest.skip("the package xlstm replaces the cell of transformers")
    args = draw(2, length)
    leaves = jax.tree.map(lambda a: torch.tensor(a, requires_grad=True), args)
    swapped = {n: leaves[n].transpose(1, 2) for n in TOKENS}
    names = {"q": "query", "k": "key", "v": "value", "i": "igate", "f": "fgate"}
    C, n, m = leaves["state"]
    y, state = modeling.wrap_chunkwise_arbitrary_sequence_length(
        modeling.mlstm_chunkwise_native_autograd,
        modeling.mlstm_recurrent_sequence_native,
        modeling.mlstm_recurrent_step_native,
        **{names[name]: tensor for name, tensor in swapped.items()},
        **{"c_initial": C, "n_initial": n, "m_initial": m[..., None]},
        chunk_size=16,
    )
    y, state = y.transpose(1, 2), State(state[0], state[1], state[2][..., 0])
    cotangents = draw_cotangents(args)
    torch.autograd.backward((y, *state), jax.tree.leaves(jax.tree.map(torch.tensor, cotangents)))
    out, gradients = run_and_pull(args, cotangents)
    assert_close(out, jax.tree.map(lambda a: a.detach().numpy(), (y, state)), VALUE_TOLERANCE)
    check_gradients(gradients, jax.tree.map(lambda a: a.grad.numpy(), leaves), GRADIENT_TOLERANCE)

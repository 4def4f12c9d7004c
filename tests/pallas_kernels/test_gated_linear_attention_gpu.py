"""The GPU kernels of gated linear attention: interpreted against float64 loops, and lowered without a GPU."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.gated_linear_attention import (
    gated_linear_attention,
    mosaic_gpu,
    mosaic_gpu_backward,
    mosaic_gpu_channel,
    mosaic_gpu_channel_backward,
    xla,
)
from pallas_kernels.gated_linear_attention.mosaic_gpu_layout import MAX_KEY, SLOTS, STEP, layout, slots
from pallas_kernels.gated_linear_attention.shapes import MODELS
from tests.pallas_kernels.gpu import (
    QUICK,
    check_mapped,
    check_transformations_lower,
    count_kernels,
    lower_function,
    lower_op,
    simulate,
)
from tests.pallas_kernels.sequences import assert_close, masks
from tests.pallas_kernels.test_gated_linear_attention import (
    BFLOAT16_TOLERANCE,
    DIFFERENTIABLE,
    by_token,
    draw,
    draw_cotangents,
    loop,
    loop_backward,
)

SMEM = 227 * 1024  # what a block of threads may use
FORMS = ("head", "channel")  # of log decays: they have kernels of their own
TOLERANCE = 2.0**-16  # float32 in two parts: what a factor loses at most, and more than sums of many products do
BFLOAT16_STATE_TOLERANCE = 2.0**-7  # what enters a state is rounded for the matrix unit


def arrays_of(args, reset=None, valid=None):
    return (*(args[name] for name in DIFFERENTIABLE), reset, valid)


def call(args, cotangents, reset=None, valid=None, *, scale=None, chunk_size=128, races=True):
    """Values, saved states and gradients of the interpreted kernels, in float32."""
    arrays, length = arrays_of(args, reset, valid), args["q"].shape[1]
    scale = args["q"].shape[-1] ** -0.5 if scale is None else scale
    options = {"scale": scale, "chunk_size": min(chunk_size, length)}

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(arrays, cotangents):
        y, state, boundaries = mosaic_gpu.forward(*arrays, **options, save=True)
        grads = mosaic_gpu_backward.backward(*arrays, boundaries, *cotangents, **options)
        return (y, state), boundaries, dict(zip(DIFFERENTIABLE, grads, strict=True))

    with simulate(detect_races=races):
        return jax.block_until_ready(both(arrays, cotangents))


def check(args, reset=None, valid=None, **options):
    """Values and every gradient equal the float64 loops, the saved states those of XLA; padding is poisoned."""
    cotangents, scale = draw_cotangents(args), options.get("scale")
    expected, gradients = loop(args, reset, valid, scale), loop_backward(args, cotangents, reset, valid, scale)
    poisoned, dy = args, cotangents[0]
    if valid is not None:
        poisoned = {n: None if a is None else a.copy() for n, a in args.items()}
        for name in by_token(args):
            poisoned[name][~valid] = np.nan
        dy = np.where(valid[..., None, None], dy, np.nan)
    out, boundaries, actual = call(poisoned, (dy, cotangents[1]), reset, valid, **options)
    assert_close(out, expected, TOLERANCE)
    for name in DIFFERENTIABLE:
        assert (actual[name] is None) == (gradients[name] is None), name
        if name == "log_decay" and gradients[name] is not None and gradients[name].ndim == 1:
            # What tokens contribute may cancel.
            each = args | {name: np.broadcast_to(args[name], args["v"].shape[:3])}
            each = loop_backward(each, cotangents, reset, valid, scale)[name]
            assert np.abs(actual[name] - gradients[name]).max() <= TOLERANCE * np.abs(each).sum(axis=(0, 1)).max()
        else:
            assert_close(actual[name], gradients[name], TOLERANCE, name)
    if valid is not None:
        assert (np.asarray(out[0])[~valid] == 0).all()
        assert all((np.asarray(actual[name])[~valid] == 0).all() for name in by_token(args))
    distance = min(options.get("chunk_size", 128), args["q"].shape[1])
    forward = functools.partial(xla.forward, scale=1.0, chunk_size=distance, save=True)
    assert_close(
        boundaries,
        jax.jit(forward)(*arrays_of(args, reset, valid))[2],
        TOLERANCE,
        "boundaries",
    )


@pytest.mark.parametrize(
    ("decay", "length", "heads", "groups", "key", "value", "options"),
    [
        ("head", STEP - 1, 1, 1, 64, 64, {}),
        ("constant", STEP, 2, 2, 64, 64, {"scale": -0.7}),
        ("none", STEP + 1, 2, 1, 64, 64, {"chunk_size": 64}),
        # blocks of rows and of columns, a state from one that was saved
        pytest.param("head", 2 * STEP + 3, 2, 1, 128, 128, {}, marks=pytest.mark.slow),
        ("channel", 2, 1, 1, 64, 64, {}),
        pytest.param("channel", STEP - 1, 1, 1, 64, 128, {}, marks=pytest.mark.slow),
        pytest.param("channel", STEP, 2, 2, 64, 64, {"scale": -0.7}, marks=pytest.mark.slow),
        pytest.param("channel", STEP + 1, 2, 1, 64, 64, {"chunk_size": 64}, marks=pytest.mark.slow),
        ("channel", 2 * STEP + 3, 2, 1, 128, 64, {}),
    ],
)
def test_any_length_decay_and_width(decay, length, heads, groups, key, value, options):
    args = draw(decay, 2 if length == STEP else 1, length, heads=heads, groups=groups, key=key, value=value)
    if decay == "none" or length == 2:
        args["state"] = None
    check(args, **options)


@pytest.mark.parametrize("decay", FORMS)
def test_keys_that_leave_room_for_one_step(decay):
    """Those of the next step come once this one has been written out; the gradient of so wide keys does not fit."""
    args = draw(decay, 1, STEP + 9, heads=1, groups=1, key=192, value=64)
    run = functools.partial(gated_linear_attention, **args, implementation="mosaic_gpu")
    with simulate():
        assert_close(jax.block_until_ready(jax.jit(run, compiler_options=QUICK)()), loop(args), TOLERANCE)


@pytest.mark.parametrize("decay", FORMS)
def test_packed_documents(decay):
    args = draw(decay, 2, 2 * STEP + 5, heads=1, groups=1, key=64, value=64)
    check(args, *masks("packed", 2, 2 * STEP + 5))


@pytest.mark.parametrize("decay", FORMS)
def test_poisoned_padding(decay):
    """On the left, on the right, between documents, and nothing else."""
    rows = (("left", 1), ("right", 1), ("between", 0), ("between", 1), ("empty", 0))
    drawn = [[mask[row] for mask in masks(layout, 2, STEP + 5)] for layout, row in rows]
    reset, valid = (np.stack(mask) for mask in zip(*drawn, strict=True))
    check(draw(decay, len(rows), STEP + 5, heads=1, groups=1, key=64, value=64), reset, valid)


@pytest.mark.parametrize("decay", FORMS)
def test_decays_of_every_size(decay):
    """Those that clear the state or hardly change it, side by side: nothing overflows and nothing cancels."""
    args = draw(decay, 1, STEP + 7, heads=1, groups=1, key=64, value=64)
    rng = np.random.default_rng(3)
    mix = [-np.inf, -1e4, -50.0, -3.0, -0.1, -1e-6, -1e-12, 0.0]
    args["log_decay"] = rng.choice(mix, size=args["log_decay"].shape).astype(np.float32)
    args["log_decay"][:, -30:] = rng.choice(mix[4:], size=args["log_decay"][:, -30:].shape)
    cotangents = draw_cotangents(args)
    out, _, actual = call(args, cotangents)
    expected = loop_backward(args | {"log_decay": np.maximum(args["log_decay"], -1e4)}, cotangents)
    # Sums of one product, in which both factors lose, and the product of the remainders.
    assert_close(out, loop(args), 2 * TOLERANCE)
    assert_close(actual, expected, 2 * TOLERANCE)


@pytest.mark.parametrize("decay", FORMS)
def test_a_reset_drops_even_a_state_that_is_not_finite(decay):
    args, start = draw(decay, 1, 9, heads=1, groups=1, key=64, value=64), 3
    args["state"][:] = np.nan
    reset = np.arange(9)[None] == start
    (dy, dstate), fresh = draw_cotangents(args), {n: args[n][:, start:] for n in by_token(args)}
    expected = loop(args | fresh | {"state": None})
    gradients = loop_backward(args | fresh | {"state": None}, (dy[:, start:], dstate))
    dy = np.where(reset.cumsum(1)[..., None, None] > 0, dy, 0)
    out, _, actual = call(args, (dy, dstate), reset)
    assert_close((out[0][:, start:], out[1]), expected, TOLERANCE)
    for name in ("q", "k", "v"):
        assert_close(actual[name][:, start:], gradients[name], TOLERANCE, name)


@pytest.mark.parametrize(
    ("dtype", "length", "key"),
    [
        (jnp.bfloat16, 1, 64),  # XLA's step, which nothing simulates
        (jnp.bfloat16, 2 * STEP + 3, 64),
        (jnp.bfloat16, STEP + 6, 192),  # one step at a time in shared memory, backward
        (jnp.float32, 1, 64),
        (jnp.float32, STEP + 6, 64),
    ],
)
@pytest.mark.parametrize("decay", FORMS)
def test_through_the_op(decay, dtype, length, key):
    args = draw(decay, 1, length, heads=2, groups=1, key=key, value=64)
    args = {n: a if n in ("state", "log_decay") else jnp.asarray(a, dtype) for n, a in args.items()}
    rounded = {n: np.asarray(a, np.float32) for n, a in args.items()}
    dy, dstate = draw_cotangents(args)
    cotangents = jnp.asarray(dy, dtype), dstate
    expected = loop(rounded)
    gradients = loop_backward(rounded, (np.asarray(cotangents[0], np.float32), dstate))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(args):
        out, pullback = jax.vjp(lambda a: gated_linear_attention(**a, implementation="mosaic_gpu"), args)
        return out, pullback(cotangents)[0]

    with simulate() if length > 1 else contextlib.nullcontext():
        out, actual = jax.block_until_ready(run(args))
    assert (out[0].dtype, out[1].dtype) == (dtype, jnp.float32)
    half = dtype == jnp.bfloat16
    assert_close(out[0], expected[0], BFLOAT16_TOLERANCE if half else TOLERANCE)
    assert_close(out[1], expected[1], BFLOAT16_STATE_TOLERANCE if half else TOLERANCE)
    for name in DIFFERENTIABLE:
        assert actual[name].dtype == args[name].dtype, name
        assert_close(actual[name], gradients[name], BFLOAT16_TOLERANCE if half else TOLERANCE, name)


@pytest.mark.parametrize("decay", ["head", pytest.param("channel", marks=pytest.mark.slow)])
def test_vmap(decay):
    args = draw(decay, 1, 9, heads=1, groups=1, key=64, value=64)
    args = {n: a if n in ("state", "log_decay") else jnp.asarray(a, jnp.bfloat16) for n, a in args.items()}

    def outputs(args, implementation):
        # Small, so that the sine in the loss is nearly linear: cotangents then do not feel how y was rounded.
        y, state = gated_linear_attention(**args, implementation=implementation)
        return 0.01 * y.astype(jnp.float32), 0.01 * state

    check_mapped(outputs, args, BFLOAT16_TOLERANCE)


@pytest.mark.parametrize(("dtype", "parts"), [(jnp.bfloat16, 1), (jnp.float32, 2)])
def test_buffers_fit_in_shared_memory(dtype, parts):
    """As many steps as fit; alignment and barriers take 2 KiB."""
    square, tile = 2 * STEP * STEP, 2 * STEP * STEP * parts
    for key in range(STEP, MAX_KEY + 1, STEP):
        row = 2 * STEP * key * parts
        sizes = {  # of a step, and of all of them
            mosaic_gpu.scratch: (2 * row + tile + 24 * STEP, row + square),
            mosaic_gpu_backward.scratch: (3 * row + 3 * tile + 24 * STEP, row + 2 * tile + square),
            mosaic_gpu_channel.forward_scratch: (2 * row + 2 * tile + 4 * key + 4 * STEP, row),
            mosaic_gpu_channel_backward.scratch: (4 * row + 3 * tile + 4 * key, 0),
        }
        q, v = (jax.ShapeDtypeStruct((1, STEP, 1, width), dtype) for width in (key, STEP))
        for scratch, (step, shared) in sizes.items():
            chosen = slots(functools.partial(scratch, layout(q, v, STEP)))
            assert chosen * step + shared <= SMEM
            assert chosen == SLOTS or (chosen + 1) * step + shared > SMEM - 2048
            assert chosen > 0 or (parts == 2 and key > 128)
    # Those that make scores, and walk over 64 columns of keys: two blocks of threads at a time in 16 bits.
    assert SLOTS * (2 * tile + 2 * square) + 2 * tile + square + 2048 <= SMEM // (3 - parts)


def served(shape, dtype) -> bool:
    return shape.key % STEP == 0 and shape.value % STEP == 0 and (dtype == jnp.bfloat16 or shape.key <= 128)


# One of each form and width: lengths and numbers of heads do not change a kernel.
FLOAT32 = ("retnet_1.3b", "mamba2_2.7b_packed", "mamba2_2.7b_decode", "mamba2_hybrid_8b", "gla_340m", "gla_1.3b_append")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.bfloat16) for name, shape in MODELS.items() if served(shape, jnp.bfloat16)]
    + [(name, jnp.float32) for name in FLOAT32],
)
def test_lowers_at_every_shape_it_serves(name, dtype):
    shape = dataclasses.replace(MODELS[name], dtype=dtype)
    forward, backward = (2, 3) if shape.decay == "channel" else (1, 1)
    if shape.time == 1:  # XLA decodes
        forward = backward = 0
    if served(shape, dtype):
        assert count_kernels(lower_op(gated_linear_attention, shape)) == forward + backward
    else:
        run = functools.partial(gated_linear_attention, **shape.options(), implementation="mosaic_gpu")
        assert count_kernels(lower_function(lambda arrays: run(**arrays), shape.arrays())) == forward


def abstract(decay="head", dtype=jnp.bfloat16, key=64, value=64, length=200):
    keys, values = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    args = {name: jax.ShapeDtypeStruct((1, length, 1, key), keys) for name in ("q", "k")}
    args["v"] = jax.ShapeDtypeStruct((1, length, 2, value), values)
    decays = {"head": (1, length, 2), "channel": (1, length, 1, key)}
    return args | {"log_decay": jax.ShapeDtypeStruct(decays[decay], jnp.float32)}


def lower(args, implementation="mosaic_gpu", **options):
    def loss(args):
        out = gated_linear_attention(**args, implementation=implementation, **options)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in out)

    return count_kernels(lower_function(jax.grad(loss), args))


def test_lowers_under_transformations():
    args = {n: jnp.ones(a.shape, a.dtype) for n, a in abstract().items()}

    def run(args, implementation):
        y, state = gated_linear_attention(**args | {"v": args["v"].astype(jnp.bfloat16)}, implementation=implementation)
        return y.astype(args["v"].dtype), state

    check_transformations_lower(run, args | {"v": args["v"].astype(jnp.float32)}, name="v")

    def loss(args):
        return jnp.sum(gated_linear_attention(**args, implementation="mosaic_gpu")[0].astype(jnp.float32))

    twice = jax.tree.map(lambda a: jnp.stack([a, a]), args)
    assert count_kernels(lower_function(jax.vmap(jax.grad(loss)), twice)) == 2


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"dtype": jnp.float32, "key": 192}, {}, "K=192 of q and k in float32: .* 227 KiB .*where K=128 fits"),
        ({"dtype": jnp.float32, "key": 256, "decay": "channel"}, {}, "K=256 of q and k in float32: .*where K=128 fits"),
        ({"dtype": (jnp.bfloat16, jnp.float32)}, {}, "v of dtype float32 with q of dtype bfloat16: cast them to one"),
        ({"dtype": jnp.float16}, {}, "q of dtype float16: a state may exceed its range"),
        ({"key": 96}, {}, "widths K=96, V=64"),
        ({"key": 320}, {}, "widths K=320, V=64"),
        ({"value": 72}, {}, "widths K=64, V=72"),
        ({}, {"chunk_size": 96}, "chunk_size=96 for T=200: it must be a multiple of 64, or T at least"),
        ({}, {"chunk_size": 192}, "chunk_size=192 backward"),
    ],
)
def test_what_the_kernels_do_not_serve(change, options, words):
    with pytest.raises(UnsupportedError, match=f"gated_linear_attention: mosaic_gpu does not serve .*{words}"):
        lower(abstract(**change), **options)
    assert lower(abstract(**change), None, **options) == 0


def test_the_kernels_serve_by_name_alone():
    assert lower(abstract()) == 2
    assert lower(abstract(), None) == 0
    assert lower(abstract(), chunk_size=64) == 2
    assert lower(abstract(dtype=jnp.float32), None) == 0
    assert lower(abstract("channel")) == 5
    assert lower(abstract("channel"), None) == 0

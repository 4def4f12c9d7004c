"""The pattern-driven model over all tiny presets: forms that must agree, and what training relies on."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from launch.benchmark_models import recurrent
from tests.trees import (
    FLOAT32_TOLERANCE,
    GRADIENT_TOLERANCE,
    ROUNDING_TOLERANCE,
    assert_close,
    assert_trees_close,
    assert_trees_equal,
    fast_jit,
    redraw,
)
from zoo.core.context import SeqContext
from zoo.mixers import attention
from zoo.models import PRESETS

# Other dense presets differ from Llama in options, which tests/interop compares with transformers in every run;
# tests/models/test_zamba.py has Zamba2 in one pass and in parts; HybriDNA is another order of hybrid-tiny's mixers, and
# tests/mixers has the residual gated convolution.
OTHERS = {name for name in zoo.list_models() if PRESETS.get(name).family == "dense"} - {"llama-tiny"}
OTHERS |= {"zamba2-tiny", "hybridna-tiny", "base-conv-tiny"}
TINY = [
    pytest.param(name, marks=[pytest.mark.slow] if name in OTHERS else [])
    for name in zoo.list_models()
    if name.endswith("-tiny")
]
STARTS = ("samba-tiny", "llama-tiny", "mamba2-tiny", "xlstm-tiny", "matmulfree-tiny", "retnet-tiny")
LENGTH, WINDOW = 13, 6
# Of one model against itself, in parts or in another form: on both sides every layer adds float32 errors to the stream.
MODEL_TOLERANCE = 1e-4
QUANTISED = ("matmulfree-tiny",)  # models with int8 activations, which a float32 error may tip over a tie
INIT_TOLERANCE = 0.1  # nats around log Z; logits at initialisation have a standard deviation of about 0.2


@functools.cache
def model_of(name, **options):
    """A tiny preset, with its window (if any) shorter than the test's sequences."""
    if zoo.create(name).options.get("window") is not None:
        options = {"window": WINDOW, **options}
    return zoo.create(name, **options)


@functools.cache
def run_of(name):
    model = model_of(name)
    return fast_jit(lambda params, tokens, state=None, ctx=None: model.apply(params, tokens, state=state, ctx=ctx))


def tokens_of(seed, batch=2, length=LENGTH, vocab=512):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (batch, length)), jnp.int32)


def loss_of(model, params, tokens):
    logits = model.apply(params, tokens[:, :-1]).logits
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(*one.values, marks=[] if one.values[0] in STARTS else pytest.mark.slow, id=one.values[0])
        for one in TINY
    ],
)
def test_loss_at_init_is_near_log_vocabulary(name):
    model, tokens = model_of(name), tokens_of(0)
    logits = run_of(name)(fast_jit(model.init)(jax.random.key(0)), tokens).logits
    assert logits.dtype == jnp.float32
    targets = tokens_of(1)
    loss = float(jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets)))
    assert abs(loss - math.log(512)) < INIT_TOLERANCE
    assert float(jnp.std(logits)) > 1e-3


@pytest.mark.parametrize("name", TINY)
def test_prefill_and_decode_equal_the_full_forward(name):
    """Ragged prompts of 9 and 5 tokens, padded on the right, then four single tokens of each row."""
    model, tokens, run = model_of(name), tokens_of(2), run_of(name)
    params = redraw(model.param_specs(), 3)
    full = run(params, tokens)
    tolerance = ROUNDING_TOLERANCE if name in QUANTISED else MODEL_TOLERANCE
    lengths, rows = np.array([9, 5]), np.arange(2)
    ctx = SeqContext.from_lengths(lengths, LENGTH)
    out = run(params, tokens, model.init_state(2, LENGTH), ctx)
    inside = np.asarray(ctx.valid)
    assert_close(np.asarray(out.logits)[inside], np.asarray(full.logits)[inside], tolerance, "prefill")
    np.testing.assert_array_equal(out.state.next_position, lengths)
    state = out.state
    for step in range(4):
        out = run(params, tokens[rows, lengths + step][:, None], state)
        assert_close(out.logits[:, 0], np.asarray(full.logits)[rows, lengths + step], tolerance, f"step {step}")
        state = out.state
    np.testing.assert_array_equal(state.next_position, lengths + 4)


@pytest.mark.parametrize("name", recurrent())
def test_decoding_costs_the_same_at_every_position(name):
    """One program and one shape of the state from the first token to the 262,145th, which gets the same answer.

    Only those with a rotation read their position; it turns query and key alike, so that a first token cannot tell.
    """
    model, run, token = model_of(name), run_of(name), tokens_of(18)[:, :1]
    params, fresh = redraw(model.param_specs(), 19), model.init_state(2, LENGTH)
    first = run(params, token, fresh)
    programs = run._cache_size()
    for position in (1 << 10, 1 << 14, 1 << 18):
        assert model.state_specs(2, position) == model.state_specs(2, LENGTH)
        out = run(params, token, dataclasses.replace(fresh, next_position=jnp.full((2,), position, jnp.int32)))
        assert run._cache_size() == programs
        shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) for state in (out.state, fresh)]
        assert shapes[0] == shapes[1]
        np.testing.assert_array_equal(out.state.next_position, position + 1)
        if name in ("retnet-tiny", "hedgehog-llama-tiny"):
            assert_close(out.logits, first.logits, MODEL_TOLERANCE, f"position {position}")
            continue
        moved = dataclasses.replace(out.state, next_position=first.state.next_position)
        assert_trees_equal((out.logits, moved), (first.logits, first.state), f"position {position}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["samba-tiny", "llama-tiny"])
def test_scan_unroll_and_remat_agree(name):
    """Loss and gradients: scan, Python loop, and recomputation of everything or of all but matrix products."""
    plain, tokens = model_of(name), tokens_of(4)
    params = redraw(plain.param_specs(), 5)
    want = fast_jit(jax.value_and_grad(lambda p: loss_of(plain, p, tokens)))(params)
    for remat in ("full", "dots"):
        model = model_of(name, remat=remat)
        have = fast_jit(jax.value_and_grad(lambda p, m=model: loss_of(m, p, tokens)))(params)
        assert_trees_close(have, want, GRADIENT_TOLERANCE, remat)
    have = fast_jit(jax.value_and_grad(lambda p: loss_of(plain, zoo.unroll(p, plain.config), tokens)))(params)
    assert_trees_close(have, want, GRADIENT_TOLERANCE, "unrolled")


@pytest.mark.parametrize("name", ["samba-tiny", "llama-tiny"])
def test_unrolled_state(name):
    model, tokens = model_of(name), tokens_of(6)
    params = redraw(model.param_specs(), 7)
    expected = run_of(name)(params, tokens, model.init_state(2, LENGTH))
    loose = zoo.unroll(params, model.config)
    state = zoo.unroll(model.init_state(2, LENGTH), model.config)
    have = run_of(name)(loose, tokens, state)
    assert_close(have.logits, expected.logits, MODEL_TOLERANCE, "logits")
    assert_trees_close(have.state, zoo.unroll(expected.state, model.config), MODEL_TOLERANCE, "state")
    with pytest.raises(ValueError, match="unrolled parameters need an unrolled state"):
        model.apply(loose, tokens, state=model.init_state(2, LENGTH))


@pytest.mark.parametrize("name", ["samba-tiny", "qwen2-tiny"])
def test_packed_documents_equal_separate_rows(name):
    model, tokens, run = model_of(name), tokens_of(8, 1), run_of(name)
    params = redraw(model.param_specs(), 9)
    ctx = SeqContext.from_segment_ids(jnp.array([[0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 0]]))
    packed = run(params, tokens, None, ctx).logits[0]
    for first, last in ((1, 5), (6, 12)):
        alone = run(params, jnp.roll(tokens, -first, axis=1)).logits[0]  # causal: what follows does not matter
        assert_close(packed[first:last], alone[: last - first], MODEL_TOLERANCE, f"document at {first}")


def test_last_and_no_logits():
    model, tokens = model_of("samba-tiny"), tokens_of(10)
    params = redraw(model.param_specs(), 11)
    ctx = SeqContext.from_lengths([13, 4], LENGTH)
    full = run_of("samba-tiny")(params, tokens, None, ctx)
    last = fast_jit(lambda p: model.apply(p, tokens, ctx=ctx, logits="last"))(params)
    assert_close(last.logits[:, 0], np.asarray(full.logits)[[0, 1], [12, 3]], FLOAT32_TOLERANCE, "last")
    none = jax.eval_shape(lambda p: model.apply(p, tokens, logits="none"), params)
    assert none.logits is None
    assert none.aux["hidden"].shape == (2, LENGTH, 64)
    with pytest.raises(ValueError, match="logits='lats' is not supported; did you mean"):
        model.apply(params, tokens, logits="lats")


def test_samba_overfits_one_batch():
    model, tokens = model_of("samba-tiny", layers=2), tokens_of(12, 4)
    optimiser = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(lambda p: loss_of(model, p, tokens))(params)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    params = fast_jit(model.init)(jax.random.key(0))
    state, losses = optimiser.init(params), []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[0] > 6.0
    assert losses[-1] < 0.1, losses[::10]


def test_a_full_state_is_an_error_or_nan():
    model, tokens = model_of("llama-tiny"), tokens_of(13)
    params, run = redraw(model.param_specs(), 14), run_of("llama-tiny")
    state = run(params, tokens, model.init_state(2, LENGTH)).state
    with pytest.raises(ValueError, match=r"holds 13 positions, 13 are taken and 1 more.*max_length=14"):
        model.apply(params, tokens[:, :1], state=state)
    assert np.isnan(run(params, tokens[:, :1], state).logits).all(), "inside jit a full state answers NaN"
    fresh = run(params, tokens).state  # state=None: just large enough for what was given
    with pytest.raises(ValueError, match="holds 13 positions"):
        model.apply(params, tokens[:, :1], state=fresh)
    # one row full, the other not: only the full one is NaN
    part = run(params, tokens, model.init_state(2, LENGTH), SeqContext.from_lengths([13, 5], LENGTH)).state
    logits = np.asarray(run(params, tokens[:, :1], part).logits)
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()
    endless = model_of("samba-tiny")  # windows and recurrences never fill up
    state = endless.init_state(2, 1)
    out = run_of("samba-tiny")(redraw(endless.param_specs(), 15), tokens, state)
    assert np.isfinite(out.logits).all()


def test_bad_tokens_are_refused():
    model = model_of("mamba-tiny")
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    with pytest.raises(ValueError, match=r"tokens must be integers \[batch, time\], got float32\[2, 3\]"):
        model.apply(params, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="tokens must be integers"):
        model.apply(params, jnp.ones(3, jnp.int32))
    with pytest.raises(ValueError, match="batch size 2, the state has 3"):
        model.apply(params, tokens_of(0), state=model.init_state(3, 4))
    with pytest.raises(ValueError, match=r"ctx is for \(2, 4\), tokens are \(2, 13\)"):
        model.apply(params, tokens_of(0), ctx=SeqContext.from_lengths([4, 4], 4))
    with pytest.raises(ValueError, match="batch_size and max_length must be >= 1"):
        model.state_specs(0)


def test_a_token_outside_the_vocabulary_gives_nan():
    model = model_of("mamba-tiny")
    params, tokens = redraw(model.param_specs(), 16), tokens_of(17).at[0, 4].set(512)
    logits = np.asarray(run_of("mamba-tiny")(params, tokens).logits)
    assert np.isfinite(logits[0, :4]).all()
    assert np.isnan(logits[0, 4:]).all()
    assert np.isfinite(logits[1]).all()


@pytest.mark.parametrize("remat", ["none", "full"])
def test_training_does_not_keep_the_new_state(remat, monkeypatch):
    """Memory of a gradient that ignores the new state equals that of a model that makes none."""
    model, tokens = zoo.create("llama-tiny", remat=remat), jax.ShapeDtypeStruct((2, 256), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))

    def temporaries():
        compiled = jax.jit(jax.grad(lambda p, t: loss_of(model, p, t))).lower(params, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    with_state = temporaries()
    monkeypatch.setattr(attention, "append", lambda state, k, v, ctx: state)
    assert with_state <= 1.001 * temporaries()

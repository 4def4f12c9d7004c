"""The conformance battery: what every registered mixer must show, over all of its example configs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.mixers import harness as h
from tests.mixers.numpy_oracles import straight_through
from tests.mixers.oracles import ORACLES, VISIBLE
from tests.trees import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    GRADIENT_TOLERANCE,
    ORACLE_TOLERANCE,
    assert_close,
    assert_finite,
    assert_trees_close,
    fast_jit,
    largest,
    to_float64,
)
from zoo.core.context import SeqContext
from zoo.core.params import abstract, flatten
from zoo.mixers import MIXERS, mixer_of

DIFFERENCE_STEP = 1e-6  # of central differences in float64: error about step^2 + 1e-16 / step
COMPOSED = ("mlstm_block-0", "zamba_block-0")  # of mixers that the battery runs by themselves
ELSEWHERE = ("mlgru-1", "mlgru-2")  # tests/models has whole models of these in every run
WITH_OPS = [case for case in h.CASES if not case[0].startswith("mlp")]

# Three rows: documents with padding on the left, between and on the right; lengths 4, 1 and odd ones.
SEGMENTS = np.array(
    [
        [0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 0],
        [1, 1, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3],
        [5, 5, 5, 0, 0, 0, 5, 5, 0, 0, 0, 0, 0],
    ]
)


def cases(which=h.CASES, *, others_slow: bool = False):
    """Runs a test over examples; where it is said, composed ones and those after a mixer's first behind `-m slow`."""
    slow = [name in ELSEWHERE or (others_slow and (name in COMPOSED or not name.endswith("-0"))) for name, _ in which]
    marks = [[pytest.mark.slow] if one else [] for one in slow]
    params = [pytest.param(config, id=name, marks=mark) for (name, config), mark in zip(which, marks, strict=True)]
    return pytest.mark.parametrize("config", params)


def test_every_mixer_has_an_oracle():
    assert set(MIXERS.names()) == set(ORACLES) == set(VISIBLE)


@cases()
def test_lengths_from_a_fresh_state_match_the_oracle(config):
    params, x, edge = h.params_of(config), h.inputs(2, length=h.LENGTH), h.boundary(config)
    expected = h.oracle(config, params, x)
    for length in sorted({1, 2, edge - 1, edge, edge + 1, h.LENGTH} - {0}):
        y, _ = h.forward(config)(params, x[:, :length], h.contiguous(0, length))
        assert_close(y, expected[:, :length], h.tolerance(config, ORACLE_TOLERANCE), f"T={length}")


@cases()
def test_packed_documents_with_a_carried_state_match_the_oracle(config):
    """Rows 0 and 1 continue a carried document, row 2 starts afresh at position 0 although its state is not empty."""
    params, history, x = h.params_of(config), h.inputs(3, length=6), h.inputs(4)
    run = h.forward(config)
    _, carried = run(params, history, h.contiguous(0, 6), h.fresh(config))
    start = np.array([6, 6, 0])
    y, _ = run(params, h.poison(x, SEGMENTS), h.context(SEGMENTS, start), carried)
    expected = h.oracle(config, params, x, SEGMENTS, [history[0], history[1], history[2][:0]])
    assert_close(y, expected, h.tolerance(config, ORACLE_TOLERANCE), "y")
    assert not np.asarray(y)[SEGMENTS == 0].any(), "outputs at padding must be 0"


@cases()
def test_gradients_match_differences_of_the_oracle(config):
    """d loss / d(every parameter leaf, x), along one random direction per leaf, packed and padded.

    The oracle's quantisers are replaced by what they added, so that its gradient is the straight-through one.
    """
    params, x = h.params_of(config), h.inputs(5)
    cot_y, cot_state = h.cotangents(config, 6)
    zero_state = jax.tree.map(np.zeros_like, cot_state)
    args = (params, h.poison(x, SEGMENTS), h.fresh(config), h.context(SEGMENTS), cot_y, zero_state)
    (of_params, of_x, _), _ = h.gradient(config)(*args)
    tree, gradients = {"params": to_float64(params), "x": to_float64(x)}, {"params": of_params, "x": of_x}
    leaves, structure = jax.tree.flatten(tree)
    assert_finite(gradients)
    assert not np.asarray(of_x)[SEGMENTS == 0].any(), "gradients at padding must be 0"

    def loss(changed):
        quantisers.rewind()
        moved = jax.tree.unflatten(structure, changed)
        return np.sum(h.oracle(config, moved["params"], moved["x"], SEGMENTS) * cot_y)

    rng, floor = np.random.default_rng(7), 1e-2 * largest(gradients)
    with straight_through() as quantisers:
        loss(leaves)
        for i, (path, gradient) in enumerate(flatten(gradients).items()):
            direction = rng.standard_normal(leaves[i].shape)
            moved = [[leaf + sign * DIFFERENCE_STEP * direction if j == i else leaf for j, leaf in enumerate(leaves)]
                     for sign in (1, -1)]  # fmt: skip
            expected = (loss(moved[0]) - loss(moved[1])) / (2 * DIFFERENCE_STEP)
            actual = np.sum(to_float64(gradient) * direction)
            scale = max(np.linalg.norm(gradient), floor)
            assert abs(actual - expected) <= h.tolerance(config, GRADIENT_TOLERANCE) * scale, (
                f"{path}: {actual} against {expected}, norm {scale}"
            )


@cases(WITH_OPS, others_slow=True)
@pytest.mark.parametrize(
    "packed", [pytest.param(False, id="plain", marks=pytest.mark.slow), pytest.param(True, id="packed")]
)
def test_reference_equals_the_platform_default(config, packed):
    """Outputs, new state and all gradients, d(carried state) included; the default is xla on the CPU."""
    params, history, x = h.params_of(config), h.inputs(8, length=6), h.inputs(9)
    _, carried = h.forward(config)(params, history, h.contiguous(0, 6), h.fresh(config))
    ctx = h.context(SEGMENTS, np.array([6, 6, 0])) if packed else h.contiguous(6, h.LENGTH)
    x = h.poison(x, SEGMENTS) if packed else x
    args = (params, x, carried, ctx, *h.cotangents(config, 10))
    reference, default = h.gradient(config, "reference")(*args), h.gradient(config)(*args)
    assert_trees_close(default[1], reference[1], h.tolerance(config, FLOAT32_TOLERANCE), "outputs and state")
    assert_trees_close(default[0], reference[0], h.tolerance(config, GRADIENT_TOLERANCE), "gradients")


@cases()
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_split_at_any_cut_equals_one_pass(config, packed):
    splits = ((1,) * h.LENGTH, (6, 1, 6), (6, 6, 1), (1, 6, 6))
    h.check_splits(config, SEGMENTS if packed else None, splits)


@cases(WITH_OPS, others_slow=True)
def test_gradient_through_the_carried_state(config):
    """Back-propagation through a split, d(state) included, equals back-propagation through one pass."""
    params, x = h.params_of(config), h.inputs(12)
    cot_y, cot_state = h.cotangents(config, 13)
    whole = h.gradient(config)(params, x, h.fresh(config), h.contiguous(0, h.LENGTH), cot_y, cot_state)[0]
    parts = [slice(0, 6), slice(6, 7), slice(7, 13)]
    states = [h.fresh(config)]
    for part in parts[:-1]:
        ctx = h.contiguous(part.start, part.stop - part.start)
        states.append(h.forward(config)(params, x[:, part], ctx, states[-1])[1])
    of_params, of_x, of_state = jax.tree.map(np.zeros_like, params), [], cot_state
    for part, state in reversed(list(zip(parts, states, strict=True))):
        ctx = h.contiguous(part.start, part.stop - part.start)
        of_part = h.gradient(config)(params, x[:, part], state, ctx, cot_y[:, part], of_state)[0]
        of_params, of_x = jax.tree.map(np.add, of_params, of_part[0]), [of_part[1], *of_x]
        of_state = jax.tree.map(
            lambda g, leaf: np.zeros(leaf.shape, np.float32) if g.dtype == jax.dtypes.float0 else g, of_part[2], state
        )
    assert_trees_close(
        of_params, jax.tree.map(np.asarray, whole[0]), h.tolerance(config, GRADIENT_TOLERANCE), "d params"
    )
    assert_close(np.concatenate(of_x, axis=1), whole[1], h.tolerance(config, GRADIENT_TOLERANCE), "d x")
    assert_trees_close(of_part[2], whole[2], h.tolerance(config, GRADIENT_TOLERANCE), "d state")


@cases(others_slow=True)
def test_packed_equals_separate_documents(config):
    """Every document alone gives the same outputs; the state is that of the last document."""
    params, x, run = h.params_of(config), h.inputs(14), h.forward(config)
    segments = np.array([[1] * 6 + [2] + [3] * 6] * h.BATCH)
    _, carried = run(params, h.inputs(15, length=6), h.contiguous(0, 6), h.fresh(config))
    y, state = run(params, x, h.context(segments, 6), carried)
    first, _ = run(params, x[:, :6], h.contiguous(6, 6), carried)
    second, _ = run(params, x[:, 6:7], h.contiguous(0, 1), h.fresh(config))
    third, last = run(params, x[:, 7:], h.contiguous(0, 6), h.fresh(config))
    assert_close(y, np.concatenate([first, second, third], axis=1), h.tolerance(config, FLOAT32_TOLERANCE), "y")
    assert_trees_close(h.visible_state(state), h.visible_state(last), h.tolerance(config, FLOAT32_TOLERANCE), "state")


@cases(others_slow=True)
def test_padding_is_neutral(config):
    """Two documents with padding on the left, between and on the right, against the same without padding; the padding
    holds NaN. Outputs, state, and gradients of parameters, x and the carried state."""
    params, run = h.params_of(config), h.forward(config)
    compact = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2]] * h.BATCH)
    padded = np.array(
        [
            [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2],
            [1, 1, 1, 1, 0, 0, 0, 2, 2, 2, 2, 2, 0],
            [0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 0, 0],
        ]
    )
    _, carried = run(params, h.inputs(16, length=6), h.contiguous(0, 6), h.fresh(config))
    x, (cot_y, cot_state) = h.inputs(17, length=9), h.cotangents(config, 18, length=9)

    def spread(values, filler):
        out = np.full((h.BATCH, h.LENGTH, h.WIDTH), filler, np.float32)
        out[padded != 0] = values.reshape(-1, h.WIDTH)
        return out

    want, (y_want, state_want) = h.gradient(config)(params, x, carried, h.context(compact, 6), cot_y, cot_state)
    have, (y, state) = h.gradient(config)(
        params, spread(x, np.nan), carried, h.context(padded, 6), spread(cot_y, 1.0), cot_state
    )
    assert_close(y, spread(np.asarray(y_want), 0.0), h.tolerance(config, FLOAT32_TOLERANCE), "y")
    assert_trees_close(
        h.visible_state(state), h.visible_state(state_want), h.tolerance(config, FLOAT32_TOLERANCE), "state"
    )
    assert_trees_close(have[0], want[0], h.tolerance(config, GRADIENT_TOLERANCE), "d params")
    assert_close(have[1], spread(np.asarray(want[1]), 0.0), h.tolerance(config, GRADIENT_TOLERANCE), "d x")
    assert_trees_close(have[2], want[2], h.tolerance(config, GRADIENT_TOLERANCE), "d state")

    nothing = np.zeros((h.BATCH, h.LENGTH), np.int32)
    y, state = run(params, np.full((h.BATCH, h.LENGTH, h.WIDTH), np.nan, np.float32), h.context(nothing), carried)
    assert not np.asarray(y).any(), "a call of padding alone must give 0"
    assert_trees_close(h.visible_state(state), h.visible_state(carried), 0.0, "a call of padding alone moved the state")


@cases(others_slow=True)
def test_ragged_rows_decode_together(config):
    """Prompts of lengths 3, 6 and 5, padded on the right, then five single tokens; row 1 is finished after three."""
    params, x, run = h.params_of(config), h.inputs(19), h.forward(config)
    prompts, decoded = np.array([3, 6, 5]), np.array([5, 3, 5])
    expected = h.oracle(config, params, x)
    prompt = (np.arange(6) < prompts[:, None]).astype(np.int32)
    y, state = run(params, h.poison(x[:, :6], prompt), h.context(prompt), h.fresh(config))
    assert_close(y, expected[:, :6] * prompt[..., None], h.tolerance(config, FLOAT32_TOLERANCE), "prefill")
    for step in range(5):
        alive = (step < decoded).astype(np.int32)[:, None]
        at = np.minimum(prompts + step, h.LENGTH - 1)
        token = x[np.arange(h.BATCH), at][:, None]
        y, state = run(params, h.poison(token, alive), h.context(alive, at), state)
        assert_close(
            y,
            expected[np.arange(h.BATCH), at][:, None] * alive[..., None],
            h.tolerance(config, FLOAT32_TOLERANCE),
            f"step {step}",
        )


@cases(others_slow=True)
def test_causality_by_gradient(config):
    h.check_causality(config, np.array([[1] * 8 + [0] + [2] * 4]))


@cases(others_slow=True)
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(jnp.float32, id="float32"), pytest.param(jnp.bfloat16, id="bfloat16", marks=pytest.mark.slow)],
)
def test_every_form_returns_the_same_state_tree(config, dtype):
    mixer = mixer_of(config)
    params = abstract(mixer.param_specs(config, h.WIDTH))

    def new_state(length, ctx_segments, state):
        x = jax.ShapeDtypeStruct((h.BATCH, length, h.WIDTH), dtype)
        ctx = jax.eval_shape(lambda: h.contiguous(0, length))
        if ctx_segments:
            ctx = SeqContext(ctx.positions, ctx.positions)
        y, new = jax.eval_shape(lambda p, x, ctx, s: mixer.mix(p, x, ctx, s, config=config), params, x, ctx, state)
        assert y.shape == x.shape
        assert y.dtype == dtype
        return new

    declared = abstract(mixer.state_specs(config, h.BATCH, h.CAPACITY, dtype))
    for length in (1, 2, h.LENGTH, h.CAPACITY):
        for segmented in (False, True):
            assert new_state(length, segmented, declared) == declared, f"T={length}, state given"
            fresh = abstract(mixer.state_specs(config, h.BATCH, length, dtype))
            assert new_state(length, segmented, None) == fresh, f"T={length}, state None"
    initial = jax.eval_shape(lambda: mixer.init_state(config, h.BATCH, h.CAPACITY, dtype))
    assert initial == declared


@cases(others_slow=True)
def test_bfloat16_in_with_float32_recurrent_state(config):
    """Bfloat16 activations: within tolerance of the oracle, one token at a time as well; recurrent state is float32."""
    params, x = h.params_of(config), jnp.asarray(h.inputs(22), jnp.bfloat16)
    expected = h.oracle(config, params, x)
    run, state = h.forward(config), h.fresh(config, dtype=jnp.bfloat16)
    y, final = run(params, x, h.contiguous(0, h.LENGTH), state)
    assert y.dtype == jnp.bfloat16
    assert_close(y, expected, h.tolerance(config, BFLOAT16_TOLERANCE), "y")
    specs = flatten(mixer_of(config).state_specs(config, h.BATCH, h.CAPACITY, jnp.bfloat16))
    for path, leaf in flatten(final).items():
        recurrent = "slot" not in specs[path].axes
        assert not recurrent or leaf.dtype == jnp.float32, f"recurrent state {path} is {leaf.dtype}"
    for t in range(h.LENGTH):
        y, state = run(params, x[:, t : t + 1], h.contiguous(t, 1), state)
        assert_close(y[:, 0], expected[:, t], BFLOAT16_TOLERANCE * 2, f"token {t}")


@cases()
@pytest.mark.parametrize("factor", [25.0, -25.0], ids=["up", "negated"])
def test_extreme_parameters_stay_finite(config, factor):
    """All parameters 25 times larger, of either sign: decays underflow or do not decay at all, scores saturate."""
    params = jax.tree.map(lambda leaf: leaf * factor, h.params_of(config))
    args = (h.poison(h.inputs(23), SEGMENTS), h.fresh(config), h.context(SEGMENTS), *h.cotangents(config, 24))
    gradients, outputs = h.gradient(config)(params, *args)
    assert_finite(outputs, "outputs")
    assert_finite(gradients, "gradients")


@cases(others_slow=True)
def test_vmap_and_checkpoint(config):
    params, x = h.params_of(config), h.inputs(25, batch=6).reshape(2, h.BATCH, h.LENGTH, h.WIDTH)
    ctx, mix = h.context(SEGMENTS), mixer_of(config).mix
    apply = lambda p, x: mix(p, x, ctx, h.fresh(config), config=config)  # noqa: E731
    one_by_one = [h.forward(config)(params, one, ctx, h.fresh(config)) for one in x]
    mapped = fast_jit(jax.vmap(apply, in_axes=(None, 0)))(params, x)
    for i, expected in enumerate(one_by_one):
        assert_trees_close(
            jax.tree.map(lambda a, i=i: a[i], mapped), expected, h.tolerance(config, FLOAT32_TOLERANCE), f"vmap {i}"
        )

    again = fast_jit(jax.grad(lambda p, x: jnp.sum(jnp.sin(jax.checkpoint(apply)(p, x)[0])), argnums=(0, 1)))
    again = again(params, x[0])
    zero_state = jax.tree.map(np.zeros_like, h.cotangents(config, 26)[1])
    plain = h.gradient(config)(params, x[0], h.fresh(config), ctx, np.cos(one_by_one[0][0]), zero_state)[0][:2]
    assert_trees_close(again, plain, h.tolerance(config, GRADIENT_TOLERANCE), "checkpoint")

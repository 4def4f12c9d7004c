"""The variants of the LSTM against float64 and torch: outputs, final state, gradients, sizes, and what is refused."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests import goldens
from tests.mixers.lstm_oracles import lstm_states
from tests.trees import (
    FLOAT32_TOLERANCE,
    GRADIENT_TOLERANCE,
    ORACLE_TOLERANCE,
    assert_close,
    assert_trees_close,
    fast_jit,
    largest,
    redraw,
    to_float64,
)
from zoo.core.context import SeqContext
from zoo.core.params import count, flatten
from zoo.mixers import LSTM, mixer_of
from zoo.mixers.lstm import VARIANTS

WIDTH, LENGTH = 5, 6
TORCH = Path(goldens.__file__).with_name("torch_lstm.npz")
DIFFERENCE_STEP = 1e-6  # of central differences in float64: error about step^2 + 1e-16 / step

# Of a layer with M inputs and n cells, by the paper's switches: what is left of 4 n (M + n + 1) + 3 n.
BLOCK = WIDTH * (2 * WIDTH + 1)
SIZES = {"vanilla": 0, "NIAF": 0, "NOAF": 0, "NP": -3 * WIDTH, "FGR": 9 * WIDTH**2}
SIZES |= dict.fromkeys(("NIG", "NFG", "NOG", "CIFG"), -BLOCK - WIDTH)


def _variant(name):
    config = LSTM(width=WIDTH, **VARIANTS[name])
    return config, redraw(mixer_of(config).param_specs(config, WIDTH), seed=3)


def _inputs():
    rng = np.random.default_rng(4)
    return (rng.standard_normal(shape).astype(np.float32) for shape in ((LENGTH, WIDTH), (LENGTH, WIDTH), (2, WIDTH)))


def _run(config, params, x):
    ctx = SeqContext.contiguous(jnp.zeros(1, jnp.int32), len(x))
    y, state = mixer_of(config).mix(params, x[None], ctx, config=config)
    return y[0], state


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_match_the_oracle(name):
    """Outputs, c, y and gates of the last token, and d loss / d(every parameter, x) along a random direction each."""
    (config, params), (x, of_y, of_state) = _variant(name), _inputs()

    def loss(tree):
        y, state = _run(config, tree["params"], tree["x"])
        return jnp.sum(y * of_y) + jnp.sum(state.c * of_state[0]) + jnp.sum(state.y * of_state[1]), (y, state)

    gradients, (y, state) = fast_jit(jax.grad(loss, has_aux=True))({"params": params, "x": x})
    leaves, structure = jax.tree.flatten({"params": to_float64(params), "x": to_float64(x)})

    def expected_loss(leaves):
        tree = jax.tree.unflatten(structure, leaves)
        y, c, _ = lstm_states(config, tree["params"], tree["x"])
        return np.sum(y * of_y) + np.sum(c * of_state[0]) + np.sum(y[-1] * of_state[1])

    expected, c, gates = lstm_states(config, to_float64(params), to_float64(x))
    assert_close(y, expected, ORACLE_TOLERANCE, "y")
    assert_close(state.c[0], c, ORACLE_TOLERANCE, "c")
    assert_close(state.y[0], expected[-1], ORACLE_TOLERANCE, "last y")
    if config.gate_recurrence:
        assert_close(state.gates[0], np.stack(list(gates.values())), ORACLE_TOLERANCE, "gates")
    else:
        assert state.gates is None

    rng, floor = np.random.default_rng(5), 1e-2 * largest(gradients)
    for i, (path, gradient) in enumerate(flatten(gradients).items()):
        direction = rng.standard_normal(leaves[i].shape)
        ahead, behind = (
            expected_loss(
                [leaf + sign * DIFFERENCE_STEP * direction if j == i else leaf for j, leaf in enumerate(leaves)]
            )
            for sign in (1, -1)
        )
        error = abs(np.sum(to_float64(gradient) * direction) - (ahead - behind) / (2 * DIFFERENCE_STEP))
        assert error <= GRADIENT_TOLERANCE * max(np.linalg.norm(gradient), floor), path


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_packed_split_and_decoded(name):
    """One row of a document, one of two with padding: outputs by the oracle, the last state as after one pass."""
    config = LSTM(width=WIDTH, **VARIANTS[name])
    mixer, segments = mixer_of(config), np.array([[1] * 9, [1, 1, 1, 1, 0, 2, 2, 2, 2]])
    params = redraw(mixer.param_specs(config, WIDTH), seed=6)
    x = np.random.default_rng(7).standard_normal((2, 9, WIDTH)).astype(np.float32)
    ctx = SeqContext.from_segment_ids(segments)

    @fast_jit
    def run(x):
        def part(state, first, last):
            of_part = jax.tree.map(lambda leaf: leaf[:, first:last], ctx)
            return mixer.mix(params, x[:, first:last], of_part, state, config=config)

        def step(state, token):
            x, *ids = (leaf[:, None] for leaf in token)
            y, state = mixer.mix(params, x, SeqContext(*ids), state, config=config)
            return state, y[:, 0]

        whole, first = part(None, 0, 9), part(None, 0, 5)
        second = part(first[1], 5, 9)
        by_time = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), (x, ctx.positions, ctx.segment_ids))
        last, y = jax.lax.scan(step, mixer.init_state(config, 2, 9, jnp.float32), by_time)
        return whole, (jnp.concatenate([first[0], second[0]], axis=1), second[1]), (y.swapaxes(0, 1), last)

    expected, wide = np.zeros(x.shape), to_float64(params)
    for row, first, last in ((0, 0, 9), (1, 0, 4), (1, 5, 9)):
        expected[row, first:last] = lstm_states(config, wide, x[row, first:last].astype(np.float64))[0]
    whole, *others = run(x)
    for how, (y, state) in zip(("whole", "split", "decoded"), (whole, *others), strict=True):
        assert_close(y, expected, ORACLE_TOLERANCE, how)
        assert_trees_close(state, whole[1], FLOAT32_TOLERANCE, how)


def test_no_peepholes_is_the_lstm_of_torch():
    """As stored: gates in the order i, f, g, o, two biases that are summed."""
    with np.load(TORCH) as file:
        theirs = dict(file)
    blocks = {name: leaf.reshape(4, WIDTH, -1)[[2, 0, 1, 3]] for name, leaf in theirs.items() if name.endswith("_l0")}
    params = {ours: blocks[f"weight_{name}_l0"].transpose(2, 0, 1) for name, ours in
              (("ih", "input"), ("hh", "recurrent"))}  # fmt: skip
    params["bias"] = (blocks["bias_ih_l0"] + blocks["bias_hh_l0"])[..., 0]
    config = LSTM(width=WIDTH, **VARIANTS["NP"])
    y, c, _ = lstm_states(config, params, theirs["x"])
    for actual, want in ((y, theirs["y"]), (y[-1], theirs["h"]), (c, theirs["c"])):
        np.testing.assert_allclose(actual, want, rtol=0, atol=1e-12)
    params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, theirs["x"]))
    y, state = fast_jit(lambda params, x: _run(config, params, x))(params, x)
    assert_close(y, theirs["y"], ORACLE_TOLERANCE, "y")
    assert_close(state.c[0], theirs["c"], ORACLE_TOLERANCE, "c")


def test_what_is_stored_of_torch_is_what_it_computes():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.goldens.make_torch_goldens import lstm

    with np.load(TORCH) as stored:
        for name, array in lstm().items():
            np.testing.assert_allclose(stored[name], array, rtol=0, atol=1e-13, err_msg=name)


def test_variants_meet_where_they_must():
    """In the oracle, which every variant above equals: no peepholes, no gate recurrence, gates that are wide open, and
    a forget gate with the input gate's parameters negated, sigmoid(-a) = 1 - sigmoid(a)."""
    params, (x, *_) = to_float64(_variant("FGR")[1]), _inputs()

    def outputs(name, **changes):
        return lstm_states(LSTM(width=WIDTH, **VARIANTS[name]), params | changes, x)[0]

    zero = jax.tree.map(np.zeros_like, params)
    vanilla, without = outputs("vanilla"), {"gate_recurrent": zero["gate_recurrent"]}
    np.testing.assert_array_equal(outputs("FGR", **without), vanilla)
    np.testing.assert_array_equal(outputs("vanilla", peephole=zero["peephole"]), outputs("NP"))
    for at, name in enumerate(("NIG", "NFG", "NOG")):
        opened = params | {"bias": params["bias"] + 100.0 * (np.arange(4) == 1 + at)[:, None]}
        left = [0, *(1 + gate for gate in range(3) if gate != at)]
        kept = {key: params[key][:, left] for key in ("input", "recurrent")}
        kept |= {"bias": params["bias"][left], "peephole": np.delete(params["peephole"], at, axis=0)}
        np.testing.assert_allclose(
            outputs(name, **kept), lstm_states(LSTM(width=WIDTH), opened, x)[0], rtol=0, atol=1e-12
        )
    left, sign = [0, 1, 1, 3], np.array([1.0, 1.0, -1.0, 1.0])[:, None]  # z, i, f, o
    tied = {key: params[key][:, left] * sign for key in ("input", "recurrent")}
    tied |= {"bias": params["bias"][left] * sign, "peephole": params["peephole"][[0, 0, 2]] * sign[1:]}
    kept = {key: np.delete(tied[key], 2, axis=1) for key in ("input", "recurrent")}
    kept |= {"bias": np.delete(tied["bias"], 2, axis=0), "peephole": np.delete(tied["peephole"], 1, axis=0)}
    np.testing.assert_allclose(outputs("CIFG", **kept), outputs("vanilla", **tied), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_sizes_of_the_paper(name):
    config = _variant(name)[0]
    assert count(mixer_of(config).param_specs(config, WIDTH)) == 4 * BLOCK + 3 * WIDTH + SIZES[name]


def test_initialisation():
    specs = zoo.create("lstm-tiny", forget_bias=2.5).param_specs()["layers"]["0_lstm"]["mixer"]
    bias = specs["bias"].init(None, specs["bias"].shape[1:], jnp.float32)
    np.testing.assert_array_equal(bias.mean(1), [0.0, 0.0, 2.5, 0.0])
    leaf = specs["recurrent"].init(jax.random.key(0), specs["recurrent"].shape[1:], jnp.float32)
    assert float(np.std(leaf)) == pytest.approx(0.1, rel=0.05)
    coupled = LSTM(width=4, coupled=True)
    spec = mixer_of(coupled).param_specs(coupled, 4)["bias"]
    np.testing.assert_array_equal(spec.init(None, spec.shape, spec.dtype), 0.0)


def test_family():
    config = zoo.create("lstm-tiny", variant="CIFG", hidden=None, layers=3).config
    assert (len(config.pattern), config.repeats) == (1, 3)
    assert config.pattern[0].mixer == LSTM(width=64, coupled=True)
    assert len(zoo.create("lstm-tiny").config.pattern) == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LSTM(width=0), "LSTM.width must be >= 1, got 0"),
        (lambda: LSTM(width=4, coupled=True, input_gate=False), "input_gate and forget_gate must be True"),
        (lambda: LSTM(width=4, input_activation="tan"), "input_activation='tan' is not supported; did you mean .*tanh"),
        (lambda: LSTM(width=4, output_activation="relu"), "output_activation='relu' is not supported"),
        (
            lambda: LSTM(width=4, input_gate=False, forget_gate=False, output_gate=False, gate_recurrence=True),
            "gate_recurrence=True needs a gate",
        ),
        (lambda: mixer_of(LSTM(width=8)).param_specs(LSTM(width=8), 16), "must be the width of the model, 16"),
        (lambda: zoo.create("lstm-tiny", variant="CIGF"), "variant='CIGF' is not supported; did you mean .*CIFG"),
    ],
)
def test_errors_at_the_door(make, words):
    with pytest.raises(ValueError, match=words):
        make()

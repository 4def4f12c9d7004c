"""What is easy to get wrong in xLSTM: initial gates, the first stabiliser, where sLSTM blocks stand, and widths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.mixers import harness as h
from zoo.core.params import flatten
from zoo.layers.norm import Norm
from zoo.mixers import MLSTM, SLSTM, MLSTMBlock, mixer_of
from zoo.models.xlstm import block_kinds

FLAT = Norm("rms", 1e-30, scale=False)  # divides by the root mean square, nothing else


def _start(name, path):
    """A leaf of one layer as it is initialised."""
    spec = flatten(zoo.create(name).param_specs())[f"layers/{path}"]
    return np.asarray(spec.init(jax.random.key(0), spec.shape[1:], spec.dtype))


def test_gates_of_7b_at_initialisation():
    for name, bias in (("input_gate", [-10.0] * 4), ("forget_gate", [3.0, 4.0, 5.0, 6.0])):
        assert not _start("xlstm-tiny", f"0_mlstm/mixer/{name}").any()
        np.testing.assert_allclose(_start("xlstm-tiny", f"0_mlstm/mixer/{name}_bias"), bias, rtol=1e-6)
    # Of the other gates none starts at 0: the layers would start without effect and, for a while, without gradient.
    for path in ("0_mlstm/mixer/output_gate", "1_mlp/mixer/gate"):
        assert np.std(_start("xlstm-tiny", path)) == pytest.approx(0.02, rel=0.1)


def test_gates_of_the_blocks_at_initialisation():
    name, mlstm, slstm = "xlstm-1-1-tiny", "0_mlstm_block/mixer", "1_slstm/mixer"
    assert not _start(name, f"{mlstm}/gates").any()
    input_bias, forget_bias = _start(name, f"{mlstm}/gates_bias")
    np.testing.assert_allclose(forget_bias, [3.0, 4.0, 5.0, 6.0], rtol=1e-6)
    assert 0 < np.abs(input_bias).max() < 0.5
    np.testing.assert_array_equal(_start(name, f"{mlstm}/skip"), 1.0)
    assert not _start(name, f"{slstm}/recurrent").any()
    # The sLSTM blocks 1 and 3 of 4 share a place: their mean depth is 2/3.
    bias, want = _start(name, f"{slstm}/bias"), 5 - 12 * (np.arange(16) / 15) ** (0.3 + 1.3 * 2 / 3)
    np.testing.assert_allclose(bias[1], np.broadcast_to(want, (4, 16)), rtol=1e-5, atol=1e-5)
    assert not np.delete(bias, 1, axis=0).any()


def test_forget_bias_by_depth():
    mixed = zoo.create("xlstm-7-1-125m").config
    powers = [s.mixer.forget_power for s in mixed.pattern if isinstance(s.mixer, SLSTM)]
    np.testing.assert_allclose(powers, [0.3 + 1.3 * 3 / 23, 0.3 + 1.3 * 20 / 23])


@pytest.mark.parametrize("bias", [-300.0, 300.0])
def test_the_first_slstm_token_is_its_own_stabiliser(bias):
    """c / n = tanh(z) however closed the input gate: with m_0 = 0 in its place, exp(i - m) would be 0 and c / n NaN."""
    config = SLSTM(width=h.WIDTH, heads=2, norm=FLAT)
    params = dict(h.params_of(config))
    x, ctx = h.inputs(1, length=1), h.contiguous(0, 1)
    free, _ = h.forward(config)(params, x, ctx)
    params["bias"] = params["bias"].at[0].set(bias)
    y, state = h.forward(config)(params, x, ctx)
    np.testing.assert_allclose(y, free, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state.n, 1.0)
    _, again = h.forward(config)(params, x, h.contiguous(1, 1), state)
    assert float(again.n.min()) > 1.0, "the normaliser of seen tokens never falls below 1"


def test_the_first_mlstm_token_meets_a_stabiliser_of_zero():
    """T = 1: m_1 = max(log sigmoid(f), i), which is the unit of eps; by hand, with the gates' biases alone."""
    i, f, eps = -1.0, 0.5, 0.7
    config = MLSTM(heads=1, key_width=4, value_width=3, gate_soft_cap=None, norm=FLAT, cell_eps=eps)
    params = {k: jnp.zeros_like(p) if "gate" in k else p for k, p in h.params_of(config).items()}
    params |= {"input_gate_bias": jnp.array([i]), "forget_gate_bias": jnp.array([f])}
    x = h.inputs(2, length=1)
    _, state = h.forward(config)(params, x, h.contiguous(0, 1))
    log_forget = -np.log1p(np.exp(-f))  # a sigmoid, not an exponential
    np.testing.assert_allclose(state.m, max(log_forget, i), rtol=1e-6)
    np.testing.assert_allclose(state.n[:, 0], np.exp(i - log_forget) * (x[:, 0] @ params["k"][:, 0]), rtol=1e-4)


def test_ratios():
    assert block_kinds(8, (7, 1)) == "mmmmmmms"
    assert block_kinds(6, (1, 1)) == "msmsms"
    assert block_kinds(3) == "mmm"
    assert block_kinds(2, (0, 1)) == "ss"
    assert block_kinds(5, slstm_at=(1, 4)) == "msmms"
    config = zoo.create("xlstm-7-1-125m", slstm_at=None, ratio=(7, 1)).config
    assert (len(config.pattern), config.repeats) == (9, 3), "seven blocks, an sLSTM and its feed-forward layer"
    assert zoo.create("xlstm-1-0-125m").config.repeats == 24


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": (7, 1)}, "ratio=\\(7, 1\\) takes a multiple of 8 blocks, layers=4 is none; the nearest is 8"),
        ({"ratio": (2, 1)}, "the nearest is 3 or 6"),
        ({"ratio": (0, 0)}, "at least one of them > 0"),
        ({"ratio": (-1, 2)}, "must be \\(a, b\\)"),
        ({"ratio": (1, 1), "slstm_at": (1,)}, "not both"),
        ({"ratio": None, "slstm_at": (4,)}, "distinct indices from 0 to 3"),
        ({"heads": 3}, "heads=3 must divide inner=128; the nearest is 2"),
    ],
)
def test_what_the_blocks_refuse(options, words):
    with pytest.raises(ValueError, match=words):
        zoo.create("xlstm-1-1-tiny", **options)


def test_what_the_mixers_refuse():
    with pytest.raises(ValueError, match="xlstm: heads=3 must divide 32, or give key_width"):
        zoo.create("xlstm-tiny", heads=3)
    with pytest.raises(ValueError, match="gate_soft_cap must be > 0, or None"):
        zoo.create("xlstm-tiny", gate_soft_cap=0.0)
    with pytest.raises(ValueError, match=r"SLSTM\.heads=3 must divide width=16; the nearest is 2"):
        SLSTM(width=16, heads=3)
    with pytest.raises(ValueError, match=r"SLSTM\.width=8 must be the width of the model, 16"):
        mixer_of(SLSTM(width=8)).param_specs(SLSTM(width=8), 16)
    with pytest.raises(ValueError, match="conv_width must be >= 2, got 1"):
        MLSTMBlock(inner=16, conv_width=1)
    with pytest.raises(ValueError, match="block=5 must divide inner=16; the nearest is 4"):
        MLSTMBlock(inner=16, block=5)


def test_released_widths():
    mlstm, mlp = (s.mixer for s in zoo.create("xlstm-7b").config.pattern)
    assert (mlstm.heads, mlstm.key_width, mlstm.value_width, mlp.hidden) == (8, 256, 512, 10944)
    assert zoo.create("xlstm-tiny", width=24).config.pattern[1].mixer.hidden == 64, "64.008 counts as 64, as released"


def test_slstm_with_one_cell_per_head_starts_open():
    config = SLSTM(width=4, heads=4)
    spec = mixer_of(config).param_specs(config, 4)["bias"]
    np.testing.assert_array_equal(spec.init(None, spec.shape, spec.dtype)[1], 5.0)

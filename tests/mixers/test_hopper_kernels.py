"""The conformance battery's splits and causality on the kernels for Hopper, interpreted.

Mixers are those all of whose ops have one, at widths that the kernels serve.
"""

import jax
import numpy as np
import pytest

from tests.mixers import harness as h
from tests.mixers.test_kernels import LENGTH, SEGMENTS, SPLITS
from tests.pallas_kernels.gpu import simulate
from zoo.layers.rotary import Rotary
from zoo.mixers.attention import Attention
from zoo.mixers.gated_linear_attention import FixedDecay, GatedLinearAttention, HeadGate
from zoo.mixers.hgrn import HGRN

TWO_PARTS = 2.0**-14  # float32 in two bfloat16 parts, 2^-16 of every term, in two passes of two products each
CASES = {
    "attention-ring": Attention(heads=2, kv_heads=1, head_width=64, window=7, rotary=Rotary()),
    "attention-slots": Attention(heads=2, kv_heads=2, head_width=64, soft_cap=5.0),
    "gla": GatedLinearAttention(heads=1, key_width=64, value_width=128),
    "simple-gla": GatedLinearAttention(heads=2, key_width=64, value_width=64, decay=HeadGate()),
    "retnet": GatedLinearAttention(heads=1, key_width=64, value_width=64, decay=FixedDecay(), rotary=Rotary()),
    "linear": GatedLinearAttention(heads=1, key_width=64, value_width=64, decay=None, feature_map="elu"),
    "hgrn": HGRN(inner=24),
}
# The gradient of a decay is a difference of sums over later tokens, which cancel but for their rounding.
SUMS_CANCEL = ("gla", "simple-gla")
cases = pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "hgrn" else pytest.mark.slow) for n in CASES])


@cases
def test_split_at_any_cut_equals_one_pass(name):
    with simulate():
        h.check_splits(CASES[name], SEGMENTS, SPLITS, "mosaic_gpu", LENGTH, usual=TWO_PARTS)


@cases
def test_equals_the_form_of_xla(name):
    config = CASES[name]
    params, x = h.params_of(config), h.poison(h.inputs(11, length=LENGTH), SEGMENTS)
    with simulate():
        got, state = h.forward(config, "mosaic_gpu")(params, x, h.context(SEGMENTS), h.fresh(config))
    want, expected = h.forward(config, "xla")(params, x, h.context(SEGMENTS), h.fresh(config))
    h.assert_close(got, want, TWO_PARTS)
    h.assert_trees_close(h.visible_state(state), h.visible_state(expected), TWO_PARTS)
    assert np.isfinite(got).all()


@cases
def test_causality_by_gradient(name):
    def over(function):  # what runs in several warpgroups is interpreted for one batch, without vmap
        return lambda rows: jax.lax.map(function, rows)

    with simulate():
        left = TWO_PARTS if name in SUMS_CANCEL else 0.0
        h.check_causality(CASES[name], SEGMENTS[:1], "mosaic_gpu", left, over)

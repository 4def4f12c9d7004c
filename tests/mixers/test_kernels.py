"""The conformance battery's splits and causality on the TPU kernels, interpreted: what no test of one op shows.

Sequences are long enough for every kernel (`causal_conv1d` leaves fewer than 16 tokens to XLA), and a piece of one
token is XLA's step. Configs whose calls the kernels do not serve are named here with the reason, and must raise.
"""

import jax
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.interpret import interpret
from pallas_kernels.selective_scan import mosaic_tpu
from tests.mixers import harness as h
from tests.trees import FLOAT32_TOLERANCE
from zoo.layers.rotary import Rotary
from zoo.mixers import mixer_of
from zoo.mixers.attention import Attention
from zoo.mixers.taylor_attention import TaylorAttention

LENGTH = 22
SPLITS = ((17, 1, 4), (4, 1, 17), (1, 4, 17))
SEGMENTS = np.array(
    [
        [0] + [1] * 5 + [0] + [2] * 14 + [0],
        [1] * 17 + [2] + [3] * 4,
        [5] * 3 + [0] * 3 + [5] * 14 + [0] * 2,
    ]
)

# Configs at widths that the kernels serve, where the examples of the battery are narrower.
SERVED = [
    ("attention-ring", Attention(heads=2, kv_heads=1, head_width=128, window=7, rotary=Rotary())),
    ("attention-slots", Attention(heads=2, kv_heads=2, head_width=128)),
    ("taylor_attention-served", TaylorAttention(heads=2, head_width=8, feature_dim=16, eps=0.5)),
]
CASES = [*h.CASES, *SERVED]
NAMES = dict(CASES)
WITHOUT_OPS = ("lstm", "mlp")  # mixers, which have one form
# The name of a case -> why it raises.
REFUSED = {
    "taylor_attention-0": "width K=4 of q and k must be a multiple of 16",
    "mamba2-1": "chunk_size=4 for T=22: it must be a multiple of 128",
}
# The gradient of a decay per head is a difference of sums over later tokens, which cancel but for their rounding.
DECAY_PER_HEAD = ("gated_linear_attention-2", "mamba2-0", "mamba2_attention-0", "mamba2_attention-1")
BY_DEFAULT = ("hgrn-0",)


@pytest.fixture(autouse=True)
def looped(monkeypatch):
    """Loops over state indices that are unrolled otherwise: interpreted, the unrolled kernels take long to compile."""
    monkeypatch.setattr(mosaic_tpu, "STATES_UNROLLED", 1)


def cases():
    with_ops = [name for name, config in CASES if mixer_of(config).name not in WITHOUT_OPS]
    marks = [() if name in BY_DEFAULT else pytest.mark.slow for name in with_ops]
    return pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in zip(with_ops, marks, strict=True)])


def kernels(config, state=None) -> int:
    """Number of Pallas kernels in a pass."""
    mix, params, x = mixer_of(config).mix, h.params_of(config), h.inputs(0, length=LENGTH)

    def run(params, x, state):
        return mix(params, x, h.context(SEGMENTS), state, config=config, implementation="mosaic_tpu")

    with interpret():
        return str(jax.make_jaxpr(run)(params, x, state)).count("pallas_call")


@cases()
def test_split_at_any_cut_equals_one_pass(name):
    config = NAMES[name]
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match=REFUSED[name]):
            kernels(config, h.fresh(config))
        return
    assert kernels(config, h.fresh(config)) >= 1
    with interpret():
        h.check_splits(config, SEGMENTS, SPLITS, "mosaic_tpu", LENGTH)


@cases()
def test_causality_by_gradient(name):
    config = NAMES[name]
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match=REFUSED[name]):
            kernels(config)
        return
    assert kernels(config) >= 1
    with interpret():
        rounding = FLOAT32_TOLERANCE if name in DECAY_PER_HEAD else 0.0
        h.check_causality(config, SEGMENTS[:1], "mosaic_tpu", rounding)


def test_mixers_without_ops_have_no_kernels():
    for name, config in CASES:
        if mixer_of(config).name in WITHOUT_OPS:
            assert kernels(config) == 0, name

"""What the examples of the conformance battery leave out of Mamba-2: its gate without a norm, and what they rely on."""

import dataclasses
import math

import numpy as np
import pytest

from tests.mixers import harness as h
from tests.trees import ORACLE_TOLERANCE, assert_close
from zoo.mixers import MIXERS, Mamba2

LIMITED = next(example for example in MIXERS.get("mamba2").examples if example.dt_limit != (0.0, math.inf))


def test_gate_without_a_norm():
    config = Mamba2(heads=2, head_width=4, state=3, norm=None)
    params, x = h.params_of(config), h.inputs(30)
    y, _ = h.forward(config)(params, x, h.contiguous(0, h.LENGTH), h.fresh(config))
    assert_close(y, h.oracle(config, params, x), ORACLE_TOLERANCE)


@pytest.mark.parametrize(
    "change",
    [
        {"dt_limit": (0.0, LIMITED.dt_limit[1])},
        {"dt_limit": (LIMITED.dt_limit[0], math.inf)},
        {"norm_before_gate": False},
        {"norm_groups": 1},
    ],
    ids=str,
)
def test_the_limited_example_depends_on_its_options(change):
    """Both limits of dt bind, and the place and the groups of the norm matter: the battery would see them missing."""
    params, x = h.params_of(LIMITED), h.inputs(11)
    full = h.oracle(LIMITED, params, x)
    without = h.oracle(dataclasses.replace(LIMITED, **change), params, x)
    assert np.abs(full - without).max() > 1e-2 * np.abs(full).max()

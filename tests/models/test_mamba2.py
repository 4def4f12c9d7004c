"""Mamba-2 and its hybrid: the order of layers, the values at initialisation, and what is refused."""

import math

import jax
import numpy as np
import pytest

import zoo
from zoo.mixers import Mamba2
from zoo.models.mamba2_hybrid import allocate

# The authors' rule gives these for their 8B model and for their example of 800M.
ORDER_56 = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
ORDER_48 = "M-M-M--M-*M-M-M-M--*M-M-M-M-*M--M-M-M-*M-M--M-M-"


@pytest.mark.parametrize(
    ("layers", "attention", "mlp", "order"),
    [
        (56, 0.08, 0.5, ORDER_56),
        (48, 0.08, 0.5, ORDER_48),
        (10, 0.2, 0.0, "MMM*MM*MMM"),
        (4, 0.0, 0.5, "M-M-"),
        (3, 0.0, 0.0, "MMM"),
        (2, 0.5, 0.5, "-*"),
    ],
)
def test_order_of_layers(layers, attention, mlp, order):
    assert allocate(layers, attention, mlp) == order


@pytest.mark.parametrize(("name", "order"), [("8b", ORDER_56), ("800m", ORDER_48)])
def test_hybrid_presets_have_that_order(name, order):
    names = {"mamba2": "M", "attention": "*", "mlp": "-"}
    config = zoo.create(f"mamba2-hybrid-{name}").config
    assert "".join(names[key.partition("_")[2]] for key in config.sublayers()) == order
    assert config.repeats == 1


def test_a_regular_order_is_one_cycle():
    config = zoo.create("mamba2-hybrid-tiny", allocation="M*-M*-", layers=None).config
    assert (list(config.sublayers()), config.repeats) == (["0_mamba2", "1_attention", "2_mlp"], 2)


def test_hybrid_attention_has_no_positions():
    model = zoo.create("mamba2-hybrid-tiny")
    assert all(sub.mixer.rotary is None for name, sub in model.config.sublayers().items() if "attention" in name)


def test_initialisation():
    """dt log-uniform in [1e-3, 1e-1], -A uniform in [1, 16], D = 1, uniform matrices, the output's over sqrt(L)."""
    model = zoo.create("mamba2-tiny", vocab_size=7, layers=16, width=128, head_width=4, state=8)
    layer = model.init(jax.random.key(0))["layers"]["0_mamba2"]
    mixer = {name: np.asarray(leaf) for name, leaf in layer["mixer"].items() if name != "norm"}
    dt, a = np.log1p(np.exp(mixer["dt_bias"])), np.exp(mixer["A_log"])
    assert ((dt > 0.99e-3) & (dt < 1.01e-1)).all()
    assert abs(np.log(dt).mean() - math.log(1e-2)) < 0.2
    assert ((a >= 1) & (a <= 16)).all()
    assert abs(a.mean() - 8.5) < 0.5
    assert (mixer["D"] == 1).all()
    assert (np.asarray(layer["mixer"]["norm"]["scale"]) == 1).all()
    bounds = {
        **dict.fromkeys(("in_proj", "bc_proj", "dt_proj"), 128**-0.5),
        **dict.fromkeys(("conv", "conv_bc", "conv_bias", "conv_bc_bias"), 0.5),
        "out_proj": 256**-0.5 / 4,
    }
    for name, bound in bounds.items():
        assert 0.9 * bound < np.abs(mixer[name]).max() <= bound, name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 3}, r"groups=3 must divide heads=4: one of \[1, 2, 4\]"),
        ({"dt_limit": (0.2, 0.1)}, "dt_limit must be a tuple"),
        ({"dt_limit": [0.0, 0.1]}, "dt_limit must be a tuple"),
        ({"dt_limit": (-1.0, 0.1)}, "dt_limit must be a tuple"),
        ({"skip": "heads"}, "skip='heads' is not supported"),
        ({"norm": None, "norm_before_gate": True}, "need a norm"),
        ({"norm_groups": 3}, "norm_groups=3 must divide heads [*] head_width=32"),
        ({"conv_width": 1}, "conv_width must be >= 2"),
        ({"groups": 0}, "groups=0 must divide heads=4"),
        ({"a_min": 0.0}, "0 < a_min <= a_max"),
    ],
)
def test_mixer_options_that_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Mamba2(**{"heads": 4, "head_width": 8, **options})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mamba2-tiny", {"head_width": 24}, "head_width=24 must divide 2 [*] width=128"),
        ("mamba2-hybrid-tiny", {"mamba_head_width": 24}, "mamba_head_width=24 must divide 2 [*] width=128"),
        ("mamba2-hybrid-tiny", {"heads": 5}, "heads=5 must divide width=64"),
        ("mamba2-hybrid-tiny", {"allocation": "M*"}, "has 2 letters, layers=8"),
        ("mamba2-hybrid-tiny", {"allocation": "ME-"}, "must be of the letters M, [*], -"),
        ("mamba2-hybrid-tiny", {"layers": None}, "needs layers or allocation"),
        ("mamba2-hybrid-tiny", {"attention_ratio": 0.6}, "ask for 5 and 4 layers"),
    ],
)
def test_family_options_that_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        zoo.create(name, **options)

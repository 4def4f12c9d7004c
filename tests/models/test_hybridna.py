"""HybriDNA: the order of its layers, and its sizes against the ones that were printed."""

import pytest

import zoo
from zoo.core.params import count
from zoo.mixers import MLP, Attention, Mamba2

SIZES = {"300m": (1024, 24), "3b": (4096, 16), "7b": (4096, 32)}  # width, layers
PRINTED = {"300m": (0.3, 1), "3b": (3, 0), "7b": (6, 0)}  # 10^9 parameters of the released files, digits


@pytest.mark.parametrize("size", [*SIZES, "tiny"])
def test_seven_layers_of_mamba2_to_one_of_attention_without_positions(size):
    config = zoo.create(f"hybridna-{size}").config
    layers = [sub.mixer for _, _, sub in config.in_order()]
    assert [type(mixer) for mixer in layers[1::2]] == [MLP] * (len(layers) // 2)
    attention = [i for i, mixer in enumerate(layers[::2]) if isinstance(mixer, Attention)]
    assert attention == {24: [4, 12, 20], 16: [4, 12], 32: [4, 12, 20, 28], 8: [4]}[len(layers) // 2]
    assert all(isinstance(mixer, Mamba2 | Attention) for mixer in layers[::2])
    assert all(layers[2 * i].rotary is None for i in attention)


@pytest.mark.parametrize("size", SIZES)
def test_parameters(size):
    """Counted by hand from width D, layers L, inner 2 D, heads of 64, state 128, F = 2 D, a fourth of the K/V heads."""
    (width, layers), (billions, digits) = SIZES[size], PRINTED[size]
    inner, heads, state, ids = 2 * width, 2 * width // 64, 128, 12
    mamba = width * (2 * inner + 2 * state + heads) + 5 * (inner + 2 * state) + 3 * heads + inner + inner * width
    attention = width * (width + 2 * width // 4) + width * width
    per_layer = 3 * width * 2 * width + 2 * width
    model = zoo.create(f"hybridna-{size}")
    total = layers * per_layer + layers // 8 * (7 * mamba + attention) + 2 * ids * width + width
    assert count(model.param_specs()) == total
    assert round(total / 1e9, digits) == billions
    assert (model.config.width, model.config.vocab_size, model.config.tied) == (width, ids, False)

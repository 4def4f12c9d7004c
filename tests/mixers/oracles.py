"""The oracle of every mixer, and which earlier tokens a token's output depends on."""

import numpy as np

from tests.mixers.based_oracles import base_conv, hedgehog, taylor_attention
from tests.mixers.lstm_oracles import lstm
from tests.mixers.numpy_oracles import (
    attention,
    bit_mlp,
    gated_linear_attention,
    hgrn,
    hgrn2,
    mamba,
    mamba2,
    mamba2_attention,
    mlgru,
    mlp,
    zamba_block,
)
from tests.mixers.xlstm_oracles import mlstm, mlstm_block, slstm


def _everything_before(config, length):
    return np.tril(np.ones((length, length), bool))


def _window(config, length):
    mask = np.zeros((length, length), bool)
    for i in range(length):
        for j in range(i + 1):
            mask[i, j] = config.window is None or j > i - config.window
    return mask


def _itself(config, length):
    return np.eye(length, dtype=bool)


def _taps(config, length):
    lags = np.arange(length)[:, None] - np.arange(length)
    return (lags >= 0) & (lags < config.conv_width)


ORACLES = {
    "attention": attention,
    "base_conv": base_conv,
    "bit_mlp": bit_mlp,
    "gated_linear_attention": gated_linear_attention,
    "hedgehog": hedgehog,
    "hgrn": hgrn,
    "hgrn2": hgrn2,
    "lstm": lstm,
    "mamba": mamba,
    "mamba2": mamba2,
    "mamba2_attention": mamba2_attention,
    "mlgru": mlgru,
    "mlp": mlp,
    "mlstm": mlstm,
    "mlstm_block": mlstm_block,
    "slstm": slstm,
    "taylor_attention": taylor_attention,
    "zamba_block": zamba_block,
}
# [queries, keys] by the mixer's config and the length.
VISIBLE = dict.fromkeys(ORACLES, _everything_before) | {
    "attention": _window,
    "base_conv": _taps,
    "bit_mlp": _itself,
    "mlp": _itself,
    "zamba_block": _window,
}

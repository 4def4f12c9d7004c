"""Token mixers, one file each, all on the contract of `zoo.mixers.contract`."""

from zoo.mixers import (
    attention,
    bit_mlp,
    gated_convolution,
    gated_linear_attention,
    hedgehog,
    hgrn,
    hgrn2,
    lstm,
    mamba,
    mamba2,
    mamba2_attention,
    mlgru,
    mlp,
    mlstm,
    mlstm_block,
    slstm,
    taylor_attention,
    zamba_block,
)
from zoo.mixers.attention import Attention, QKNorm
from zoo.mixers.bit_mlp import BitMLP
from zoo.mixers.contract import MIXERS, MixerType, mixer_of, register
from zoo.mixers.gated_convolution import BaseConv
from zoo.mixers.gated_linear_attention import ChannelGate, FixedDecay, GatedLinearAttention, HeadGate
from zoo.mixers.hedgehog import Hedgehog
from zoo.mixers.hgrn import HGRN
from zoo.mixers.hgrn2 import HGRN2
from zoo.mixers.lstm import LSTM
from zoo.mixers.mamba import Mamba
from zoo.mixers.mamba2 import Mamba2
from zoo.mixers.mamba2_attention import Mamba2Attention
from zoo.mixers.mlgru import MLGRU
from zoo.mixers.mlp import MLP
from zoo.mixers.mlstm import MLSTM
from zoo.mixers.mlstm_block import MLSTMBlock
from zoo.mixers.slstm import SLSTM
from zoo.mixers.taylor_attention import TaylorAttention
from zoo.mixers.zamba_block import ZambaBlock

__all__ = [
    "HGRN",
    "HGRN2",
    "LSTM",
    "MIXERS",
    "MLGRU",
    "MLP",
    "MLSTM",
    "SLSTM",
    "Attention",
    "BaseConv",
    "BitMLP",
    "ChannelGate",
    "FixedDecay",
    "GatedLinearAttention",
    "HeadGate",
    "Hedgehog",
    "MLSTMBlock",
    "Mamba",
    "Mamba2",
    "Mamba2Attention",
    "MixerType",
    "QKNorm",
    "TaylorAttention",
    "ZambaBlock",
    "attention",
    "bit_mlp",
    "gated_convolution",
    "gated_linear_attention",
    "hedgehog",
    "hgrn",
    "hgrn2",
    "lstm",
    "mamba",
    "mamba2",
    "mamba2_attention",
    "mixer_of",
    "mlgru",
    "mlp",
    "mlstm",
    "mlstm_block",
    "register",
    "slstm",
    "taylor_attention",
    "zamba_block",
]

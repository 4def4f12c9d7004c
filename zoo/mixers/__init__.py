"""Token mixers, one file each, all on the contract of `zoo.mixers.contract`."""

from zoo.mixers import attention, gated_convolution, hedgehog, mamba, mlp, taylor_attention
from zoo.mixers.attention import Attention, QKNorm
from zoo.mixers.contract import MIXERS, MixerType, mixer_of, register
from zoo.mixers.gated_convolution import BaseConv
from zoo.mixers.hedgehog import Hedgehog
from zoo.mixers.mamba import Mamba
from zoo.mixers.mlp import MLP
from zoo.mixers.taylor_attention import TaylorAttention

__all__ = [
    "MIXERS",
    "MLP",
    "Attention",
    "BaseConv",
    "Hedgehog",
    "Mamba",
    "MixerType",
    "QKNorm",
    "TaylorAttention",
    "attention",
    "gated_convolution",
    "hedgehog",
    "mamba",
    "mixer_of",
    "mlp",
    "register",
    "taylor_attention",
]

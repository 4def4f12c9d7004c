"""Token mixers, one file each, all on the contract of `zoo.mixers.contract`."""

from zoo.mixers import attention, bit_mlp, mamba, mlgru, mlp
from zoo.mixers.attention import Attention, QKNorm
from zoo.mixers.bit_mlp import BitMLP
from zoo.mixers.contract import MIXERS, MixerType, mixer_of, register
from zoo.mixers.mamba import Mamba
from zoo.mixers.mlgru import MLGRU
from zoo.mixers.mlp import MLP

__all__ = [
    "MIXERS",
    "MLGRU",
    "MLP",
    "Attention",
    "BitMLP",
    "Mamba",
    "MixerType",
    "QKNorm",
    "attention",
    "bit_mlp",
    "mamba",
    "mixer_of",
    "mlgru",
    "mlp",
    "register",
]

"""Token mixers, one file each, all on the contract of `zoo.mixers.contract`."""

from zoo.mixers import attention, mamba, mamba2, mlp
from zoo.mixers.attention import Attention, QKNorm
from zoo.mixers.contract import MIXERS, MixerType, mixer_of, register
from zoo.mixers.mamba import Mamba
from zoo.mixers.mamba2 import Mamba2
from zoo.mixers.mlp import MLP

__all__ = [
    "MIXERS",
    "MLP",
    "Attention",
    "Mamba",
    "Mamba2",
    "MixerType",
    "QKNorm",
    "attention",
    "mamba",
    "mamba2",
    "mixer_of",
    "mlp",
    "register",
]

"""Token mixers, one file each, all on the contract of `zoo.mixers.contract`."""

from zoo.mixers import attention, gated_linear_attention, hgrn, hgrn2, mamba, mamba2, mlp
from zoo.mixers.attention import Attention, QKNorm
from zoo.mixers.contract import MIXERS, MixerType, mixer_of, register
from zoo.mixers.gated_linear_attention import ChannelGate, FixedDecay, GatedLinearAttention, HeadGate
from zoo.mixers.hgrn import HGRN
from zoo.mixers.hgrn2 import HGRN2
from zoo.mixers.mamba import Mamba
from zoo.mixers.mamba2 import Mamba2
from zoo.mixers.mlp import MLP

__all__ = [
    "HGRN",
    "HGRN2",
    "MIXERS",
    "MLP",
    "Attention",
    "ChannelGate",
    "FixedDecay",
    "GatedLinearAttention",
    "HeadGate",
    "Mamba",
    "Mamba2",
    "MixerType",
    "QKNorm",
    "attention",
    "gated_linear_attention",
    "hgrn",
    "hgrn2",
    "mamba",
    "mamba2",
    "mixer_of",
    "mlp",
    "register",
]

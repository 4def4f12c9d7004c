"""Token mixers, one file each, all on the contract of `zoo.mixers.contract`."""

from zoo.mixers import attention, mamba, mlp, mlstm, mlstm_block, slstm
from zoo.mixers.attention import Attention, QKNorm
from zoo.mixers.contract import MIXERS, MixerType, mixer_of, register
from zoo.mixers.mamba import Mamba
from zoo.mixers.mlp import MLP
from zoo.mixers.mlstm import MLSTM
from zoo.mixers.mlstm_block import MLSTMBlock
from zoo.mixers.slstm import SLSTM

__all__ = [
    "MIXERS",
    "MLP",
    "MLSTM",
    "SLSTM",
    "Attention",
    "MLSTMBlock",
    "Mamba",
    "MixerType",
    "QKNorm",
    "attention",
    "mamba",
    "mixer_of",
    "mlp",
    "mlstm",
    "mlstm_block",
    "register",
    "slstm",
]

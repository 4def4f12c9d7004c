"""The matrix LSTM cell of xLSTM: linear attention with exponential gates and a normaliser."""

from pallas_kernels.mlstm.op import State, mlstm

__all__ = ["State", "mlstm"]

"""Causal softmax attention: windows, documents, grouped heads, rings with stored positions."""

from pallas_kernels.attention.op import attention, merge

__all__ = ["attention", "merge"]

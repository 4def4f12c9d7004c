"""Ternary weights, four to a byte, times int8 activations, and the layouts that pack them."""

from pallas_kernels.ternary_matmul.op import ternary_matmul
from pallas_kernels.ternary_matmul.packing import LAYOUTS, pack, repack, unpack

__all__ = ["LAYOUTS", "pack", "repack", "ternary_matmul", "unpack"]

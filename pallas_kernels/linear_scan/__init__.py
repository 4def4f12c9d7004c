"""The elementwise linear recurrence of HGRN, MLGRU and RG-LRU."""

from pallas_kernels.linear_scan.op import linear_scan

__all__ = ["linear_scan"]

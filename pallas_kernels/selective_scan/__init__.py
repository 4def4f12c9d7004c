"""The selective scan of Mamba (S6)."""

from pallas_kernels.selective_scan.op import selective_scan

__all__ = ["selective_scan"]

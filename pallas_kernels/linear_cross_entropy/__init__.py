"""Cross entropy of a linear head that never holds the logits of all tokens and classes."""

from pallas_kernels.linear_cross_entropy.op import TokenStatistics, linear_cross_entropy

__all__ = ["TokenStatistics", "linear_cross_entropy"]

"""Linear attention with the second-order Taylor expansion of the exponential: Based."""

from pallas_kernels.taylor_linear_attention.op import taylor_linear_attention

__all__ = ["taylor_linear_attention"]

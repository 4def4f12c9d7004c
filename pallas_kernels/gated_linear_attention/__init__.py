"""Linear attention with a decay: none, per head (RetNet, Mamba-2) or per channel (GLA)."""

from pallas_kernels.gated_linear_attention.op import gated_linear_attention

__all__ = ["gated_linear_attention"]

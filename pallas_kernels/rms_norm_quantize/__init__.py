"""RMSNorm and quantisation to int8 per token, in one pass."""

from pallas_kernels.rms_norm_quantize.op import rms_norm_fake_quantize, rms_norm_quantize

__all__ = ["rms_norm_fake_quantize", "rms_norm_quantize"]

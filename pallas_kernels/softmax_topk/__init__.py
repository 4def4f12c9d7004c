"""Log-normaliser and largest logits of every row in one read."""

from pallas_kernels.softmax_topk.op import SoftmaxTopK, softmax_topk

__all__ = ["SoftmaxTopK", "softmax_topk"]

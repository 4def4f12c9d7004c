"""Model FLOPs utilisation."""

import re

from zoo.models import Model
from zoo.models.language_model import flops_per_token

# Dense bfloat16 peak FLOP/s of one jax device, from the vendors' data sheets (without sparsity). The first pattern
# that occurs in `device_kind` counts.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"TPU v2", 22.5e12),  # per core: two devices a chip
    (r"TPU v3", 61.5e12),  # per core
    (r"TPU v4 ?(i|lite)", 138e12),
    (r"TPU v4", 275e12),
    (r"TPU v5 ?(e|lite)", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v6", 918e12),
    (r"TPU ?(v7|7x)", 1153.5e12),  # per core: two devices a chip of 2307e12
    (r"GB200|B200", 2250e12),
    (r"GH200|H200|H100(?!.*PCIe)", 989e12),
    (r"H100", 756e12),
    (r"A100", 312e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a device in bfloat16; None where it is not known (CPUs)."""
    for pattern, peak in PEAK_FLOPS:
        if re.search(pattern, device_kind, re.IGNORECASE):
            return peak
    return None


def train_flops_per_token(model: Model, length: int) -> float:
    """Three times the forward pass: backward costs two; recomputation is not counted."""
    return 3.0 * flops_per_token(model.config, length)


def utilisation(flops_per_token: float, tokens_per_second: float, device_kind: str, devices: int) -> float | None:
    """MFU = flops_per_token tokens_per_second / (peak devices); None where the peak is not known."""
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_token * tokens_per_second / (peak * devices)

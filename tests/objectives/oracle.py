"""Comparison of an objective with an equation of torch in float64, values and gradients."""

from types import SimpleNamespace

import jax
import numpy as np
import torch

from objectives import LogProbs
from tests.trees import fast_jit

FIELDS = ("sum", "mean", "count", "per_token", "mask")


def to_torch(x, gradient=False):
    """LogProbs as a namespace of tensors, arrays as tensors; float64 where they are floats."""
    if isinstance(x, LogProbs):
        fields = {name: to_torch(getattr(x, name), gradient) for name in FIELDS}
        return SimpleNamespace(**fields)
    tensor = torch.tensor(np.asarray(x))
    return tensor.double().requires_grad_(gradient) if tensor.is_floating_point() else tensor


def check(objective, equation, arguments, rtol=5e-6, compiled=False, **options):
    """loss_sum and its gradient in every float argument equal those of `equation`, which detaches what gets none.

    Args:
      objective: of keyword arguments and options.
      equation: of the same arguments as tensors, to losses that are summed.
      arguments: LogProbs and arrays by name.
      rtol: relative to the largest entry.
      compiled: whether to compile, quicker for a function of many operations; checks of values then see none.
      **options: of the objective; the equation gets them too.
    """
    floats = {k: v for k, v in arguments.items() if isinstance(v, LogProbs) or np.asarray(v).dtype.kind == "f"}
    fixed = {k: v for k, v in arguments.items() if k not in floats}
    function = jax.value_and_grad(lambda x: objective(**x, **fixed, **options).loss_sum)
    got, gradients = (fast_jit(function) if compiled else function)(floats)
    tensors = {k: to_torch(v, gradient=True) for k, v in floats.items()}
    want = equation(**tensors, **{k: to_torch(v) for k, v in fixed.items()}, **options).sum()
    want.backward()
    np.testing.assert_allclose(got, want.item(), rtol=rtol)
    for name, value in floats.items():
        fields = ("sum", "mean", "per_token") if isinstance(value, LogProbs) else (None,)
        for field in fields:
            ours, theirs = gradients[name], tensors[name]
            if field is not None:
                ours, theirs = getattr(ours, field), getattr(theirs, field)
            theirs = np.zeros(ours.shape) if theirs.grad is None else theirs.grad.numpy()
            scale = max(np.abs(theirs).max(), 1e-3)
            np.testing.assert_allclose(ours, theirs, atol=rtol * scale, err_msg=f"d {name}.{field}")
    return got

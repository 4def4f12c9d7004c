"""Doors to Hugging Face, flax.linen and flax.nnx."""

from zoo.interop.hf import from_hf, to_hf

__all__ = ["from_hf", "to_hf"]

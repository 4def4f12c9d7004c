"""Doors to Hugging Face, flax.linen and flax.nnx."""

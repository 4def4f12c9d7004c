"""Gradient transformations that optax lacks."""

from objectives.optimizers.token_count import scale_by_token_count

__all__ = ["scale_by_token_count"]

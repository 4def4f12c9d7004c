"""Functional language models: descriptions (Spec trees) and pure functions."""

"""The pattern-driven language model and its families."""

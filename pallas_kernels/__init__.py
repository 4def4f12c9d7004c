"""Sequence operations with several implementations each."""

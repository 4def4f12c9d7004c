"""Token-wise building blocks."""

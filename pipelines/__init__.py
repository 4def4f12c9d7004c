"""Text sources, tokenizers and packing."""

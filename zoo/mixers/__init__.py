"""Token mixers, one file each, all on one contract."""

"""Static cost of TPU kernels, from the schedule that the compiler writes for a chip that need not be there.

`python -m pallas_kernels.static_profile [op ...] [--topology v5e] [--shape NAME] [--json]` prints cycles, traffic,
slots in use, spills and the distance to the floor; `--write-golden` renews the table that the tests hold kernels to.
"""

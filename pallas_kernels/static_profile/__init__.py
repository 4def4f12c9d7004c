"""Static cost of TPU kernels, from the schedule that the compiler writes for a chip that need not be there."""

"""Matrix products of GPU kernels: the chip's instruction, as far as it can be interpreted, and its stand-in agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import interpret, wgmma
from tests.pallas_kernels.gpu import simulate

# Of float32 sums of 128 products, relative to the largest: of bfloat16 numbers, and of float32 numbers in two parts.
TOLERANCES = {jnp.bfloat16: 2.0**-14, jnp.float32: 2.0**-17}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("instruction", [True, False])
def test_multiply(instruction, dtype, monkeypatch):
    """The product of references, not square: what is not interpreted is a transposed or a register operand."""
    if instruction:
        monkeypatch.setattr(wgmma, "interpreted", lambda: False)
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((64, 128), (128, 192)))
    count = wgmma.parts(dtype)

    def kernel(a_ref, b_ref, out_ref, a_smem, b_smem, out_smem, barrier):
        plgpu.copy_gmem_to_smem(a_ref, a_smem, barrier)
        plgpu.copy_gmem_to_smem(b_ref, b_smem, barrier)
        plgpu.barrier_wait(barrier)
        out_smem[...] = wgmma.multiply_parts(wgmma.split_ref(a_smem, count), wgmma.split_ref(b_smem, count))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref)
        plgpu.wait_smem_to_gmem(0)

    operands = wgmma.split(a), wgmma.split(b)
    with simulate(detect_races=False):
        call = plgpu.kernel(
            kernel,
            out_type=jax.ShapeDtypeStruct((64, 192), jnp.float32),
            scratch_types=[
                *(wgmma.matrix_ref(x.shape, x.dtype) for x in operands),
                plgpu.SMEM((64, 192), jnp.float32),
                plgpu.Barrier(num_arrivals=2),
            ],
            interpret=interpret.parameters(),
        )
        got = jax.block_until_ready(jax.jit(call)(*operands))
    expected = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    assert np.abs(got - expected).max() <= TOLERANCES[dtype] * np.abs(expected).max()

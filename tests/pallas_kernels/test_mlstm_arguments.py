"""Which calls the mLSTM cell takes: published shapes, every platform, chunks by default, and what it says of others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.mlstm import State, mlstm
from pallas_kernels.mlstm.op import default_chunk
from pallas_kernels.mlstm.shapes import MODELS, TINY
from tests.pallas_kernels.test_mlstm import TOKENS, draw


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("name", ["packed", "decode", "bfloat16"])
def test_lowers_for_every_platform(name, wide):
    """The choice on TPU is the kernel, but for narrow heads, whose chunks are shorter than its registers."""
    shape = dataclasses.replace(TINY[name], **({"key": 64, "value": 64} if wide else {}))

    def step(args):
        def loss(a):
            return jnp.sum(mlstm(**a)[0].astype(jnp.float32))

        return jax.value_and_grad(loss, allow_int=True)(args)

    for platform in ("cpu", "tpu", "cuda"):  # one at a time: JAX lowers every branch for all the platforms of an export
        exported = jax.export.export(jax.jit(step), platforms=[platform])(shape.arrays())
        kernels = 2 if platform == "tpu" and name != "decode" and wide else 0
        assert exported.mlir_module().count("stablehlo.custom_call @tpu_custom_call") == kernels


def test_shapes_are_accepted_by_the_op():
    for shape in [*MODELS.values(), *TINY.values()]:
        arrays = shape.arrays()
        y, state = jax.eval_shape(lambda a, s=shape: mlstm(**a, **s.options()), arrays)
        assert (y.shape, y.dtype) == (arrays["v"].shape, shape.dtype)
        heads = (shape.batch, shape.heads)
        assert [s.shape for s in state] == [(*heads, shape.key, shape.value), (*heads, shape.key), heads]
        assert {s.dtype for s in state} == {jnp.dtype(jnp.float32)}


def test_the_default_chunk():
    assert [default_chunk(8, 16, name) for name in (None, "xla", "mosaic_tpu")] == [32, 32, 128]
    assert [default_chunk(*widths) for widths in ((256, 512), (384, 384), (1024, 1024), (64, 64))] == [
        256,
        256,
        256,
        128,
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": np.zeros((2, 5, 5), np.float32)}, r"q must have shape \[B, T, H, K\], got \(2, 5, 5\)"),
        ({"f": None}, r"f must be an array \[B, T, H\], got None"),
        ({"k": np.zeros((2, 5, 2, 4), np.float32)}, r"k must have shape \[B=2, T=5, H=2, K=5\], got \(2, 5, 2, 4\)"),
        ({"v": np.zeros((2, 5, 3, 3), np.float32)}, r"v must have shape \[B=2, T=5, H=2, V\], got \(2, 5, 3, 3\)"),
        ({"i": np.zeros((2, 5, 3), np.float32)}, r"i must have shape \[B=2, T=5, H=2\], got \(2, 5, 3\)"),
        ({n: np.zeros((2, 0, 2, 5)[: 4 if n in "qkv" else 3], np.float32) for n in TOKENS}, "T must be at least 1"),
        ({"q": np.zeros((2, 5, 2, 5), np.int32)}, "q must have dtype float32 or bfloat16 or float16, got int32"),
        ({"state": np.zeros((2, 2, 5, 3), np.float32)}, r"state must be State\(C, n, m\) or None, got ndarray"),
        ({"state": State(np.zeros((2, 2, 5, 3)), None, None)}, r"state must be State\(C, n, m\)"),
        ({"state": State(*(np.zeros((2, 2, 5, 3)[:n], jnp.bfloat16) for n in (4, 3, 2)))}, "state.C must have dtype"),
        ({"state": State(*(np.zeros((2, 2, 5, 3)[:n], np.float32) for n in (4, 2, 2)))}, "state.n must have shape"),
        ({"reset": np.zeros((2, 5), np.int32)}, "reset must have dtype bool, got int32"),
        ({"valid": np.zeros((2, 6), bool)}, r"valid must have shape \[B=2, T=5\]"),
        ({"chunk_size": 0}, "chunk_size must be an int from 1 to 256 or None, got 0"),
        ({"chunk_size": -1}, "chunk_size must be an int from 1 to 256 or None, got -1"),
        ({"chunk_size": True}, "chunk_size must be an int from 1 to 256 or None, got True"),
        ({"chunk_size": 512}, "chunk_size must be an int from 1 to 256 or None, got 512"),
        ({"scale": "1"}, "scale must be a finite Python number or None, got '1'"),
        ({"eps": None}, "eps must be a finite Python number, got None"),
        ({"eps": 0.0}, "eps must be at least 1e-30"),
        ({"implementation": "xls"}, "did you mean 'xla'"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        mlstm(**(draw(2, 5) | change))


def test_an_implementation_that_does_not_exist_yet_raises():
    with pytest.raises(UnsupportedError, match="mlstm has no 'mosaic_gpu' implementation"):
        mlstm(**draw(1, 2), implementation="mosaic_gpu")

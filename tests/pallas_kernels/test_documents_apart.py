"""Packed documents do not touch each other, not even by rounding: the kernels of every op, interpreted.

A sum that runs over several documents and cancels would pass any test with a tolerance.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import mosaic_gpu, mosaic_gpu_backward
from pallas_kernels.interpret import interpret
from tests.pallas_kernels import (
    test_attention,
    test_causal_conv1d,
    test_gated_linear_attention,
    test_gated_linear_attention_gpu,
    test_linear_scan,
    test_linear_scan_gpu,
    test_mlstm,
    test_selective_scan,
    test_selective_scan_gpu,
    test_selective_scan_tpu,
    test_taylor_linear_attention,
)
from tests.pallas_kernels.gpu import QUICK, simulate

LOUD = 30.0  # the neighbours' scale: their rounding is as large as what is left when they cancel


def check(call, draw, draw_cotangents, tokens, cuts):
    """Of three documents the middle one: its values and gradients know nothing of the others, nor they of it.

    Args:
      call: function of (arguments, cotangents) that returns ((y, ...), gradients by name).
      draw: function of a seed that returns the arguments by name.
      draw_cotangents: function of the arguments.
      tokens: names of the arguments that have an entry per token.
      cuts: the first tokens of the second and third document.
    """
    here = np.zeros(draw(0)[tokens[0]].shape[1], bool)
    here[slice(*cuts)] = True
    quiet, other = draw(0), draw(1)
    dy, *rest = draw_cotangents(quiet)
    loud = jax.tree.map(lambda a: a, quiet | {n: a for n, a in other.items() if n == "state"})
    for name in tokens:
        loud[name] = np.where(only(here, quiet[name]), quiet[name], loudly(name, other[name]))
    # What is not by token belongs to the last document.
    still = jax.tree.map(lambda a: np.where(only(here, a), a, 0) if a.shape[1] == len(here) else np.zeros_like(a), rest)
    (y, *_), gradients = call(quiet, (np.where(only(here, dy), dy, 0), *still))
    (loud_y, *_), loud_gradients = call(loud, (dy, *rest))
    assert np.isfinite(np.asarray(loud_y)[:, here]).all()
    np.testing.assert_array_equal(np.asarray(y)[:, here], np.asarray(loud_y)[:, here])
    for name in tokens:
        gradient = np.asarray(gradients[name])
        assert (gradient[:, here] != 0).any(), name
        assert (gradient[:, ~here] == 0).all(), f"{name}: {np.abs(gradient[:, ~here]).max()} in other documents"
        np.testing.assert_array_equal(gradient[:, here], np.asarray(loud_gradients[name])[:, here], name)
    for leaf in jax.tree.leaves(gradients.get("state")):
        assert (np.asarray(leaf) == 0).all()


def only(here, like):
    return here.reshape(1, -1, *(1,) * (like.ndim - 2))


def loudly(name, values):
    """Louder, but decays stay decays."""
    return values if name in ("a", "log_decay", "dt") else LOUD * values


def starts(length, cuts):
    return np.isin(np.arange(length), cuts)[None]


def op_call(module, length, cuts, **options):
    def call(args, cotangents):
        with interpret():
            run_and_pull = functools.partial(module.run_and_pull, implementation="mosaic_tpu", **options)
            return jax.block_until_ready(run_and_pull(args, cotangents, starts(length, cuts)))

    return call


@pytest.mark.parametrize(
    ("module", "tokens", "length", "cuts", "sizes", "options"),
    [
        (test_mlstm, ("q", "k", "v", "i", "f"), 150, (50, 140), {}, {"chunk_size": 128}),
        (
            test_taylor_linear_attention,
            ("q", "k", "v"),
            150,
            (50, 140),
            {"heads": 1, "key": 16, "value": 8},
            {"chunk_size": 128},
        ),
        (test_linear_scan, ("a", "b"), 40, (11, 29), {}, {"chunk_size": 16}),
        (test_causal_conv1d, ("x",), 40, (11, 29), {}, {}),
    ],
    ids=["mlstm", "taylor_linear_attention", "linear_scan", "causal_conv1d"],
)
def test_tpu(module, tokens, length, cuts, sizes, options):
    draw = functools.partial(module.draw, 1, length, **sizes)
    check(op_call(module, length, cuts, **options), lambda s: draw(seed=s), module.draw_cotangents, tokens, cuts)


@pytest.mark.parametrize("tpu", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tpu", "gpu"])
def test_selective_scan_kernels(tpu, monkeypatch):
    length, cuts = 20, (5, 14)

    def call(args, cotangents):
        if tpu:
            return test_selective_scan_tpu.kernel(args, cotangents, starts(length, cuts))
        with simulate(detect_races=False):
            return jax.block_until_ready(test_selective_scan_gpu.run_and_pull(args, cotangents, starts(length, cuts)))

    monkeypatch.setattr(test_selective_scan_tpu.mosaic_tpu, "STATES_UNROLLED", 1)
    tokens = test_selective_scan_gpu.TOKENS
    draw = functools.partial(test_selective_scan.draw, 1, length, channels=3, states=2)
    check(call, lambda seed: draw(seed=seed), test_selective_scan.draw_cotangents, tokens, cuts)


def test_linear_scan_gpu_kernels():
    length, cuts = 37, (11, 29)

    def call(args, cotangents):
        with simulate(detect_races=False):
            return jax.block_until_ready(test_linear_scan_gpu.run_and_pull(args, cotangents, starts(length, cuts)))

    draw = functools.partial(test_linear_scan.draw, 1, length)
    check(call, lambda seed: draw(seed=seed), test_linear_scan.draw_cotangents, ("a", "b"), cuts)


@pytest.mark.parametrize("decay", ["head", pytest.param("channel", marks=pytest.mark.slow)])
def test_gated_linear_attention_gpu_kernels(decay):
    length, cuts = 100, (30, 90)

    def call(args, cotangents):
        reset = starts(length, cuts)
        out, _, gradients = test_gated_linear_attention_gpu.call(args, cotangents, reset, races=False)
        return out, gradients

    module = test_gated_linear_attention
    draw = functools.partial(module.draw, decay, 1, length, heads=2, groups=1, key=64, value=64)
    check(call, lambda seed: draw(seed=seed), module.draw_cotangents, ("q", "k", "v", "log_decay"), cuts)


@pytest.mark.parametrize("tpu", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tpu", "gpu"])
def test_attention_kernels(tpu):
    length, cuts = 40, (11, 29)
    documents = np.cumsum(starts(length, cuts), axis=1, dtype=np.int32)
    names = ("q", "k", "v")

    def tpu_call(arrays, cotangents):
        with interpret():
            options = {"q_documents": documents, "kv_documents": documents}
            return test_attention.run(*arrays, "mosaic_tpu", cotangents, **options)

    def gpu_call(arrays, cotangents):
        options = {"window": None, "scale": 0.3, "soft_cap": None}
        arrays = (*arrays, None, None, documents, documents)
        with simulate(detect_races=False):
            y, lse = jax.jit(functools.partial(mosaic_gpu.forward, **options), compiler_options=QUICK)(*arrays)
            backward = jax.jit(functools.partial(mosaic_gpu_backward.backward, **options), compiler_options=QUICK)
            return (y, lse), jax.block_until_ready(backward(*arrays, y, lse, *cotangents))

    def call(args, cotangents):
        arrays = tuple(jnp.asarray(args[n]) for n in names)
        out, gradients = (tpu_call if tpu else gpu_call)(arrays, tuple(map(jnp.asarray, cotangents)))
        return out, dict(zip(names, gradients, strict=True))

    def draw(seed):
        return dict(zip(names, map(np.asarray, test_attention.draw(seed, 1, length, 2, 1, 8, 8)), strict=True))

    def draw_cotangents(args):
        return tuple(map(np.asarray, test_attention.draw_cotangents(args["q"], args["v"])))

    check(call, draw, draw_cotangents, names, cuts)

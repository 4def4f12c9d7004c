"""What softmax and top-k cost on a TPU for given logits: one read, and little more time than it takes."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.softmax_topk import mosaic_tpu
from pallas_kernels.softmax_topk.decisions import decide, decide_of_keys
from pallas_kernels.static_profile import profile, programs
from pallas_kernels.static_profile.__main__ import GOLDEN
from pallas_kernels.static_profile.chips import CHIPS

V5E = CHIPS["v5e"]
LANES = mosaic_tpu.LANES


def normal(rng, columns):
    return rng.standard_normal((LANES, columns), np.float32)


def zipf(rng, columns):
    """Log probabilities of ranks, each row's own order of a common one, most frequent tokens first, with noise."""
    return -np.log(np.arange(columns, dtype=np.float32) + 2.7) + 2 * normal(rng, columns)


def ascending(rng, columns):
    return np.sort(normal(rng, columns), axis=1)


@pytest.mark.parametrize("draw", [normal, ascending, lambda rng, columns: np.round(normal(rng, columns))])
def test_the_rule_finds_the_best(draw):
    logits = draw(np.random.default_rng(0), 2500)
    decided, columns = decide(logits, 40, 1024)
    np.testing.assert_array_equal(columns, np.argsort(-logits, axis=1, kind="stable")[:, :40])
    assert len(decided) == 3


@pytest.mark.parametrize("draw", [normal, ascending, zipf])
def test_the_rule_of_keys_finds_the_best(draw):
    logits = np.asarray(jnp.asarray(draw(np.random.default_rng(0), 2500), jnp.bfloat16), np.float32)
    decided, columns = decide_of_keys(logits, 40, 1024)
    np.testing.assert_array_equal(columns, np.argsort(-logits, axis=1, kind="stable")[:, :40])
    assert len(decided) == 3


def shape_and_read(name):
    shape = programs.entry("softmax_topk", name)
    return shape, shape.rows * shape.columns * jnp.dtype(shape.dtype).itemsize


@pytest.mark.parametrize(("name", "limit"), [("distil_128k", 1.3), ("distil_128k_bfloat16", 1.3)])
def test_the_committed_cycles_are_close_to_one_read(name, limit):
    """Another test holds the table to the kernel."""
    shape, read = shape_and_read(name)
    assert (shape.rows, shape.columns, shape.k) == (4096, 128256, 64)
    place = f"softmax_topk/{name}/forward/"
    (row,) = [r for key, r in json.loads(GOLDEN.read_text())["kernels"].items() if key.startswith(place)]
    assert read <= row["bytes"] < 1.002 * read
    assert row["cycles"] <= limit * V5E.hbm_cycles(read)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rule", "draw", "limit"),
    [
        ("distil_128k", decide, normal, 1.3),
        ("distil_128k", decide, zipf, 1.3),
        ("distil_128k", decide, ascending, 1.6),
        ("distil_128k_bfloat16", decide_of_keys, normal, 1.3),
        ("distil_128k_bfloat16", decide_of_keys, zipf, 1.3),
        ("distil_128k_bfloat16", decide_of_keys, ascending, 1.3),
    ],
)
def test_with_waits_for_memory_too(name, rule, draw, limit):
    """128 rows stand for all: rows meet in blocks of 128 alone, and these do not know of each other."""
    pytest.importorskip("libtpu")
    shape, read = shape_and_read(name)
    dtype = jnp.dtype(shape.dtype)
    _, block_columns = mosaic_tpu.block_sizes(shape.rows, shape.columns, dtype.itemsize)
    logits = draw(np.random.default_rng(1), shape.columns).astype(dtype).astype(np.float32)
    decided, _ = rule(logits, shape.k, block_columns)
    asked = itertools.chain(*decided * (shape.rows // LANES))
    place = {"op": "softmax_topk", "shape": name, "direction": "forward", "implementation": "mosaic_tpu"}
    request = {"call": "pallas_kernels.static_profile.programs:op_program", "arguments": place}
    (report,) = profile.profile([request], "v5e", [asked])
    (kernel,) = [kernel for kernel in report["kernels"] if kernel["pallas"]]
    assert next(asked, None) is None, "the schedule asked for fewer decisions than the rule makes"
    assert kernel["bytes_known"]
    # A step begins when its block is there: it takes as long as its bundles or as the copy of the next block.
    copy = V5E.hbm_cycles(read) / (shape.rows // LANES * len(decided))
    waited = sum(max(cycles, copy) for cycles in kernel["passes"])
    assert kernel["cycles"] <= waited <= limit * V5E.hbm_cycles(read)

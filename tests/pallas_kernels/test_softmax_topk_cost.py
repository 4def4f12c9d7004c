"""What softmax and top-k cost on a TPU for given logits: one read, and at most 1.3 times as long as it takes."""

import itertools
import json

import numpy as np
import pytest

from pallas_kernels.softmax_topk import mosaic_tpu
from pallas_kernels.softmax_topk.decisions import decide
from pallas_kernels.static_profile import profile, programs
from pallas_kernels.static_profile.__main__ import GOLDEN
from pallas_kernels.static_profile.chips import CHIPS

V5E = CHIPS["v5e"]
SHAPE = programs.entry("softmax_topk", "distil_128k")
LANES = mosaic_tpu.LANES
READ = SHAPE.rows * SHAPE.columns * 4
PLACE = "softmax_topk/distil_128k/forward/"


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


def test_the_committed_cycles_are_close_to_one_read():
    """Another test holds the table to the kernel."""
    assert (SHAPE.rows, SHAPE.columns, SHAPE.k) == (4096, 128256, 64)
    (row,) = [r for name, r in json.loads(GOLDEN.read_text())["kernels"].items() if name.startswith(PLACE)]
    assert READ <= row["bytes"] < 1.001 * READ
    assert row["cycles"] <= 1.3 * V5E.hbm_cycles(READ)


@pytest.mark.slow
@pytest.mark.parametrize(("draw", "limit"), [(normal, 1.3), (zipf, 1.3), (ascending, 1.6)])
def test_with_waits_for_memory_too(draw, limit):
    """128 rows stand for all: rows meet in blocks of 128 alone, and these do not know of each other."""
    pytest.importorskip("libtpu")
    _, block_columns = mosaic_tpu.block_sizes(SHAPE.rows, SHAPE.columns, 4)
    decided, _ = decide(draw(np.random.default_rng(1), SHAPE.columns), SHAPE.k, block_columns)
    asked = itertools.chain(*decided * (SHAPE.rows // LANES))
    place = {"op": "softmax_topk", "shape": "distil_128k", "direction": "forward", "implementation": "mosaic_tpu"}
    request = {"call": "pallas_kernels.static_profile.programs:op_program", "arguments": place}
    (report,) = profile.profile([request], "v5e", [asked])
    (kernel,) = [kernel for kernel in report["kernels"] if kernel["pallas"]]
    assert next(asked, None) is None, "the schedule asked for fewer decisions than the rule makes"
    assert kernel["bytes_known"]
    # A step begins when its block is there: it takes as long as its bundles or as the copy of the next block.
    copy = V5E.hbm_cycles(READ) / (SHAPE.rows // LANES * len(decided))
    waited = sum(max(cycles, copy) for cycles in kernel["passes"])
    assert kernel["cycles"] <= waited <= limit * V5E.hbm_cycles(READ)

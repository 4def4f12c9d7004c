"""The TPU kernel of softmax and top-k: interpreted against float64, and compiled for TPUs without one."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.interpret import interpret
from pallas_kernels.softmax_topk import keys, mosaic_tpu, softmax_topk
from pallas_kernels.softmax_topk.shapes import MODELS, TINY
from tests.pallas_kernels.test_softmax_topk import (
    assert_equals,
    check_transformations,
    draw,
    loop,
)

# The kernel is a long program that runs once: optimising it takes longer than it runs.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "fusion", "xla_backend_optimization_level": 0}
BLOCK_COLUMNS = 512


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of columns, and several steps a block, at sizes that are quick to interpret."""
    monkeypatch.setattr(mosaic_tpu, "UNROLL", 2)
    monkeypatch.setattr(mosaic_tpu, "_MAX_BLOCK_COLUMNS", BLOCK_COLUMNS)


def run(logits, k, parameters=True):
    with interpret(parameters):
        function = jax.jit(lambda x: softmax_topk(x, k, implementation="mosaic_tpu"), compiler_options=COMPILER_OPTIONS)
        return jax.block_until_ready(function(logits))


def select(out, rows):
    return type(out)(*(np.asarray(v)[rows] for v in out))


def special_rows(columns, k):
    """Rows that take every path of the kernel, and their names."""
    rng = np.random.default_rng(5)
    rows = {f"random {i}": row for i, row in enumerate(draw(12, columns, seed=6))}
    rows["ties"] = np.round(rng.normal(size=columns))
    rows["zeros of both signs"] = np.where(rng.random(columns) < 0.5, 0.0, -0.0)
    rows["ascending"] = np.sort(rng.normal(size=columns))
    rows["descending"] = rows["ascending"][::-1]
    one_lane = np.where(np.arange(columns) % 128 == 5, 10.0 + np.arange(columns) % 7, rng.normal(size=columns))
    rows["the best in one lane"] = one_lane
    rows["minus infinity"] = np.full(columns, -np.inf)
    few = np.full(columns, -np.inf)
    few[rng.choice(columns, k // 2, replace=False)] = rng.normal(size=k // 2)
    rows["few finite"] = few
    rows["finite in the last columns"] = np.where(np.arange(columns) >= columns - 3, 1.0, -np.inf)
    rows["large"] = 1e4 + rng.normal(size=columns)
    rows["nearly the largest number"] = np.where(rng.random(columns) < 0.5, 3e38, -3e38)
    return list(rows), np.stack(list(rows.values())).astype(np.float32)


@pytest.mark.parametrize(("columns", "k"), [(3 * BLOCK_COLUMNS - 131, 40), (2 * BLOCK_COLUMNS, 128)])
def test_every_kind_of_row_equals_the_loop(columns, k):
    names, logits = special_rows(columns, k)
    spoiled = draw(5, columns)
    spoiled[0, -1] = np.nan
    spoiled[1, 0], spoiled[1, 1] = np.nan, np.inf
    spoiled[2] = np.nan
    spoiled[3, [columns - 1, 7]] = np.inf
    out = run(np.concatenate([spoiled, logits]), k)
    expected = loop(logits, k)
    for row, name in enumerate(names):
        assert_equals(select(out, [5 + row]), tuple(v[row : row + 1] for v in expected), name)
    for row in range(3):
        assert all(np.isnan(np.asarray(v)[row]).all() for v in (out.lse, out.values, out.probabilities))
        np.testing.assert_array_equal(out.indices[row], -1)
    assert out.lse[3] == np.inf
    np.testing.assert_array_equal(out.indices[3, :2], [7, columns - 1])
    np.testing.assert_array_equal(np.isnan(out.probabilities[3]), np.arange(k) < 2)
    assert_equals(select(out, [4]), loop(spoiled[4:], k))


@pytest.mark.parametrize(("rows", "columns", "k"), [(1, 1, 1), (9, 130, 130 - 2)])
def test_small_sizes(rows, columns, k):
    logits = draw(rows, columns)
    assert_equals(run(logits, k), loop(logits, k))


@pytest.mark.slow
def test_several_blocks_of_rows_in_bfloat16():
    """The first 128 rows have keys in their first block; NaN and +inf stand in the second, -inf in the other rows."""
    logits, k = rows_with_keys(133, 2 * BLOCK_COLUMNS - 131), 9
    logits[20, 700], logits[21, 710], logits[22, 720], logits[129, 3] = np.nan, np.inf, 3e38, np.nan
    logits[130], logits[131, k // 2 :] = -np.inf, -np.inf
    logits = jnp.asarray(logits, jnp.bfloat16)
    out, spoiled = run(logits, k), [20, 21, 129]
    expected = loop(np.delete(np.asarray(logits, np.float32), spoiled, axis=0), k)
    assert_equals(select(out, np.delete(np.arange(133), spoiled)), expected)
    assert np.isnan(out.lse[jnp.array([20, 129])]).all()
    assert (np.asarray(out.indices)[[20, 129]] == -1).all()
    assert (out.lse[21], out.indices[21, 0]) == (np.inf, 710)


@pytest.fixture
def keys_alone(monkeypatch):
    """Leaves out the general way: a block that the keys do not take is not taken at all."""
    monkeypatch.setattr(mosaic_tpu, "_take", lambda *_: None)
    jax.clear_caches()
    yield
    jax.clear_caches()


def rows_with_keys(rows, columns):
    """Ties, constants, zeros of both signs, rows in order, and one whose best are in one lane; the best near to 0."""
    logits = 3 * np.random.default_rng(3).standard_normal((rows, columns))
    logits[0], logits[1], logits[2] = np.round(logits[0]), 2.5, -7.0
    logits[3] = np.where(logits[3] < 0, 0.0, -0.0)
    logits[4], logits[5] = np.sort(logits[4]), np.sort(logits[5])[::-1]
    logits[6, 5::128] += 20
    return logits


@pytest.mark.slow
@pytest.mark.usefixtures("keys_alone")
def test_special_rows_of_bfloat16_have_keys():
    """Near to 0, then with -inf in any column but the first ones of a block, then far from 0."""
    near, k = rows_with_keys(128, 2 * BLOCK_COLUMNS - 131), 9
    masked, far = near.copy(), near.copy()
    masked[np.random.default_rng(4).random(near.shape) < 0.4] = -np.inf
    masked[:, :k], masked[7, k:] = near[:, :k], -np.inf
    far[::3], far[1::3] = far[::3] + 1e4, far[1::3] - 1e4
    with interpret():
        call = jax.jit(lambda x: softmax_topk(x, k, implementation="mosaic_tpu"), compiler_options=COMPILER_OPTIONS)
        for name, logits in (("near", near), ("masked", masked), ("far", far)):
            logits = jnp.asarray(logits, jnp.bfloat16)
            assert_equals(call(logits), loop(np.asarray(logits, np.float32), k), name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "shift", "rise", "lowest"),
    [
        (40, 1, 0, None),
        (100, 10, 0, None),
        (17, -70, 0, None),
        (5, 70, 0, -np.inf),
        (9, 0, 60, None),
        (33, 1, 0, -np.inf),
        (8, 1, 0, -3e38),
    ],
)
def test_keys_of_bfloat16_equal_the_loop(k, shift, rise, lowest):
    """Ties, both signs, zeros of both signs, and lanes that hold many of the best, in blocks that have keys.

    The best of the rows are near to 0, far from it, or near in the first block alone; some columns are masked.
    """
    rng, columns = np.random.default_rng(0), 3 * BLOCK_COLUMNS - 131
    zeros = np.where(rng.random((4, columns)) < 0.5, 0.0, -0.0)
    random = 2 * rng.standard_normal((114, columns)) - shift
    ascending = np.sort(random[:5])
    logits = np.concatenate([random[:100], np.round(random[100:]), zeros, ascending, ascending[:, ::-1]])
    logits[:, BLOCK_COLUMNS:] += rise
    if lowest is not None:
        logits[rng.random(logits.shape) < 0.4] = lowest
    logits = jnp.asarray(logits, jnp.bfloat16)
    assert keys.serves(*mosaic_tpu.block_sizes(*logits.shape, 2), logits.dtype, mosaic_tpu.UNROLL)
    assert_equals(run(logits, k), loop(np.asarray(logits, np.float32), k))


@pytest.mark.slow
def test_spoiled_rows_of_bfloat16_leave_the_others_alone():
    """NaN, +inf and a number that has no key, in the second of three blocks; what they have is as in float32."""
    logits = draw(128, 3 * BLOCK_COLUMNS)
    logits[3, 700], logits[5, 710], logits[7, 720] = np.nan, np.inf, 3e38
    logits[9, 4:] = -np.inf
    logits = jnp.asarray(logits, jnp.bfloat16)
    out, expected = run(logits, 6), loop(np.delete(np.asarray(logits, np.float32), [3, 5], axis=0), 6)
    assert_equals(select(out, np.delete(np.arange(128), [3, 5])), expected)
    assert np.isnan(out.lse[3])
    np.testing.assert_array_equal(out.indices[3], -1)
    assert (out.lse[5], out.indices[5, 0]) == (np.inf, 710)


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        (9, jnp.float32),
        pytest.param(133, jnp.float32, marks=pytest.mark.slow),  # two blocks of rows
        pytest.param(133, jnp.bfloat16, marks=pytest.mark.slow),  # the first of which has keys
    ],
)
def test_no_races_and_no_read_of_what_was_never_written(rows, dtype):
    logits = jnp.asarray(draw(rows, BLOCK_COLUMNS + 40), dtype)
    out = run(logits, 5, pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"))
    assert not interpret_pallas_call.races.races_found
    assert_equals(out, loop(np.asarray(logits, np.float32), 5))


def test_gradients_checkpoint_vmap_and_scan_over_layers():
    with interpret():
        check_transformations("mosaic_tpu", compiler_options=COMPILER_OPTIONS)


@pytest.mark.parametrize("name", [*MODELS, *TINY])
def test_block_sizes_are_whole_tiles_that_fit(name, monkeypatch):
    monkeypatch.undo()
    shape = (MODELS | TINY)[name]
    itemsize = jnp.dtype(shape.dtype).itemsize
    rows, columns = mosaic_tpu.block_sizes(shape.rows, shape.columns, itemsize)
    assert rows % (32 // itemsize) == 0
    assert rows <= mosaic_tpu.LANES
    assert columns % mosaic_tpu.LANES == 0
    assert (columns // mosaic_tpu.LANES) % min(mosaic_tpu.UNROLL, columns // mosaic_tpu.LANES) == 0
    assert 2 * rows * columns * itemsize + 16 * 128 * 128 * 4 <= 12 * 2**20  # of the 16 MiB a kernel has by default
    assert (-(-shape.columns // columns) - 1) * columns < shape.columns  # no block without a column


COMPILE = """
import sys, jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from pallas_kernels.softmax_topk import softmax_topk
from pallas_kernels.softmax_topk.shapes import MODELS, TINY
for topology in sys.argv[1].split(","):
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    for name in sys.argv[2].split(","):
        shape = (MODELS | TINY)[name]
        place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=SingleDeviceSharding(device))
        step = lambda a: softmax_topk(**a, **shape.options())
        compiled = jax.jit(step).lower(jax.tree.map(place, shape.arrays())).compile()
        assert "tpu_custom_call" in compiled.as_text(), name
        all_logits = shape.rows * shape.columns * jax.numpy.dtype(shape.dtype).itemsize
        results = 2 * shape.rows * 128 * 4  # k entries of a row stand in a tile of 128 lanes
        assert compiled.memory_analysis().temp_size_in_bytes < max(all_logits / 4, results, 2**20), name
        print("compiled", topology, name)
"""


@pytest.mark.parametrize(
    ("topologies", "names"),
    [
        ("v5e:2x4", "odd"),  # the golden table of costs compiles distil_128k
        pytest.param("v5e:2x4,v5p:2x2x1,v6e:2x4", ",".join(MODELS | TINY), marks=pytest.mark.slow),
    ],
)
def test_compiles_for_tpus(topologies, names):
    pytest.importorskip("libtpu")
    quiet = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, topologies, names],
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == len(topologies.split(",")) * len(names.split(","))

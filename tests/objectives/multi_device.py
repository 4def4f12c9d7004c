"""Run in its own process with eight simulated devices: split rows and a split vocabulary. See test_mesh.py."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import objectives
from pallas_kernels import partition
from tests.trees import FLOAT32_TOLERANCE, GRADIENT_TOLERANCE, QUICK_COMPILE, assert_close
from zoo.core.compat import make_mesh

ROWS, TOKENS, CLASSES, WIDTH = 8, 6, 64, 16
RULES = {"batch": "data", "vocab": "tensor"}
MOVED = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def moved(text):
    """(kind, elements) of each array that devices exchange in an HLO, several of which one operation may carry."""
    arrays = [(kind, shape) for result, kind in MOVED.findall(text) for shape in re.findall(r"\w\[([\d,]*)\]", result)]
    return [(kind, math.prod(int(n) for n in shape.split(",") if n)) for kind, shape in arrays]


def draw(dtype):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.normal(size=(ROWS, TOKENS, CLASSES)), dtype)
    targets = jnp.asarray(rng.integers(0, CLASSES, (ROWS, TOKENS)), jnp.int32)
    return logits, targets, jnp.asarray(rng.random((ROWS, TOKENS)) < 0.7, jnp.float32), rng


def compare(mesh, function, arrays, specs, results, limit):
    """Values and gradients of one device; exchanges of at most `limit` elements each, and no gather of more."""
    want = jax.jit(function, compiler_options=QUICK_COMPILE)(*arrays)
    put = lambda tree: jax.tree.map(lambda s: NamedSharding(mesh, s), tree)  # noqa: E731
    with partition.use(mesh, RULES):
        sharded = [jax.device_put(x, s) for x, s in zip(arrays, put(specs), strict=True)]
        compiled = jax.jit(function, out_shardings=put(results)).lower(*sharded).compile()
        have = compiled(*sharded)
    exchanges = moved(compiled.as_text())
    assert exchanges, "nothing is exchanged: the arrays are not split"
    too_large = [exchange for exchange in exchanges if exchange[1] > limit]
    assert not too_large, too_large
    return have, want, exchanges


def check_vocabulary(mesh, dtype):
    """Log-probabilities and their gradient from logits split over rows and classes: sums over [B, T] alone."""
    logits, targets, mask, _ = draw(dtype)
    rows, classes = PartitionSpec("data"), PartitionSpec("data", None, "tensor")

    def function(logits, targets, mask):
        loss = lambda z: jnp.sum(jnp.square(objectives.token_logps(z, targets, mask)))  # noqa: E731
        return objectives.token_logps(logits, targets, mask), jax.grad(loss)(logits)

    # a device's share of [B, T]; its share of the logits has 16 times as many elements
    limit = ROWS // mesh.shape["data"] * TOKENS
    have, want, exchanges = compare(
        mesh, function, (logits, targets, mask), (classes, rows, rows), (rows, classes), limit
    )
    assert {kind for kind, _ in exchanges} == {"all-reduce"}, exchanges
    assert_close(have[0], want[0], FLOAT32_TOLERANCE, "token_logps")
    tolerance = GRADIENT_TOLERANCE if dtype == jnp.float32 else 2.0**-7  # a rounding to bfloat16 may go either way
    assert_close(np.float32(have[1]), np.float32(want[1]), tolerance, "gradient")


def check_selection(mesh):
    """Each device selects from its own rows, as `devices` rows apart do; nothing but the sums is exchanged."""
    logits, targets, mask, rng = draw(jnp.float32)
    ref_nll = jnp.asarray(rng.uniform(0, 8, (ROWS, TOKENS)), jnp.float32)
    rows = PartitionSpec("data")

    def function(logits, targets, mask, ref_nll):
        # the mesh in use says how many parts there are; without one, as for the comparison, this says it
        devices = None if partition.active() else mesh.shape["data"]
        loss = lambda z: objectives.selective_cross_entropy(  # noqa: E731
            z, targets, mask, ref_nll, scope="device", devices=devices
        )
        output = loss(logits)
        return output, jax.grad(lambda z: loss(z).loss_sum)(logits)

    arrays = (logits, targets, mask, ref_nll)
    results = (jax.tree.map(lambda _: PartitionSpec(), jax.eval_shape(function, *arrays)[0]), rows)
    have, want, exchanges = compare(mesh, function, arrays, (rows,) * 4, results, limit=8)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert_close(a, b, FLOAT32_TOLERANCE, "selection")
    assert {kind for kind, _ in exchanges} == {"all-reduce"}, exchanges


def check_batch_selection(mesh):
    """Selection from the whole batch gathers the excess of all tokens, never logits, and is that of one device."""
    logits, targets, mask, rng = draw(jnp.float32)
    ref_nll = jnp.asarray(rng.uniform(0, 8, (ROWS, TOKENS)), jnp.float32)
    rows = PartitionSpec("data")

    def function(logits, targets, mask, ref_nll):
        output = objectives.selective_cross_entropy(logits, targets, mask, ref_nll)
        return output.loss_sum, output.weight

    arrays = (logits, targets, mask, ref_nll)
    have, want, _ = compare(mesh, function, arrays, (rows,) * 4, (PartitionSpec(),) * 2, limit=2 * ROWS * TOKENS)
    for a, b in zip(have, want, strict=True):
        assert_close(a, b, FLOAT32_TOLERANCE, "selection")


def main():
    assert jax.device_count() == 8
    for dtype in (jnp.float32, jnp.bfloat16):
        check_vocabulary(make_mesh({"data": 2, "tensor": 4}), dtype)
    check_selection(make_mesh({"data": 4, "tensor": 2}))
    check_batch_selection(make_mesh({"data": 4, "tensor": 2}))
    print("8 devices: all equal")


if __name__ == "__main__":
    main()

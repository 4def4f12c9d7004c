"""What the blockwise attention costs as the sequence grows, from its programs: nothing long is run."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from pallas_kernels.attention import attention, shapes, xla

TIMES = (4096, 16384, 65536)
WINDOW, HEADS, WIDTH = 1024, 2, 8


def programs(time, window):
    """name -> (function, abstract arguments): the forward pass, and the gradient (which runs both passes)."""
    arguments = [jax.ShapeDtypeStruct((1, time, heads, WIDTH), jnp.float32) for heads in (HEADS, 1, 1)]

    def forward(q, k, v):
        return attention(q, k, v, window=window, implementation="xla")

    def gradient(q, k, v):
        return jax.grad(lambda *a: jnp.sum(forward(*a)), argnums=(0, 1, 2))(q, k, v)

    return {"forward": (forward, arguments), "gradient": (gradient, arguments)}


def matmul_flops(jaxpr) -> int:
    """Floating-point operations of all `dot_general`s, loops counted with their trip count."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
            continue
        assert name != "while", "a while loop hides its trip count"
        inner = [matmul_flops(x) for x in subprograms(eqn.params)]
        if name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * (eqn.params["length"] if name == "scan" else 1)
    return total


def subprograms(params):
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def flops(time, window):
    return {
        name: matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr)
        for name, (function, arguments) in programs(time, window).items()
    }


def copies_in_loops(program: str, shape: str) -> list[str]:
    """The lines of an optimised program that copy an array of `shape` in the body of a loop."""
    bodies, copies, body = set(re.findall(r"body=(%[\w.]+)", program)), [], None
    assert bodies, "the program has no loop"
    for line in program.splitlines():
        if line.startswith("%"):
            body = line.split()[0]
        if body in bodies and f"= {shape}" in line and " copy(" in line:
            copies.append(line.strip())
    return copies


@pytest.mark.parametrize("documents", [False, True])
def test_plan_lists_exactly_the_pairs_that_hold_a_visible_score(monkeypatch, documents):
    monkeypatch.setattr(xla, "BLOCK", 16)
    monkeypatch.setattr(xla, "MIN_BLOCK", 8)
    for time, window in itertools.product((2, 15, 16, 17, 33, 64, 79), (None, *range(1, 50))):
        plan = xla.plan(time, time, window, indexed=True, documents=documents)
        block, blocks = plan.q_block, -(-time // plan.q_block)
        assert plan.kv_block == block <= 16
        back = np.arange(blocks * block)[:, None] - np.arange(blocks * block)
        visible = (back >= 0) & (back < (window or time + block))
        tiles = visible.reshape(blocks, block, blocks, block).swapaxes(1, 2).reshape(blocks, blocks, -1)
        listed = [tuple(pair) for pair in (*plan.interior.tolist(), *plan.edge.tolist())]
        assert sorted(listed) == [tuple(x) for x in np.argwhere(tiles.any(axis=-1)).tolist()]
        whole = [] if documents else np.argwhere(tiles.all(axis=-1)).tolist()
        assert sorted(plan.interior.tolist()) == whole


def test_windowed_flops_are_linear_in_time_and_near_the_band():
    counts = {time: flops(time, WINDOW) for time in TIMES}
    for time, count in counts.items():
        # Every query sees at most WINDOW keys; the block edges add at most one block of keys on average.
        band = 2 * time * HEADS * WIDTH * (WINDOW + xla.BLOCK)
        assert count["forward"] <= 2 * band
        assert count["gradient"] <= (2 + 5) * band
        assert count["forward"] > time * WINDOW * HEADS * WIDTH, "the counter misses the loop"
    for name in ("forward", "gradient"):
        step, next_step = (counts[b][name] - counts[a][name] for a, b in itertools.pairwise(TIMES))
        assert next_step == 4 * step


def test_full_causal_flops_skip_the_upper_triangle():
    for time in TIMES:
        count = flops(time, None)
        square = 2 * time * time * HEADS * WIDTH
        blocks = time // xla.BLOCK
        assert count["forward"] == 2 * square * (blocks + 1) / (2 * blocks)
        assert count["gradient"] == (2 + 5) * square * (blocks + 1) / (2 * blocks)


@pytest.mark.parametrize("name", ["forward", "gradient"])
def test_windowed_memory_is_linear_in_time(name):
    temporary = {}
    for time in TIMES:
        function, arguments = programs(time, WINDOW)[name]
        compiled = jax.jit(function).lower(*arguments).compile()
        temporary[time] = compiled.memory_analysis().temp_size_in_bytes
        copied = copies_in_loops(compiled.as_text(), f"f32[{time // xla.BLOCK},1,1,")
        assert not copied, "copying a whole carry every step is quadratic in time"
    per_token = [temporary[time] / time for time in TIMES]
    assert per_token[2] <= 1.01 * per_token[1] <= 1.01**2 * per_token[0]
    heads = 2 * HEADS + 2  # q, y, k, v
    assert temporary[65536] < 6 * heads * 65536 * WIDTH * 4


@pytest.mark.parametrize("kind", ["documents", "positions"])
def test_documents_and_positions_keep_memory_linear(kind):
    time = 16384
    index = jax.ShapeDtypeStruct((1, time), jnp.int32)

    def gradient(q, k, v, marks):
        arguments = {f"q_{kind}": marks, f"kv_{kind}": marks, "window": WINDOW}
        return jax.grad(lambda *a: jnp.sum(attention(*a, **arguments)), argnums=(0, 1, 2))(q, k, v)

    compiled = jax.jit(gradient).lower(*programs(time, WINDOW)["gradient"][1], index).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 40 * time * HEADS * WIDTH * 4
    for block in (xla.BLOCK, 2 * xla.BLOCK):
        assert not copies_in_loops(compiled.as_text(), f"f32[{time // block},1,1,")


def test_decoding_does_not_copy_the_cache_many_times():
    shape = shapes.AttentionShape(1, 1, 8, 2, 64, 64, window=2048, keys=2048, dtype=jnp.float32)
    compiled = jax.jit(lambda a: attention(**a, window=2048)).lower(shape.arrays()).compile()
    cache = 2 * 2048 * 2 * 64 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * cache


@pytest.mark.parametrize("name", shapes.MODELS)
def test_model_shapes_trace(name):
    """The gradient of every published shape traces, with outputs of the documented shapes and dtypes."""
    shape = shapes.MODELS[name]
    arrays = shape.arrays()
    heads = {x: arrays.pop(x) for x in ("q", "k", "v")}

    def loss(heads, arrays):
        y, lse = attention(**heads, **arrays, **shape.options(), return_lse=True)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(lse), (y, lse)

    grads, (y, lse) = jax.eval_shape(jax.grad(loss, has_aux=True), heads, arrays)
    assert (y.shape, y.dtype) == ((shape.batch, shape.time, shape.heads, shape.value), shape.dtype)
    assert (lse.shape, lse.dtype) == ((shape.batch, shape.time, shape.heads), jnp.float32)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), grads) == jax.tree.map(lambda x: (x.shape, x.dtype), heads)

"""The suite `ops` of mode=benchmark: every op of pallas_kernels beside the implementation it has to beat.

On a CPU: `xla` against the sequential `reference`, at the widths of published models, one row, float32, and the tokens
of config.benchmark.op_lengths. On a TPU or GPU: the Pallas kernel against `xla`, at the shapes that `static_profile`
counts, and how far either is from the reference; calls that a kernel does not serve are left out.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.static_profile import programs

KERNELS = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}
PASSES = ("forward", "forward and backward")


def cases(lengths: tuple[int, ...]) -> list[tuple[str, str, Any]]:
    """(op, label, shape) to time on this platform.

    Args:
      lengths: tokens (rows where an op has no sequence) of each case on a CPU; elsewhere the shapes are published ones.
    """
    names = [(op, name) for op in programs.ops() for name in programs.entries(op)]
    if jax.default_backend() in KERNELS:
        return [(op, name, programs.entry(op, name)) for op, name in names]
    found = []
    for op, name in names:
        shape = programs.entry(op, name)
        length = next(field for field in ("time", "tokens", "rows") if hasattr(shape, field))
        for tokens in lengths:
            changes = {length: tokens, "dtype": jnp.float32} | ({"batch": 1} if hasattr(shape, "batch") else {})
            found.append((op, f"{name}, {tokens} tokens", dataclasses.replace(shape, **changes)))
    return found


def draw(shape: Any, seed: int = 0) -> dict[str, Any]:
    """Arguments of a shape: documents of random length, decays of a long memory, integers over their whole range."""
    rng = np.random.default_rng(seed)

    def array(name: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
        size, dtype = spec.shape, np.dtype(spec.dtype)
        if name == "valid" or name.endswith("documents"):
            value = np.ones(size)
        elif name == "reset":
            value = rng.random(size) < 1 / 256
        elif name.endswith("positions"):
            value = np.broadcast_to(np.arange(size[-1]), size)
        elif name == "labels":
            value = rng.integers(0, shape.classes, size)
        elif np.issubdtype(dtype, np.integer):
            limits = np.iinfo(dtype)
            value = rng.integers(limits.min + (dtype == np.int8), limits.max, size, endpoint=True)
        else:
            value = rng.standard_normal(size, np.float32) * (size[-2] ** -0.5 if name == "w" else 1)
            value = _RANGES.get(name, lambda v: v)(value)
        return jnp.asarray(value).astype(spec.dtype)

    arrays = shape.arrays()
    return {name: jax.tree.map(functools.partial(array, name), specs) for name, specs in arrays.items()}


_RANGES: dict[str, Callable[[Any], Any]] = {  # of normal numbers, for arguments that have a sign
    "a": lambda v: 1 / (1 + np.exp(-2 - v)),
    "A": lambda v: -np.exp(v),
    "dt": lambda v: 0.1 * np.log1p(np.exp(v)),
    "log_decay": lambda v: -0.1 * np.log1p(np.exp(v)),
    "x_scale": np.abs,
    "w_scale": np.abs,
}


def call(op: str, shape: Any, arguments: dict[str, Any], implementation: str, which: str) -> Callable[[], Any]:
    """A compiled pass of an op that waits for its result; `forward and backward` sums the results and differentiates.

    Raises:
      UnsupportedError: the implementation does not serve the call.
    """
    function = getattr(importlib.import_module(f"pallas_kernels.{op}"), op)
    floats = {name: a for name, a in arguments.items() if programs.is_floating(a)}
    others = {name: a for name, a in arguments.items() if name not in floats}

    def forward(floats, others):
        return function(**floats, **others, **shape.options(), implementation=implementation)

    def total(floats, others):
        leaves = [a for a in jax.tree.leaves(forward(floats, others)) if jnp.issubdtype(a.dtype, jnp.floating)]
        return sum(jnp.sum(a.astype(jnp.float32)) for a in leaves)

    compiled = jax.jit(forward if which == PASSES[0] else jax.grad(total)).lower(floats, others).compile()
    return lambda: jax.block_until_ready(compiled(floats, others))


def differentiable(op: str) -> bool:
    """Whether an op has a backward pass of its own; the others are for decoding."""
    return bool(programs.implementations(op, "backward"))


def difference(result: Any, reference: Any) -> float:
    """The largest difference of any result from the reference's, over the largest magnitude of that result."""
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(reference), strict=True)
    ratios = []
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        ratios.append(float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), np.finfo(np.float32).tiny)))
    return max(ratios)


def measure(lengths: tuple[int, ...], repeats: int, seconds: Callable[..., list[float]]) -> list[dict[str, Any]]:
    """Times every case, and on an accelerator compares it with the reference.

    Args:
      lengths: see `cases`.
      repeats: calls of a round.
      seconds: (functions, repeats) -> median seconds of each.

    Returns:
      Rows with `name`, `metric`, `ours`, `peer` and `ratio` (> 1 when ours is better).
    """
    kernel = KERNELS.get(jax.default_backend())
    ours, peer = (kernel, "xla") if kernel else ("xla", "reference")
    rows = []
    for op, label, shape in cases(lengths):
        name, arguments = f"{op}, {label}", draw(shape)
        for which in PASSES if differentiable(op) else PASSES[:1]:
            try:
                sides = [call(op, shape, arguments, side, which) for side in (ours, peer)]
            except UnsupportedError:
                continue
            a, b = seconds(sides, repeats)
            metric = f"{which}, ms ({ours} against {peer})"
            rows.append({"name": name, "metric": metric, "ours": a * 1e3, "peer": b * 1e3, "ratio": b / a})
            if kernel and which == PASSES[0]:
                exact = call(op, shape, arguments, "reference", which)()
                a, b = (difference(side(), exact) for side in sides)
                metric = "largest difference from the reference, relative"
                rows.append({"name": name, "metric": metric, "ours": a, "peer": b, "ratio": b / a if a else 1.0})
    return rows

"""The suite `ops` of mode=benchmark: every op of pallas_kernels beside the implementations it has to beat.

On a CPU: `xla` against the sequential `reference`, at the widths of published models, one row, float32, and the tokens
of config.benchmark.op_lengths. On a TPU or GPU: the Pallas kernel (where it does not serve a call, `xla`) against `xla`
and peers, at the shapes that `static_profile` counts, after a look at how far results and gradients are from the
reference. Small calls with states, documents, rings, other dtypes and so on (`variants`) are compared with it too, and
not timed. Peers are JAX's own kernels (launch/benchmark_peers.py) and, in a process of their own, those of torch
(launch/torch_ops.py); one that is not installed or does not serve a call has a row that says why.

On a chip a sample is several runs of a program in a row, each of several calls on arrays of their own, until they take
10 ms: calls of microseconds are not lost in what it takes to start them, and no cache holds all arrays.
"""

import dataclasses
import functools
import importlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from launch import benchmark_peers
from launch.benchmark_table import Row
from launch.peer import Peer
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.static_profile import programs

KERNELS = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}
PASSES = ("forward", "forward and backward")
CHECKED_TOKENS, CHECKED_WINDOW = 512, 128  # of the calls that are compared with the reference
TOLERANCE = 0.03  # of bfloat16 arguments and gradients: differences come to a few of its 2^-8 steps
ROUNDING = 2.0**-14  # of the largest of several results: how large the rounding of float32 sums in another may be
FLOAT32_TOLERANCE = 1e-3  # of float32 arguments: a product that rounded them to bfloat16 would be off by more
WRONG = "WRONG"
LEAST_SECONDS = 0.01  # of a sample
ARRAYS_BYTES, MOST_CALLS = 128 * 2**20, 64  # what one program on a chip goes through

Case = tuple[str, str, Any]  # op, label, entry of its shapes


def cases(lengths: Sequence[int], platform: str) -> list[Case]:
    """What is timed on a platform.

    Args:
      lengths: tokens (rows where an op has no sequence) of each case on a CPU; elsewhere the shapes are published ones.
      platform: "cpu", "tpu" or "gpu".
    """
    found = []
    for op in programs.ops():
        for name in programs.entries(op):
            shape = programs.entry(op, name)
            if platform in KERNELS:
                found.append((op, name, programs.native(op, shape, KERNELS[platform])))
                continue
            for tokens in lengths:
                changes = {"dtype": jnp.float32} | ({"batch": 1} if hasattr(shape, "batch") else {})
                shorter = dataclasses.replace(shape, **{_length(shape): tokens}, **changes)
                found.append((op, f"{name}, {tokens} tokens", shorter))
    return found


def variants(platform: str) -> list[Case]:
    """Small calls of every op on an accelerator, which differ in states, documents, decoding, dtypes and so on."""
    kernel = KERNELS[platform]
    return [(op, name, shape) for op in programs.ops() for name, shape in programs.calls(op, kernel).items()]


def _length(shape: Any) -> str:
    return next(field for field in ("time", "tokens", "rows") if hasattr(shape, field))


def checked(shape: Any) -> Any:
    """A shape whose reference takes little time and memory: one row, few tokens, a window that cuts them."""
    changes: dict[str, Any] = {_length(shape): min(getattr(shape, _length(shape)), CHECKED_TOKENS)}
    if hasattr(shape, "batch"):
        changes["batch"] = 1
    if getattr(shape, "window", None):
        changes["window"] = min(shape.window, CHECKED_WINDOW)
    return dataclasses.replace(shape, **changes)


def draw(shape: Any, seed: int = 0) -> dict[str, Any]:
    """Arguments of a shape: documents of random length before padding, decays of a long memory, integers of any size.

    Positions are those of a ring that has wrapped once, in which every fifth slot is of another document.
    """
    rng = np.random.default_rng(seed)

    def array(name: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
        size, dtype = spec.shape, np.dtype(spec.dtype)
        if name == "valid":
            value = np.broadcast_to(_inside(size[-1]), size)
        elif name.endswith("documents"):
            value = _documents(size, seed, shape.keys, stored=name.startswith("kv"))
        elif name == "reset":
            value = rng.random(size) < 1 / 64
        elif name.endswith("positions"):
            value = np.broadcast_to(_positions(size[-1], shape.keys, stored=name.startswith("kv")), size)
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


def _inside(tokens: int) -> np.ndarray:
    """bool[T]: False at the padding of a row."""
    return np.arange(tokens) < tokens - tokens // 16


def _documents(size: tuple[int, int], seed: int, keys: int | None, stored: bool) -> np.ndarray:
    if keys is not None:
        return np.where(stored & (np.arange(size[1]) % 5 == 3), -1, np.zeros(size, np.int32))
    starts = np.random.default_rng((seed, 1)).random(size) < 1 / 64  # the same for queries and keys
    return np.where(_inside(size[1]), np.cumsum(starts, axis=1), -1)


def _positions(count: int, keys: int, stored: bool) -> np.ndarray:
    """Position p lies in slot p mod S; the newest of S positions are asked for."""
    first = keys // 2
    slots = np.arange(keys)
    return np.where(slots < first, slots + keys, slots) if stored else first + keys - count + np.arange(count)


_RANGES: dict[str, Callable[[Any], Any]] = {  # of normal numbers, for arguments that have a sign
    "a": lambda v: 1 / (1 + np.exp(-2 - v)),
    "A": lambda v: -np.exp(v),
    "dt": lambda v: 0.1 * np.log1p(np.exp(v)),
    "log_decay": lambda v: -0.1 * np.log1p(np.exp(v)),
    "x_scale": np.abs,
    "w_scale": np.abs,
}


def implementation(op: str, shape: Any, name: str) -> Callable[..., Any]:
    """An implementation of an op as a function of its array arguments by name."""
    function = getattr(importlib.import_module(f"pallas_kernels.{op}"), op)
    return functools.partial(function, **shape.options(), implementation=name)


def arguments_of(op: str, shape: Any, seed: int = 0) -> dict[str, Any]:
    """`draw`, with a state as 64 tokens leave it: one of random numbers may have a normaliser of any sign."""
    arguments = draw(shape, seed)
    if "state" in arguments:
        before = dataclasses.replace(shape, time=64, carried=False, documents=False)
        arguments["state"] = implementation(op, before, "xla")(**draw(before, seed + 1))[1]
    return arguments


def passes(op: str) -> tuple[str, ...]:
    """Of `PASSES`, those that an op has: some are for decoding alone."""
    return PASSES if differentiable(op) else PASSES[:1]


def differentiable(op: str) -> bool:
    """Whether an op has a backward pass of its own; the others are for decoding."""
    return bool(programs.implementations(op, "backward"))


class Program:
    """A compiled pass of a function over several sets of arguments, one after the other.

    Raises (when made):
      UnsupportedError: the implementation does not serve the call.
    """

    def __init__(self, function: Callable[..., Any], sets: Sequence[dict[str, Any]], which: str, least: float = 0.0):
        """Compiles `function(**arguments)`.

        Args:
          function: of arrays by name.
          sets: its arguments.
          which: one of `PASSES`; with a backward pass, the gradients of all results times random numbers.
          least: seconds that a sample takes at least.
        """
        split = [
            (
                {name: a for name, a in arguments.items() if programs.is_floating(a)},
                {name: a for name, a in arguments.items() if not programs.is_floating(a)},
            )
            for arguments in sets
        ]
        cotangents = _cotangents(jax.eval_shape(lambda: function(**sets[0])))

        def one(floats, others, cotangents):
            return _pass(function, which, floats, others, cotangents)

        run = jax.jit(lambda split, cotangents: [one(floats, others, cotangents) for floats, others in split])
        self._arguments = split, cotangents
        self._run = run.lower(*self._arguments).compile()
        self._calls, self._rounds = len(sets), 1
        if least:
            self.seconds()
            self._rounds = max(1, math.ceil(least / (self.seconds() * self._calls)))

    def results(self) -> Any:
        """What the pass over the first set gives."""
        return jax.block_until_ready(self._run(*self._arguments))[0]

    def seconds(self) -> float:
        """Seconds per call of one sample."""
        start, results = time.perf_counter(), None
        for _ in range(self._rounds):
            results = self._run(*self._arguments)
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / (self._rounds * self._calls)


def _pass(function: Callable[..., Any], which: str, floats: Any, others: Any, cotangents: Sequence[Any]) -> Any:
    """The results of a function of arrays by name, or the gradients of its floats."""
    if which == PASSES[0]:
        return function(**floats, **others)
    results, pullback = jax.vjp(lambda floats: function(**floats, **others), floats)
    leaves, tree = jax.tree.flatten(results)
    # An integer result has no cotangent but this placeholder.
    given = zip(leaves, cotangents, strict=True)
    whole = [np.zeros(a.shape, jax.dtypes.float0) if c is None else c for a, c in given]
    return pullback(jax.tree.unflatten(tree, whole))[0]


def _cotangents(results: Any) -> list[jax.Array | None]:
    rng = np.random.default_rng(1)
    return [
        jnp.asarray(rng.standard_normal(a.shape, np.float32)).astype(a.dtype)
        if jnp.issubdtype(a.dtype, jnp.floating)
        else None
        for a in jax.tree.leaves(results)
    ]


def argument_sets(arguments: dict[str, Any], platform: str) -> list[dict[str, Any]]:
    """Copies of the arguments that one program goes through: on a chip, more than its caches hold."""
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arguments))
    count = min(math.ceil(ARRAYS_BYTES / size), MOST_CALLS) if platform in KERNELS else 1
    return [arguments, *(jax.tree.map(jnp.copy, arguments) for _ in range(count - 1))]


def difference(result: Any, reference: Any) -> float:
    """The largest difference of any result from the reference's, over the largest magnitude of that result.

    A result smaller than `ROUNDING` times the largest one is taken to be as large as that: it may be rounding alone, as
    the gradient of the query of attention to one token. Where one of them is NaN, or an infinity that the other is not,
    the difference is NaN or infinite.
    """
    results, references = ([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (result, reference))
    sizes = [np.max(np.abs(b), where=np.isfinite(b), initial=0.0) for b in references]
    least = max(ROUNDING * np.max(sizes), np.finfo(np.float32).tiny)
    ratios = []
    for a, b, size in zip(results, references, sizes, strict=True):
        with np.errstate(invalid="ignore"):
            apart = np.where(a == b, 0.0, np.abs(a - b))
            ratios.append(np.max(apart) / max(size, least))
    return float(np.max(ratios))


def measure(
    found: Iterable[Case], platform: str, medians: Callable[[Sequence[Callable[[], float]]], list[float]], threads: int
) -> list[Row]:
    """Times every case, and on an accelerator compares it with the reference.

    Args:
      found: the cases.
      platform: "cpu", "tpu" or "gpu".
      medians: functions that give the seconds of a sample -> median seconds of each.
      threads: of the torch process.

    Returns:
      Rows of times (ratio > 1 when ours is faster), of differences from the reference, and of what did not run and why.
    """
    rows = []
    with Peer("launch.torch_ops", str(threads), threads=threads, JAX_PLATFORMS="cpu") as torch:
        for op, label, shape in found:
            for which in passes(op):
                case = _Case(op, label, shape, which, platform)
                rows += case.rows(lambda case: case.measured(torch, medians))
            torch.ask("forget")
    return rows


def check(found: Iterable[Case], platform: str) -> list[Row]:
    """Compares every pass that the kernel of an accelerator serves with the reference, and times nothing.

    Args:
      found: the cases, such as `variants`.
      platform: "tpu" or "gpu".

    Returns:
      Rows of differences from the reference; none of what the kernel does not serve.
    """
    each = [_Case(*case, which, platform) for case in found for which in passes(case[0])]
    return [row for case in each for row in case.rows(_Case.compare_with_reference)]


@dataclasses.dataclass
class _Case:
    """One pass of one op at one shape on one platform."""

    op: str
    label: str
    shape: Any
    which: str
    platform: str
    kernel: str = "xla"
    refusal: str = ""  # why the kernel of the platform does not serve

    def choose(self) -> None:
        """Takes the kernel of the platform where it serves the call."""
        self.kernel = KERNELS.get(self.platform, "xla")
        function, arrays = implementation(self.op, self.shape, self.kernel), self.shape.arrays()
        floats = {name: a for name, a in arrays.items() if programs.is_floating(a)}
        others = {name: a for name, a in arrays.items() if name not in floats}

        def traced(floats, others):
            results = jax.tree.leaves(jax.eval_shape(lambda: function(**floats, **others)))
            cotangents = [jnp.zeros_like(a) if programs.is_floating(a) else None for a in results]
            return _pass(function, self.which, floats, others, cotangents)

        try:
            jax.eval_shape(traced, floats, others)
        except UnsupportedError as error:
            self.kernel, self.refusal = "xla", str(error)

    def rows(self, work: Callable[["_Case"], Iterable[Row]]) -> list[Row]:
        """The rows of some work on this case, shown as they come; an error is one of them."""
        rows: list[Row] = []
        try:
            self.choose()
            for row in work(self):  # a run that is stopped has shown what it measured
                print(" | ".join(row.cells()), flush=True)
                rows.append(row)
        except Exception as error:  # the other cases are still worth knowing; the run ends with an error
            logging.exception("%s, %s, %s", self.op, self.label, self.which)
            rows.append(self.row("did not run", note=f"{WRONG}: {benchmark_peers.reason(error)}"))
            print(" | ".join(rows[-1].cells()), flush=True)
        return rows

    def measured(self, torch: Peer, medians: Callable[..., list[float]]) -> Iterable[Row]:
        """Differences on an accelerator, and times."""
        if self.platform in KERNELS:
            yield from self.compare()
        yield from self.time(torch, medians)

    def compare_with_reference(self) -> Iterable[Row]:
        """How far the kernel is from the reference at this shape, if it serves it."""
        if not self.refusal:
            (value,) = self._differences(self.shape, arguments_of(self.op, self.shape), self.kernel)
            metric = f"difference from the reference ({self.kernel})"
            yield self.row(metric, ours=value, note=_verdict(value, self.shape))

    def _differences(self, shape: Any, arguments: dict[str, Any], *names: str) -> tuple[float, ...]:
        """Of implementations from the reference."""
        with jax.default_matmul_precision("highest"):
            exact = Program(implementation(self.op, shape, "reference"), [arguments], self.which).results()
        return tuple(
            difference(Program(implementation(self.op, shape, name), [arguments], self.which).results(), exact)
            for name in names
        )

    def row(self, metric: str, **columns: Any) -> Row:
        """A row of this case."""
        return Row(f"{self.op}, {self.label}", f"{self.which}, {metric}", **columns)

    def compare(self) -> list[Row]:
        """How far the kernel and xla are from the reference at a shorter shape, and from each other at this one."""
        if self.refusal:
            return [self.row(KERNELS[self.platform], note=self.refusal)]
        short = checked(self.shape)
        kernel, xla = self._differences(short, draw(short), self.kernel, "xla")
        arguments = draw(self.shape)
        whole = [
            Program(implementation(self.op, self.shape, name), [arguments], self.which).results()
            for name in (self.kernel, "xla")
        ]
        from_xla = difference(*whole)
        shorter = f"{getattr(short, _length(short))} {_length(short)}"
        metric = f"difference from the reference ({self.kernel}, xla; {shorter})"
        return [
            self.row(metric, ours=kernel, peer=xla, note=_verdict(kernel, self.shape)),
            self.row(f"difference from xla ({self.kernel})", ours=from_xla, note=_verdict(from_xla)),
        ]

    def time(self, torch: Peer, medians: Callable[..., list[float]]) -> list[Row]:
        """Medians of the kernel against each peer."""
        least = LEAST_SECONDS if self.platform in KERNELS else 0.0
        arguments = draw(self.shape)
        sets = argument_sets(arguments, self.platform)
        ours = Program(implementation(self.op, self.shape, self.kernel), sets, self.which, least)
        other = "xla" if self.platform in KERNELS else "reference"
        sides, rows = {}, []
        if other != self.kernel:
            sides[other] = Program(implementation(self.op, self.shape, other), sets, self.which, least).seconds
        for name, peer in benchmark_peers.PEERS.get(self.platform, {}).get(self.op, {}).items():
            try:
                function, changed = peer(self.shape, arguments)
                copies = argument_sets(changed, self.platform)
                sides[name] = Program(function, copies, self.which, least).seconds
            except Exception as error:  # a peer's own limits have any type; the row says which
                rows.append(self.row(f"{self.kernel} against {name}", note=benchmark_peers.reason(error)))
        shape = {field.name: getattr(self.shape, field.name) for field in dataclasses.fields(self.shape)}
        shape |= {name: np.dtype(value).name for name, value in shape.items() if name.endswith("dtype")}
        request = {"op": self.op, "shape": shape, "backward": self.which != PASSES[0], "calls": len(sets)}
        for name in json.loads(torch.ask(f"peers {json.dumps({'op': self.op, 'platform': self.platform})}")):
            line = json.dumps({**request, "peer": name})
            answer = json.loads(torch.ask(f"prepare {line}"))
            if "note" in answer:
                rows.append(self.row(f"{self.kernel} against {name}", note=answer["note"]))
                continue
            sides[name] = torch.side(f"run {line}")
            if self.which == PASSES[0]:
                value = answer["difference"]
                note = "" if value <= TOLERANCE else "it computes something else"
                rows.append(self.row(f"difference from the reference ({name})", peer=value, note=note))
        mine, *others = medians([ours.seconds, *sides.values()])
        for name, seconds in zip(sides, others, strict=True):
            metric = f"ms ({self.kernel} against {name})"
            rows.append(self.row(metric, ours=mine * 1e3, peer=seconds * 1e3, ratio=seconds / mine))
        return rows


def _verdict(value: float, shape: Any = None) -> str:
    exact = jnp.dtype(getattr(shape, "dtype", jnp.bfloat16)) == jnp.float32
    tolerance = FLOAT32_TOLERANCE if exact else TOLERANCE
    return "" if value <= tolerance else f"{WRONG}: over {tolerance}"

"""The suite ops of mode=benchmark: what is run, compared and reported; for accelerators with interpreted kernels."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import benchmark_ops, benchmark_peers
from launch.benchmark_ops import PASSES, Program, implementation
from pallas_kernels.attention.shapes import AttentionShape
from pallas_kernels.causal_conv1d.shapes import TINY as CONVOLUTIONS
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.interpret import interpret
from pallas_kernels.linear_cross_entropy.shapes import HeadShape
from pallas_kernels.linear_scan import op as linear_scan_op
from pallas_kernels.linear_scan.shapes import ScanShape
from pallas_kernels.static_profile import programs
from pallas_kernels.ternary_matmul.shapes import TernaryShape

TOLERANCE = 2e-5  # float32, relative to the largest number
BFLOAT16_TOLERANCE = 2**-6
SIDES = ("xla", "reference")
SCAN = ScanShape(2, 33, 8, carried=True)
WINDOWED = AttentionShape(2, 256, 4, 2, 128, 128, window=100)


def _tiny(op):
    return next(iter(importlib.import_module(f"pallas_kernels.{op}.shapes").TINY.values()))


def _once(sides):
    return [side() for side in sides]


class NoTorch:
    """A torch process without peers."""

    def __init__(self, *arguments, **options):
        self.lines = []

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        assert self.lines[-1] == "forget"

    def ask(self, line):
        self.lines.append(line)
        return "[]"


@pytest.fixture
def small(monkeypatch):
    """Programs of two calls, samples of one run."""
    monkeypatch.setattr(benchmark_ops, "Peer", NoTorch)
    monkeypatch.setattr(benchmark_ops, "MOST_CALLS", 2)
    monkeypatch.setattr(benchmark_ops, "LEAST_SECONDS", 0.0)


@pytest.mark.parametrize("op", programs.ops())
def test_arguments_of_ops(op):
    shape = _tiny(op)
    arguments = benchmark_ops.draw(shape)
    results = [Program(implementation(op, shape, name), [arguments], PASSES[0]).results() for name in SIDES]
    assert benchmark_ops.difference(*results) < 1e-4
    leaves = [np.asarray(a, np.float64) for a in jax.tree.leaves(results)]
    assert all(np.isfinite(a).all() for a in leaves)
    assert any(a.any() for a in leaves)


def test_cases_of_platforms():
    cpu = benchmark_ops.cases((8, 16), "cpu")
    assert {op for op, _, _ in cpu} == set(programs.ops())
    for op in programs.ops():
        labels = [label for case, label, _ in cpu if case == op]
        assert labels == [f"{name}, {tokens} tokens" for name in programs.entries(op) for tokens in (8, 16)]
    assert all(shape.dtype == jnp.float32 for _, _, shape in cpu if hasattr(shape, "dtype"))
    for platform, layout in (("tpu", "i2_s_columns"), ("gpu", "i2_s")):
        found = benchmark_ops.cases((8,), platform)
        assert {shape.layout for op, _, shape in found if op == "ternary_matmul"} == {layout}
        assert [label for op, label, _ in found if op == "attention"] == list(programs.entries("attention"))


@pytest.mark.parametrize("op", programs.ops())
def test_hopper_kernels_serve_published_shapes(op):
    """Of the shapes that are timed on a GPU, kernels refuse none."""
    if "mosaic_gpu" not in programs.implementations(op, "forward"):
        pytest.skip("no kernel for GPUs")
    for case, label, shape in benchmark_ops.cases((8,), "gpu"):
        for which in PASSES if case == op else ():
            chosen = benchmark_ops._Case(op, label, shape, which, "gpu")
            chosen.choose()
            assert chosen.kernel != "xla", chosen.refusal


def test_positions_and_documents():
    """A ring that has wrapped, of which the newest positions are asked for; rows of documents that end in padding."""
    ring = benchmark_ops.draw(AttentionShape(2, 3, 4, 2, 64, 64, keys=40, documents=True))
    stored, asked = (np.asarray(ring[f"{side}_positions"])[0] for side in ("kv", "q"))
    assert sorted(stored) == list(range(20, 60))
    assert (stored % 40 == np.arange(40)).all()
    assert list(asked) == [57, 58, 59]
    assert set(np.asarray(ring["kv_documents"]).flat) == {-1, 0}
    packed = benchmark_ops.draw(dataclasses.replace(WINDOWED, documents=True))
    documents = np.asarray(packed["q_documents"])
    np.testing.assert_array_equal(documents, packed["kv_documents"])
    assert (documents[:, -16:] == -1).all()
    assert (np.diff(documents[:, :-16]) >= 0).all()
    assert documents.max() > 1


RING = ("attention", "3 tokens to a ring")
QUICK = [RING, *[("linear_scan", name) for name in ("state, resets and padding", "decode", "float32")]]


@pytest.mark.parametrize("names", [QUICK, pytest.param(None, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_variants_are_compared_with_the_reference(names):
    """Interpreted: every call that the kernels serve, forward and backward."""
    found = [case for case in benchmark_ops.variants("tpu") if names is None or case[:2] in names]
    with interpret():
        rows = benchmark_ops.check(found, "tpu")
    assert not [row for row in rows if row.note]
    compared = {(row.name, row.metric.partition(",")[0]) for row in rows}
    assert ("attention, 3 tokens to a ring", "forward") in compared
    assert ("attention, 3 tokens to a ring", "forward and backward") not in compared  # the kernel has no backward pass
    assert ("linear_scan, state, resets and padding", "forward and backward") in compared


@pytest.mark.skipif(jax.default_backend() not in benchmark_ops.KERNELS, reason="needs a TPU or a GPU")
@pytest.mark.parametrize("op", programs.ops())
def test_kernels_on_this_chip(op):
    """Not interpreted: run with JAX_PLATFORMS=tpu or cuda."""
    platform = jax.default_backend()
    rows = benchmark_ops.check([case for case in benchmark_ops.variants(platform) if case[0] == op], platform)
    assert not [(row.name, row.metric, row.note) for row in rows if row.note]
    assert rows or benchmark_ops.KERNELS[platform] not in programs.implementations(op, "forward")


def test_checked_shapes():
    short = benchmark_ops.checked(AttentionShape(4, 8192, 8, 8, 128, 128, window=2048))
    assert (short.batch, short.time, short.window) == (1, 512, 128)
    assert benchmark_ops.checked(TernaryShape(3, 256, 128)) == TernaryShape(3, 256, 128)


def test_program_runs_all_sets():
    """The gradients are of all results times random numbers; an integer result has none; each set is its own call."""
    shape = HeadShape(5, 7, 37, dtype=jnp.float32)
    sets = [benchmark_ops.draw(shape, seed) for seed in range(3)]
    function = implementation("linear_cross_entropy", shape, "xla")
    program = Program(function, sets, PASSES[1], least=0.5)
    cotangents = [c for c in program._arguments[1] if c is not None]
    for arguments, actual in zip(sets, program._run(*program._arguments), strict=True):

        def loss(floats, arguments=arguments):
            results = jax.tree.leaves(implementation("linear_cross_entropy", shape, "reference")(**arguments | floats))
            floating = [a for a in results if jnp.issubdtype(a.dtype, jnp.floating)]
            return sum(jnp.sum(a * c) for a, c in zip(floating, cotangents, strict=True))

        expected = jax.grad(loss)({name: arguments[name] for name in "xw"})
        assert set(actual) == {"x", "w"}
        assert benchmark_ops.difference(actual, expected) < TOLERANCE
    assert program._rounds > 1
    assert program.seconds() > 0


def test_argument_sets(monkeypatch):
    arguments = benchmark_ops.draw(SCAN)
    size = sum(a.size * a.dtype.itemsize for a in arguments.values())
    monkeypatch.setattr(benchmark_ops, "ARRAYS_BYTES", 5 * size - 1)
    assert len(benchmark_ops.argument_sets(arguments, "cpu")) == 1
    copies = benchmark_ops.argument_sets(arguments, "gpu")
    assert len(copies) == 5
    assert len({a.unsafe_buffer_pointer() for copy in copies for a in copy.values()}) == 5 * len(arguments)
    monkeypatch.setattr(benchmark_ops, "MOST_CALLS", 3)
    assert len(benchmark_ops.argument_sets(arguments, "tpu")) == 3


def test_difference_is_of_the_worst_result():
    exact = {"y": np.array([2.0, -4.0]), "state": np.array([1.0])}
    assert benchmark_ops.difference({"y": np.array([2.0, -3.0]), "state": np.array([1.1])}, exact) == 0.25
    for value in (np.nan, np.inf):
        assert not benchmark_ops.difference({"y": np.array([2.0, -4.0]), "state": np.array([value])}, exact) < 1
        assert not benchmark_ops.difference({"y": np.array([value, -4.0]), "state": np.array([1.0])}, exact) < 1
    infinite = np.array([-np.inf, 1.0])
    assert benchmark_ops.difference(infinite, infinite) == 0
    assert benchmark_ops.difference(np.array([-np.inf, 1.5]), infinite) == 0.5


def test_difference_of_what_is_rounding_alone():
    exact = {"dv": np.array([2.0, -4.0]), "dq": np.zeros(2)}
    assert benchmark_ops.difference(exact | {"dq": np.array([0.0, 2e-7])}, exact) < 1e-3
    assert benchmark_ops.difference(exact | {"dq": np.array([0.0, 1e-3])}, exact) > 1
    assert benchmark_ops.difference(np.full(2, 1e-30), np.zeros(2)) > 1


def test_accelerator_half_interpreted(small):
    """Everything but the device: numerics of both passes, times beside xla and peers, and what a kernel refuses."""
    found = [("linear_scan", "scan", SCAN), ("causal_conv1d", "wide", CONVOLUTIONS["wide"])]
    found += [("ternary_matmul", "decode", TernaryShape(3, 256, 128))]
    with interpret():
        rows = benchmark_ops.measure(found, "tpu", _once, threads=1)
    scan = [row for row in rows if row.name == "linear_scan, scan"]
    assert [row.metric for row in scan] == [
        f"{which}, {metric}"
        for which in PASSES
        for metric in (
            "difference from the reference (mosaic_tpu, xla; 33 time)",
            "difference from xla (mosaic_tpu)",
            "ms (mosaic_tpu against xla)",
        )
    ]
    assert all(row.ours < BFLOAT16_TOLERANCE for row in scan if "difference" in row.metric)
    assert all(row.ratio == pytest.approx(row.peer / row.ours) for row in scan if "ms" in row.metric)
    assert not any(row.note for row in scan)
    wide = [row for row in rows if row.name == "causal_conv1d, wide"]
    assert [row.note for row in wide] == [
        "causal_conv1d: mosaic_tpu does not slide 7 taps: weight must have 2 to 4"
    ] * 2
    decode = [row for row in rows if row.name == "ternary_matmul, decode"]
    assert [row.ours for row in decode if "difference" in row.metric] == [0, 0]
    assert decode[-1].metric == "forward, ms (mosaic_tpu against bfloat16 matmul)"


@pytest.mark.slow
def test_wrong_kernel_is_reported(small, monkeypatch):
    right = linear_scan_op.FORWARD["mosaic_tpu"]

    def wrong(*args, **options):
        results = right(*args, **options)
        return jax.tree.map(lambda a: a.at[0, 0].set(jnp.nan) if a.dtype == jnp.bfloat16 else a, results)

    def broken(*args, **options):
        raise RuntimeError("no such instruction")

    for kernel, notes in ((wrong, ["WRONG: over 0.03", "WRONG: over 0.03", ""]), (broken, None)):
        monkeypatch.setitem(linear_scan_op.FORWARD, "mosaic_tpu", kernel)
        with interpret():
            rows = benchmark_ops.measure([("linear_scan", "scan", SCAN)], "tpu", _once, threads=1)
        if notes:
            assert [row.note for row in rows[:3]] == notes
        else:
            assert [row.note for row in rows] == ["WRONG: RuntimeError: no such instruction"] * 2
        jax.clear_caches()


@pytest.mark.parametrize("window", [None, 100])
def test_splash_is_the_same_attention(window):
    shape = dataclasses.replace(WINDOWED, window=window, dtype=jnp.float32)
    arguments = benchmark_ops.draw(shape)
    exact = implementation("attention", shape, "reference")(**arguments)
    with interpret():
        function, changed = benchmark_peers.splash(shape, arguments)
        actual = Program(function, [changed], PASSES[0]).results()
    assert benchmark_ops.difference(jnp.swapaxes(actual, 1, 2), exact) < BFLOAT16_TOLERANCE


@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_is_the_same_attention(window, monkeypatch):
    """The call lowers to cuDNN's kernels without a GPU; what it computes is what the same call computes in XLA."""
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    shape = dataclasses.replace(WINDOWED, window=window)
    arguments = benchmark_ops.draw(shape)
    function, arguments = benchmark_peers.cudnn(shape, arguments)
    both = jax.jit(lambda arguments: jax.vjp(lambda a: function(**a), arguments)[1](arguments["q"]))
    names = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    text = jax.export.export(both, platforms=["cuda"], disabled_checks=allowed)(arguments).mlir_module()
    assert all(f"@{name}(" in text for name in names)
    assert f"sliding_window_length\\22: {window or 0}," in text
    original = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, implementation, **o: original(*a, implementation="xla", **o)
    )
    exact = implementation("attention", shape, "reference")(**arguments)
    assert benchmark_ops.difference(function(**arguments), exact) < BFLOAT16_TOLERANCE


def test_peers_refuse_what_they_would_compute_differently():
    packed = dataclasses.replace(WINDOWED, documents=True)
    for peer in (benchmark_peers.cudnn, benchmark_peers.splash):
        with pytest.raises(UnsupportedError, match="not with documents"):
            peer(packed, {})
    assert benchmark_peers.reason(ModuleNotFoundError("No module", name="fla")) == "fla is not installed"
    assert benchmark_peers.reason(ValueError("a\nb")) == "ValueError: a"

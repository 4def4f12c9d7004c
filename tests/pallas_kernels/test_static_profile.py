"""The static profile against kernels whose trips, traffic and arithmetic are known."""

import importlib.metadata
import json
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.shapes import AttentionShape
from pallas_kernels.causal_conv1d.shapes import ConvShape
from pallas_kernels.selective_scan.shapes import ScanShape
from pallas_kernels.static_profile import __main__ as command
from pallas_kernels.static_profile import floors, goldens, profile, programs, schedule, trace
from pallas_kernels.static_profile.chips import CHIPS
from tests.pallas_kernels import known_kernels
from tests.pallas_kernels.tpu import compile_function

V5E = CHIPS["v5e"]
SPLASH = {"time": 8192, "heads": 8, "width": 128}
KERNELS = {
    "matmul": {"size": 512, "tile": 256},
    "loop": {"grid": 5, "trips": 100},
    "nested": {"grid": 6, "outer": 13, "inner": 7},
    "triangular": {"grid": 3, "outer": 8},
    "divided": {"grid": 20, "divisor": 7},
    "dynamic": {"grid": 5},
    "copies": {"grid": 3, "steps": 4},
    "too_large": {},
}
V5E_ONLY = {
    "loop_again": ("loop", {"grid": 5, "trips": 257}),
    "splash_window": ("splash", {**SPLASH, "window": 2048, "block_q": 1024, "block_kv": 1024, "block_kv_compute": 512}),
    "splash_causal": ("splash", {**SPLASH, "window": None, "block_q": 1024, "block_kv": 2048, "block_kv_compute": 512}),
}


def _profile(chip, kernels):
    requests = [
        {"call": f"tests.pallas_kernels.known_kernels:{name}", "arguments": arguments} for name, arguments in kernels
    ]
    return profile.profile(requests, chip)


def _pallas(report):
    assert "kernels" in report, report
    (kernel,) = [kernel for kernel in report["kernels"] if kernel["pallas"]]
    return kernel


def _loops(kernel):
    return [(loop["entries"], loop["iterations"]) for loop in kernel["loops"]]


def _bundles(loop):
    first, last = (int(end, 16) for end in loop["bundles"].split("-"))
    return last - first + 1


@pytest.fixture(scope="module")
def v5e():
    pytest.importorskip("libtpu")
    kernels = [*KERNELS.items(), *V5E_ONLY.values()]
    return dict(zip([*KERNELS, *V5E_ONLY], _profile("v5e", kernels), strict=True))


def test_matmul(v5e):
    """2 x 2 x 2 tiles: a pipelined grid takes two rounds more; each step reads two tiles, each 2nd writes one."""
    report = v5e["matmul"]
    kernel = _pallas(report)
    assert _loops(kernel) == [(1, 8 + 2)]
    tile = 256 * 256 * 2
    assert (kernel["bytes_read"], kernel["bytes_written"]) == (8 * 2 * tile, 4 * tile)
    assert kernel["mxu_cycles"] == 2 * 512**3 / V5E.mxu_flops
    body = _bundles(kernel["loops"][0])
    assert kernel["cycles_every_region"] == 10 * body + kernel["bundles"] - body
    # The body proper runs in 8 of 10 rounds; zeroing and writing out in 4 of these.
    assert 7 * body < kernel["cycles"] < 8 * body
    assert not kernel["assumed_regions"]
    assert kernel["bytes_known"]
    assert report["cycles"] == sum(part["cycles"] for part in report["kernels"])
    assert kernel["estimate"] == max(kernel["cycles"], kernel["mxu_cycles"], kernel["hbm_cycles"])


def test_loops(v5e):
    assert _loops(_pallas(v5e["loop"])) == [(5, 500), (1, 5 + 2)]
    assert _loops(_pallas(v5e["nested"])) == [(6 * 13, 6 * 13 * 7), (6, 6 * 13), (1, 6 + 2)]
    assert _loops(_pallas(v5e["triangular"])) == [(3 * 8, 3 * 36), (3, 3 * 8), (1, 3 + 2)]
    # 7 is no power of two: its quotient and remainder come from the divider, by the absolute value.
    assert _loops(_pallas(v5e["divided"]))[0][1] == sum(i % 7 + 2 * (i // 7) for i in range(20))
    # Nothing else changes with the trips.
    longer, loop = _pallas(v5e["loop_again"]), _pallas(v5e["loop"])
    assert longer["cycles"] - loop["cycles"] == 5 * 157 * _bundles(loop["loops"][0])
    assert longer["slots"]["EUP"] - loop["slots"]["EUP"] == 5 * 157


def test_an_exponential_takes_a_vector_slot(tmp_path):
    """What the floor of `selective_scan` says: alone in its bundle, it uses VALU, and EUP in the next."""
    pytest.importorskip("libtpu")
    request = {"call": "tests.pallas_kernels.known_kernels:loop", "arguments": KERNELS["loop"]}
    assert profile._compile_programs([request], "v5e", tmp_path) == [{}]
    files = schedule.index(tmp_path / "0")
    found = []
    for program in (profile._load(name, files) for name in files):
        for at, bundle in enumerate(program.bundles):
            vectors = [instruction.opcode for instruction in bundle if instruction.opcode.startswith("v")]
            if "vexp2.f32" in vectors:
                found.append((vectors, [(program.slots["VALU"][i], program.slots["EUP"][i]) for i in (at, at + 1)]))
    assert found == [(["vexp2.f32"], [(1, 0), (0, 1)])]


def test_dynamic_trips_are_unknown(v5e):
    kernel = _pallas(v5e["dynamic"])
    assert _loops(kernel) == [(5, None), (1, 7)]
    for name in ("cycles", "cycles_every_region", "estimate"):
        assert kernel[name] is None
        assert name == "cycles_every_region" or v5e["dynamic"][name] is None
    assert kernel["cycles_at_least"] > 5 * _bundles(kernel["loops"][0])
    assert not kernel["bytes_known"]


def test_copies_by_hand(v5e):
    kernel = _pallas(v5e["copies"])
    block = 64 * 128 * 4
    assert (kernel["bytes_read"], kernel["bytes_written"]) == (3 * 4 * block, 3 * block)
    assert (3, 3 * 4) in _loops(kernel)


def test_failure_is_reported(v5e):
    assert set(v5e["too_large"]) == {"error"}
    assert "vmem" in v5e["too_large"]["error"].lower()


@pytest.mark.parametrize(
    ("name", "expected", "steps", "full"),
    [("window", 1.17e6, 8 * 8 * 3, 8 * 21), ("causal", 2.72e6, 8 * 8 * 4, 8 * 20)],
)
def test_splash_attention(v5e, name, expected, steps, full):
    """Bundles times trips, every region counted, as reckoned by hand from the same dumps; less when followed.

    Zeroing and writing out run at the ends of a row of blocks alone, so following the branches saves cycles. Which
    blocks are skipped depends on a table in memory: that region counts as run at every step of the grid. The mask has
    `full` blocks with a visible score, so the kernel's own cycles lie between those with and without the region.
    """
    kernel = _pallas(v5e[f"splash_{name}"])
    assert _loops(kernel) == [(1, steps + 2)]
    assert kernel["cycles_every_region"] == pytest.approx(expected, rel=0.005)
    assert 0.8 * expected < kernel["cycles"] < 0.95 * expected
    assert list(kernel["assumed_regions"].values()) == [steps]
    region = kernel["cycles"] - kernel["cycles_assumed_skipped"]
    assert region > 0.7 * kernel["cycles"]
    cycles = kernel["cycles_assumed_skipped"] + region * full / steps
    assert cycles == pytest.approx({"window": 8.942e5, "causal": 1.5953e6}[name], rel=0.01)
    assert kernel["assumed_copies"] > 0
    pairs = steps * 1024 * (1024 if name == "window" else 2048)
    assert kernel["mxu_cycles"] == 4 * 128 * pairs / V5E.mxu_flops
    assert kernel["slots"]["EUP"] >= pairs / 1024
    assert kernel["spills"] > 0
    assert kernel["spills_in_innermost_loops"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5p", "v6e"])
def test_other_chips(chip):
    pytest.importorskip("libtpu")
    found = dict(zip(KERNELS, _profile(chip, KERNELS.items()), strict=True))
    for name, loops in {
        "loop": [(5, 500), (1, 7)],
        "nested": [(78, 546), (6, 78), (1, 8)],
        "triangular": [(24, 108), (3, 24), (1, 5)],
        "dynamic": [(5, None), (1, 7)],
        "matmul": [(1, 10)],
    }.items():
        assert _loops(_pallas(found[name])) == loops
    kernel = _pallas(found["matmul"])
    assert (kernel["bytes_read"], kernel["bytes_written"]) == (16 << 17, 4 << 17)
    # No axis of the grid is parallel: one core of the chip works.
    assert kernel["mxu_cycles"] == 2 * 512**3 / CHIPS[chip].mxu_flops * CHIPS[chip].cores


def _text(lines):
    """Bundles, one a line; a line may begin with a mark such as LB."""
    out = []
    for index, line in enumerate(textwrap.dedent(lines).strip().splitlines()):
        mark, _, body = line.partition("|")
        address = f"{index:#x}" if index else "0"
        out.append(f"{address} {mark.strip()}: > {{ {body.strip().replace(' #', ' } /* ')}{' */' * ('#' in body)} }}")
    slots = "\n".join("0 0 0 1 0 0 0 0 0 0 0" for _ in out)
    units = "MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
    return "\n".join(out), f"== CAPACITY:\n{units}\n4 4 3 4 2 1 3 3 1 1 2\n== UTILIZATION:\n{slots}"


LOOP = """
    | %s1_s1 = smov.u32 0
    LB | %s2_s1 = sphi %s1_s1, %s3_s1 # Start region 7
    | %s3_s1 = sadd.s32 4294967295, %s2_s1 ;; %s9_s2 = sand.u32 1, %s2_s1
    | %p1_p0 = scmp.{test} %s3_s1, {bound} ;; %p2_p1 = scmp.ne.s32.totalorder %s9_s2, 0
    | %10 = sbr.rel ({skip}%p2_p1) target = $region8
    | {copy}
    |
    |
    |
    | %v1 = vadd.f32 %v0, %v0
    PF | %11 = sbr.rel (!%p1_p0) target = $region7 # Start/End empty region 8
    |
    |
    |
    |
    | %12 = vsyncpa [#allocation5], 1
"""


@pytest.mark.parametrize(("skip", "inside"), [("", 3), ("!", 2)])
def test_control_flow_of_a_made_up_schedule(skip, inside):
    """Five rounds, from 0 down to -4; a region is skipped at odd, or at even counts; four bundles follow a jump."""
    copy = "%5 = dma.hbm_to_vmem [thread:$0]  (%p2_p1), /*hbm=*/%s4, /*size_in_granules=*/64, /*vmem=*/%s5"
    bundles, slots = _text(LOOP.format(test="le.s32.totalorder", bound=-5, skip=skip, copy=copy))
    found = trace.run(schedule.parse("made-up", bundles, slots))
    assert found.counts == [1, *[5] * 8, inside, *[5] * 5, 1]
    assert [(loop.start, loop.end, loop.iterations, loop.entries) for loop in found.loops] == [(1, 14, 5, 1)]
    assert found.bytes_read == 2 * 64 * 32  # the copy runs at odd counts, which are two of five
    assert not found.assumed
    assert not found.assumed_copies
    every = trace.run(schedule.parse("made-up", bundles, slots), every_region=True)
    assert every.counts[9] == 5


def test_unsigned_comparison_differs():
    bundles, slots = _text(LOOP.format(test="ge.u32.totalorder", bound=-5, skip="", copy=""))
    found = trace.run(schedule.parse("made-up", bundles, slots))
    assert found.loops[0].iterations == 1  # -1 is above -5 when both are unsigned


def test_unknown_values_are_not_guessed():
    text = LOOP.format(test="ge.s32.totalorder", bound="%s77_s7", skip="", copy="").replace("%s9_s2, 0", "%s78_s8, 0")
    bundles, slots = _text(text)
    found = trace.run(schedule.parse("made-up", bundles, slots))
    assert [loop.known for loop in found.loops] == [False]
    assert found.assumed == {4: 1}
    assert found.counts == [1] * 16


def test_decisions_settle_what_data_decide():
    """Two rounds: the region runs in the first and is skipped in the second."""
    text = LOOP.format(test="ge.s32.totalorder", bound="%s77_s7", skip="", copy="").replace("%s9_s2, 0", "%s78_s8, 0")
    program = schedule.parse("made-up", *_text(text))
    found = trace.run(program, decisions=[True, True, False, False])
    assert found.counts == [1, *[2] * 8, 1, *[2] * 5, 1]
    assert not found.unknown_loops
    assert not found.assumed
    assert found.passes == [15, 14]  # the first with what leads to the loop, the last with what follows it
    with pytest.raises(ValueError, match="the branch at 0xa needs one more decision"):
        trace.run(program, decisions=[True, True, False])


def test_schedule_of_unknown_form_is_refused():
    bundles, slots = _text(LOOP.format(test="le.s32.totalorder", bound=-5, skip="", copy=""))
    with pytest.raises(ValueError, match="15 rows of slots for 16 bundles"):
        schedule.parse("made-up", bundles, slots.rpartition("\n")[0])
    with pytest.raises(ValueError, match="the branch at 0x4 goes to region 8, which has no mark"):
        schedule.parse("made-up", bundles.replace("empty region 8", ""), slots)
    with pytest.raises(ValueError, match="0x4 stands where 0x3"):
        schedule.parse("made-up", bundles.replace("0x3 :", "0x4 :"), slots)


def test_floors():
    scan = ScanShape(1, 8192, 3072, 16)
    floor = floors.selective_scan(scan, V5E)
    assert floor["eup"] == 8192 * 3072 * 16 / 1024
    assert max(floor.values()) == floor["vpu"] == 5 / 4 * floor["eup"]  # an exponential takes a vector slot too
    assert max(floors.selective_scan(scan, V5E, backward=True).values()) > 2 * max(floor.values())

    for window, keys in ((16, None), (None, None), (16, 40)):
        shape = AttentionShape(2, 37, 4, 2, 8, 6, window=window, keys=keys)
        distance = np.arange(37)[:, None] - np.arange(37)
        pairs = np.sum((distance >= 0) & (distance < (window or 37))) if keys is None else 37 * (window or keys)
        assert floors.attention(shape, V5E)["mxu"] * V5E.mxu_flops == pytest.approx(2 * 4 * pairs * 2 * (8 + 6))
    # 0.52e6 cycles for the whole band of 2048 keys, of which the first 2048 queries see a triangle.
    shape = AttentionShape(1, 8192, 8, 8, 128, 128, window=2048)
    corner = 2048 * 2047 / 2 / (2048 * 8192)
    assert floors.attention(shape, V5E)["mxu"] == pytest.approx(0.524288e6 * (1 - corner))

    conv = floors.causal_conv1d(ConvShape(4, 4096, 3072), V5E)
    assert conv["hbm"] == max(conv.values())
    assert conv["hbm"] == pytest.approx(2 * 4 * 4096 * 3072 * 2 * 1.5e9 / 819e9, rel=1e-3)


def test_chips_reach_their_published_peaks():
    for name, peak in {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12}.items():
        assert CHIPS[name].clock * CHIPS[name].mxu_flops == pytest.approx(peak, rel=0.005)


def _table(**cycles):
    rows = {name: {"cycles": value, "bytes": 10} for name, value in cycles.items()}
    return {"chip": "v5e", "libtpu": "0", "kernels": rows}


def test_worse_than_golden():
    golden = _table(scan=1000, conv=1000, gone=1, lost=5)
    new = _table(scan=1050, conv=1051, added=1, lost=None)
    assert goldens.worse(golden, new) == [
        "added is missing from the golden table",
        "gone is missing from the profile",
        "conv: cycles 1000 -> 1051",
        "lost: cycles 5 -> None",
    ]
    assert goldens.worse(golden, golden) == []


def _watched():
    """Every profiled shape; but for one of an op, they come with the slow tests."""
    for op in goldens.covered():
        for index, shape in enumerate(programs.entries(op)):
            slow = shape != "gla_1.3b" if op == "gated_linear_attention" else index > 0  # the other takes 35 s
            yield pytest.param(op, shape, id=f"{op}-{shape}", marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("op", "shape"), list(_watched()))
def test_kernels_are_no_worse_than_golden(op, shape):
    pytest.importorskip("libtpu")
    golden = json.loads(command.GOLDEN.read_text())
    assert {name.partition("/")[0] for name in golden["kernels"]} == set(goldens.covered())
    version = importlib.metadata.version("libtpu")
    if golden["libtpu"] != version:
        pytest.skip(f"the golden table is of libtpu {golden['libtpu']}, here is {version}: run --write-golden")
    golden["kernels"] = {name: row for name, row in golden["kernels"].items() if name.startswith(f"{op}/{shape}/")}
    assert golden["kernels"]
    assert goldens.worse(golden, goldens.table(goldens.measure([op], shapes=[shape]))) == []


def test_golden_table_names_kernels(v5e):
    place = {"op": "matmul", "shape": "512", "direction": "forward"}
    table = goldens.table(
        [{**v5e["matmul"], **place}, {"op": "a", "shape": "b", "direction": "c", "unsupported": "reason"}]
    )
    assert [name.rpartition("/")[0] for name in table["kernels"]] == ["matmul/512/forward"]
    assert table["estimates"]["matmul/512/forward"] > 0
    with pytest.raises(RuntimeError, match="matmul/512/forward did not compile: none"):
        goldens.table([{"op": "matmul", "shape": "512", "direction": "forward", "error": "none"}])


def test_golden_rows_of_one_op_are_replaced():
    place = {"op": "scan", "shape": "s", "direction": "forward"}
    baseline = {**place, "estimate": None, "cycles_at_least": 7}
    new = goldens.table([{**place, "estimate": 5, "kernels": []}], [baseline])
    assert new["xla"] == {"scan/s/forward": {"estimate": None, "cycles_at_least": 7}}
    golden = {**new, "kernels": {"conv/s/forward/k": {"cycles": 1}, "scan/s/forward/old": {"cycles": 2}}}
    golden |= {"estimates": {"scan/old/forward": 3, "conv/s/forward": 4}, "xla": {"conv/s/forward": {"estimate": 9}}}
    merged = goldens.updated(golden, new, ["scan"])
    assert list(merged["kernels"]) == ["conv/s/forward/k"]
    assert merged["estimates"] == {"conv/s/forward": 4, "scan/s/forward": 5}
    assert list(merged["xla"]) == ["conv/s/forward", "scan/s/forward"]
    with pytest.raises(RuntimeError, match="write all of it"):
        goldens.updated({**golden, "libtpu": "0"}, new, ["scan"])


def test_command_line(capsys):
    pytest.importorskip("libtpu")
    arguments = ["causal_conv1d", "--shape", "mamba_130m_decode", "--implementation", "xla"]
    command.main([*arguments, "--json"])
    forward, backward = json.loads(capsys.readouterr().out)
    assert (forward["direction"], backward["direction"]) == ("forward", "backward")
    for report in (forward, backward):
        assert report["cycles_at_least"] > 0
        assert report["floor"]["hbm"] > 0
        assert report["bytes_read"] >= 16 * 1536 * 2
    command.show([forward, backward])
    assert "causal_conv1d mamba_130m_decode forward xla" in capsys.readouterr().out


def test_bad_names():
    with pytest.raises(ValueError, match="chip='v9' must be one of"):
        profile.profile([], "v9")
    with pytest.raises(ValueError, match="attention has no shape 'none'"):
        programs.entry("attention", "none")


def test_backward_program_is_the_gradient():
    """The pass alone, from abstract residuals, has the arguments' shapes; run on residuals it gives the gradient."""
    function, arguments = programs.op_program("causal_conv1d", "mamba_130m_decode", "backward", "xla")
    gradients = jax.eval_shape(function, *arguments)
    arrays = programs.entry("causal_conv1d", "mamba_130m_decode").arrays()
    assert {name: g.shape for (name, g) in gradients[0].items()} == {name: a.shape for name, a in arrays.items()}


def test_compile_function():
    function, arguments = known_kernels.loop(2, 3)
    compiled = compile_function("v5e", function, *arguments)
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 8 * 128 * 4
    assert "tpu_custom_call" in compiled.as_text()
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compile_function("v5e:2x4", *_unpack(known_kernels.too_large()))
    with pytest.raises(ValueError, match="must be one of"):
        compile_function("v5e-8", jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32))


def _unpack(program):
    return program[0], *program[1]

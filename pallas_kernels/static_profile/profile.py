"""From a program to its profile: compile, read the schedules, follow them, add up."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from pallas_kernels.static_profile import floors, programs, schedule, trace
from pallas_kernels.static_profile.chips import CHIPS, ENVIRONMENT, Chip

UNITS = {"MXU": "MATMUL", "VALU": "VALU", "EUP": "EUP", "load": "VLOAD", "store": "VSTORE", "XLU": "XLU"}
FILL, SPILL = "VLOAD:FILL", "VSTORE:SPILL"


def profile_op(op: str, shapes: list[str], chip: str, implementations: list[str]) -> list[dict[str, Any]]:
    """Profiles an op forward and backward at each shape with each implementation that it has.

    Args:
      op: name of the op.
      shapes: names of entries of its shapes.
      chip: a name of `CHIPS`.
      implementations: names; those that the op lacks are left out.

    Returns:
      One report per program (see `profile`), with "op", "shape", "direction", "implementation", and where the op
      has a floor "floor" (cycles by unit) and "ratio" (estimate / largest of the floor).
    """
    keys = [
        {"op": op, "shape": shape, "direction": direction, "implementation": name}
        for shape in shapes
        for direction in programs.DIRECTIONS
        for name in implementations
        if name in programs.implementations(op, direction)
    ]
    call = "pallas_kernels.static_profile.programs:op_program"
    decided = [programs.decisions(op, key["shape"], key["direction"]) for key in keys]
    reports = profile([{"call": call, "arguments": key} for key in keys], chip, decided)
    for key, report in zip(keys, reports, strict=True):
        report |= {"chip": chip, **key}
        if op in floors.FLOORS:
            backward = key["direction"] == "backward"
            report["floor"] = dict(floors.FLOORS[op](programs.entry(op, key["shape"]), CHIPS[chip], backward))
            if report.get("estimate") is not None:
                report["ratio"] = report["estimate"] / max(report["floor"].values())
    return reports


def profile(
    requests: list[dict[str, Any]], chip: str, decisions: Sequence[Iterable[bool] | None] | None = None
) -> list[dict[str, Any]]:
    """Compiles programs for a chip in a process of their own and reads their final schedules.

    Args:
      requests: {"call": "module:function", "arguments": {...}} each; the function returns (function, arguments).
      chip: a name of `CHIPS`.
      decisions: per request what data decide in its Pallas kernel, as `trace.run` takes it, or None.

    Returns:
      Per request {"unsupported": reason}, {"error": message}, or the sums of the program and its "kernels".
      `cycles` is None where a loop's trips are unknown; then `cycles_at_least` counts those loops' bodies once.
      `estimate` is the largest of bundles issued, matrix-unit time and memory time.

    Raises:
      ValueError: unknown chip.
      RuntimeError: the compiling process failed.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip={chip!r} must be one of {sorted(CHIPS)}")
    with tempfile.TemporaryDirectory() as root:
        outcomes = _compile_programs(requests, chip, pathlib.Path(root))
        decided = decisions or [None] * len(requests)
        folders = [pathlib.Path(root) / str(index) for index in range(len(requests))]
        return [o or read(f, CHIPS[chip], d) for o, f, d in zip(outcomes, folders, decided, strict=True)]


def _compile_programs(requests: list[dict[str, Any]], chip: str, root: pathlib.Path) -> list[dict[str, str]]:
    dumps = root / "dumps"
    dumps.mkdir()
    job = {"topology": CHIPS[chip].topology, "dumps": str(dumps), "requests": requests}
    (root / "requests.json").write_text(json.dumps(job))
    # The last pass alone: writing out all of them takes several times as long as compiling.
    flags = (
        f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_.*|.*dedup.*"
    )
    environment = {**os.environ, **ENVIRONMENT, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the packages of this process, not others
    command = [sys.executable, "-m", "pallas_kernels.static_profile.worker", str(root / "requests.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"compiling for {chip} failed with code {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads((root / "outcomes.json").read_text())


def read(folder: pathlib.Path, chip: Chip, decisions: Iterable[bool] | None = None) -> dict[str, Any]:
    """The report of the one program whose dumps lie in a folder.

    Raises:
      ValueError: a schedule is missing or has an unknown form.
    """
    files = schedule.index(folder)
    if "TLP" not in files:
        raise ValueError(f"the compiler left no schedule among {sorted(p.name for p in folder.iterdir())[:20]}")
    hlo = "".join(path.read_text() for path in folder.glob("*-TLP-hlo.txt"))
    pallas = set(re.findall(r'%(\S+) = [^\n]*custom_call_target="tpu_custom_call"', hlo))
    equivalents = _equivalents(folder, set(files))
    top = _load("TLP", files)
    kernels = [_kernel("(program)", top, 1, chip)]
    for name, times in trace.run(top).calls.items():
        dumped = name if name in files else equivalents.get(name)
        if dumped is None:
            raise ValueError(f"the program calls {name}, of which the compiler left no schedule")
        decided = decisions if name in pallas else None
        kernels.append({**_kernel(name, _load(dumped, files), times, chip, decided), "pallas": name in pallas})
    return {**_total(kernels), "kernels": kernels}


def _load(name: str, files: dict[str, tuple[pathlib.Path, pathlib.Path]]) -> schedule.Schedule:
    bundles, slots = files[name]
    return schedule.parse(name, bundles.read_text(), slots.read_text())


def _equivalents(folder: pathlib.Path, dumped: set[str]) -> dict[str, str]:
    """Operations that share another's code -> the one that was dumped."""
    found = {}
    for path in folder.glob("*deduplication-map.txt"):
        for block in path.read_text().split("key:")[1:]:
            lines = [line.strip() for line in block.splitlines()]
            names = [name for name in (lines[0], *lines[3:]) if name]
            found |= {name: other for name in names for other in names if other in dumped}
    return found


def _kernel(
    name: str, program: schedule.Schedule, times: int, chip: Chip, decisions: Iterable[bool] | None = None
) -> dict[str, Any]:
    """What `times` runs of one schedule add up to."""
    ran, whole = trace.run(program, decisions=decisions), trace.run(program, every_region=True)
    used = {
        unit: times * sum(n * c for n, c in zip(slots, ran.counts, strict=True))
        for unit, slots in program.slots.items()
    }
    matmuls: Counter[str] = Counter()
    for found, count in zip(program.matmuls, ran.counts, strict=True):
        for kind, number in found.items():
            matmuls[kind] += times * number * count
    cycles = times * ran.cycles
    fewest = trace.run(program, skip_unknown=True).cycles if ran.assumed else ran.cycles
    # A register holds 8 rows of 32 bits, or 16 of bfloat16 and 32 of int8, which passes at twice the rate.
    mxu = (matmuls.total() - matmuls["f32"] / 2) * chip.matmul_cycles / chip.mxus
    # A chip's cores share its memory, and the trace is of the first core.
    hbm = chip.hbm_cycles(times * (ran.bytes_read + ran.bytes_written) * chip.cores)
    return {
        "name": name,
        "calls": times,
        "pallas": False,
        "bundles": len(program),
        "cycles": None if ran.unknown_loops else cycles,
        "cycles_at_least": cycles,
        "cycles_assumed_skipped": times * fewest,
        "passes": ran.passes,
        "cycles_every_region": None if whole.unknown_loops else times * whole.cycles,
        "bytes_read": times * ran.bytes_read,
        "bytes_written": times * ran.bytes_written,
        "bytes_known": not ran.unknown_copies and not ran.unknown_loops,
        "slots": used,
        "capacity": program.capacity,
        "mxu_cycles": mxu,
        "hbm_cycles": hbm,
        "estimate": None if ran.unknown_loops else max(cycles, mxu, hbm),
        "fills": used[FILL],
        "spills": used[SPILL],
        "spills_in_innermost_loops": _inner_spills(program, ran),
        "loops": [
            {
                "bundles": f"{loop.start:#x}-{loop.end:#x}",
                "iterations": loop.iterations if loop.known else None,
                "entries": loop.entries,
                "innermost": loop.innermost,
            }
            for loop in ran.loops
        ],
        "assumed_regions": {f"{at:#x}": count for at, count in ran.assumed.items()},
        "assumed_copies": len(ran.assumed_copies),
    }


def _inner_spills(program: schedule.Schedule, ran: trace.Trace) -> dict[str, dict[str, int]]:
    """Per innermost loop that spills, the slots that fills and spills take in one pass over its bundles."""
    found = {}
    for loop in ran.loops:
        inside = slice(loop.start, loop.end + 1)
        counts = {"fills": sum(program.slots[FILL][inside]), "spills": sum(program.slots[SPILL][inside])}
        if loop.innermost and any(counts.values()):
            found[f"{loop.start:#x}-{loop.end:#x}"] = counts
    return found


def _total(kernels: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("cycles_at_least", "bytes_read", "bytes_written", "mxu_cycles", "hbm_cycles", "fills", "spills")
    total: dict[str, Any] = {name: sum(kernel[name] for kernel in kernels) for name in names}
    for name in ("cycles", "cycles_every_region"):
        parts = [kernel[name] for kernel in kernels]
        total[name] = None if None in parts else sum(parts)
    total["bytes_known"] = all(kernel["bytes_known"] for kernel in kernels)
    bounds = [total["cycles"], total["mxu_cycles"], total["hbm_cycles"]]
    total["estimate"] = None if None in bounds else max(bounds)
    return total

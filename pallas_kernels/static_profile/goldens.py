"""The committed table of what the TPU kernels cost, and when a kernel counts as worse."""

import importlib.metadata
from collections.abc import Iterable, Mapping
from typing import Any

from pallas_kernels.static_profile import profile, programs

CHIP = "v5e"
IMPLEMENTATION, BASELINE = "mosaic_tpu", "xla"
MARGIN = 0.05
BASELINE_METRICS = ("estimate", "cycles_at_least")
METRICS = ("cycles", "cycles_at_least", "cycles_every_region", "mxu_cycles", "bytes", "inner_spills")


def covered() -> list[str]:
    """The ops that have a TPU kernel."""
    return [
        op
        for op in programs.ops()
        if any(IMPLEMENTATION in programs.implementations(op, direction) for direction in programs.DIRECTIONS)
    ]


def measure(
    ops: Iterable[str], implementation: str = IMPLEMENTATION, shapes: Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """Profiles the TPU kernels, or the xla form, of ops at `shapes`; None = those that they profile by default."""
    named = None if shapes is None else list(shapes)
    return [
        report for op in ops for report in profile.profile_op(op, named or programs.entries(op), CHIP, [implementation])
    ]


def table(reports: Iterable[Mapping[str, Any]], baseline: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The table to commit: per kernel its metrics, per program the estimated cycles, with the compiler's version.

    Args:
      reports: of the kernels.
      baseline: reports of the xla form; no test watches them, as some take minutes to compile.

    Raises:
      RuntimeError: a program did not compile.
    """
    rows: dict[str, Any] = {}
    estimates = {}
    for report in reports:
        name = _name(report)
        if "kernels" in report:
            estimates[name] = report["estimate"]
        for kernel in report.get("kernels", ()):
            if kernel["pallas"]:
                added = {"bytes": kernel["bytes_read"] + kernel["bytes_written"], "inner_spills": _inner_spills(kernel)}
                rows[f"{name}/{kernel['name']}"] = {m: (kernel | added)[m] for m in METRICS}
    return {
        "chip": CHIP,
        "libtpu": importlib.metadata.version("libtpu"),
        "kernels": dict(sorted(rows.items())),
        "estimates": dict(sorted(estimates.items())),
        "xla": {
            name: {m: r[m] for m in BASELINE_METRICS} for name, r in sorted({_name(r): r for r in baseline}.items())
        },
    }


def _inner_spills(kernel: Mapping[str, Any]) -> int:
    """Slots of spills and fills in one pass over the bundles of the innermost loops."""
    return sum(sum(slots.values()) for slots in kernel["spills_in_innermost_loops"].values())


def _name(report: Mapping[str, Any]) -> str:
    name = "/".join(report[key] for key in ("op", "shape", "direction"))
    if "error" in report:
        raise RuntimeError(f"{name} did not compile: {report['error']}")
    return name


def updated(golden: Mapping[str, Any], new: Mapping[str, Any], ops: Iterable[str]) -> dict[str, Any]:
    """The golden table with the rows of `ops` from a new one.

    Raises:
      RuntimeError: another compiler wrote the golden table, which must then be written whole.
    """
    for key in ("chip", "libtpu"):
        if golden[key] != new[key]:
            raise RuntimeError(f"the golden table is of {key} {golden[key]}, here is {new[key]}: write all of it")
    merged = dict(new)
    for part in ("kernels", "estimates", "xla"):
        kept = {name: row for name, row in golden.get(part, {}).items() if name.partition("/")[0] not in set(ops)}
        merged[part] = dict(sorted((kept | new[part]).items()))
    return merged


def worse(golden: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What in `new` is not as `golden` promises: kernels that cost over 5 % more, and rows without a partner."""
    found = []
    for name in sorted(set(golden["kernels"]) ^ set(new["kernels"])):
        where = "the golden table" if name in new["kernels"] else "the profile"
        found.append(f"{name} is missing from {where}")
    for name in sorted(set(golden["kernels"]) & set(new["kernels"])):
        for metric, before in golden["kernels"][name].items():
            after = new["kernels"][name][metric]
            if (after is None) != (before is None) or (before is not None and after > before * (1 + MARGIN)):
                found.append(f"{name}: {metric} {before} -> {after}")
    return found

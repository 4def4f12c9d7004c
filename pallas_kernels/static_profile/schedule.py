"""Reads one final schedule of the TPU compiler: bundles, scalar instructions, slots in use.

A bundle is what the core issues in one cycle. The text holds every instruction with its operands, so that the loops
and branches can be followed exactly (see `trace`).
"""

import dataclasses
import glob
import pathlib
import re

# A taken branch lets the bundles that follow it run first; the same on v5e, v5p and v6e.
DELAY_SLOTS = 4
# Vector instructions that feed the matrix unit, by operand width.
_MATMUL = re.compile(r"\bvmatmul\.\S*?\b(bf16|f32|[su]8|[su]4|f8\w*)\b")

_HEADER = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*>*\s*\{", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_INSTRUCTION = re.compile(r"^(?:%(\w+) = )?([a-z][\w.]*)\s*(.*)$", re.DOTALL)
_PREDICATE = re.compile(r"\((!?)%(\w+)(?:, %(\w+))?\),?")
_TARGET = re.compile(r"target = \$region(\d+)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `operands` are register names (%...), integers, or other text, as written."""

    result: str | None
    opcode: str
    operands: tuple[str | int, ...]
    predicate: str | None = None
    negated: bool = False
    otherwise: str | None = None  # the result where the predicate selects
    region: int | None = None  # where a branch goes
    comment: str = ""


@dataclasses.dataclass
class Schedule:
    """The bundles of one program in address order, and per bundle the slots used of each unit."""

    name: str
    bundles: list[list[Instruction]]
    targets: dict[int, int]  # region -> index of its first bundle
    slots: dict[str, list[int]]
    capacity: dict[str, int]
    matmuls: list[dict[str, int]]  # per bundle: operand type -> instructions

    def __len__(self) -> int:
        return len(self.bundles)


def parse(name: str, bundles_text: str, utilization_text: str) -> Schedule:
    """Reads the two dumps of one program.

    Args:
      name: the name of the program, for messages.
      bundles_text: contents of `*-final_bundles.txt`.
      utilization_text: contents of `*-final_hlo-static-per-bundle-utilization.txt`.

    Returns:
      The schedule.

    Raises:
      ValueError: the text has another form than known.
    """
    heads = list(_HEADER.finditer(bundles_text))
    bundles, targets, marks, matmuls, exit_mark = [], {}, {}, [], None
    for index, head in enumerate(heads):
        if int(head[1], 16) != index:
            raise ValueError(f"{name}: bundle {head[1]} stands where {index:#x} should; the dump has an unknown form")
        end = heads[index + 1].start() if index + 1 < len(heads) else len(bundles_text)
        body = bundles_text[head.end() : end]
        for region in _REGION.findall(body):
            targets[int(region)] = index
        marks[index] = head[2]
        if "exit bundle:" in body and head[2] and index not in targets.values():
            # The note on the exit takes the place of the region's name.
            exit_mark = index
        bundles.append([_instruction(text) for text in body.split(" ;; ")])
        matmuls.append(_matmuls(body))
    if exit_mark is not None:
        jumps = [jump.region for jump in map(branch, bundles) if jump is not None and jump.region is not None]
        targets |= {region: exit_mark for region in jumps if region not in targets}
    schedule = Schedule(name, bundles, targets, *_slots(name, utilization_text, len(bundles)), matmuls)
    _check_targets(schedule, marks)
    return schedule


def branch(bundle: list[Instruction]) -> Instruction | None:
    """The branch of a bundle, if it has one."""
    return next((instruction for instruction in bundle if instruction.region is not None), None)


def _instruction(text: str) -> Instruction:
    comment = " ".join(_COMMENT.findall(text))
    text = _COMMENT.sub("", text).split("}")[0].strip()
    match = _INSTRUCTION.match(text)
    if match is None:  # an empty bundle
        return Instruction(None, "", ())
    result, opcode, rest = match.groups()
    target = _TARGET.search(rest)
    predicate = _PREDICATE.search(rest)
    if predicate:
        rest = rest[: predicate.start()] + rest[predicate.end() :]
    operands = tuple(_operand(part.strip()) for part in rest.split(",") if part.strip())
    return Instruction(
        result,
        opcode,
        operands,
        predicate[2] if predicate else None,
        bool(predicate and predicate[1]),
        predicate[3] if predicate else None,
        int(target[1]) if target else None,
        comment,
    )


def _operand(text: str) -> str | int:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    return text


def _matmuls(body: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for kind in _MATMUL.findall(_COMMENT.sub("", body)):
        found[kind] = found.get(kind, 0) + 1
    return found


def _slots(name: str, text: str, count: int) -> tuple[dict[str, list[int]], dict[str, int]]:
    lines = text.splitlines()
    if len(lines) < 4 or not lines[3].startswith("== UTIL"):
        raise ValueError(f"{name}: the table of slots has an unknown form: {lines[:4]}")
    units = [unit.strip() for unit in lines[1].split(",")]
    capacity = dict(zip(units, map(int, lines[2].split()), strict=True))
    rows = [list(map(int, line.split())) for line in lines[4:]]
    if len(rows) != count:
        raise ValueError(f"{name}: {len(rows)} rows of slots for {count} bundles")
    columns = zip(*rows, strict=True)
    return {unit: list(column) for unit, column in zip(units, columns, strict=True)}, capacity


def _check_targets(schedule: Schedule, marks: dict[int, str | None]) -> None:
    for index, bundle in enumerate(schedule.bundles):
        jump = branch(bundle)
        if jump is None or jump.region is None:
            continue
        target = schedule.targets.get(jump.region)
        if target is None or marks[target] is None:
            raise ValueError(
                f"{schedule.name}: the branch at {index:#x} goes to region {jump.region}, which has no mark"
            )
        slots = schedule.bundles[index + 1 : index + 1 + DELAY_SLOTS]
        if len(slots) < DELAY_SLOTS or any(branch(slot) for slot in slots):
            raise ValueError(f"{schedule.name}: another branch within {DELAY_SLOTS} bundles of that at {index:#x}")


def index(folder: pathlib.Path) -> dict[str, tuple[pathlib.Path, pathlib.Path]]:
    """The dumps of a folder: name of a program -> its files of bundles and of slots."""
    found = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        match = re.fullmatch(r"(\d+)-(.*)-\d+-final_bundles\.txt", path.name)
        if match is None:  # the compiler's own summary of the bundles
            continue
        tables = folder.glob(f"{match[1]}-{glob.escape(match[2])}-*-final_hlo-static-per-bundle-utilization.txt")
        found[match[2]] = path, next(iter(sorted(tables)))
    return found

"""Runs the scalar unit of a schedule: how often each bundle issues, and how many bytes cross to and from HBM.

Loops, grids and predicated regions depend on counters that the schedule itself holds. Following them gives the cycles
exactly, apart from waits for memory. What depends on data is not guessed: a region whose predicate is unknown is
counted as run and named, a loop whose exit is unknown leaves the total unknown. Who knows the data can decide both.
"""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

from pallas_kernels.static_profile.schedule import DELAY_SLOTS, Instruction, Schedule, branch

GRANULE = 32  # bytes; the unit of `size_in_granules`
MAX_BRANCHES = 30_000_000


@dataclasses.dataclass
class Loop:
    """A loop: its bundles `start` to `end` (inclusive), how often it was entered and its body run."""

    start: int
    end: int
    iterations: int
    entries: int
    known: bool
    innermost: bool = False


@dataclasses.dataclass
class Trace:
    """What one run issues: `counts` per bundle; bytes and calls of what runs."""

    counts: list[int]
    loops: list[Loop]
    assumed: dict[int, int]  # forward branches with unknown predicate -> times taken as "region runs"
    bytes_read: int = 0
    bytes_written: int = 0
    unknown_copies: list[int] = dataclasses.field(default_factory=list)  # copies of unknown size
    assumed_copies: list[int] = dataclasses.field(default_factory=list)  # copies of unknown predicate, counted
    calls: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    passes: list[int] = dataclasses.field(default_factory=list)  # cycles of each pass through the longest loop

    @property
    def cycles(self) -> int:
        """Bundles issued; a lower bound when `unknown_loops` is not empty."""
        return sum(self.counts)

    @property
    def unknown_loops(self) -> list[Loop]:
        """Loops whose number of trips the schedule does not tell."""
        return [loop for loop in self.loops if not loop.known]


def run(
    schedule: Schedule,
    every_region: bool = False,
    skip_unknown: bool = False,
    decisions: Iterable[bool] | None = None,
) -> Trace:
    """Follows the control flow of a schedule from its first bundle to its end.

    Args:
      schedule: what to run.
      every_region: counts predicated regions as run each time they are met, whatever their predicate: the plain
        bundles-times-trips estimate.
      skip_unknown: counts a region of unknown predicate as skipped, not as run.
      decisions: what data decide, in the order in which the schedule asks: whether a region of unknown predicate runs,
        and whether a loop of unknown exit goes round again.

    Returns:
      The trace.

    Raises:
      ValueError: fewer decisions than the schedule asks for.
      RuntimeError: more than `MAX_BRANCHES` branches were met.
    """
    machine = _Machine(schedule)
    visits: collections.Counter[int] = collections.Counter()
    taken: collections.Counter[int] = collections.Counter()
    assumed: collections.Counter[int] = collections.Counter()
    unknown = set()
    decide = None if decisions is None else iter(decisions)
    ends, elapsed = [0], 0
    longest = _longest_loop(schedule)
    position, branches = 0, 0
    while position < len(schedule):
        visits[position] += 1
        block = machine.block(position)
        elapsed += block.end - position
        machine.step(block)
        if block.jump is None:
            break
        branches += 1
        if branches > MAX_BRANCHES:
            raise RuntimeError(f"{schedule.name}: more than {MAX_BRANCHES} branches; is it a loop without end?")
        go = block.condition
        if go is None and decide is not None:
            runs = next(decide, None)
            if runs is None:
                raise ValueError(f"{schedule.name}: the branch at {block.at:#x} needs one more decision")
            go = bool(runs) != (block.target > block.at)  # of NumPy, a count of them would be no int
        if block.target > block.at:
            if go is None:
                assumed[block.at] += 1
                go = skip_unknown
            go = bool(go) and (not every_region or block.jump.predicate is None)
        elif go is None:
            unknown.add(block.at)
            go = False
        taken[block.at] += go
        if block.at == longest and go:
            ends.append(elapsed)
        position = block.target if go else block.end
    trace = _summary(schedule, machine, visits, taken, dict(assumed), unknown)
    trace.passes = [after - before for before, after in zip(ends, [*ends[1:], elapsed], strict=True)]
    return trace


def _longest_loop(schedule: Schedule) -> int | None:
    """The bundle that ends the loop of most bundles: of a kernel, its grid."""
    lengths = {}
    for at, bundle in enumerate(schedule.bundles):
        jump = branch(bundle)
        if jump is not None and schedule.targets[jump.region] <= at:  # type: ignore[index]
            lengths[at] = at - schedule.targets[jump.region]  # type: ignore[index]
    return max(lengths, key=lambda at: lengths[at], default=None)


def _summary(schedule, machine, visits, taken, assumed, unknown) -> Trace:
    changes = [0] * (len(schedule) + 1)
    for position, times in visits.items():
        changes[position] += times
        changes[machine.block(position).end] -= times
    counts, total = [], 0
    for change in changes[:-1]:
        total += change
        counts.append(total)
    loops = []
    for at, bundle in enumerate(schedule.bundles):
        jump = branch(bundle)
        if jump is not None and (start := schedule.targets[jump.region]) <= at:
            iterations = counts[at]
            known = at not in unknown
            loops.append(Loop(start, at + DELAY_SLOTS, iterations, iterations - taken[at], known))
    for loop in loops:
        loop.innermost = not any(loop.start < other.start <= loop.end for other in loops if other is not loop)
    copies = machine.copies
    return Trace(
        counts, loops, assumed, copies["read"], copies["written"],
        sorted(machine.unknown_copies), sorted(machine.assumed_copies), machine.calls,
    )  # fmt: skip


@dataclasses.dataclass
class _Block:
    """Bundles up to a branch and through its delay slots; `code` is what must be interpreted of them."""

    code: list[tuple[int, Instruction]]
    end: int
    at: int
    jump: Instruction | None
    target: int
    condition: bool | None = None

    def belongs(self, instruction: Instruction) -> bool:
        """Whether an instruction was moved up from the region that the block's branch would skip."""
        return (
            self.jump is not None
            and self.target > self.at
            and instruction.region is None
            and instruction.predicate == self.jump.predicate
            and instruction.negated != self.jump.negated
        )


class _Machine:
    """Values of the scalar and predicate registers that branches and copies depend on; None is unknown."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.needed = _needed(schedule)
        self.halves = _halves(schedule)
        self.values: dict[str, Any] = {}
        self.order: dict[str, int] = {}
        self.memory: dict[str, Any] = {}
        self.time = 0
        self.blocks: dict[int, _Block] = {}
        self.copies: collections.Counter[str] = collections.Counter()
        self.calls: collections.Counter[str] = collections.Counter()
        self.unknown_copies: set[int] = set()
        self.assumed_copies: set[int] = set()

    def block(self, start: int) -> _Block:
        if start not in self.blocks:
            self.blocks[start] = self._make_block(start)
        return self.blocks[start]

    def _make_block(self, start: int) -> _Block:
        bundles = self.schedule.bundles
        at = next((i for i in range(start, len(bundles)) if branch(bundles[i])), None)
        end = len(bundles) if at is None else at + 1 + DELAY_SLOTS
        code = []
        for index in range(start, end):
            # A phi renames what its register holds on entry, so it comes before its bundle's other instructions.
            for instruction in sorted(bundles[index], key=lambda i: i.opcode not in ("sphi", "pphi")):
                if _interpreted(instruction, self.needed):
                    code.append((index, instruction))
        jump = None if at is None else branch(bundles[at])
        return _Block(code, end, -1 if at is None else at, jump, -1 if jump is None else self._target(jump))

    def _target(self, jump: Instruction) -> int:
        return self.schedule.targets[jump.region]  # type: ignore[index]

    def step(self, block: _Block) -> None:
        for index, instruction in block.code:
            runs = self._predicate(instruction)
            if runs is None and block.belongs(instruction):
                runs = True
            if instruction.region is not None:
                block.condition = runs
            elif instruction.opcode.startswith("dma."):
                self._copy(index, instruction, runs)
            elif instruction.opcode == "inlined_call":
                self._call(instruction, runs)
            elif instruction.opcode == "sst":
                self._store(instruction, runs)
            else:
                self._assign(instruction, runs)

    def _predicate(self, instruction: Instruction) -> bool | None:
        if instruction.predicate is None:
            return True
        value = self.values.get(instruction.predicate)
        return None if value is None else bool(value) != instruction.negated

    def _value(self, operand: str | int) -> Any:
        if isinstance(operand, int):
            return _signed(operand)
        return self.values.get(operand[1:]) if operand.startswith("%") else None

    def _assign(self, instruction: Instruction, runs: bool | None) -> None:
        if instruction.otherwise is not None:  # a select: the predicate chooses between both operands
            other = self.values.get(instruction.otherwise)
            value = self._result(instruction)
            value = value if runs else other if runs is False else (value if value == other else None)
        elif runs is False:
            return
        else:
            value = self._result(instruction) if runs else None
        self.time += 1
        self.values[instruction.result] = value  # type: ignore[index]
        self.order[instruction.result] = self.time  # type: ignore[index]

    def _result(self, instruction: Instruction) -> Any:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode in ("sphi", "pphi"):
            # Operands share a register: it holds the one written last.
            names = [str(operand)[1:] for operand in operands]
            return self.values.get(max(names, key=lambda name: self.order.get(name, -1)))
        if opcode == "sld":
            if "core id" in instruction.comment:
                return 0  # the first core's share, where a chip has two
            return self.memory.get(str(operands[0])) if "_spill]" in str(operands[0]) else None
        if opcode == "spop.drf":
            division = self._value(operands[0])
            return None if division is None else division[self.halves[str(instruction.result)]]
        return _compute(opcode, [self._value(operand) for operand in operands])

    def _store(self, instruction: Instruction, runs: bool | None) -> None:
        slot, source = _spilled(instruction)
        if runs is not False:
            self.memory[slot] = self.values.get(source) if runs else None

    def _copy(self, index: int, instruction: Instruction, runs: bool | None) -> None:
        if runs is False:
            return
        if runs is None:
            self.assumed_copies.add(index)
        granules = self._value(_granules(instruction))
        if granules is None:
            self.unknown_copies.add(index)
            return
        route = instruction.opcode.removeprefix("dma.").split("_to_")
        self.copies["read"] += granules * GRANULE * route[0].startswith("hbm")
        self.copies["written"] += granules * GRANULE * route[-1].startswith("hbm")

    def _call(self, instruction: Instruction, runs: bool | None) -> None:
        name = instruction.comment.removeprefix("/*").strip().split(" ")[0].removeprefix("%")
        if runs is not False and not name.startswith("<"):  # <...> is the runtime's own prologue and epilogue
            self.calls[name] += 1


def _interpreted(instruction: Instruction, needed: set[str]) -> bool:
    if instruction.region is not None or instruction.opcode == "inlined_call":
        return True
    if instruction.opcode.startswith("dma."):
        return not instruction.opcode.startswith("dma.done") and "hbm" in instruction.opcode
    if instruction.opcode == "sst":
        return "_spill]" in str(instruction.operands[0]) and _spilled(instruction)[0] in needed
    return instruction.result in needed


def _needed(schedule: Schedule) -> set[str]:
    """Registers and spill slots that branches and copies depend on, directly or not."""
    sources: dict[str, set[str]] = collections.defaultdict(set)
    wanted: list[str] = []
    for bundle in schedule.bundles:
        for instruction in bundle:
            reads = {str(operand)[1:] for operand in instruction.operands if str(operand).startswith("%")}
            reads |= {name for name in (instruction.predicate, instruction.otherwise) if name}
            if instruction.opcode == "sld":
                reads.add(str(instruction.operands[0]))
            if instruction.opcode == "sst" and "_spill]" in str(instruction.operands[0]):
                slot, source = _spilled(instruction)
                sources[slot] |= {source, *reads}
            elif instruction.region is not None or instruction.opcode == "inlined_call":
                wanted += [instruction.predicate] if instruction.predicate else []
            elif instruction.opcode.startswith("dma.") and _interpreted(instruction, set()):
                wanted += [instruction.predicate] if instruction.predicate else []
                granules = str(_granules(instruction))
                wanted += [granules[1:]] if granules.startswith("%") else []
            elif instruction.result is not None:
                sources[instruction.result] |= reads
    needed: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in needed:
            needed.add(name)
            wanted += sources.get(name, ())
    return needed


def _halves(schedule: Schedule) -> dict[str, int]:
    """Registers that take a result of a division from its queue -> 0 for the quotient, which leaves first, or 1."""
    taken: collections.Counter[str | int] = collections.Counter()
    found = {}
    for bundle in schedule.bundles:
        for instruction in bundle:
            if instruction.opcode == "spop.drf" and instruction.result is not None:
                division = instruction.operands[0]
                found[instruction.result] = taken[division]
                taken[division] += 1
    return found


def _spilled(instruction: Instruction) -> tuple[str, str]:
    """(slot, register) of a store such as `sst [smem:[#allocation13_spill]] %s2198_s9`."""
    slot, _, source = str(instruction.operands[0]).rpartition(" ")
    return slot, source.removeprefix("%")


def _granules(instruction: Instruction) -> str | int:
    """The size of a copy: its second operand, after the source address."""
    return instruction.operands[1]


def _signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _unsigned(value: int) -> int:
    return value % 2**32


_COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_ARITHMETIC = {
    "sadd": lambda a, b: a + b,
    "ssub": lambda a, b: a - b,
    "smul": lambda a, b: a * b,
    "sand": lambda a, b: a & b,
    "sor": lambda a, b: a | b,
    "sxor": lambda a, b: a ^ b,
    "sshll": lambda a, b: a << (b % 32),
    "sshra": lambda a, b: a >> (b % 32),
    "sshrl": lambda a, b: _unsigned(a) >> (b % 32),
    "smin": min,
    "smax": max,
    "smulhi": lambda a, b: a * b >> 32,
}


def _compute(opcode: str, values: list[Any]) -> Any:
    """The result of an arithmetic or logical instruction; None where it or an operand is unknown."""
    parts = opcode.split(".")
    kind = parts[0]
    if kind in ("por", "pnor"):
        result = True if True in values else None if None in values else False
        return result if kind == "por" or result is None else not result
    if kind in ("pand", "pnand"):
        result = False if False in values else None if None in values else True
        return result if kind == "pand" or result is None else not result
    if kind == "scalar_select":
        chosen, yes, no = values
        return (yes if yes == no else None) if chosen is None else yes if chosen else no
    if None in values:
        return None
    if kind == "pneg":
        return not values[0]
    if kind == "pmov":
        return bool(values[0])
    if kind == "pxor":
        return bool(values[0]) != bool(values[1])
    if kind == "smov":
        return values[0]
    if kind == "scmp":
        a, b = map(_unsigned, values) if "u32" in parts else values
        return _COMPARE[parts[1]](a, b)
    if kind in ("smin", "smax", "smulhi", "sdivrem") and "u32" in parts:
        values = list(map(_unsigned, values))  # the compiler takes |x| as min(x, -x) without signs
    if kind == "sdivrem":
        return divmod(*values) if "u32" in parts and values[1] else None
    if kind in _ARITHMETIC:
        return _signed(_ARITHMETIC[kind](*values))
    return None

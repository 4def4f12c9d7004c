"""Finite groups as permutations, with their multiplication tables."""

import dataclasses
import functools
import itertools
import math
import re

import numpy as np

LARGEST = 5  # points of a symmetric or alternating group; S6 has 720 elements and a table of half a million entries
LARGEST_CYCLE = 120


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """A group of permutations.

    Attributes:
      name: as in `group`.
      permutations: int[G, P], each element as the images of P points; element 0 is the identity.
      table: int[G, G], table[a, b] = the element a b, which permutes by b first: (a b)(p) = a(b(p)).
      generators: ids of elements whose products are the whole group; the identity comes first.
    """

    name: str
    permutations: np.ndarray
    table: np.ndarray
    generators: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.permutations)


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


def _factor(name: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Elements and generators (without the identity) of one of S, A and Z."""
    match = re.fullmatch(r"([saz])([1-9]\d*)", name)
    kind, points = (match[1], int(match[2])) if match else ("", 0)
    least, most = {"s": (2, LARGEST), "a": (3, LARGEST), "z": (2, LARGEST_CYCLE)}.get(kind, (1, 0))
    if not least <= points <= most:
        raise ValueError(
            f"group={name!r} is unknown: s2 to s{LARGEST} (symmetric), a3 to a{LARGEST} (alternating), z2 to "
            f"z{LARGEST_CYCLE} (cyclic), or a product such as 'a4xz5'"
        )
    identity = tuple(range(points))
    turn = identity[1:] + identity[:1]
    if kind == "z":
        return [identity[i:] + identity[:i] for i in range(points)], [turn]
    elements = list(itertools.permutations(range(points)))
    if kind == "s":
        return elements, list(dict.fromkeys([(1, 0, *identity[2:]), turn]))
    cycles = [(1, k, *(0 if p == k else p for p in range(2, points))) for k in range(2, points)]  # 0 -> 1 -> k -> 0
    return [element for element in elements if _is_even(element)], cycles


@functools.cache
def group(name: str) -> Group:
    """The group called `name`.

    Args:
      name: "s5" (all 120 permutations of 5 points), "a5" (the 60 even ones), "z60" (60 turns of a circle of 60 points),
        or a direct product of such, "a4xz5", whose factors permute points of their own.

    Raises:
      ValueError: no such group.
    """
    factors = [_factor(part) for part in name.split("x")]
    size = math.prod(len(elements) for elements, _ in factors)
    if size > LARGEST_CYCLE:
        raise ValueError(f"group={name!r} has {size} elements, at most {LARGEST_CYCLE} are supported")
    identities = [tuple(range(len(elements[0]))) for elements, _ in factors]

    def joined(parts) -> tuple[int, ...]:
        starts = itertools.accumulate((len(part) for part in parts), initial=0)
        return tuple(start + point for start, part in zip(starts, parts, strict=False) for point in part)

    permutations = [joined(parts) for parts in itertools.product(*(elements for elements, _ in factors))]
    ids = {permutation: index for index, permutation in enumerate(permutations)}
    generators = [joined(identities)]
    for at, (_, of_factor) in enumerate(factors):
        generators += [joined([*identities[:at], element, *identities[at + 1 :]]) for element in of_factor]
    table = [[ids[tuple(a[p] for p in b)] for b in permutations] for a in permutations]
    return Group(name, np.array(permutations), np.array(table), tuple(ids[element] for element in generators))

"""Names that resolve to things, and errors that suggest the nearest one."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The tail of an error message: the nearest allowed name, then all of them."""
    allowed = sorted(str(a) for a in allowed)
    close = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(allowed) or 'none'}"


def check_choice(what: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{what}={value!r} is not supported; {nearest(value, (repr(a) for a in allowed))}")


def check_keys(what: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises ValueError that names the first key of `given` that is not `allowed`."""
    allowed = tuple(allowed)
    for key in given:
        if key not in allowed:
            raise ValueError(f"{what} has no option {key!r}; {nearest(key, allowed)}")


class Registry(Generic[T]):
    """A mapping from names to values of one kind.

    Example:
      >>> SHAPES = Registry("shape")
      >>> @SHAPES.register("circle")
      ... def circle(): ...
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files its argument under `name`; a name can be taken once."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is already registered")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry called `name`; KeyError with the nearest name otherwise."""
        if name not in self._entries:
            raise KeyError(f"unknown {self.kind} {name!r}; {nearest(name, self._entries)}")
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, in order of registration."""
        return list(self._entries)

    def items(self) -> Mapping[str, T]:
        """A read-only view of the entries."""
        return dict(self._entries)

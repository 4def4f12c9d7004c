"""Names that resolve to constructors, with errors that suggest the nearest name."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any


def _nearest(name: str, allowed: Iterable[str]) -> str:
    allowed = sorted(allowed)
    close = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.4)
    return (f"did you mean {close[0]!r}? " if close else "") + f"allowed: {', '.join(allowed)}"


def check_keys(what: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises ValueError that names the first key of `given` that is not `allowed`."""
    allowed = tuple(allowed)
    for key in given:
        if key not in allowed:
            raise ValueError(f"{what} has no option {key!r}; {_nearest(key, allowed)}")


class Registry:
    """A table of named constructors of one kind ("source", "tokenizer")."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator that files its argument under `name`; a name is given once."""

        def add(entry):
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is already registered")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> Any:
        """The entry called `name`; KeyError with the nearest name otherwise."""
        if name not in self._entries:
            raise KeyError(f"unknown {self.kind} {name!r}; {_nearest(name, self._entries)}")
        return self._entries[name]

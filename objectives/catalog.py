"""Prints every registered objective and optimiser with its source, inputs, defaults and proof.

python -m objectives.catalog [--category preference] [--json]; the optimisers are --category optimizer.
"""

import argparse
import json
import math
import sys
from typing import Any

import rich.console
import rich.markup
import rich.table

from objectives import optimizers
from objectives.registry import CATEGORIES, OBJECTIVES, list_objectives

OPTIMIZER = "optimizer"


def rows(category: str | None = None) -> list[dict[str, Any]]:
    """Of all objectives, or of one category: name, category, what (a line), papers (arXiv ids), inputs (optional ones
    in brackets), defaults of the options, proof (a test below tests/objectives)."""
    found = []
    for name in list_objectives(category):
        entry = OBJECTIVES.get(name)
        found.append(
            {
                "name": name,
                "category": entry.category,
                "what": (entry.function.__doc__ or "").partition("\n")[0],
                "papers": list(entry.papers),
                "inputs": entry.inputs,
                "defaults": entry.defaults,
                "proof": entry.proof,
            }
        )
    return found


def optimizer_rows() -> list[dict[str, Any]]:
    """Of all optimisers: name, category "optimizer", what, papers, source ("optax" or "here"), state_bytes (per
    parameter, by default options; float32), defaults of the options, proof (a test below tests/optimizers)."""
    found = []
    for name in optimizers.list_optimizers():
        entry = optimizers.OPTIMIZERS.get(name)
        found.append(
            {
                "name": name,
                "category": OPTIMIZER,
                "what": (entry.build.__doc__ or "").strip().partition("\n")[0],
                "papers": list(entry.papers),
                "source": entry.source,
                "state_bytes": round(optimizers.bytes_per_parameter(name), 3),
                "defaults": {key: _plain(value) for key, value in entry.defaults.items()},
                "proof": entry.proof,
            }
        )
    return found


def _plain(value: Any) -> Any:
    """What JSON can say of a default."""
    known = value is None or isinstance(value, (bool, int, str, list, tuple))
    return value if known or (isinstance(value, float) and math.isfinite(value)) else str(value)


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m objectives.catalog", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--category", choices=(*CATEGORIES, OPTIMIZER))
    parser.add_argument("--json", action="store_true", help="one JSON list in place of the tables")
    options = parser.parse_args(arguments)
    found = rows(options.category) if options.category != OPTIMIZER else []
    of_optimizers = optimizer_rows() if options.category in (None, OPTIMIZER) else []
    if options.json:
        print(json.dumps([*found, *of_optimizers], indent=1))
        return
    console = rich.console.Console(width=None if sys.stdout.isatty() else 200)
    if found:
        console.print(_table(found, ("objective", "category", "arXiv", "inputs", "defaults", "test")))
    if of_optimizers:
        console.print(
            _table(of_optimizers, ("optimizer", "source", "arXiv", "bytes of state per parameter", "defaults", "test"))
        )


def _table(found: list[dict[str, Any]], columns: tuple[str, ...]) -> rich.table.Table:
    table = rich.table.Table(*columns, show_lines=True)
    for row in found:
        defaults = ", ".join(f"{key}={value}" for key, value in row["defaults"].items())
        kind = row.get("source", row["category"])
        takes = f"{row['state_bytes']:.3g}" if "state_bytes" in row else ", ".join(row["inputs"])
        cells = [kind, " ".join(row["papers"]), takes, defaults, row["proof"]]
        table.add_row(row["name"], *map(rich.markup.escape, cells))
    return table


if __name__ == "__main__":
    main(sys.argv[1:])

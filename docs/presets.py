"""Writes the table of presets into README.md: python docs/presets.py. A test keeps the table true."""

import collections
import pathlib

import zoo
from zoo.core.params import count, nbytes
from zoo.models import PRESETS

README = pathlib.Path(__file__).parents[1] / "README.md"
START, END = "<!-- presets: python docs/presets.py -->", "<!-- end of presets -->"
LISTED = 8  # sublayers of a pattern


def table() -> str:
    """A Markdown table of every preset: pattern, parameters, published count, state bytes per row, source."""
    lines = [
        "| preset | pattern | parameters | published | state, 4k tokens | state, 1M tokens | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in PRESETS.items().items():
        model = zoo.create(name, dtype="bfloat16")
        config = model.config
        stages = {name: _pattern([key.partition("_")[2] for key in subs]) for name, subs in config.stages().items()}
        stages["layers"] = f"({stages['layers']}) x {config.repeats}"
        pattern = "; ".join(stages.values())
        published = f"{entry.parameters:,.1f}M" if entry.parameters else ""
        state = [_size(nbytes(model.state_specs(1, length))) for length in (4096, 1 << 20)]
        lines.append(
            f"| `{name}` | {pattern} | {count(model.param_specs()) / 1e6:,.1f}M | {published} | "
            f"{state[0]} | {state[1]} | {entry.citation} |"
        )
    return "\n".join(lines)


def _pattern(mixers: list[str]) -> str:
    """The mixers in order, or how many of each where that fills more than a line."""
    if len(mixers) > LISTED:
        return ", ".join(f"{number} {name}" for name, number in collections.Counter(mixers).items())
    return ", ".join(mixers)


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def updated(text: str) -> str:
    """README text with a fresh table between the markers."""
    before, rest = text.split(START)
    return f"{before}{START}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))

"""Writes the table of architectures into README.md and all presets into docs/gallery.md: python docs/gallery.py.

A test keeps both true.
"""

import collections
import inspect
import pathlib
import re

import zoo
from zoo.core.params import count, nbytes
from zoo.interop.families import HF_FAMILIES
from zoo.models import FAMILIES, PRESETS, LanguageModelConfig, language_model

README = pathlib.Path(__file__).parents[1] / "README.md"
GALLERY = pathlib.Path(__file__).with_name("gallery.md")
START, END = "<!-- architectures: python docs/gallery.py -->", "<!-- end of architectures -->"
LENGTHS = {"1k": 1 << 10, "32k": 1 << 15, "1M": 1 << 20}
LISTED = 8  # sublayers of a pattern
HEAD = """# Presets

What `zoo.describe(name)` says of every preset. FLOPs are of the forward pass, per token, at a context of so many
tokens; state is for one row, keys and values in bfloat16, recurrent state in float32. "Published" is the count that
was printed, where one was. Written by `python docs/gallery.py`.
"""


def families() -> dict[str, list[str]]:
    """Family -> its presets, in the order of registration."""
    found = collections.defaultdict(list)
    for name, entry in PRESETS.items().items():
        found[entry.family].append(name)
    return dict(found)


def block(family: str) -> str:
    """What the family says of itself in one line."""
    return (inspect.getdoc(FAMILIES.get(family)) or "").splitlines()[0].rstrip(".;")


def architectures() -> str:
    """A Markdown table of the families: block, presets with counts, Hugging Face model types, papers."""
    lines = ["| family | one layer | presets | Hugging Face | papers |", "|---|---|---|---|---|"]
    for family, names in families().items():
        sizes = [count(zoo.create(name).param_specs()) for name in names]
        types = sorted(name for name, entry in HF_FAMILIES.items() if entry.family == family)
        papers = [
            paper for name in names for paper in re.findall(r"arXiv:(\S+?)(?=[,;\s]|$)", PRESETS.get(name).citation)
        ]
        cells = (
            f"[`{family}`](docs/gallery.md#{family})",
            block(family).replace("|", "\\|"),
            f"{len(names)}, up to {_parameters(max(sizes))}",
            ", ".join(f"`{name}`" for name in types),
            ", ".join(dict.fromkeys(papers)),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gallery() -> str:
    """The page of all presets."""
    parts = [HEAD]
    heads = [f"{what}, {length}" for what in ("FLOPs/token", "state") for length in LENGTHS]
    columns = ["preset", "pattern", "parameters", "published", *heads, "source"]
    for family, names in families().items():
        parts += [f"## {family}\n", f"{block(family)}.\n"]
        parts += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *map(_row, names), ""]
    return "\n".join(parts)


def _row(name: str) -> str:
    entry, model = PRESETS.get(name), zoo.create(name, dtype="bfloat16")
    config = model.config
    flops = [language_model.flops_per_token(config, length) for length in LENGTHS.values()]
    state = [nbytes(model.state_specs(1, length)) for length in LENGTHS.values()]
    cells = (
        f"`{name}`",
        _pattern(config),
        _parameters(count(model.param_specs())),
        f"{entry.parameters:,.1f}M" if entry.parameters else "",
        *(_scaled(value, "") for value in flops),
        *(_scaled(value, "B") for value in state),
        entry.citation,
    )
    return "| " + " | ".join(cells) + " |"


def _pattern(config: LanguageModelConfig) -> str:
    """The mixers of every stage in order, or how many of each where that fills more than a line."""
    stages = []
    for stage, sublayers in config.stages().items():
        mixers = [key.partition("_")[2] for key in sublayers]
        if len(mixers) > LISTED:
            mixers = [f"{number} {name}" for name, number in collections.Counter(mixers).items()]
        listed = ", ".join(mixers)
        stages.append(f"({listed}) x {config.repeats}" if stage == "layers" else listed)
    return "; ".join(stages)


def _parameters(number: int) -> str:
    return f"{number / 1e6:,.1f}M"


def _scaled(size: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G"):
        if size < 1000:
            return f"{size:.3g} {prefix}{unit}".strip()
        size /= 1000
    return f"{size:.3g} T{unit}"


def updated(text: str) -> str:
    """README text with a fresh table between the markers."""
    before, rest = text.split(START)
    return f"{before}{START}\n\n{architectures()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
    GALLERY.write_text(gallery())

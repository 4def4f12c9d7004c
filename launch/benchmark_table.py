"""The rows of mode=benchmark: printed, and appended to a Markdown page with what they were measured on."""

import dataclasses
import datetime
import importlib.metadata
import pathlib
import platform
import subprocess
from collections.abc import Iterable, Mapping

import jax
import rich.console
import rich.table

from launch.config import ConfigError

COLUMNS = ("name", "metric", "ours", "peer", "ratio", "note")
_PACKAGES = {"tpu": ("jax", "jaxlib", "libtpu"), "gpu": ("jax", "jaxlib"), "cpu": ("jax", "jaxlib")}


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes: name; metric with its unit; ours; peer; ratio, > 1 when ours is better; what is None was not measured,
    and note says why.
    """

    name: str
    metric: str
    ours: float | None = None
    peer: float | None = None
    ratio: float | None = None
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """Texts of the columns."""
        ours, peer = ("" if number is None else f"{number:,.4g}" for number in (self.ours, self.peer))
        return self.name, self.metric, ours, peer, "" if self.ratio is None else f"{self.ratio:.2f}x", self.note


def show(rows: Iterable[Row], title: str) -> None:
    """Prints the rows."""
    table = rich.table.Table(*COLUMNS, title=title)
    for row in rows:
        table.add_row(*row.cells())
    rich.console.Console(width=160).print(table)


def facts(threads: int, **versions: str) -> dict[str, str]:
    """What the numbers are measured on and with; `versions` are those of packages in other processes."""
    device = jax.devices()[0]
    cpu = platform.processor() or platform.machine()
    if (info := pathlib.Path("/proc/cpuinfo")).exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES.get(device.platform, ("jax", "jaxlib"))}
    if device.platform == "gpu":
        packages["platform"] = " ".join(device.client.platform_version.split())
    return {
        "device": cpu if device.platform == "cpu" else device.device_kind,
        "cpu": cpu,
        "threads": str(threads),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        **packages,
        **versions,
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        root = pathlib.Path(__file__).parents[1]
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + (
            " with changes" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def check_page(path: str) -> None:
    """Raises ConfigError, before anything is measured, where `append` could not write."""
    page = pathlib.Path(path).expanduser()
    if page.is_dir() or not page.parent.is_dir():
        raise ConfigError(f"config.benchmark.record={path!r} must be a file in a folder that exists")


def append(path: str, rows: Iterable[Row], measured: Mapping[str, str], title: str) -> None:
    """Appends a section with a table to a Markdown page; the page is made where there is none."""
    page = pathlib.Path(path).expanduser()
    before = page.read_text().rstrip("\n") + "\n\n" if page.exists() else ""
    about = ", ".join(f"{name} {value}" for name, value in measured.items() if name not in ("device", "date"))
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row.cells()) + " |")
    heading = f"## Benchmark of {measured['date']}, {measured['device']}"
    page.write_text(f"{before}{heading}\n\n{title}; {about}.\n\n" + "\n".join(lines) + "\n")

"""metrics.csv, TensorBoard and the screen."""

import csv
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.progress
import rich.table
import tensorboardX

# Wall-clock columns stand last: all others of a resumed run equal those of an uninterrupted one.
CLOCK = ("tokens_per_second", "seconds")
FIRST = ("step", "loss", "grad_norm", "param_norm", "learning_rate", "tokens")
VALIDATION = ("validation_loss", "validation_bits_per_byte", "validation_accuracy", "validation_reward")


class Table:
    """metrics.csv: one row per step; numbers are written so that reading them gives back the same float.

    Args:
      path: the file. Rows after `step` are dropped: a resumed run writes them again.
      step: the step to go on from.
    """

    def __init__(self, path: pathlib.Path, step: int):
        self._path = path
        rows = [row for row in read_csv(path) if int(row["step"]) <= step] if path.exists() else []
        self._columns = list(rows[0]) if rows else []
        self.seconds = float(rows[-1]["seconds"]) if rows else 0.0
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "w", newline="") as file:
            if rows:
                writer = csv.DictWriter(file, self._columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        partial.replace(path)
        self._file = open(path, "a", newline="")  # noqa: SIM115 (closed in close)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row and hands it to the operating system, so that it survives the death of this process."""
        if not self._columns:
            own = sorted(key for key in row if key not in (*FIRST, *VALIDATION, *CLOCK))
            self._columns = [*FIRST, *own, *VALIDATION, *CLOCK]
            csv.writer(self._file, lineterminator="\n").writerow(self._columns)
        self._file.write(",".join(_exact(row.get(column, "")) for column in self._columns) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _exact(value: Any) -> str:
    return repr(float(value)) if isinstance(value, float) else str(value)


def read_csv(path: pathlib.Path) -> list[dict[str, str]]:
    """The complete rows of a metrics.csv; a line that a killed process left unfinished is not one."""
    text = path.read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return list(csv.DictReader(lines))


class Board:
    """TensorBoard event files; steps after `step` of an earlier run of this workdir are purged."""

    def __init__(self, directory: pathlib.Path, step: int):
        self._writer = tensorboardX.SummaryWriter(str(directory), purge_step=step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """One scalar per number of a row."""
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key.replace("validation_", "validation/"), value, row["step"])

    def close(self) -> None:
        """Writes what is pending."""
        self._writer.close()


class Meter:
    """Tokens per second of training alone; the first step, which compiles, and pauses are left out."""

    def __init__(self):
        self._last: float | None = None
        self.tokens = 0
        self.seconds = 0.0

    def tick(self, tokens: int) -> float | None:
        """Counts a finished step; its tokens per second, or None for the first one and after a pause."""
        now = time.perf_counter()
        last, self._last = self._last, now
        if last is None:
            return None
        self.tokens += tokens
        self.seconds += now - last
        return tokens / max(now - last, 1e-9)

    def pause(self) -> None:
        """Something else than training goes on until the next tick."""
        self._last = None

    @property
    def rate(self) -> float | None:
        """Mean tokens per second so far."""
        return self.tokens / self.seconds if self.seconds else None


class Screen:
    """A progress bar with loss, tokens/s and ETA on a terminal; lines every `every` steps elsewhere.

    Args:
      steps: where the run ends.
      start: where it begins.
      every: steps between lines.
    """

    def __init__(self, steps: int, start: int, every: int, quiet: bool = False):
        self._steps, self._start, self._every, self._quiet = steps, start, every, quiet
        self._rate: float | None = None
        self._began = time.perf_counter()
        self._bar: rich.progress.Progress | None = None
        if sys.stdout.isatty() and not quiet:
            self._bar = rich.progress.Progress(
                *rich.progress.Progress.get_default_columns()[:2],
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[text]}"),
                rich.progress.TextColumn("ETA"),
                rich.progress.TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("train", total=steps, completed=start, text="")
            self._bar.start()

    def step(self, row: Mapping[str, Any]) -> None:
        """Shows a row of metrics."""
        rate = row.get("tokens_per_second")
        if rate:
            self._rate = rate if self._rate is None else 0.9 * self._rate + 0.1 * rate
        text = f"loss {row['loss']:.4f}" + (f"  {self._rate:,.0f} tokens/s" if self._rate else "")
        step = row["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif not self._quiet and (step % self._every == 0 or step == self._steps):
            per_step = (time.perf_counter() - self._began) / max(step - self._start, 1)
            eta = time.strftime("%H:%M:%S", time.gmtime(per_step * (self._steps - step)))
            print(f"step {step}/{self._steps}  {text}  ETA {eta}", flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text)
        elif not self._quiet:
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.stop()


def print_table(title: str, rows: Mapping[str, float], unit: str) -> None:
    """A two-column table on the screen, best (lowest) first."""
    table = rich.table.Table(title=title)
    table.add_column("")
    table.add_column(unit, justify="right")
    for name, value in sorted(rows.items(), key=lambda item: item[1] if math.isfinite(item[1]) else math.inf):
        table.add_row(name, f"{value:.4f}")
    rich.console.Console().print(table)


class Report:
    """All of the above for one run; on processes other than the first it writes and shows nothing.

    Args:
      workdir: where metrics.csv and tensorboard/ go.
      step: the step the run goes on from.
      steps: where it ends.
      every: steps between lines on a screen that is no terminal.
      tensorboard: whether event files are written.
      primary: whether this is the first process.
    """

    def __init__(self, workdir: pathlib.Path, *, step: int, steps: int, every: int, tensorboard: bool, primary: bool):
        self.meter = Meter()
        self._began = time.perf_counter()
        self._table = Table(workdir / "metrics.csv", step) if primary else None
        self._board = Board(workdir / "tensorboard", step) if primary and tensorboard else None
        self._screen = Screen(steps, step, every, quiet=not primary)

    def write(self, row: dict[str, Any]) -> None:
        """A finished step, with its clock columns."""
        if self._table is not None:
            row["seconds"] = self._table.seconds + time.perf_counter() - self._began
            self._table.write(row)
        if self._board is not None:
            self._board.write(row)
        self._screen.step(row)

    def say(self, text: str) -> None:
        """A line on the screen."""
        self._screen.say(text)

    def close(self) -> None:
        """Closes files and screen."""
        self._screen.close()
        for part in (self._table, self._board):
            if part is not None:
                part.close()

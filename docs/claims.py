"""Claims of papers in the small: runs the configs, and writes docs/claims.md and its pictures from what they leave.

    python docs/claims.py state_tracking --seeds=3 --runs=runs/claims

Runs that have ended are not repeated, so the same command goes on where it stopped; --seeds=0 only writes the page.
"""

import argparse
import csv
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).parents[1]
PAGE = pathlib.Path(__file__).with_name("claims.md")
RECENT = 5  # rows of metrics.csv at the end of a run whose mean is its training accuracy


@dataclasses.dataclass(frozen=True)
class Claim:
    """Variants of one config that differ in the architecture, and what of their runs is compared.

    Attributes:
      title, text: of its section.
      config: the launch config; a variant is `config:name`.
      variants: names.
      measures: column of the table -> column of metrics.csv.
      guess: what chance reaches, drawn as a line.
    """

    title: str
    text: str
    config: str
    variants: tuple[str, ...]
    measures: dict[str, str]
    guess: float


CLAIMS = {
    "state_tracking": Claim(
        "State tracking",
        "Products of permutations of three things: the target at every token is the product of all so far "
        "(arXiv:2404.08819). Recurrences that are not linear in their state can hold it at any length; attention and "
        "linear recurrences with diagonal, positive transitions need depth that grows with the length. Trained on rows "
        "of 12 tokens, of which the last ones, new to the model, give the first column, and evaluated on rows of 48. "
        "Of the nonlinear recurrences the one with exponential gates holds the state beyond what it was trained on; "
        "the vanilla LSTM, at the same learning rate, does not learn the short rows reliably.",
        "launch/configs/state_tracking.py",
        ("slstm", "lstm", "mamba", "attention"),
        {"12 tokens": "accuracy", "48 tokens": "validation_accuracy"},
        1 / 6,
    ),
}


def run(claim: Claim, seeds: int, runs: pathlib.Path) -> None:
    """Trains what has not been trained yet, one run at a time."""
    for seed in range(seeds):
        for variant in claim.variants:
            workdir = runs / variant / str(seed)
            if (workdir / "summary.json").exists():
                continue
            options = [f"--config.seed={seed}", "--config.log.tensorboard=False", f"--workdir={workdir}"]
            command = [sys.executable, "launch/main.py", f"--config={claim.config}:{variant}", *options]
            subprocess.run(command, cwd=ROOT, check=True)


def collect(claim: Claim, runs: pathlib.Path) -> dict[str, dict[str, list[float]]]:
    """{variant: {column of the table: a value per seed, and "parameters", "seconds"}} of the runs that have ended."""
    found: dict[str, dict[str, list[float]]] = {}
    for variant in claim.variants:
        values = found.setdefault(variant, {name: [] for name in (*claim.measures, "parameters", "seconds")})
        for path in sorted((runs / variant).glob("*/summary.json")):
            summary = json.loads(path.read_text())
            with open(path.with_name("metrics.csv")) as file:
                rows = list(csv.DictReader(file))
            for name, column in claim.measures.items():
                numbers = [float(row[column]) for row in rows if row[column]]
                last = 1 if column.startswith("validation") else RECENT
                values[name].append(statistics.fmean(numbers[-last:]))
            values["parameters"].append(summary["parameters"])
            values["seconds"].append(summary["wall_seconds"])
    return found


def section(name: str, claim: Claim, found: dict[str, dict[str, list[float]]]) -> str:
    """The claim's part of the page: mean and standard deviation over seeds."""
    lines = [f"## {claim.title}\n", textwrap.fill(claim.text, 120) + "\n"]
    columns = ["model", "parameters", *claim.measures, "seeds", "seconds per run"]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for variant, values in found.items():
        cells = [f"`{variant}`", f"{values['parameters'][0]:,.0f}", *(_spread(values[m]) for m in claim.measures)]
        cells += [str(len(values["parameters"])), f"{statistics.fmean(values['seconds']):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        f"\nChance is {claim.guess:.3f}. `python docs/claims.py {name}`\n",
        f"![{claim.title}](claims_{name}.png)\n",
    ]
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def picture(name: str, claim: Claim, found: dict[str, dict[str, list[float]]]) -> None:
    """Bars with the standard deviation over seeds, and every seed as a dot."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3))
    width = 0.8 / len(claim.measures)
    for i, measure in enumerate(claim.measures):
        at = [k + (i - (len(claim.measures) - 1) / 2) * width for k in range(len(found))]
        series = [values[measure] for values in found.values()]
        errors = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in series]
        axes.bar(at, [statistics.fmean(v) for v in series], width, yerr=errors, capsize=3, label=measure, alpha=0.7)
        for x, values in zip(at, series, strict=True):
            axes.plot([x] * len(values), values, "k.", markersize=4)
    axes.axhline(claim.guess, color="grey", linestyle=":", label="chance")
    axes.set_xticks(range(len(found)), list(found))
    axes.set_ylabel("accuracy")
    axes.legend()
    figure.tight_layout()
    figure.savefig(PAGE.with_name(f"claims_{name}.png"), dpi=120)


def updated(text: str, name: str, part: str) -> str:
    """The page with a fresh section between the claim's markers."""
    start, end = f"<!-- {name}: python docs/claims.py {name} -->", f"<!-- end of {name} -->"
    if start not in text:
        text = f"{text.rstrip()}\n\n{start}\n{end}\n"
    before, rest = text.split(start)
    return f"{before}{start}\n\n{part}\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("claim", choices=sorted(CLAIMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/claims"))
    options = parser.parse_args()
    claim, runs = CLAIMS[options.claim], options.runs.resolve() / options.claim
    run(claim, options.seeds, runs)
    found = collect(claim, runs)
    missing = [variant for variant, values in found.items() if not values["parameters"]]
    if missing:
        parser.error(f"no run of {', '.join(missing)} has ended in {runs}; give --seeds=1 or more")
    PAGE.write_text(updated(PAGE.read_text(), options.claim, section(options.claim, claim, found)))
    picture(options.claim, claim, found)


if __name__ == "__main__":
    main()

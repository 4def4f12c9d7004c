"""Pictures of a run."""

import pathlib

import matplotlib
from matplotlib.figure import Figure

from launch.metrics import read_csv

matplotlib.use("Agg")


def plot_loss(metrics: pathlib.Path, picture: pathlib.Path) -> None:
    """Training and validation loss over steps, from metrics.csv, as a PNG."""
    rows = read_csv(metrics)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows], lw=0.8, label="training")
    evaluated = [r for r in rows if r["validation_loss"]]
    if evaluated:
        steps = [int(r["step"]) for r in evaluated]
        axes.plot(steps, [float(r["validation_loss"]) for r in evaluated], "o-", ms=4, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture)

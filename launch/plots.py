"""Pictures of a run."""

import pathlib
from collections.abc import Sequence
from typing import Any

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


def plot_lengths(picture: pathlib.Path, rows: Sequence[Any], title: str) -> None:
    """One panel per metric over sequence length, ours beside the peer; rows named "<model>, <length> tokens"."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    figure = Figure(figsize=(5 * len(metrics), 4), dpi=120, layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        chosen = [row for row in rows if row.metric == metric]
        lengths = [int(row.name.split(", ")[1].split()[0].replace(",", "")) for row in chosen]
        axes.loglog(lengths, [row.ours for row in chosen], "o-", label="Samba")
        axes.loglog(lengths, [row.peer for row in chosen], "s--", label="transformer twin")
        axes.set(xlabel="tokens", title=metric)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(picture)

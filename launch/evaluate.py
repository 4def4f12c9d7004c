"""Bits per byte on held-out documents."""

import itertools
import math
import pathlib
from typing import Any

import jax

from launch import data as data_lib
from launch import run as run_lib
from launch.config import write_json
from launch.metrics import print_table
from launch.run import Run


def evaluate(run: Run, params: Any, batches: int = 0) -> dict[str, float]:
    """Loss and bits per byte of parameters on the held-out documents.

    bits_per_byte = sum of nll in nats / (ln 2 * bytes of the targets' text), over tokens and ends of documents.

    Args:
      run: the run.
      params: parameters on the run's mesh.
      batches: how many batches; 0 = all documents.

    Returns:
      loss (nats per token), bits_per_byte, and the other means that the objective reports.
    """
    iterator = data_lib.evaluation_batches(run.data, run.config)
    key = jax.random.key(run.config["seed"])
    totals: dict[str, float] = {}
    with run.active():
        pending = None
        for batch in itertools.islice(iterator, batches or None):
            sums = run.eval_step(params, run.place(batch), key)
            _add(totals, pending)  # one batch late: the devices always have the next one to work on
            pending = sums
        _add(totals, pending)
    weight, num_bytes = totals.pop("weight"), totals.pop("bytes")
    means = {name: total / weight for name, total in totals.items()}
    return {"loss": means.pop("nll"), "bits_per_byte": totals["nll"] / (math.log(2) * num_bytes), **means}


def _add(totals: dict[str, float], sums: Any) -> None:
    if sums is not None:
        for name, value in jax.device_get(sums).items():
            totals[name] = totals.get(name, 0.0) + float(value)


def compare(run: Run, bits_per_byte: float) -> dict[str, float]:
    """Bits per byte of the model and of the baselines, also on the screen."""
    table = {run.config["model"]["name"]: bits_per_byte, **data_lib.baselines(run.data)}
    if jax.process_index() == 0:
        print_table("held-out documents", table, "bits per byte")
    return table


def run(config: Any, workdir: pathlib.Path) -> None:
    """mode=evaluate: evaluates a checkpoint of the workdir and writes evaluation.json."""
    this = run_lib.build(config, workdir)
    step, params = this.restore_params()
    result = evaluate(this, params)
    table = compare(this, result["bits_per_byte"])
    if jax.process_index() == 0:
        write_json(workdir / "evaluation.json", {"step": step, **result, "bits_per_byte_of": table})
        print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.items()))

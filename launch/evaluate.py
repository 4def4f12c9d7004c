"""Bits per byte on held-out documents; loss and accuracy on held-out examples of a task."""

import itertools
import math
import pathlib
from typing import Any

import jax

from launch import data as data_lib
from launch import references
from launch import run as run_lib
from launch.config import write_json
from launch.metrics import print_table
from launch.run import Run

VALIDATION_STEP = 1 << 30  # steps of rollouts that no training reaches


def evaluate(run: Run, params: Any, batches: int = 0) -> dict[str, float]:
    """Loss, accuracy and, of text, bits per byte of parameters on what is held out.

    Means are over the targets that the loss mask counts. bits_per_byte = sum of nll in nats / (ln 2 * bytes of the
    targets' text), over tokens and ends of documents.

    Args:
      run: the run.
      params: parameters on the run's mesh.
      batches: how many batches; 0 = all.

    Returns:
      loss (nats per target), bits_per_byte where there is text, and the other means that the objective reports.
    """
    iterator = data_lib.evaluation_batches(run.data, run.config)
    key = jax.random.key(run.config["seed"])
    totals: dict[str, float] = {}
    with run.active():
        pending = None
        for index, batch in enumerate(itertools.islice(iterator, batches or None)):
            batch = run.prepare(batch, params, VALIDATION_STEP + index, "validation")
            # What an objective draws (times, masks) is of the seed and the batch: the same in every evaluation.
            sums = run.eval_step(params, run.place(batch), jax.random.fold_in(key, index), run.teacher)
            _add(totals, pending)  # one batch late: the devices always have the next one to work on
            pending = sums
        _add(totals, pending)
    weight, num_bytes = totals.pop("weight"), totals.pop("bytes", None)
    loss_sum = totals.pop("loss_sum")
    loss_sum = totals.pop("nll", loss_sum)  # of language models: without what an objective adds to it
    of_text = {} if num_bytes is None else {"bits_per_byte": loss_sum / (math.log(2) * num_bytes)}
    return {"loss": loss_sum / weight, **of_text, **{name: total / weight for name, total in totals.items()}}


def _add(totals: dict[str, float], sums: Any) -> None:
    if sums is not None:
        for name, value in jax.device_get(sums).items():
            totals[name] = totals.get(name, 0.0) + float(value)


def describe(run: Run, result: dict[str, float]) -> str:
    """The data's metrics out of what `evaluate` returned, as one line."""
    return ", ".join(f"{name.replace('_', ' ')} {result[name]:.4f}" for name in run.metrics)


def compare(run: Run, result: dict[str, float]) -> dict[str, float]:
    """The data's first metric, of the model and of the baselines, also on the screen."""
    metric = run.metrics[0]
    table = {run.config["model"]["name"]: result[metric], **data_lib.baselines(run.data, run.config)}
    if jax.process_index() == 0:
        print_table(f"held-out {run.data.unit}", table, metric.replace("_", " "))
    return table


def run(config: Any, workdir: pathlib.Path) -> None:
    """mode=evaluate: evaluates a checkpoint of the workdir and writes evaluation.json."""
    this = references.precompute(run_lib.build(config, workdir))
    step, params = this.restore_params()
    result = evaluate(this, params)
    table = compare(this, result)
    if jax.process_index() == 0:
        write_json(workdir / "evaluation.json", {"step": step, **result, f"{this.metrics[0]}_of": table})
        print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.items()))

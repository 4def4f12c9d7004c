"""mode=train: the loop, readable top to bottom."""

import collections
import contextlib
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from launch import config as config_lib
from launch import data as data_lib
from launch import evaluate as evaluate_lib
from launch import flops as flops_lib
from launch import generate as generate_lib
from launch import references
from launch import run as run_lib
from launch.checkpoints import Checkpoints
from launch.metrics import VALIDATION, Report
from launch.plots import plot_loss
from launch.run import Run
from launch.step import TrainState
from zoo.core.params import count


class NotFiniteError(RuntimeError):
    """A step whose loss, gradients or parameters were not finite; its batch lies in the file that the message names."""


@contextlib.contextmanager
def sigterm_event() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, instead of ending the process."""
    event = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, previous)


def _must_stop(event: threading.Event, step: int) -> bool:
    """Whether to stop after `step`; processes agree on it."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return event.is_set()


class Pending:
    """Steps that were dispatched and not yet looked at.

    Reading the metrics of a step waits for it, so they are read one step late, when the next one is already queued.
    The host copy of a batch is kept until its step is known to be finite.
    """

    def __init__(self, run: Run, report: Report):
        self._run, self._report = run, report
        self._steps: collections.deque[tuple[int, dict[str, np.ndarray], Any]] = collections.deque()
        self._tokens = run.config["batch_size"] * run.config["sequence_length"]

    def add(self, step: int, batch: dict[str, np.ndarray], metrics: dict[str, jax.Array]) -> None:
        """Files a dispatched step (counted from 1)."""
        self._steps.append((step, batch, metrics))

    def read(self, keep: int) -> dict[str, Any] | None:
        """Reads all but the newest `keep` steps and writes their rows; the newest of all is returned unwritten.

        Raises:
          NotFiniteError: a step was not finite.
        """
        row = None
        while len(self._steps) > keep:
            if row is not None:
                self._report.write(row)
            step, batch, metrics = self._steps.popleft()
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
            if not values.pop("finite"):
                self._stop(step, batch, values)
            rate = self._report.meter.tick(self._tokens)
            row = {"step": step, **values, "tokens_per_second": "" if rate is None else rate}
        return row

    def _stop(self, step: int, batch: dict[str, np.ndarray], values: dict[str, float]) -> None:
        index = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._run.workdir / f"nan_batch_step_{step}{index}.npz"
        np.savez(path, allow_pickle=False, **batch)
        facts = ", ".join(f"{key} {values[key]}" for key in ("loss", "grad_norm", "param_norm"))
        raise NotFiniteError(
            f"step {step} is not finite ({facts}); its update was not applied, its batch is in {path}, "
            "and no checkpoint was written after it"
        )


def _start(run: Run, checkpoints: Checkpoints, iterator: Any) -> TrainState:
    """The newest checkpoint, or step 0; iterator and config.json follow."""
    if checkpoints.latest is None:
        state = run.init()
    else:
        run.check_resume()
        state = checkpoints.restore(run.abstract, iterator)
    if jax.process_index() == 0:
        config_lib.save(run.saved_config, run.config, data_fingerprint=run.fingerprint)
    return state


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train(run: Run, stop: threading.Event) -> tuple[TrainState, dict[str, Any]] | None:
    """Trains to config.steps; returns the last state and facts for the summary, or None when told to stop."""
    config = run.config
    checkpoints = run.checkpoints()
    iterator = data_lib.train_batches(run.data, config, run.forget)
    state = _start(run, checkpoints, iterator)
    step = start = int(state.step)
    report = Report(
        run.workdir,
        step=start,
        steps=config["steps"],
        every=config["log"]["every"],
        tensorboard=config["log"]["tensorboard"],
        primary=jax.process_index() == 0,
    )
    report.say(
        f"{config['model']['name']}: {count(run.model.param_specs()):,} parameters, {run.mesh.size} x "
        f"{jax.devices()[0].device_kind}, " + (f"resumed at step {start}" if start else "a new run")
    )
    pending = Pending(run, report)
    stopped = False
    try:
        while step < config["steps"] and not stopped:
            batch = next(iterator, None)
            if batch is None:
                raise config_lib.ConfigError(
                    f"the data ends after {step} of {config['steps']} steps; "
                    "raise config.data.epochs or lower config.steps"
                )
            batch = run.prepare(batch, state.params, step)
            # Nothing but the batch goes to the devices, and nothing comes back before the metrics are read.
            with run.active(), jax.transfer_guard("disallow"):
                state, metrics = run.train_step(state, run.place(batch), run.teacher)
            step += 1
            pending.add(step, batch, metrics)

            stopped = _must_stop(stop, step)
            evaluated = _due(step, config["evaluate"]["every"])
            save = evaluated or stopped or step == config["steps"] or _due(step, config["checkpoint"]["every"])
            row, validated = pending.read(keep=0 if save else 1), None
            if evaluated and row is not None:
                result = evaluate_lib.evaluate(run, run.evaluation_params(state), config["evaluate"]["batches"])
                scores = {f"validation_{key}": value for key, value in result.items()}
                row |= {key: value for key, value in scores.items() if key in VALIDATION}
                report.say(f"step {step}/{config['steps']}  validation {evaluate_lib.describe(run, result)}")
                validated = {run.metrics[0]: result[run.metrics[0]]}
            if row is not None:
                report.write(row)
            if save:  # after the row is on disk: metrics.csv never lacks a step that a checkpoint has
                checkpoints.save(step, state, iterator, validated)
                report.meter.pause()
    finally:
        report.close()
        checkpoints.close()
    if step < config["steps"]:
        report.say(f"stopped by SIGTERM; saved step {step}")
        return None
    return state, {"step": step, "tokens_per_second": report.meter.rate}


def _summarise(run: Run, state: TrainState, facts: dict[str, Any], began: float) -> None:
    """The final evaluation, summary.json, loss.png and samples.md."""
    params = run.evaluation_params(state)
    result = evaluate_lib.evaluate(run, params)
    table = evaluate_lib.compare(run, result)
    if jax.process_index() != 0:
        return
    rate, kind = facts["tokens_per_second"], jax.devices()[0].device_kind
    per_token = flops_lib.train_flops_per_token(run.model, run.config["sequence_length"])
    plot_loss(run.workdir / "metrics.csv", run.workdir / "loss.png")
    summary = {
        **facts,
        **{metric: result[metric] for metric in run.metrics},
        "validation": result,
        f"{run.metrics[0]}_of": table,
        "parameters": count(run.model.param_specs()),
        "model_flops_per_token": per_token,
        "mfu": None if rate is None else flops_lib.utilisation(per_token, rate, kind, run.mesh.size),
        "device_kind": kind,
        "devices": run.mesh.size,
        "wall_seconds": time.perf_counter() - began,
    }
    config_lib.write_json(run.workdir / "summary.json", summary)
    print(f"{evaluate_lib.describe(run, result)}; {run.workdir / 'summary.json'}")
    if run.data.tokenizer is None:
        return  # ids that stand for no text
    if not run.config["generate"]["prompts"]:
        return
    if jax.process_count() > 1:
        print("no samples.md: samples need one process, use --config.mode=generate")
    else:
        generate_lib.write_samples(run, params, facts["step"])


def run(config: Any, workdir: pathlib.Path) -> None:
    """mode=train: trains, or goes on where the workdir's run was stopped, to config.steps; then reports."""
    began = time.perf_counter()
    generate_lib.check(config, needed=False)
    with sigterm_event() as stop:
        this = references.precompute(run_lib.build(config, workdir))
        generate_lib.check_prompts(this)
        finished = train(this, stop)
    if finished is not None:
        _summarise(this, *finished, began)

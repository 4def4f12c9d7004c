"""Log-probabilities of the frozen reference for all responses of a run, computed once and kept in its workdir."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch import config as config_lib
from launch import data as data_lib
from launch import losses, responses
from launch.config import ConfigError
from launch.run import Run
from pipelines.sources import SPLITS
from zoo.core.params import flatten


def precompute(run: Run) -> Run:
    """The run with the reference's log-probabilities, and without its parameters, where config.teacher asks for it.

    They lie in `workdir/references/<split>.npy`, float32[examples, K, T] by the number of the example, and are reused
    by a run that goes on. Deterministic: a run with them trains as one that computes them in every step.

    Raises:
      ConfigError: the data are no responses, or there is no teacher.
    """
    if not run.config["teacher"].get("precompute"):
        return run
    if run.teacher is None and losses.category(run.config) == "preference":
        return run  # the objective reads no reference
    if run.teacher is None or not data_lib.of_responses(run.config) or run.rollout is not None:
        raise ConfigError("config.teacher.precompute needs data of given responses and an objective with a reference")
    if jax.process_count() > 1:
        raise ConfigError("config.teacher.precompute runs in one process; start the run there once")
    folder = run.workdir / "references"
    key = _fingerprint(run)
    if not (folder / "info.json").exists() or json.loads((folder / "info.json").read_text())["fingerprint"] != key:
        folder.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            np.save(folder / f"{split}.npy", _of_split(run, split))
        config_lib.write_json(folder / "info.json", {"fingerprint": key})
    references = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS}
    return dataclasses.replace(run, teacher=None, references=references)


def _fingerprint(run: Run) -> str:
    """What the numbers depend on."""
    parts = [run.data.fingerprint, run.config["sequence_length"], run.config["teacher"], run.config["initial"]]
    sums = {path: float(np.sum(np.asarray(leaf, np.float64))) for path, leaf in flatten(run.teacher).items()}
    return json.dumps([parts, sums], sort_keys=True)


def _of_split(run: Run, split: str) -> np.ndarray:
    model = run.teacher_model
    assert model is not None

    @jax.jit
    def logps(params: Any, batch: Any) -> Any:
        each = responses.logps(model, params, batch, run.config["implementation"])
        return jnp.stack([one.per_token for one in each], axis=1)

    found: dict[int, np.ndarray] = {}
    with run.active():
        for batch in data_lib.ordered_batches(run.data, run.config, split):
            values = jax.device_get(logps(run.teacher, run.place(batch)))
            found |= {
                int(i): row for i, row, m in zip(batch["index"], values, batch["loss_mask"], strict=True) if m.any()
            }
    return np.stack([found[i] for i in range(len(found))])

"""Checkpoints: parameters, optimiser, step, random key and data iterator, written in the background by Orbax.

A checkpoint appears under its final name only once it is complete, so a killed run leaves whole checkpoints and
temporary folders, and the latter are deleted at the next start.
"""

import pathlib
from typing import Any

import grain
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from launch.config import ConfigError


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they lie.
      keep_last: how many of the newest are kept.
      keep_best: how many of those with the best validation metric (the highest reward, the lowest of all others) are
        kept; ones that were not evaluated do not compete.
      metric: its name.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        metric: str = "bits_per_byte",
        read_only: bool = False,
    ):
        sign = -1.0 if metric == "reward" else 1.0
        keep: list[Any] = [checkpoint_managers.LatestN(keep_last)]
        if keep_best:
            keep.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: sign * metrics[metric],
                    reverse=True,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            best_fn=lambda metrics: sign * metrics[metric],
            best_mode="min",
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        self._directory = directory
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def find(self, which: str) -> int:
        """The step of "last", "best" or a step's digits.

        Raises:
          ConfigError: there is no such checkpoint.
        """
        steps = sorted(self._manager.all_steps())
        step = int(which) if which.isdigit() else {"last": self.latest, "best": self._manager.best_step()}[which]
        if step not in steps:
            raise ConfigError(f"no checkpoint {which!r} in {self._directory}; there are steps {steps or 'none'}")
        return step

    def save(self, step: int, state: Any, iterator: grain.DatasetIterator, metrics: dict[str, float] | None) -> None:
        """Starts to write a checkpoint; returns once state and iterator may change again."""
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=grain.checkpoint.CheckpointSave(iterator),
        )
        self._manager.save(step, args=items, metrics=metrics, force=True)

    def restore(self, state: Any, iterator: grain.DatasetIterator | None = None, step: int | None = None) -> Any:
        """The state saved at `step` (None = the newest that can be read), with `iterator` moved to where it was then.

        Args:
          state: abstract state with shardings; they may differ from those it was saved with.
          iterator: a fresh iterator over the same data, or None.
          step: None goes back to an older checkpoint when the newest is damaged, and deletes the damaged one.
        """
        if step is not None:
            return self._read(step, state, iterator)
        while (latest := self.latest) is not None:
            try:
                return self._read(latest, state, iterator)
            except Exception:
                older = [s for s in self._manager.all_steps() if s < latest]
                if not older:
                    raise
                logging.exception("checkpoint %d cannot be read; going back to %d", latest, max(older))
                self._manager.delete(latest)
        raise ConfigError(f"no checkpoint in {self._directory}")

    def _read(self, step: int, state: Any, iterator: grain.DatasetIterator | None) -> Any:
        items: dict[str, Any] = {"state": ocp.args.StandardRestore(state)}
        if iterator is not None:
            items["data"] = grain.checkpoint.CheckpointRestore(iterator)
        return self._manager.restore(step, args=ocp.args.Composite(**items))["state"]

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()

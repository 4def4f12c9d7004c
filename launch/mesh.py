"""Mesh, rules and the placement of batches."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from launch.config import ConfigError
from zoo.core.compat import make_mesh
from zoo.core.registry import check_keys
from zoo.core.sharding import MESH_AXES, Rules, partition_spec, resolve_rules


def initialise_processes() -> None:
    """Joins the other processes of the run when JAX_COORDINATOR_ADDRESS is set, or on a cluster that jax knows.

    Reads JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; the last two may be left to jax's cluster
    detection.
    """
    if "JAX_COORDINATOR_ADDRESS" not in os.environ or jax.distributed.is_initialized():
        return
    count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    jax.distributed.initialize(
        num_processes=None if count is None else int(count),
        process_id=None if index is None else int(index),
    )


def resolve_axes(axes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Mesh sizes with the one -1 replaced by what is left of `devices`.

    Raises:
      ConfigError: unknown axis, more than one -1, a size below 1, or sizes that do not fit the devices.
    """
    check_keys("mesh", axes, MESH_AXES)
    sizes = dict(axes)
    free = [name for name, size in sizes.items() if size == -1]
    bad = [name for name, size in sizes.items() if size != -1 and size < 1]
    if len(free) > 1 or bad:
        raise ConfigError(f"mesh {sizes}: sizes must be at least 1, and one of them may be -1")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if devices % fixed or (not free and fixed != devices):
        raise ConfigError(f"mesh {sizes} does not fit {devices} devices; the fixed sizes multiply to {fixed}")
    if free:
        sizes[free[0]] = devices // fixed
    return sizes


def make(config: Any, devices: list[Any] | None = None) -> tuple[Mesh, Rules]:
    """Mesh and rule table of a run config."""
    devices = jax.devices() if devices is None else devices
    mesh = make_mesh(resolve_axes(config["mesh"], len(devices)), devices)
    overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in config["rules"]["overrides"].items()}
    return mesh, resolve_rules(config["rules"]["name"], overrides)


def batch_sharding(shape: tuple[int, ...], mesh: Mesh, rules: Rules, length: int | None = None) -> NamedSharding:
    """Sharding of a batch leaf [B, ..., T], or of one that does not end in T where T = `length` is given."""
    names: list[str | None] = ["batch", *[None] * (len(shape) - 1)]
    if len(shape) > 1 and length in (None, shape[-1]):
        names[-1] = "time"
    return NamedSharding(mesh, partition_spec(tuple(names), shape, rules, mesh, "batch"))


def place(batch: Mapping[str, np.ndarray], mesh: Mesh, rules: Rules) -> dict[str, jax.Array]:
    """Global arrays from this process's rows of a batch."""
    placed, length = {}, batch["tokens"].shape[-1]
    with jax.transfer_guard_host_to_device("allow"):  # this transfer is meant, whatever the caller guards against
        for key, rows in batch.items():
            shape = (rows.shape[0] * jax.process_count(), *rows.shape[1:])
            placed[key] = jax.make_array_from_process_local_data(
                batch_sharding(shape, mesh, rules, length), rows, shape
            )
    return placed

"""Logical axes to mesh axes.

Parameters and state carry logical axis names; a rule table says which mesh axis each one is split over. Data, ZeRO,
tensor and context parallelism are different tables, not different code.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zoo.core.params import Spec, Tree, map_specs
from zoo.core.registry import nearest

MESH_AXES = ("data", "fsdp", "context", "tensor", "expert")

Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Mapping[str, Rules] = {
    "dp": {"batch": ("data",)},
    "fsdp": {"batch": ("data", "fsdp"), "embed": "fsdp"},
    "fsdp_tp": {
        "batch": ("data", "fsdp"),
        "embed": "fsdp",
        "heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
        "inner": "tensor",
        "vocab": "tensor",
    },
}

# A context that jax.jit knows of: a function traced under one mesh or table is traced anew under another.
_ACTIVE = jax.make_user_context(default_value=None)


def resolve_rules(name: str, overrides: Rules | None = None) -> Rules:
    """The rule table called `name` with some axes replaced.

    Raises:
      ValueError: unknown table or mesh axis, with the nearest name.
    """
    if name not in RULES:
        raise ValueError(f"unknown rule table {name!r}; {nearest(name, RULES)}")
    rules = {**RULES[name], **(overrides or {})}
    for axis, target in rules.items():
        for mesh_axis in _as_tuple(target):
            if mesh_axis not in MESH_AXES:
                raise ValueError(f"rules[{axis!r}] names the mesh axis {mesh_axis!r}; {nearest(mesh_axis, MESH_AXES)}")
    return rules


def _as_tuple(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if target is None:
        return ()
    return (target,) if isinstance(target, str) else tuple(target)


def partition_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules, mesh: Any, name: str = "array"
) -> PartitionSpec:
    """The PartitionSpec of one array.

    A mesh axis splits at most one dimension: one that an earlier dimension took is left out for later ones (so "embed"
    shards parameters over `fsdp`, and not activations whose batch already is).

    Raises:
      ValueError: rank and axes differ, or a size is not divisible; the message names array, axis, sizes and a fix.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name} has shape {shape}, but {len(axes)} logical axes {axes}")
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        wanted = [m for m in _as_tuple(rules.get(axis) if axis else None) if mesh.shape.get(m, 1) > 1]
        mesh_axes = tuple(m for m in wanted if m not in used)
        ways = math.prod(mesh.shape[m] for m in mesh_axes)
        if size % ways:
            largest = math.gcd(size, ways)
            raise ValueError(
                f"{name}: axis {axis!r} of size {size} cannot be split {ways} ways over mesh axes {mesh_axes}; "
                f"use at most {largest} there, or set rules[{axis!r}]=None to replicate it"
            )
        used.update(mesh_axes)
        entries.append(mesh_axes or None)
    return PartitionSpec(*entries)


def shardings(specs: Tree, mesh: Mesh, rules: Rules) -> Tree:
    """NamedSharding for every Spec of a tree; errors name the parameter's path."""

    def one(path: str, spec: Spec) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(spec.axes, spec.shape, rules, mesh, path))

    return map_specs(one, specs)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Makes `constrain` act on this mesh and these rules while a function is traced."""
    table = tuple((axis, _as_tuple(target)) for axis, target in sorted(rules.items()))
    with _ACTIVE((mesh, table)), jax.set_mesh(mesh):
        yield


def active() -> tuple[Mesh, Rules] | None:
    """The mesh and rules in use, or None."""
    current = _ACTIVE.value
    return None if current is None else (current[0], dict(current[1]))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks for the sharding of an activation by its logical axes; x as it is when no mesh is in use."""
    current = active()
    if current is None:
        return x
    mesh, rules = current
    spec = partition_spec(axes, x.shape, rules, mesh, f"activation {axes}")
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def is_split(axis: str) -> bool:
    """Whether the mesh and rules in use divide the activations' logical axis `axis` over devices."""
    current = active()
    if current is None:
        return False
    mesh, rules = current
    return any(mesh.shape.get(name, 1) > 1 for name in _as_tuple(rules.get(axis)))

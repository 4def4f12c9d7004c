"""Which implementation of an op runs where.

Every op has the same names for its implementations: `reference` (slow and obvious), `xla` (chunked jnp, the floor on
every platform), `mosaic_tpu` and `mosaic_gpu` (Pallas kernels). A named implementation runs or raises
`UnsupportedError`; `None` takes, for each platform that is being lowered for, the first entry of `PRIORITY` that the
op has and that supports the call. Nothing falls back silently.

A Pallas kernel runs on one device's arrays: `partition.run` wraps an op in `jax.shard_map` where a mesh and rules are
in use. Under a mesh without them, over which the partitioner splits arrays, `None` passes it by and its name raises.
"""

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

IMPLEMENTATIONS = ("reference", "xla", "mosaic_tpu", "mosaic_gpu")

PRIORITY: Mapping[str, tuple[str, ...]] = {
    "cpu": ("xla",),
    "tpu": ("mosaic_tpu", "xla"),
    "cuda": ("xla",),  # the Hopper kernels serve by name alone until they have run on a GPU
}


class UnsupportedError(ValueError):
    """An implementation does not honour one of the arguments; the message names both."""


def check_implementation(op: str, implementation: str | None, available: Mapping[str, Any]) -> None:
    """Raises at the door when `implementation` is not a name that `op` has.

    Raises:
      ValueError: the name is no implementation at all.
      UnsupportedError: the name is known, but this op has no such implementation.
    """
    if implementation is None or implementation in available:
        return
    if implementation in IMPLEMENTATIONS:
        raise UnsupportedError(f"{op} has no {implementation!r} implementation; it has {sorted(available)}")
    nearest = difflib.get_close_matches(implementation, IMPLEMENTATIONS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"implementation={implementation!r} is not one of {IMPLEMENTATIONS} or None; did you mean {nearest!r}?"
    )


def run(
    op: str,
    available: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    supports: Mapping[str, Callable[..., None]] | None = None,
    **static: Any,
) -> Any:
    """Calls one of the `available` implementations as `f(*args, **static)`.

    Args:
      op: name of the op, for messages.
      available: implementation name -> function; all must return the same tree of shapes and dtypes.
      implementation: a name, or None for the platform's priority.
      *args: arrays (or None); they are what `jax.lax.platform_dependent` switches over.
      supports: implementation name -> function of the same arguments that raises `UnsupportedError` when
        the implementation cannot serve them. An implementation without an entry serves every call.
      **static: Python values, equal for all implementations.

    Returns:
      What the implementation returns.

    Raises:
      UnsupportedError: the named implementation cannot serve this call, or no implementation can.
    """
    check_implementation(op, implementation, available)
    supports = supports or {}
    if implementation is not None:
        _check_support(op, implementation, supports, args, static)
        return _once(available[implementation], **static)(*args)
    choice = {
        platform: _first_supported(op, names, available, supports, args, static) for platform, names in PRIORITY.items()
    }
    if len(set(choice.values())) == 1:
        return _once(available[choice["cpu"]], **static)(*args)
    branches = {platform: _once(available[name], **static) for platform, name in choice.items()}
    return jax.lax.platform_dependent(*args, default=branches.pop("cpu"), **branches)


@functools.cache
def _once(function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """`function` with its static arguments; calls with equal shapes trace it once, whatever platforms they are for."""
    return jax.jit(functools.partial(function, **static))


def _check_support(op, name, supports, args, static) -> None:
    if name.startswith("mosaic"):
        mesh = jax.sharding.get_abstract_mesh()
        split = [axis for axis, size in mesh.shape.items() if size > 1 and axis not in mesh.manual_axes]
        if split:
            raise UnsupportedError(
                f"{op}: {name} runs on the arrays of one device, and a mesh with the axes {split} is in use; "
                "state the rules with zoo.core.sharding.use, call it inside jax.shard_map, or take implementation='xla'"
            )
    if name in supports:
        supports[name](*args, **static)


def _first_supported(op, names, available, supports, args, static) -> str:
    reasons = []
    for name in names:
        if name not in available:
            continue
        try:
            _check_support(op, name, supports, args, static)
        except UnsupportedError as error:
            reasons.append(str(error))
            continue
        return name
    raise UnsupportedError(f"no implementation of {op} serves this call: {'; '.join(reasons)}")

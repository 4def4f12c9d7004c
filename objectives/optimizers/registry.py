"""Optimisers by name, each with its source and the test that proves it.

An optimiser is built as `build(learning_rate, **options)`, an `optax.GradientTransformation` whose updates are added
to the parameters. `learning_rate` is a number or a schedule; arguments that describe the parameters (a tree that says
where weight decay applies, a tree of Layouts) are not options: see `Entry.mask` and `Entry.layout`.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from objectives.optimizers.layout import Layout, of_params
from zoo.core.params import Tree
from zoo.core.registry import Registry, check_keys

Build = Callable[..., optax.GradientTransformation]
MASK, LAYOUT = "mask", "layout"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the catalogue knows of an optimiser.

    Attributes:
      build: `build(learning_rate, **options)`.
      papers: arXiv ids, the one that defines it first; none for those that are older.
      proof: the test that proves it, `file::function` below `tests/optimizers`.
      defaults: options and their defaults.
      mask: name of the argument that takes a boolean tree, True where weight decay applies; None = it takes none.
      layout: whether `build` takes `layout`, a tree of `layout.Layout`.
      source: "optax", or "here".
      evaluation_params: (state, params) -> the parameters to evaluate, where they are not those that are trained.
    """

    build: Build
    papers: tuple[str, ...]
    proof: str
    defaults: dict[str, Any]
    mask: str | None = None
    layout: bool = False
    source: str = "here"
    evaluation_params: Callable[[Any, Tree], Tree] | None = None


OPTIMIZERS: Registry[Entry] = Registry("optimizer")


def register(name: str, *, papers: tuple[str, ...], proof: str, source: str = "here") -> Callable[[Build], Build]:
    """Decorator that files a builder under `name`; its keyword-only arguments but mask and layout are the options."""

    def add(build: Build) -> Build:
        parameters = inspect.signature(build).parameters
        options = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
        mask = MASK if MASK in options else None
        defaults = {key: value for key, value in options.items() if key not in (MASK, LAYOUT)}
        OPTIMIZERS.register(name)(Entry(build, papers, proof, defaults, mask, LAYOUT in options, source))
        return build

    return add


def create(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    mask: Tree | None = None,
    layout: Tree | None = None,
    **options: Any,
) -> optax.GradientTransformation:
    """The optimiser called `name`.

    Args:
      name: one of `list_optimizers()`.
      learning_rate: a number, or a function of the step.
      mask: boolean tree, True where weight decay applies; None = everywhere. Left out where there is no decay.
      layout: tree of `Layout`, for those that treat layers or matrices by themselves; None = as the paths and shapes
        of the parameters tell (`layout.of_params`).
      **options: of this optimiser, e.g. b1=0.9.

    Raises:
      KeyError: unknown name, with the nearest one.
      ValueError: unknown option, with the nearest one, or a value that the optimiser refuses.
    """
    entry = OPTIMIZERS.get(name)
    check_keys(f"optimizer {name!r}", options, entry.defaults)
    structure = {entry.mask: mask} if entry.mask and mask is not None else {}
    if entry.layout:
        structure[LAYOUT] = layout
    return entry.build(learning_rate, **structure, **options)


def list_optimizers(source: str | None = None) -> list[str]:
    """Names of all optimisers, or of those from "optax" or written "here"."""
    return [name for name, entry in OPTIMIZERS.items().items() if source in (None, entry.source)]


def state_bytes(optimizer: optax.GradientTransformation, params: Tree) -> int:
    """Bytes of the optimiser's state; `params` may be abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, params)))


def example_params() -> Tree:
    """Abstract float32 parameters of 24 layers of width 1024 and an embedding of 32,768, for the catalogue's counts."""
    width, hidden, layers, vocabulary = 1024, 4096, 24, 32768
    shapes = {
        "embedding": (vocabulary, width),
        "layers": {
            "norm": (layers, width),
            **dict.fromkeys("qkvo", (layers, width, width)),
            "up": (layers, width, hidden),
            "down": (layers, hidden, width),
        },
    }
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))


def bytes_per_parameter(name: str) -> float:
    """Bytes of state per parameter of `example_params`, with default options."""
    params = example_params()
    layouts = of_params(params) | {"embedding": Layout()}
    return state_bytes(create(name, 1e-3, layout=layouts), params) / sum(leaf.size for leaf in jax.tree.leaves(params))

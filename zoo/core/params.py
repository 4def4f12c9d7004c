"""Parameters: plain nested dicts of arrays, declared once as trees of `Spec`.

Everything about a parameter that is not its value stands in its Spec: shape, dtype, initialiser, one logical axis name
per dimension, and tags. Arrays, abstract shapes, shardings, counts and optimiser masks are derived from the Spec tree.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Tree = Any
Initializer = Callable[..., jax.Array]

LAYERS = "layers"  # the logical axis along which repeated layers are stacked


@dataclasses.dataclass(frozen=True)
class Spec:
    """One parameter or state leaf.

    Attributes:
      shape: sizes.
      axes: one logical axis name per dimension, e.g. ("embed", "heads", "key").
      init: `init(key, shape, dtype) -> array`, compatible with jax.nn.initializers.
      dtype: storage dtype.
      inputs: number of leading dimensions that `linear` contracts; 0 for leaves that are not matrices.
      tags: marks for masks: "no_decay", "embedding", ...
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Initializer = jax.nn.initializers.zeros
    dtype: DTypeLike = jnp.float32
    inputs: int = 0
    tags: frozenset[str] = frozenset()

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"Spec of shape {self.shape} needs {len(self.shape)} axis names, got {self.axes}")
        if any(size < 1 for size in self.shape):
            raise ValueError(f"Spec sizes must be positive, got shape {self.shape} for axes {self.axes}")
        if not 0 <= self.inputs <= len(self.shape):
            raise ValueError(f"Spec.inputs must be in 0..{len(self.shape)}, got {self.inputs}")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return self.size * jnp.dtype(self.dtype).itemsize


def is_spec(leaf: Any) -> bool:
    """True for Spec leaves; use as `is_leaf`."""
    return isinstance(leaf, Spec)


def path_string(path: tuple[Any, ...]) -> str:
    """A key path of jax.tree_util as "layers/0_mamba/in_proj"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(tree: Tree) -> dict[str, Any]:
    """{path: leaf} of a tree of arrays or Specs, in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)[0]
    return {path_string(path): leaf for path, leaf in leaves}


def map_specs(fn: Callable[[str, Spec], Any], specs: Tree) -> Tree:
    """`fn(path, spec)` over every Spec of a tree."""
    return jax.tree_util.tree_map_with_path(lambda p, s: fn(path_string(p), s), specs, is_leaf=is_spec)


def stack(specs: Tree, repeats: int) -> Tree:
    """Adds a leading `layers` axis of size `repeats` to every Spec, for jax.lax.scan over layers."""
    return map_specs(lambda _, s: dataclasses.replace(s, shape=(repeats, *s.shape), axes=(LAYERS, *s.axes)), specs)


def unstack(tree: Tree, repeats: int) -> tuple[Tree, ...]:
    """The inverse of stacking, on arrays: a tuple with one tree per repeat."""
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(repeats))


def _key_of(key: jax.Array, path: str) -> jax.Array:
    digest = hashlib.blake2b(path.encode(), digest_size=4).digest()
    return jax.random.fold_in(key, int.from_bytes(digest, "little"))


def _init_leaf(key: jax.Array, path: str, spec: Spec) -> jax.Array:
    key = _key_of(key, path)
    if spec.axes[:1] == (LAYERS,):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(spec.shape[0]))
        return jax.vmap(lambda k: spec.init(k, spec.shape[1:], spec.dtype))(keys)
    return spec.init(key, spec.shape, spec.dtype)


def initialise(specs: Tree, key: jax.Array, shardings: Tree | None = None) -> Tree:
    """Arrays for a Spec tree.

    The key of each leaf is folded from its path, and of each stacked layer from its index, so that adding a parameter
    or a layer never changes another one, and a sharded tree is bitwise equal to a replicated one.

    Args:
      specs: tree of Spec.
      key: a jax.random key.
      shardings: tree of jax.sharding.Sharding like `specs`, or None.
    """
    make = lambda k: map_specs(lambda path, spec: _init_leaf(k, path, spec), specs)  # noqa: E731
    return jax.jit(make, out_shardings=shardings)(key)


def fresh(specs: Tree) -> Tree:
    """Arrays for a Spec tree whose initialisers draw nothing at random, such as a state; compiles nothing."""
    return map_specs(lambda _, s: s.init(None, s.shape, s.dtype), specs)


def abstract(specs: Tree, shardings: Tree | None = None) -> Tree:
    """jax.ShapeDtypeStruct for every Spec."""
    if shardings is None:
        return map_specs(lambda _, s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        specs,
        shardings,
        is_leaf=is_spec,
    )


def count(specs: Tree) -> int:
    """Number of parameters of a tree of Specs or arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(specs, is_leaf=is_spec))


def nbytes(specs: Tree) -> int:
    """Bytes of a tree of Specs or arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(specs, is_leaf=is_spec))


def tagged(specs: Tree, tag: str) -> Tree:
    """Boolean tree: True where a Spec carries `tag`. For optimiser masks."""
    return map_specs(lambda _, s: tag in s.tags, specs)


def check_tree(params: Tree, specs: Tree) -> None:
    """Raises ValueError naming every leaf of `params` that is missing, unexpected or of the wrong shape."""
    have, want = flatten(params), flatten(specs)
    problems = [f"missing {p} {want[p].shape}" for p in want if p not in have]
    problems += [f"unexpected {p}" for p in have if p not in want]
    problems += [
        f"{p} has shape {tuple(have[p].shape)}, expected {want[p].shape}"
        for p in want
        if p in have and tuple(have[p].shape) != want[p].shape
    ]
    if problems:
        raise ValueError("parameters do not fit the model: " + "; ".join(problems))


def partition(tree: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """Splits a tree into (selected, rest) by a boolean tree; the other side holds None, which jax sees as no leaf."""
    selected = jax.tree.map(lambda leaf, m: leaf if m else None, tree, mask)
    rest = jax.tree.map(lambda leaf, m: None if m else leaf, tree, mask)
    return selected, rest


def combine(selected: Tree, rest: Tree) -> Tree:
    """The inverse of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, selected, rest, is_leaf=lambda leaf: leaf is None)


def cast(tree: Tree, dtype: DTypeLike) -> Tree:
    """Floating leaves in `dtype`; integers and keys as they are."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def update(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a nested dict in which the entry at `path` ("a/b/c") is `value`."""
    head, _, rest = path.partition("/")
    new = dict(tree)
    new[head] = update(tree.get(head, {}), rest, value) if rest else value
    return new

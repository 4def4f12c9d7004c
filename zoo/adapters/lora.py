"""Low-rank adaptation, LoRA (arXiv:2106.09685): y = x W + (alpha / rank) (x A) B with W frozen.

`attach` replaces matrices of a parameter tree by `LowRank` weights; no model changes. `trainable_mask` selects A and B
for `zoo.core.params.partition`, so that only they get gradients and optimiser state; `merge` writes them into W.
"""

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from zoo.core import params as params_lib
from zoo.core.linear import linear, materialise, split_equation
from zoo.core.params import LAYERS, Spec, Tree, is_spec, map_specs
from zoo.core.registry import nearest
from zoo.layers.quantization import is_ternary

RANK = "rank"  # the logical axis between A and B


@flax.struct.dataclass
class LowRank:
    """A weight plus a low-rank update: W + scale A B.

    Attributes:
      base: W, an array [inputs..., outputs...] or another weight.
      a: A [inputs..., R].
      b: B [R, outputs...].
      scale: alpha / R.

    Stacked layers carry one more leading dimension on base, a and b alike.
    """

    base: Any
    a: Any
    b: Any
    scale: float = flax.struct.field(pytree_node=False)

    def contract(self, x: jax.Array, eqn: str) -> jax.Array:
        """einsum(eqn, x, W) + scale (x A) B, in x.dtype."""
        x_dims, inputs, outputs, result = split_equation(eqn)
        rank = next(c for c in "rzyxwvutsqpon" if c not in x_dims + inputs + outputs)
        kept = "".join(c for c in x_dims if c not in inputs)
        low = jnp.einsum(f"{x_dims},{inputs}{rank}->{kept}{rank}", x, self.a.astype(x.dtype))
        update = jnp.einsum(f"{kept}{rank},{rank}{outputs}->{result}", low * self.scale, self.b.astype(x.dtype))
        return linear(x, self.base, eqn) + update

    def materialise(self) -> jax.Array:
        """W + scale A B as an array in W's dtype, summed in float32."""
        base = materialise(self.base)
        stacked = self.a.ndim + self.b.ndim - 2 - base.ndim
        multiply = lambda a, b: jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), axes=1)  # noqa: E731
        for _ in range(stacked):
            multiply = jax.vmap(multiply)
        return (base.astype(jnp.float32) + self.scale * multiply(self.a, self.b)).astype(base.dtype)


def is_low_rank(leaf: Any) -> bool:
    """True for `LowRank` nodes; use as `is_leaf`."""
    return isinstance(leaf, LowRank)


def _kaiming_uniform(fan_in: int):
    """Uniform in +-1/sqrt(fan_in), which is Kaiming's with negative slope sqrt(5)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


def _low_rank_spec(spec: Spec, rank: int, alpha: float) -> LowRank:
    lead = int(spec.axes[:1] == (LAYERS,))
    split = lead + spec.inputs
    fan_in = int(np.prod(spec.shape[lead:split]))
    a = Spec(
        (*spec.shape[:split], rank),
        (*spec.axes[:split], RANK),
        _kaiming_uniform(fan_in),
        spec.dtype,
        spec.inputs,
        frozenset({"adapter"}),
    )
    b = Spec(
        (*spec.shape[:lead], rank, *spec.shape[split:]),
        (*spec.axes[:lead], RANK, *spec.axes[split:]),
        jax.nn.initializers.zeros,
        spec.dtype,
        1,
        frozenset({"adapter"}),
    )
    return LowRank(spec, a, b, alpha / rank)


def param_specs(specs: Tree, pattern: str | Sequence[str], *, rank: int, alpha: float) -> Tree:
    """The Spec tree of an adapted model, for shardings, counts and abstract shapes.

    Args:
      specs: the model's Spec tree.
      pattern: glob, or several, over parameter paths, e.g. "layers/*/mixer/[qv]"; what is not a matrix stays as it is.
      rank: R.
      alpha: numerator of the scale. For rank-stabilised LoRA (arXiv:2312.03732) give alpha sqrt(rank).

    Returns:
      The tree with `LowRank` nodes of Specs in place of the matrices that match.

    Raises:
      ValueError: rank < 1, or a pattern that matches no matrix, with the nearest paths.
    """
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not patterns:
        raise ValueError("pattern is empty: give at least one glob over parameter paths")
    matrices = [path for path, spec in params_lib.flatten(specs).items() if spec.inputs > 0]
    for glob in patterns:
        if not any(fnmatch.fnmatchcase(path, glob) for path in matrices):
            raise ValueError(f"pattern {glob!r} matches no matrix; {nearest(glob, matrices)}")

    def one(path: str, spec: Spec) -> Any:
        chosen = spec.inputs > 0 and any(fnmatch.fnmatchcase(path, glob) for glob in patterns)
        return _low_rank_spec(spec, rank, alpha) if chosen else spec

    return map_specs(one, specs)


def attach(params: Tree, specs: Tree, pattern: str | Sequence[str], *, rank: int, alpha: float, key: jax.Array) -> Tree:
    """Wraps the matrices whose path matches in `LowRank`, with A uniform(+-1/sqrt(fan in)) and B zero.

    Args:
      params: the model's parameters (stacked, as `Model.init` returns them); a matrix may be a weight already.
      specs: the model's Spec tree.
      pattern, rank, alpha: see `param_specs`.
      key: a jax.random key; each A depends on it and on its path alone.

    Returns:
      The tree with `LowRank` weights; the model computes what it did before, as B is zero.

    Raises:
      ValueError: see `param_specs`.
    """
    adapted = param_specs(specs, pattern, rank=rank, alpha=alpha)
    only_new = jax.tree.map(
        lambda node: dataclasses.replace(node, base=None) if is_low_rank(node) else None,
        adapted,
        is_leaf=lambda node: is_low_rank(node) or is_spec(node),
    )
    new = params_lib.initialise(only_new, key)

    def wrap(spec: Spec, param: Any, adapter: LowRank | None) -> Any:
        del spec
        return param if adapter is None else dataclasses.replace(adapter, base=param)

    return jax.tree.map(wrap, specs, params, new, is_leaf=is_spec)


def trainable_mask(params: Tree) -> Tree:
    """Boolean tree, True at A and B alone (of the outermost adapter where several are stacked)."""

    def mask(node: Any) -> Any:
        if is_low_rank(node):
            return LowRank(jax.tree.map(lambda _: False, node.base), True, True, node.scale)
        return False

    return jax.tree.map(mask, params, is_leaf=is_low_rank)


def merge(params: Tree) -> Tree:
    """Adapters written into their matrices: plain arrays, the same outputs.

    Raises:
      ValueError: an adapter over a packed ternary weight; a layer would quantise the sum again.
    """

    def one(path: tuple[Any, ...], node: Any) -> Any:
        if not is_low_rank(node):
            return node
        if any(is_ternary(leaf) for leaf in jax.tree.leaves(node, is_leaf=is_ternary)):
            where = params_lib.path_string(path)
            raise ValueError(
                f"{where}: a packed ternary weight holds no sum; keep the adapter, or merge before packing"
            )
        return materialise(node)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_low_rank)


def detach(params: Tree) -> Tree:
    """The parameters without any adapter: the bases, untouched."""

    def strip(node: Any) -> Any:
        while is_low_rank(node):
            node = node.base
        return node

    return jax.tree.map(strip, params, is_leaf=is_low_rank)


def to_dict(params: Tree) -> Tree:
    """The adapters alone as a plain nested dict, to be saved: {"a", "b", "scale"} at the path of each adapted matrix.

    An adapter on top of another one holds that one under "base".
    """

    def pack(node: LowRank) -> dict[str, Any]:
        packed = {"a": node.a, "b": node.b, "scale": np.asarray(node.scale, np.float64)}
        return {**packed, "base": pack(node.base)} if is_low_rank(node.base) else packed

    def prune(tree: Any) -> Any:
        if is_low_rank(tree):
            return pack(tree)
        if not isinstance(tree, dict):
            return None
        kept = {name: prune(child) for name, child in tree.items()}
        return {name: child for name, child in kept.items() if child is not None} or None

    return prune(params) or {}


def from_dict(params: Tree, adapters: Tree) -> Tree:
    """Puts the adapters of `to_dict` onto base parameters.

    Raises:
      ValueError: an adapter for a path that `params` lacks, or whose shapes do not fit the matrix there.
    """

    def unpack(base: Any, packed: dict[str, Any], path: str) -> LowRank:
        if "base" in packed:
            base = unpack(base, packed["base"], path)
        a, b = jnp.asarray(packed["a"]), jnp.asarray(packed["b"])
        node = LowRank(base, a, b, float(packed["scale"]))
        want = jax.eval_shape(materialise, base).shape
        lead = a.ndim + b.ndim - 2 - len(want)
        if lead not in (0, 1) or (*a.shape[:-1], *b.shape[lead + 1 :]) != want or a.shape[-1] != b.shape[lead]:
            raise ValueError(f"adapter {path!r}: a {a.shape} and b {b.shape} do not fit the matrix {want}")
        return node

    def visit(tree: Any, packed: Tree, path: str) -> Any:
        if "a" in packed and "b" in packed and "scale" in packed:
            return unpack(tree, packed, path)
        for name in packed:
            if not isinstance(tree, dict) or name not in tree:
                known = tree if isinstance(tree, dict) else ()
                raise ValueError(f"no parameter {path}{name!r} to adapt; {nearest(name, known)}")
        return {name: visit(child, packed[name], f"{path}{name}/") if name in packed else child
                for name, child in tree.items()}  # fmt: skip

    return visit(params, adapters, "")

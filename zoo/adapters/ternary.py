"""Packed ternary weights for inference (arXiv:2402.17764, arXiv:2406.02528): two bits a weight and one scale a matrix.

`pack` replaces the latent weights of BitLinear layers by `TernaryWeight`s; no model changes, and the integers that are
summed stay the same. `to_dict` and `from_dict` bring packed parameters to a checkpoint and back.
"""

import fnmatch
from collections.abc import Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from pallas_kernels.ternary_matmul import LAYOUTS
from pallas_kernels.ternary_matmul import pack as pack_codes
from zoo.core import params as params_lib
from zoo.core.linear import materialise
from zoo.core.params import LAYERS, Spec, Tree, is_spec, map_specs
from zoo.core.registry import check_choice, nearest
from zoo.layers.quantization import TernaryWeight, is_ternary, packed_shape, ternarise

# What the platform's kernel reads; XLA's own product unpacks any of them.
PLATFORM_LAYOUTS = {"tpu": "i2_s_columns", "gpu": "i2_s", "cpu": "i2_s_columns"}


def _resolve_layout(layout: str | None) -> str:
    layout = PLATFORM_LAYOUTS.get(jax.default_backend(), "i2_s_columns") if layout is None else layout
    check_choice("layout", layout, LAYOUTS)
    return layout


def param_specs(specs: Tree, pattern: str | Sequence[str] = "*", *, layout: str | None = None) -> Tree:
    """The Spec tree of a packed model, for shardings, bytes and abstract shapes.

    Args:
      specs: the model's Spec tree.
      pattern: glob, or several, over the paths of weights tagged "ternary", e.g. "layers/*"; "*" takes all.
      layout: of the bytes; None = what the kernel of this platform reads.

    Returns:
      The tree with `TernaryWeight` nodes of Specs in place of the latent weights that match.

    Raises:
      ValueError: a pattern that matches no ternary weight, with the nearest paths; an unknown layout.
    """
    layout = _resolve_layout(layout)
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not patterns:
        raise ValueError("pattern is empty: give at least one glob over parameter paths")
    known = [path for path, spec in params_lib.flatten(specs).items() if "ternary" in spec.tags]
    for glob in patterns:
        if not any(fnmatch.fnmatchcase(path, glob) for path in known):
            raise ValueError(f"pattern {glob!r} matches no ternary weight; {nearest(glob, known)}")

    def one(path: str, spec: Spec) -> Any:
        if "ternary" not in spec.tags or not any(fnmatch.fnmatchcase(path, glob) for glob in patterns):
            return spec
        lead = int(spec.axes[:1] == (LAYERS,))
        shape, lead_shape, lead_axes = spec.shape[lead:], spec.shape[:lead], spec.axes[:lead]
        # No rule splits these axes: a byte holds weights from several places of the matrix.
        packed = Spec((*lead_shape, *packed_shape(shape, layout)), (*lead_axes, "packed", "packed"), dtype=jnp.uint8)
        return TernaryWeight(packed, Spec(lead_shape, lead_axes), shape, layout)

    return map_specs(one, specs)


def pack(params: Tree, specs: Tree, pattern: str | Sequence[str] = "*", *, layout: str | None = None) -> Tree:
    """Quantises the latent weights whose path matches, and packs them: a quarter of a byte a weight.

    Args:
      params: the model's parameters (stacked, as `Model.init` returns them); adapters on latent weights are merged.
      specs: the model's Spec tree.
      pattern, layout: see `param_specs`.

    Returns:
      The tree with `TernaryWeight`s; the model computes what it did before.

    Raises:
      ValueError: see `param_specs`; or a weight that is packed already.
    """
    packed_specs = param_specs(specs, pattern, layout=layout)

    def one(path: tuple[Any, ...], node: Any, param: Any) -> Any:
        if not is_ternary(node):
            return param
        if any(is_ternary(leaf) for leaf in jax.tree.leaves(param, is_leaf=is_ternary)):
            raise ValueError(
                f"{params_lib.path_string(path)} is packed already; packed again, its scale would change: "
                "leave it out of the pattern, or pack the latent weights"
            )

        def squeeze(weight):
            codes, scale = ternarise(weight)
            codes = codes.reshape(codes.shape[0], -1)
            codes = jnp.pad(codes, ((0, -codes.shape[0] % LAYOUTS[node.layout].inputs), (0, 0)))
            return pack_codes(codes.T, node.layout), scale

        latent = materialise(param)
        packed, scale = jax.jit(jax.vmap(squeeze) if latent.ndim > len(node.shape) else squeeze)(latent)
        return TernaryWeight(packed, scale, node.shape, node.layout)

    stop = lambda node: is_ternary(node) or is_spec(node)  # noqa: E731
    return jax.tree_util.tree_map_with_path(one, packed_specs, params, is_leaf=stop)


def to_dict(params: Tree) -> Tree:
    """Packed parameters as a plain nested dict of arrays, to be saved: a `TernaryWeight` is {"packed", "scale"}."""
    return flax.traverse_util.unflatten_dict(params_lib.flatten(params), sep="/")


def from_dict(saved: Tree, specs: Tree, pattern: str | Sequence[str] = "*", *, layout: str | None = None) -> Tree:
    """Packed parameters from the plain nested dict of `to_dict`.

    Args:
      saved: nested dict of arrays.
      specs: the model's Spec tree.
      pattern, layout: what the parameters were packed with.

    Raises:
      ValueError: leaves that are missing, unexpected, of a wrong shape, or bytes that are not uint8; each by its path.
    """
    want = param_specs(specs, pattern, layout=layout)
    params_lib.check_tree(saved, want)
    leaves = params_lib.flatten(saved)
    for path, spec in params_lib.flatten(want).items():
        if spec.dtype == jnp.uint8 and leaves[path].dtype != jnp.uint8:
            raise ValueError(
                f"{path} must hold uint8 bytes in layout {_resolve_layout(layout)!r}, got {leaves[path].dtype}"
            )
    structure = jax.tree.structure(want, is_leaf=is_spec)
    return jax.tree.unflatten(structure, [jnp.asarray(leaves[path]) for path in params_lib.flatten(want)])

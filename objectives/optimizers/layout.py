"""How a parameter is read as matrices: which leaves stack layers, and which dimensions a product contracts."""

import dataclasses
import math
from typing import Any

import jax

from zoo.core.params import LAYERS, Spec, Tree, map_specs, path_string


@dataclasses.dataclass(frozen=True)
class Layout:
    """Of one leaf.

    Attributes:
      stacked: whether the first dimension counts layers, each of which is a tensor of its own.
      inputs: number of leading dimensions (after that of layers) that a product contracts; 0 = not a matrix.
    """

    stacked: bool = False
    inputs: int = 0

    @property
    def is_matrix(self) -> bool:
        """Whether the leaf is one matrix, or one for each layer."""
        return self.inputs > 0

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(layers, rows, columns) of a matrix leaf of `shape`; rows are inputs."""
        split = self.stacked + self.inputs
        return (shape[0] if self.stacked else 1, math.prod(shape[self.stacked : split]), math.prod(shape[split:]))

    def tensor_axes(self, ndim: int) -> tuple[int, ...]:
        """The dimensions of one tensor: all but that of the layers."""
        return tuple(range(int(self.stacked), ndim))


def is_layout(leaf: Any) -> bool:
    """True for Layout leaves; use as `is_leaf`."""
    return isinstance(leaf, Layout)


def of_specs(specs: Tree) -> Tree:
    """Layout of every Spec: stacked where its first axis is "layers", inputs as the Spec says.

    A leaf that `linear` does not contract (embeddings, convolutions, norms) is no matrix.
    """

    def layout(_: str, spec: Spec) -> Layout:
        return Layout(spec.axes[:1] == (LAYERS,), spec.inputs)

    return map_specs(layout, specs)


def of_params(params: Tree) -> Tree:
    """Layout that shapes and paths tell: for trees without Specs.

    A leaf is stacked where it stands in the dict under the key "layers", as parameters of the zoo's models do (a tuple
    there holds layers one by one), and a matrix of one contracted dimension where two dimensions or more are left.
    """

    def layout(path: tuple[Any, ...], leaf: jax.Array) -> Layout:
        above = [i for i, key in enumerate(path) if path_string((key,)) == LAYERS]
        stacked = any(i + 1 < len(path) and not hasattr(path[i + 1], "idx") for i in above) and leaf.ndim > 0
        return Layout(stacked, 1 if leaf.ndim - stacked >= 2 else 0)

    return jax.tree_util.tree_map_with_path(layout, params)


def resolve(layout: Tree | None, params: Tree) -> Tree:
    """`layout`, or what the parameters tell where it is None."""
    return of_params(params) if layout is None else layout


def to_matrices(x: jax.Array, layout: Layout) -> jax.Array:
    """A matrix leaf as [layers, rows, columns]."""
    return x.reshape(layout.matrix_shape(x.shape))

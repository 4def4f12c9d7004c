"""WeLore: which matrices are low-rank, how far to cut each, and training of those alone (arXiv:2407.11239)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from objectives.checks import check_range
from objectives.optimizers import layout as layout_lib
from objectives.optimizers.layout import Layout
from zoo.core.params import Tree, path_string

LEAST_SHARE = 0.4999  # of the authors' code: below it two factors save nothing


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of every matrix.

    Attributes:
      threshold: of the normalised singular values.
      ranks: {path: int array [L]}, the rank that is left of each matrix (of every layer of a stacked leaf); that of
        a matrix that stays dense is its own.
      low_rank: {path: bool array [L]}, True for those that are cut and trained (LRC), False for dense and frozen ones.
    """

    threshold: float
    ranks: dict[str, np.ndarray]
    low_rank: dict[str, np.ndarray]


def normalised_values(matrix: jax.Array) -> np.ndarray:
    """Singular values from 0 (the smallest) to 1 (the largest); all 1 where they are equal."""
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    spread = values[0] - values[-1]
    return (values - values[-1]) / spread if spread > 0 else np.ones_like(values)


def plan(params: Tree, reduction: float, *, layout: Tree | None = None, least_share: float = LEAST_SHARE) -> Plan:
    """One threshold for all matrices, below which their normalised singular values are cut.

    The threshold is such that `reduction` of all singular values are below it. Matrices that lose more than
    `least_share` of theirs become two factors, the rest stays as it is: so less than `reduction` is cut in the end.

    Args:
      params: trained parameters.
      reduction: share of all ranks, in [0, 1).
      layout: which leaves are matrices.
      least_share: of a matrix's ranks.

    Raises:
      ValueError: options out of range, or parameters without matrices.
    """
    check_range(0.0, 1.0, open_high=True, reduction=reduction, least_share=least_share)
    layouts = jax.tree.leaves(layout_lib.resolve(layout, params), is_leaf=layout_lib.is_layout)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    values = {
        path_string(path): np.stack([normalised_values(m) for m in layout_lib.to_matrices(leaf, how)])
        for (path, leaf), how in zip(leaves, layouts, strict=True)
        if how.is_matrix
    }
    if not values:
        raise ValueError("WeLore needs matrices; give layout=optimizers.layout.of_specs(model.param_specs())")
    everything = np.sort(np.concatenate([v.ravel() for v in values.values()]))
    threshold = float(everything[int(reduction * len(everything))])
    pruned = {path: np.sum(v < threshold, axis=1) for path, v in values.items()}
    low_rank = {path: pruned[path] / v.shape[1] > least_share for path, v in values.items()}
    ranks = {path: v.shape[1] - np.where(low_rank[path], pruned[path], 0) for path, v in values.items()}
    return Plan(threshold, ranks, low_rank)


def factorize(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """(A [rows, rank], B [rank, columns]), the best product of that rank; both have the roots of singular values."""
    check_range(1, min(matrix.shape), rank=rank)
    u, s, vt = jnp.linalg.svd(matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32)), full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return (u[:, :rank] * root).astype(matrix.dtype), (root[:, None] * vt[:rank]).astype(matrix.dtype)


def cut(params: Tree, of: Plan, *, layout: Tree | None = None) -> Tree:
    """Parameters whose low-rank matrices are replaced by the products of their factors."""

    def one(path: tuple[Any, ...], leaf: jax.Array, how: Layout) -> jax.Array:
        ranks, chosen = of.ranks.get(path_string(path)), of.low_rank.get(path_string(path))
        if ranks is None or chosen is None or not chosen.any():
            return leaf
        pairs = zip(layout_lib.to_matrices(leaf, how), ranks, chosen, strict=True)
        new = [jnp.matmul(*factorize(m, max(int(rank), 1))) if low else m for m, rank, low in pairs]
        return jnp.stack(new).reshape(leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, params, layout_lib.resolve(layout, params))


def trainable(params: Tree, of: Plan) -> Tree:
    """1 where a leaf (or a layer of it, [L, 1, ...]) is low-rank and trained, 0 for all else, as float32."""

    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        chosen = of.low_rank.get(path_string(path))
        if chosen is None:
            return jnp.zeros((), jnp.float32)
        mask = jnp.asarray(chosen, jnp.float32)
        return mask[0] if len(mask) == 1 else mask.reshape(-1, *(1,) * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(one, params)


def train_only(optimizer: optax.GradientTransformation, masks: Tree) -> optax.GradientTransformation:
    """`optimizer` on gradients times `masks`, whose updates are masked again, so that decay does not move the rest.

    Args:
      optimizer: any.
      masks: of `trainable`, or likewise.
    """
    masked = lambda tree: jax.tree.map(lambda x, m: (x * m).astype(x.dtype), tree, masks)  # noqa: E731
    by_mask = optax.stateless(lambda updates, params: masked(updates))
    return optax.chain(by_mask, optimizer, by_mask)

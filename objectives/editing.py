"""Arithmetic of parameter trees: task vectors, soups and SCE merging.

Trees must agree in structure, shapes and dtypes; where they do not, an error names the first leaf that differs. Sums
are in float32 (float64 where the leaves are), results have the dtypes of the leaves. Leaves of integers or booleans,
such as packed codes, cannot be mixed: they must be equal, and stay.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from objectives.checks import check_range

Tree = Any


def check_trees(reference: Tree, *others: Tree) -> None:
    """Raises ValueError unless all trees have the structure, shapes and dtypes of the first.

    Args:
      reference: tree of arrays.
      *others: trees of arrays.
    """
    want = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(reference)}
    for number, tree in enumerate(others, 1):
        have = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for path in [*want, *have]:
            if path not in have or path not in want:
                raise ValueError(f"tree {number} {'has no' if path in want else 'has a'} leaf {path}, unlike tree 0")
            ours, theirs = want[path], have[path]
            for what in ("shape", "dtype"):
                if getattr(ours, what) != getattr(theirs, what):
                    raise ValueError(
                        f"leaf {path} has {what} {getattr(theirs, what)} in tree {number}, "
                        f"{getattr(ours, what)} in tree 0"
                    )
        if jax.tree.structure(tree) != jax.tree.structure(reference):
            raise ValueError(
                f"tree {number} has the leaves of tree 0 but other containers: {jax.tree.structure(tree)}, "
                f"{jax.tree.structure(reference)}"
            )


def _map(function: Callable[..., jax.Array], *trees: Tree) -> Tree:
    """`function` of the leaves as floats, cast back; leaves that are no floats must be equal."""
    check_trees(*trees)

    def leaf(path, *leaves):
        first = leaves[0]
        if not jnp.issubdtype(first.dtype, jnp.floating):
            if any(not np.array_equal(first, other) for other in leaves[1:]):
                raise ValueError(
                    f"leaf {jax.tree_util.keystr(path)} of dtype {first.dtype} differs between the trees "
                    "and cannot be mixed; make it a float, such as by dequantising it"
                )
            return first
        wide = jnp.promote_types(first.dtype, jnp.float32)
        return function(*(jnp.asarray(x, wide) for x in leaves)).astype(first.dtype)

    return jax.tree_util.tree_map_with_path(leaf, *trees)


def _check_number(name: str, values: Sequence[Any], number: int) -> None:
    if len(values) != number:
        raise ValueError(f"{name} must be {number} numbers, one per tree, got {len(values)}")


def task_arithmetic(base: Tree, tuned: Sequence[Tree], scales: Sequence[float] | float = 1.0) -> Tree:
    """base + sum_i scale_i (tuned_i - base): adds what models learnt, or with negative scales removes it.

    Args:
      base: parameters that all were tuned from.
      tuned: parameters of the tuned models, one or more.
      scales: of each, or one for all. The paper has one, chosen on held-out data.

    Returns:
      Tree of parameters.

    Raises:
      ValueError: trees disagree, which names the leaf, or the numbers of trees and scales do.

    Reference: arXiv:2212.04089, section 2.
    """
    if not tuned:
        raise ValueError("tuned must have at least one tree")
    factors = list(scales) if isinstance(scales, Sequence) else [scales] * len(tuned)
    _check_number("scales", factors, len(tuned))

    def add(base, *leaves):
        return base + sum(scale * (leaf - base) for scale, leaf in zip(factors, leaves, strict=True))

    return _map(add, base, *tuned)


def chat_vector(base: Tree, chat: Tree, target: Tree, *, scale: float = 1.0, skip: Sequence[str] = ()) -> Tree:
    """target + scale (chat - base): gives a further pretrained model the conversation of a chat model (2310.04799).

    Args:
      base: parameters that both others descend from.
      chat: base tuned for conversation.
      target: base pretrained further, as in another language.
      scale: of the vector.
      skip: top-level keys that stay as in the target, such as embeddings of another vocabulary.

    Returns:
      Tree of parameters.

    Raises:
      ValueError: trees disagree, which names the leaf, or a key to skip is not in the target.

    Reference: arXiv:2310.04799, section 3.
    """
    if skip:
        unknown = sorted(set(skip) - set(target))
        if unknown:
            raise ValueError(f"skip names {unknown}, the target has {sorted(target)}")
        base, chat, kept = ({k: v for k, v in t.items() if k not in skip} for t in (base, chat, target))
        return {**target, **chat_vector(base, chat, kept, scale=scale)}
    return _map(lambda target, chat, base: target + scale * (chat - base), target, chat, base)


def soup(trees: Sequence[Tree], weights: Sequence[float] | None = None) -> Tree:
    """Weighted mean of parameters, sum_i w_i tree_i / sum_i w_i.

    Args:
      trees: parameters of models tuned from one base.
      weights: w, at least 0 and not all 0; None = all alike, the uniform soup.

    Returns:
      Tree of parameters.

    Raises:
      ValueError: trees disagree, which names the leaf, or weights do not fit.

    Reference: arXiv:2203.05482, section 2.
    """
    if not trees:
        raise ValueError("trees must have at least one tree")
    weights = [1.0] * len(trees) if weights is None else [float(w) for w in weights]
    _check_number("weights", weights, len(trees))
    if min(weights) < 0.0 or not 0.0 < sum(weights) < math.inf:
        raise ValueError(f"weights must be at least 0, finite and not all 0, got {weights}")
    shares = [w / sum(weights) for w in weights]

    def mean(first, *others):
        return shares[0] * first + sum(w * leaf for w, leaf in zip(shares[1:], others, strict=True))

    return _map(mean, *trees)


def greedy_soup(trees: Sequence[Tree], evaluate: Callable[[Tree], float]) -> tuple[Tree, list[int]]:
    """Adds models to a uniform soup, best first, and keeps each that does not make it worse (recipe 1).

    Args:
      trees: parameters of models tuned from one base.
      evaluate: score of parameters on held-out data, higher is better. Called once per tree and once per further try.

    Returns:
      (tree, indices of the trees in it, in the order in which they were added).

    Raises:
      ValueError: trees disagree, which names the leaf, or a score is NaN.

    Reference: arXiv:2203.05482, recipe 1.
    """
    check_trees(*trees)
    scores = [float(evaluate(tree)) for tree in trees]
    if any(map(math.isnan, scores)):
        raise ValueError(f"evaluate gave NaN: {scores}")
    first, *order = sorted(range(len(trees)), key=lambda i: -scores[i])
    chosen, best, score = [first], trees[first], scores[first]
    for i in order:
        candidate = soup([trees[j] for j in (*chosen, i)])
        found = float(evaluate(candidate))
        if found >= score:
            chosen, best, score = [*chosen, i], candidate, found
    return best, chosen


def sce_merge(base: Tree, tuned: Sequence[Tree], *, keep: float = 0.1) -> Tree:
    """Selects where models differ, weighs them by size, erases minority signs: SCE, by FuseChat's authors.

    With D_k = tuned_k - base of one leaf, K models:

      select     D_k = 0 but at the share `keep` of entries (of those that vary at all) with the largest variance over k
      calculate  c_k = mean(D_k^2) / sum_j mean(D_j^2), 1 / K where that sum is below 1e-6
      erase      e_k = [sign D_k = sign(sum_j D_j)], a sum of 0 counting as positive
      base + sum_k c_k e_k D_k / max(sum_k c_k e_k, 1e-6)

    The numbers of selected entries are rounded down; ties go to the earlier entry. The details that the paper leaves
    open (the variance's divisor K, the floors of 1e-6, the sign of 0) are those of mergekit. Not for traced arrays.

    Args:
      base: parameters that all were tuned from.
      tuned: parameters of the tuned models, one or more. A single one has no variance: with keep < 1 nothing is kept.
      keep: share of entries, in [0, 1]; 1 skips the selection. The paper calls it tau and has 0.1.

    Returns:
      Tree of parameters.

    Raises:
      ValueError: trees disagree, which names the leaf, or keep is out of range.

    Reference: arXiv:2408.07990.
    """
    if not tuned:
        raise ValueError("tuned must have at least one tree")
    check_range(0.0, 1.0, keep=keep)

    def merge(base, *leaves):
        delta = jnp.stack(leaves).reshape(len(leaves), -1) - base.reshape(-1)
        if keep < 1.0:
            # Rounding can leave equal numbers a variance that is not 0.
            varies = jnp.any(delta != delta[0], axis=0)
            number = math.floor(int(jnp.count_nonzero(varies)) * keep)
            rank = jnp.argsort(jnp.argsort(-jnp.where(varies, jnp.var(delta, axis=0), 0.0)))
            delta = jnp.where(rank < number, delta, 0.0)
        size = jnp.mean(jnp.square(delta), axis=1, keepdims=True)
        total = jnp.sum(size)
        share = jnp.where(total < 1e-6, 1.0 / len(leaves), size / jnp.where(total < 1e-6, 1.0, total))
        majority = jnp.where(jnp.sum(delta, axis=0) >= 0, 1.0, -1.0)
        share = jnp.where(jnp.sign(delta) == majority, share, 0.0)
        merged = jnp.sum(share * delta, axis=0) / jnp.maximum(jnp.sum(share, axis=0), 1e-6)
        return base + merged.reshape(base.shape)

    return _map(merge, base, *tuned)

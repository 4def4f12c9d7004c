"""A step from comparisons alone, for pairs whose margin is too small for a loss of it (ComPO, arXiv:2505.05465)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range, check_statistics
from objectives.statistics import LogProbs

Oracle = Callable[[Any], tuple[jax.Array, jax.Array]]


def noisy_pairs(ref_chosen: LogProbs, ref_rejected: LogProbs, threshold: float = 3.0) -> jax.Array:
    """bool[B]: whether the reference finds both responses about as likely, |s_w - s_l| <= threshold (in nats).

    Criterion and threshold are the paper's; its code (PeterLauLukChen/ComparisonPO) takes those with s_w > s_l alone.

    Args:
      ref_chosen: log-probabilities under the reference.
      ref_rejected: likewise.
      threshold: the paper's delta.
    """
    check_statistics(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    return jnp.abs(ref_chosen.sum - ref_rejected.sum) <= threshold


def comparison_direction(
    oracle: Oracle, theta: Any, key: jax.Array, *, radius: float, queries: int = 1600, clip: float = 0.0
) -> tuple[Any, jax.Array]:
    """Ascent direction from comparisons of theta with random points around it (arXiv:2505.05465, algorithm 2).

      y_i = 1 if theta + r z_i raises s_w and lowers s_l, else -1,   z_i uniform on the unit sphere
      g = sum_i y_i z_i / ||sum_i y_i z_i||, entries below `clip` set to 0

    s_w and s_l are means over pairs, of which the authors' runs have one at a time. The paper's y and g have the
    opposite sign and descend. One perturbation exists at a time. The authors' code (PeterLauLukChen/ComparisonPO,
    compute_gradients.py) perturbs the output layer only, and by r = 5e-4 times normal numbers, whose norm is about
    sqrt(d) for d elements: a radius of 5e-4 sqrt(d) here, or 5.7 for a head of 32,000 by 4,096. Hence no default.

    Args:
      oracle: theta -> (s_w [B], s_l [B]), log-probabilities of chosen and rejected responses.
      theta: tree of float arrays.
      key: of `jax.random`.
      radius: r, the length of a perturbation, above 0.
      queries: number of points, at least 1; 1,600 to 1,800 in the paper.
      clip: least size of an entry of g, at least 0; 8e-5 to 2.2e-4 in the paper, the greatest for Mistral.

    Returns:
      (g, share): tree like theta, float32, of norm 1 before clipping; and the share of points with y = 1, float32.
    """
    check_positive(radius=radius, queries=queries)
    check_range(0.0, float("inf"), clip=clip)
    leaves, tree = jax.tree.flatten(theta)

    def direction(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(leaves))
        z = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, _normalised(z))

    def means(theta: Any) -> tuple[jax.Array, jax.Array]:
        s_w, s_l = oracle(theta)
        return jnp.mean(s_w), jnp.mean(s_l)

    s_w, s_l = means(theta)

    def query(total: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        z = direction(key)
        near_w, near_l = means(jax.tree.map(lambda x, d: (x + radius * d).astype(x.dtype), theta, z))
        better = (near_w > s_w) & (near_l < s_l)
        return jax.tree.map(lambda t, d: t + jnp.where(better, d, -d), total, z), better

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), theta)
    total, better = jax.lax.scan(query, zeros, jax.random.split(key, queries))
    g = jax.tree.unflatten(tree, _normalised(jax.tree.leaves(total)))
    g = jax.tree.map(lambda x: jnp.where(jnp.abs(x) >= clip, x, 0.0), g)
    return g, jnp.mean(better.astype(jnp.float32))


def comparison_step(theta: Any, direction: Any, share: jax.Array, *, step_size: float, min_share: float = 0.2) -> Any:
    """theta + step_size share g, or theta where too few comparisons were won (arXiv:2505.05465, algorithm 2).

    The authors' code also leaves theta where a step of 5 g wins no comparison.

    Args:
      theta: tree of arrays.
      direction: g of `comparison_direction`.
      share: likewise; where it is `min_share` or less, nothing moves.
      step_size: the paper's gamma, above 0; 0.035 in the authors' code.
      min_share: the paper's lambda, in [0, 1]; its code asks for 330 of 1,400 or 370 of 1,600, a little more.
    """
    check_positive(step_size=step_size)
    check_range(0.0, 1.0, min_share=min_share)
    scale = jnp.where(share > min_share, step_size * share, 0.0)
    return jax.tree.map(lambda x, g: (x + scale * g).astype(x.dtype), theta, direction)


def _normalised(leaves: list[jax.Array]) -> list[jax.Array]:
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in leaves))
    return [x / jnp.maximum(norm, 1e-30) for x in leaves]

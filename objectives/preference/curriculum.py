"""Which pairs to make of several scored responses, and which pairs to keep. NumPy: for data pipelines."""

import numpy as np


def curriculum_pairs(scores: np.ndarray) -> np.ndarray:
    """Pairs of the best response with each other one, from the largest gap in score to the least (arXiv:2403.07230).

    Curry-DPO trains on column 0 of all prompts first, then on column 1, and so on; each stage starts from the model of
    the one before, which is also its reference. `pipelines.preference` reads ranked data by these columns (its option
    `stage`).

    Args:
      scores: [..., K], ratings or log-probabilities of K >= 2 responses; among equals the first is the better.

    Returns:
      int[..., K - 1, 2]: (chosen, rejected) indices, easy ones first.

    Raises:
      ValueError: K < 2.
    """
    scores = np.asarray(scores)
    if scores.ndim < 1 or scores.shape[-1] < 2:
        raise ValueError(f"scores must be [..., K] with K >= 2, got {scores.shape}")
    order = np.argsort(-scores, axis=-1, kind="stable")
    rejected = order[..., :0:-1]
    return np.stack([np.broadcast_to(order[..., :1], rejected.shape), rejected], axis=-1)


def reward_augmented_pairs(
    score_chosen: np.ndarray, score_rejected: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs for a model that is told which score to reach (arXiv:2410.08067).

    Every pair becomes two: asked for the score of the chosen response, that one is right; asked for the score of the
    rejected response, it is the rejected one. As in the authors' code, which writes the score into a system turn; pairs
    of equal scores, which it keeps both ways round, are left out here. At test time ask for the highest. Any objective
    of pairs serves. `pipelines.preference` does the same to ranked data (its option `goal`).

    Args:
      score_chosen: [B].
      score_rejected: [B].

    Returns:
      (index [N], goal [N], swapped bool[N]): the pair of origin, the score to ask for, and whether its responses change
      places.

    Raises:
      ValueError: shapes disagree.
    """
    score_chosen, score_rejected = np.asarray(score_chosen), np.asarray(score_rejected)
    if score_chosen.ndim != 1 or score_chosen.shape != score_rejected.shape:
        raise ValueError(f"scores must be [B] both, got {score_chosen.shape} and {score_rejected.shape}")
    kept = np.flatnonzero(score_chosen != score_rejected)
    index = np.repeat(kept, 2)
    swapped = np.tile([False, True], len(kept))
    return index, np.where(swapped, score_rejected[index], score_chosen[index]), swapped


def clear_pairs(margin: np.ndarray, keep: float = 0.4) -> np.ndarray:
    """Pairs that the reference model tells apart the most, in either direction (arXiv:2501.15109).

    The share `keep` of pairs is kept, half of it from either end of the margins: those in the middle, which the
    reference finds alike, say little. The paper keeps 30 to 50 % by the reference's probabilities; that both ends
    count, and are of one size, is a choice of this project.

    Args:
      margin: [B], log-probability of the chosen response less that of the rejected one under the reference, as sums or
        as means over tokens.
      keep: in (0, 1].

    Returns:
      bool[B].

    Raises:
      ValueError: margin is not [B], or keep is out of range.
    """
    margin = np.asarray(margin)
    if margin.ndim != 1:
        raise ValueError(f"margin must be [B], got {margin.shape}")
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be in (0, 1], such as 0.4, got {keep}")
    rank = np.argsort(np.argsort(margin, kind="stable"), kind="stable")
    ends = round(keep * len(margin))
    low = ends // 2
    return (rank < low) | (rank >= len(margin) - (ends - low))


def ranking_concordance(ranks: np.ndarray) -> np.ndarray:
    """Kendall's W: how far several rankings of the same responses agree, from 0 to 1.

      W = 12 sum_k (R_k - mean R)^2 / (M^2 (K^3 - K)),   R_k = sum of the M ranks of response k

    Repeated ranking (arXiv:2405.18952) ranks the responses to each prompt five times and trains on the prompts with
    the greatest W.

    Args:
      ranks: [..., M, K], ranks 1 to K of K >= 2 responses in M >= 1 rankings without ties.

    Returns:
      float64[...].

    Raises:
      ValueError: not [..., M, K], or a ranking is no order of 1 to K.
    """
    ranks = np.asarray(ranks)
    if ranks.ndim < 2 or ranks.shape[-1] < 2 or ranks.shape[-2] < 1:
        raise ValueError(f"ranks must be [..., M, K] with M >= 1 and K >= 2, got {ranks.shape}")
    rankings, responses = ranks.shape[-2:]
    if (np.sort(ranks, axis=-1) != np.arange(1, responses + 1)).any():
        raise ValueError(f"every ranking must be an order of 1 to {responses}, without ties")
    total = ranks.sum(axis=-2).astype(np.float64)
    spread = np.square(total - total.mean(axis=-1, keepdims=True)).sum(axis=-1)
    return 12.0 * spread / (rankings**2 * (responses**3 - responses))

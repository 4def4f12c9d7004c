"""Which pairs to make of several scored responses, and of scored pairs. NumPy: for data pipelines."""

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

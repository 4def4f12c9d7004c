"""Comparisons across prompts that break artefacts such as length (RRM, arXiv:2409.13156). NumPy: for data pipelines."""

import dataclasses
import itertools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """N comparisons of two responses under one prompt, as indices into a data set of pairs.

    Attributes:
      prompt: int[N], example whose prompt it is.
      first: int[N, 2], the first response: (example, side), side 0 chosen, 1 rejected.
      second: int[N, 2], the second response, likewise.
      label: float64[N], probability that the first one is better: 1, or 1/2 for a tie.
    """

    prompt: np.ndarray
    first: np.ndarray
    second: np.ndarray
    label: np.ndarray


# (first, second, label) of one prompt: responses are (0 own, 1 and 2 partners'; 0 chosen, 1 rejected).
_OWN = [(0, 0), (0, 1)]
_OTHERS = [(1, 0), (1, 1), (2, 0), (2, 1)]
_CASES = [(own, other, 1.0) for own in _OWN for other in _OTHERS] + [
    (one, other, 0.5) for one, other in itertools.combinations(_OTHERS, 2)
]


def draw_partners(rng: np.random.Generator, size: int) -> np.ndarray:
    """int[size, 2]: for each example two others, different from it and from each other.

    Args:
      rng: source of the random order.
      size: number of examples, at least 3.
    """
    if size < 3:
        raise ValueError(f"partners need three examples at least, got {size}")
    order = rng.permutation(size)
    partners = np.empty((size, 2), order.dtype)
    partners[order] = np.stack([np.roll(order, -1), np.roll(order, -2)], axis=1)
    return partners


def cross_prompt_comparisons(partners: np.ndarray) -> Comparisons:
    """Fourteen comparisons for each example: its own responses beat the partners', and those tie among themselves.

    Eight of a response to the prompt, chosen or rejected, against each of the four of the partners; six of the
    partners' against each other, with a label of 1/2. Train on a sample of them beside the given pairs, with
    `bradley_terry`. `pipelines.cross_prompt_pairs` makes texts of them.

    Args:
      partners: int[B, 2], as of `draw_partners`.

    Returns:
      Comparisons of N = 14 B, those of one example together.

    Raises:
      ValueError: shape is not [B, 2], or an example is its own partner or has one partner twice.
    """
    partners = np.asarray(partners)
    if partners.ndim != 2 or partners.shape[1] != 2:
        raise ValueError(f"partners must be [B, 2], got {partners.shape}")
    example = np.arange(len(partners))
    group = np.column_stack([example, partners])
    same = (group[:, 0] == group[:, 1]) | (group[:, 0] == group[:, 2]) | (group[:, 1] == group[:, 2])
    if same.any():
        row = int(np.flatnonzero(same)[0])
        raise ValueError(f"partners[{row}] = {partners[row].tolist()} must be two examples other than {row}")

    def responses(choices: tuple[tuple[int, int], ...]) -> np.ndarray:
        members, sides = np.array(choices).T
        return np.stack(np.broadcast_arrays(group[:, members], sides), axis=-1).reshape(-1, 2)

    first, second, label = zip(*_CASES, strict=True)
    label = np.tile(label, len(group))
    return Comparisons(np.repeat(example, len(_CASES)), responses(first), responses(second), label)


def uncertain_comparisons(probability: np.ndarray, label: np.ndarray, threshold: float) -> np.ndarray:
    """bool[N]: where a reward model is off by `threshold` or more, |probability - label| >= threshold.

    The model is one that was trained on the given pairs; comparisons that it judges well already are left out. There is
    no default: the paper's threshold could not be confirmed. A public reproduction draws half of the comparisons at
    random and keeps those that are off by 0.2 or more.

    Args:
      probability: [N], the model's probability that the first response is better.
      label: [N], of `Comparisons`.
      threshold: in [0, 1].
    """
    return np.abs(np.asarray(probability) - np.asarray(label)) >= threshold

"""Pairs of scored responses."""

import numpy as np
import pytest
import scipy.stats

import objectives


def test_curriculum_of_four():
    """Ratings 9, 2, 7, 5: the best against the worst first."""
    np.testing.assert_array_equal(objectives.curriculum_pairs(np.array([9, 2, 7, 5])), [[0, 1], [0, 3], [0, 2]])


def test_gaps_fall_and_every_response_appears():
    scores = np.random.default_rng(0).normal(size=(3, 10, 5))
    pairs = objectives.curriculum_pairs(scores)
    assert pairs.shape == (3, 10, 4, 2)
    chosen, rejected = (np.take_along_axis(scores, pairs[..., i], -1) for i in (0, 1))
    gaps = chosen - rejected
    assert np.all(np.diff(gaps, axis=-1) <= 0)
    assert np.all(gaps >= 0)
    np.testing.assert_array_equal(pairs[..., 0], np.broadcast_to(scores.argmax(-1)[..., None], pairs.shape[:-1]))
    everyone = np.sort(np.concatenate([pairs[..., :1, 0], pairs[..., 1]], axis=-1), axis=-1)
    np.testing.assert_array_equal(everyone, np.broadcast_to(np.arange(5), everyone.shape))


def test_reward_augmented_pairs():
    index, goal, swapped = objectives.reward_augmented_pairs(np.array([9.0, 5.0, 3.0]), np.array([2.0, 5.0, 4.0]))
    np.testing.assert_array_equal(index, [0, 0, 2, 2])
    np.testing.assert_array_equal(goal, [9.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(swapped, [False, True, False, True])


def test_the_right_response_has_the_score_asked_for():
    rng = np.random.default_rng(1)
    chosen, rejected = rng.integers(0, 5, 50), rng.integers(0, 5, 50)
    index, goal, swapped = objectives.reward_augmented_pairs(chosen, rejected)
    right, wrong = np.where(swapped, rejected[index], chosen[index]), np.where(swapped, chosen[index], rejected[index])
    np.testing.assert_array_equal(right, goal)
    assert np.all(wrong != goal)
    assert len(index) == 2 * (chosen != rejected).sum()


def test_clear_pairs():
    margin = np.array([0.1, -5.0, 2.0, 7.0, -0.2, 0.3, -1.0, 4.0])
    np.testing.assert_array_equal(np.flatnonzero(objectives.clear_pairs(margin, 0.5)), [1, 3, 6, 7])
    np.testing.assert_array_equal(np.flatnonzero(objectives.clear_pairs(margin, 0.4)), [1, 3, 7])
    assert objectives.clear_pairs(margin, 1.0).all()
    drawn = np.random.default_rng(4).normal(size=1001)
    kept = objectives.clear_pairs(drawn, 0.3)
    assert kept.sum() == 300
    assert not kept[(drawn > drawn[kept & (drawn < 0)].max()) & (drawn < drawn[kept & (drawn > 0)].min())].any()


def test_concordance():
    """scipy's Friedman statistic is M (K - 1) W; rankings that agree have 1, opposite ones 0."""
    rng = np.random.default_rng(5)
    ranks = np.stack([[rng.permutation(6) + 1 for _ in range(5)] for _ in range(4)])
    want = [scipy.stats.friedmanchisquare(*one.T).statistic / (5 * (6 - 1)) for one in ranks]
    np.testing.assert_allclose(objectives.ranking_concordance(ranks), want, rtol=1e-12)
    same = np.tile([3, 1, 2], (5, 1))
    assert objectives.ranking_concordance(same) == 1.0
    assert objectives.ranking_concordance(np.array([[1, 2, 3], [3, 2, 1]])) == 0.0


def test_refusals_of_filters():
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], such as 0.4, got 0"):
        objectives.clear_pairs(np.zeros(3), 0)
    with pytest.raises(ValueError, match=r"margin must be \[B\], got \(2, 3\)"):
        objectives.clear_pairs(np.zeros((2, 3)), 0.4)
    with pytest.raises(ValueError, match="an order of 1 to 3, without ties"):
        objectives.ranking_concordance(np.array([[1, 2, 2]]))
    with pytest.raises(ValueError, match=r"\[..., M, K\]"):
        objectives.ranking_concordance(np.array([1, 2]))


def test_refusals():
    with pytest.raises(ValueError, match="K >= 2"):
        objectives.curriculum_pairs(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="scores must be"):
        objectives.reward_augmented_pairs(np.zeros(3), np.zeros(2))

"""General preference embeddings: the score, its antisymmetry, and cycles that scalars cannot fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import objectives
from tests.objectives.oracle import check

RNG = np.random.default_rng(9)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def general_preference(embedding_chosen, embedding_rejected, gates=None, *, temperature, normalised):
    """v_w' R v_l with a block-diagonal skew-symmetric matrix."""
    size = embedding_chosen.shape[1]
    if normalised:
        embedding_chosen, embedding_rejected = F.normalize(embedding_chosen), F.normalize(embedding_rejected)
    found = []
    for b, (v_w, v_l) in enumerate(zip(embedding_chosen, embedding_rejected, strict=True)):
        total = 0.0
        for k in range(size // 2):
            block = torch.zeros(size, size).double()
            block[2 * k, 2 * k + 1], block[2 * k + 1, 2 * k] = 1, -1
            total = total + (1.0 if gates is None else gates[b, k]) * (v_w @ block @ v_l)
        found.append(-F.logsigmoid(total / temperature))
    return torch.stack(found)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_is_its_definition(gated, normalised):
    given = {"embedding_chosen": normal(4, 6), "embedding_rejected": normal(4, 6)}
    given |= {"gates": np.abs(normal(4, 3))} if gated else {}
    check(objectives.general_preference, general_preference, given, temperature=0.3, normalised=normalised)


def test_antisymmetry():
    u, v, gates = normal(7, 8), normal(7, 8), np.abs(normal(7, 4))
    for c in (None, gates):
        there, back = objectives.general_preference_score(u, v, c), objectives.general_preference_score(v, u, c)
        np.testing.assert_allclose(there, -back, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(objectives.general_preference_score(u, u, c), 0.0, atol=1e-6)


def test_scores_of_the_authors_tables():
    """Their scores for GPO are means of rows of table - table', table = S / 0.1 with a diagonal of 0: 20 mean_j S."""
    v = list(normal(5, 4))
    table = np.array([[objectives.general_preference_score(a, b) / 0.1 if a is not b else 0.0 for b in v] for a in v])
    score = np.array([np.mean([objectives.general_preference_score(a, b) for b in v]) for a in v])
    np.testing.assert_allclose((table - table.T).mean(axis=1), 20 * score, rtol=1e-5, atol=1e-5)


def test_embeddings_of_a_reward_are_bradley_terry():
    r_w, r_l = normal(6), normal(6)
    ours = objectives.general_preference(
        *(np.stack([r, np.ones_like(r)], axis=1) for r in (r_w, r_l)), temperature=1.0, normalised=False
    )
    np.testing.assert_allclose(ours.loss_sum, objectives.bradley_terry(r_w, r_l).loss_sum, rtol=1e-6)


def fit(loss, params, steps=200, rate=0.3):
    step = jax.jit(lambda p: p - rate * jax.grad(loss)(p))
    for _ in range(steps):
        params = step(params)
    return params


def test_a_cycle_needs_two_dimensions():
    """Rock, paper, scissors: embeddings of one block order all three pairs, scores two at most.

    From some starts the descent ends in a local minimum, so the best of five counts.
    """
    winners, losers = np.array([0, 1, 2]), np.array([1, 2, 0])

    def embeddings(p):
        return objectives.general_preference(p[winners], p[losers], temperature=0.1)

    def scores(p):
        return objectives.bradley_terry(p[winners], p[losers])

    starts = np.random.default_rng(1).normal(size=(5, 3, 2)).astype(np.float32)
    found = [embeddings(fit(lambda p: embeddings(p).loss_sum, jnp.asarray(p), rate=0.05)) for p in starts]
    assert max(float(x.metrics["accuracy"]) for x in found) == 3.0
    for _ in range(5):
        fitted = fit(lambda p: scores(p).loss_sum, jnp.asarray(normal(3)))
        assert float(scores(fitted).metrics["accuracy"]) <= 2.0
        assert float(scores(normal(3)).metrics["accuracy"]) <= 2.0


def test_an_embedding_of_zero_has_a_gradient():
    zero = np.zeros((2, 2), np.float32)
    gradient = jax.grad(lambda v: objectives.general_preference(v, normal(2, 2)).loss_sum)(zero)
    assert np.isfinite(gradient).all()


def test_refusals():
    with pytest.raises(ValueError, match=r"embeddings must be \[..., 2K\]"):
        objectives.general_preference(normal(4, 5), normal(4, 5))
    with pytest.raises(ValueError, match=r"gates \[..., K\]"):
        objectives.general_preference(normal(4, 6), normal(4, 6), normal(4, 2))
    with pytest.raises(ValueError, match="embedding_rejected must have shape"):
        objectives.general_preference(normal(4, 6), normal(3, 6))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        objectives.general_preference(normal(4, 6), normal(4, 6), temperature=0.0)


def pair_preference(option_logits, swapped_logits, label=None):
    p = torch.ones(len(option_logits)).double() if label is None else label.detach()
    total = 0.0
    for logits, first in ((option_logits, p), (swapped_logits, 1 - p)):
        total = total + F.cross_entropy(logits, torch.stack([first, 1 - first], dim=1), reduction="none")
    return total / 2


@pytest.mark.parametrize("labelled", [False, True])
def test_pair_preference_is_its_definition(labelled):
    given = {"option_logits": 2 * normal(5, 2), "swapped_logits": 2 * normal(5, 2)}
    given |= {"label": RNG.random(5).astype(np.float32)} if labelled else {}
    check(objectives.pair_preference, pair_preference, given)


def test_pair_preference_has_no_favourite_place():
    """A judge that always says A is undecided; swapping the responses and the labels changes nothing."""
    always = np.tile(np.float32([4.0, 0.0]), (2, 1))
    output = objectives.pair_preference(always, always, mask=np.array([1, 0]))
    assert {k: round(float(v), 6) for k, v in output.metrics.items()} == {
        "probability": 0.5,
        "accuracy": 0.0,
        "agreement": 0.0,
    }
    a, b, p = normal(6, 2), normal(6, 2), RNG.random(6).astype(np.float32)
    there, back = objectives.pair_preference(a, b, p), objectives.pair_preference(b, a, 1 - p)
    np.testing.assert_allclose(there.loss_sum, back.loss_sum, rtol=1e-6)
    np.testing.assert_allclose(there.metrics["probability"], 6 - back.metrics["probability"], rtol=1e-6)
    far = objectives.pair_preference(1e4 * a, -1e4 * a)
    assert np.isfinite(far.loss_sum)
    with pytest.raises(ValueError, match=r"swapped_logits must have shape \(6, 2\), got \(5, 2\)"):
        objectives.pair_preference(a, b[:5])
    with pytest.raises(ValueError, match=r"label must be in \[0.0, 1.0\] everywhere, got 2.0 at index 0"):
        objectives.pair_preference(a, b, np.full(6, 2.0))

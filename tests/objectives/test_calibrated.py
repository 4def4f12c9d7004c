"""MaPPO and its plug-ins against the paper's equations in torch, what they reduce to, refusals."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import objectives
from tests.objectives.oracle import check
from tests.objectives.pairs import draw
from tests.objectives.test_margins import ratios


def gap_of(score_chosen, score_rejected):
    return torch.clip(score_chosen - score_rejected, 0, 1).detach()


def mappo(score_chosen, score_rejected, *, beta, **four):
    h_w, h_l = ratios(**four)
    return -F.logsigmoid(beta * h_w - gap_of(score_chosen, score_rejected) * beta * h_l)


def mappo_ipo(score_chosen, score_rejected, *, beta, **four):
    h_w, h_l = ratios(**four)
    return (h_w - gap_of(score_chosen, score_rejected) * h_l - 1 / (2 * beta)) ** 2


def mappo_simpo(policy_chosen, policy_rejected, score_chosen, score_rejected, *, beta, gamma):
    x = beta * policy_chosen.mean - gap_of(score_chosen, score_rejected) * beta * policy_rejected.mean
    return -F.logsigmoid(x - gamma)


def mappo_cpo(policy_chosen, policy_rejected, score_chosen, score_rejected, *, beta, nll_weight):
    x = beta * policy_chosen.sum - gap_of(score_chosen, score_rejected) * beta * policy_rejected.sum
    return -F.logsigmoid(x) - nll_weight * policy_chosen.mean


# Plug-in: its equation, options, and the loss it calibrates.
CASES = {
    "mappo": (mappo, {"beta": 0.3}, "dpo"),
    "mappo_ipo": (mappo_ipo, {"beta": 0.3}, "ipo"),
    "mappo_simpo": (mappo_simpo, {"beta": 1.7, "gamma": 0.4}, "simpo"),
    "mappo_cpo": (mappo_cpo, {"beta": 0.3, "nll_weight": 0.2}, "cpo"),
}


def statistics(name):
    return {key: x for key, x in draw(21).items() if key in objectives.OBJECTIVES.get(name).inputs}


def scores(gap, low=0.0):
    return {"score_chosen": np.float32(low + gap), "score_rejected": np.full(5, low, np.float32)}


@pytest.mark.parametrize("name", CASES)
def test_is_its_definition(name):
    """Also of scores that lie outside [0, 1] and of those in the wrong order."""
    equation, options, _ = CASES[name]
    rng = np.random.default_rng(22)
    given = {key: rng.uniform(-0.5, 1.5, 5).astype(np.float32) for key in ("score_chosen", "score_rejected")}
    gap = given["score_chosen"] - given["score_rejected"]
    assert gap.min() < 0 < gap.max()
    check(objectives.create(name), equation, statistics(name) | given, **options)


@pytest.mark.parametrize("name", CASES)
def test_a_gap_of_one_is_the_plain_loss(name):
    """Values, gradients and metrics; a greater gap counts as 1, a negative one as 0."""
    _, options, plain = CASES[name]
    pairs = statistics(name)

    def value(name, pairs, **extras):
        output = objectives.create(name, **options)(**pairs, **extras)
        return output.loss_sum, output

    (got, output), slopes = jax.value_and_grad(lambda x: value(name, x, **scores(np.ones(5))), has_aux=True)(pairs)
    (want, base), expected = jax.value_and_grad(lambda x: value(plain, x), has_aux=True)(pairs)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert output.metrics.keys() - base.metrics.keys() == {"score_gap"}
    for key, x in base.metrics.items():
        np.testing.assert_allclose(output.metrics[key], x, rtol=1e-6, err_msg=key)
    far, _ = value(name, pairs, **scores(np.full(5, 7.0)))
    np.testing.assert_array_equal(far, got)
    none, output = value(name, pairs, **scores(np.full(5, -2.0)))
    level, _ = value(name, pairs, **scores(np.zeros(5), low=0.4))
    np.testing.assert_array_equal(none, level)
    np.testing.assert_array_equal(output.metrics["score_gap"], 0.0)
    np.testing.assert_array_equal(output.metrics["logp_rejected"], pairs["policy_rejected"].sum.sum())


def test_the_rejected_response_is_pushed_in_proportion():
    """Equation 10: the slope in s_l is -D times that in s_w."""
    gap = np.float32([0.1, 0.3, 0.5, 0.8, 1.0])
    pairs = draw(23)
    slopes = jax.grad(lambda x: objectives.mappo(**x, **scores(gap)).loss_sum)(pairs)
    np.testing.assert_allclose(slopes["policy_rejected"].sum, -gap * slopes["policy_chosen"].sum, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_refusals(name):
    good = scores(np.ones(5))
    with pytest.raises(ValueError, match=r"score_rejected must have shape \(5,\), got \(3,\)"):
        objectives.create(name)(**statistics(name), **good | {"score_rejected": np.zeros(3)})

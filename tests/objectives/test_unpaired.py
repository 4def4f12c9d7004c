"""Labelled responses: the reference point of KTO, weights and shifts, metrics, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import objectives
from tests.objectives.pairs import draw, log_probs

F32 = 2e-6
LABELS = np.array([True, False, False, True, True])


def statistics(seed=0):
    return draw(seed, names=("policy", "ref"))


def sigma(x):
    return 1.0 / (1.0 + np.exp(-x))


@pytest.mark.parametrize("drift", [2.0, -2.0])
def test_reference_point_of_kto(drift):
    """The mean of mismatched log-ratios, not below 0, over those that are no padding, and without gradient."""
    inputs = statistics()
    ref_kl = log_probs([-5.0, -9.0, 7.0], [2, 1, 0])
    policy_kl = log_probs([-5.0 + drift, -9.0 + 3 * drift, -70.0], [2, 1, 0])
    k = max(0.0, 2 * drift)
    h = np.float64(inputs["policy"].sum) - np.float64(inputs["ref"].sum)
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    want = np.where(LABELS, 1.5 * (1 - sigma(0.1 * (h - k))), 0.5 * (1 - sigma(0.1 * (k - h))))

    def loss(policy_kl):
        output = objectives.kto(**inputs, desirable=LABELS, policy_kl=policy_kl, ref_kl=ref_kl, **weights)
        return output.loss_sum, output

    gradient, output = jax.grad(loss, has_aux=True)(policy_kl)
    np.testing.assert_allclose(output.loss_sum, want.sum(), rtol=F32)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    given = objectives.kto(**inputs, desirable=LABELS, kl=jnp.float32(k), **weights)
    np.testing.assert_allclose(given.loss_sum, output.loss_sum, rtol=F32)
    metrics = {name: float(x) for name, x in output.metrics.items()}
    np.testing.assert_allclose(metrics["kl"] / float(output.weight), k, rtol=F32)
    assert metrics["desirable"] == 3
    np.testing.assert_allclose(metrics["reward_desirable"], 0.1 * h[LABELS].sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_undesirable"], 0.1 * h[~LABELS].sum(), rtol=1e-5)


def test_bco_weights_and_shift():
    inputs = statistics(1)
    h = np.float64(inputs["policy"].sum) - np.float64(inputs["ref"].sum)
    weights = np.array([1.0, 0.25, 2.0, 1.0, 0.5], np.float32)
    logit = np.where(LABELS, 1, -1) * (0.3 * h - 0.4)
    output = objectives.bco(**inputs, desirable=LABELS, reward_mean=0.4, weights=weights, beta=0.3)
    np.testing.assert_allclose(output.loss_sum, np.sum(weights * np.log1p(np.exp(-logit))), rtol=F32)


def test_bco_of_pairs_is_bco_of_their_responses():
    pairs = draw(2)
    both = {side: log_probs(jnp.concatenate([pairs[f"{side}_{r}"].sum for r in ("chosen", "rejected")]))
            for side in ("policy", "ref")}  # fmt: skip
    apart = objectives.bco(**both, desirable=np.arange(10) < 5, reward_mean=-0.2)
    np.testing.assert_allclose(objectives.bco_pair(**pairs, reward_mean=-0.2).loss_sum, apart.loss_sum, rtol=F32)
    unshifted = objectives.kto(**both, desirable=np.arange(10) < 5, kl=0.0)
    np.testing.assert_allclose(objectives.apo_zero(**pairs).loss_sum, unshifted.loss_sum, rtol=F32)


def test_refusals():
    inputs = statistics()
    with pytest.raises(ValueError, match="either policy_kl and ref_kl, of mismatched pairs, or the number kl"):
        objectives.kto(**inputs, desirable=LABELS)
    with pytest.raises(ValueError, match="either policy_kl and ref_kl"):
        objectives.kto(**inputs, desirable=LABELS, policy_kl=inputs["policy"], kl=0.0)
    with pytest.raises(ValueError, match="ref_kl has 2 responses, policy_kl has 5"):
        objectives.kto(**inputs, desirable=LABELS, policy_kl=inputs["policy"], ref_kl=log_probs([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"desirable must have shape \(5,\), got \(4,\)"):
        objectives.kto(**inputs, desirable=LABELS[:4], kl=0.0)
    with pytest.raises(ValueError, match="desirable must be 0 or 1 everywhere"):
        objectives.kto(**inputs, desirable=0.5 * LABELS, kl=0.0)
    with pytest.raises(ValueError, match=r"undesirable_weight must be in \[0.0, inf\), got -1"):
        objectives.kto(**inputs, desirable=LABELS, kl=0.0, undesirable_weight=-1)
    with pytest.raises(ValueError, match=r"weights must have shape \(5,\)"):
        objectives.bco(**inputs, desirable=LABELS, weights=jnp.ones(3))

"""Uncertainty tuning, calibration, pairs of answers and change under compression."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

import objectives
from tests.objectives.oracle import check
from tests.objectives.pairs import draw

RNG = np.random.default_rng(11)


def normal(*shape):
    return (2 * RNG.normal(size=shape)).astype(np.float32)


def uncertainty_tuning(option_logits, correct, logits=None, base_logits=None, loss_mask=None, *, divergence_weight):
    loss = F.cross_entropy(option_logits, correct.long(), reduction="none")
    if logits is None:
        return loss
    p, q = torch.softmax(logits, -1), torch.softmax(base_logits.detach(), -1)
    m = (p + q) / 2
    by_token = ((p * torch.log(p / m)).sum(-1) + (q * torch.log(q / m)).sum(-1)) / 2
    return loss + divergence_weight * (by_token * loss_mask).sum(-1)


def paired_prediction(first, second):
    return -first.sum - second.sum


def compression_distance(base_logits, logits, answers):
    return F.kl_div(
        F.log_softmax(logits, -1), F.log_softmax(base_logits.detach(), -1), log_target=True, reduction="sum"
    )


QUERY = {"option_logits": normal(3, 2), "correct": np.array([1, 0, 1])}
ANSWER = {"logits": normal(3, 4, 7), "base_logits": normal(3, 4, 7), "loss_mask": RNG.integers(0, 2, (3, 4))}
CASES = [
    ("uncertainty_tuning", uncertainty_tuning, QUERY, {"divergence_weight": 0.0}),
    ("uncertainty_tuning", uncertainty_tuning, QUERY | ANSWER, {"divergence_weight": 0.7}),
    ("paired_prediction", paired_prediction, {"first": draw(1)["policy_chosen"], "second": draw(2)["ref_chosen"]}, {}),
    (
        "compression_distance",
        compression_distance,
        {"base_logits": normal(6, 4), "logits": normal(6, 4), "answers": RNG.integers(0, 4, 6)},
        {},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{len(case[2])}")
def test_is_its_definition(case):
    name, equation, arguments, options = case
    check(objectives.create(name), equation, arguments, **options)


def test_a_model_that_did_not_change_has_no_divergence():
    same = ANSWER | {"base_logits": ANSWER["logits"]}
    ours = objectives.uncertainty_tuning(**QUERY, **same, divergence_weight=1.0)
    np.testing.assert_allclose(ours.metrics["divergence"], 0.0, atol=1e-5)
    far = {
        k: np.where(np.arange(7) == i, 1e4, 0.0) * np.ones((3, 4, 1)) for i, k in enumerate(("logits", "base_logits"))
    }
    ours = objectives.uncertainty_tuning(**QUERY, **(ANSWER | far), divergence_weight=1.0)
    np.testing.assert_allclose(ours.metrics["divergence"], np.log(2) * ANSWER["loss_mask"].sum(), rtol=1e-5)
    gradient = jax.grad(
        lambda z: (
            objectives.uncertainty_tuning(**QUERY, **(ANSWER | far | {"logits": z}), divergence_weight=1.0).loss_sum
        )
    )(jnp.float32(far["logits"]))
    assert np.isfinite(gradient).all()


def ece(confidence, correct, bins):
    """Loop over bins, as in arXiv:1706.04599, equation 3."""
    total = 0.0
    for n in range(bins):
        inside = (confidence > n / bins) & (confidence <= (n + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


def test_calibration():
    confidence = RNG.random(500)
    correct = RNG.random(500) < confidence**2
    ours = objectives.calibration_bins(confidence, correct)
    np.testing.assert_allclose(ours.expected_calibration_error, ece(confidence, correct, 15), rtol=1e-4)
    np.testing.assert_allclose(ours.brier_score, np.mean((confidence - correct) ** 2), rtol=1e-5)
    inside = [(confidence > n / 15) & (confidence <= (n + 1) / 15) for n in range(15)]
    np.testing.assert_array_equal(ours.count, [x.sum() for x in inside])
    np.testing.assert_allclose(ours.confidence, [confidence[x].sum() for x in inside], rtol=1e-5)
    np.testing.assert_array_equal(ours.correct, [correct[x].sum() for x in inside])
    parts = [objectives.calibration_bins(confidence[s], correct[s]) for s in (slice(0, 123), slice(123, None))]
    whole = jax.tree.map(jnp.add, *parts)
    np.testing.assert_allclose(whole.expected_calibration_error, ours.expected_calibration_error, rtol=1e-5)
    masked = objectives.calibration_bins(confidence, correct, np.arange(500) < 123)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), masked, parts[0])


def test_auroc_is_the_statistic_of_mann_and_whitney():
    confidence, correct = RNG.integers(0, 6, 80) / 5, RNG.random(80) < 0.4
    statistic = scipy.stats.mannwhitneyu(confidence[correct], confidence[~correct]).statistic
    want = statistic / correct.sum() / (~correct).sum()
    np.testing.assert_allclose(objectives.auroc(confidence, correct), want, rtol=1e-5)
    assert float(objectives.auroc(np.arange(4.0), np.array([0, 0, 1, 1]))) == 1.0


def test_perfect_confidence():
    ours = objectives.calibration_bins(np.array([0.0, 1.0, 1.0]), np.array([0, 1, 1]), bins=3)
    assert float(ours.expected_calibration_error) == float(ours.brier_score) == 0.0
    np.testing.assert_array_equal(ours.count, [1, 0, 2])


def world(size=5, answers=3):
    """Questions that the model cannot tell apart: weights and p(answer | question)."""
    return RNG.dirichlet(np.ones(size)), RNG.dirichlet(np.ones(answers), size=size)


def test_covariance_of_a_finite_world():
    """The best predictor of pairs knows the mixture alone; its covariance is that of the questions."""
    weights, p = world()
    first = weights @ p
    joint = np.einsum("q,qa,qb->ab", weights, p, p)
    ours = objectives.epistemic_covariance(first, joint / first[:, None])
    np.testing.assert_allclose(ours, joint - np.outer(first, first), atol=1e-7)
    np.testing.assert_allclose(np.diagonal(ours), weights @ (p - first) ** 2, atol=1e-7)


def test_known_questions_have_no_covariance():
    _, p = world()
    second = np.broadcast_to(p[:, None, :], (5, 3, 3))
    np.testing.assert_allclose(objectives.epistemic_covariance(p, second), 0.0, atol=1e-7)


def test_paired_prediction_learns_the_world():
    """The minimum of the expected loss over all tables is at the mixture's joint distribution."""
    weights, p = world()
    joint = np.einsum("q,qa,qb->ab", weights, p, p)
    a, b = (x.reshape(-1) for x in np.meshgrid(np.arange(3), np.arange(3), indexing="ij"))
    mask = np.ones((9, 1), np.float32)

    def loss(tables):
        first = objectives.sequence_logps(jnp.broadcast_to(tables[0], (9, 1, 3)), a[:, None], mask)
        second = objectives.sequence_logps(tables[1:][a][:, None], b[:, None], mask)
        each = jax.tree.map(lambda x: x[:, None], (first, second))  # one pair at a time
        return jnp.sum(joint.reshape(-1) * jax.vmap(lambda s: objectives.paired_prediction(*s).loss_sum)(each))

    first = joint.sum(1)
    best = jnp.log(jnp.float32(np.concatenate([first[None], joint / first[:, None]])))
    np.testing.assert_allclose(jax.grad(loss)(best), 0.0, atol=1e-6)
    np.testing.assert_allclose(loss(best), -(joint * np.log(joint)).sum(), rtol=1e-5)


def test_flips():
    base = np.float32([[2, 1, 0], [2, 1, 0], [2, 1, 0], [2, 1, 0]])
    new = np.float32([[2, 1, 0], [0, 1, 0], [0, 1, 2], [0, 1, 0]])
    ours = objectives.compression_distance(base, new, np.array([0, 0, 1, 1]))
    found = {k: float(v) for k, v in ours.metrics.items()}
    assert found == {"flips": 2.0, "all_flips": 3.0, "accuracy": 2.0, "base_accuracy": 2.0}
    assert found["flips"] >= abs(found["accuracy"] - found["base_accuracy"])
    many = objectives.compression_distance(normal(200, 4), normal(200, 4), RNG.integers(0, 4, 200)).metrics
    assert float(many["all_flips"]) >= float(many["flips"]) >= abs(float(many["accuracy"] - many["base_accuracy"]))
    same = objectives.compression_distance(base, base, np.zeros(4, np.int32))
    assert float(same.loss_sum) == float(same.metrics["flips"]) == 0.0


def test_refusals():
    for call, message in [
        (lambda: objectives.uncertainty_tuning(normal(3, 3), np.zeros(3)), r"option_logits must be \[B, 2\]"),
        (lambda: objectives.uncertainty_tuning(**QUERY, divergence_weight=1.0), "needs logits"),
        (lambda: objectives.uncertainty_tuning(**QUERY, logits=normal(3, 4, 7)), "go together"),
        (lambda: objectives.calibration_bins(np.zeros(3), np.zeros(2)), "correct must have shape"),
        (lambda: objectives.calibration_bins(np.zeros(3), np.zeros(3), bins=0), "bins must be 1 at least"),
        (lambda: objectives.calibration_bins(np.full(3, 80), np.zeros(3)), r"confidence must be in \[0.0, 1.0\] every"),
        (lambda: objectives.calibration_bins(np.zeros(3), np.full(3, 2)), "correct must be 0 or 1 everywhere, got 2"),
        (lambda: objectives.epistemic_covariance(np.zeros(3), np.zeros((3, 2))), "second must have shape"),
        (
            lambda: objectives.compression_distance(normal(2, 3), normal(2, 4), np.zeros(2)),
            "base_logits must have shape",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()

"""Unlearning and rerouting against torch and the authors' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import objectives
from tests.objectives.oracle import check
from tests.objectives.pairs import draw
from tests.objectives.test_cross_entropy import F32
from tests.objectives.test_cross_entropy import draw as draw_logits
from tests.trees import fast_jit


def test_gradient_ascent_is_minus_cross_entropy():
    logits, targets, mask = draw_logits(11)
    loss = lambda f: fast_jit(jax.value_and_grad(lambda x: f(x, targets, mask).loss_sum))(logits)  # noqa: E731
    (ours, gradient), (want, slope) = loss(objectives.gradient_ascent), loss(objectives.cross_entropy)
    np.testing.assert_allclose(ours, -want, rtol=F32)
    np.testing.assert_allclose(gradient, -slope, atol=F32)


def test_gradient_ascent_stops_at_the_cap():
    """Tokens of a greater loss count with the cap and have no gradient, the others are as before."""
    logits, targets, mask = draw_logits(12)
    logs = np.float64(logits) - np.log(np.exp(np.float64(logits)).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logs, targets[..., None], -1)[..., 0]
    cap = float(np.median(nll[mask != 0])) + 1e-3
    capped = lambda x: objectives.gradient_ascent(x, targets, mask, max_nll=cap)  # noqa: E731
    output, gradient = capped(logits), jax.grad(lambda x: capped(x).loss_sum)(jnp.asarray(logits))
    np.testing.assert_allclose(output.loss_sum, -(mask * np.minimum(nll, cap)).sum(), rtol=F32)
    np.testing.assert_allclose(output.metrics["nll"], (mask * nll).sum(), rtol=F32)
    live = (nll < cap) & (mask != 0)
    assert live.any()
    np.testing.assert_array_equal(np.asarray(gradient).any(-1), live)


@pytest.mark.parametrize("beta", [0.1, 1.3])
def test_npo_is_its_definition(beta):
    """As in the authors' code: -logsigmoid(beta (nll - nll of the reference)) 2 / beta of sums over tokens."""

    def equation(policy, ref, *, beta):
        return -F.logsigmoid(beta * (-policy.sum + ref.sum.detach())) * 2 / beta

    given = draw(0, names=("policy", "ref"))
    check(objectives.npo, equation, given, beta=beta)
    output = objectives.npo(**given)
    np.testing.assert_allclose(output.metrics["log_ratio"], (given["policy"].sum - given["ref"].sum).sum(), rtol=1e-5)
    assert float(output.weight) == 5


def test_npo_between_its_limits():
    """At h = 0 it is 2 log 2 / beta with the gradient of ascent; so it is everywhere as beta goes to 0."""
    given = draw(1, names=("policy", "ref"))
    sums = lambda p, **options: objectives.npo(p, given["ref"], **options).loss_sum  # noqa: E731
    gradient = jax.grad(sums)(given["policy"], beta=1e-4).sum
    np.testing.assert_allclose(gradient, np.ones(5), rtol=1e-2)
    same = objectives.npo(given["ref"], given["ref"], beta=0.3)
    np.testing.assert_allclose(same.loss_sum, 5 * 2 * np.log(2) / 0.3, rtol=1e-6)
    forgotten = given["policy"].replace(sum=given["ref"].sum - 1e4)
    value, gradient = jax.value_and_grad(sums)(forgotten, beta=0.1)
    assert float(value) == 0.0
    assert not np.any(gradient.sum)
    known = given["policy"].replace(sum=given["ref"].sum + 1e4)
    value, gradient = jax.value_and_grad(sums)(known, beta=0.1)
    np.testing.assert_allclose(value, 5 * 2e4, rtol=1e-5)
    np.testing.assert_allclose(gradient.sum, np.full(5, 2.0), rtol=1e-6)


def test_simnpo_is_its_definition():
    def equation(policy, *, beta, gamma):
        return -2 / beta * F.logsigmoid(-beta * policy.mean - gamma)

    check(objectives.simnpo, equation, draw(2, names=("policy",)), beta=1.7, gamma=0.4)


def test_retain_kl():
    """torch's kl_div of log-probabilities, as in the authors' code, at counted tokens."""
    rng = np.random.default_rng(3)
    mask = np.array([[1, 0, 1], [1, 1, 0]])
    given = {k: rng.normal(size=(2, 3, 5)).astype(np.float32) for k in ("logits", "ref_logits")}

    def equation(logits, ref_logits):
        logs = [torch.log_softmax(x, -1) for x in (logits, ref_logits.detach())]
        return F.kl_div(*logs, reduction="none", log_target=True).sum(-1) * torch.tensor(mask)

    check(lambda **x: objectives.retain_kl(**x, mask=mask), equation, given, compiled=True)
    same = objectives.retain_kl(given["logits"], given["logits"], mask)
    assert (abs(float(same.loss_sum)), float(same.weight)) == (0.0, 4.0)


def layers(seed):
    rng = np.random.default_rng(seed)
    given = {k: rng.normal(size=(2, 3, 4, 5)).astype(np.float32) for k in ("features", "original_features")}
    return given, rng.random((3, 4)).astype(np.float32) * (rng.random((3, 4)) < 0.7)


def test_rerouting_is_its_definition():
    given, mask = layers(4)

    def equation(features, original_features):
        return torch.relu(F.cosine_similarity(features, original_features.detach(), -1)) * torch.tensor(mask)

    check(lambda **x: objectives.rerouting(**x, mask=mask), equation, given, 2e-5, compiled=True)
    x = given["features"]
    output = objectives.rerouting(x, x, mask)
    np.testing.assert_allclose(output.loss_sum, output.weight, rtol=1e-6)
    np.testing.assert_allclose(output.weight, 2 * mask.sum(), rtol=1e-6)
    away = jax.value_and_grad(lambda f: objectives.rerouting(f, x, mask).loss_sum)(-jnp.asarray(x))
    assert not np.any(away[0])
    assert not np.any(away[1])


def test_rerouting_retain_is_its_definition():
    given, mask = layers(5)

    def equation(features, original_features):
        return torch.linalg.vector_norm(features - original_features.detach(), dim=-1) * torch.tensor(mask)

    check(lambda **x: objectives.rerouting_retain(**x, mask=mask), equation, given, 2e-5, compiled=True)
    x = jnp.asarray(given["features"])
    value, gradient = jax.value_and_grad(lambda f: objectives.rerouting_retain(f, x, mask).loss_sum)(x)
    assert float(value) == 0.0
    assert not np.any(gradient)  # and no NaN


def test_rerouting_weights():
    """The authors' code: progress t / 300 for 150 steps; alpha (1 - progress) and alpha progress."""
    for step in (0, 30, 150, 300, 400):
        progress = min(step / 300, 1)
        np.testing.assert_allclose(
            objectives.rerouting_weights(step, steps=150, alpha=5.0), (5 * (1 - progress), 5 * progress), rtol=1e-6
        )
    traced = jax.jit(objectives.rerouting_weights)(jnp.int32(75))
    np.testing.assert_allclose(traced, (7.5, 2.5), rtol=1e-6)


def test_forgetting_and_retaining_as_one_loss():
    """Sums of two microbatches, each divided by its own weight at the end: gradient ascent beside descent."""
    logits, targets, mask = draw_logits(13, shape=(4, 5))
    forget, retain = (slice(0, 2), slice(2, 4))
    parts = {}
    for name, rows, objective in (
        ("forget", forget, objectives.gradient_ascent),
        ("retain", retain, objectives.cross_entropy),
    ):
        halves = [objective(logits[i : i + 1], targets[i : i + 1], mask[i : i + 1]) for i in range(*rows.indices(4))]
        parts[name] = jax.tree.map(lambda a, b: a + b, *halves)
    have = sum(float(part.loss_sum / part.weight) for part in parts.values())
    logs = np.float64(logits) - np.log(np.exp(np.float64(logits)).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logs, targets[..., None], -1)[..., 0]
    means = [(mask[rows] * nll[rows]).sum() / mask[rows].sum() for rows in (forget, retain)]
    np.testing.assert_allclose(have, means[1] - means[0], rtol=1e-5)


def test_refusals():
    given = draw(3, names=("policy", "ref"))
    logits, targets, mask = draw_logits(14)
    features, _ = layers(6)
    for call, message in (
        (lambda: objectives.npo(**given, beta=0.0), "beta must be above 0, got 0.0"),
        (lambda: objectives.npo(given["policy"], given["ref"].sum), "ref must be LogProbs"),
        (lambda: objectives.gradient_ascent(logits, targets, mask, max_nll=-1.0), "max_nll must be above 0, got -1.0"),
        (
            lambda: objectives.rerouting(features["features"][0], features["features"][0], mask),
            r"must be \[L, B, T, D\]",
        ),
        (lambda: objectives.rerouting(**features, mask=mask), r"mask must have shape \(3, 4\), got \(2, 5\)"),
        (lambda: objectives.rerouting_weights(3, steps=0), "steps must be above 0, got 0"),
        (lambda: objectives.retain_kl(logits, logits[1:], mask), "teacher_logits must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

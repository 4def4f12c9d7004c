"""Distillation against definitions in float64, torch and TRL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import objectives
from objectives.distillation import divergence
from tests.objectives.oracle import check
from tests.objectives.pairs import draw as draw_pairs
from tests.trees import FLOAT32_TOLERANCE, GRADIENT_TOLERANCE, assert_close, fast_jit

SHAPE = (2, 5, 7)


def draw():
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, *SHAPE)).astype(np.float32) * 3
    targets = rng.integers(0, SHAPE[-1], SHAPE[:2])
    mask = np.array([[1, 1, 0, 1, 0.5], [0, 1, 1, 1, 0]], np.float32)
    return student, teacher, targets, mask


def log_softmax(a):
    a = np.float64(a) - np.max(a, axis=-1, keepdims=True)
    return a - np.log(np.exp(a).sum(axis=-1, keepdims=True))


def test_is_its_definition_with_gradient():
    student, teacher, targets, mask = draw()
    teacher[0, 1, 3] = -np.inf  # a class that the teacher excludes
    hidden = mask == 0
    poisoned = [np.where(hidden[..., None], np.nan, logits).astype(np.float32) for logits in (student, teacher)]
    options = {"kl_weight": 0.7, "ce_weight": 0.2, "temperature": 2.5}
    objective = objectives.create("logit_distillation", **options)

    def loss(logits, wanted):
        out = objective(logits, jnp.where(hidden, -5, targets), jnp.asarray(mask), wanted)
        return out.loss_sum, out

    (grad, teacher_grad), out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*map(jnp.asarray, poisoned))
    kl = nll = 0.0
    expected = np.zeros(SHAPE)
    for b, t in np.argwhere(~hidden):
        log_p, log_q = log_softmax(teacher[b, t] / 2.5), log_softmax(student[b, t] / 2.5)
        p = np.exp(log_p)
        kl += mask[b, t] * sum(p[z] * (log_p[z] - log_q[z]) for z in range(SHAPE[-1]) if p[z] > 0)
        hard = log_softmax(student[b, t])
        nll -= mask[b, t] * hard[targets[b, t]]
        # d/dlogits: T (q - p) of T^2 KL, and softmax less the target of the cross entropy.
        one_hot = np.eye(SHAPE[-1])[targets[b, t]]
        expected[b, t] = mask[b, t] * (0.7 * 2.5 * (np.exp(log_q) - p) + 0.2 * (np.exp(hard) - one_hot))
    assert_close(out.metrics["kl"], kl, FLOAT32_TOLERANCE)
    assert_close(out.metrics["nll"], nll, FLOAT32_TOLERANCE)
    assert_close(out.loss_sum, 0.7 * 2.5**2 * kl + 0.2 * nll, FLOAT32_TOLERANCE)
    assert float(out.weight) == mask.sum()
    assert_close(grad, expected, GRADIENT_TOLERANCE)
    assert not np.any(teacher_grad)


def test_a_student_that_agrees_has_nothing_to_learn():
    student, _, targets, mask = draw()
    shifted = jnp.asarray(student) + 3.0  # another constant per row is the same distribution
    objective = objectives.create("logit_distillation")
    loss = lambda logits: objective(logits, targets, mask, shifted).loss_sum  # noqa: E731
    value, grad = jax.value_and_grad(loss)(jnp.asarray(student))
    assert abs(float(value)) < FLOAT32_TOLERANCE
    assert np.abs(grad).max() < FLOAT32_TOLERANCE


def test_refusals():
    student, teacher, targets, mask = draw()
    for options, wanted, message in (
        ({"temperature": 0.0}, teacher, "temperature must be above 0, got 0.0"),
        ({"kl_weight": 0.0}, teacher, "kl_weight and ce_weight are both 0"),
        ({"ce_weight": -1.0}, teacher, r"ce_weight must be in \[0.0, inf\), got -1.0"),
        ({}, teacher[..., :3], r"teacher_logits must be \(2, 5, 7\) as logits, got \(2, 5, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            objectives.create("logit_distillation", **options)(student, targets, mask, wanted)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("excluded", [False, True])
def test_divergences_are_their_definitions(beta, excluded):
    """KL both ways and the mixture between, by torch in float64; classes that neither, or one, excludes."""
    student, teacher, targets, mask = draw()
    if excluded:
        student[0, 0, 2] = teacher[0, 0, 2] = -np.inf
        if beta != 1.0:
            teacher[1, 1, 4] = -np.inf
        if beta not in (0.0, 1.0):
            student[1, 2, 5] = -np.inf
    x = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    q, p = torch.softmax(x / 1.7, -1), torch.softmax(torch.tensor(teacher).double() / 1.7, -1)
    ratio = lambda a, b: torch.where(a > 0, a * torch.log(torch.where(a > 0, a / b, 1.0)), 0.0)  # noqa: E731
    m = beta * p + (1 - beta) * q
    m = torch.where(m > 0, m, 1.0)
    if beta in (0.0, 1.0):
        terms = ratio(p, torch.where(q > 0, q, 1.0)) if beta == 0.0 else ratio(q, torch.where(p > 0, p, 1.0))
    else:
        terms = beta * ratio(p, m) + (1 - beta) * ratio(q, m)
    want = (terms.sum(-1) * torch.tensor(mask)).sum()
    want.backward()
    loss = lambda z: objectives.logit_distillation(z, targets, mask, teacher, temperature=1.7, beta=beta)  # noqa: E731
    (value, output), gradient = fast_jit(
        jax.value_and_grad(lambda z: (loss(z).loss_sum, loss(z)), has_aux=True)
    )(student)  # fmt: skip
    assert_close(value, 1.7**2 * want.item(), FLOAT32_TOLERANCE)
    assert_close(output.metrics["kl"], want.item(), FLOAT32_TOLERANCE)
    assert_close(gradient, 1.7**2 * np.nan_to_num(x.grad.numpy()), GRADIENT_TOLERANCE)


def test_divergences_between_their_limits():
    """D_beta / beta -> KL(teacher || student) and D_beta / (1 - beta) -> KL(student || teacher); 0 where both agree."""
    rng = np.random.default_rng(5)
    log_p, log_q = (jnp.asarray(log_softmax(rng.normal(size=(4, 9))), jnp.float32) for _ in range(2))
    for end, near, share in ((0.0, 1e-3, 1e-3), (1.0, 1 - 1e-3, 1e-3)):
        want = divergence(log_p, log_q, end)
        np.testing.assert_allclose(divergence(log_p, log_q, near) / share, want, rtol=1e-2)
        np.testing.assert_allclose(divergence(log_p, log_q, end), divergence(log_q, log_p, 1.0 - end), rtol=1e-6)
    for beta in (0.0, 0.3, 1.0):
        assert np.abs(divergence(log_p, log_p, beta)).max() < 1e-6
    np.testing.assert_allclose(divergence(log_p, log_q, 0.5), divergence(log_q, log_p, 0.5), rtol=1e-5)
    assert (np.asarray(divergence(log_p, log_q, 0.5)) < np.log(2)).all()


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_is_that_of_trl(beta):
    """TRL's generalised Jensen-Shannon loss, which has no factor T^2 and divides by labelled tokens."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher, targets, mask = draw()
    counted = (mask != 0).astype(np.float32)
    labels = torch.tensor(np.where(counted, targets, -100))
    x = torch.tensor(student, requires_grad=True)
    want = gkd.GKDTrainer.generalized_jsd_loss(x, torch.tensor(teacher), labels, beta=beta, temperature=0.9)
    want.backward()

    def loss(z):
        output = objectives.logit_distillation(
            z, targets, counted, teacher, kl_weight=0.9**-2, temperature=0.9, beta=beta
        )
        return output.loss_sum / output.weight

    value, gradient = fast_jit(jax.value_and_grad(loss))(student)
    assert_close(value, want.item(), FLOAT32_TOLERANCE)
    assert_close(gradient, x.grad.numpy(), GRADIENT_TOLERANCE)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_function_matching_is_its_definition(beta):
    """Inputs without labels: T^2 times the divergence that `logit_distillation` takes of tokens."""
    student, teacher, targets, _ = draw()
    valid = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]])
    output = objectives.function_matching(student, teacher, valid, temperature=3.0, beta=beta)
    log_p, log_q = log_softmax(teacher / 3.0), log_softmax(student / 3.0)
    m = np.log(0.5 * np.exp(log_p) + 0.5 * np.exp(log_q))
    kl = lambda a, b: (np.exp(a) * (a - b)).sum(-1)  # noqa: E731
    want = kl(log_p, log_q) if beta == 0.0 else 0.5 * (kl(log_p, m) + kl(log_q, m))
    assert_close(output.metrics["kl"], (valid * want).sum(), FLOAT32_TOLERANCE)
    assert_close(output.loss_sum, 9.0 * (valid * want).sum(), FLOAT32_TOLERANCE)
    assert float(output.weight) == valid.sum()
    assert float(output.metrics["agreement"]) == (valid * (student.argmax(-1) == teacher.argmax(-1))).sum()
    tokens = objectives.logit_distillation(student, targets, valid, teacher, temperature=3.0, beta=beta)
    assert_close(output.loss_sum, float(tokens.loss_sum), FLOAT32_TOLERANCE)
    assert not np.any(jax.grad(lambda t: objectives.function_matching(student, t, valid).loss_sum)(teacher))


def test_mixup_is_a_mixture_of_two_inputs():
    x = np.random.default_rng(1).normal(size=(64, 3, 2)).astype(np.float32)
    key = jax.random.key(0)
    mixed = np.asarray(objectives.mixup(key, jnp.asarray(x)))
    np.testing.assert_array_equal(mixed, objectives.mixup(key, jnp.asarray(x)))  # teacher and student see the same
    shares = []
    for i in range(64):
        fits = []
        for j in range(64):
            d, e = x[i] - x[j], mixed[i] - x[j]  # mixed = x_j + r (x_i - x_j)
            r = (d * e).sum() / max((d * d).sum(), 1e-9)
            fits.append((np.abs(e - r * d).max(), r, i == j))
        error, r, alone = min(fits)
        assert error < 1e-5
        if not alone:
            assert -1e-5 < r < 1.0 + 1e-5
            shares.append(r)
    assert len(shares) > 50
    assert 0.35 < np.mean(shares) < 0.65


def test_preference_distillation_is_dpo_with_the_teacher_as_reference():
    given = draw_pairs(3)
    renamed = {k.replace("policy", "student").replace("ref", "teacher"): v for k, v in given.items()}
    ours = objectives.preference_distillation(**renamed, beta=0.3, nll_weight=0.7)
    want = objectives.dpo(**given, beta=0.3, nll_weight=0.7)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), ours, want))
    plain = objectives.dpo(**given, beta=0.3)
    chosen = given["policy_chosen"]
    assert_close(ours.loss_sum, float(plain.loss_sum) - 0.7 * float(jnp.sum(chosen.mean)), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("form", ["mse", "cosine"])
@pytest.mark.parametrize("projected", [False, True])
def test_feature_distillation_is_its_definition(form, projected):
    rng = np.random.default_rng(2)
    mask = np.array([[1, 1, 0, 1, 0.5], [0, 1, 1, 1, 0]], np.float32)
    width = 3 if projected else 6
    given = {name: rng.normal(size=(2, 5, w)).astype(np.float32) for name, w in (("features", width), ("teacher", 6))}
    if projected:
        given["projection"] = rng.normal(size=(width, 6)).astype(np.float32)

    def equation(features, teacher, projection=None):
        f = features if projection is None else features @ projection
        teacher = teacher.detach()
        if form == "mse":
            loss = torch.nn.functional.mse_loss(f, teacher, reduction="none").mean(-1)
        else:
            loss = 1 - torch.nn.functional.cosine_similarity(f, teacher, -1)
        return loss * torch.tensor(mask)

    def objective(features, teacher, projection=None):
        return objectives.feature_distillation(features, teacher, mask, projection, form=form)

    check(objective, equation, given, 2e-5, compiled=True)
    assert float(objective(**given).weight) == mask.sum()
    same = objectives.feature_distillation(given["teacher"], given["teacher"], mask, form=form)
    assert abs(float(same.loss_sum)) < 1e-5
    np.testing.assert_allclose(same.metrics["cosine"], mask.sum(), rtol=1e-6)


def test_further_refusals():
    student, teacher, targets, mask = draw()
    for call, message in (
        (lambda: objectives.logit_distillation(student, targets, mask, teacher, beta=1.5), r"beta must be in \[0.0, 1"),
        (lambda: objectives.function_matching(student, teacher, temperature=0.0), "temperature must be above 0"),
        (lambda: objectives.function_matching(student, teacher[..., 1:]), "teacher_logits must have shape"),
        (lambda: objectives.feature_distillation(student, teacher, mask, form="l1"), "form='l1' is not supported"),
        (lambda: objectives.feature_distillation(student, teacher[..., 1:], mask), "teacher_features must have shape"),
        (
            lambda: jax.jit(lambda b: objectives.logit_distillation(student, targets, mask, teacher, beta=b))(0.5),
            "beta must be a number",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()

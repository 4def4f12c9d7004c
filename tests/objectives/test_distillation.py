"""Logit distillation against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import objectives
from tests.trees import FLOAT32_TOLERANCE, GRADIENT_TOLERANCE, assert_close

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
        ({"temperature": 0.0}, teacher, "temperature must be above 0, such as 1.0, got 0.0"),
        ({"kl_weight": 0.0}, teacher, "one above, got 0.0 and 0.0"),
        ({"ce_weight": -1.0}, teacher, "must be >= 0"),
        ({}, teacher[..., :3], r"teacher_logits must be \(2, 5, 7\) as logits, got \(2, 5, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            objectives.create("logit_distillation", **options)(student, targets, mask, wanted)

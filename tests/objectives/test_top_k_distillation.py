"""Distillation from a teacher's likeliest tokens: the definition in torch, the whole vocabulary, bounds, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import objectives
from tests.trees import fast_jit

BATCH, TOKENS, CLASSES, KEPT = 3, 4, 9, 3


def draw(seed=0, kept=KEPT, scale=2.0):
    rng = np.random.default_rng(seed)
    logits, teacher = scale * rng.normal(size=(2, BATCH, TOKENS, CLASSES)).astype(np.float32)
    logps = np.array(jax.nn.log_softmax(teacher))
    tokens = np.argsort(-logps, axis=-1)[..., :kept]
    mask = (rng.random((BATCH, TOKENS)) < 0.7).astype(np.float32) * rng.uniform(0.5, 2, (BATCH, TOKENS))
    return logits, teacher, tokens, np.take_along_axis(logps, tokens, -1), np.float32(mask)


def equation(logits, tokens, logps, mask, rest):
    """With probabilities, token by token."""
    total = 0.0
    for b, t in np.argwhere(mask != 0):
        p, q = torch.exp(logps[b, t]), torch.softmax(logits[b, t], -1)
        own = q[tokens[b, t]]
        if rest == "bucket":
            p, own = torch.cat([p, 1 - p.sum()[None]]), torch.cat([own, 1 - own.sum()[None]])
        else:
            p = p / p.sum()
        total = total + float(mask[b, t]) * (p * (torch.log(p) - torch.log(own))).sum()
    return total


@pytest.mark.parametrize("rest", ["bucket", "renormalise"])
def test_is_its_definition(rest):
    logits, _, tokens, logps, mask = draw()
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    want = equation(x, torch.tensor(tokens), torch.tensor(logps, dtype=torch.float64), mask, rest)
    want.backward()
    loss = objectives.create("top_k_distillation", rest=rest)
    poisoned = np.where(mask[..., None] == 0, np.nan, logits)
    wild = np.where(mask[..., None] == 0, -5, tokens), np.where(mask[..., None] == 0, np.nan, logps)
    value, gradient = fast_jit(jax.value_and_grad(lambda z: loss(z, *map(jnp.asarray, wild), mask).loss_sum))(
        jnp.asarray(poisoned)
    )
    np.testing.assert_allclose(value, want.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, x.grad, rtol=1e-4, atol=1e-6)
    output = loss(logits, tokens, logps, mask)
    np.testing.assert_allclose(output.weight, mask.sum(), rtol=1e-6)
    np.testing.assert_allclose(output.metrics["covered"], (mask * np.exp(logps).sum(-1)).sum(), rtol=1e-5)


@pytest.mark.parametrize("rest", ["bucket", "renormalise"])
def test_all_tokens_are_the_whole_divergence(rest):
    logits, teacher, tokens, logps, mask = draw(1, CLASSES)
    targets = np.zeros((BATCH, TOKENS), np.int32)

    def whole(z):
        return objectives.logit_distillation(z, targets, mask, teacher).loss_sum

    def kept(z):
        return objectives.top_k_distillation(z, tokens, logps, mask, rest=rest).loss_sum

    (want, slopes), (got, ours) = (fast_jit(jax.value_and_grad(f))(jnp.asarray(logits)) for f in (whole, kept))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(ours, slopes, rtol=1e-4, atol=1e-6)


def test_fewer_classes_have_less_divergence():
    """Merging classes lowers a divergence: the bucket's loss rises with K to that of the whole vocabulary."""
    losses = []
    for k in (1, 4, CLASSES - 1):
        logits, _, tokens, logps, mask = draw(2, k)
        losses.append(float(fast_jit(objectives.top_k_distillation)(logits, tokens, logps, mask).loss_sum))
    assert np.all(np.diff(losses) > 0)
    _, teacher, tokens, logps, mask = draw(2)
    same = fast_jit(objectives.top_k_distillation)(teacher, tokens, logps, mask)
    np.testing.assert_allclose(same.loss_sum, 0.0, atol=1e-5)


@pytest.mark.parametrize("rest", ["bucket", "renormalise"])
def test_a_teacher_that_is_sure(rest):
    """All of the mass is on what is kept, or a token has none: finite, and nothing is said of the others."""
    logits, _, tokens, _, mask = draw(3, scale=1e3)
    sure = np.where(np.arange(KEPT) == 0, 0.0, -np.inf) + np.zeros((BATCH, TOKENS, 1), np.float32)
    loss = objectives.create("top_k_distillation", rest=rest)
    value, gradient = fast_jit(jax.value_and_grad(lambda z: loss(z, tokens, np.float32(sure), mask).loss_sum))(
        jnp.asarray(logits)
    )
    want = objectives.cross_entropy(logits, tokens[..., 0], mask).loss_sum
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_refusals():
    logits, _, tokens, logps, mask = draw()
    loss = objectives.top_k_distillation
    with pytest.raises(ValueError, match="rest='buckets' is not supported; did you mean \"'bucket'\""):
        loss(logits, tokens, logps, mask, rest="buckets")
    with pytest.raises(ValueError, match=r"teacher_logps must have shape \(3, 4, 3\), got \(3, 4, 2\)"):
        loss(logits, tokens, logps[..., :2], mask)
    with pytest.raises(ValueError, match=r"teacher_tokens must be \[B, T, K\] with K >= 1, got \(3, 4\)"):
        loss(logits, tokens[..., 0], logps, mask)
    wrong = np.where(mask[..., None] != 0, CLASSES, tokens)
    with pytest.raises(ValueError, match=r"teacher_tokens must be in \[0, 8\] everywhere, got 9"):
        loss(logits, wrong, logps, mask)
    assert np.isnan(jax.jit(loss)(logits, wrong, logps, mask).loss_sum)

"""Cross entropy against hand-computed numbers, float64 loops, optax and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import objectives

F32 = 2e-6  # relative, of sums of a few dozen float32 terms


def draw(seed=0, shape=(2, 5), classes=11, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(*shape, classes)).astype(np.float32) * scale
    targets = rng.integers(0, classes, shape).astype(np.int32)
    mask = (rng.random(shape) * (rng.random(shape) < 0.7)).astype(np.float32)
    return logits, targets, mask


def loops(logits, targets, mask, z_loss, label_smoothing):
    """The definition, element by element, in float64."""
    total, nll_total = 0.0, 0.0
    for index in np.ndindex(targets.shape):
        row = logits[index].astype(np.float64)
        log_z = np.log(np.sum(np.exp(row)))
        log_p = row - log_z
        nll = -log_p[targets[index]]
        loss = (1 - label_smoothing) * nll - label_smoothing / len(row) * log_p.sum() + z_loss * log_z**2
        total += mask[index] * loss
        nll_total += mask[index] * nll
    return total, nll_total


def test_by_hand():
    """Two classes with logits (0, ln 3): p = (1/4, 3/4)."""
    logits = jnp.array([[[0.0, np.log(3.0)], [0.0, np.log(3.0)], [0.0, 0.0]]])
    output = objectives.cross_entropy(logits, jnp.array([[0, 1, 1]]), jnp.array([[1.0, 2.0, 0.0]]))
    np.testing.assert_allclose(output.loss_sum, np.log(4) + 2 * np.log(4 / 3), rtol=F32)
    assert float(output.weight) == 3.0
    assert float(output.metrics["accuracy"]) == 2.0


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_is_its_definition(z_loss, label_smoothing):
    logits, targets, mask = draw()
    output = objectives.cross_entropy(logits, targets, mask, z_loss=z_loss, label_smoothing=label_smoothing)
    total, nll = loops(logits, targets, mask, z_loss, label_smoothing)
    np.testing.assert_allclose(output.loss_sum, total, rtol=F32)
    np.testing.assert_allclose(output.metrics["nll"], nll, rtol=F32)
    np.testing.assert_allclose(output.weight, mask.sum(), rtol=F32)
    correct = (logits.argmax(-1) == targets) * mask
    np.testing.assert_allclose(output.metrics["accuracy"], correct.sum(), rtol=F32)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_equals_torch_with_gradient(label_smoothing):
    logits, targets, mask = draw(1)
    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    per_token = torch.nn.functional.cross_entropy(
        theirs.reshape(-1, 11), torch.tensor(targets.ravel(), dtype=torch.long),
        reduction="none", label_smoothing=label_smoothing,
    )  # fmt: skip
    loss = (per_token * torch.tensor(mask.ravel())).sum()
    loss.backward()
    loss_of = lambda x: objectives.cross_entropy(x, targets, mask, label_smoothing=label_smoothing).loss_sum  # noqa: E731
    ours, grad = jax.value_and_grad(loss_of)(jnp.asarray(logits))
    np.testing.assert_allclose(ours, loss.item(), rtol=F32)
    np.testing.assert_allclose(grad, theirs.grad.numpy(), atol=F32)


def test_equals_optax():
    logits, targets, mask = draw(2)
    theirs = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
    ours = objectives.cross_entropy(logits, targets, mask).loss_sum
    np.testing.assert_allclose(ours, (theirs * mask).sum(), rtol=F32)


def test_label_smoothing_is_that_of_optax_and_transformers():
    smoother = pytest.importorskip("transformers.trainer_pt_utils").LabelSmoother(epsilon=0.3)
    logits, targets, mask = draw(8)
    mask = (mask != 0).astype(np.float32)
    ours = objectives.cross_entropy(logits, targets, mask, label_smoothing=0.3).loss_sum
    dense = optax.losses.smooth_labels(jax.nn.one_hot(targets, logits.shape[-1]), 0.3)
    np.testing.assert_allclose(ours, (optax.losses.softmax_cross_entropy(logits, dense) * mask).sum(), rtol=F32)
    labels = torch.tensor(np.where(mask != 0, targets, smoother.ignore_index), dtype=torch.long)
    theirs = smoother({"logits": torch.tensor(logits, dtype=torch.float64)}, labels) * mask.sum()
    np.testing.assert_allclose(ours, theirs.item(), rtol=F32)


def test_padding_columns():
    """Of -inf they take no part, unless labels are smoothed: then they are cut off, or the loss is infinite."""
    logits, targets, mask = draw(9)
    padded = np.pad(logits, ((0, 0), (0, 0), (0, 3)), constant_values=-np.inf)
    loss = jax.value_and_grad(lambda x: objectives.cross_entropy(x, targets, mask, z_loss=0.1).loss_sum)
    want, clean = loss(jnp.asarray(logits))
    value, grad = loss(jnp.asarray(padded))
    np.testing.assert_allclose(value, want, rtol=F32)
    np.testing.assert_allclose(grad[..., :11], clean, atol=F32)
    np.testing.assert_array_equal(grad[..., 11:], 0.0)
    assert objectives.cross_entropy(padded, targets, mask, label_smoothing=0.1).loss_sum == np.inf


def test_masked_positions_have_no_influence():
    """Neither NaN logits nor impossible targets where the mask is 0 reach the loss or its gradient."""
    logits, targets, mask = draw(3)
    poisoned = np.where(mask[..., None] == 0, np.nan, logits)
    wild = np.where(mask == 0, -7, targets)
    options = {"z_loss": 0.1, "label_smoothing": 0.1}
    loss = lambda x, t: objectives.cross_entropy(x, t, mask, **options).loss_sum  # noqa: E731
    clean_value, clean = jax.value_and_grad(loss)(jnp.asarray(logits), targets)
    value, grad = jax.value_and_grad(loss)(jnp.asarray(poisoned), wild)
    assert float(value) == float(clean_value)
    np.testing.assert_array_equal(grad, clean)
    assert not grad[mask == 0].any()


@pytest.mark.parametrize("target", [-1, 11])
def test_a_counted_target_outside_the_vocabulary_is_an_error_or_nan(target):
    logits, targets, mask = draw(4)
    targets[0, 0], mask[0, 0] = target, 1.0
    with pytest.raises(ValueError, match=rf"targets\[0, 0\] = {target} is outside the vocabulary, \[0, 11\)"):
        objectives.cross_entropy(logits, targets, mask)
    assert np.isnan(jax.jit(objectives.cross_entropy)(logits, targets, mask).loss_sum)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_at_extremes(dtype):
    logits = jnp.array([[[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]]], dtype)
    targets, mask = jnp.array([[1, 2]]), jnp.ones((1, 2))
    loss = lambda x: objectives.cross_entropy(x, targets, mask).loss_sum  # noqa: E731
    value, grad = jax.value_and_grad(loss)(logits)
    expected = float(logits[0, 0, 0].astype(jnp.float32) - logits[0, 0, 1].astype(jnp.float32)) + np.log(3)
    np.testing.assert_allclose(value, expected, rtol=F32)
    assert np.isfinite(np.asarray(grad, np.float32)).all()
    assert grad.dtype == dtype


def test_sums_of_parts_are_the_whole():
    logits, targets, mask = draw(5, shape=(6, 4))
    whole = objectives.cross_entropy(logits, targets, mask, z_loss=0.1)
    parts = [
        objectives.cross_entropy(logits[i : i + 2], targets[i : i + 2], mask[i : i + 2], z_loss=0.1) for i in (0, 2, 4)
    ]
    total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    for a, b in zip(jax.tree.leaves(total), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=F32)


def test_errors_name_the_nearest():
    with pytest.raises(KeyError, match="did you mean 'cross_entropy'"):
        objectives.create("cross_entrpy")
    with pytest.raises(ValueError, match="did you mean 'z_loss'"):
        objectives.create("cross_entropy", zloss=0.1)
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        objectives.create("cross_entropy", label_smoothing=1.0)(*draw())
    logits, targets, mask = draw()
    with pytest.raises(ValueError, match=r"targets and loss_mask of shape \(2, 5\)"):
        objectives.cross_entropy(logits, targets[:, :-1], mask)
    assert "cross_entropy" in objectives.list_objectives()

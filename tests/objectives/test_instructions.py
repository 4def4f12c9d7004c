"""Losses over instructions and of examples of different quality, by loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import objectives
from tests.objectives.test_cross_entropy import F32, draw, loops


def masks(seed):
    role = np.random.default_rng(seed).integers(0, 3, (2, 5))  # 0 template, 1 prompt, 2 response
    return (role == 2).astype(np.float32), (role == 1).astype(np.float32)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_instruction_modelling_is_its_definition(weight):
    logits, targets, _ = draw(6)
    response, prompt = masks(6)
    loss = objectives.create("instruction_modelling", prompt_weight=weight, z_loss=0.1, label_smoothing=0.2)
    output = loss(logits, targets, response, prompt)
    total, nll = loops(logits, targets, response + weight * prompt, 0.1, 0.2)
    np.testing.assert_allclose(output.loss_sum, total, rtol=F32)
    np.testing.assert_allclose(output.metrics["nll"], nll, rtol=F32)
    np.testing.assert_allclose(output.weight, response.sum() + weight * prompt.sum(), rtol=F32)
    for name, mask in (("response", response), ("prompt", prompt)):
        np.testing.assert_allclose(output.metrics[f"nll_{name}"], loops(logits, targets, mask, 0, 0)[1], rtol=F32)
        assert float(output.metrics[f"tokens_{name}"]) == mask.sum()


def test_instruction_modelling_between_its_limits():
    """Weight 0 is tuning on responses, weight 1 one loss over both; the gradient at template tokens is 0."""
    logits, targets, _ = draw(7)
    response, prompt = masks(7)
    for weight, mask in ((0.0, response), (1.0, response + prompt)):
        ours = functools.partial(objectives.instruction_modelling, prompt_weight=weight)
        have, want = (
            jax.value_and_grad(lambda x, f=f, masks=masks: f(x, targets, *masks).loss_sum)(jnp.asarray(logits))
            for f, masks in ((ours, (response, prompt)), (objectives.cross_entropy, (mask,)))
        )
        np.testing.assert_array_equal(have[0], want[0])
        np.testing.assert_array_equal(have[1], want[1])
        assert not np.asarray(have[1])[response + prompt == 0].any()


@pytest.mark.parametrize("normalise", ["weighted", "plain"])
@pytest.mark.parametrize("packed", [False, True])
def test_weighted_cross_entropy_is_its_definition(normalise, packed):
    logits, targets, mask = draw(8)
    quality = np.random.default_rng(8).random((2, 5) if packed else 2).astype(np.float32)
    per_token = quality if packed else np.repeat(quality[:, None], 5, 1)
    output = objectives.create("weighted_cross_entropy", normalise=normalise)(logits, targets, mask, quality)
    total, nll = loops(logits, targets, mask * per_token, 0, 0)
    np.testing.assert_allclose(output.loss_sum, total, rtol=F32)
    np.testing.assert_allclose(output.metrics["nll"], nll, rtol=F32)
    weight = mask * per_token if normalise == "weighted" else mask
    np.testing.assert_allclose(output.weight, weight.sum(), rtol=F32)


def test_weighted_cross_entropy_where_examples_are_alike():
    """Any equal qualities give the mean loss of `cross_entropy`; an example of quality 0 might be missing."""
    logits, targets, mask = draw(9)
    plain = objectives.cross_entropy(logits, targets, mask)
    alike = objectives.weighted_cross_entropy(logits, targets, mask, np.full(2, 0.3, np.float32))
    np.testing.assert_allclose(alike.loss_sum / alike.weight, plain.loss_sum / plain.weight, rtol=F32)
    logits[1] = np.nan
    first = objectives.weighted_cross_entropy(logits, targets, mask, np.array([1.0, 0.0]))
    alone = objectives.cross_entropy(logits[:1], targets[:1], mask[:1])
    np.testing.assert_array_equal(first.loss_sum, alone.loss_sum)
    assert float(first.weight) == float(alone.weight)


def test_refusals():
    logits, targets, mask = draw(9)
    with pytest.raises(ValueError, match=r"quality must be in \[0.0, 1.0\]"):
        objectives.weighted_cross_entropy(logits, targets, mask, np.array([1.0, 1.5]))
    with pytest.raises(ValueError, match=r"quality must have shape \(2,\), got \(3,\)"):
        objectives.weighted_cross_entropy(logits, targets, mask, np.ones(3))
    with pytest.raises(ValueError, match="normalise='mean' is not supported"):
        objectives.weighted_cross_entropy(logits, targets, mask, np.ones(2), normalise="mean")
    with pytest.raises(ValueError, match=r"response_mask \+ prompt_mask must be in"):
        objectives.instruction_modelling(logits, targets, np.ones((2, 5)), np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"prompt_weight must be in \[0.0, inf\), got -1"):
        objectives.instruction_modelling(logits, targets, mask, 0 * mask, prompt_weight=-1)

"""Masked diffusion: schedules by quadrature, noise by counting, the bound by loops and where it is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import objectives
from objectives import diffusion

SCHEDULES = [("linear", 2.0), ("polynomial", 3.0), ("cosine", 2.0)]


@pytest.mark.parametrize(("schedule", "power"), SCHEDULES)
def test_weights_belong_to_the_schedule(schedule, power):
    """alpha falls from 1 to 0; w = -alpha' / (1 - alpha), by differences in float64; w (1 - alpha) integrates to 1."""
    t = np.linspace(1e-3, 1 - 1e-3, 4001)
    alpha = np.asarray(
        {"linear": 1 - t, "polynomial": 1 - t**power, "cosine": 1 - np.cos(np.pi / 2 * (1 - t))}[schedule]
    )
    options = {"schedule": schedule, "power": power}
    np.testing.assert_allclose(diffusion.clean_probability(jnp.asarray(t), **options), alpha, atol=1e-6)
    weights = np.asarray(diffusion.bound_weight(jnp.asarray(t), **options), np.float64)
    late = slice(200, -1)  # earlier, a step of the grid is no small part of t
    np.testing.assert_allclose(weights[late], (-np.gradient(alpha, t) / (1 - alpha))[late], rtol=1e-4)
    np.testing.assert_allclose(np.trapezoid(weights * (1 - alpha), t), 1, atol=4e-3)
    ends = diffusion.clean_probability(jnp.array([0.0, 1.0]), **options)
    np.testing.assert_allclose(ends, [1, 0], atol=1e-6)


def test_times_cover_the_interval():
    for seed in range(3):
        times = np.sort(diffusion.draw_times(jax.random.key(seed), 10, least=0.1))
        assert ((times >= 0.1) & (times < 1)).all()
        np.testing.assert_array_equal(np.floor((times - 0.1) / 0.09 + 1e-4), np.arange(10))


@pytest.mark.parametrize(("schedule", "power"), SCHEDULES)
def test_noise(schedule, power):
    """The share of masked tokens is 1 - alpha to five standard deviations; prompts stay; masked ones are the mask."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 9, (3, 20000)))
    times, valid = jnp.array([0.1, 0.5, 0.9]), jnp.arange(20000) >= 100
    valid = jnp.broadcast_to(valid, tokens.shape)
    options = {"schedule": schedule, "power": power}
    noisy, masked = diffusion.mask_tokens(jax.random.key(1), tokens, times, 9, valid, **options)
    p = 1 - np.asarray(diffusion.clean_probability(times, **options))
    share = np.asarray(masked)[:, 100:].mean(1)
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / 19900)).all()
    assert not np.asarray(masked)[:, :100].any()
    np.testing.assert_array_equal(noisy, np.where(masked, 9, tokens))


def draw(seed=0, batch=4, tokens=6, classes=7):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(batch, tokens, classes)).astype(np.float32)
    targets, masked = rng.integers(0, classes - 1, (batch, tokens)), rng.random((batch, tokens)) < 0.5
    masked[0] = False  # nothing was masked
    return logits, targets, masked, rng.uniform(0.05, 0.95, batch).astype(np.float32), rng.random((batch, tokens)) < 0.8


@pytest.mark.parametrize(("schedule", "power"), SCHEDULES)
def test_is_its_definition(schedule, power):
    logits, targets, masked, times, valid = draw()
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(times, dtype=torch.float64)
    w = {"linear": 1 / t, "polynomial": power / t, "cosine": np.pi / 2 / torch.tan(np.pi / 2 * t)}[schedule]
    logs = torch.log_softmax(x[..., :-1], -1)  # the last class is the mask token
    nll = -logs.gather(-1, torch.tensor(targets)[..., None])[..., 0] * torch.tensor(masked & valid)
    want = (w[:, None] * nll).sum()
    want.backward()
    loss = objectives.create("masked_diffusion", schedule=schedule, power=power, mask_token=6)
    given = (jnp.asarray(targets), masked, jnp.asarray(times), valid)
    output = loss(jnp.asarray(logits), *given)
    np.testing.assert_allclose(output.loss_sum, want.detach(), rtol=1e-5)
    assert float(output.weight) == valid.sum()
    np.testing.assert_allclose(output.metrics["nll"], nll.sum().detach(), rtol=1e-5)
    assert float(output.metrics["masked"]) == (masked & valid).sum()
    gradient = jax.grad(lambda z: loss(z, *given).loss_sum)(jnp.asarray(logits))
    np.testing.assert_allclose(gradient, x.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("schedule", "power"), SCHEDULES)
def test_of_a_model_that_knows_nothing(schedule, power):
    """Equal logits: the expected bound is log Z per token for any schedule, whatever the time is drawn from."""
    batch, tokens = 256, 64
    keys = jax.random.split(jax.random.key(2))
    times, options = diffusion.draw_times(keys[0], batch), {"schedule": schedule, "power": power}
    targets = jnp.zeros((batch, tokens), jnp.int32)
    _, masked = diffusion.mask_tokens(keys[1], targets, times, 5, **options)
    output = diffusion.masked_diffusion(jnp.zeros((batch, tokens, 5)), targets, masked, times, **options)
    np.testing.assert_allclose(output.loss_sum / output.weight, np.log(5), rtol=0.1)


@pytest.mark.parametrize(("schedule", "power"), SCHEDULES)
@pytest.mark.parametrize("steps", [1, 3, 200])
def test_discrete_steps(schedule, power, steps):
    """Equal logits: over all steps the bound is log Z exactly; weights tend to those of continuous time; one step is
    the cross entropy of all tokens; drawn times are steps, each as often."""
    options = {"schedule": schedule, "power": power}
    times = (jnp.arange(steps) + 1.0) / steps
    weights = np.float64(diffusion.bound_weight(times, steps=steps, **options))
    masked = 1 - np.float64(diffusion.clean_probability(times, **options))
    np.testing.assert_allclose(np.mean(weights * masked), 1.0, rtol=1e-5)
    if steps == 1:
        np.testing.assert_allclose(weights, 1.0, rtol=1e-6)
    if steps == 200:
        middle = slice(60, 180)
        want = diffusion.bound_weight(times, **options)
        np.testing.assert_allclose(weights[middle], want[middle], rtol=0.02, atol=0.02)
    drawn = np.asarray(diffusion.draw_times(jax.random.key(0), 4 * steps, steps=steps)) * steps
    np.testing.assert_allclose(drawn, np.round(drawn), atol=1e-3)
    assert set(np.round(drawn).astype(int)) == set(range(1, steps + 1))
    logits, targets, hidden, _, valid = draw()
    given = (jnp.asarray(targets), hidden, jnp.full(4, times[-1]), valid)
    output = objectives.create("masked_diffusion", steps=steps, **options)(jnp.asarray(logits), *given)
    np.testing.assert_allclose(output.loss_sum, weights[-1] * output.metrics["nll"], rtol=1e-5)


def test_refusals():
    logits, targets, masked, times, _ = draw()
    with pytest.raises(ValueError, match="schedule='cosin' is not supported"):
        diffusion.masked_diffusion(jnp.asarray(logits), targets, masked, times, schedule="cosin")
    with pytest.raises(ValueError, match=r"mask_token must be in \[0, 7\), got 7"):
        diffusion.masked_diffusion(jnp.asarray(logits), targets, masked, times, mask_token=7)
    with pytest.raises(ValueError, match=r"times must have shape \(4,\), got \(3,\)"):
        diffusion.masked_diffusion(jnp.asarray(logits), targets, masked, times[:3])
    with pytest.raises(ValueError, match=r"steps must be in \[1, inf\), got 0"):
        diffusion.masked_diffusion(jnp.asarray(logits), targets, masked, times, steps=0)
    with pytest.raises(ValueError, match="power must be above 0, got 0"):
        diffusion.clean_probability(jnp.asarray(times), schedule="polynomial", power=0)

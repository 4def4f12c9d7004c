"""Regression of vectors, noise, and MELLE's loss against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import objectives
from objectives import continuous
from tests.objectives.oracle import check

ROWS, FRAMES, WIDTH = 3, 6, 4


def draw(seed, *names):
    rng = np.random.default_rng(seed)
    mask = (np.arange(FRAMES) < np.array([[6], [4], [1]])).astype(np.float32)
    return {name: rng.normal(size=(ROWS, FRAMES, WIDTH)).astype(np.float32) for name in names}, mask, rng


@pytest.mark.parametrize("weighted", [False, True])
def test_vector_regression_is_its_definition(weighted):
    given, mask, rng = draw(0, "predictions", "targets")
    mask *= rng.random(mask.shape).astype(np.float32)
    weights = rng.random(mask.shape).astype(np.float32) if weighted else None

    def equation(predictions, targets):
        error = F.mse_loss(predictions, targets.detach(), reduction="none").sum(-1)
        return error * torch.tensor(mask) * (1 if weights is None else torch.tensor(weights))

    check(
        lambda **x: objectives.vector_regression(**x, loss_mask=mask, weights=weights), equation, given, compiled=True
    )
    output = objectives.vector_regression(**given, loss_mask=mask, weights=weights)
    np.testing.assert_allclose(output.weight, mask.sum(), rtol=1e-6)
    error = ((given["predictions"] - given["targets"]) ** 2).sum(-1)
    np.testing.assert_allclose(output.metrics["squared_error"], (mask * error).sum(), rtol=1e-5)


def test_cosine_schedule():
    t = np.linspace(0.01, 0.99, 21)
    want = np.log(np.cos(np.pi / 2 * t) ** 2 / np.sin(np.pi / 2 * t) ** 2)
    np.testing.assert_allclose(continuous.cosine_log_snr(jnp.asarray(t)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", continuous.PREDICTIONS)
def test_noise_and_targets_give_the_clean_vector_back(prediction):
    """x = alpha z - sigma v = (z - sigma e) / alpha, in float64 from what `noisy` returns."""
    given, _, rng = draw(1, "clean", "noise")
    log_snr = rng.normal(size=(ROWS, FRAMES)).astype(np.float32) * 3
    z, target = (np.float64(x) for x in continuous.noisy(**given, log_snr=log_snr, prediction=prediction))
    alpha = np.sqrt(1 / (1 + np.exp(-np.float64(log_snr))))[..., None]
    sigma = np.sqrt(1 - alpha**2)
    np.testing.assert_allclose(z, alpha * given["clean"] + sigma * given["noise"], atol=1e-5)
    clean = {"noise": (z - sigma * target) / alpha, "velocity": alpha * z - sigma * target, "clean": target}[prediction]
    np.testing.assert_allclose(clean, given["clean"], atol=1e-4)


def melle(frames, refined, mean, log_variance, stop_logits, targets, *, mask, stop, kl, flux, halt, positive):
    """The paper's equations with torch's losses and distributions."""
    normal = torch.distributions.Normal
    mask = torch.tensor(mask).double()
    regression = sum(
        f(y, targets, reduction="none").sum(-1) for f in (F.l1_loss, F.mse_loss) for y in (frames, refined)
    )
    divergence = torch.distributions.kl_divergence(
        normal(mean, torch.exp(0.5 * log_variance)), normal(targets, torch.ones_like(targets))
    ).sum(-1)
    change = -(mean[:, 1:] - targets[:, :-1]).abs().sum(-1)
    change = torch.cat([torch.zeros(ROWS, 1), change], 1)
    stopping = F.binary_cross_entropy_with_logits(
        stop_logits, torch.tensor(stop).double(), pos_weight=torch.tensor(positive), reduction="none"
    )
    return mask * (regression + kl * divergence + flux * change + halt * stopping)


def test_melle_is_its_definition():
    given, mask, rng = draw(2, "frames", "refined", "mean", "log_variance", "targets")
    given["stop_logits"] = rng.normal(size=(ROWS, FRAMES)).astype(np.float32)
    stop = np.arange(FRAMES) == mask.sum(1, keepdims=True) - 1
    weights = {"kl_weight": 0.2, "flux_weight": 0.3, "stop_weight": 0.7, "positive_weight": 13.0}
    check(
        lambda **x: objectives.melle(**x, loss_mask=mask, stop=stop, **weights),
        lambda **x: melle(**x, mask=mask, stop=stop, kl=0.2, flux=0.3, halt=0.7, positive=13.0),
        given,
        2e-5,
        compiled=True,
    )
    assert objectives.OBJECTIVES.get("melle").defaults == {
        "kl_weight": 0.1, "flux_weight": 0.5, "stop_weight": 1.0, "positive_weight": 100.0,
    }  # fmt: skip


def test_flux_looks_back_at_counted_frames_alone():
    given, mask, _ = draw(3, "frames", "refined", "mean", "log_variance", "targets")
    mask[0, 2] = 0.0
    given["targets"][0, 2] = 1e6
    extra = {"stop_logits": np.zeros((ROWS, FRAMES)), "stop": np.zeros((ROWS, FRAMES), bool), "loss_mask": mask}
    flux = objectives.melle(**given, **extra).metrics["flux"]
    pairs = [(b, t) for b in range(ROWS) for t in range(1, FRAMES) if mask[b, t] and mask[b, t - 1]]
    want = -sum(np.abs(given["mean"][b, t] - given["targets"][b, t - 1]).sum() for b, t in pairs)
    np.testing.assert_allclose(flux, want, rtol=1e-5)


def test_refusals():
    given, mask, _ = draw(4, "predictions", "targets")
    with pytest.raises(ValueError, match=r"targets must have shape \(3, 6, 4\), got \(3, 6, 3\)"):
        objectives.vector_regression(given["predictions"], given["targets"][..., 1:], mask)
    with pytest.raises(ValueError, match="prediction='epsilon' is not supported"):
        continuous.noisy(given["predictions"], given["targets"], mask, prediction="epsilon")
    one = given["targets"]
    with pytest.raises(ValueError, match=r"kl_weight must be in \[0.0, inf\), got -1"):
        objectives.melle(one, one, one, one, mask, one, mask, mask, kl_weight=-1)
    assert jax.tree.leaves(objectives.melle(one, one, one, one, mask, one, 0 * mask, mask)) == [0.0] * 6

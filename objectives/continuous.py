"""Continuous tokens: regression of vectors, denoising, and the loss of MELLE's spectrogram frames."""

import math

import jax
import jax.numpy as jnp

from objectives.checks import check_range, check_shape
from objectives.output import LossOutput
from objectives.registry import register
from zoo.core.registry import check_choice

PREDICTIONS = ("noise", "velocity", "clean")


def _at(counted: jax.Array, *vectors: jax.Array) -> list[jax.Array]:
    """Vectors in float32, 0 where not counted, so that NaN there reaches neither loss nor gradient."""
    return [jnp.where(counted[..., None], x.astype(jnp.float32), 0.0) for x in vectors]


def cosine_log_snr(times: jax.Array) -> jax.Array:
    """log(alpha^2 / sigma^2) = -2 log tan(pi t / 2) of alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    The schedule of arXiv:2204.03458, without truncation.

    Args:
      times: float[...], in (0, 1).
    """
    return -2.0 * jnp.log(jnp.tan(0.5 * jnp.pi * times))


def noisy(
    clean: jax.Array, noise: jax.Array, log_snr: jax.Array, *, prediction: str = "velocity"
) -> tuple[jax.Array, jax.Array]:
    """Noised vectors and what a denoiser is to predict of them (arXiv:2202.00512, section 4).

      z = alpha x + sigma e,   alpha^2 = sigmoid(log_snr),   sigma^2 = sigmoid(-log_snr)
      noise: e,   velocity: alpha e - sigma x,   clean: x

    Args:
      clean: x, [..., D].
      noise: e, [..., D], standard normal.
      log_snr: [...], of each vector.
      prediction: noise, velocity or clean.

    Returns:
      (z, target), float32 [..., D].

    Raises:
      ValueError: shapes disagree or another prediction.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    check_shape(clean.shape, noise=noise)
    check_shape(clean.shape[:-1], log_snr=log_snr)
    clean, noise = clean.astype(jnp.float32), noise.astype(jnp.float32)
    log_snr = log_snr.astype(jnp.float32)[..., None]
    alpha, sigma = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
    target = {"noise": noise, "velocity": alpha * noise - sigma * clean, "clean": clean}[prediction]
    return alpha * clean + sigma * noise, target


@register(
    "vector_regression",
    category="diffusion",
    papers=("2412.08821", "2204.03458"),
    proof="test_continuous.py::test_vector_regression_is_its_definition",
)
def vector_regression(
    predictions: jax.Array, targets: jax.Array, loss_mask: jax.Array, weights: jax.Array | None = None
) -> LossOutput:
    """Squared error of vectors, summed over their entries.

      loss = sum_bt mask_bt w_bt |prediction_bt - target_bt|^2

    Of next embeddings this is the base model of arXiv:2412.08821 (section 2.3.1); with inputs and targets of `noisy`
    the loss of a diffusion over continuous tokens (arXiv:2204.03458).

    Args:
      predictions: float[B, T, D].
      targets: float[B, T, D]; no gradient reaches them.
      loss_mask: [B, T], weight of each position; 0 leaves it out, be it NaN.
      weights: w, [B, T], such as a function of the noise level; it does not enter the divisor. None = 1.

    Returns:
      LossOutput: weight = sum of the mask; metrics squared_error, without w.

    Raises:
      ValueError: shapes disagree.
    """
    check_shape(predictions.shape, targets=targets)
    check_shape(predictions.shape[:-1], loss_mask=loss_mask)
    mask = loss_mask.astype(jnp.float32)
    predictions, targets = _at(mask != 0, predictions, targets)
    error = jnp.sum(jnp.square(predictions - jax.lax.stop_gradient(targets)), axis=-1)
    loss = error
    if weights is not None:
        check_shape(mask.shape, weights=weights)
        loss = jnp.where(mask != 0, weights.astype(jnp.float32), 0.0) * error
    metrics = {"squared_error": jax.lax.stop_gradient(jnp.sum(mask * error))}
    return LossOutput(jnp.sum(mask * loss), jnp.sum(mask), metrics)


@register(
    "melle", category="language_model", papers=("2407.08551",), proof="test_continuous.py::test_melle_is_its_definition"
)
def melle(
    frames: jax.Array,
    refined: jax.Array,
    mean: jax.Array,
    log_variance: jax.Array,
    stop_logits: jax.Array,
    targets: jax.Array,
    loss_mask: jax.Array,
    stop: jax.Array,
    *,
    kl_weight: float = 0.1,
    flux_weight: float = 0.5,
    stop_weight: float = 1.0,
    positive_weight: float = 100.0,
) -> LossOutput:
    """Next spectrogram frames by regression, with a latent normal variable (MELLE, arXiv:2407.08551, equations 5-8).

      regression = sum_y' |y - y'|_1 + |y - y'|_2^2,   y' of frames and refined frames
      kl         = 1/2 sum_d (s_d^2 + (mu_d - y_d)^2 - 1 - log s_d^2),   of N(mu, s^2) from N(y, 1)
      flux       = -|mu_t - y_t-1|_1,   where t - 1 is counted too
      stopping   = p [stop] sp(-l) + [not stop] sp(l),   p = positive_weight
      loss       = sum_bt mask_bt (regression + kl_weight kl + flux_weight flux + stop_weight stopping)

    The defaults are the paper's, lambda, beta and gamma of equation 5 (appendix A.3) and the weight of last frames
    (section 3.3); there kl_weight is 0 for the first 10,000 steps. The flux term is unbounded below: the reward of
    moving away from the previous frame is held by the regression alone.

    Args:
      frames: y', float[B, T, D], before the post-net.
      refined: y'', float[B, T, D], after it.
      mean: mu, float[B, T, D], of the latent variable.
      log_variance: log s^2, float[B, T, D].
      stop_logits: l, float[B, T].
      targets: y, float[B, T, D].
      loss_mask: [B, T], weight of each frame; 0 leaves it out, be it NaN.
      stop: [B, T], 1 at the last frame of an utterance.
      kl_weight: at least 0.
      flux_weight: at least 0.
      stop_weight: at least 0.
      positive_weight: of the last frames, at least 0.

    Returns:
      LossOutput: weight = sum of the mask; metrics regression, kl, flux and stopping, unweighted.

    Raises:
      ValueError: shapes disagree or an option is out of range.
    """
    check_shape(targets.shape, frames=frames, refined=refined, mean=mean, log_variance=log_variance)
    check_shape(targets.shape[:-1], stop_logits=stop_logits, loss_mask=loss_mask, stop=stop)
    check_range(0.0, math.inf, kl_weight=kl_weight, flux_weight=flux_weight, stop_weight=stop_weight)
    check_range(0.0, math.inf, positive_weight=positive_weight)
    mask = loss_mask.astype(jnp.float32)
    counted = mask != 0
    frames, refined, mean, log_variance, y = _at(counted, frames, refined, mean, log_variance, targets)

    def error(prediction):
        return jnp.sum(jnp.abs(y - prediction) + jnp.square(y - prediction), axis=-1)

    # e^v - 1 - v by expm1 keeps its digits where the variance is near 1.
    spread = jnp.expm1(log_variance) - log_variance
    follows = jnp.pad(counted[:, :-1], ((0, 0), (1, 0))) & counted
    before = jnp.pad(y[:, :-1], ((0, 0), (1, 0), (0, 0)))
    logits = jnp.where(counted, stop_logits.astype(jnp.float32), 0.0)
    last = stop != 0
    terms = {
        "regression": error(frames) + error(refined),
        "kl": 0.5 * jnp.sum(spread + jnp.square(mean - y), axis=-1),
        "flux": jnp.where(follows, -jnp.sum(jnp.abs(mean - before), axis=-1), 0.0),
        "stopping": jnp.where(last, positive_weight * jax.nn.softplus(-logits), jax.nn.softplus(logits)),
    }
    sums = {name: jnp.sum(mask * term) for name, term in terms.items()}
    loss = sums["regression"] + kl_weight * sums["kl"] + flux_weight * sums["flux"] + stop_weight * sums["stopping"]
    return LossOutput(loss, jnp.sum(mask), jax.lax.stop_gradient(sums))

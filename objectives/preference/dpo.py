"""Direct preference optimisation and losses that differ from it in the function of the margin alone.

Letters: s = log pi(y | x) summed over the tokens of a response, h = s - log ref(y | x), w chosen, l rejected,
d = h_w - h_l. sp(x) = log(1 + e^x), the softplus; sigma the logistic function. All take the four statistics, return the
metrics and raise the errors of `dpo`; their docstrings name what differs.
"""

import math

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range, check_statistics
from objectives.numerics import box_cox
from objectives.output import LossOutput
from objectives.preference.pairs import reduce_pairs
from objectives.registry import register
from objectives.statistics import LogProbs, log_ratio
from zoo.core.registry import check_choice

PROOF = "test_trl_goldens.py::test_values_and_gradients"
DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


def log_ratios(
    policy_chosen: LogProbs, policy_rejected: LogProbs, ref_chosen: LogProbs, ref_rejected: LogProbs
) -> tuple[jax.Array, jax.Array]:
    """(h_w, h_l), float32 [B] each, after the checks that every objective of four statistics makes.

    Raises:
      ValueError: not LogProbs, or of different numbers of responses.
    """
    check_statistics(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    return log_ratio(policy_chosen, ref_chosen), log_ratio(policy_rejected, ref_rejected)


def per_token(x: jax.Array, responses: LogProbs) -> jax.Array:
    """x [B] divided by the number of counted tokens of each response."""
    return x / jnp.maximum(responses.count, 1.0)


def smoothed_preference(x: jax.Array, label: jax.Array | float) -> jax.Array:
    """Cross entropy of a preference with log-odds x to a label: -label log sigma(x) - (1 - label) log sigma(-x).

    Args:
      x: log-odds that the chosen response is preferred.
      label: probability that it is, in [0, 1].
    """
    return label * jax.nn.softplus(-x) + (1.0 - label) * jax.nn.softplus(x)


def divergence_score(h: jax.Array, divergence: str, alpha: jax.Array | float) -> jax.Array:
    """f'(u) up to a constant, for u = e^h = pi / ref: the implied reward over beta under an f-divergence to ref.

    Args:
      h: log-ratios.
      divergence: one of `DIVERGENCES`.
      alpha: of the alpha-divergence.
    """
    if divergence == "js":
        return math.log(2.0) - jax.nn.softplus(-h)
    return box_cox(h, {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha": -alpha}[divergence])


@register("dpo", category="preference", papers=("2305.18290", "2309.16240", "2404.19733"), proof=PROOF)
def dpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
    length_normalised: bool = False,
    nll_weight: float = 0.0,
) -> LossOutput:
    """Direct preference optimisation (arXiv:2305.18290, equation 7).

      loss = (1 - e) sp(-beta d) + e sp(beta d),   e = label_smoothing

    e > 0 is conservative DPO, for labels that are wrong with probability e. The reference has no gradient. With another
    divergence than the reverse KL, d = f'(u_w) - f'(u_l), u = e^h (f-DPO, arXiv:2309.16240):

      forward_kl  f'(u) = 1 - 1/u
      js          f'(u) = log(2 u / (1 + u))
      alpha       f'(u) = (1 - u^-alpha) / alpha, between reverse_kl (alpha 0) and forward_kl (alpha 1)

    `nll_weight` adds -nll_weight s_w / n_w, the loss per token of the chosen response (arXiv:2404.19733,
    whose mean is over the prompt's tokens too).

    Args:
      policy_chosen: of the model that is trained.
      policy_rejected: likewise, as many responses.
      ref_chosen: of the frozen reference.
      ref_rejected: likewise.
      beta: strength of the pull to the reference, above 0.
      label_smoothing: e, in [0, 0.5).
      divergence: reverse_kl, forward_kl, js or alpha; powers of u end at e^80.
      divergence_alpha: in [0, 1]; TRL's coefficient since its version 1 is 1 - alpha.
      length_normalised: whether h, or the function of it, is divided by the number of tokens (TRL's sigmoid_norm).
      nll_weight: at least 0.

    Returns:
      LossOutput: weight = number of pairs; metrics as `reduce_pairs`, rewards beta h (or beta f'(u)).

    Raises:
      ValueError: numbers of responses disagree or an option is out of range.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    check_range(0.0, 0.5, open_high=True, label_smoothing=label_smoothing)
    check_range(0.0, 1.0, divergence_alpha=divergence_alpha)
    check_range(0.0, math.inf, nll_weight=nll_weight)
    check_choice("divergence", divergence, DIVERGENCES)
    r_w, r_l = (beta * divergence_score(h, divergence, divergence_alpha) for h in (h_w, h_l))
    if length_normalised:
        r_w, r_l = per_token(r_w, policy_chosen), per_token(r_l, policy_rejected)
    loss = smoothed_preference(r_w - r_l, 1.0 - label_smoothing) - nll_weight * policy_chosen.mean
    return reduce_pairs(loss, policy_chosen, policy_rejected, r_w, r_l)


@register("robust_dpo", category="preference", papers=("2403.00409",), proof=PROOF)
def robust_dpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> LossOutput:
    """DPO without bias under labels that are flipped with probability e (arXiv:2403.00409, equation 12).

      loss = [(1 - e) sp(-beta d) - e sp(beta d)] / (1 - 2 e),   e = label_smoothing

    Args:
      beta: strength of the pull to the reference, above 0.
      label_smoothing: e, in [0, 0.5).
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    check_range(0.0, 0.5, open_high=True, label_smoothing=label_smoothing)
    x = beta * (h_w - h_l)
    loss = (1.0 - label_smoothing) * jax.nn.softplus(-x) - label_smoothing * jax.nn.softplus(x)
    loss = loss / (1.0 - 2.0 * label_smoothing)
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l)


@register("hinge", category="preference", papers=("2305.10425", "2309.06657"), proof=PROOF)
def hinge(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """Hinge on the margin (SLiC, arXiv:2305.10425, with the log-ratios of arXiv:2309.06657): max(0, 1 - beta d).

    Args:
      beta: scale of the margin, above 0.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    loss = jax.nn.relu(1.0 - beta * (h_w - h_l))
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l)


@register("ipo", category="preference", papers=("2310.12036",), proof=PROOF)
def ipo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
    length_normalised: bool = False,
) -> LossOutput:
    """Identity preference optimisation (arXiv:2310.12036, equation 17): (d - 1 / (2 beta))^2.

    Args:
      beta: the paper's tau, above 0.
      length_normalised: whether h is divided by the number of tokens, as TRL does since its version 1.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    if length_normalised:
        h_w, h_l = per_token(h_w, policy_chosen), per_token(h_l, policy_rejected)
    loss = jnp.square(h_w - h_l - 1.0 / (2.0 * beta))
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l)


@register("exo", category="preference", papers=("2402.00856",), proof=PROOF)
def exo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> LossOutput:
    """Exact optimisation of pairs: the reverse divergence to smoothed labels (arXiv:2402.00856, equation 16).

      q = sigma(beta d),   loss = q [log q - log(1 - e)] + (1 - q) [log(1 - q) - log e],   e = label_smoothing

    Args:
      beta: strength of the pull to the reference, above 0.
      label_smoothing: e, in (0, 0.5): at 0 the divergence is infinite.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta, label_smoothing=label_smoothing)
    check_range(0.0, 0.5, open_high=True, label_smoothing=label_smoothing)
    x = beta * (h_w - h_l)
    log_q, log_p = jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)
    right = jnp.exp(log_q) * (log_q - jnp.log1p(-label_smoothing))
    loss = right + jnp.exp(log_p) * (log_p - jnp.log(label_smoothing))
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l)


@register("nca", category="preference", papers=("2402.05369",), proof=PROOF)
def nca(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """Noise contrastive alignment of pairs (arXiv:2402.05369): absolute rewards, so that the chosen one does not sink.

      loss = sp(-beta h_w) + 1/2 sp(beta h_w) + 1/2 sp(beta h_l)

    Args:
      beta: strength of the pull to the reference, above 0.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    r_w, r_l = beta * h_w, beta * h_l
    loss = jax.nn.softplus(-r_w) + 0.5 * jax.nn.softplus(r_w) + 0.5 * jax.nn.softplus(r_l)
    return reduce_pairs(loss, policy_chosen, policy_rejected, r_w, r_l)

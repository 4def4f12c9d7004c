"""Relative preference optimisation: every chosen response of a batch against every rejected one (arXiv:2402.10958).

Letters as in `objectives.preference.dpo`; D_ij = h_w,i - h_l,j. Each prompt's loss depends on the others of the batch:
parts of a batch are other batches. As in the authors' code, the weights are inside the logistic function.
"""

from typing import Any

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range, check_statistics
from objectives.output import LossOutput, reduce_examples
from objectives.preference.dpo import log_ratios
from objectives.preference.pairs import reduce_pairs
from objectives.registry import register
from objectives.statistics import LogProbs, log_ratio

PROOF = "test_relative.py::test_is_its_definition"


def prompt_weights(
    chosen: jax.Array, rejected: jax.Array, valid_rejected: jax.Array, *, temperature: float = 0.5
) -> jax.Array:
    """Weights O of contrasts between prompts: softmax over j of -(1 - cos(e_i, e_j)) / temperature; rows sum to 1.

    Args:
      chosen: [M, E] embeddings of the prompts of the chosen responses.
      rejected: [N, E] of those of the rejected responses.
      valid_rejected: bool[N]; the others get the weight 0.
      temperature: above 0.

    Returns:
      float32[M, N] without gradient.
    """

    def unit(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x, jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    distance = 1.0 - unit(chosen) @ unit(rejected).T
    weights = jax.nn.softmax(jnp.where(valid_rejected, -distance / temperature, -1e30), axis=-1)
    return jax.lax.stop_gradient(jnp.where(valid_rejected, weights, 0.0))


def _contrast(
    h_w: jax.Array, h_l: jax.Array, valid_l: jax.Array, weights: jax.Array | float, beta: float
) -> tuple[jax.Array, dict[str, Any]]:
    """mean_j sp(-beta O_ij D_ij) over valid j, [M], and the metrics of row i, as means over valid j."""
    number = jnp.maximum(jnp.sum(valid_l, dtype=jnp.float32), 1.0)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid_l, x, 0.0), axis=-1) / number

    r_w, r_l = beta * h_w, beta * jnp.broadcast_to(h_l, (h_w.shape[0], h_l.shape[0]))
    margins = r_w[:, None] - r_l
    metrics = {
        "reward_chosen": r_w,
        "reward_rejected": mean(r_l),
        "margin": mean(margins),
        "accuracy": mean((margins > 0).astype(jnp.float32)),
    }
    return mean(jax.nn.softplus(-weights * margins)), metrics


@register("rpo", category="preference", papers=("2402.10958",), proof=PROOF)
def rpo(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    prompt_embeddings: jax.Array | None = None,
    *,
    beta: float = 0.1,
    temperature: float = 0.5,
) -> LossOutput:
    """Contrasts of all prompts of a batch, weighted by the similarity of the prompts (arXiv:2402.10958, equation 6).

      loss = sum_i mean_j sp(-beta O_ij D_ij),   O = `prompt_weights` of the embeddings

    A single pair is DPO.

    Args:
      prompt_embeddings: [B, E] of a frozen sentence encoder. None: all weights are 1, as in the authors' code.
      beta: strength of the pull to the reference, above 0.
      temperature: of the weights, above 0.

    Returns:
      LossOutput: as `dpo`; reward_rejected, margin and accuracy are means over the contrasts of each chosen response.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta, temperature=temperature)
    valid = (policy_chosen.count > 0) & (policy_rejected.count > 0)
    weights: jax.Array | float = 1.0
    if prompt_embeddings is not None:
        if jnp.ndim(prompt_embeddings) != 2 or jnp.shape(prompt_embeddings)[0] != h_w.shape[0]:
            raise ValueError(f"prompt_embeddings must be [{h_w.shape[0]}, E], got {jnp.shape(prompt_embeddings)}")
        weights = prompt_weights(prompt_embeddings, prompt_embeddings, valid, temperature=temperature)
    loss, metrics = _contrast(h_w, h_l, valid, weights, beta)
    return reduce_pairs(loss, policy_chosen, policy_rejected, **metrics)


@register("rpo_unpaired", category="preference", papers=("2402.10958",), proof=PROOF)
def rpo_unpaired(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    chosen_embeddings: jax.Array | None = None,
    rejected_embeddings: jax.Array | None = None,
    *,
    beta: float = 0.1,
    temperature: float = 0.5,
) -> LossOutput:
    """`rpo` of M chosen and N rejected responses to prompts of their own.

    Args:
      policy_chosen: of M responses, as `ref_chosen`.
      policy_rejected: of N responses, as `ref_rejected`.
      chosen_embeddings: [M, E] of the prompts of the chosen responses. None, then both: all weights are 1.
      rejected_embeddings: [N, E] of those of the rejected ones.
      beta: strength of the pull to the reference, above 0.
      temperature: of the weights, above 0.

    Returns:
      LossOutput: weight = number of chosen responses, 0 if none is rejected; metrics reward_chosen, reward_rejected,
      margin and accuracy as of `rpo`.
    """
    check_statistics(policy_chosen=policy_chosen, ref_chosen=ref_chosen)
    check_statistics(policy_rejected=policy_rejected, ref_rejected=ref_rejected)
    check_positive(beta=beta, temperature=temperature)
    h_w, h_l = log_ratio(policy_chosen, ref_chosen), log_ratio(policy_rejected, ref_rejected)
    valid_w, valid_l = policy_chosen.count > 0, policy_rejected.count > 0
    weights: jax.Array | float = 1.0
    if chosen_embeddings is not None and rejected_embeddings is not None:
        if jnp.shape(chosen_embeddings)[:-1] != h_w.shape or jnp.shape(rejected_embeddings)[:-1] != h_l.shape:
            raise ValueError(
                f"chosen_embeddings must be [{h_w.shape[0]}, E] and rejected_embeddings [{h_l.shape[0]}, E], "
                f"got {jnp.shape(chosen_embeddings)} and {jnp.shape(rejected_embeddings)}"
            )
        weights = prompt_weights(chosen_embeddings, rejected_embeddings, valid_l, temperature=temperature)
    elif chosen_embeddings is not None or rejected_embeddings is not None:
        raise ValueError("chosen_embeddings and rejected_embeddings go together: both, or neither for weights of 1")
    loss, metrics = _contrast(h_w, h_l, valid_l, weights, beta)
    return reduce_examples(loss, valid_w & jnp.any(valid_l), metrics)


@register("rpo_diagonal", category="preference", papers=("2402.10958",), proof=PROOF)
def rpo_diagonal(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    *,
    beta: float = 0.1,
    diagonal_weight: float = 0.8,
) -> LossOutput:
    """`rpo` with one weight for responses to the same prompt and the rest for all others, outside of the logistic.

      loss = sum_i [ rho sp(-beta D_ii) + (1 - rho) mean_{j != i} sp(-beta D_ij) ],   rho = diagonal_weight

    A single pair has no others: it is DPO.

    Args:
      beta: strength of the pull to the reference, above 0.
      diagonal_weight: rho, in [0, 1].

    Returns:
      LossOutput: as `dpo`; metrics also loss_others, the mean over j != i.
    """
    h_w, h_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_positive(beta=beta)
    check_range(0.0, 1.0, diagonal_weight=diagonal_weight)
    valid = (policy_chosen.count > 0) & (policy_rejected.count > 0)
    losses = jax.nn.softplus(-beta * (h_w[:, None] - h_l))
    others = valid & ~jnp.eye(h_w.shape[0], dtype=bool)
    number = jnp.sum(others, axis=-1)
    rest = jnp.sum(jnp.where(others, losses, 0.0), axis=-1) / jnp.maximum(number, 1)
    rho = jnp.where(number > 0, diagonal_weight, 1.0)
    loss = rho * jnp.diagonal(losses) + (1.0 - rho) * rest
    return reduce_pairs(loss, policy_chosen, policy_rejected, beta * h_w, beta * h_l, loss_others=rest)

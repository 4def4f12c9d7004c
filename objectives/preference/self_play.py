"""Self-play: the rejected responses and the reference come from iterates of the model itself.

Letters as in `objectives.preference.dpo`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from objectives.checks import check_range, check_statistics
from objectives.output import LossOutput
from objectives.preference.dpo import dpo
from objectives.registry import register
from objectives.statistics import LogProbs, is_concrete


@register("spin", category="preference", papers=("2401.01335", "2404.04291"), proof="test_self_play.py::test_spin")
def spin(
    policy_chosen: LogProbs,
    policy_rejected: LogProbs,
    ref_chosen: LogProbs,
    ref_rejected: LogProbs,
    base_chosen: LogProbs | None = None,
    base_rejected: LogProbs | None = None,
    *,
    beta: float = 0.1,
    base_weight: float = 0.0,
) -> LossOutput:
    """Self-play fine-tuning (SPIN, arXiv:2401.01335, equation 4.7), optionally held to a base model.

      loss = sp(-beta d),   log ref = (1 - c) log previous + c log base,   c = base_weight

    The chosen response is the data's, the rejected one a sample of the previous iterate, which is the reference. c > 0
    replaces it by its geometric mixture with a base model, which is what a divergence to the base amounts to
    (arXiv:2404.04291). Derived: the policy that maximises E f - beta (1 - c) KL(policy || previous) - beta c KL(policy
    || base) has f = beta log(policy / ref) but for a constant, which cancels in f_w - f_l, as the mixture's normaliser
    does; SPIN is sp(-(f_w - f_l)). Fictitious play takes `fictitious_opponent` as reference.

    Args:
      policy_chosen: of the responses of the data.
      policy_rejected: of responses that the previous iterate sampled.
      ref_chosen: of the previous iterate, or of `fictitious_opponent`.
      ref_rejected: likewise.
      base_chosen: of the base model; needed if base_weight is not 0.
      base_rejected: likewise.
      beta: the paper's lambda, above 0; in the authors' code (uclaml/SPIN) 0.1, and 5 in the last iteration.
      base_weight: c, in [0, 1]: the base's share of the divergences.

    Returns:
      LossOutput: as `dpo`, with log-ratios to the mixture.
    """
    check_range(0.0, 1.0, base_weight=base_weight)
    if base_chosen is not None and base_rejected is not None:
        ref_chosen = geometric_mixture(ref_chosen, base_chosen, base_weight)
        ref_rejected = geometric_mixture(ref_rejected, base_rejected, base_weight)
    elif base_chosen is not None or base_rejected is not None:
        raise ValueError("base_chosen and base_rejected go together: both or neither")
    elif not (is_concrete(base_weight) and base_weight == 0):
        raise ValueError(f"base_weight={base_weight} needs base_chosen and base_rejected")
    return dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=beta)


def geometric_mixture(first: LogProbs, second: LogProbs, weight: jax.Array | float) -> LogProbs:
    """(1 - weight) log p + weight log q of the same responses, unnormalised.

    Args:
      first: log p.
      second: log q.
      weight: in [0, 1].
    """
    check_statistics(first=first, second=second)
    return dataclasses.replace(
        first,
        sum=(1.0 - weight) * first.sum + weight * second.sum,
        mean=(1.0 - weight) * first.mean + weight * second.mean,
        per_token=(1.0 - weight) * first.per_token + weight * second.per_token,
    )


def fictitious_opponent(iterates: Sequence[LogProbs]) -> LogProbs:
    """The uniform mixture of earlier iterates as one model of whole responses (fictitious play, arXiv:2404.04291).

      sum = logsumexp_k sum_k - log K

    per_token are the increments of this along the response, which is the mixture's own next-token distribution; to
    sample from it, draw one of the iterates for each response. The paper smooths the opponent over all previous
    iterates; that the mixture is uniform, and of whole responses, could not be confirmed and is this project's choice.

    Args:
      iterates: log-probabilities of the same responses under each iterate; not of packed rows.

    Raises:
      ValueError: no iterate, packed rows, or numbers of responses disagree.
    """
    if not iterates:
        raise ValueError("fictitious_opponent needs one iterate at least")
    check_statistics(**{f"iterates[{k}]": x for k, x in enumerate(iterates)})
    first = iterates[0]
    if first.packed:
        raise ValueError("fictitious_opponent cannot tell the responses of packed rows apart: give one row each")
    cumulative = jnp.cumsum(jnp.stack([x.per_token for x in iterates]), axis=-1)
    joint = jax.nn.logsumexp(cumulative, axis=0) - jnp.log(len(iterates))
    per_token = first.mask * jnp.diff(joint, axis=-1, prepend=0.0)
    total = jax.nn.logsumexp(jnp.stack([x.sum for x in iterates]), axis=0) - jnp.log(len(iterates))
    return dataclasses.replace(first, sum=total, mean=total / jnp.maximum(first.count, 1.0), per_token=per_token)

"""What models say of responses: the statistics that preference, reward and policy objectives are functions of.

A batch of responses holds K of them per example: tokens, targets, segment_ids, positions int32[B, K, T] and loss_mask
float32[B, K, T], which counts the targets that belong to the response; padding has segment 0.
"""

import jax
import jax.numpy as jnp

from launch.step import Batch, as_rows, forward
from objectives import LogProbs
from objectives.statistics import collect_logps, token_logps
from zoo.core.params import Tree
from zoo.models import Model

REWARD_TOKEN = 3  # the mask token of every tokenizer: no text holds it, so that its logit is free to be a score


def logps(model: Model, params: Tree, batch: Batch, implementation: str | None = None) -> list[LogProbs]:
    """Log-probabilities of the K responses, one LogProbs of B rows for each."""
    rows = as_rows(batch)
    logits = forward(model, params, rows, implementation).logits
    return by_response(batch, token_logps(logits, rows["targets"], rows["loss_mask"]))


def by_response(batch: Batch, per_token: jax.Array) -> list[LogProbs]:
    """`per_token` log-probabilities [..., T] of a batch as one LogProbs of B rows for each of the K responses."""
    mask = batch["loss_mask"]
    per_token = per_token.reshape(mask.shape)
    return [collect_logps(per_token[:, k], mask[:, k]) for k in range(mask.shape[1])]


def scores(model: Model, params: Tree, batch: Batch, implementation: str | None = None) -> jax.Array:
    """float32[B, K]: the reward of every response, the logit of `REWARD_TOKEN` after its last token."""
    logits = forward(model, params, as_rows(batch), implementation, logits="last").logits
    return logits[:, 0, REWARD_TOKEN].astype(jnp.float32).reshape(batch["tokens"].shape[:2])

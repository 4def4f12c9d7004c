"""Losses of packed text beside the cross entropy of next tokens: what is hidden, weighted or read further ahead.

Every builder gives `loss(params, batch, key, teacher's parameters if any)` on rows of text or of responses. Parameters
that an objective has beside the model's (heads, projections, powers) are `params[BESIDE]`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import objectives
from launch.config import ConfigError
from launch.responses import REWARD_TOKEN
from launch.step import Batch, Loss, as_rows, forward
from objectives import LossOutput, Objective, diffusion, learned_diffusion
from objectives.language_model import hide_tokens
from objectives.multi_token import multi_token_heads
from objectives.registry import OBJECTIVES
from zoo.core.context import SeqContext
from zoo.core.linear import linear
from zoo.core.params import Spec, Tree
from zoo.models import Model
from zoo.models.language_model import head

BESIDE = "objective"  # key of the parameters that belong to an objective
MASK_TOKEN = REWARD_TOKEN  # the mask token of every tokenizer


def missing(name: str, key: str, available: Mapping[str, Any]) -> ConfigError:
    """An objective's input that a batch does not hold."""
    return ConfigError(
        f"config.objective={name!r} needs {key!r}, which config.data and config.rollout do not give; "
        f"they give {', '.join(sorted(available))}"
    )


def bind(name: str, available: dict[str, Any]) -> dict[str, Any]:
    """Of what a batch and the models offer, what the objective takes.

    Raises:
      ConfigError: something that it needs is not there.
    """
    taken = {}
    for each in OBJECTIVES.get(name).inputs:
        key = each.strip("[]")
        if key in available:
            taken[key] = available[key]
        elif key == each:
            raise missing(name, key, available)
    return taken


def of_rows(name: str, key: str, batch: Batch) -> jax.Array:
    """An array of a batch, [..., T] or [B], for its rows [B, T].

    Raises:
      ConfigError: the batch has none.
    """
    if key not in batch:
        raise missing(name, key, batch)
    return batch[key] if batch[key].ndim == 1 else batch[key].reshape(-1, batch[key].shape[-1])


def selective_loss(model: Model, reference: Model, objective: Objective, implementation: str | None = None) -> Loss:
    """An objective of language models that takes the losses of tokens under a reference (`ref_nll`)."""

    def loss(params: Tree, batch: Batch, key: jax.Array, reference_params: Tree) -> LossOutput:
        del key
        rows = as_rows(batch)
        of_reference = jax.lax.stop_gradient(forward(reference, reference_params, rows, implementation).logits)
        ref_nll = -objectives.token_logps(of_reference, rows["targets"], rows["loss_mask"])
        logits = forward(model, params, rows, implementation).logits
        return objective(logits, rows["targets"], rows["loss_mask"], ref_nll)

    return loss


def weighted_loss(model: Model, objective: Objective, implementation: str | None = None) -> Loss:
    """A cross entropy of examples by their `quality`, which sources of demonstrations read where they are told to."""

    def loss(params: Tree, batch: Batch, key: jax.Array, *_: Tree) -> LossOutput:
        del key
        rows, quality = as_rows(batch), of_rows("weighted_cross_entropy", "quality", batch)
        logits = forward(model, params, rows, implementation).logits
        return objective(logits, rows["targets"], rows["loss_mask"], quality)

    return loss


def instruction_loss(model: Model, objective: Objective, implementation: str | None = None) -> Loss:
    """A cross entropy of responses and, weighed otherwise, of the prompts that config.data.source.loss=all counts."""

    def loss(params: Tree, batch: Batch, key: jax.Array, *_: Tree) -> LossOutput:
        del key
        rows, prompt = as_rows(batch), of_rows("instruction_modelling", "prompt_mask", batch)
        logits = forward(model, params, rows, implementation).logits
        return objective(logits, rows["targets"], rows["loss_mask"] - prompt, prompt)

    return loss


def hidden_loss(
    model: Model,
    objective: Objective,
    *,
    mask_token: int,
    rate: float,
    keep: float,
    replace: float,
    implementation: str | None = None,
) -> Loss:
    """A cross entropy of hidden tokens, drawn with the step's key, of a model that reads in both directions.

    The tokens are the targets of a batch, where they are predicted; those that count may be hidden.
    """
    options = {"mask_token": mask_token, "rate": rate, "keep": keep, "replace": replace}

    def loss(params: Tree, batch: Batch, key: jax.Array, *_: Tree) -> LossOutput:
        rows = as_rows(batch)
        valid = rows["loss_mask"] != 0
        tokens, selected = hide_tokens(key, rows["targets"], valid, vocab_size=model.config.vocab_size, **options)
        logits = forward(model, params, {**rows, "tokens": tokens}, implementation).logits
        return objective(logits, rows["targets"], selected)

    return loss


def diffusion_loss(model: Model, options: dict[str, Any], implementation: str | None = None) -> Loss:
    """The bound of a masked diffusion model on packed documents: a time per row, drawn with the step's key.

    It is of the targets, which stand where they are predicted: of the same tokens as the cross entropy of a model that
    reads from left to right.
    """
    given = {key: value for key, value in options.items() if key != "name" and value is not None}
    mask_token = given.pop("mask_token", MASK_TOKEN)
    objective = objectives.create(options["name"], mask_token=mask_token, **given)
    steps = given.pop("steps", None)

    def loss(params: Tree, batch: Batch, key: jax.Array, *_: Tree) -> LossOutput:
        of_times, of_masks = jax.random.split(key)
        rows = as_rows(batch)
        tokens, valid = rows["targets"], rows["loss_mask"] != 0
        times = diffusion.draw_times(of_times, tokens.shape[0], steps=steps)
        noisy, masked = diffusion.mask_tokens(of_masks, tokens, times, mask_token, valid, **given)
        logits = forward(model, params, {**rows, "tokens": noisy}, implementation).logits
        output = objective(logits, tokens, masked, times, valid)
        metrics = {("masked_nll" if key == "nll" else key): value for key, value in output.metrics.items()}
        return LossOutput(output.loss_sum, output.weight, metrics)

    return loss


def power_specs(model: Model, given: dict[str, Any]) -> Tree:
    """A number per class but the mask token; its softplus is the power, 1 at the start."""
    del given
    one = float(np.log(np.expm1(1.0)))
    shape = (model.config.vocab_size - 1,)
    return {"power": Spec(shape, ("vocab",), jax.nn.initializers.constant(one), tags=frozenset({"no_decay"}))}


def learned_diffusion_loss(
    model: Model, objective: Objective, *, mask_token: int, implementation: str | None = None
) -> Loss:
    """The bound of a masked diffusion model that learns a power per class beside, of two noised copies of a batch."""
    classes = np.delete(np.arange(model.config.vocab_size), mask_token)

    def loss(params: Tree, batch: Batch, key: jax.Array, *_: Tree) -> LossOutput:
        of_times, one, other = jax.random.split(key, 3)
        rows = as_rows(batch)
        tokens, valid = rows["targets"], rows["loss_mask"] != 0
        times = diffusion.draw_times(of_times, tokens.shape[0])
        powers = jax.nn.softplus(params[BESIDE]["power"].astype(jnp.float32))
        # Classes are counted without the mask token, which is none that could be predicted.
        labels = jnp.where(tokens == mask_token, -1, tokens - (tokens > mask_token))
        copies = []
        for of_masks in (one, other):
            masked = learned_diffusion.mask_tokens_by_class(of_masks, labels, times, mask_token, powers, valid)[1]
            noisy = {**rows, "tokens": jnp.where(masked, mask_token, tokens)}
            copies.append((forward(model, params, noisy, implementation).logits[..., classes], masked))
        (logits, masked), (logits_again, masked_again) = copies
        return objective(logits, logits_again, labels, masked, masked_again, times, powers, valid)

    return loss


def head_specs(model: Model, given: dict[str, Any]) -> Tree:
    """A matrix for each head but the first, 0 at the start."""
    number = given["heads"]
    if isinstance(number, bool) or not isinstance(number, int) or number < 2:
        raise ConfigError(f"config.objective.heads={number!r} must be a number of at least 2")
    width = model.config.width
    return {"heads": Spec((number - 1, width, width), ("ahead", "embed", "inner"))}


def multi_token_loss(model: Model, weights: Sequence[float] | None, implementation: str | None = None) -> Loss:
    """Heads for tokens further ahead, one after another, on the model's last hidden states h.

    Head 1 is the model's own; head k > 1 reads h + silu(h W_k) (the block of Medusa's heads, arXiv:2401.10774, section
    2.1) and shares the unembedding (arXiv:2404.19737). At the start all heads are the first.
    """

    def own_head(trunk: jax.Array, shared: Tree, weight: jax.Array) -> jax.Array:
        further = jax.nn.silu(linear(trunk, weight, "btd,de->bte"))
        return head(shared, trunk + further, config=model.config, implementation=implementation)

    def loss(params: Tree, batch: Batch, key: jax.Array, *_: Tree) -> LossOutput:
        del key
        rows = as_rows(batch)
        documents = SeqContext(positions=rows["positions"], segment_ids=rows["segment_ids"]).documents
        trunk = forward(model, params, rows, implementation, logits="none").aux["hidden"]
        further = params[BESIDE]["heads"]
        heads = jnp.concatenate([jnp.zeros_like(further[:1]), further])
        shared = {name: params[name] for name in ("embedding", "head") if name in params}
        targets, mask = rows["targets"], rows["loss_mask"]
        return multi_token_heads(own_head, trunk, shared, heads, targets, mask, documents, weights=weights)

    return loss

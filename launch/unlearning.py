"""Losses of two sources: what a model is to forget, config.data.forget, and what it is to retain, config.data.source.

A batch of such a run holds the arrays of the retained rows and, behind `forget_`, those of the others.
"""

from typing import Any

import jax
import jax.numpy as jnp

from launch.config import ConfigError
from launch.step import Batch, Loss, as_rows, forward
from launch.text_losses import bind
from objectives import LossOutput, Objective
from objectives.language_model import cross_entropy
from objectives.statistics import collect_logps, token_logps
from objectives.unlearning import retain_kl
from zoo.core.params import Tree
from zoo.core.registry import check_choice
from zoo.models import Model

NONE = "none"  # the name of config.data.forget where nothing is to be forgotten
PREFIX = "forget_"
KL = "retain_kl"  # the retaining loss that reads the reference
RETAIN = ("cross_entropy", KL)
OPTIONS = {"retain": "cross_entropy", "retain_weight": 1.0}


def check(plain: dict[str, Any], unlearns: bool) -> None:
    """Raises ConfigError for a config.data.forget that the objective does not go with, or options that cannot be."""
    name, forget = plain["objective"]["name"], plain["data"].get("forget", {"name": NONE})["name"]
    if unlearns and forget == NONE:
        raise ConfigError(
            f"config.objective={name!r} needs config.data.forget, what is to be forgotten; config.data.source is what "
            "is retained"
        )
    if not unlearns and forget != NONE:
        raise ConfigError(f"config.data.forget={forget!r}: config.objective={name!r} forgets nothing")
    if not unlearns:
        return
    if plain["accumulation"] > 1:
        raise ConfigError(
            f"config.accumulation={plain['accumulation']} must be 1: config.objective={name!r} divides two losses, "
            "each by its own weight of a whole batch"
        )
    given = {**OPTIONS, **plain["objective"]}
    check_choice("retain", given["retain"], RETAIN)
    weight = given["retain_weight"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise ConfigError(f"config.objective.retain_weight={weight!r} must be a finite number of at least 0")


def loss(
    name: str,
    objective: Objective,
    model: Model,
    reference: Model | None,
    *,
    retain: str,
    retain_weight: float,
    implementation: str | None = None,
) -> Loss:
    """forget.loss_sum / forget.weight + c retain.loss_sum / retain.weight, c = retain_weight.

    The rows to forget are text, each an example of its own, or responses to prompts. The weight is the number of
    counted tokens of both, and the metrics are means of either: forget_* and retain_*, with nll in nats per token.
    """

    def one(params: Tree, batch: Batch, key: jax.Array, reference_params: Tree = None) -> LossOutput:
        del key
        kept = as_rows(batch)
        gone = as_rows({key.removeprefix(PREFIX): x for key, x in batch.items() if key.startswith(PREFIX)})
        logits = forward(model, params, gone, implementation).logits
        targets, mask = gone["targets"], gone["loss_mask"]
        policy = collect_logps(token_logps(logits, targets, mask), mask)
        available: dict[str, Any] = {"logits": logits, "targets": targets, "loss_mask": mask, "policy": policy}
        if reference is not None:
            of_reference = forward(reference, reference_params, gone, implementation).logits
            ref = collect_logps(token_logps(of_reference, targets, mask), mask)
            available["ref"] = jax.lax.stop_gradient(ref)
        forget = objective(**bind(name, available))
        forget_nll = LossOutput(-jnp.sum(policy.sum), jnp.sum(mask))

        logits, mask = forward(model, params, kept, implementation).logits, kept["loss_mask"]
        retained = cross_entropy(logits, kept["targets"], mask)
        nll = LossOutput(retained.metrics["nll"], retained.weight)
        if retain == KL:
            assert reference is not None
            retained = retain_kl(logits, forward(reference, reference_params, kept, implementation).logits, mask)
        number = forget_nll.weight + nll.weight
        means = {"forget": _mean(forget), "retain": _mean(retained)}
        means |= {"forget_nll": _mean(forget_nll), "retain_nll": _mean(nll)}
        metrics = {key: jax.lax.stop_gradient(number * mean) for key, mean in means.items()}
        return LossOutput(number * (means["forget"] + retain_weight * means["retain"]), number, metrics)

    return one


def _mean(output: LossOutput) -> jax.Array:
    return output.loss_sum / jnp.where(output.weight > 0, output.weight, 1.0)

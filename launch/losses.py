"""The loss of a run: which models it reads, what of a batch its objective takes, and what it is judged by."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import objectives
from launch import config as config_lib
from launch import distillation, responses, start
from launch.config import ConfigError
from launch.step import Batch, Loss, as_rows, language_model_loss
from objectives import LossOutput, Objective
from objectives import diffusion as diffusion_lib
from objectives.registry import OBJECTIVES
from zoo.core.context import SeqContext
from zoo.core.params import Tree
from zoo.core.registry import check_keys
from zoo.models import Model

# Statistics of the teacher, which is the reference model.
REFERENCE = ("ref", "ref_chosen", "ref_rejected", "ref_kl", "ref_nll")
OF_TEXT = ("logits", "targets", "loss_mask")  # what objectives on packed text take


class Losses(NamedTuple):
    """What trains a model and what judges it, both `loss(params, batch, key, teacher's parameters if any)`.

    Attributes:
      train: of the steps.
      judge: of evaluations.
      source: the teacher and its parameters, or None.
    """

    train: Loss
    judge: Loss
    source: start.Source | None


def create_objective(plain: dict[str, Any]) -> Objective:
    """config.objective by name, with its options."""
    with config_lib.at("objective"):
        name, given = config_lib.options(plain["objective"])
        if name == distillation.ATTENTION:
            check_keys(f"objective {name!r}", given, distillation.ATTENTION_OPTIONS)
        return objectives.create(name, **given)


def category(plain: dict[str, Any]) -> str:
    """The category of config.objective."""
    return OBJECTIVES.get(plain["objective"]["name"]).category


def reads_teacher(plain: dict[str, Any]) -> bool:
    """Whether config.objective takes anything of a teacher or reference model, as it is configured."""
    name = plain["objective"]["name"]
    inputs = OBJECTIVES.get(name).inputs
    if name in distillation.DISTILLATION:
        return True
    if plain["objective"].get("kl_weight") and "[ref]" in inputs:
        return True
    return any(each in REFERENCE for each in inputs) or plain["rollout"]["name"] == "teacher"


def make(plain: dict[str, Any], model: Model, initial, restore) -> Losses:
    """The losses of a resolved config.

    Args:
      plain: resolved config.
      model: that is trained.
      initial: () -> model and parameters of config.initial.
      restore: as `start.read` takes it.

    Raises:
      ConfigError: a teacher that nothing reads, or none where the objective needs one; models that do not match.
    """
    name, implementation = plain["objective"]["name"], plain["implementation"]
    objective, teacher = create_objective(plain), plain["teacher"]["name"]
    reads, kind = reads_teacher(plain), category(plain)
    if reads and teacher == start.NONE["teacher"]:
        raise ConfigError(f"config.objective={name!r} needs config.teacher: initial, run or hf")
    # Preference objectives with and without a reference share their configs.
    if not reads and teacher != start.NONE["teacher"] and kind != "preference":
        raise ConfigError(f"config.teacher={teacher!r}: config.objective={name!r} reads none as it is configured")
    source = None
    if reads:
        source = initial() if teacher == start.AS_INITIAL else start.read(plain, "teacher", restore)
        check_vocabulary(model, source[0])
    judge = language_model_loss(model, objectives.create("cross_entropy"), implementation)
    if name == distillation.LOGITS:
        assert source is not None
        return Losses(distillation.logit_loss(model, source[0], objective, implementation), judge, source)
    if name == distillation.ATTENTION:
        assert source is not None
        length = plain["sequence_length"]
        return Losses(distillation.attention_loss(model, source[0], objective, length, implementation), judge, source)
    if kind in ("preference", "rl"):
        loss = response_loss(name, objective, model, None if source is None else source[0], implementation)
        return Losses(loss, loss, source)
    if kind == "reward":
        loss = reward_loss(name, objective, model, implementation)
        return Losses(loss, loss, source)
    if name == "masked_diffusion":
        loss = diffusion_loss(model, plain["objective"], implementation)
        return Losses(loss, loss, source)
    needed = [each for each in OBJECTIVES.get(name).inputs if not each.startswith("[")]
    if needed not in ([*OF_TEXT], [*OF_TEXT, "ref_nll"]):
        raise ConfigError(
            f"config.objective={name!r} takes {', '.join(needed)}, which no run gives it yet; "
            "call it from a step of your own"
        )
    loss = language_model_loss(model, objective, implementation)
    if source is not None:
        return Losses(selective_loss(model, source[0], objective, implementation), judge, source)
    return Losses(loss, loss, source)


def check_vocabulary(model: Model, teacher: Model) -> None:
    """Raises ConfigError unless both models have as many token ids."""
    if teacher.config.vocab_size != model.config.vocab_size:
        raise ConfigError(
            f"config.teacher has vocab_size={teacher.config.vocab_size}, the model {model.config.vocab_size}: "
            f"set config.model.vocab_size={teacher.config.vocab_size}"
        )


def _bind(name: str, available: dict[str, Any]) -> dict[str, Any]:
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
            raise ConfigError(
                f"config.objective={name!r} needs {key!r}, which config.data and config.rollout do not give; "
                f"they give {', '.join(sorted(available))}"
            )
    return taken


def _statistics(prefix: str, of_each: list[Any]) -> dict[str, Any]:
    """The names that objectives have for statistics of the first and the second response."""
    named = {prefix: of_each[0], f"{prefix}_chosen": of_each[0]}
    return named if len(of_each) < 2 else {**named, f"{prefix}_rejected": of_each[1], f"{prefix}_kl": of_each[1]}


def response_loss(
    name: str, objective: Objective, model: Model, reference: Model | None, implementation: str | None = None
) -> Loss:
    """A preference or policy objective on the log-probabilities of the responses of a batch.

    The first response of an example is the chosen one, or the one with the label; the second the rejected one, or the
    one of a mismatched pair. The reference's are read from the batch (`ref_logps`, float32[B, K, T]) where they are
    there, else computed. Of a rollout, all responses of a batch are one list, with `advantages` and `old_logps`.
    """

    def loss(params: Tree, batch: Batch, key: jax.Array, reference_params: Tree = None) -> LossOutput:
        del key
        if "advantages" in batch:
            batch = {k: v.reshape(-1, 1, *v.shape[2:]) if v.ndim > 1 else v for k, v in batch.items()}
        available: dict[str, Any] = _statistics("policy", responses.logps(model, params, batch, implementation))
        needed = {each.strip("[]") for each in OBJECTIVES.get(name).inputs}
        if "ref_logps" in batch:
            available |= _statistics("ref", responses.by_response(batch, batch["ref_logps"]))
        elif reference is not None and needed & set(REFERENCE):
            of_reference = responses.logps(reference, reference_params, batch, implementation)
            available |= _statistics("ref", jax.lax.stop_gradient(of_reference))
        if "advantages" in batch:
            available["advantages"] = batch["advantages"][:, 0]
            available["old"] = responses.by_response(batch, batch["old_logps"])[0]
        if "tie" in batch:
            available["tie"] = batch["tie"]
        if "label" in batch:
            available["desirable"] = batch["label"]
        if "scores" in batch:
            available |= {"score_chosen": batch["scores"][:, 0], "score_rejected": batch["scores"][:, 1]}
        output = objective(**_bind(name, available))
        if "rewards" not in batch:
            return output
        # Metrics are divided by the objective's weight, whatever it counts; the mean reward is over responses.
        drawn = jnp.sum(batch["loss_mask"], axis=(1, 2)) > 0
        mean = jnp.sum(jnp.where(drawn, batch["rewards"][:, 0], 0.0)) / jnp.maximum(jnp.sum(drawn), 1)
        return LossOutput(output.loss_sum, output.weight, {**output.metrics, "reward": mean * output.weight})

    return loss


def reward_loss(name: str, objective: Objective, model: Model, implementation: str | None = None) -> Loss:
    """An objective of reward models on the scores of the responses of a batch."""

    def loss(params: Tree, batch: Batch, key: jax.Array, *_: Tree) -> LossOutput:
        del key
        scores = responses.scores(model, params, batch, implementation)
        available = {"scores": scores, "score_chosen": scores[:, 0]}
        if scores.shape[1] > 1:
            available["score_rejected"] = scores[:, 1]
        available["mask"] = (batch["loss_mask"].sum(axis=(1, 2)) > 0).astype(jnp.float32)
        return objective(**_bind(name, available))

    return loss


def selective_loss(model: Model, reference: Model, objective: Objective, implementation: str | None = None) -> Loss:
    """An objective of language models that takes the losses of tokens under a reference (`ref_nll`)."""

    def loss(params: Tree, batch: Batch, key: jax.Array, reference_params: Tree) -> LossOutput:
        del key
        rows = as_rows(batch)
        ctx = SeqContext(positions=rows["positions"], segment_ids=rows["segment_ids"])
        run = functools.partial(Model.apply, tokens=rows["tokens"], ctx=ctx, implementation=implementation)
        of_reference = jax.lax.stop_gradient(run(reference, params=reference_params).logits)
        ref_nll = -objectives.token_logps(of_reference, rows["targets"], rows["loss_mask"])
        return objective(run(model, params=params).logits, rows["targets"], rows["loss_mask"], ref_nll)

    return loss


def diffusion_loss(model: Model, options: dict[str, Any], implementation: str | None = None) -> Loss:
    """The bound of a masked diffusion model on packed documents: a time per row, drawn with the step's key.

    It is of the targets, which stand where they are predicted: of the same tokens as the cross entropy of a model that
    reads from left to right.
    """
    given = {key: value for key, value in options.items() if key != "name" and value is not None}
    mask_token = given.pop("mask_token", responses.REWARD_TOKEN)
    objective = objectives.create(options["name"], mask_token=mask_token, **given)

    def loss(params: Tree, batch: Batch, key: jax.Array, *_: Tree) -> LossOutput:
        of_times, of_masks = jax.random.split(key)
        tokens, valid = batch["targets"], batch["loss_mask"] != 0
        times = diffusion_lib.draw_times(of_times, tokens.shape[0])
        noisy, masked = diffusion_lib.mask_tokens(of_masks, tokens, times, mask_token, valid, **given)
        ctx = SeqContext(positions=batch["positions"], segment_ids=batch["segment_ids"])
        logits = model.apply(params, noisy, ctx=ctx, implementation=implementation).logits
        output = objective(logits, tokens, masked, times, valid)
        metrics = {("masked_nll" if key == "nll" else key): value for key, value in output.metrics.items()}
        return LossOutput(output.loss_sum, output.weight, metrics)

    return loss

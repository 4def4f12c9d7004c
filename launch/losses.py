"""The loss of a run: which models it reads, what of a batch its objective takes, and what it is judged by."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import objectives
from launch import config as config_lib
from launch import distillation, responses, start, text_losses, unlearning
from launch.config import ConfigError
from launch.step import Batch, Loss, language_model_loss
from launch.text_losses import BESIDE, MASK_TOKEN, bind
from objectives import LossOutput, Objective
from objectives.registry import OBJECTIVES
from zoo.core.params import Tree
from zoo.core.registry import check_keys
from zoo.models import Model

# What is of the teacher, which is the reference model.
REFERENCE = ("ref", "ref_chosen", "ref_rejected", "ref_kl", "ref_nll")
TEACHER = ("teacher_logits", "teacher_features", "teacher_chosen", "teacher_rejected")
RESPONSES = ("preference", "reward", "rl")  # categories of what takes responses
SHARED = ("preference", "unlearning")  # categories whose objectives with and without a reference share their configs
ANY = "*"


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


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a loss is built of.

    Attributes:
      name: of the objective.
      objective: with its options.
      given: options of the kind.
      plain: resolved config.
      model: that is trained.
      teacher: the teacher or reference, or None.
    """

    name: str
    objective: Objective
    given: dict[str, Any]
    plain: dict[str, Any]
    model: Model
    teacher: Model | None

    @property
    def ops(self) -> str | None:
        """Implementation of the ops."""
        return self.plain["implementation"]

    @property
    def read(self) -> Model:
        """The teacher, where there must be one."""
        assert self.teacher is not None
        return self.teacher


class Kind(NamedTuple):
    """How the objectives that take the same arrays are fed.

    Attributes:
      build: the loss.
      options: what config.objective may hold beside the options of the objective, with defaults.
      by_text: whether evaluations take the cross entropy of next tokens in place of the loss itself.
      coding: whether that is a code length of the text, so that bits per byte are reported.
      beside: (model, options) -> specs of the parameters that it has beside the model's.
    """

    build: Callable[[Parts], Loss]
    options: Mapping[str, Any] = {}
    by_text: bool = False
    coding: bool = True
    beside: Callable[[Model, dict[str, Any]], Tree] | None = None


HIDING = {"mask_token": MASK_TOKEN, "rate": 0.15, "keep": 0.1, "replace": 0.1}
FEATURES = {"layer": None, "teacher_layer": None, "projection": None, "ce_weight": 0.0}

_forgetting = Kind(
    lambda p: unlearning.loss(p.name, p.objective, p.model, p.teacher, implementation=p.ops, **p.given),
    unlearning.OPTIONS,
    by_text=True,
)
_responses = Kind(lambda p: response_loss(p.name, p.objective, p.model, p.teacher, p.ops))

# What serves an objective, by its category and by what it takes, as the catalogue has it. To serve others, add a line
# here and what builds their loss in launch/text_losses.py or beside it.
KINDS: dict[tuple[str, str], Kind] = {
    ("language_model", "logits targets loss_mask"): Kind(lambda p: language_model_loss(p.model, p.objective, p.ops)),
    ("language_model", "logits targets loss_mask ref_nll"): Kind(
        lambda p: text_losses.selective_loss(p.model, p.read, p.objective, p.ops), by_text=True
    ),
    ("language_model", "logits targets loss_mask quality"): Kind(
        lambda p: text_losses.weighted_loss(p.model, p.objective, p.ops), by_text=True
    ),
    ("language_model", "logits targets response_mask prompt_mask"): Kind(
        lambda p: text_losses.instruction_loss(p.model, p.objective, p.ops)
    ),
    ("language_model", "logits targets selected"): Kind(
        lambda p: text_losses.hidden_loss(p.model, p.objective, implementation=p.ops, **p.given), HIDING, coding=False
    ),
    ("language_model", "logits targets loss_mask [documents]"): Kind(
        lambda p: text_losses.multi_token_loss(p.model, p.plain["objective"].get("weights"), p.ops),
        {"heads": 4},
        by_text=True,
        beside=text_losses.head_specs,
    ),
    ("distillation", "logits targets loss_mask teacher_logits"): Kind(
        lambda p: distillation.logit_loss(p.model, p.read, p.objective, p.ops), by_text=True
    ),
    ("distillation", "logits teacher_logits [valid]"): Kind(
        lambda p: distillation.matching_loss(p.model, p.read, p.objective, p.ops), by_text=True
    ),
    ("distillation", "q k features_q features_k"): Kind(
        lambda p: distillation.attention_loss(p.model, p.read, p.objective, p.plain["sequence_length"], p.ops),
        by_text=True,
    ),
    ("distillation", "features teacher_features loss_mask [projection]"): Kind(
        lambda p: distillation.feature_loss(p.model, p.read, p.objective, implementation=p.ops, **p.given),
        FEATURES,
        by_text=True,
        beside=distillation.projection_specs,
    ),
    ("distillation", "student_chosen student_rejected teacher_chosen teacher_rejected"): _responses,
    ("diffusion", "logits targets masked times [valid]"): Kind(
        lambda p: text_losses.diffusion_loss(p.model, p.plain["objective"], p.ops)
    ),
    ("diffusion", "logits logits_again targets masked masked_again times powers [valid]"): Kind(
        lambda p: text_losses.learned_diffusion_loss(p.model, p.objective, implementation=p.ops, **p.given),
        {"mask_token": MASK_TOKEN},
        beside=text_losses.power_specs,
    ),
    ("unlearning", "logits targets loss_mask"): _forgetting,
    ("unlearning", "policy"): _forgetting,
    ("unlearning", "policy ref"): _forgetting,
    ("preference", ANY): _responses,
    ("rl", ANY): _responses,
    ("reward", ANY): Kind(lambda p: reward_loss(p.name, p.objective, p.model, p.ops)),
}


def kind_of(name: str) -> Kind | None:
    """What serves an objective, or None."""
    entry = OBJECTIVES.get(name)
    return KINDS.get((entry.category, " ".join(entry.inputs))) or KINDS.get((entry.category, ANY))


def create_objective(plain: dict[str, Any]) -> Objective:
    """config.objective by name, with its options."""
    return _split(plain)[0]


def _split(plain: dict[str, Any]) -> tuple[Objective, dict[str, Any]]:
    """The objective with its options, and the options of its kind."""
    with config_lib.at("objective"):
        name, given = config_lib.options(plain["objective"])
        if name == distillation.ATTENTION:
            check_keys(f"objective {name!r}", given, distillation.ATTENTION_OPTIONS)
        kind = kind_of(name)
        own = {} if kind is None else {**kind.options}
        check_keys(f"objective {name!r}", given, (*OBJECTIVES.get(name).defaults, *own))
        own |= {key: given.pop(key) for key in own if key in given}
        return objectives.create(name, **given), own


def category(plain: dict[str, Any]) -> str:
    """The category of config.objective."""
    return OBJECTIVES.get(plain["objective"]["name"]).category


def takes_ties(name: str) -> bool:
    """Whether an objective of pairs is told which of them are ties, or half preferences."""
    inputs = OBJECTIVES.get(name).inputs
    scored = {"score_chosen", "score_first"} & {*inputs}
    return "tie" in inputs or bool(scored and {"outcome", "[label]"} & {*inputs})


def of_responses(plain: dict[str, Any]) -> bool:
    """Whether config.objective takes responses to prompts."""
    return kind_of(plain["objective"]["name"]) is _responses or category(plain) in RESPONSES


def codes_text(plain: dict[str, Any]) -> bool:
    """Whether evaluations are code lengths of the text, where there is text."""
    kind = kind_of(plain["objective"]["name"])
    return kind is None or kind.coding


def reads_teacher(plain: dict[str, Any]) -> bool:
    """Whether config.objective takes anything of a teacher or reference model, as it is configured."""
    name = plain["objective"]["name"]
    inputs = OBJECTIVES.get(name).inputs
    if name in distillation.DISTILLATION:
        return True
    if plain["objective"].get("kl_weight") and "[ref]" in inputs:
        return True
    if plain["objective"].get("retain") == unlearning.KL:
        return True
    return any(each in (*REFERENCE, *TEACHER) for each in inputs) or plain["rollout"]["name"] == "teacher"


def beside(plain: dict[str, Any], model: Model) -> Tree:
    """Specs of the parameters that config.objective has beside the model's, {} where it has none."""
    kind = kind_of(plain["objective"]["name"])
    specs = {} if kind is None or kind.beside is None else kind.beside(model, _split(plain)[1])
    return {BESIDE: specs} if specs else {}


def make(plain: dict[str, Any], model: Model, initial, restore) -> Losses:
    """The losses of a resolved config.

    Args:
      plain: resolved config.
      model: that is trained.
      initial: () -> model and parameters of config.initial.
      restore: as `start.read` takes it.

    Raises:
      ConfigError: an objective that nothing serves; a teacher that nothing reads, or none where one is needed; models
        that do not match.
    """
    name, implementation = plain["objective"]["name"], plain["implementation"]
    (objective, given), teacher = _split(plain), plain["teacher"]["name"]
    reads, kind = reads_teacher(plain), kind_of(name)
    if reads and teacher == start.NONE["teacher"]:
        raise ConfigError(f"config.objective={name!r} needs config.teacher: initial, run or hf")
    if not reads and teacher != start.NONE["teacher"] and category(plain) not in SHARED:
        raise ConfigError(f"config.teacher={teacher!r}: config.objective={name!r} reads none as it is configured")
    if kind is None:
        needed = [each for each in OBJECTIVES.get(name).inputs if not each.startswith("[")]
        raise ConfigError(
            f"config.objective={name!r} takes {', '.join(needed)}, which no run gives it yet; "
            "call it from a step of your own"
        )
    if plain["data"]["source"].get("ties") and not takes_ties(name):
        raise ConfigError(
            f"config.data.source.ties: config.objective={name!r} would take a tie for a preference; "
            f"these know ties: {', '.join(each for each in objectives.list_objectives() if takes_ties(each))}"
        )
    with config_lib.at("objective"):
        unlearning.check(plain, category(plain) == "unlearning")
    source = None
    if reads:
        source = initial() if teacher == start.AS_INITIAL else start.read(plain, "teacher", restore)
        check_vocabulary(model, source[0])
    with config_lib.at("objective"):
        loss = kind.build(Parts(name, objective, given, plain, model, None if source is None else source[0]))
    judge = language_model_loss(model, objectives.create("cross_entropy"), implementation) if kind.by_text else loss
    return Losses(loss, judge, source)


def check_vocabulary(model: Model, teacher: Model) -> None:
    """Raises ConfigError unless both models have as many token ids."""
    if teacher.config.vocab_size != model.config.vocab_size:
        raise ConfigError(
            f"config.teacher has vocab_size={teacher.config.vocab_size}, the model {model.config.vocab_size}: "
            f"set config.model.vocab_size={teacher.config.vocab_size}"
        )


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
        needed = {each.strip("[]") for each in OBJECTIVES.get(name).inputs}
        ours, theirs = ("student", "teacher") if "student_chosen" in needed else ("policy", "ref")
        available: dict[str, Any] = _statistics(ours, responses.logps(model, params, batch, implementation))
        if "ref_logps" in batch:
            available |= _statistics(theirs, responses.by_response(batch, batch["ref_logps"]))
        elif reference is not None and needed & {*REFERENCE, *TEACHER}:
            of_reference = responses.logps(reference, reference_params, batch, implementation)
            available |= _statistics(theirs, jax.lax.stop_gradient(of_reference))
        if "advantages" in batch:
            available["advantages"] = batch["advantages"][:, 0]
            available["old"] = responses.by_response(batch, batch["old_logps"])[0]
        if "tie" in batch:
            available["tie"] = batch["tie"]
        if "label" in batch:
            available["desirable"] = batch["label"]
        if "scores" in batch:
            available |= {"score_chosen": batch["scores"][:, 0], "score_rejected": batch["scores"][:, 1]}
        output = objective(**bind(name, available))
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
        if scores.shape[1] == 2:
            available |= {"score_first": scores[:, 0], "score_second": scores[:, 1]}
        if "tie" in batch:  # the first is the better one everywhere else
            available |= {"outcome": 1 - jnp.int32(batch["tie"]), "label": 1 - batch["tie"] / 2}
        available["mask"] = (batch["loss_mask"].sum(axis=(1, 2)) > 0).astype(jnp.float32)
        return objective(**bind(name, available))

    return loss

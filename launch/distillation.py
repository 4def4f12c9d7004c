"""Losses that read a teacher beside the model: `loss(params, batch, key, teacher)` with the teacher's parameters."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp

from launch.config import ConfigError
from launch.step import Batch, Loss, as_rows, forward
from launch.text_losses import BESIDE
from objectives import LossOutput, Objective
from objectives.language_model import cross_entropy
from zoo.core.context import SeqContext
from zoo.core.params import Spec, Tree
from zoo.layers import feature_maps
from zoo.mixers import Attention, Hedgehog, hedgehog
from zoo.models import Model

LOGITS, ATTENTION = "logit_distillation", "attention_distillation"  # objectives
DISTILLATION = (LOGITS, ATTENTION)
ATTENTION_OPTIONS = ("eps", "rows")  # what a config may set; all else follows from the models and the batch


def logit_loss(model: Model, teacher: Model, objective: Objective, implementation: str | None = None) -> Loss:
    """Both models on packed documents, then the objective on their logits."""

    def loss(params: Tree, batch: Batch, key: jax.Array, teacher_params: Tree) -> LossOutput:
        del key
        rows = as_rows(batch)
        wanted = jax.lax.stop_gradient(forward(teacher, teacher_params, rows, implementation).logits)
        return objective(
            forward(model, params, rows, implementation).logits, rows["targets"], rows["loss_mask"], wanted
        )

    return loss


def matching_loss(model: Model, teacher: Model, objective: Objective, implementation: str | None = None) -> Loss:
    """Both models on the same rows, without their targets: what counts in the loss mask is valid."""

    def loss(params: Tree, batch: Batch, key: jax.Array, teacher_params: Tree) -> LossOutput:
        del key
        rows = as_rows(batch)
        wanted = jax.lax.stop_gradient(forward(teacher, teacher_params, rows, implementation).logits)
        return objective(forward(model, params, rows, implementation).logits, wanted, rows["loss_mask"])

    return loss


def projection_specs(model: Model, given: dict[str, Any]) -> Tree:
    """The projection of the student's features to config.objective.projection, the teacher's width; none where None."""
    if (width := given["projection"]) is None:
        return {}
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ConfigError(f"config.objective.projection={width!r} must be the teacher's width")
    init = jax.nn.initializers.lecun_normal()
    return {"projection": Spec((model.config.width, width), ("embed", "outputs"), init, inputs=1)}


def feature_loss(
    model: Model,
    teacher: Model,
    objective: Objective,
    *,
    layer: int | None,
    teacher_layer: int | None,
    projection: int | None,
    ce_weight: float,
    implementation: str | None = None,
) -> Loss:
    """The student's hidden states against the teacher's, and a cross entropy of next tokens beside.

    Args:
      model: that is trained.
      teacher: of the same tokens.
      objective: `objectives.feature_distillation` with its options.
      layer: number of the sublayer, from 0, whose normalised input is read; None = what the head reads.
      teacher_layer: likewise, of the teacher.
      projection: the teacher's width where `params[BESIDE]` projects to it; None = none.
      ce_weight: of the cross entropy; 0 = none.
      implementation: of the models' ops.

    Raises:
      ConfigError: a layer that is not there, widths that need another projection, or a weight below 0.
    """
    for key, number, of in (("layer", layer, model), ("teacher_layer", teacher_layer, teacher)):
        layers = len(of.config.in_order())
        if number is not None and number not in range(layers):
            raise ConfigError(f"config.objective.{key}={number!r} must be below {layers}, the sublayers of {of.name}")
    ours, theirs = model.config.width, teacher.config.width
    if theirs != (ours if projection is None else projection):
        raise ConfigError(
            f"config.objective.projection={projection!r} does not lead from width {ours} to the teacher's; set {theirs}"
        )
    if not 0 <= ce_weight < float("inf"):
        raise ConfigError(f"config.objective.ce_weight={ce_weight!r} must be a finite number of at least 0")

    def features(of: Model, params: Tree, rows: Batch, number: int | None, logits: str) -> tuple[Any, Any]:
        output = forward(of, params, rows, implementation, logits=logits, inputs=number is not None)
        if number is None:
            return output.aux["hidden"], output.logits
        path, index, _ = of.config.in_order()[number]
        return _site(output.aux["inputs"], path, index), output.logits

    def loss(params: Tree, batch: Batch, key: jax.Array, teacher_params: Tree) -> LossOutput:
        del key
        rows = as_rows(batch)
        wanted, _ = features(teacher, teacher_params, rows, teacher_layer, "none")
        own, logits = features(model, params, rows, layer, "all" if ce_weight else "none")
        matrix = None if projection is None else params[BESIDE]["projection"]
        output = objective(own, jax.lax.stop_gradient(wanted), rows["loss_mask"], matrix)
        if not ce_weight:
            return output
        hard = cross_entropy(logits, rows["targets"], rows["loss_mask"])
        metrics = {**output.metrics, **hard.metrics, "distance": jax.lax.stop_gradient(output.loss_sum)}
        return LossOutput(output.loss_sum + ce_weight * hard.loss_sum, output.weight, metrics)

    return loss


def _stacked(trees: list[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _site(tree: Tree, path: str, index: tuple[int, ...]) -> Any:
    stage, name = path.split("/")
    return jax.tree.map(lambda leaf: leaf[index], tree[stage][name])


def attention_loss(
    model: Model, teacher: Model, objective: Objective, length: int, implementation: str | None = None
) -> Loss:
    """Every Hedgehog layer against the softmax attention that it replaces, at activations of the teacher alone.

    The loss is the sum over layers of the mean over rows (arXiv:2402.04347, section 4.2). It has a gradient with
    respect to the feature maps and nothing else.

    Args:
      model: with Hedgehog mixers.
      teacher: the same sublayers with attention in their place.
      objective: `objectives.attention_distillation` with its options.
      length: T of the batches.
      implementation: of the teacher's ops.

    Raises:
      ConfigError: the models do not match, or attention has a window shorter than the batches.
    """
    students, teachers = model.config.in_order(), teacher.config.in_order()
    if len(students) != len(teachers) or model.config.width != teacher.config.width:
        raise ConfigError(f"config.teacher {teacher.name!r} does not have the layers of the model")
    groups: dict[str, list[tuple[Any, Any]]] = collections.defaultdict(list)
    for ours, theirs in zip(students, teachers, strict=True):
        if type(ours[2].mixer) is not Hedgehog:
            continue
        if type(theirs[2].mixer) is not Attention:
            raise ConfigError(f"config.teacher has no softmax attention at {theirs[0]}, which {ours[0]} is to learn")
        if (window := theirs[2].mixer.window) is not None and window < length:
            raise ConfigError(f"config.sequence_length={length} must be at most the teacher's window, {window}")
        groups[ours[0]].append((ours, theirs))
    if not groups:
        raise ConfigError("config.objective: attention_distillation needs a model converted to 'hedgehog'")

    def loss(params: Tree, batch: Batch, key: jax.Array, teacher_params: Tree) -> LossOutput:
        del key
        ctx = SeqContext(positions=batch["positions"], segment_ids=batch["segment_ids"])
        teacher_params = jax.lax.stop_gradient(teacher_params)
        options = {"ctx": ctx, "logits": "none", "inputs": True, "implementation": implementation}
        inputs = teacher.apply(teacher_params, batch["tokens"], **options).aux["inputs"]
        layers = []
        for pairs in groups.values():
            own = _stacked([_site(params, path, index)["mixer"] for (path, index, _), _ in pairs])
            theirs = _stacked([_site(teacher_params, path, index)["mixer"] for _, (path, index, _) in pairs])
            read = _stacked([_site(inputs, path, index) for _, (path, index, _) in pairs])
            (_, _, student), (_, _, attention) = pairs[0]
            layer = functools.partial(
                _layer, ctx=ctx, config=student.mixer, attention=attention.mixer, objective=objective
            )
            layers.append(jax.lax.map(lambda args, layer=layer: layer(*args), (own, theirs, read)))
        rows = layers[0].weight[0]  # layers may differ in heads, hence in rows: what is summed are means
        sums = [jax.tree.map(lambda x, w=out.weight: jnp.sum(x * rows / jnp.maximum(w, 1.0)), out) for out in layers]
        total = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), sums)
        return LossOutput(total.loss_sum, rows, total.metrics)

    return loss


def _layer(own: Tree, theirs: Tree, x: jax.Array, *, ctx, config: Hedgehog, attention: Attention, objective):
    """The objective of one layer, on the teacher's queries and keys."""
    q, k, _ = hedgehog.project(theirs, x, ctx, config)
    phi_q = feature_maps.apply(own["q_map"], q, config=config.feature_map)
    phi_k = feature_maps.apply(own["k_map"], k, config=config.feature_map)
    return objective(q, k, phi_q, phi_k, documents=ctx.documents, scale=attention.scale)

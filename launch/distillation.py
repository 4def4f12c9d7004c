"""Losses that read a teacher beside the model: `loss(params, batch, key, teacher)` with the teacher's parameters."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp

from launch.config import ConfigError
from launch.step import Batch, Loss
from objectives import LossOutput, Objective
from zoo.core.context import SeqContext
from zoo.core.params import Tree
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
        ctx = SeqContext(positions=batch["positions"], segment_ids=batch["segment_ids"])
        run = functools.partial(Model.apply, tokens=batch["tokens"], ctx=ctx, implementation=implementation)
        wanted = jax.lax.stop_gradient(run(teacher, params=teacher_params).logits)
        return objective(run(model, params=params).logits, batch["targets"], batch["loss_mask"], wanted)

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

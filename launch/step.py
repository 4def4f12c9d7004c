"""The training state and the step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from objectives import LossOutput, Objective
from zoo.core import params as params_lib
from zoo.core.context import SeqContext
from zoo.core.params import Tree
from zoo.core.sharding import Rules, constrain, shardings
from zoo.models import Model

Batch = dict[str, jax.Array]
Loss = Callable[..., LossOutput]  # (params, batch, key), and a teacher's parameters where there is one


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes, plus the run's key.

    Attributes:
      step: int32 scalar, updates so far.
      params: parameters, as the model declares them.
      opt_state: of the optax optimiser.
      ema: moving average of the parameters, or None.
      rng: key data of the run's random key; step n uses fold_in(key, n).
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any
    rng: Any


def init_state(
    specs: Tree,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema: bool,
    trainable: Tree | None = None,
    params: Tree | None = None,
) -> TrainState:
    """The state of step 0. Traceable: jit it with `state_shardings`.

    Args:
      specs: of the parameters.
      optimizer: of those that are trained.
      seed: of the run.
      ema: whether to keep a moving average.
      trainable: boolean tree of the parameters that the optimiser sees; None = all.
      params: None = drawn anew.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = params_lib.initialise(specs, init_key) if params is None else params
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(_trained(params, trainable)),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        rng=jax.random.key_data(run_key),
    )


def _trained(params: Tree, trainable: Tree | None) -> Tree:
    return params if trainable is None else params_lib.partition(params, trainable)[0]


def state_shardings(
    specs: Tree,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: Rules,
    *,
    ema: bool,
    trainable: Tree | None = None,
) -> TrainState:
    """Shardings of a TrainState.

    A leaf of the optimiser's state that has the path and the rank of a parameter (moments; those of some of its layers)
    lies like it; all else (counts, factors of preconditioners) is replicated.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    of_params = shardings(specs, mesh, rules)
    shapes = params_lib.abstract(specs, of_params)
    opt_state = jax.eval_shape(optimizer.init, _trained(params_lib.abstract(specs), trainable))
    like = params_lib.flatten(shapes)

    def of_leaf(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        names = params_lib.path_string(path).split("/")
        suffixes = ("/".join(names[start:]) for start in range(len(names)))
        param = next((like[suffix] for suffix in suffixes if suffix in like), None)
        if param is None or len(param.shape) != len(leaf.shape):
            return replicated
        spec = (*param.sharding.spec, *(None,) * len(leaf.shape))
        kept = all(axis is None or a == b for axis, a, b in zip(spec, leaf.shape, param.shape, strict=False))
        return param.sharding if kept else replicated

    of_opt = jax.tree_util.tree_map_with_path(of_leaf, opt_state)
    return TrainState(replicated, of_params, of_opt, of_params if ema else None, replicated)


def language_model_loss(model: Model, objective: Objective, implementation: str | None = None) -> Loss:
    """`loss(params, batch, key)`: the model on packed documents, then the objective on its logits."""

    def loss(params: Tree, batch: Batch, key: jax.Array, *_: Tree) -> LossOutput:
        del key  # no objective or layer here draws random numbers
        rows = as_rows(batch)
        logits = forward(model, params, rows, implementation).logits
        return objective(logits, rows["targets"], rows["loss_mask"])

    return loss


def forward(model: Model, params: Tree, rows: Batch, implementation: str | None = None, **options: Any) -> Any:
    """The model's output on rows [B, T] of packed documents; options as of its `apply`."""
    ctx = SeqContext(positions=rows["positions"], segment_ids=rows["segment_ids"])
    return model.apply(params, rows["tokens"], ctx=ctx, implementation=implementation, **options)


def as_rows(batch: Batch) -> Batch:
    """The arrays that a model reads, [..., T], as [B, T]: responses of an example stand under one another."""
    names = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
    return {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in names}


def _microbatches(batch: Batch, count: int) -> Batch:
    """[B, ...] to [count, B / count, ...]; microbatch i holds rows i, i + count, ...: no row changes its device."""
    length = batch["tokens"].shape[-1] if "tokens" in batch else None

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        names: list[str | None] = [None] * (x.ndim - 2)
        if names and length in (None, x.shape[-1]):
            names[-1] = "time"
        return constrain(x, None, "batch", *names)

    return jax.tree.map(split, batch)


def summed_gradients(
    loss: Loss, params: Tree, batch: Batch, key: jax.Array, accumulation: int = 1
) -> tuple[LossOutput, Tree]:
    """LossOutput of a batch and the gradient of its loss_sum, in float32, `accumulation` microbatches at a time."""

    def one(microbatch: Batch, key: jax.Array) -> tuple[LossOutput, Tree]:
        def objective(params: Tree) -> tuple[jax.Array, LossOutput]:
            output = loss(params, microbatch, key)
            return output.loss_sum, output

        grads, output = jax.grad(objective, has_aux=True)(params)
        return output, params_lib.cast(grads, jnp.float32)

    if accumulation == 1:
        return one(batch, key)
    batches = _microbatches(batch, accumulation)
    first = jax.eval_shape(one, jax.tree.map(lambda x: x[0], batches), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)

    def add(total, inputs):
        index, microbatch = inputs
        return jax.tree.map(jnp.add, total, one(microbatch, jax.random.fold_in(key, index))), None

    return jax.lax.scan(add, zeros, (jnp.arange(accumulation), batches))[0]


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    *,
    accumulation: int = 1,
    ema_decay: float = 0.0,
    trainable: Tree | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch, teacher=None) -> (state, metrics)`; jit it with the state donated.

    Only what `trainable` selects has gradients, moments and updates; None = everything. `teacher` holds the parameters
    of another model, for losses that take them.

    The loss is loss_sum / weight over the whole batch: dividing once makes any number of microbatches or devices equal
    to one. When loss, gradient norm or the new parameters' norm is not finite the state comes back unchanged and
    metrics["finite"] is False.
    """

    def train_step(state: TrainState, batch: Batch, teacher: Tree = None) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        trained, frozen = (state.params, None) if trainable is None else params_lib.partition(state.params, trainable)

        def whole(trained: Tree) -> Tree:
            return trained if frozen is None else params_lib.combine(trained, frozen)

        def loss_of_trained(trained: Tree, batch: Batch, key: jax.Array) -> LossOutput:
            return loss(whole(trained), batch, key, *(() if teacher is None else (teacher,)))

        output, grads = summed_gradients(loss_of_trained, trained, batch, key, accumulation)
        weight = jnp.where(output.weight > 0, output.weight, 1.0)  # a batch of padding changes nothing but decay
        grads = jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), grads, trained)
        grad_norm = optax.tree_utils.tree_norm(grads)
        update = optax.with_extra_args_support(optimizer).update  # for those that read the number of tokens
        updates, opt_state = update(grads, state.opt_state, trained, num_tokens=output.weight)
        params = whole(optax.apply_updates(trained, updates))
        param_norm = optax.tree_utils.tree_norm(params)
        mean = output.loss_sum / weight
        finite = jnp.isfinite(mean) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params)
        new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
        metrics = {
            "loss": mean,
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": output.weight,
            "finite": finite,
        }
        return new, metrics | {name: value / weight for name, value in output.metrics.items()}

    return train_step


def make_eval_step(loss: Loss, *, coding: bool = True) -> Callable[..., dict[str, jax.Array]]:
    """`step(params, batch, key, teacher=None)`: the sums loss_sum, weight, metrics and, of text, bytes of targets.

    The bytes are left out where the loss is no code length of the targets (`coding`).
    """

    def eval_step(params: Tree, batch: Batch, key: jax.Array, teacher: Tree = None) -> dict[str, jax.Array]:
        output = loss(params, batch, key, *(() if teacher is None else (teacher,)))
        of_text = {"bytes": jnp.sum(batch["target_bytes"])} if coding and "target_bytes" in batch else {}
        return {"loss_sum": output.loss_sum, "weight": output.weight, **of_text, **output.metrics}

    return eval_step

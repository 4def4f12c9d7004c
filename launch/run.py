"""What every mode starts from: data, model, mesh, optimiser and the jitted functions of a run."""

import contextlib
import copy
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

import objectives
from launch import config as config_lib
from launch import data as data_lib
from launch import mesh as mesh_lib
from launch import optimizer as optimizer_lib
from launch import step as step_lib
from launch.checkpoints import Checkpoints
from launch.step import TrainState
from zoo.core import sharding
from zoo.core.sharding import Rules
from zoo.models import Model, create


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run and how their arrays lie, without data or a folder.

    Attributes:
      model: from config.model.
      mesh, rules: how arrays are split.
      shardings, abstract: of the TrainState.
      init: () -> TrainState of step 0.
      train_step: (state, batch) -> (state, metrics); donates the state.
      eval_step: (params, batch, key) -> sums.
    """

    model: Model
    mesh: Mesh
    rules: Rules
    shardings: TrainState
    abstract: TrainState
    init: Callable[[], TrainState]
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Mesh and rules in use."""
        with sharding.use(self.mesh, self.rules):
            yield

    def place(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """A host batch on the devices."""
        return mesh_lib.place(batch, self.mesh, self.rules)


@dataclasses.dataclass(frozen=True)
class Run(Program):
    """A resolved run.

    Attributes:
      config: plain nested dicts without open ends (vocabulary, horizon of the schedule).
      workdir: where it lives.
      data: documents and tokenizer, or a task.
    """

    config: dict[str, Any]
    workdir: pathlib.Path
    data: data_lib.Data

    def checkpoints(self, *, read_only: bool = False) -> Checkpoints:
        """The checkpoints of the workdir."""
        keep = self.config["checkpoint"]
        return Checkpoints(
            self.workdir / "checkpoints",
            keep_last=keep["keep_last"],
            keep_best=keep["keep_best"],
            metric=self.data.metrics[0],
            read_only=read_only,
        )

    @property
    def saved_config(self) -> pathlib.Path:
        """config.json of the workdir."""
        return self.workdir / "config.json"

    def check_resume(self) -> None:
        """Refuses a workdir whose run had another model, data or optimisation."""
        config_lib.check_resume(self.saved_config, self.config, self.data.fingerprint)

    def restore_params(self) -> tuple[int, Any]:
        """Step and parameters (their moving average where there is one) of the checkpoint that the config names."""
        checkpoints = self.checkpoints(read_only=True)
        step = checkpoints.find(self.config["evaluate"]["checkpoint"])
        self.check_resume()
        state = checkpoints.restore(self.abstract, step=step)
        checkpoints.close()
        return step, evaluation_params(state)


def evaluation_params(state: TrainState) -> Any:
    """The moving average where there is one, else the parameters."""
    return state.params if state.ema is None else state.ema


def resolve(config: Any, vocab_size: int) -> dict[str, Any]:
    """Fills in what depends on the data and on other keys.

    Raises:
      ConfigError: config.model.vocab_size is smaller than the data's.
    """
    resolved = copy.deepcopy(config_lib.to_dict(config))
    model = resolved["model"]
    if model.get("vocab_size") is None:
        model["vocab_size"] = vocab_size
    if model["vocab_size"] < vocab_size:
        raise config_lib.ConfigError(
            f"config.model.vocab_size={model['vocab_size']} is smaller than the data's {vocab_size}"
        )
    if resolved["optimizer"]["schedule"].get("steps") is None:
        resolved["optimizer"]["schedule"]["steps"] = resolved["steps"]
    return resolved


def build(config: Any, workdir: pathlib.Path) -> Run:
    """Everything of a run short of its state.

    Raises:
      ConfigError: anything wrong with the config, before any work is done on data.
    """
    config_lib.check(config)
    # Names and options are looked at before the data is prepared, which may take a while.
    plain = resolve(config, 1)
    _model(plain)
    _objective(plain)
    with config_lib.at("mesh and config.rules"):
        mesh, rules = mesh_lib.make(plain)
    with config_lib.at("optimizer.schedule"):
        optimizer_lib.make_schedule(plain["optimizer"])

    with config_lib.at("data"):
        data = data_lib.prepare(config, workdir)
    plain = resolve(config, data.vocab_size)
    program = assemble(plain, mesh, rules)
    fields = {field.name: getattr(program, field.name) for field in dataclasses.fields(program)}
    return Run(config=plain, workdir=workdir, data=data, **fields)


def assemble(plain: dict[str, Any], mesh: Mesh, rules: Rules) -> Program:
    """The functions of a resolved config on a mesh; nothing is compiled or allocated yet."""
    model = _model(plain)
    with config_lib.at("optimizer"):
        optimizer, schedule = optimizer_lib.make(plain["optimizer"], model.param_specs())
    ema = plain["ema_decay"] > 0
    loss = step_lib.language_model_loss(model, _objective(plain), plain["implementation"])
    init = functools.partial(step_lib.init_state, model, optimizer, seed=plain["seed"], ema=ema)
    with config_lib.at("mesh and config.rules"):
        shardings = step_lib.state_shardings(model, optimizer, mesh, rules, ema=ema)
    train_step = step_lib.make_train_step(
        loss, optimizer, schedule, accumulation=plain["accumulation"], ema_decay=plain["ema_decay"]
    )
    return Program(
        model=model,
        mesh=mesh,
        rules=rules,
        shardings=shardings,
        abstract=jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), jax.eval_shape(init), shardings
        ),
        init=jax.jit(init, out_shardings=shardings),
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None)),
        eval_step=jax.jit(step_lib.make_eval_step(loss)),
    )


def _model(config: dict[str, Any]) -> Model:
    with config_lib.at("model"):
        name, given = config_lib.options(config["model"])
        return create(name, **given)


def _objective(config: dict[str, Any]) -> objectives.Objective:
    with config_lib.at("objective"):
        name, given = config_lib.options(config["objective"])
        return objectives.create(name, **given)

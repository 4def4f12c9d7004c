"""What every mode starts from: data, model, mesh, optimiser and the jitted functions of a run."""

import contextlib
import copy
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from launch import config as config_lib
from launch import data as data_lib
from launch import losses as losses_lib
from launch import mesh as mesh_lib
from launch import optimizer as optimizer_lib
from launch import rollout as rollout_lib
from launch import start
from launch import step as step_lib
from launch.checkpoints import Checkpoints
from launch.configs import base
from launch.rollout import Rollout
from launch.step import TrainState
from pipelines import ResponseDataset
from zoo.adapters import lora
from zoo.core import sharding
from zoo.core.params import Tree, abstract, initialise, partition
from zoo.core.registry import check_keys
from zoo.core.sharding import Rules
from zoo.models import Model, carry_over, conversion, create


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run and how their arrays lie, without data or a folder.

    Attributes:
      model: from config.model.
      specs: of its parameters, with adapters.
      mesh, rules: how arrays are split.
      shardings, abstract: of the TrainState.
      init: () -> TrainState of step 0.
      teacher: parameters of the teacher, or None; teacher_model: what they are of.
      train_step: (state, batch, teacher) -> (state, metrics); donates the state.
      evaluation_params: state -> the moving average where there is one, else the parameters or what the optimiser has
        in place of them.
      eval_step: (params, batch, key, teacher) -> sums.
    """

    model: Model
    specs: Tree
    mesh: Mesh
    rules: Rules
    shardings: TrainState
    abstract: TrainState
    init: Callable[[], TrainState]
    teacher: Tree
    train_step: Callable[..., Any]
    evaluation_params: Callable[[TrainState], Tree]
    eval_step: Callable[..., Any]
    teacher_model: Model | None

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
      data: documents and tokenizer, a task, or responses.
      forget: what is to be forgotten, or None.
      rollout: draws the responses of a batch, or None.
      references: log-probabilities of the reference by split and example, or None.
    """

    config: dict[str, Any]
    workdir: pathlib.Path
    data: data_lib.Data
    forget: data_lib.Data | None
    rollout: Rollout | None
    references: dict[str, np.ndarray] | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """What the run reports; the first one chooses the best checkpoint."""
        return data_lib.metrics(self.config)

    def prepare(self, batch: dict[str, Any], params: Tree, step: int, split: str = "train") -> dict[str, Any]:
        """A host batch with what does not come with the data: drawn responses, the reference's log-probabilities."""
        if self.rollout is not None:
            drawn_by = self.teacher if self.config["rollout"]["name"] == "teacher" else params
            with sharding.use(self.mesh, {**self.rules, "batch": None}):
                batch = self.rollout(drawn_by, batch, step, split)
        if self.references is not None:
            of_batch = self.references[split][np.maximum(batch["index"], 0)]
            batch = {**batch, "ref_logps": np.where(batch["loss_mask"] != 0, of_batch, 0.0)}
        return batch

    def checkpoints(self, *, read_only: bool = False) -> Checkpoints:
        """The checkpoints of the workdir."""
        keep = self.config["checkpoint"]
        return Checkpoints(
            self.workdir / "checkpoints",
            keep_last=keep["keep_last"],
            keep_best=keep["keep_best"],
            metric=self.metrics[0],
            read_only=read_only,
        )

    @property
    def fingerprint(self) -> str:
        """Hash of the data."""
        return self.data.fingerprint if self.forget is None else f"{self.data.fingerprint} {self.forget.fingerprint}"

    @property
    def saved_config(self) -> pathlib.Path:
        """config.json of the workdir."""
        return self.workdir / "config.json"

    def check_resume(self) -> None:
        """Refuses a workdir whose run had another model, data or optimisation."""
        config_lib.check_resume(self.saved_config, self.config, self.fingerprint)

    def restore_params(self) -> tuple[int, Any]:
        """Step and parameters (their moving average where there is one) of the checkpoint that the config names."""
        checkpoints = self.checkpoints(read_only=True)
        step = checkpoints.find(self.config["evaluate"]["checkpoint"])
        self.check_resume()
        state = checkpoints.restore(self.abstract, step=step)
        checkpoints.close()
        return step, self.evaluation_params(state)


def resolve(config: Any, vocab_size: int) -> dict[str, Any]:
    """Fills in what depends on the data and on other keys.

    Raises:
      ConfigError: config.model.vocab_size is smaller than the data's.
    """
    resolved = copy.deepcopy(config_lib.to_dict(config))
    if _from_initial(resolved) and resolved["initial"].get("name") == "run":
        with config_lib.at("initial"):
            start.check(resolved, "initial")
            resolved["model"] = start.conversion_of_run(resolved["model"], resolved["initial"]["workdir"])
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
    for key in start.NONE:
        with config_lib.at(key):
            start.check(plain, key)
    if not _from_initial(plain):
        _model(plain)
    losses_lib.create_objective(plain)
    with config_lib.at("rollout"):
        rollout_lib.check(plain, losses_lib.category(plain))
    with config_lib.at("mesh and config.rules"):
        mesh, rules = mesh_lib.make(plain)
    with config_lib.at("optimizer.schedule"):
        optimizer_lib.make_schedule(plain["optimizer"])

    with config_lib.at("data"):
        data = data_lib.prepare(config, workdir)
        forget = data_lib.prepare_forget(config, data, workdir)
    plain = resolve(config, data.vocab_size)
    program = assemble(plain, mesh, rules)
    fields = {field.name: getattr(program, field.name) for field in dataclasses.fields(program)}
    rollout = _rollout(plain, program, data)
    return Run(config=plain, workdir=workdir, data=data, forget=forget, rollout=rollout, **fields)


def _rollout(plain: dict[str, Any], program: Program, data: data_lib.Data) -> Rollout | None:
    name = plain["rollout"]["name"]
    if name == "none":
        return None
    if not isinstance(data, ResponseDataset) or data.kind != "sft" or data.packed:
        raise config_lib.ConfigError(
            f"config.rollout.name={name!r} needs prompts with one response each: config.data.source of kind 'sft', "
            "not packed"
        )
    model = program.teacher_model if name == "teacher" else program.model
    assert model is not None
    with config_lib.at("data.source.template"):
        end_id = data_lib.end_id(data)
    return Rollout(model, data, end_id, plain["rollout"], plain["seed"], plain["implementation"])


def assemble(
    plain: dict[str, Any], mesh: Mesh, rules: Rules, *, like: dict[str, Any] | None = None, concrete: bool = True
) -> Program:
    """The functions of a resolved config on a mesh; but for a teacher, nothing is compiled or allocated yet.

    Args:
      plain: resolved config.
      mesh, rules: how arrays are split.
      like: resolved config whose objective has the parameters beside the model's; None = `plain`.
      concrete: False to have the teacher's parameters as shapes alone, for a mesh of devices that are not there; of
        other runs nothing but their config is then read.
    """
    restore = functools.partial(_restore, mesh=mesh, rules=rules) if concrete else _described
    initial = functools.cache(functools.partial(start.read, plain, "initial", restore))
    model = _model(plain, initial)
    with config_lib.at("adapter"):
        specs = start.adapted(model.param_specs(), plain)
    beside = losses_lib.beside(like or plain, model)
    specs = {**specs, **beside}
    trainable = start.trainable(specs, plain)
    with config_lib.at("optimizer"):
        trained = specs if trainable is None else partition(specs, trainable)[0]
        optimizer, schedule = optimizer_lib.make(plain["optimizer"], trained)
        jax.eval_shape(optimizer.init, abstract(trained))  # what it refuses is the optimiser's fault, not the mesh's
    ema = plain["ema_decay"] > 0
    losses = losses_lib.make(plain, model, initial, restore)
    source, place = losses.source, jax.device_put if concrete else _laid_out
    options = {"seed": plain["seed"], "ema": ema, "trainable": trainable}
    fresh = functools.partial(step_lib.init_state, specs, optimizer, **options)
    with config_lib.at("mesh and config.rules"):
        shardings = step_lib.state_shardings(specs, optimizer, mesh, rules, ema=ema, trainable=trainable)
    train_step = step_lib.make_train_step(
        losses.train,
        optimizer,
        schedule,
        accumulation=plain["accumulation"],
        ema_decay=plain["ema_decay"],
        trainable=trainable,
    )
    init = jax.jit(fresh, out_shardings=shardings)
    evaluated = optimizer_lib.evaluation_params(plain["optimizer"]["name"], trainable)
    if evaluated is not None:
        evaluated = jax.jit(evaluated, out_shardings=shardings.params)

    def evaluation_params(state: TrainState) -> Tree:
        if state.ema is not None:
            return state.ema
        return state.params if evaluated is None else evaluated(state.params, state.opt_state)

    def init_from_source() -> TrainState:
        params = _initial_params(plain, model, initial()) | initialise(beside, jax.random.key(plain["seed"]))
        params = jax.device_put(params, shardings.params)
        initial.cache_clear()
        # Copies: the state is donated, and what it is made of may be the teacher's.
        begin = lambda params: fresh(params=jax.tree.map(jnp.copy, params))  # noqa: E731
        return jax.jit(begin, out_shardings=shardings)(params)

    return Program(
        model=model,
        specs=specs,
        mesh=mesh,
        rules=rules,
        shardings=shardings,
        abstract=jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), jax.eval_shape(fresh), shardings
        ),
        init=init if plain["initial"]["name"] == start.NONE["initial"] else init_from_source,
        teacher=None if source is None else place(source[1], sharding.shardings(source[0].param_specs(), mesh, rules)),
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None)),
        teacher_model=None if source is None else source[0],
        evaluation_params=evaluation_params,
        eval_step=jax.jit(step_lib.make_eval_step(losses.judge, coding=losses_lib.codes_text(plain))),
    )


def _initial_params(plain: dict[str, Any], model: Model, source: start.Source) -> Tree:
    """Parameters of config.initial as those of the model, with its adapters."""
    key = jax.random.key(plain["seed"])
    with config_lib.at("initial"):
        params = carry_over(source[0].config, source[1], model.config, key)
    return start.with_adapters(params, model, plain, key)


def _restore(config: dict[str, Any], workdir: pathlib.Path, *, mesh: Mesh, rules: Rules) -> start.Source:
    """Model and parameters (with adapters merged) of the checkpoint of another run that its config names."""
    # What the run learnt with, and from, is of no interest but for the parameters that it had beside the model's.
    defaults = config_lib.to_dict(base.get_config())
    learning = {key: defaults[key] for key in ("objective", "teacher", "rollout", "data")}
    program = assemble({**config, **learning}, mesh, rules, like=config)
    metric = data_lib.metrics(config)[0]
    checkpoints = Checkpoints(workdir / "checkpoints", metric=metric, read_only=True)
    state = checkpoints.restore(program.abstract, step=checkpoints.find(config["evaluate"]["checkpoint"]))
    checkpoints.close()
    params = program.evaluation_params(state)
    return program.model, lora.merge({key: leaf for key, leaf in params.items() if key != losses_lib.BESIDE})


def _described(config: dict[str, Any], _: pathlib.Path) -> start.Source:
    """Model and abstract parameters of another run, from its config alone."""
    model = _model(config)
    return model, abstract(model.param_specs())


def _laid_out(params: Tree, shardings: Tree) -> Tree:
    """Parameters as shapes with their shardings."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), params, shardings)


def _from_initial(config: dict[str, Any]) -> bool:
    """Whether the model is a conversion of that of config.initial, whatever it is."""
    model = config["model"]
    return model.get("name") == conversion.FAMILY and model.get("base") is None


def _model(config: dict[str, Any], initial: Callable[[], start.Source] | None = None) -> Model:
    with config_lib.at("model"):
        name, given = config_lib.options(config["model"])
        if not _from_initial(config):
            return create(name, **given)
        if initial is None or config["initial"]["name"] == start.NONE["initial"]:
            raise ValueError("'converted' needs base, or config.initial with a model to convert")
        source, vocab_size = initial()[0], given.pop("vocab_size")
        if source.config.vocab_size < vocab_size:
            raise ValueError(
                f"config.initial has vocab_size={source.config.vocab_size}, smaller than the data's {vocab_size}"
            )
        check_keys("'converted' without base", given, start.CONVERSION)
        overrides = {name: given.pop(name) for name in conversion.OVERRIDES if name in given}
        given["base_options"] = {"param_dtype": "float32", **given.get("base_options", {}), **overrides}
        return conversion.converted_model(source, **given)

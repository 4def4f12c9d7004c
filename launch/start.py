"""What step 0 starts from and what is trained: sources of parameters, adapters, frozen leaves."""

import fnmatch
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import zoo
from launch import config as config_lib
from launch.config import ConfigError
from launch.configs import base
from zoo.adapters import lora
from zoo.core.params import Tree, flatten, map_specs
from zoo.core.registry import check_choice, check_keys, nearest
from zoo.models import Model, conversion

Source = tuple[Model, Tree]
# Names of config.initial and config.teacher with the options that each needs.
SOURCES: Mapping[str, tuple[str, ...]] = {"run": ("workdir",), "hf": ("folder",)}
OPTIONAL = {"run": ("checkpoint",), "hf": ()}
NONE = {"initial": "random", "teacher": "none"}
CONVERSION = ("to", "keep", "mixer", "base_options", *conversion.OVERRIDES)  # options of a conversion without a base
AS_INITIAL = "initial"  # of config.teacher: the model that config.initial names, as it is there


def check(config: Mapping[str, Any], key: str) -> str:
    """The name in config.initial or config.teacher, once its options are known to be right.

    Raises:
      ValueError: an unknown name or option, or one that is missing.
    """
    name, given = config_lib.options(config[key])
    alone = (NONE[key], AS_INITIAL) if key == "teacher" else (NONE[key],)
    check_choice("name", name, (*alone, *SOURCES))
    needed = SOURCES.get(name, ())
    of_teacher = ("precompute",) if key == "teacher" and name != NONE[key] else ()
    check_keys(f"name {name!r}", given, (*needed, *OPTIONAL.get(name, ()), *of_teacher))
    for option in needed:
        if option not in given:
            raise ValueError(f"name {name!r} needs {option}")
    checkpoint = given.get("checkpoint", "last")
    if checkpoint not in ("best", "last") and not (isinstance(checkpoint, str) and checkpoint.isdigit()):
        raise ValueError(f"checkpoint={checkpoint!r} must be 'best', 'last' or the digits of a step")
    return name


def read(config: Mapping[str, Any], key: str, restore: Callable[[dict[str, Any], pathlib.Path], Source]) -> Source:
    """The model and parameters of config.initial or config.teacher.

    Args:
      config: resolved.
      key: "initial" or "teacher".
      restore: (config of a run, its workdir) -> model and parameters of the checkpoint that it names.

    Raises:
      ConfigError: there are none, or they cannot be read.
    """
    with config_lib.at(key):
        name, given = check(config, key), config_lib.options(config[key])[1]
        try:
            if name == "hf":
                return zoo.from_hf(given["folder"])
            return restore(*_saved(pathlib.Path(given["workdir"]).expanduser(), given.get("checkpoint", "last")))
        except FileNotFoundError as error:
            raise ConfigError(f"config.{key}: {error}") from error


def _saved(workdir: pathlib.Path, checkpoint: str) -> tuple[dict[str, Any], pathlib.Path]:
    """The config of another run, from which `checkpoint` is read, and its workdir."""
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} holds no run: there is no {path.name}")
    defaults = config_lib.to_dict(base.get_config())
    saved = {**defaults, **json.loads(path.read_text())["config"]}
    saved["evaluate"]["checkpoint"] = checkpoint
    return saved, workdir


def conversion_of_run(model: dict[str, Any], workdir: str) -> dict[str, Any]:
    """config.model of a conversion without a base, with the model of another run as its base.

    Raises:
      ValueError: an option that no conversion has, or one that an earlier conversion has otherwise.
    """
    check_keys("'converted' without base", model, ("name", "base", *CONVERSION))
    given = {name: value for name, value in model.items() if value is not None}
    saved = _saved(pathlib.Path(workdir).expanduser(), "last")[0]["model"]
    if saved["name"] == conversion.FAMILY:
        for name in ("to", "mixer"):
            if given.get(name) != saved.get(name):
                raise ValueError(f"{name}={given.get(name)!r} must be that of {workdir}, {saved.get(name)!r}")
        overrides = {name: value for name, value in given.items() if name in conversion.OVERRIDES}
        return {**saved, "keep": given.get("keep", 2), **overrides}
    name = saved.pop("name")
    given["base_options"] = {**saved, **given.get("base_options", {})}
    return {"vocab_size": given["base_options"].get("vocab_size"), **given, "base": name}


def adapted(specs: Tree, config: Mapping[str, Any]) -> Tree:
    """Specs of the parameters with the adapters of config.adapter."""
    name, given = config_lib.options(config["adapter"])
    check_choice("name", name, ("none", "lora"))
    if name == "none":
        return specs
    check_keys("name 'lora'", given, ("pattern", "rank", "alpha"))
    for option in ("pattern", "rank", "alpha"):
        if option not in given:
            raise ValueError(f"name 'lora' needs {option}")
    return lora.param_specs(specs, **given)


def with_adapters(params: Tree, model: Model, config: Mapping[str, Any], key: Any) -> Tree:
    """Parameters with the adapters of config.adapter, which leave the model what it is."""
    name, given = config_lib.options(config["adapter"])
    return params if name == "none" else lora.attach(params, model.param_specs(), **given, key=key)


def trainable(specs: Tree, config: Mapping[str, Any]) -> Tree | None:
    """Boolean tree of the parameters that match config.trainable and not config.frozen; None when all do.

    Raises:
      ConfigError: a glob that matches nothing, with the nearest path, or nothing left to train.
    """
    paths = list(flatten(specs))
    for key in ("trainable", "frozen"):
        globs = config[key]
        if isinstance(globs, str) or not all(isinstance(glob, str) for glob in globs):
            raise ConfigError(f"config.{key}={globs!r} must be a list of globs over parameter paths")
        for glob in globs:
            if not any(fnmatch.fnmatchcase(path, glob) for path in paths):
                raise ConfigError(f"config.{key}: {glob!r} matches no parameter; {nearest(glob, paths)}")

    def chosen(path: str) -> bool:
        matches = lambda globs: any(fnmatch.fnmatchcase(path, glob) for glob in globs)  # noqa: E731
        return matches(config["trainable"]) and not matches(config["frozen"])

    count = sum(map(chosen, paths))
    if not count:
        raise ConfigError(f"config.trainable={config['trainable']} and config.frozen={config['frozen']} leave nothing")
    return None if count == len(paths) else map_specs(lambda path, _: chosen(path), specs)

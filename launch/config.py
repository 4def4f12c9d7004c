"""Checking, resolving, saving and comparing run configs."""

import contextlib
import importlib.metadata
import json
import pathlib
import platform
import re
from collections.abc import Iterator, Mapping
from typing import Any

from launch.configs import base
from zoo.core.registry import nearest

MODES = ("train", "evaluate", "generate", "compile", "benchmark")
# Their options belong to what `name` names, and are checked by its registry.
OPEN = (
    *("model", "initial", "teacher", "adapter", "objective", "optimizer", "optimizer.schedule"),
    *("data.source", "data.forget", "data.tokenizer", "rules.overrides"),
)
# What may differ when a run is resumed: where and how it runs, and what is reported. A longer `steps` needs the
# schedule's horizon, optimizer.schedule.steps, to stay as it was.
MAY_CHANGE = (
    *("mode", "steps", "accumulation", "implementation", "mesh", "rules"),
    *("checkpoint", "evaluate", "log", "generate", "data.directory", "topology", "benchmark"),
)
_POSITIVE = ("steps", "batch_size", "sequence_length", "accumulation", "log.every", "checkpoint.keep_last")
_NOT_NEGATIVE = ("seed", "checkpoint.every", "checkpoint.keep_best", "evaluate.every", "evaluate.batches", "ema_decay")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml-collections", "tokenizers")


class ConfigError(ValueError):
    """A config that cannot be run."""


@contextlib.contextmanager
def at(key: str) -> Iterator[None]:
    """Turns what a name or an option of config.<key> raises into a ConfigError that says where it stands."""
    try:
        yield
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"config.{key}: {error.args[0] if error.args else error}") from error


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested mappings."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return flat


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON-able nested dicts of a ConfigDict."""
    plain = config.to_dict() if hasattr(config, "to_dict") else config
    return json.loads(json.dumps(plain))


def options(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Splits {"name": n, **options} into name and options; options that are None are left to their defaults."""
    plain = to_dict(config)
    if not isinstance(plain.get("name"), str):
        raise ConfigError(f"a name is needed, got {plain.get('name')!r}")
    return plain.pop("name"), {key: value for key, value in plain.items() if value is not None}


def _unknown_keys(config: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        path = f"{prefix}{key}"
        if key not in known:
            if prefix[:-1] in OPEN:
                continue
            yield f"config has no key {path!r}; {nearest(path, (prefix + k for k in known))}"
        elif isinstance(known[key], Mapping):
            if isinstance(value, Mapping):
                yield from _unknown_keys(value, known[key], f"{path}.")
            else:
                yield f"config.{path} must hold the keys {', '.join(known[key]) or 'of a mapping'}, got {value!r}"


def check(config: Any) -> None:
    """Raises ConfigError for unknown or missing keys (with the nearest one) and values out of range."""
    plain, known = to_dict(config), to_dict(base.get_config())
    for problem in _unknown_keys(plain, known):
        raise ConfigError(problem)
    flat = flatten(plain)
    for path in flatten(known):
        if path not in flat and not any(path.startswith(f"{key}.") or path == key for key in OPEN):
            raise ConfigError(f"config lacks {path!r}; start from launch/configs/base.py")
    if plain["mode"] not in MODES:
        raise ConfigError(f"config.mode={plain['mode']!r} is unknown; {nearest(plain['mode'], MODES)}")
    for paths, least in ((_POSITIVE, 1), (_NOT_NEGATIVE, 0)):
        for path in paths:
            value = flat[path]
            kinds = (int, float) if path == "ema_decay" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or value < least:
                raise ConfigError(f"config.{path}={value!r} must be a number of at least {least}")
    if flat["ema_decay"] >= 1:
        raise ConfigError(f"config.ema_decay={flat['ema_decay']} must be below 1")
    if flat["batch_size"] % flat["accumulation"]:
        raise ConfigError(
            f"config.batch_size={flat['batch_size']} is not a multiple of config.accumulation={flat['accumulation']}"
        )
    which = flat["evaluate.checkpoint"]
    if which not in ("best", "last") and not (isinstance(which, str) and which.isdigit()):
        raise ConfigError(f"config.evaluate.checkpoint={which!r} must be 'best', 'last' or the digits of a step")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run's numbers depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def save(path: pathlib.Path, config: Mapping[str, Any], **facts: Any) -> None:
    """Writes {"config", "versions", **facts} as JSON; a reader sees the old file or the whole new one."""
    write_json(path, {"config": config, "versions": versions(), **facts})


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON to a partial file and renames it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def check_resume(path: pathlib.Path, config: Mapping[str, Any], fingerprint: str) -> None:
    """Refuses to go on with a run whose model, data or optimisation was another one.

    A key that the run does not know, as it is older than the key, counts as having been at its default.

    Args:
      path: config.json of the run.
      config: resolved config, plain dicts.
      fingerprint: of the data.

    Raises:
      ConfigError: names every key that differs, with both values; there is no such file.
    """
    if not path.exists():
        raise ConfigError(
            f"{path.parent} holds checkpoints and no {path.name}, which says what run they are of; put it back, or use "
            "another --workdir"
        )
    saved = json.loads(path.read_text())
    defaults, old, new = (flatten(c) for c in (to_dict(base.get_config()), saved["config"], to_dict(config)))
    known = {key[: end.start()] for key in old for end in re.finditer(r"\.|$", key)}  # keys and what holds them
    old = {key: value for key, value in defaults.items() if (key.rpartition(".")[0] or key) not in known} | old
    old["data fingerprint"], new["data fingerprint"] = saved["data_fingerprint"], fingerprint
    allowed = re.compile("|".join(rf"{re.escape(key)}(\.|$)" for key in MAY_CHANGE))
    differing = [
        f"{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
        for key in sorted({*old, *new})
        if not allowed.match(key) and old.get(key) != new.get(key)
    ]
    if differing:
        raise ConfigError(
            f"{path.parent} holds a run with another config; differing keys: {'; '.join(differing)}. "
            "Use another --workdir, or set them back"
        )

"""Folders of safetensors files, sharded or not: tensors by name, read one at a time, written atomically."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# JSON has no word for these: transformers writes {"__float__": "Infinity"}.
FLOAT = "__float__"
FLOATS: Mapping[str, float] = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
Shape = tuple[int, ...]


def _decode(value: dict[str, Any]) -> Any:
    return FLOATS[value[FLOAT]] if value.keys() == {FLOAT} and value[FLOAT] in FLOATS else value


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _encode(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT: json.dumps(value)}  # the names that JavaScript has for them
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file; ValueError with the file's name otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=_decode)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """{file name: names that the index says it holds, None without an index}."""
    single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if single and index:
        raise ValueError(f"{folder} has both {SINGLE} and {INDEX}; remove the one that is stale")
    if single:
        return {SINGLE: None}
    if not index:
        found = sorted(p.name for p in folder.iterdir())
        pickles = [name for name in found if name.endswith(PICKLES)]
        if pickles:
            raise ValueError(
                f"{folder} holds weights only as pickles ({', '.join(pickles[:3])}), which are never loaded because "
                "they can run code; convert them to safetensors first"
            )
        raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}; it has {found[:10]}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} must hold a non-empty object 'weight_map'")
    shards: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX}: weight_map[{name!r}] = {file!r} is no name of a safetensors file")
        names = shards.setdefault(file, set())
        assert names is not None
        names.add(name)
    return shards


class TensorFolder:
    """The tensors of a folder.

    Attributes:
      shapes: {name: shape}. dtypes: {name: NumPy dtype}.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._files: dict[str, Any] = {}
        for file, expected in _shards(folder).items():
            self._open(folder / file, expected)

    def _open(self, path: Path, expected: set[str] | None) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is named by {INDEX} and does not exist")
        try:
            handle = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
        names = set(handle.keys())
        if expected is not None and names != expected:
            raise ValueError(
                f"{path} and {INDEX} disagree: only in the index {sorted(expected - names)[:5]}, "
                f"only in the file {sorted(names - expected)[:5]}"
            )
        for name in sorted(names):
            view = handle.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise ValueError(f"{path}: {name} is stored as {view.get_dtype()}; supported: {', '.join(DTYPES)}")
            self.shapes[name] = tuple(view.get_shape())
            self.dtypes[name] = DTYPES[view.get_dtype()]
            self._files[name] = handle

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._files[name].get_tensor(name)


def plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `max_bytes`; a larger tensor stands alone."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _write(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[Shape, np.dtype]],
    make: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    text = json.dumps(_encode(config), indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in shapes.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # safetensors writes the buffer of an array, whatever its strides: without this a transpose is lost.
        tensors = {name: np.ascontiguousarray(make(name)) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[Shape, np.dtype]],
    make: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int,
    overwrite: bool,
) -> None:
    """Writes config.json and safetensors beside `folder` and renames them into place when they are complete.

    Args:
      folder: target.
      config: of config.json.
      shapes: {name: (shape, dtype)}, in the order of the files.
      make: the tensor of a name; called once each, one shard at a time.
      max_shard_bytes: bytes of tensors in one file.
      overwrite: replace the model of a folder that is not empty; its other files (a tokenizer) are kept.

    Raises:
      FileExistsError: the folder is not empty and `overwrite` is False, or the path is a file.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be >= 1, got {max_shard_bytes}")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file")
    old = sorted(folder.iterdir()) if folder.is_dir() else []
    if old and not overwrite:
        raise FileExistsError(f"{folder} is not empty ({old[0].name}, ...); give overwrite=True to replace its model")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        new = work / "new"
        new.mkdir()
        _write(new, config, shapes, make, max_shard_bytes)
        for entry in old:
            if entry.name in (CONFIG, INDEX) or entry.suffix == ".safetensors":
                continue
            (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, new / entry.name)
        if folder.exists():
            os.replace(folder, work / "old")
        os.replace(new, folder)
    except BaseException:
        if (work / "old").exists() and not folder.exists():
            os.replace(work / "old", folder)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)

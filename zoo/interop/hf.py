"""Hugging Face folders (config.json and safetensors) to and from zoo models."""

import collections
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.core.linear import is_weight, materialise
from zoo.core.params import Spec, Tree, check_tree, flatten, is_spec
from zoo.core.registry import check_choice, check_keys
from zoo.interop import hf_config
from zoo.interop.families import HF_FAMILIES, IGNORED, HFFamily, Rule, read_options
from zoo.interop.safetensors_io import CONFIG, TensorFolder, read_json, write_folder
from zoo.models.language_model import LanguageModelConfig, Sublayer
from zoo.models.model import Model, create

HEAD, EMBEDDING = "lm_head.weight", "embedding"
# Buffers that old checkpoints hold; they follow from the config.
BUFFERS = (".rotary_emb.inv_freq",)
ALIASES: Mapping[str, str] = {"backbone.embedding.weight": "backbone.embeddings.weight"}
LISTED = 10  # problems named in one error


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of a Hugging Face tensor: `leaf[index]` of a zoo leaf, in another form.

    Attributes:
      path: of the leaf. index: of the repeat and the head, () for leaves outside the layers.
      shape: of `leaf[index]`.
      inputs: contracted dimensions of that shape.
      form: see families.Rule.
    """

    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    inputs: int
    form: str

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Shape of the rows in the Hugging Face tensor."""
        if self.form == "matrix":
            return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])
        if self.form == "vector":
            return (math.prod(self.shape),)
        if self.form == "inputs_last":
            return (*self.shape[1:], self.shape[0])
        if self.form == "interleaved":
            return (math.prod(self.shape[-2:]), *self.shape[:-2])
        if self.form == "stacked":
            return self.shape[0], math.prod(self.shape[1:])
        return (self.shape[1], 1, self.shape[0]) if self.form == "conv" else self.shape

    def ours(self, rows: np.ndarray) -> np.ndarray:
        """`leaf[index]` from the rows."""
        if self.form == "conv":
            return rows[:, 0].T
        if self.form == "inputs_last":
            return np.moveaxis(rows, -1, 0)
        if self.form == "interleaved":
            return rows.reshape(self.shape[::-1]).T
        return (rows.T if self.form == "matrix" else rows).reshape(self.shape)

    def theirs(self, leaf: np.ndarray) -> np.ndarray:
        """The rows from `leaf[index]`."""
        if self.form == "conv":
            return leaf.T[:, None]
        if self.form == "inputs_last":
            return np.moveaxis(leaf, 0, -1)
        if self.form == "interleaved":
            return leaf.T.reshape(self.their_shape)
        if self.form == "matrix":
            rows, columns = self.their_shape
            return leaf.reshape(columns, rows).T
        return leaf.reshape(self.their_shape)


@dataclasses.dataclass(frozen=True)
class _Place:
    """One of their layers, or what is outside of all.

    Attributes:
      fields: of keys, {"layer", "source", "site"}.
      roots: what {mamba} and so on stand for in paths.
      index: of the repeat, (i,) or ().
      copies: other layers that hold the same set of weights.
    """

    fields: Mapping[str, int] = dataclasses.field(default_factory=dict)
    roots: Mapping[str, str] = dataclasses.field(default_factory=dict)
    index: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()


def _places(config: LanguageModelConfig, per_layer: int) -> list[_Place]:
    """Their layers in order; a layer ends with its `per_layer`th sublayer that does not stand aside."""
    layers: list[list[tuple[str, tuple[int, ...], Sublayer]]] = [[]]
    for entry in config.in_order():
        if sum(not sub.aside for _, _, sub in layers[-1]) == per_layer:
            layers.append([])
        layers[-1].append(entry)
    shares = [next((sub.share for _, _, sub in layer if sub.share is not None), None) for layer in layers]
    places = []
    for layer, (entries, share) in enumerate(zip(layers, shares, strict=True)):
        fields, roots, beside = {"layer": layer}, {}, ""
        for path, _, sub in entries:
            roots[beside + path.partition("/")[2].partition("_")[2]] = path
            beside = "site_" if sub.aside else ""
        group = [other for other, name in enumerate(shares) if name == share]
        if share is not None:
            fields |= {"source": group[0], "site": sum(name is not None for name in shares[:layer])}
            roots["shared"] = f"shared/{share}"
        places.append(_Place(fields, roots, entries[0][1], tuple(group[1:])))
    return places


def _pieces(
    family: HFFamily, config: LanguageModelConfig, specs: Mapping[str, Spec]
) -> tuple[dict[str, tuple[Piece, ...]], dict[str, str]]:
    """{Hugging Face name: its pieces} for all leaves of a model, in the order of the rules, and {copy: name} of the
    names under which shared weights may be stored once more."""
    layers = _places(config, family.per_layer)
    outside = [_Place(roots=layers[0].roots)]  # a leaf of all layers stands with the first one's
    table: dict[str, tuple[Piece, ...]] = {}
    copies: dict[str, str] = {}
    for rule in family.rules:
        for place in layers if "{layer}" in rule.key or "{source}" in rule.key else outside:
            roots = collections.defaultdict(str, place.roots)
            paths = [path.format_map(roots) for path in rule.paths]
            if not all(path in specs for path in paths):
                continue
            table |= _expand(rule, place, [(path, specs[path]) for path in paths])
            if "{source}" in rule.key:
                name = rule.key.format(**place.fields)
                copies |= {rule.key.format(**{**place.fields, "source": other}): name for other in place.copies}
    covered = {piece.path for pieces in table.values() for piece in pieces}
    if covered != set(specs):
        raise ValueError(f"model_type {family.model_type} has no tensors for {sorted(set(specs) - covered)}")
    return table, copies


def _expand(rule: Rule, place: _Place, leaves: list[tuple[str, Spec]]) -> dict[str, tuple[Piece, ...]]:
    """The tensors of one rule in one layer; one per head where the rule says so."""
    index = () if leaves[0][0].startswith("shared/") else place.index
    if "{head}" in rule.key:
        ((path, spec),) = leaves
        return {
            rule.key.format(**place.fields, head=head): (Piece(path, (*index, head), spec.shape[2:], 0, rule.form),)
            for head in range(spec.shape[1])
        }
    pieces = tuple(Piece(path, index, spec.shape[len(index) :], spec.inputs, rule.form) for path, spec in leaves)
    return {rule.key.format(**place.fields): pieces}


def _their_shape(pieces: tuple[Piece, ...]) -> tuple[int, ...]:
    shapes = [piece.their_shape for piece in pieces]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _check_tensors(files: TensorFolder, table: Mapping[str, tuple[Piece, ...]], names: Mapping[str, str]) -> None:
    """Raises ValueError that lists tensors that are missing, unexpected or of the wrong shape."""
    problems = [f"missing {name} {_their_shape(table[name])}" for name in table if name not in names]
    problems += [f"unexpected {stored} {files.shapes[stored]}" for name, stored in names.items() if name not in table]
    problems += [
        f"{stored} has shape {files.shapes[stored]}, the config says {_their_shape(table[name])}"
        for name, stored in names.items()
        if name in table and files.shapes[stored] != _their_shape(table[name])
    ]
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise ValueError(f"{files.folder}: tensors do not fit the config: {'; '.join(problems[:LISTED])}{more}")


def _check_tied_head(files: TensorFolder, names: Mapping[str, str], table: Mapping[str, tuple[Piece, ...]]) -> None:
    """A stored head of a tied model must be the embedding."""
    embedding = next(name for name, pieces in table.items() if pieces[0].path == EMBEDDING)
    if embedding not in names:
        return  # named as missing by the caller
    head, table_of_tokens = files.read(names[HEAD]), files.read(names[embedding])
    if head.shape != table_of_tokens.shape or not np.array_equal(head, table_of_tokens, equal_nan=True):
        raise ValueError(
            f"{files.folder}: tie_word_embeddings is true, but {HEAD} differs from {names[embedding]}; "
            "give tied=False to load the head that is stored"
        )


def _check_copy(files: TensorFolder, stored: str, name: str) -> None:
    """A weight that is shared and stored twice must be the same."""
    if not np.array_equal(files.read(stored), files.read(name), equal_nan=True):
        raise ValueError(f"{files.folder}: {stored} differs from {name}, but the layers share it")


def _load(files: TensorFolder, model: Model, family: HFFamily) -> Tree:
    specs = model.param_specs()
    flat = flatten(specs)
    table, copies = _pieces(family, model.config, flat)
    names: dict[str, str] = {}
    for stored in files.shapes:
        name = ALIASES.get(stored, stored)
        if copies.get(name) in files.shapes:
            _check_copy(files, stored, copies[name])
            continue
        name = copies.get(name, name)
        if name in names:
            raise ValueError(f"{files.folder} holds both {names[name]} and {stored}, two names of one tensor")
        if not stored.endswith(BUFFERS):
            names[name] = stored
    if model.config.tied and HEAD in names:
        _check_tied_head(files, names, table)
        del names[HEAD]
    _check_tensors(files, table, names)
    buffers: dict[str, np.ndarray] = {path: np.empty(spec.shape, spec.dtype) for path, spec in flat.items()}
    for name, pieces in table.items():
        tensor, row = files.read(names[name]), 0
        for piece in pieces:
            rows = piece.their_shape[0]
            buffers[piece.path][piece.index] = piece.ours(tensor[row : row + rows])
            row += rows
    # In the order of the flat tree, so that each host array can be freed once it is on the device.
    leaves = [jnp.asarray(buffers.pop(path)) for path in flat]
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_spec), leaves)


def _storage_dtype(files: TensorFolder) -> str:
    """The narrowest dtype that holds every tensor exactly."""
    dtypes = set(files.dtypes.values())
    wide = jnp.result_type(*dtypes) if len(dtypes) > 1 else dtypes.pop()
    return str(jnp.dtype(wide).name)


def from_hf(folder: str | Path, **overrides: Any) -> tuple[Model, Tree]:
    """Reads a Hugging Face model from a local folder with config.json and safetensors.

    The model types are those of `zoo.interop.families.HF_FAMILIES`. Every config field is used, or known to leave the
    function unchanged (dropout rates, token ids, initialisation, caching), or an error; every tensor is used, or a
    duplicate of a tied embedding, or a rotary buffer, or an error.

    Args:
      folder: a local folder. Nothing is downloaded.
      **overrides: options of the zoo family, e.g. dtype="bfloat16". `param_dtype` is by default the dtype of the
        files; the compute `dtype` is float32. `max_length` also chooses between LongRoPE's two tables: transformers
        takes the short one while a sequence is shorter than the pretraining context and changes over in its midst, a
        zoo model is one or the other.

    Returns:
      The model, named by its model_type, and its parameters.

    Raises:
      FileNotFoundError: no folder, config.json or weights.
      ValueError: a model_type, field, value or tensor that is not supported, or a damaged file; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; from_hf reads local folders and downloads nothing")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}")
    config = read_json(folder / CONFIG)
    check_choice("model_type", config.get("model_type"), HF_FAMILIES)
    family = HF_FAMILIES[config["model_type"]]
    options = read_options(family, config, overrides.get("max_length"))
    if options.get("residual_dtype", "float32") is None:
        options["residual_dtype"] = overrides.get("dtype", "float32")
    files = TensorFolder(folder)
    options["param_dtype"] = _storage_dtype(files)
    model = create(family.family, **{**options, **overrides})
    if model.config.param_dtype == "float64" and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise ValueError(f"{folder} is stored as float64; enable jax_enable_x64 or give param_dtype='float32'")
    model = dataclasses.replace(model, name=family.model_type)
    return model, _load(files, model, family)


def to_hf(
    model: Model,
    params: Tree,
    folder: str | Path,
    *,
    model_type: str | None = None,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a model as a Hugging Face folder: config.json and safetensors.

    The folder appears when it is complete. Parameters keep their dtypes. Options of how a model is run (dtype, remat)
    and, for Mamba and xLSTM, `max_length` have no place in the config.

    Args:
      model: from `zoo.create` or `zoo.from_hf`.
      params: its parameters; weights with adapters are written merged.
      folder: target; must be absent or empty unless `overwrite`.
      model_type: None = that of the folder that the model came from, or else the first that expresses its options.
      config: further fields that do not change the function, e.g. {"eos_token_id": 2}.
      max_shard_bytes: bytes of tensors per file; more files get an index.
      overwrite: replace the model of a folder that is not empty; its other files are kept.

    Raises:
      FileExistsError: the folder is not empty.
      ValueError: no model_type expresses the options (the message names them), or the parameters do not fit.
    """
    family, options = hf_config.choose(model, model_type)
    extra = dict(config or {})
    check_keys("to_hf: config", extra, sorted(IGNORED - {"model_type", "architectures", "dtype", "torch_dtype"}))
    params = jax.tree.map(materialise, params, is_leaf=is_weight)
    specs = model.param_specs()
    check_tree(params, specs)
    flat = flatten(params)
    table, _ = _pieces(family, model.config, flatten(specs))
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in flat.items()}
    for name, pieces in table.items():
        found = {dtypes[piece.path].name for piece in pieces}
        if len(found) > 1:
            raise ValueError(f"{name} joins leaves of different dtypes {sorted(found)}; cast the parameters to one")
    written = {**hf_config.write(family, options, str(jnp.result_type(*set(dtypes.values())).name)), **extra}

    def make(name: str) -> np.ndarray:
        parts = [piece.theirs(np.asarray(flat[piece.path])[piece.index]) for piece in table[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    shapes = {name: (_their_shape(pieces), dtypes[pieces[0].path]) for name, pieces in table.items()}
    write_folder(Path(folder), written, shapes, make, max_shard_bytes=max_shard_bytes, overwrite=overwrite)

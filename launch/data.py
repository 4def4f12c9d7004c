"""The data of a run: prepared text, a generated task, or responses; batches for training, batches for evaluation."""

import pathlib
from typing import Any

import grain
import jax

import pipelines
from launch import losses, unlearning
from launch.config import options, to_dict
from zoo.core.registry import nearest

Data = pipelines.TextDataset | pipelines.TaskDataset | pipelines.ResponseDataset
ROW = ("tokens", "targets", "segment_ids", "positions")  # of every batch, int32, beside loss_mask
NO_TOKENIZER = "none"  # the name of data.tokenizer where the source is a task


def prepare(config: Any, workdir: pathlib.Path) -> Data:
    """Reads and tokenises a source of text once, into `data.directory` or the workdir; a task needs no files.

    Raises:
      KeyError, ValueError: an unknown name or option, a tokenizer for a task, or a length that the task cannot make.
    """
    data = to_dict(config["data"])
    name, given = options(data["source"])
    tokenizer, tokenizer_options = options(data["tokenizer"])
    if name in pipelines.TASKS.names():
        if tokenizer != NO_TOKENIZER:
            raise ValueError(
                f"source {name!r} makes ids, not text: tokenizer.name={tokenizer!r} must be {NO_TOKENIZER!r}"
            )
        return pipelines.TaskDataset(pipelines.make_task({"name": name, **given}), config["sequence_length"])
    described = {"name": tokenizer, **tokenizer_options}
    if of_responses(config):
        return pipelines.prepare_responses({"name": name, **given}, described, config["sequence_length"])
    if name not in pipelines.SOURCES.names():
        names = [*pipelines.SOURCES.names(), *pipelines.TASKS.names(), *pipelines.RESPONSE_SOURCES.names()]
        raise KeyError(f"unknown source {name!r}; {nearest(name, names)}")
    return pipelines.prepare({"name": name, **given}, described, data["directory"] or workdir)


def prepare_forget(config: Any, data: Data, workdir: pathlib.Path) -> Data | None:
    """What config.data.forget names, tokenised as the data, or None.

    Raises:
      KeyError, ValueError: an unknown name or option; neither text nor demonstrations; or, of text, a tokenizer that is
        trained on it, which would be another one for each source.
    """
    plain = to_dict(config["data"])
    name, given = options(plain["forget"])
    if name == unlearning.NONE:
        return None
    if name in pipelines.RESPONSE_SOURCES.names() and data.tokenizer is not None:
        made = pipelines.make_response_source({"name": name, **given})
        if made.batches != "sft":
            raise ValueError(
                f"forget.name={name!r} gives batches of {made.batches}; responses to forget are of kind 'sft'"
            )
        return pipelines.ResponseDataset(made, data.tokenizer, config["sequence_length"])
    tokenizer = options(plain["tokenizer"])[0]
    if tokenizer in (NO_TOKENIZER, "bpe"):
        raise ValueError(
            f"tokenizer.name={tokenizer!r}: text to forget needs a tokenizer that is not trained, as 'bytes'"
        )
    if name not in pipelines.SOURCES.names():
        names = [*pipelines.SOURCES.names(), *pipelines.RESPONSE_SOURCES.names()]
        raise KeyError(f"unknown source {name!r}; {nearest(name, names)}")
    return pipelines.prepare({"name": name, **given}, plain["tokenizer"], plain["directory"] or workdir)


def of_responses(config: Any) -> bool:
    """Whether config.data is of prompts and responses."""
    return config["data"]["source"]["name"] in pipelines.RESPONSE_SOURCES.names()


def metrics(config: Any) -> tuple[str, ...]:
    """What runs of a resolved config report; the first one chooses the best checkpoint."""
    if not losses.codes_text(config):
        return ("loss", "accuracy")
    if config["rollout"]["name"] == "policy":
        return ("reward",)
    if of_responses(config):
        source = pipelines.make_response_source(to_dict(config["data"]["source"]))
        return source.metrics
    task = config["data"]["source"]["name"] in pipelines.TASKS.names()
    return (pipelines.TaskDataset if task else pipelines.TextDataset).metrics


def train_batches(data: Data, config: Any, forget: Data | None = None) -> grain.DatasetIterator:
    """This process's rows of every training batch; with those of `forget`, which never end, behind `forget_`."""
    if forget is not None:
        endless = {**config, "data": {**config["data"], "epochs": None}}
        return _Beside(train_batches(data, config), train_batches(forget, endless))
    common = {
        "batch_size": config["batch_size"],
        "seed": config["seed"],
        "epochs": config["data"]["epochs"],
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if not isinstance(data, pipelines.TextDataset):
        return data.train_iterator(**common)
    return pipelines.train_iterator(
        data.train, length=config["sequence_length"], shuffle_rows=config["data"]["shuffle_rows"], **common
    )


class _Beside(grain.DatasetIterator):
    """Two iterators as one."""

    def __init__(self, retained: grain.DatasetIterator, forgotten: grain.DatasetIterator):
        super().__init__()
        self._both = {"retained": retained, "forgotten": forgotten}

    def __next__(self) -> dict[str, Any]:
        retained, forgotten = (next(each) for each in self._both.values())
        return {**retained, **{unlearning.PREFIX + key: value for key, value in forgotten.items()}}

    def get_state(self) -> dict[str, Any]:
        return {name: each.get_state() for name, each in self._both.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        for name, each in self._both.items():
            each.set_state(state[name])


def evaluation_batches(data: Data, config: Any) -> grain.DatasetIterator:
    """This process's rows of one pass over the held-out documents or examples; those of text count target bytes."""
    common = {
        "batch_size": config["batch_size"] // config["accumulation"],
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if not isinstance(data, pipelines.TextDataset):
        return data.evaluation_iterator(**common)
    return pipelines.evaluation_iterator(
        data.validation, length=config["sequence_length"], byte_lengths=data.tokenizer.byte_lengths, **common
    )


def batch_shapes(config: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of the arrays of a training batch as the step takes it, of a resolved config, without the data.

    Raises:
      ValueError: lists of responses, whose number the data tell.
    """
    shapes = _source_shapes(config, to_dict(config["data"]["source"]))
    forget = to_dict(config["data"].get("forget", {"name": unlearning.NONE}))
    if forget["name"] != unlearning.NONE:
        of_forget = _source_shapes(config, forget)
        shapes |= {unlearning.PREFIX + key: value for key, value in of_forget.items()}
    return shapes


def _source_shapes(config: Any, named: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    batch, length = config["batch_size"], config["sequence_length"]
    if named["name"] not in pipelines.RESPONSE_SOURCES.names():
        return {**dict.fromkeys(ROW, ((batch, length), "int32")), "loss_mask": ((batch, length), "float32")}
    source, rollout = pipelines.make_response_source(named), config["rollout"]
    if source.batches == "ranked":
        raise ValueError("source: how many responses a list has is known from the data alone; unpack them into pairs")
    responses = {"sft": 1, "pairs": 2, "unpaired": 1 + source.mismatched}[source.batches]
    responses = {"policy": rollout["samples"], "teacher": 2}.get(rollout["name"], responses)
    rows = (batch, length) if source.pack else (batch, responses, length)
    shapes = {**dict.fromkeys(ROW, (rows, "int32")), "loss_mask": (rows, "float32")}
    if rollout["name"] == "policy":
        return (
            shapes | dict.fromkeys(("rewards", "advantages"), (rows[:2], "float32")) | {"old_logps": (rows, "float32")}
        )
    of_one, of_each = ((batch,), "float32"), (rows, "float32")
    further = {
        "prompt_mask": (source.loss == "all", of_each),
        "quality": (source.quality, (rows, "float32") if source.pack else of_one),
        "index": (not source.pack, ((batch,), "int32")),
        "label": (source.batches == "unpaired", of_one),
        "scores": (source.kind == "ranked", ((batch, responses), "float32")),
        "tie": (source.ties, of_one),
        "ref_logps": (config["teacher"].get("precompute", False) and losses.reads_teacher(config), of_each),
    }
    return shapes | {name: value for name, (there, value) in further.items() if there}


def ordered_batches(data: Data, config: Any, split: str) -> grain.DatasetIterator:
    """One pass over the responses of a split, in order."""
    assert isinstance(data, pipelines.ResponseDataset)
    return data.evaluation_iterator(batch_size=config["batch_size"] // config["accumulation"], split=split)


def prompt_ids(data: Data, text: str) -> list[int]:
    """Ids of a text that is to be continued, as the first turn where the data are conversations."""
    if isinstance(data, pipelines.ResponseDataset):
        return data.template.prompt(text, data.tokenizer).tolist()
    tokenizer: Any = data.tokenizer
    return [tokenizer.bos_id, *map(int, tokenizer.encode(text))]


def end_id(data: Data) -> int:
    """The token that ends what a model writes.

    Raises:
      ValueError: a template whose turns end in several tokens.
    """
    assert data.tokenizer is not None
    if not isinstance(data, pipelines.ResponseDataset):
        return data.tokenizer.eos_id
    ids = data.template.end_of_response(data.tokenizer)
    if len(ids) != 1:
        raise ValueError(
            f"template {data.template.name!r} ends a turn with {len(ids)} tokens of this tokenizer, and one is "
            "needed to draw responses; use 'plain', or a tokenizer that has its marks (bpe)"
        )
    return int(ids[0])


def baselines(data: Data, config: Any) -> dict[str, float]:
    """The data's first metric, of what needs no training of ours: coders of the held-out text, or a guess."""
    if isinstance(data, pipelines.TaskDataset):
        return {"uniform guess": data.uniform_loss}
    if isinstance(data, pipelines.ResponseDataset):
        return {}
    if not losses.codes_text(config):
        return {}
    return {
        "unigram": pipelines.unigram_bits_per_byte(data.texts("train"), data.texts("validation")),
        "gzip": pipelines.gzip_bits_per_byte(data.texts("validation")),
    }

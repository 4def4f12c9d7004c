"""The data of a run: prepared text or a generated task, batches for training, batches for evaluation."""

import pathlib
from typing import Any

import grain
import jax

import pipelines
from launch.config import options, to_dict
from zoo.core.registry import nearest

Data = pipelines.TextDataset | pipelines.TaskDataset
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
    if name not in pipelines.SOURCES.names():
        names = [*pipelines.SOURCES.names(), *pipelines.TASKS.names()]
        raise KeyError(f"unknown source {name!r}; {nearest(name, names)}")
    described = {"name": tokenizer, **tokenizer_options}
    return pipelines.prepare({"name": name, **given}, described, data["directory"] or workdir)


def metrics(config: Any) -> tuple[str, ...]:
    """What runs on config.data report; the first one chooses the best checkpoint."""
    task = config["data"]["source"]["name"] in pipelines.TASKS.names()
    return (pipelines.TaskDataset if task else pipelines.TextDataset).metrics


def train_batches(data: Data, config: Any) -> grain.DatasetIterator:
    """This process's rows of every training batch."""
    common = {
        "batch_size": config["batch_size"],
        "seed": config["seed"],
        "epochs": config["data"]["epochs"],
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if isinstance(data, pipelines.TaskDataset):
        return data.train_iterator(**common)
    return pipelines.train_iterator(
        data.train, length=config["sequence_length"], shuffle_rows=config["data"]["shuffle_rows"], **common
    )


def evaluation_batches(data: Data, config: Any) -> grain.DatasetIterator:
    """This process's rows of one pass over the held-out documents or examples; those of text count target bytes."""
    common = {
        "batch_size": config["batch_size"] // config["accumulation"],
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if isinstance(data, pipelines.TaskDataset):
        return data.evaluation_iterator(**common)
    return pipelines.evaluation_iterator(
        data.validation, length=config["sequence_length"], byte_lengths=data.tokenizer.byte_lengths, **common
    )


def baselines(data: Data) -> dict[str, float]:
    """The data's first metric, of what needs no training of ours: coders of the held-out text, or a guess."""
    if isinstance(data, pipelines.TaskDataset):
        return {"uniform guess": data.uniform_loss}
    return {
        "unigram": pipelines.unigram_bits_per_byte(data.texts("train"), data.texts("validation")),
        "gzip": pipelines.gzip_bits_per_byte(data.texts("validation")),
    }

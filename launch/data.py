"""The data of a run: prepared text, batches for training, batches for evaluation."""

import pathlib
from typing import Any

import grain
import jax

import pipelines
from launch.config import to_dict


def prepare(config: Any, workdir: pathlib.Path) -> pipelines.TextDataset:
    """Reads and tokenises the source once, into `data.directory` or the workdir."""
    data = to_dict(config["data"])
    source = {key: value for key, value in data["source"].items() if value is not None}
    tokenizer = {key: value for key, value in data["tokenizer"].items() if value is not None}
    return pipelines.prepare(source, tokenizer, data["directory"] or workdir)


def fingerprint(data: pipelines.TextDataset) -> str:
    """Hash of the documents and the tokenizer."""
    return data.directory.name


def train_batches(data: pipelines.TextDataset, config: Any) -> grain.DatasetIterator:
    """This process's rows of every training batch."""
    return pipelines.train_iterator(
        data.train,
        length=config["sequence_length"],
        batch_size=config["batch_size"],
        seed=config["seed"],
        epochs=config["data"]["epochs"],
        shuffle_rows=config["data"]["shuffle_rows"],
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def evaluation_batches(data: pipelines.TextDataset, config: Any) -> grain.DatasetIterator:
    """This process's rows of one pass over the held-out documents, with the bytes of each target."""
    return pipelines.evaluation_iterator(
        data.validation,
        length=config["sequence_length"],
        batch_size=config["batch_size"] // config["accumulation"],
        byte_lengths=data.tokenizer.byte_lengths,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def baselines(data: pipelines.TextDataset) -> dict[str, float]:
    """Bits per byte on the held-out documents of coders that need no training of ours."""
    return {
        "unigram": pipelines.unigram_bits_per_byte(data.texts("train"), data.texts("validation")),
        "gzip": pipelines.gzip_bits_per_byte(data.texts("validation")),
    }

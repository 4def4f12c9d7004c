"""A run of seconds, for the tests: `--config=tests/launch/tiny.py:FOLDER` with a folder of text files."""

import pathlib

import numpy as np

from launch.configs import base


def get_config(folder: str):
    config = base.get_config()
    config.steps = 60
    config.batch_size = 4
    config.sequence_length = 32
    config.ema_decay = 0.9
    config.model = {
        "name": "samba-tiny",
        "vocab_size": None,
        "dtype": "float32",
        "width": 32,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "hidden": 64,
        "window": 8,
        "state": 4,
    }
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule.warmup_steps = 5
    config.data.source = {"name": "text_folder", "path": folder, "heldout_fraction": 0.2}
    config.data.shuffle_rows = 16
    config.evaluate.every = 20
    config.evaluate.batches = 2
    config.checkpoint.every = 5
    config.generate.update(prompts=("the ", "`a"), max_tokens=8, temperature=1.0, top_k=8)
    return config


def write_texts(folder: pathlib.Path) -> None:
    """Sixty files of sentences over a few words: easy to learn, not to memorise."""
    rng = np.random.default_rng(0)
    words = ["the", "a", "cat", "dog", "tree", "sees", "likes", "eats", "red", "green", "small"]
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(60):
        sentences = [" ".join(rng.choice(words, size=rng.integers(3, 9))) + ".\n" for _ in range(rng.integers(1, 12))]
        (folder / f"{index:02}.txt").write_text("".join(sentences))

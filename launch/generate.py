"""Continuations of prompts by a trained model."""

import math
import pathlib
import re
from typing import Any

import jax

from launch import run as run_lib
from launch.config import ConfigError
from launch.run import Run
from zoo.decoding import Generation, Sampling, generate


def sample(run: Run, params: Any) -> list[Generation]:
    """Continues the prompts of config.generate; each starts a document.

    Args:
      run: the run.
      params: parameters on the run's mesh.
    """
    options = run.config["generate"]
    prompts = options["prompts"]
    tokenizer: Any = run.data.tokenizer  # its ids are arrays where decoding's protocol says lists
    ids = [[tokenizer.bos_id, *map(int, tokenizer.encode(text))] for text in prompts]
    if jax.process_count() > 1:
        raise ConfigError("mode=generate runs in one process; restore the checkpoint there")
    # Rows do not influence each other: some are repeated so that they split evenly over the devices.
    ways = math.prod(run.mesh.shape[axis] for axis in _axes(run.rules.get("batch")))
    rows = ids + [ids[0]] * (-len(ids) % ways)
    with run.active():
        generations = generate(
            run.model,
            params,
            rows,
            max_new_tokens=options["max_tokens"],
            sampling=Sampling(temperature=options["temperature"], top_k=options["top_k"], top_p=options["top_p"]),
            key=jax.random.key(run.config["seed"]),
            tokenizer=tokenizer,
            implementation=run.config["implementation"],
        )
    return generations[: len(ids)]


def _axes(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else target or ()


def check(config: dict[str, Any]) -> None:
    """Raises ConfigError when config.generate holds no prompts."""
    prompts = config["generate"]["prompts"]
    if isinstance(prompts, str) or not prompts or not all(isinstance(text, str) and text for text in prompts):
        raise ConfigError(f"config.generate.prompts={prompts!r} must be a list of texts")


def write_samples(run: Run, params: Any, step: int) -> str:
    """Writes samples.md, one section per prompt, and returns it."""
    generations = sample(run, params)
    parts = [f"# Samples of {run.config['model']['name']} at step {step}\n"]
    for prompt, generation in zip(run.config["generate"]["prompts"], generations, strict=True):
        text = prompt + (generation.text or "")
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # longer than any inside
        parts.append(f"## {prompt!r}, ended by {generation.finish_reason}\n\n{fence}text\n{text}\n{fence}\n")
    samples = "\n".join(parts)
    if jax.process_index() == 0:
        (run.workdir / "samples.md").write_text(samples)
    return samples


def run(config: Any, workdir: pathlib.Path) -> None:
    """mode=generate: continues the prompts with a checkpoint of the workdir."""
    check(config)
    this = run_lib.build(config, workdir)
    step, params = this.restore_params()
    samples = write_samples(this, params, step)
    if jax.process_index() == 0:
        print(samples)

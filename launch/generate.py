"""Continuations of prompts by a trained model."""

import pathlib
import re
from typing import Any

import jax

from launch import data as data_lib
from launch import run as run_lib
from launch.config import ConfigError, at
from launch.run import Run
from zoo.core import sharding
from zoo.decoding import Callback, Generation, Sampling, generate, state_length, terminal


def sample(run: Run, params: Any, on_tokens: Callback | None = None) -> list[Generation]:
    """Continues the prompts of config.generate; each starts a document.

    Args:
      run: the run.
      params: parameters on the run's mesh.
      on_tokens: called with (row, new tokens, new text) as they come.
    """
    options = run.config["generate"]
    tokenizer: Any = run.data.tokenizer  # its ids are arrays where decoding's protocol says lists
    # There are a few prompts, and any number of devices: their rows are not split.
    with sharding.use(run.mesh, {**run.rules, "batch": None}):
        return generate(
            run.model,
            params,
            _prompts(run),
            max_new_tokens=options["max_tokens"],
            sampling=Sampling(**{name: options[name] for name in ("temperature", "top_k", "top_p", "min_p")}),
            stop=tuple(options["stop"]),
            on_tokens=on_tokens,
            key=jax.random.key(run.config["seed"]),
            tokenizer=tokenizer,
            eos_id=data_lib.end_id(run.data),
            implementation=run.config["implementation"],
        )


def _prompts(run: Run) -> list[list[int]]:
    return [data_lib.prompt_ids(run.data, text) for text in run.config["generate"]["prompts"]]


def check(config: dict[str, Any], *, needed: bool = True) -> None:
    """Raises ConfigError when config.generate.prompts are no texts, or are `needed` and not there."""
    prompts = config["generate"]["prompts"]
    texts = not isinstance(prompts, str) and all(isinstance(text, str) and text for text in prompts)
    if not texts or (needed and not prompts):
        raise ConfigError(f"config.generate.prompts={prompts!r} must be a list of texts")


def check_prompts(run: Run) -> None:
    """Raises ConfigError for what samples would fail at: they come at the end of a run, and this before it.

    The tokenizer refuses a prompt, or a prompt and its continuation are longer than the model's context.
    """
    if run.data.tokenizer is None or not run.config["generate"]["prompts"]:
        return
    with at("generate.prompts"):
        ids = _prompts(run)
    with at("generate.max_tokens"):
        state_length(run.model, ids, run.config["generate"]["max_tokens"])


def write_samples(run: Run, params: Any, step: int, on_tokens: Callback | None = None) -> str:
    """Writes samples.md, one section per prompt, and returns it."""
    generations = sample(run, params, on_tokens)
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
    """mode=generate: continues the prompts with a checkpoint of the workdir; a single prompt's text streams."""
    check(config)
    if jax.process_count() > 1:
        raise ConfigError("mode=generate runs in one process; restore the checkpoint there")
    this = run_lib.build(config, workdir)
    if this.data.tokenizer is None:
        raise ConfigError(
            f"mode=generate needs text: config.data.source {this.config['data']['source']['name']!r} has none"
        )
    check_prompts(this)
    step, params = this.restore_params()
    stream = len(this.config["generate"]["prompts"]) == 1 and jax.process_index() == 0
    if stream:
        print(this.config["generate"]["prompts"][0], end="", flush=True)
    samples = write_samples(this, params, step, terminal() if stream else None)
    if jax.process_index() == 0:
        print() if stream else print(samples)

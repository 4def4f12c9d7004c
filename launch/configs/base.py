"""Defaults of every key that all runs share. Other configs start from here.

`model`, `initial`, `teacher`, `adapter`, `objective`, `optimizer`, `optimizer.schedule`, `data.source`, `data.forget`,
`data.tokenizer` and `rules.overrides` take the options of whatever their `name` names; every other key must be one of
these.
"""

from typing import Any

import ml_collections
from ml_collections import config_dict


def get_config() -> Any:
    """A tiny Samba on bytes of the standard library, an ml_collections.ConfigDict: data only, all of it overridable."""
    config = ml_collections.ConfigDict()
    config.mode = "train"  # train, evaluate, generate, compile, benchmark
    config.seed = 0
    config.steps = 1000  # optimiser steps
    config.batch_size = 8  # rows of one optimiser step, over all devices
    config.sequence_length = 256
    config.accumulation = 1  # microbatches that a step is split into
    config.ema_decay = 0.0  # > 0 keeps a moving average of the parameters, used for evaluation and samples
    config.implementation = config_dict.placeholder(str)  # of every op; None = the platform's

    # vocab_size: None = the tokenizer's. dtype is the compute dtype; parameters stay float32.
    config.model = {"name": "samba-tiny", "vocab_size": config_dict.placeholder(int), "dtype": "float32"}
    # Parameters of step 0: "random"; "run", those of another run's `workdir` (and `checkpoint`: best, last or a step);
    # "hf", of a Hugging Face `folder`. Where the model is converted from that one, so are they.
    config.initial = {"name": "random"}
    # Of a distillation, or the frozen reference of an objective: "none"; "initial", the model of config.initial as it
    # is there; "run" or "hf", as above. precompute=True: a reference's log-probabilities are computed once, into the
    # workdir, and its parameters dropped.
    config.teacher = {"name": "none"}
    config.adapter = {"name": "none"}  # or "lora" with pattern (globs over parameter paths), rank, alpha
    # Globs over parameter paths: what matches one of trainable and none of frozen is trained, the rest stays.
    config.trainable = ("*",)
    config.frozen = ()
    config.objective = {"name": "cross_entropy"}
    # Responses that are drawn in training: "none"; "policy", `samples` for each prompt, of the model itself, for
    # objectives of rewards; "teacher", a rejected response to each prompt, of the teacher. reward: a name of
    # pipelines.rewards.REWARDS. advantages: group, group_unscaled or leave_one_out.
    config.rollout = {
        "name": "none",
        "samples": 8,
        "max_tokens": 16,
        "temperature": 1.0,
        "reward": "exact_match",
        "advantages": "group",
    }
    # name: any of `python -m objectives.catalog --category optimizer`, whose options stand beside it. reference_tokens,
    # where it is set: a step with T tokens that count has the learning rate times sqrt(T / reference_tokens).
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 1e-3,
        "clip_norm": 1.0,  # of the global gradient norm; 0 = no clipping
        # steps: horizon of the schedule; None = config.steps
        "schedule": {"name": "cosine", "warmup_steps": 100, "steps": config_dict.placeholder(int)},
    }
    # source: of text; a task of ids ("state_tracking", "mqar"), whose tokenizer has the name "none"; or of responses
    # ("sft", "pairs", "unpaired", "ranked", "arithmetic").
    # shuffle_rows and directory are for text. forget: of unlearning, a source of what is to be forgotten; `source` is
    # then what is to be retained.
    config.data = {
        "source": {"name": "stdlib"},
        "forget": {"name": "none"},
        "tokenizer": {"name": "bytes"},
        "shuffle_rows": 1024,
        "epochs": config_dict.placeholder(int),  # None never ends
        "directory": config_dict.placeholder(str),  # prepared files, shared between runs; None = the workdir
    }
    config.mesh = {"data": -1, "fsdp": 1, "context": 1, "tensor": 1, "expert": 1}  # one -1 takes what is left
    config.rules = {"name": "dp", "overrides": {}}
    config.checkpoint = {"every": 500, "keep_last": 2, "keep_best": 1}  # every: 0 = at evaluations and the end only
    # every: 0 = at the end only. batches: of one evaluation while training (0 = all); the final one takes all.
    # checkpoint: which one mode=evaluate and mode=generate read: best, last or a step.
    config.evaluate = {"every": 500, "batches": 0, "checkpoint": "last"}
    config.log = {"every": 10, "tensorboard": True}  # every: steps between lines where there is no terminal
    config.generate = {
        "prompts": ("def", "import", "class"),
        "max_tokens": 128,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 1.0,
        "min_p": 0.0,
        "stop": (),  # texts that end a sample
    }
    config.topology = config_dict.placeholder(
        str
    )  # of mode=compile: "v5p:8x8x8", "v5e:16x16", ...; None = this machine
    # suites: of launch/benchmark.py. lengths: of the samba suite; op_lengths: of ops, on a CPU.
    # models: tiny presets of training, positions and memory; () = all.
    # record: a Markdown page to append the table to, such as docs/measurements.md; "" = none.
    config.benchmark = {
        "suites": ("mamba-130m", "llama-135m", "samba"),
        "repeats": 3,
        "lengths": (1024, 4096, 16384, 65536),
        "op_lengths": (256, 1024),
        "models": (),
        "record": "",
    }
    return config

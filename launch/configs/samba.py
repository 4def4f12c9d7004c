"""Samba at its published sizes, for TPU pods: samba.py:421m, :1.3b, :1.7b or :3.8b (the default).

Train on a folder of text (bf16 compute, float32 parameters, ZeRO-3 over the pod):

    python launch/main.py --config=launch/configs/samba.py:3.8b --workdir=gs://... \
        --config.data.source.name=text_folder --config.data.source.path=DIR

Compile for a pod that is not there, on any Linux machine (memory per device, collectives; a few minutes):

    python launch/main.py --config=launch/configs/samba.py:3.8b --workdir=runs/pod --config.mode=compile \
        --config.topology=v5p:8x8x8

The optimisation is the paper's (arXiv:2406.07522): AdamW 4e-4 to 4e-5 by a cosine, betas 0.9 and 0.95, weight decay
0.1, clipping at 1, warm-up over 1 % of the tokens, 512 sequences of 4096 tokens. Expected: docs/measurements.md has
the memory per device; the perplexities of the paper have not been reproduced here.
"""

from launch.configs import base

SIZES = ("421m", "1.3b", "1.7b", "3.8b")


def get_config(size: str = "3.8b"):
    """The run of one size."""
    if size not in SIZES:
        raise ValueError(f"samba.py:{size} is unknown; there are {', '.join(SIZES)}")
    config = base.get_config()
    config.model = {"name": f"samba-{size}", "vocab_size": 32064, "dtype": "bfloat16", "remat": "full"}
    config.batch_size, config.sequence_length = 512, 4096
    config.steps = 10_000  # 20B tokens, the paper's budget for 421M
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 4e-4,
        "b2": 0.95,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "schedule": {"name": "cosine", "warmup_steps": 100, "steps": config.steps, "final_fraction": 0.1},
    }
    config.data.tokenizer = {"name": "bpe", "vocab_size": 32000}
    # A row per device; the widths of the 3.8B model are multiples of 256 and not of 512.
    config.mesh = {"data": -1, "fsdp": 256, "context": 1, "tensor": 1, "expert": 1}
    config.rules = {"name": "fsdp", "overrides": {}}
    return config

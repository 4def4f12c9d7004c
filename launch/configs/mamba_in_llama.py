"""A trained transformer as a hybrid of linear recurrences and attention, step by step, in the small (arXiv:2408.15237).

Every variant is a run that starts from an earlier one:

    python launch/main.py --config=launch/configs/mamba_in_llama.py:teacher --workdir=runs/llama/teacher
    python launch/main.py --config=launch/configs/mamba_in_llama.py:half --workdir=runs/llama/half
    python launch/main.py --config=launch/configs/mamba_in_llama.py:quarter --workdir=runs/llama/quarter
    python launch/main.py --config=launch/configs/mamba_in_llama.py:eighth --workdir=runs/llama/eighth
    python launch/main.py --config=launch/configs/mamba_in_llama.py:end_to_end --workdir=runs/llama/end_to_end

half, quarter and eighth (50, 25 and 12.5 % of the attention layers stay) replace the attention that they do not keep
and train the new layers alone, on the teacher's logits; end_to_end goes on with all parameters. As linear attention
with learned feature maps in place of all softmax attention (Hedgehog, arXiv:2402.04347), the maps alone on the
teacher's attention weights, then a low-rank update of q, k, v, o on text:

    python launch/main.py --config=launch/configs/mamba_in_llama.py:hedgehog --workdir=runs/llama/hedgehog
    python launch/main.py --config=launch/configs/mamba_in_llama.py:hedgehog_lora --workdir=runs/llama/hedgehog_lora

A model from Hugging Face takes the teacher's place where a config says
config.initial = config.teacher = {"name": "hf", "folder": FOLDER}.

On 2 busy CPU cores the teacher takes two and a half minutes and every later variant one to two. Bits per byte of
held-out text: teacher 3.314, half 3.459, quarter 3.367, eighth 3.353, end_to_end 3.336; hedgehog, whose maps alone have
learned, 3.756, and hedgehog_lora 3.547.
"""

from typing import Any

from launch.configs import base
from zoo.core.registry import check_choice

RUNS = "runs/llama"
STARTS = {
    "teacher": None,
    "half": "teacher",
    "quarter": "half",
    "eighth": "quarter",
    "end_to_end": "eighth",
    "hedgehog": "teacher",
    "hedgehog_lora": "hedgehog",
}


def get_config(variant: str = "teacher") -> Any:
    """Width 128, eight layers, bytes."""
    check_choice("mamba_in_llama", variant, STARTS)
    config = base.get_config()
    config.steps = 400 if variant == "teacher" else 100
    config.batch_size = 8
    config.sequence_length = 128
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule.warmup_steps = 10
    config.checkpoint.every = 0
    config.evaluate.every = 0
    config.generate.max_tokens = 64
    config.model = {
        "name": "llama-tiny",
        "vocab_size": None,
        "width": 128,
        "layers": 8,
        "heads": 4,
        "kv_heads": 2,
        "hidden": 256,
        "max_length": 128,
    }
    if (start := STARTS[variant]) is None:
        return config
    config.initial = {"name": "run", "workdir": f"{RUNS}/{start}"}
    if variant.startswith("hedgehog"):
        config.model = {"name": "converted", "vocab_size": None, "to": "hedgehog", "keep": 0}
    else:
        keep = {"half": 2, "quarter": 4, "eighth": 8, "end_to_end": 8}[variant]
        config.model = {"name": "converted", "vocab_size": None, "to": "mamba2_attention", "keep": keep}
        config.teacher = {"name": "run", "workdir": f"{RUNS}/teacher"}
        config.objective = {"name": "logit_distillation", "kl_weight": 1.0, "ce_weight": 0.0, "temperature": 1.0}
    if variant in ("half", "quarter", "eighth"):
        config.trainable = ("*_mamba2_attention/mixer/*",)
    if variant == "end_to_end":
        config.optimizer.learning_rate = 1e-3
    if variant == "hedgehog":
        config.teacher = {"name": "initial"}
        config.objective = {"name": "attention_distillation"}
        config.trainable = ("*/[qk]_map/*",)
        config.optimizer.learning_rate = 1e-2
        config.optimizer.weight_decay = 0.0
    if variant == "hedgehog_lora":
        config.adapter = {"name": "lora", "pattern": ("layers/*/mixer/[qkvo]",), "rank": 8, "alpha": 16.0}
        config.trainable = ("*/[ab]",)
        config.optimizer.weight_decay = 0.0
    return config

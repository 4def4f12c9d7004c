"""Writes hf_<model_type>.npz for the model types of flash-linear-attention: config, weights, tokens and its logits.

The library's own classes run on the CPU, with its own slow functions (`naive_*`, `*_ref`) in place of the kernels that
need a GPU. Needs flash-linear-attention, fla-core and triton beside torch and transformers, which the tests do not.
Run from the root of the repository: python -m tests.goldens.make_fla_goldens
"""

import json
from pathlib import Path

import fla.layers.gla
import fla.layers.hgrn
import fla.layers.hgrn2
import fla.layers.multiscale_retention
import fla.modules.mlp
import fla.modules.rotary.ops
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from fla import models
from fla.modules import FusedRMSNormGated, RMSNorm
from fla.modules.rotary.ops import rotary_embedding_ref
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.hgrn.naive import naive_recurrent_hgrn
from fla.ops.retention.naive import naive_retention

VOCABULARY, LENGTH = 31, 13
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "norm_eps": 1e-3,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES = {
    "gla": (models.GLAConfig, models.GLAForCausalLM, {"num_heads": 2, "expand_k": 0.5, "norm_eps": 1e-2}),
    "retnet": (models.RetNetConfig, models.RetNetForCausalLM, {"num_heads": 3, "tie_word_embeddings": True}),
    "hgrn": (models.HGRNConfig, models.HGRNForCausalLM, {}),
    "hgrn2": (models.HGRN2Config, models.HGRN2ForCausalLM, {"expand_ratio": 8}),
}


def _rms(x, weight, eps):
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def _norm(self, x, residual=None, prenorm=False, residual_in_fp32=False):
    del residual_in_fp32
    x = x if residual is None else x + residual
    y = _rms(x, self.weight, self.eps)
    return (y, x) if prenorm else y


def _retention(q, k, v, **_):
    y = naive_retention(*(a.transpose(1, 2) for a in (q, k, v)))
    return y.transpose(1, 2), None


def _slow() -> None:
    """Puts the library's slow functions in place of its kernels."""
    RMSNorm.forward = _norm
    FusedRMSNormGated.forward = lambda self, x, g, **_: _rms(x, self.weight, self.eps) * F.silu(g)
    fla.modules.mlp.swiglu_linear = lambda x, y, weight, bias: F.linear(F.silu(x) * y, weight, bias)
    fla.modules.rotary.ops.rotary_embedding = lambda x, cos, sin, interleaved, **_: rotary_embedding_ref(
        x, cos[: x.shape[1]], sin[: x.shape[1]], interleaved
    )
    for layer in (fla.layers.gla, fla.layers.hgrn2):
        layer.fused_recurrent_gla = lambda q, k, v, gk, **_: naive_recurrent_gla(q, k, v, gk)
    fla.layers.multiscale_retention.fused_recurrent_retention = _retention
    fla.layers.hgrn.fused_recurrent_hgrn = lambda x, g, **_: naive_recurrent_hgrn(x, g)
    fla.layers.hgrn.swiglu = lambda x, y: F.silu(x) * y
    fla.layers.hgrn2.swish = F.silu
    fla.layers.hgrn2.rms_norm_linear = lambda x, weight, _, out, bias, eps=1e-5: F.linear(
        _rms(x, weight, eps), out, bias
    )


def _redraw(model, seed: int) -> None:
    """Every parameter anew, exact in bfloat16: smaller files."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        drawn = 1 + 0.2 * noise if "norm" in name else noise if "lower_bounds" in name else 0.3 * noise
        parameter.copy_(drawn.bfloat16().float())


@torch.no_grad()
def main() -> None:
    """Writes one file per model_type beside this one."""
    torch.set_num_threads(1)
    _slow()
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, LENGTH), dtype=np.int32)
    for model_type, (config_class, model_class, changes) in CASES.items():
        model = model_class(config_class(**{**SIZES, **changes})).eval()
        _redraw(model, seed=1)
        weights = {name: p.detach().bfloat16().view(torch.uint16).numpy() for name, p in model.named_parameters()}
        config = json.loads(model.config.to_json_string(use_diff=False))
        path = Path(__file__).with_name(f"hf_{model_type}.npz")
        np.savez_compressed(
            path,
            **{f"weights/{name}": array for name, array in weights.items()},
            config=json.dumps({**config, "dtype": "bfloat16"}),
            tokens=tokens,
            logits=model(torch.as_tensor(tokens).long(), use_cache=False).logits.numpy(),
            versions=json.dumps({"fla": fla.__version__, "transformers": transformers.__version__}),
        )
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()

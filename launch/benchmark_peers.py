"""What the ops have to beat of JAX's own: cuDNN's and splash attention, and a matrix product of bfloat16 weights.

A peer is a function (entry of an op's shapes, its arguments) -> (function of arrays by name, those arrays); it raises
`UnsupportedError` with the reason where it does not serve the call.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import interpret
from pallas_kernels.dispatch import UnsupportedError

Arguments = dict[str, Any]
Prepared = tuple[Callable[..., Any], Arguments]


def reason(error: Exception) -> str:
    """One line of why a peer did not run."""
    text = (str(error).strip() or repr(error)).splitlines()[0][:200]
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return text if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {text}"


def check_attention(name: str, shape: Any) -> None:
    """Raises UnsupportedError for calls that no peer of attention serves."""
    for what in ("keys", "documents", "soft_cap"):
        if getattr(shape, what):
            raise UnsupportedError(f"{name}: not with {what} here")


def cudnn(shape: Any, arguments: Arguments) -> Prepared:
    """`jax.nn.dot_product_attention` with cuDNN, whose window counts the keys before the query."""
    check_attention("cudnn", shape)
    window = None if shape.window is None else (shape.window - 1, 0)

    def function(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window, implementation="cudnn")

    return function, arguments


def splash(shape: Any, arguments: Arguments) -> Prepared:
    """Splash attention, whose heads come before time and whose scores are not scaled: queries are, beforehand.

    Block sizes are those that its schedules on v5e favour among a few, cut to the length.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    check_attention("splash", shape)
    mask = splash_attention_mask.CausalMask((shape.time, shape.time))
    if shape.window is not None:
        mask = splash_attention_mask.LocalMask((shape.time, shape.time), (shape.window - 1, 0), 0)
    block = min(1024, shape.time)
    compute = min(512, block)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * shape.heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret.parameters() is True,
    )

    def function(q, k, v):
        return jax.vmap(kernel)(q, k, v)

    heads_first = {name: jnp.swapaxes(a, 1, 2) for name, a in arguments.items()}
    scaled = (heads_first["q"].astype(jnp.float32) * shape.key**-0.5).astype(shape.dtype)
    return function, {**heads_first, "q": scaled}


def bfloat16_matmul(shape: Any, arguments: Arguments) -> Prepared:
    """The product with weights that are not ternary: bfloat16, and so eight times as large."""
    del arguments
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (shape.rows, shape.inputs), jnp.bfloat16)
    w = jax.random.normal(keys[1], (shape.inputs, shape.outputs), jnp.bfloat16)
    return (lambda x, w: jnp.dot(x, w)), {"x": x, "w": w}


PEERS: Mapping[str, Mapping[str, Mapping[str, Callable[[Any, Arguments], Prepared]]]] = {
    "gpu": {"attention": {"cudnn": cudnn}, "ternary_matmul": {"bfloat16 matmul": bfloat16_matmul}},
    "tpu": {"attention": {"splash": splash}, "ternary_matmul": {"bfloat16 matmul": bfloat16_matmul}},
}

"""Attention in both directions, against dense float64 loops over documents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.trees import FLOAT32_TOLERANCE, assert_close, redraw, to_float64
from zoo import decoding
from zoo.core.context import SeqContext
from zoo.core.params import initialise
from zoo.mixers import Attention
from zoo.mixers.attention import mix, param_specs, state_specs

CONFIG = Attention(heads=4, kv_heads=2, head_width=8, rotary=None, causal=False)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 3, 3, 3]], np.int32)


def loops(params, x, segments):
    """Every token over all tokens of its document."""
    q, k, v = (np.einsum("td,dhk->thk", x, params[name]) for name in "qkv")
    y = np.zeros((len(x), CONFIG.heads, CONFIG.head_width))
    for i in range(len(x)):
        seen = [j for j in range(len(x)) if segments[j] == segments[i] != 0]
        for head in range(CONFIG.heads if seen else 0):
            s = np.array([q[i, head] @ k[j, head // 2] for j in seen]) / np.sqrt(CONFIG.head_width)
            p = np.exp(s - s.max())
            y[i, head] = sum(w * v[j, head // 2] for w, j in zip(p / p.sum(), seen, strict=True))
    return np.einsum("thv,hvd->td", y, params["o"])


def test_every_token_sees_its_whole_document_and_nothing_of_padding():
    params = redraw(param_specs(CONFIG, 12), 0)
    x = np.random.default_rng(1).standard_normal((2, 9, 12)).astype(np.float32)
    x[0, 7:] = np.nan
    ctx = SeqContext.from_segment_ids(SEGMENTS)
    y, _ = jax.jit(lambda p, x: mix(p, x, ctx, config=CONFIG))(params, x)
    exact = to_float64(params)
    want = np.stack([loops(exact, np.float64(row), s) for row, s in zip(np.nan_to_num(x), SEGMENTS, strict=True)])
    assert_close(y, want, FLOAT32_TOLERANCE)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="window=4 needs causal=True"):
        dataclasses.replace(CONFIG, window=4)
    params = redraw(param_specs(CONFIG, 12), 0)
    state = initialise(state_specs(CONFIG, 1, 8, jnp.float32), jax.random.key(0))
    with pytest.raises(ValueError, match="cannot go on from a state"):
        mix(params, jnp.zeros((1, 2, 12)), SeqContext.contiguous(jnp.zeros(1, jnp.int32), 2), state, config=CONFIG)
    model = zoo.create("llama-tiny", causal=False, vocab_size=32)
    with pytest.raises(ValueError, match="cannot go on from a state"):
        decoding.generate(model, model.init(jax.random.key(0)), [[1, 2]], max_new_tokens=2, key=jax.random.key(1))

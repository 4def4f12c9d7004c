"""float64 oracles of Based and Hedgehog, one token at a time from the equations of arXiv:2402.18668 and 2402.04347."""

import math

import numpy as np

from tests.mixers.numpy_oracles import silu, turn


def _heads(weight, token):
    """[D, H, K] and [D] to [H, K], head by head."""
    return np.stack([token @ weight[:, h] for h in range(weight.shape[1])])


def expand_taylor(a):
    """The paper's 1 + K + K^2 features of one vector, each pair in both orders."""
    root = math.sqrt(len(a))
    return np.concatenate([[1.0], a / math.sqrt(root), np.outer(a, a).ravel() / (math.sqrt(2.0) * root)])


def taylor_attention(config, params, x):
    kv, z = [0.0] * config.heads, [0.0] * config.heads
    out = []
    for token in x:
        q, k, v = (_heads(params[name], token) for name in ("q", "k", "v"))
        y = np.zeros(x.shape[1])
        for h in range(config.heads):
            phi_q, phi_k = expand_taylor(q[h]), expand_taylor(k[h])
            kv[h], z[h] = kv[h] + np.outer(phi_k, v[h]), z[h] + phi_k
            y = y + (phi_q @ kv[h]) / (phi_q @ z[h] + config.eps) @ params["o"][h]
        out.append(y)
    return np.stack(out)


def base_conv(config, params, x):
    taps, bias = config.conv_width, (lambda name, *at: params[name][at] if config.bias else 0.0)
    past = [np.zeros(config.inner) for _ in range(taps - 1)]
    out = []
    for token in x:
        projected = config.form == "projected"
        past.append(token @ params["in_proj"][:, 0] + bias("in_bias", 0) if projected else token)
        u = sum(params["conv"][taps - 1 - lag] * past[-1 - lag] for lag in range(taps))
        u = u + (params["conv_bias"] if config.conv_bias else 0.0)
        if projected:
            gated = silu(u) * (token @ params["in_proj"][:, 1] + bias("in_bias", 1))
            out.append(gated @ params["out_proj"] + bias("out_bias"))
        else:
            out.append(token + u * (token @ params["gate"] + bias("gate_bias")))
    return np.stack(out)


def hedgehog_features(config, params, h, a):
    """phi of one head's query or key, exponentials divided by their sum."""
    u = a @ params["weight"][h] + (params["bias"][h] if config.bias else 0.0)
    parts = [np.concatenate([2.0 * u, -2.0 * u])] if config.form == "joint" else [u, -u]
    parts = [np.exp(part - part.max()) for part in parts]
    return np.maximum(np.concatenate([part / part.sum() for part in parts]), config.floor)


def hedgehog(config, params, x):
    q, k, v = (
        [_heads(params[name], token) + (params[f"{name}_bias"] if config.qkv_bias else 0.0) for token in x]
        for name in ("q", "k", "v")
    )
    if config.rotary is not None:
        q, k = ([[turn(config.rotary, a, i) for a in heads] for i, heads in enumerate(rows)] for rows in (q, k))
    out = []
    for i in range(len(x)):
        y = params["o_bias"] if config.out_bias else np.zeros(x.shape[1])
        for h in range(config.heads):
            g = h // (config.heads // config.kv_heads)
            phi_q = hedgehog_features(config.feature_map, params["q_map"], h, q[i][h])
            weights = np.array(
                [phi_q @ hedgehog_features(config.feature_map, params["k_map"], h, k[j][g]) for j in range(i + 1)]
            )
            mean = sum(weight * v[j][g] for j, weight in enumerate(weights)) / weights.sum()
            y = y + mean @ params["o"][h]
        out.append(y)
    return np.stack(out)

"""Float64 NumPy oracles: one document, one token after the other, written from the papers' equations.

An oracle is `f(config, params, x [T, D]) -> y [T, D]` for a document that starts at position 0. `VISIBLE` says which
earlier tokens a token's output depends on.
"""

import math

import numpy as np


def silu(a):
    return a / (1.0 + np.exp(-a))


def softplus(a):
    return np.logaddexp(0.0, a)


def gelu(a):
    return 0.5 * a * (1.0 + np.vectorize(math.erf)(a / math.sqrt(2.0)))


def gelu_tanh(a):
    return 0.5 * a * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (a + 0.044715 * a**3)))


ACTIVATIONS = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda a: np.maximum(a, 0.0),
    "squared_relu": lambda a: np.maximum(a, 0.0) ** 2,
}


def normalise(config, params, a):
    """A norm over all of `a`."""
    if config.kind == "layer":
        a = a - a.mean()
    a = a / np.sqrt((a * a).mean() + config.eps)
    if config.scale:
        a = a * params["scale"]
    if config.bias:
        a = a + params["bias"]
    return a


def turn(config, head, position):
    """Rotary embedding of one head vector, pair by pair (no context scaling)."""
    rotary_width = int(len(head) * config.fraction)
    out = head.copy()
    for i in range(rotary_width // 2):
        angle = position * config.theta ** (-2.0 * i / rotary_width)
        a, b = (i, i + rotary_width // 2) if config.style == "half" else (2 * i, 2 * i + 1)
        out[a] = head[a] * math.cos(angle) - head[b] * math.sin(angle)
        out[b] = head[b] * math.cos(angle) + head[a] * math.sin(angle)
    return out


def _project(config, params, name, token, position):
    weight = params[name]  # [D, H, K]
    heads = np.stack([token @ weight[:, h] for h in range(weight.shape[1])])
    if config.qkv_bias:
        heads = heads + params[f"{name}_bias"]
    if config.clip_qkv is not None:
        heads = np.minimum(np.maximum(heads, -config.clip_qkv), config.clip_qkv)
    if name == "v":
        return heads
    if config.qk_norm is not None:
        norm_params = params[f"{name}_norm"]
        if config.qk_norm.over == "full":
            heads = normalise(config.qk_norm.norm, norm_params, heads)
        else:
            of_head = {"head": lambda leaf, h: leaf, "per_head": lambda leaf, h: leaf[h]}[config.qk_norm.over]
            heads = np.stack(
                [
                    normalise(config.qk_norm.norm, {n: of_head(leaf, h) for n, leaf in norm_params.items()}, head)
                    for h, head in enumerate(heads)
                ]
            )
    if config.rotary is not None:
        heads = np.stack([turn(config.rotary, head, position) for head in heads])
    return heads


def attention(config, params, x):
    q, k, v = ([_project(config, params, name, token, i) for i, token in enumerate(x)] for name in ("q", "k", "v"))
    scale = config.scale if config.scale is not None else 1.0 / math.sqrt(config.head_width)
    out = []
    for i in range(len(x)):
        first = 0 if config.window is None else max(0, i - config.window + 1)
        y = np.zeros(x.shape[1])
        for h in range(config.heads):
            g = h // (config.heads // config.kv_heads)
            scores = np.array([q[i][h] @ k[j][g] for j in range(first, i + 1)]) * scale
            if config.soft_cap is not None:
                scores = config.soft_cap * np.tanh(scores / config.soft_cap)
            weights = np.exp(scores - scores.max())
            weights = weights / weights.sum()
            value = sum(weight * v[first + n][g] for n, weight in enumerate(weights))
            y = y + value @ params["o"][h]
        if config.out_bias:
            y = y + params["o_bias"]
        out.append(y)
    return np.stack(out)


def mamba(config, params, x):
    rank, states, taps = config.rank(x.shape[1]), config.state, config.conv_width
    a = -np.exp(params["A_log"])
    past = [np.zeros(config.inner) for _ in range(taps - 1)]
    h = np.zeros((config.inner, states))
    out = []
    for token in x:
        u, z = token @ params["in_proj"][:, 0], token @ params["in_proj"][:, 1]
        if config.bias:
            u, z = u + params["in_bias"][0], z + params["in_bias"][1]
        past.append(u)
        u = sum(params["conv"][taps - 1 - lag] * past[-1 - lag] for lag in range(taps))
        if config.conv_bias:
            u = u + params["conv_bias"]
        u = silu(u)
        low_b_c = u @ params["x_proj"]
        low, b, c = low_b_c[:rank], low_b_c[rank : rank + states], low_b_c[rank + states :]
        dt = softplus(low @ params["dt_proj"] + params["dt_bias"])
        for i in range(config.inner):
            h[i] = np.exp(dt[i] * a[i]) * h[i] + dt[i] * u[i] * b
        y = (h @ c + params["D"] * u) * silu(z)
        y = y @ params["out_proj"]
        out.append(y + params["out_bias"] if config.bias else y)
    return np.stack(out)


def mlp(config, params, x):
    act, bias = ACTIVATIONS[config.activation], (lambda name: params[f"{name}_bias"] if config.bias else 0.0)
    out = []
    for token in x:
        h = token @ params["up"] + bias("up")
        h = act(token @ params["gate"] + bias("gate")) * h if config.gated else act(h)
        out.append(h @ params["down"] + bias("down"))
    return np.stack(out)


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


def _everything_before(config, length):
    return np.tril(np.ones((length, length), bool))


def _window(config, length):
    mask = np.zeros((length, length), bool)
    for i in range(length):
        for j in range(i + 1):
            mask[i, j] = config.window is None or j > i - config.window
    return mask


def _taps(config, length):
    lags = np.arange(length)[:, None] - np.arange(length)
    return (lags >= 0) & (lags < config.conv_width)


ORACLES = {
    "attention": attention,
    "base_conv": base_conv,
    "hedgehog": hedgehog,
    "mamba": mamba,
    "mlp": mlp,
    "taylor_attention": taylor_attention,
}
VISIBLE = {
    "attention": _window,
    "base_conv": _taps,
    "hedgehog": _everything_before,
    "mamba": _everything_before,
    "mlp": lambda config, length: np.eye(length, dtype=bool),
    "taylor_attention": _everything_before,
}

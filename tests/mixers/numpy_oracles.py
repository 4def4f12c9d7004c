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


def sigmoid(a):
    return 1.0 / (1.0 + np.exp(-a))


def mlstm_cell(q, k, v, i, f, eps):
    """One head, [T, K], [T, V] and [T] -> [T, V], without stabiliser: exp(i) and sigmoid(f) as they stand in
    equations 19 to 27 of arXiv:2405.04517. The stabiliser m, which starts at 0, is left as the unit of eps."""
    memory, normaliser, m = np.zeros((q.shape[1], v.shape[1])), np.zeros(q.shape[1]), 0.0
    out = []
    for t in range(len(q)):
        forget, write = sigmoid(f[t]), np.exp(i[t])
        memory = forget * memory + write * np.outer(k[t], v[t])
        normaliser = forget * normaliser + write * k[t]
        m = max(np.log(forget) + m, i[t])
        scaled = q[t] / math.sqrt(q.shape[1])
        out.append(scaled @ memory / (max(abs(scaled @ normaliser), 1.0) + eps * np.exp(m)))
    return np.stack(out)


def _norm_of_head(config, params, h, a):
    return normalise(config.norm, {name: leaf[h] for name, leaf in params.get("norm", {}).items()}, a)


def mlstm(config, params, x):
    def project(name, h):
        return x @ params[name][:, h] + (params[f"{name}_bias"][h] if config.bias else 0.0)

    def gate(name, h):
        a = x @ params[name][:, h] + params[f"{name}_bias"][h]
        return a if config.gate_soft_cap is None else config.gate_soft_cap * np.tanh(a / config.gate_soft_cap)

    y = np.zeros(x.shape)
    for h in range(config.heads):
        q, k, v = (project(name, h) for name in "qkv")
        cell = mlstm_cell(q, k, v, gate("input_gate", h), gate("forget_gate", h), config.cell_eps)
        cell = np.stack([_norm_of_head(config, params, h, token) for token in cell])
        y = y + (sigmoid(project("output_gate", h)) * cell) @ params["out"][h]
    return y + params["out_bias"] if config.bias else y


def _convolve(params, x):
    """silu(conv(x)) with zeros before the start."""
    taps = len(params["conv"])
    past = np.concatenate([np.zeros((taps - 1, x.shape[1])), x])
    return np.stack([silu(sum(params["conv"][j] * past[t + j] for j in range(taps)) + params["conv_bias"])
                     for t in range(len(x))])  # fmt: skip


def _dense(blocks):
    """Block-diagonal [Di, Di] of [in, blocks, out]."""
    size, count, _ = blocks.shape
    full = np.zeros((count * size, count * size))
    for b in range(count):
        full[b * size : (b + 1) * size, b * size : (b + 1) * size] = blocks[:, b]
    return full


def mlstm_block(config, params, x):
    u, z = x @ params["in_proj"][:, 0], x @ params["in_proj"][:, 1]
    c = _convolve(params, u)
    q, k, v = c @ _dense(params["q"]), c @ _dense(params["k"]), u @ _dense(params["v"])
    gates = np.einsum("tn,nsh->tsh", np.concatenate([q, k, v], axis=1), params["gates"].reshape(-1, 2, config.heads))
    gates = gates + params["gates_bias"]
    heads, width = [], config.inner // config.heads
    for h in range(config.heads):
        part = slice(h * width, (h + 1) * width)
        cell = mlstm_cell(q[:, part], k[:, part], v[:, part], gates[:, 0, h], gates[:, 1, h], config.cell_eps)
        heads.append(np.stack([_norm_of_head(config, params, h, token) for token in cell]))
    h = np.concatenate(heads, axis=1) + params["skip"] * c
    return (h * silu(z)) @ params["out_proj"]


def slstm(config, params, x):
    """Equations 8 to 18, without stabiliser: exp(i) and sigmoid(f) as they stand."""
    c_x, width = _convolve(params, x), config.width // config.heads
    y = np.zeros(x.shape)
    for head in range(config.heads):
        part = slice(head * width, (head + 1) * width)
        h, c, n = np.zeros(width), np.zeros(width), np.zeros(width)
        for t in range(len(x)):
            raw = [c_x[t, part] @ params["conv_gates"][:, head, 0], c_x[t, part] @ params["conv_gates"][:, head, 1],
                   x[t, part] @ params["gates"][:, head, 0], x[t, part] @ params["gates"][:, head, 1]]  # fmt: skip
            i, f, z, o = (
                raw[g] + h @ params["recurrent"][:, head, g] + params["bias"][g, head] for g in range(len(raw))
            )
            c = sigmoid(f) * c + np.exp(i) * np.tanh(z)
            n = sigmoid(f) * n + np.exp(i)
            h = sigmoid(o) * c / n
            y[t, part] = _norm_of_head(config, params, head, h)
    return y


def _everything_before(config, length):
    return np.tril(np.ones((length, length), bool))


def _window(config, length):
    mask = np.zeros((length, length), bool)
    for i in range(length):
        for j in range(i + 1):
            mask[i, j] = config.window is None or j > i - config.window
    return mask


ORACLES = {
    "attention": attention,
    "mamba": mamba,
    "mlp": mlp,
    "mlstm": mlstm,
    "mlstm_block": mlstm_block,
    "slstm": slstm,
}
VISIBLE = {
    "attention": _window,
    "mamba": _everything_before,
    "mlp": lambda config, length: np.eye(length, dtype=bool),
    "mlstm": _everything_before,
    "mlstm_block": _everything_before,
    "slstm": _everything_before,
}

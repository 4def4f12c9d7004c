"""float64 oracles of the xLSTM mixers, one token at a time from the equations of arXiv:2405.04517."""

import math

import numpy as np

from tests.mixers.numpy_oracles import normalise, silu


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

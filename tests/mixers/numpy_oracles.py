"""Float64 NumPy oracles: one document, one token after the other, written from the papers' equations.

An oracle is `f(config, params, x [T, D]) -> y [T, D]` for a document that starts at position 0. Those of xLSTM
and Based have files of their own; `oracles.py` lists all.
"""

import contextlib
import math

import numpy as np

LEVELS, SMALLEST = 127.0, 1e-5  # of quantisers


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
        y = np.zeros(params["o"].shape[-1])
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


def gated_linear_attention(config, params, x):
    phi = {
        "identity": lambda a: a,
        "elu": lambda a: np.where(a > 0, a, np.expm1(np.minimum(a, 0.0))) + 1.0,
        "relu": lambda a: np.maximum(a, 0.0),
    }[config.feature_map]
    state = [np.zeros((config.key_width, config.value_width)) for _ in range(config.heads)]
    normaliser = [np.zeros(config.key_width) for _ in range(config.heads)]
    out = []
    for t, token in enumerate(x):
        y = np.zeros(x.shape[1])
        for h in range(config.heads):
            q, k, v = phi(token @ params["q"][:, h]), phi(token @ params["k"][:, h]), token @ params["v"][:, h]
            if config.rotary is not None:
                q, k = turn(config.rotary, q, t), turn(config.rotary, k, t)
            decay = np.ones(config.key_width)
            if type(config.decay).__name__ == "FixedDecay":
                decay = decay * (1.0 - 1.0 / 2 ** (5 + h))
            elif config.decay is not None:
                if type(config.decay).__name__ == "HeadGate":
                    logit = token @ params["decay_proj"][:, h] + params["decay_bias"][h]
                else:
                    logit = token @ params["decay_down"] @ params["decay_up"][:, h] + params["decay_bias"][h]
                decay = decay * (1.0 / (1.0 + np.exp(-logit))) ** (1.0 / config.decay.normaliser)
            state[h] = decay[:, None] * state[h] + np.outer(k, v)
            normaliser[h] = decay * normaliser[h] + k
            o = q @ state[h] / math.sqrt(config.key_width)
            if config.normalise:
                o = o / (q @ normaliser[h] / math.sqrt(config.key_width) + 1e-10)
            if config.norm is not None:
                o = normalise(config.norm, params.get("norm", {}), o)
            if config.output_gate:
                o = o * silu(token @ params["gate"][:, h])
            y = y + o @ params["o"][h]
        out.append(y)
    return np.stack(out)


def _forget(config, params, logits):
    bound = np.minimum(np.maximum(params["lower_bound"], 0.0), 1.0) if config.lower_bound else 0.0
    return bound + (1.0 - bound) / (1.0 + np.exp(-logits))


def hgrn(config, params, x):
    h, out = np.zeros(config.inner), []
    for token in x:
        forget = _forget(config, params, token @ params["f"])
        h = forget * h + (1.0 - forget) * silu(token @ params["i"])
        y = normalise(config.norm, params["norm"], h) * silu(token @ params["g"])
        out.append(y @ params["o"])
    return np.stack(out)


def hgrn2(config, params, x):
    state, out = np.zeros((config.heads, config.key_width, config.value_width)), []
    for token in x:
        forget = _forget(config, params, np.einsum("d,dhk->hk", token, params["f"]))
        value = np.einsum("d,dhv->hv", token, params["i"])
        query = silu(np.einsum("d,dhk->hk", token, params["q"])) / math.sqrt(config.key_width)
        state = forget[:, :, None] * state + (1.0 - forget)[:, :, None] * value[:, None]
        y = normalise(config.norm, params["norm"], np.einsum("hk,hkv->hv", query, state))
        out.append(np.einsum("hv,hvd->d", y, params["o"]))
    return np.stack(out)


def mamba(config, params, x):
    rank, states, taps, heads = config.rank(x.shape[1]), config.state, config.conv_width, config.heads or 1
    wide = config.inner // heads
    low_rank, back = params["x_proj"].reshape(wide, heads, -1), params["dt_proj"].reshape(rank, heads, wide)
    a = -np.exp(params["A_log"].reshape(heads, wide, states))
    offset, skip = params["dt_bias"].reshape(heads, wide), params["D"].reshape(config.inner)
    past = [np.zeros(config.inner) for _ in range(taps - 1)]
    h = np.zeros((heads, wide, states))
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
        read = np.zeros(config.inner)
        for head in range(heads):
            first = head * wide
            low_b_c = u[first : first + wide] @ low_rank[:, head]
            low, b, c = low_b_c[:rank], low_b_c[rank : rank + states], low_b_c[rank + states :]
            dt = softplus(low @ back[:, head] + offset[head])
            for i in range(wide):
                h[head, i] = np.exp(dt[i] * a[head, i]) * h[head, i] + dt[i] * u[first + i] * b
                read[first + i] = h[head, i] @ c
        y = (read + skip * u) * silu(z)
        y = y @ params["out_proj"]
        out.append(y + params["out_bias"] if config.bias else y)
    return np.stack(out)


def mamba2(config, params, x):
    heads, wide, states, taps = config.heads, config.head_width, config.state, config.conv_width
    inner, pairs = heads * wide, config.groups * config.state
    bias = (lambda name: params[f"{name}_bias"]) if config.bias else (lambda name: 0.0)
    filters = np.concatenate([params["conv"], params["conv_bc"]], axis=1)
    offset = np.concatenate([params["conv_bias"], params["conv_bc_bias"]]) if config.conv_bias else 0.0
    low, high = config.dt_limit
    past = [np.zeros(inner + 2 * pairs) for _ in range(taps - 1)]
    s = np.zeros((heads, wide, states))
    out = []
    for token in x:
        z, u = np.einsum("d,dci->ci", token, params["in_proj"]) + bias("in_proj")
        past.append(np.concatenate([u, token @ params["bc_proj"] + bias("bc_proj")]))
        mixed = silu(sum(filters[taps - 1 - lag] * past[-1 - lag] for lag in range(taps)) + offset)
        dt = softplus(token @ params["dt_proj"] + bias("dt_proj") + params["dt_bias"])
        dt = np.minimum(np.maximum(dt, low), high)
        y = np.zeros(inner)
        for h in range(heads):
            first = inner + h // (heads // config.groups) * states
            b, c = mixed[first : first + states], mixed[first + pairs : first + pairs + states]
            own = slice(h * wide, (h + 1) * wide)
            s[h] = np.exp(-dt[h] * np.exp(params["A_log"][h])) * s[h] + dt[h] * np.outer(mixed[own], b)
            y[own] = s[h] @ c + params["D"][h] * mixed[own]
        if not config.norm_before_gate:
            y = y * silu(z)
        if config.norm is not None:
            for part in np.split(np.arange(inner), config.norm_groups or config.groups):
                y[part] = normalise(config.norm, {"scale": params["norm"]["scale"][part]}, y[part])
        if config.norm_before_gate:
            y = y * silu(z)
        y = y @ params["out_proj"] + bias("out_proj")
        if config.mlp:
            z0, x0 = np.einsum("d,dcm->cm", token, params["mlp_in"]) + bias("mlp_in")
            y = y + (silu(z0) * x0) @ params["mlp_out"]
        out.append(y)
    return np.stack(out)


def mamba2_attention(config, params, x):
    taps, repeats, past = config.conv_width, config.heads // config.kv_heads, []
    s = np.zeros((config.heads, config.head_width, config.head_width))
    out = []
    for token in x:
        now = {name: np.einsum("d,dhk->hk", token, params[name]) for name in "qkv"}
        if config.qkv_bias:
            now = {name: heads + params[f"{name}_bias"] for name, heads in now.items()}
        past.append(now)
        dt = softplus(token @ params["dt"] + params["dt_bias"])
        y = params["o_bias"] if config.out_bias else np.zeros(len(token))
        for h in range(config.heads):
            group = h // repeats
            # Which head of the projection, and which of the group's filters.
            places = {"q": (h, h % repeats), "k": (group, repeats), "v": (group, repeats + 1)}
            mixed = {}
            for name, (head, place) in places.items():
                mixed[name] = now[name][head]
                if taps is not None:
                    filters = params["conv"][:, group, place]
                    sums = sum(
                        filters[taps - 1 - lag] * row[name][head] for lag, row in enumerate(past[: -taps - 1 : -1])
                    )
                    mixed[name] = silu(sums + params["conv_bias"][group, place])
            s[h] = np.exp(-dt[h] * np.exp(params["A_log"][h])) * s[h] + dt[h] * np.outer(mixed["v"], mixed["k"])
            head = (s[h] @ mixed["q"] + params["D"][h] * mixed["v"]) * silu(token @ params["z"][:, h])
            if config.norm is not None:
                head = normalise(config.norm, {"scale": params["norm"]["scale"][h]}, head)
            y = y + head @ params["o"][h]
        out.append(y)
    return np.stack(out)


def mlp(config, params, x):
    act, bias = ACTIVATIONS[config.activation], (lambda name: params[f"{name}_bias"] if config.bias else 0.0)
    out = []
    for token in x:
        h = token @ params["up"] + bias("up")
        h = act(token @ params["gate"] + bias("gate")) * h if config.gated else act(h)
        out.append(h @ params["down"] + bias("down"))
    return np.stack(out)


def zamba_block(config, params, x):
    inner, forward = dict(params["attention"]), dict(params["mlp"])
    if config.rank is not None:
        updates = params["updates"]
        for name in ("gate", "up"):
            forward[name] = forward[name] + updates["mlp_a"] @ updates[f"{name}_b"]
        for name in "qkv" if config.attention_updates else "":
            inner[name] = inner[name] + np.einsum("dr,rhk->dhk", updates[f"{name}_a"], updates[f"{name}_b"])
    y = attention(config.attention, inner, x)
    y = mlp(config.mlp, forward, np.stack([normalise(config.norm, params["norm"], token) for token in y]))
    return y @ params["out"]


class Quantisers:
    """What the quantisers of the oracles did since `straight_through` began.

    The straight-through gradient of a function is the gradient of that function with every quantiser replaced by the
    addition of what it added once: the first run records, runs after `rewind` replay.

    Attributes:
      margin: the smallest distance of a quantised value to the nearest tie, in steps.
    """

    def __init__(self):
        self.added, self.cursor, self.recording, self.margin = [], 0, True, 0.5

    def rewind(self):
        self.recording, self.cursor = not self.added, 0


_quantisers = None


@contextlib.contextmanager
def straight_through():
    """Within it, oracles quantise by a record: see `Quantisers`."""
    global _quantisers
    _quantisers = Quantisers()
    try:
        yield _quantisers
    finally:
        _quantisers = None


def quantise(a, step, lowest, highest):
    """a rounded to multiples of `step` between `lowest` and `highest` steps, half to even."""
    tape, steps = _quantisers, np.clip(a / step, lowest, highest)
    if tape is None or tape.recording:
        rounded = np.rint(steps) * step
        if tape is not None:
            tape.margin = min(tape.margin, np.abs(steps - np.floor(steps) - 0.5).min())
            tape.added.append(rounded - a)
        return rounded
    tape.cursor += 1
    return a + tape.added[tape.cursor - 1]


def bit_linear(params, eps):
    """The map of one token by a BitLinear."""
    shape, scale = params["weight"].shape, max(np.abs(params["weight"]).mean(), SMALLEST)
    weight = quantise(params["weight"], scale, -1, 1)

    def apply(token):
        normed = token / np.sqrt((token * token).mean() + eps) * params["norm_scale"]
        step = max(np.abs(normed).max(), SMALLEST) / LEVELS
        return (quantise(normed, step, -128, 127) @ weight.reshape(shape[0], -1)).reshape(shape[1:])

    return apply


def mlgru(config, params, x):
    i, f, g, o = (bit_linear(params[name], config.bit_eps) for name in "ifgo")
    bound = np.clip(params["lower_bound"], 0.0, 1.0) if config.lower_bound else 0.0
    h, out = np.zeros(config.inner), []
    for token in x:
        forget = bound + (1.0 - bound) / (1.0 + np.exp(-f(token)))
        h = forget * h + (1.0 - forget) * silu(i(token))
        gate = g(token)
        if config.gate_form == "paper":
            y = h / (1.0 + np.exp(-gate))
        else:
            normed, swish = (gate, h) if config.gate_form == "release" else (h, gate)
            y = normalise(config.gate_norm, params["gate_norm"], normed) * silu(swish)
        out.append(o(y))
    return np.stack(out)


def bit_mlp(config, params, x):
    gate_up, down = (bit_linear(params[name], config.bit_eps) for name in ("gate_up", "down"))
    halves = [gate_up(token) for token in x]
    return np.stack([down(ACTIVATIONS[config.activation](gate) * up) for gate, up in halves])

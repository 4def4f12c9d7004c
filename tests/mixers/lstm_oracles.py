"""The float64 oracle of the LSTM's variants, from the equations and the list of arXiv:1503.04069, section III."""

import numpy as np


def sigmoid(a):
    return 1.0 / (1.0 + np.exp(-a))


def learned_gates(config):
    """Gates with parameters, in the order of their parameters; the coupled forget gate has none."""
    removed = {"i": not config.input_gate, "f": not config.forget_gate or config.coupled, "o": not config.output_gate}
    return [name for name in "ifo" if not removed[name]]


def lstm_states(config, params, x):
    """[T, D] -> outputs [T, D], last cells [D], last values of the learned gates {letter: [D]}."""
    learned, width = learned_gates(config), x.shape[1]
    block = {name: index for index, name in enumerate(["z", *learned])}
    c, y, last = np.zeros(width), np.zeros(width), {name: np.zeros(width) for name in learned}
    outputs = []
    for token in x:

        def inside(name, cells=None, token=token, y=y, last=last):
            at = block[name]
            a = token @ params["input"][:, at] + y @ params["recurrent"][:, at] + params["bias"][at]
            if name != "z" and config.peepholes:
                a = a + params["peephole"][at - 1] * cells
            if name != "z" and config.gate_recurrence:
                for origin in learned:
                    a = a + last[origin] @ params["gate_recurrent"][block[origin] - 1, :, at - 1]
            return a

        now = {}
        for name in ("i", "f"):
            now[name] = sigmoid(inside(name, c)) if name in learned else np.ones(width)
        if config.coupled:
            now["f"] = 1.0 - now["i"]
        z = inside("z")
        c = now["i"] * (np.tanh(z) if config.input_activation == "tanh" else z) + now["f"] * c
        now["o"] = sigmoid(inside("o", c)) if "o" in learned else np.ones(width)
        y = now["o"] * (np.tanh(c) if config.output_activation == "tanh" else c)
        last = {name: now[name] for name in learned}
        outputs.append(y)
    return np.stack(outputs), c, last


def lstm(config, params, x):
    """Outputs alone: an oracle of the battery."""
    return lstm_states(config, params, x)[0] if len(x) else x

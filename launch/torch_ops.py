"""What the ops have to beat of torch's: its own attention, flash-linear-attention's Triton kernels, mamba_ssm's.

    python -m launch.torch_ops THREADS

A process of its own, the other side of launch/benchmark_ops.py. Answers each line of standard input with one line of
JSON: "peers {op, platform}" with names; "prepare {...}" with how far a peer is from the reference, or why it does not
run; "run {...}", of what was prepared, with the seconds per call of one sample; "forget" drops what was prepared.
A peer gets the same numbers as ours; what its layout needs is done before the clock starts.
"""

import importlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch import benchmark_ops
from launch.benchmark_peers import check_attention, reason
from pallas_kernels.dispatch import UnsupportedError

Tensors = dict[str, Any]
# (entry of an op's shapes, its arguments) -> function of tensors by name that gives y, those tensors
Prepare = Callable[[Any, Tensors], tuple[Callable[..., Any], Tensors]]


def _no_state(name: str, shape: Any) -> None:
    for what in ("carried", "documents"):
        if getattr(shape, what):
            raise UnsupportedError(f"{name}: not with {what} here")


def sdpa(shape: Any, tensors: Tensors) -> tuple[Callable[..., Any], Tensors]:
    """Torch's scaled_dot_product_attention; a window is a mask, which its flash kernels do not take."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    check_attention("torch SDPA", shape)
    mask = None
    if shape.window is not None and shape.window < shape.time:
        index = torch.arange(shape.time, device=tensors["q"].device)
        distance = index[:, None] - index[None, :]
        mask = (distance >= 0) & (distance < shape.window)

    def function(q, k, v):
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shape.heads != shape.kv_heads
        )

    return _heads_last(function), {name: a.transpose(1, 2).contiguous() for name, a in tensors.items()}


def _heads_last(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **tensors: function(**tensors).transpose(1, 2)


def fla_linear_attention(shape: Any, tensors: Tensors) -> tuple[Callable[..., Any], Tensors]:
    """Flash-linear-attention's chunk_gla, or chunk_simple_gla; groups are repeated for their heads beforehand."""
    _no_state("fla", shape)
    repeated = {
        name: a.repeat_interleave(shape.heads // shape.groups, 2) for name, a in tensors.items() if name in "qk"
    }
    tensors = {**tensors, **repeated}
    scale = shape.key**-0.5 if shape.scale is None else shape.scale
    decay = tensors.pop("log_decay")
    if shape.decay == "channel":
        gla = importlib.import_module("fla.ops.gla").chunk_gla
        gate = decay.repeat_interleave(shape.heads // shape.groups, 2)
        return (lambda q, k, v, g: gla(q, k, v, g, scale=scale)[0]), {**tensors, "g": gate}
    simple = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    if decay is None:
        return (lambda q, k, v: simple(q, k, v, scale=scale)[0]), tensors
    if shape.decay == "constant":  # of the model, and without a gradient there
        return (lambda q, k, v: simple(q, k, v, g_gamma=decay, scale=scale)[0]), tensors
    return (lambda q, k, v, g: simple(q, k, v, g, scale=scale)[0]), {**tensors, "g": decay}


def mamba2(shape: Any, tensors: Tensors) -> tuple[Callable[..., Any], Tensors]:
    """mamba_ssm's state-space dual, whose values are dt x and decays dt A: with A = -1, dt is minus the log decay."""
    import torch

    _no_state("mamba_ssm", shape)
    if shape.decay != "head" or shape.scale != 1.0:
        raise UnsupportedError("mamba_ssm: for one decay per head and scale 1")
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    dt = -tensors["log_decay"]
    x = (tensors["v"].float() / dt[..., None]).to(tensors["v"].dtype)
    A = -torch.ones(shape.heads, device=dt.device)
    return (lambda x, dt, B, C: scan(x, dt, A, B, C, 256)), {"x": x, "dt": dt, "B": tensors["k"], "C": tensors["q"]}


def fla_hgrn(name: str) -> Prepare:
    """Flash-linear-attention's elementwise recurrence, `name` of fla.ops.hgrn, on the logarithm of the decay."""

    def prepare(shape: Any, tensors: Tensors) -> tuple[Callable[..., Any], Tensors]:
        _no_state("fla", shape)
        function = getattr(importlib.import_module("fla.ops.hgrn"), name)
        gates = tensors["a"].float().log().to(tensors["a"].dtype)
        return (lambda x, g: function(x, g)[0]), {"x": tensors["b"], "g": gates}

    return prepare


def mamba(shape: Any, tensors: Tensors) -> tuple[Callable[..., Any], Tensors]:
    """mamba_ssm's selective_scan_fn, whose channels come before time."""
    _no_state("mamba_ssm", shape)
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    theirs = {"x": "u", "dt": "delta", "dt_bias": "delta_bias"}
    over_time = {name: a.transpose(1, 2).contiguous() for name, a in tensors.items() if a.ndim == 3}
    changed = {theirs.get(name, name): a for name, a in {**tensors, **over_time}.items()}
    return (lambda **arguments: scan(**arguments, delta_softplus=True).transpose(1, 2)), changed


PEERS: Mapping[str, Mapping[str, Prepare]] = {
    "attention": {"torch SDPA": sdpa},
    "gated_linear_attention": {"fla": fla_linear_attention, "mamba_ssm": mamba2},
    "linear_scan": {"fla chunks": fla_hgrn("chunk_hgrn"), "fla recurrent": fla_hgrn("fused_recurrent_hgrn")},
    "selective_scan": {"mamba_ssm": mamba},
}


def names(op: str, platform: str) -> list[str]:
    """The peers of an op: all on a GPU, on a CPU those without kernels of a GPU."""
    return {"gpu": list(PEERS.get(op, ())), "cpu": ["torch SDPA"] if op == "attention" else []}.get(platform, [])


def tensors(arguments: Mapping[str, Any], device: str) -> Tensors:
    """The floating arguments as tensors, None where they are."""
    import torch

    found: Tensors = {}
    for name, a in arguments.items():
        if a is not None:
            dtype = getattr(torch, np.dtype(a.dtype).name)
            a = torch.from_numpy(np.array(a, np.float32)).to(device, dtype)
        found[name] = a
    return found


class Sample:
    """A peer's pass over several sets of arguments, as `benchmark_ops.Program`."""

    def __init__(self, op: str, peer: str, shape: Any, backward: bool, calls: int):
        import torch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._calls, self._rounds, self._backward = calls, 1, backward
        prepare = PEERS[op][peer]
        self.difference = self._check(op, prepare, benchmark_ops.checked(shape))
        self._function, arguments = prepare(shape, tensors(benchmark_ops.draw(shape), self._device))
        self._sets = [
            {name: a.detach().clone().requires_grad_(backward) for name, a in arguments.items()} for _ in range(calls)
        ]
        self._cotangent = torch.randn_like(self._function(**self._sets[0])).detach()
        self.seconds()
        if self._device == "cuda":
            self._rounds = max(1, math.ceil(benchmark_ops.LEAST_SECONDS / (self.seconds() * calls)))

    def _check(self, op: str, prepare: Prepare, shape: Any) -> float:
        """How far the peer's y is from that of the reference."""
        arguments = benchmark_ops.draw(shape)
        exact = benchmark_ops.implementation(op, shape, "reference")(**arguments)
        function, prepared = prepare(shape, tensors(arguments, self._device))
        y = function(**prepared).float().cpu().numpy()
        return benchmark_ops.difference(y, jax.tree.leaves(exact)[0])

    def seconds(self) -> float:
        """Seconds per call of one sample."""
        import torch

        def run() -> None:
            for _ in range(self._rounds):
                for arguments in self._sets:
                    with torch.set_grad_enabled(self._backward):
                        y = self._function(**arguments)
                    if self._backward:
                        torch.autograd.grad(y, list(arguments.values()), self._cotangent)

        if self._device != "cuda":
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) / (self._rounds * self._calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / (self._rounds * self._calls)


def prepare(op: str, peer: str, shape: dict[str, Any], backward: bool, calls: int) -> Sample:
    """The sample that a "prepare" line asks for."""
    entry = type(next(iter(importlib.import_module(f"pallas_kernels.{op}.shapes").MODELS.values())))
    fields = {name: jnp.dtype(value) if name.endswith("dtype") else value for name, value in shape.items()}
    return Sample(op, peer, entry(**fields), backward, calls)


def answer(line: str, samples: dict[str, Sample]) -> Any:
    """The answer to one line; `samples` holds what was prepared."""
    command, _, rest = line.strip().partition(" ")
    if command == "peers":
        return names(**json.loads(rest))
    if command == "run":
        return samples[rest].seconds()
    if command == "forget":
        samples.clear()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None
    try:
        samples[rest] = prepare(**json.loads(rest))
    except Exception as error:  # a peer's own limits have any type; the row says which
        return {"note": reason(error)}
    return {"difference": samples[rest].difference}


def main(threads: int) -> None:
    """Serves the lines of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(threads)
    samples: dict[str, Sample] = {}
    for line in sys.stdin:
        print(json.dumps(answer(line, samples)), file=answers, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))

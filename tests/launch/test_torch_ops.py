"""The torch side of the suite ops: each peer computes the op, on stand-ins for kernels that need a GPU."""

import dataclasses
import json
import sys
import types

import jax.numpy as jnp
import pytest
import torch

from launch import benchmark_ops, torch_ops
from launch.peer import Peer
from pallas_kernels.attention.shapes import AttentionShape
from pallas_kernels.gated_linear_attention.shapes import LinearAttentionShape
from pallas_kernels.linear_scan.shapes import ScanShape as LinearScanShape
from pallas_kernels.selective_scan.shapes import ScanShape

TOLERANCE = 1e-4  # float32 on both sides; the stand-ins sum in another order
HEADS = LinearAttentionShape(2, 9, 4, 2, 8, 4, "head", scale=1.0, dtype=jnp.float32)
ATTENTION = AttentionShape(2, 40, 4, 2, 8, 8, dtype=jnp.float32)


def _linear_attention(q, k, v, decay, scale):
    """o_t = scale q_t S_t, S_t = decay_t S + k_t v_t^T; decay [B, T, H, K]."""
    state, outputs = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]), []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1)


def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
    assert q.shape == k.shape == g.shape
    return _linear_attention(q, k, v, g.exp(), q.shape[-1] ** -0.5 if scale is None else scale), None


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False):
    assert q.shape == k.shape
    assert q.shape[:3] == v.shape[:3]
    logarithm = torch.zeros(q.shape[:3]) if g is None else g
    if g_gamma is not None:
        assert g is None
        logarithm = g_gamma.expand(q.shape[:3])
    decay = logarithm.exp()[..., None].expand(q.shape)
    return _linear_attention(q, k, v, decay, q.shape[-1] ** -0.5 if scale is None else scale), None


def hgrn(x, g, initial_state=None, output_final_state=False):
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = g[:, t].exp() * h + x[:, t]
        outputs.append(h)
    return torch.stack(outputs, 1), None


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """Channels before time, as mamba_ssm's: u, delta, z [B, D, L]; A [D, N]; B, C [B, N, L]; D, delta_bias [D]."""
    assert delta_softplus
    dt = torch.nn.functional.softplus(delta + delta_bias[:, None])
    h, outputs = torch.zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        h = (dt[:, :, t, None] * A).exp() * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        outputs.append((h * C[:, None, :, t]).sum(-1))
    return (torch.stack(outputs, 2) + D[:, None] * u) * torch.nn.functional.silu(z)


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size):
    """x [B, L, H, P], dt [B, L, H], A [H], B and C [B, L, G, N]."""
    repeats = x.shape[2] // B.shape[2]
    k, q = B.repeat_interleave(repeats, 2), C.repeat_interleave(repeats, 2)
    decay = (dt * A).exp()[..., None].expand(k.shape)
    return _linear_attention(q, k, dt[..., None] * x, decay, 1.0)


MODULES = {
    "fla.ops.gla": {"chunk_gla": chunk_gla},
    "fla.ops.simple_gla": {"chunk_simple_gla": chunk_simple_gla},
    "fla.ops.hgrn": {"chunk_hgrn": hgrn, "fused_recurrent_hgrn": hgrn},
    "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
    "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined},
}


@pytest.fixture
def installed(monkeypatch):
    for name, functions in MODULES.items():
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)


def _request(op, peer, shape, backward=False, calls=1):
    fields = {field.name: getattr(shape, field.name) for field in dataclasses.fields(shape)}
    fields["dtype"] = jnp.dtype(shape.dtype).name
    return json.dumps({"op": op, "peer": peer, "shape": fields, "backward": backward, "calls": calls})


CASES = [
    ("gated_linear_attention", "fla", HEADS),
    ("gated_linear_attention", "fla", dataclasses.replace(HEADS, decay="none", scale=None)),
    ("gated_linear_attention", "fla", dataclasses.replace(HEADS, decay="constant", scale=None)),
    ("gated_linear_attention", "fla", dataclasses.replace(HEADS, decay="channel", scale=0.3)),
    ("gated_linear_attention", "mamba_ssm", HEADS),
    ("linear_scan", "fla chunks", LinearScanShape(2, 9, 5, dtype=jnp.float32)),
    ("linear_scan", "fla recurrent", LinearScanShape(2, 9, 5, dtype=jnp.float32)),
    ("selective_scan", "mamba_ssm", ScanShape(2, 9, 5, 3, dtype=jnp.float32)),
    ("attention", "torch SDPA", ATTENTION),
    ("attention", "torch SDPA", dataclasses.replace(ATTENTION, window=7)),
    ("attention", "torch SDPA", dataclasses.replace(ATTENTION, window=64, kv_heads=4)),
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("op", "peer", "shape"), CASES)
def test_peer_computes_the_op(op, peer, shape, backward, installed):
    samples, line = {}, _request(op, peer, shape, backward, calls=2)
    prepared = torch_ops.answer(f"prepare {line}\n", samples)
    assert prepared.get("difference", 1.0) < TOLERANCE, prepared
    assert torch_ops.answer(f"run {line}\n", samples) > 0
    first, second = samples[line]._sets
    assert all(first[name].data_ptr() != second[name].data_ptr() for name in first)
    torch_ops.answer("forget", samples)
    assert not samples


def test_a_check_sees_another_function(installed, monkeypatch):
    monkeypatch.setattr(sys.modules["fla.ops.hgrn"], "chunk_hgrn", lambda x, g: hgrn(x, g.exp()))
    line = _request("linear_scan", "fla chunks", LinearScanShape(2, 9, 5, dtype=jnp.float32))
    assert torch_ops.answer(f"prepare {line}", {})["difference"] > benchmark_ops.TOLERANCE


def test_absent_or_unfit_peers_say_so():
    for op, peer, shape, note in (
        ("gated_linear_attention", "fla", HEADS, "fla is not installed"),
        ("selective_scan", "mamba_ssm", ScanShape(2, 9, 5, 3), "mamba_ssm is not installed"),
        ("selective_scan", "mamba_ssm", ScanShape(2, 9, 5, 3, carried=True), "mamba_ssm: not with carried here"),
        ("attention", "torch SDPA", dataclasses.replace(ATTENTION, soft_cap=5.0), "torch SDPA: not with soft_cap here"),
    ):
        if note.endswith("installed") and torch_ops.importlib.util.find_spec(peer):
            continue
        assert torch_ops.answer(f"prepare {_request(op, peer, shape)}", {}) == {"note": note}


def test_bfloat16_keeps_its_type():
    found = torch_ops.tensors({"q": jnp.ones((2, 3), jnp.bfloat16), "log_decay": None}, "cpu")
    assert found["q"].dtype == torch.bfloat16
    assert found["log_decay"] is None


def test_in_a_process_of_its_own():
    line = _request("attention", "torch SDPA", ATTENTION)
    with Peer("launch.torch_ops", "1", threads=1, JAX_PLATFORMS="cpu") as peer:
        names = [json.loads(peer.ask(f'peers {{"op": "attention", "platform": "{p}"}}')) for p in ("cpu", "gpu", "tpu")]
        assert names == [["torch SDPA"], ["torch SDPA"], []]
        assert json.loads(peer.ask(f"prepare {line}"))["difference"] < TOLERANCE
        assert peer.side(f"run {line}")() > 0
        with pytest.raises(RuntimeError, match="the peer stopped at 'run nonsense"):
            peer.ask("run nonsense")


def test_peer_process_that_cannot_start():
    with Peer("launch.no_such_module", threads=1) as peer, pytest.raises(RuntimeError, match="with status 1"):
        peer.ask("anything")

"""Ops on a mesh: the same numbers as on one device, and TPU kernels that see their shard without a gather."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import partition
from pallas_kernels.attention import attention
from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.static_profile import chips
from zoo.core.compat import make_mesh

ROOT = pathlib.Path(__file__).parents[2]
RULES = {"batch": "data", "heads": "tensor", "inner": "tensor"}
MOVES = "all-gather|all-to-all|collective-permute|reduce-scatter"


def test_eight_devices_in_their_own_process():
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.pallas_kernels.multi_device"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 devices: all equal" in done.stdout


def _conv(x, w):
    return causal_conv1d(x, w["conv"])[0]


def _scan(x, w):
    return linear_scan(jax.nn.sigmoid(x * w["gate"]), x)[0]


def _selective(x, w):
    maps = x @ w["A"]
    return selective_scan(x, x, -jnp.exp(w["A"]), maps, maps, dt_softplus=True)[0]


def _attention(x, w):
    q = (x * w["gate"]).reshape(*x.shape[:2], 8, 128)
    k = q[:, :, ::2]
    return attention(q, k, k, window=128).reshape(x.shape)


@pytest.mark.parametrize(("layer", "kernels"), [(_conv, 2), (_scan, 2), (_selective, 2), (_attention, 2)])
def test_a_train_step_over_a_mesh_runs_the_kernel_on_each_shard(layer, kernels):
    """On v5e:4x4, rows over 4 devices and channels over 4: nothing but sums of gradients crosses between devices."""
    pytest.importorskip("libtpu")
    mesh = make_mesh({"data": 4, "tensor": 4}, chips.devices("v5e:4x4"))

    def abstract(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P(*axes)))

    x = abstract((8, 256, 1024), "data", None, "tensor")
    weights = {
        "conv": abstract((4, 1024), None, "tensor"),
        "gate": abstract((1024,), "tensor"),
        "A": abstract((1024, 16), "tensor"),
    }

    def step(weights, x):
        gradients = jax.grad(lambda w: jnp.mean(jnp.square(layer(x, w).astype(jnp.float32))))(weights)
        return jax.tree.map(lambda w, g: w - g, weights, gradients)

    with partition.use(mesh, RULES):
        text = jax.jit(step).lower(weights, x).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == kernels
    assert not re.findall(MOVES, text)
    assert "all-reduce" in text
    with partition.use(mesh, {"batch": "tensor", "heads": "data", "inner": "data"}):  # other rules than the arrays'
        assert re.findall(MOVES, jax.jit(step).lower(weights, x).compile().as_text())

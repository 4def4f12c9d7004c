"""The choice of an implementation under a mesh."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _check():
    """Run with two devices."""
    from pallas_kernels import dispatch

    table = {"xla": lambda x: x + 1, "mosaic_tpu": lambda x: x + 2}

    def call(x, implementation=None):
        return dispatch.run("op", table, implementation, x)

    x = jnp.zeros(2)
    exported = jax.export.export(jax.jit(call), platforms=["tpu"])
    assert "2.000000e+00" in exported(x).mlir_module()
    assert call(x, "mosaic_tpu")[0] == 2
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert "2.000000e+00" not in exported(x).mlir_module()
        with pytest.raises(dispatch.UnsupportedError, match=r"axes \['data'\]"):
            call(x, "mosaic_tpu")
        mapped = jax.shard_map(lambda x: call(x, "mosaic_tpu"), in_specs=jax.P("data"), out_specs=jax.P("data"))
        assert (jax.jit(mapped)(x) == 2).all()
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        assert call(x, "mosaic_tpu")[0] == 2
    print("checked")


def test_kernels_stay_off_a_mesh_that_the_partitioner_splits():
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from tests.pallas_kernels import test_dispatch as t; t._check()"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checked" in done.stdout

"""What log-probabilities over a vocabulary of 131072 cost beside the product that makes the logits."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import objectives

ROWS, TOKENS, CLASSES = 2, 128, 131072
REPEATS = 5
BOUND = 1.1


def times(width):
    """Seconds by name, the best of a few runs that take turns: logits alone, and log-probabilities from activations."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(ROWS, TOKENS, width)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((width, CLASSES), np.float32)) / width**0.5
    targets = jnp.asarray(rng.integers(0, CLASSES, (ROWS, TOKENS)), jnp.int32)
    mask = jnp.ones((ROWS, TOKENS), jnp.float32)
    functions = {
        "logits": lambda x, w, targets, mask: x @ w,
        "sequence_logps": lambda x, w, *given: objectives.sequence_logps(x @ w, *given).sum,
        "linear_sequence_logps": lambda *given: objectives.linear_sequence_logps(*given).sum,
    }
    compiled = {name: jax.jit(f) for name, f in functions.items()}
    best = dict.fromkeys(functions, np.inf)
    for repeat in range(1 + REPEATS):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(x, w, targets, mask))
            if repeat:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def times_by_default(width):
    """`times` in a process with as many threads as a user's; those of the suite are more than the machine's cores."""
    env = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
    script = f"import json; from tests.objectives.test_logps_time import times; print(json.dumps(times({width})))"
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=root, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(
    int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1,
    reason="needs both cores to itself: pytest -n 0 -m slow tests/objectives/test_logps_time.py",
)
@pytest.mark.parametrize(("width", "name"), [(512, "linear_sequence_logps"), (4096, "sequence_logps")])
def test_log_probabilities_cost_little_beside_the_logits(width, name):
    """At most 1.1 times the product of activations [256, width] and weights [width, 131072], product included.

    Measured on two cores of an AMD EPYC with other work beside it, at widths 512, 1024, 2048 and 4096:
    linear_sequence_logps 1.01, 1.04, 1.03, 0.96 times, as it never writes the logits out; sequence_logps of the logits
    1.27, 1.15, 1.06, 0.97 times. The latter does not hold the bound at small widths, and cannot: the exponentials of
    the logits alone take 0.16 times the product at width 512. At width 2048 it is near it: 1.15 on a busier machine.
    """
    found = times_by_default(width)
    assert found[name] <= BOUND * found["logits"], {key: value / found["logits"] for key, value in found.items()}

"""What evaluations draw."""

import contextlib
import types

import jax
import numpy as np

from launch import evaluate


def draws(monkeypatch, seed, batches=3):
    """What an evaluation of a run with this seed draws in each batch."""
    found = []

    def eval_step(params, batch, key, teacher):
        found.append(float(jax.random.uniform(key)))
        return {"loss_sum": found[-1], "weight": 1.0}

    run = types.SimpleNamespace(
        data=None,
        config={"seed": seed},
        teacher=None,
        active=contextlib.nullcontext,
        prepare=lambda batch, *_: batch,
        place=lambda batch: batch,
        eval_step=eval_step,
    )
    monkeypatch.setattr(evaluate.data_lib, "evaluation_batches", lambda *_: iter([{}] * batches))
    result = evaluate.evaluate(run, None)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(result["loss"], np.mean(found))
    return found


def test_batches_draw_anew_and_evaluations_do_not(monkeypatch):
    first = draws(monkeypatch, seed=0)
    assert len(set(first)) == 3
    assert draws(monkeypatch, seed=0) == first
    assert not set(draws(monkeypatch, seed=1)) & set(first)

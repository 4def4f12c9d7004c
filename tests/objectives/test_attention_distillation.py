"""Attention distillation against float64 loops over every row and key."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from objectives import attention_distillation
from tests.trees import FLOAT32_TOLERANCE, GRADIENT_TOLERANCE, assert_close, redraw
from zoo.layers import feature_maps
from zoo.layers.feature_maps import HedgehogMap

BATCH, LENGTH, HEADS, WIDTH, FEATURES = 2, 7, 4, 3, 5
DOCUMENTS = np.array([[-1, 0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 1, 1]])
DIFFERENCE_STEP = 1e-6


def draw(seed=0, groups=2):
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((BATCH, LENGTH, n, WIDTH)).astype(np.float32) for n in (HEADS, groups))
    return q, k, *(rng.random((2, BATCH, LENGTH, HEADS, FEATURES)).astype(np.float32) ** 4)


def loops(q, k, phi_q, phi_k, documents, causal, scale, eps):
    """(loss, KL, rows)."""
    total, divergence, rows = 0.0, 0.0, 0
    for b, i, h in np.ndindex(q.shape[:3]):
        if documents[b, i] < 0:
            continue
        seen = [j for j in range(len(q[b])) if documents[b, j] == documents[b, i] and (j <= i or not causal)]
        scores = np.array([scale * (q[b, i, h] @ k[b, j, h * k.shape[2] // q.shape[2]]) for j in seen])
        a = np.exp(scores - scores.max())
        a = a / a.sum()
        w = np.array([phi_q[b, i, h] @ phi_k[b, j, h] for j in seen])
        row = -np.sum(a * (np.log(w + eps) - np.log(w.sum() + eps)))
        total, divergence, rows = total + row, divergence + row + np.sum(a * np.log(a)), rows + 1
    return total, divergence, rows


def poison(x, documents):
    return np.where((documents < 0)[..., None, None], np.float32(np.nan), x)


@pytest.mark.parametrize(
    ("documents", "options"),
    [
        (None, {}),
        (None, {"causal": False, "eps": 0.1, "rows": 3}),
        (DOCUMENTS, {"scale": 2.0, "rows": 2}),
        (DOCUMENTS, {"causal": False}),
    ],
    ids=["causal", "bidirectional", "packed", "packed bidirectional"],
)
def test_is_its_definition_with_gradient(documents, options):
    arrays = draw(groups=2 if documents is None else 4)
    inside = np.zeros((BATCH, LENGTH), int) if documents is None else documents
    args = arrays if documents is None else tuple(poison(a, documents) for a in arrays)
    given = None if documents is None else jnp.asarray(documents)
    causal, scale, eps = options.get("causal", True), options.get("scale", WIDTH**-0.5), options.get("eps", 1e-12)

    def loss(*args):
        out = attention_distillation(*args, documents=given, **options)
        return out.loss_sum, out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*args)
    exact = [np.float64(a) for a in arrays]
    total, divergence, rows = loops(*exact, inside, causal, scale, eps)
    assert_close(out.loss_sum, total, FLOAT32_TOLERANCE, "loss")
    assert abs(float(out.metrics["kl"]) - divergence) <= FLOAT32_TOLERANCE * total
    assert float(out.weight) == rows
    assert not np.any(grads[0]), "the teacher is frozen"
    assert not np.any(grads[1]), "the teacher is frozen"
    rng = np.random.default_rng(1)
    for n in (2, 3):
        assert not np.asarray(grads[n])[inside < 0].any()
        direction = rng.standard_normal(exact[n].shape) * exact[n]  # features stay positive
        ends = []
        for sign in (1, -1):
            moved = [a + sign * DIFFERENCE_STEP * direction if m == n else a for m, a in enumerate(exact)]
            ends.append(loops(*moved, inside, causal, scale, eps)[0])
        expected = (ends[0] - ends[1]) / (2 * DIFFERENCE_STEP)
        size = np.linalg.norm(np.float64(grads[n]) * direction)
        assert abs(np.sum(np.float64(grads[n]) * direction) - expected) <= GRADIENT_TOLERANCE * max(size, 1.0)


def test_equal_weights_leave_the_entropy():
    """Features that hold the teacher's weights themselves: the divergence is 0."""
    q, k, *_ = draw(2, groups=HEADS)
    scores = np.einsum("bihk,bjhk->bihj", q, k) * WIDTH**-0.5
    a = np.where(np.tri(LENGTH, dtype=bool)[None, :, None, :], np.exp(scores), 0.0)
    eye = np.broadcast_to(np.eye(LENGTH, dtype=np.float32)[None, :, None], (BATCH, LENGTH, HEADS, LENGTH))
    out = attention_distillation(q, k, a, eye)
    assert float(out.loss_sum) > 1.0
    assert abs(float(out.metrics["kl"])) < FLOAT32_TOLERANCE * float(out.loss_sum)


@pytest.mark.parametrize("form", ["joint", "halves"])
def test_maps_learn_the_teacher(form):
    config, (q, k, *_) = HedgehogMap(form), draw(3, groups=HEADS)
    q, k = 3.0 * q, 3.0 * k
    params = redraw({n: feature_maps.param_specs(config, HEADS, WIDTH) for n in ("q", "k")}, 4)
    optimiser = optax.adam(3e-2)

    def loss(params):
        phi_q, phi_k = (feature_maps.apply(params[n], x, config=config) for n, x in (("q", q), ("k", k)))
        out = attention_distillation(q, k, phi_q, phi_k)
        return out.loss_sum / out.weight, out.metrics["kl"] / out.weight

    @jax.jit
    def train(params):
        def step(carry, _):
            params, moments = carry
            grads, kl = jax.grad(loss, has_aux=True)(params)
            updates, moments = optimiser.update(grads, moments)
            return (optax.apply_updates(params, updates), moments), kl

        return jax.lax.scan(step, (params, optimiser.init(params)), length=200)[1]

    kl = train(params)
    assert float(kl[-1]) < 0.2 * float(kl[0])


def test_rows_bound_the_memory():
    """No array of length x length, forward or backward."""
    shape = jax.ShapeDtypeStruct((1, 512, 1, 4), jnp.float32)

    def traced(rows):
        def loss(q, k, phi_q, phi_k):
            return attention_distillation(q, k, phi_q, phi_k, rows=rows).loss_sum

        return str(jax.make_jaxpr(jax.grad(loss, argnums=(2, 3)))(*[shape] * 4))

    assert "512,512]" in traced(None)
    assert "512,512]" not in traced(8)


def test_errors_name_what_was_given():
    q, k, phi_q, phi_k = draw()
    with pytest.raises(ValueError, match=r"the 3 heads of k must divide the 4 heads of q"):
        attention_distillation(q, np.repeat(k[:, :, :1], 3, axis=2), phi_q, phi_k)
    with pytest.raises(ValueError, match=r"features_q and features_k must both be \[2, 7, 4\] \+ \[F\]"):
        attention_distillation(q, k, phi_q[:, :, :2], phi_k[:, :, :2])
    with pytest.raises(ValueError, match=r"documents must be \[B, T\] = \(2, 7\), got \(2, 6\)"):
        attention_distillation(q, k, phi_q, phi_k, documents=DOCUMENTS[:, 1:])
    with pytest.raises(ValueError, match="rows must be >= 1 or None for all, got 0"):
        attention_distillation(q, k, phi_q, phi_k, rows=0)
    with pytest.raises(ValueError, match="eps must be >= 0"):
        attention_distillation(q, k, phi_q, phi_k, eps=-1.0)

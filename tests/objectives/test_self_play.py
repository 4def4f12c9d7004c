"""SPIN with its opponents, and the parts of self-augmentation."""

import collections
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
import torch.nn.functional as F

import objectives
from tests.objectives.oracle import check
from tests.objectives.pairs import draw, log_probs, rows
from tests.objectives.test_margins import ratios


def spin(base_chosen=None, base_rejected=None, *, beta, base_weight, **four):
    """With the reference mixed as probabilities."""
    if base_chosen is not None:
        for side, base in (("chosen", base_chosen), ("rejected", base_rejected)):
            p, q = torch.exp(four[f"ref_{side}"].sum), torch.exp(base.sum)
            four[f"ref_{side}"] = SimpleNamespace(sum=torch.log(p ** (1 - base_weight) * q**base_weight))
    h_w, h_l = ratios(**four)
    return -F.logsigmoid(beta * (h_w - h_l))


def base(seed=7):
    more = draw(seed)
    return {f"base_{side}": more[f"ref_{side}"] for side in ("chosen", "rejected")}


@pytest.mark.parametrize(("extras", "weight"), [({}, 0.0), (base(), 0.0), (base(), 0.3), (base(), 1.0)])
def test_spin(extras, weight):
    pairs = {k: dataclasses.replace(v, sum=0.1 * v.sum) for k, v in draw().items()}  # so that exp stays in range
    extras = {k: dataclasses.replace(v, sum=0.1 * v.sum) for k, v in extras.items()}
    check(objectives.spin, spin, pairs | extras, beta=0.3, base_weight=weight)


def test_a_divergence_to_the_base_is_the_mixture():
    """The policy that is best under both divergences has the given f, up to a constant, as its reward in SPIN's loss.

    It is found by maximising over six responses, in float64, not by the formula.
    """
    rng, beta, c = np.random.default_rng(3), 0.7, 0.35
    previous, base_model = rng.dirichlet(np.ones(6), size=2)
    f = rng.normal(size=6)

    def negative(logits):
        p = np.exp(logits - scipy.special.logsumexp(logits))
        kl = [np.sum(p * np.log(p / q)) for q in (previous, base_model)]
        return -(p @ f - beta * ((1 - c) * kl[0] + c * kl[1]))

    logits = scipy.optimize.minimize(negative, np.zeros(6), tol=1e-12).x
    policy = np.exp(logits - scipy.special.logsumexp(logits))
    chosen, rejected = np.array([(i, j) for i in range(6) for j in range(6) if i != j]).T
    sides = {"policy": policy, "ref": previous, "base": base_model}
    given = {
        f"{name}_{side}": log_probs(np.log(p[which]))
        for name, p in sides.items()
        for side, which in (("chosen", chosen), ("rejected", rejected))
    }
    losses = rows(objectives.create("spin", beta=beta, base_weight=c), **given)
    np.testing.assert_allclose(losses, np.log1p(np.exp(f[rejected] - f[chosen])), rtol=1e-4)


def test_fictitious_opponent_is_the_mixture_of_models():
    """Two Markov chains over three tokens: enumerate all responses and mix their probabilities."""
    rng = np.random.default_rng(1)
    chains = [rng.dirichlet(np.ones(3), size=4) for _ in range(2)]  # row 3: first token
    responses = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3)
    logits = [np.log(np.stack([c[[3, *r[:-1]]] for r in responses])).astype(np.float32) for c in chains]
    mask = np.ones(responses.shape, np.float32)
    iterates = [objectives.sequence_logps(jnp.asarray(x), responses.astype(np.int32), mask) for x in logits]
    ours = objectives.fictitious_opponent(iterates)
    paths = [np.prod([c[[3, *r[:-1]], r] for r in responses], axis=1) for c in chains]
    np.testing.assert_allclose(np.exp(ours.sum), (paths[0] + paths[1]) / 2, rtol=1e-5)
    np.testing.assert_allclose(np.exp(ours.sum).sum(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(ours.per_token.sum(-1), ours.sum, rtol=1e-5)
    # Next-token probabilities of the mixture: those of the marginals of the mixed responses.
    for prefix in range(3):
        first = responses[:, 0] == prefix
        total = sum(p[first].sum() for p in paths) / 2
        np.testing.assert_allclose(np.exp(ours.per_token[first, 0]), total, rtol=1e-5)


def test_fictitious_opponent_of_one_is_that_one():
    one = draw()["ref_chosen"]
    ours = objectives.fictitious_opponent([one, one, one])
    for field in ("sum", "mean", "count", "per_token", "mask"):
        np.testing.assert_allclose(getattr(ours, field), getattr(one, field), rtol=2e-6, atol=2e-6)
    far = objectives.fictitious_opponent([log_probs([-1e4]), log_probs([-3e4])])
    np.testing.assert_allclose(far.sum, -1e4 - np.log(2), rtol=1e-6)


def test_ema_update():
    with pytest.raises(ValueError, match=r"decay must be in \[0.0, 1.0\], got 1.5"):
        objectives.ema_update({}, {}, decay=1.5)
    old = {"a": jnp.float32([1.0, 2.0]), "b": jnp.bfloat16(4.0)}
    new = {"a": jnp.float32([3.0, -2.0]), "b": jnp.bfloat16(8.0)}
    ours = objectives.ema_update(old, new, decay=0.75)
    np.testing.assert_array_equal(ours["a"], [1.5, 1.0])
    assert ours["b"] == 5.0
    assert ours["b"].dtype == jnp.bfloat16


def spliced(tokens, length, segment, start, end, pad):
    """Lists in place of masks."""
    kept = list(tokens[:length])
    segment = list(segment)[: length - start]
    if end in segment:
        found = kept[:start] + segment[: segment.index(end) + 1]
    else:
        found = kept[:start] + segment + kept[start + len(segment) :]
    return found + [pad] * (len(tokens) - len(found)), len(found)


def test_splice_segment():
    rng, end, pad = np.random.default_rng(2), 1, 0
    cut = jax.jit(jax.vmap(lambda *x: objectives.splice_segment(*x, end_token=end, pad_token=pad)))
    lengths = rng.integers(3, 10, 60)
    starts = np.array([rng.integers(0, n) for n in lengths])
    tokens = np.where(np.arange(9) < lengths[:, None], rng.integers(2, 20, (60, 9)), pad)
    segments = np.where(rng.random((60, 4)) < 0.15, end, rng.integers(20, 30, (60, 4)))
    ours, our_lengths = cut(tokens, lengths, segments, starts)
    want = [spliced(*x, end, pad) for x in zip(tokens.tolist(), lengths, segments, starts, strict=True)]
    np.testing.assert_array_equal(ours, [x for x, _ in want])
    np.testing.assert_array_equal(our_lengths, [n for _, n in want])
    assert len({n - m for n, (_, m) in zip(lengths.tolist(), want, strict=True)}) > 2


def test_buffer_is_a_queue():
    queue = collections.deque(maxlen=5)
    buffer = objectives.ReplayBuffer.create({"x": jax.ShapeDtypeStruct((2,), jnp.int32)}, 5)
    push = jax.jit(lambda b, x: b.push(x))
    for step in range(6):
        batch = np.arange(6, dtype=np.int32).reshape(3, 2) + 10 * step
        if step % 2:
            batch = batch[:2]
        buffer = push(buffer, {"x": batch})
        queue.extend(batch.tolist())
        assert int(buffer.size) == len(queue)
        drawn = buffer.sample(jax.random.key(step), 200)["x"]
        assert {tuple(x) for x in drawn.tolist()} == {tuple(x) for x in queue}
    with pytest.raises(ValueError, match="a batch of 6 examples does not fit a buffer of capacity 5"):
        buffer.push({"x": np.zeros((6, 2), np.int32)})
    with pytest.raises(ValueError, match="capacity must be 1 at least, got 0"):
        objectives.ReplayBuffer.create({"x": jnp.zeros(2)}, 0)


def test_refusals():
    pairs = draw()
    with pytest.raises(ValueError, match=r"base_weight=0\.3 needs base_chosen and base_rejected"):
        objectives.spin(**pairs, base_weight=0.3)
    with pytest.raises(ValueError, match="go together"):
        objectives.spin(**pairs, base_chosen=pairs["ref_chosen"])
    with pytest.raises(ValueError, match="base_weight must be in"):
        objectives.spin(**pairs, **base(), base_weight=1.1)
    with pytest.raises(ValueError, match="one iterate at least"):
        objectives.fictitious_opponent([])
    packed = dataclasses.replace(pairs["ref_chosen"], per_token=jnp.zeros((2, 9)), mask=jnp.zeros((2, 9)))
    with pytest.raises(ValueError, match="packed rows"):
        objectives.fictitious_opponent([packed])

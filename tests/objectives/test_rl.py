"""Advantages and losses of reinforcement learning against float64 loops and torch, and their identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import objectives
from objectives import rl
from objectives.statistics import LogProbs
from tests.objectives.pairs import log_probs

F32 = 2e-6
BATCH, TOKENS = 4, 7


def draw_mask(rng, gaps=True):
    mask = rng.random((BATCH, TOKENS)) < 0.6 if gaps else np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (BATCH, 1))
    mask[:, 2] = True
    return mask


def statistics(per_token, mask) -> LogProbs:
    per_token, mask = jnp.where(mask, per_token, 0.0), jnp.asarray(mask, jnp.float32)
    total, count = jnp.sum(per_token, axis=1), jnp.sum(mask, axis=1)
    return LogProbs(total, total / jnp.maximum(count, 1), count, per_token, mask)


def draw(seed=0, gaps=True, near=1.0):
    """(mask, log-probabilities of three models, one number per token and one per response); the last row is padding."""
    rng = np.random.default_rng(seed)
    mask = draw_mask(rng, gaps)
    mask[-1] = False
    policy = -3 * rng.random((BATCH, TOKENS))
    old, ref = (policy + near * rng.normal(size=policy.shape) for _ in range(2))
    return mask, policy, old, ref, rng.normal(size=(BATCH, TOKENS)), rng.normal(size=BATCH)


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.5), (0.8, 0.0), (0.7, 1.0)])
def test_generalised_advantages(discount, decay):
    rng = np.random.default_rng(1)
    mask = draw_mask(rng)
    rewards, values = rng.normal(size=(2, BATCH, TOKENS))
    want = np.zeros((BATCH, TOKENS))
    for row in range(BATCH):
        tokens = np.flatnonzero(mask[row])
        r, v = rewards[row, tokens], np.append(values[row, tokens], 0.0)
        delta = r + discount * v[1:] - v[:-1]
        for i, t in enumerate(tokens):  # the definition: a sum over all that follows
            want[row, t] = sum((discount * decay) ** (j - i) * delta[j] for j in range(i, len(tokens)))
    poisoned = (np.where(mask, x, np.nan) for x in (rewards, values))
    advantages, returns = rl.generalised_advantages(*map(jnp.asarray, poisoned), mask, discount=discount, decay=decay)
    np.testing.assert_allclose(advantages, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, np.where(mask, want + values, 0), rtol=1e-5, atol=1e-6)


def test_token_rewards():
    rng = np.random.default_rng(2)
    mask = draw_mask(rng)
    rewards, penalties = rng.normal(size=BATCH), rng.normal(size=(BATCH, TOKENS))
    want = np.where(mask, -0.3 * penalties, 0.0)
    for row in range(BATCH):
        want[row, np.flatnonzero(mask[row])[-1]] += rewards[row]
    got = rl.token_rewards(jnp.asarray(rewards), jnp.where(mask, penalties, jnp.nan), mask, kl_weight=0.3)
    np.testing.assert_allclose(got, want, rtol=F32, atol=F32)


def test_advantages_of_groups():
    rewards = np.random.default_rng(3).normal(size=(3, 4))
    rewards[1] = 0.7  # all alike: nothing to learn
    x = torch.tensor(rewards)
    centred = x - x.mean(1, keepdim=True)
    for scale, want in {
        "group": centred / (x.std(1, keepdim=True) + 1e-4),
        "batch": centred / (x.std() + 1e-4),
        "none": centred,
    }.items():
        got = rl.group_advantages(jnp.asarray(rewards), scale=scale)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        assert np.abs(got[1]).max() < 1e-3
    want = [[r - np.delete(row, i).mean() for i, r in enumerate(row)] for row in rewards]
    np.testing.assert_allclose(rl.leave_one_out_advantages(jnp.asarray(rewards)), want, rtol=1e-5, atol=1e-6)
    # The leave-one-out baseline is the group's mean, stretched by G / (G - 1).
    none = rl.group_advantages(jnp.asarray(rewards), scale="none")
    np.testing.assert_allclose(rl.leave_one_out_advantages(jnp.asarray(rewards)), none * 4 / 3, rtol=1e-5, atol=1e-6)


def test_whiten():
    rng = np.random.default_rng(4)
    mask, x = draw_mask(rng), 3 + 2 * rng.normal(size=(BATCH, TOKENS))
    white = np.asarray(rl.whiten(jnp.where(mask, x, jnp.nan), mask))
    assert (white[~mask] == 0).all()
    np.testing.assert_allclose([white[mask].mean(), white[mask].var(ddof=1)], [0, 1], atol=1e-5)
    kept = np.asarray(rl.whiten(jnp.asarray(x), mask, shift_mean=False))
    np.testing.assert_allclose(kept[mask].mean(), x[mask].mean(), rtol=1e-5)


def test_estimates_of_the_divergence():
    """k1 and k3 have the divergence as their exact mean over the policy's tokens; k3 is never negative."""
    rng = np.random.default_rng(5)
    logp, logq = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=9))) for _ in range(2))
    kl = jnp.sum(jnp.exp(logp) * (logp - logq))
    for name in ("k1", "k3"):
        np.testing.assert_allclose(jnp.sum(jnp.exp(logp) * rl.kl_estimate(logp, logq, name)), kl, rtol=1e-5)
    assert (rl.kl_estimate(logp, logq, "k3") >= 0).all()
    np.testing.assert_allclose(rl.kl_estimate(logp, logq, "k2"), (logp - logq) ** 2 / 2, rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: rl.kl_estimate(x, jnp.zeros(()), "k3"))(-1e4))


def test_ppo_is_its_definition():
    mask, policy, old, _, advantages, _ = draw()
    x = torch.tensor(policy, requires_grad=True)
    ratio, a = torch.exp(x - torch.tensor(old)), torch.tensor(advantages)
    terms = torch.maximum(-ratio * a, -torch.clamp(ratio, 0.8, 1.3) * a)
    want = (terms * torch.tensor(mask)).sum()
    want.backward()

    def loss(per_token):
        given = jnp.where(mask, advantages, jnp.nan)
        return objectives.create("ppo", clip_high=0.3)(statistics(per_token, mask), given, statistics(old, mask))

    output = loss(jnp.asarray(policy))
    np.testing.assert_allclose(output.loss_sum, want.detach(), rtol=1e-5)
    assert float(output.weight) == mask.sum()
    clipped = ((torch.clamp(ratio, 0.8, 1.3) - ratio) * -a > 0).numpy() & mask
    assert float(output.metrics["clip_fraction"]) == clipped.sum() > 0
    np.testing.assert_allclose(jax.grad(lambda p: loss(p).loss_sum)(jnp.asarray(policy)), x.grad, rtol=1e-4, atol=1e-6)


def test_value_is_its_definition():
    mask, values, old, returns, _, _ = draw(6)
    x, o, r = (torch.tensor(y) for y in (values, old, returns))
    x.requires_grad_()
    clipped = torch.minimum(torch.maximum(x, o - 0.2), o + 0.2)
    want = (0.5 * torch.maximum((x - r) ** 2, (clipped - r) ** 2) * torch.tensor(mask)).sum()
    want.backward()
    given = [jnp.where(mask, y, jnp.nan) for y in (values, old, returns)]
    loss = objectives.create("clipped_value")
    np.testing.assert_allclose(loss(*given, mask).loss_sum, want.detach(), rtol=1e-5)
    gradient = jax.grad(lambda v: loss(v, *given[1:], mask).loss_sum)(given[0])
    np.testing.assert_allclose(gradient, x.grad, rtol=1e-4, atol=1e-6)


def test_infinite_clips_are_none():
    mask, values, old, returns, _, _ = draw(6)
    value = lambda clip: objectives.create("clipped_value", clip=clip)(values, old, returns, mask)  # noqa: E731
    want = 0.5 * np.sum(np.square(values - returns), where=mask != 0)
    np.testing.assert_allclose(value(np.inf).loss_sum, want, rtol=1e-5)
    assert float(value(np.inf).metrics["clip_fraction"]) == 0.0 < float(value(0.2).metrics["clip_fraction"])
    old, policy = log_probs([-5.0]), log_probs([-1.0])  # a ratio of e^4, beyond any finite clip that one would take
    for high, ratio in ((0.2, 1.2), (np.inf, np.exp(4.0))):
        loss = objectives.create("ppo", clip_high=high)(policy, jnp.ones(policy.per_token.shape), old)
        np.testing.assert_allclose(loss.loss_sum, -ratio, rtol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("aggregation", "max_length"), [("token", None), ("sequence", None), ("length", 9)])
def test_grpo_is_its_definition(level, aggregation, max_length):
    mask, policy, old, ref, _, advantages = draw(7)
    x, total, weight = torch.tensor(policy, requires_grad=True), 0.0, 0.0
    for row in range(BATCH):
        tokens = np.flatnonzero(mask[row])
        if not len(tokens):
            continue
        p, o, q = x[row, tokens], torch.tensor(old[row, tokens]), torch.tensor(ref[row, tokens])
        ratio = torch.exp((p - o).mean().expand(len(tokens)) if level == "sequence" else p - o)
        a = advantages[row]
        terms = torch.maximum(-ratio * a, -torch.clamp(ratio, 0.7, 1.4) * a) + 0.2 * (torch.exp(q - p) - 1 - (q - p))
        total = total + (terms.mean() if aggregation == "sequence" else terms.sum())
        weight += {"token": len(tokens), "sequence": 1, "length": 9}[aggregation]
    total.backward()
    options = {"clip": 0.3, "clip_high": 0.4, "kl_weight": 0.2, "level": level}
    grpo = objectives.create("grpo", **options, aggregation=aggregation, max_length=max_length)

    def loss(per_token):
        return grpo(statistics(per_token, mask), jnp.asarray(advantages), statistics(old, mask), statistics(ref, mask))

    output = loss(jnp.asarray(policy))
    np.testing.assert_allclose(output.loss_sum, total.detach(), rtol=1e-5)
    assert float(output.weight) == weight
    np.testing.assert_allclose(jax.grad(lambda p: loss(p).loss_sum)(jnp.asarray(policy)), x.grad, rtol=1e-4, atol=1e-6)


def test_one_token_and_no_drift():
    """With one token per response all levels and aggregations agree; drawn just now, the gradient is -A d log pi."""
    _, policy, _, _, _, advantages = draw(8)
    one = np.zeros((BATCH, TOKENS), bool)
    one[:, 3] = True

    def loss(p, **options):
        return objectives.grpo(statistics(p, one), jnp.asarray(advantages), **options).loss_sum

    gradients = [
        jax.grad(lambda p, o=options: loss(p, **o))(jnp.asarray(policy))
        for options in (
            {},
            {"level": "sequence"},
            {"aggregation": "sequence"},
            {"aggregation": "length", "max_length": 9},
        )
    ]
    for gradient in gradients:
        np.testing.assert_allclose(gradient, np.where(one, -advantages[:, None], 0), rtol=1e-5, atol=1e-7)


def test_the_policy_finds_the_rewarded_token():
    """Bandits: 16 responses of one token to each of 3 prompts, drawn, judged and learnt from, 60 times."""
    wanted, number = jnp.array([1, 4, 2]), 16

    @jax.jit
    def step(logits, key):
        tokens = jax.random.categorical(key, logits[:, None], axis=-1, shape=(3, number))
        rewards = (tokens == wanted[:, None]).astype(jnp.float32)
        advantages = rl.group_advantages(rewards).reshape(-1)

        def loss(logits):
            repeated = jnp.repeat(logits, number, axis=0)[:, None]
            policy = objectives.sequence_logps(repeated, tokens.reshape(-1, 1), jnp.ones((3 * number, 1)))
            output = objectives.grpo(policy, advantages)
            return output.loss_sum / output.weight

        return logits - 2.0 * jax.grad(loss)(logits), jnp.mean(rewards)

    logits, curve = jnp.zeros((3, 6)), []
    for key in jax.random.split(jax.random.key(0), 60):
        logits, reward = step(logits, key)
        curve.append(float(reward))
    assert np.mean(curve[:3]) < 0.4
    assert np.mean(curve[-5:]) > 0.9


def test_refusals():
    mask, policy, old, ref, _, advantages = draw()
    own, reference = statistics(policy, mask), statistics(ref, mask)
    advantages = jnp.asarray(advantages)
    with pytest.raises(ValueError, match=r"kl_weight=0.1 needs ref"):
        objectives.grpo(own, advantages, kl_weight=0.1)
    with pytest.raises(ValueError, match="max_length goes with aggregation='length'"):
        objectives.grpo(own, advantages, max_length=9)
    with pytest.raises(ValueError, match="max_length must be at least the 7 tokens of a row, got 3"):
        objectives.grpo(own, advantages, aggregation="length", max_length=3)
    with pytest.raises(ValueError, match="level='tokn' is not supported"):
        objectives.grpo(own, advantages, reference, level="tokn")
    with pytest.raises(ValueError, match=r"advantages must have shape \(4,\), got \(4, 7\)"):
        objectives.grpo(own, jnp.asarray(old))
    with pytest.raises(ValueError, match=r"clip must be in \[0.0, 1.0\], got 1.5"):
        objectives.ppo(own, jnp.asarray(old), clip=1.5)
    with pytest.raises(ValueError, match="at least 2 responses each"):
        rl.group_advantages(jnp.ones((3, 1)))
    with pytest.raises(ValueError, match=r"eps must be above 0, got 0\.0"):
        rl.group_advantages(jnp.ones((3, 2)), eps=0.0)  # 0 / 0 of equal rewards
    with pytest.raises(ValueError, match="estimator='k4'"):
        rl.kl_estimate(jnp.ones(2), jnp.ones(2), "k4")

"""Masked diffusion with learnt powers: the bound against torch, its gradient by summing over all noise."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import objectives
from objectives import diffusion
from objectives.learned_diffusion import mask_tokens_by_class
from tests.trees import fast_jit

ROWS, TOKENS, CLASSES = 3, 4, 5


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "logits": 2 * rng.normal(size=(ROWS, TOKENS, CLASSES)).astype(np.float32),
        "logits_again": 2 * rng.normal(size=(ROWS, TOKENS, CLASSES)).astype(np.float32),
        "targets": rng.integers(0, CLASSES, (ROWS, TOKENS)),
        "masked": rng.random((ROWS, TOKENS)) < 0.5,
        "masked_again": rng.random((ROWS, TOKENS)) < 0.5,
        "times": rng.uniform(0.05, 0.95, ROWS).astype(np.float32),
        "powers": rng.uniform(0.3, 3, CLASSES).astype(np.float32),
        "valid": rng.random((ROWS, TOKENS)) < 0.8,
    }


@fast_jit
def compiled(leaves, others):
    loss = lambda leaves: objectives.learned_masked_diffusion(**leaves, **others).loss_sum  # noqa: E731
    return jax.value_and_grad(loss)(leaves)


def value_and_gradients(given):
    names = ("logits", "logits_again", "powers")
    return compiled({k: given[k] for k in names}, {k: v for k, v in given.items() if k not in names})


def equation(given, least):
    """(surrogate whose gradient is wanted, value of the bound), in float64, term by term as in arXiv:2406.04329."""
    x = {k: torch.tensor(v) for k, v in given.items()}
    leaves = {k: x[k].double().requires_grad_() for k in ("logits", "logits_again", "powers")}
    p, t = leaves["powers"], x["times"].double()
    surrogate = value = 0.0
    for b in range(ROWS):
        copies = []
        for logits, masked in ((leaves["logits"], x["masked"]), (leaves["logits_again"], x["masked_again"])):
            loss = log_q = torch.zeros((), dtype=torch.float64)
            for i in range(TOKENS):
                k = int(x["targets"][b, i])
                if not x["valid"][b, i]:
                    continue
                if masked[b, i]:
                    mu = torch.softmax(logits[b, i], -1)
                    loss = loss + (p / t[b] * mu).sum() - p[k] / t[b] * (1 + torch.log(mu[k]))
                    log_q = log_q + torch.log(t[b] ** p[k])
                else:
                    log_q = log_q + torch.log(1 - t[b] ** p[k])
            copies.append((loss, log_q))
        (one, log_one), (two, log_two) = copies
        first = sum(
            least ** p[k] * (torch.log((least**p).sum()) - p[k] * np.log(least))
            for k, valid in zip(x["targets"][b].tolist(), x["valid"][b], strict=True)
            if valid
        )
        value = value + 0.5 * (one + two) + first
        surrogate = surrogate + 0.5 * (one + two) + first + 0.5 * (one - two).detach() * (log_one - log_two)
    surrogate.backward()
    return value.item(), {k: v.grad.numpy() for k, v in leaves.items()}


def test_is_its_definition():
    given = draw()
    want, slopes = equation(given, 0.01)

    def loss(leaves):
        output = objectives.learned_masked_diffusion(**(given | leaves), least_time=0.01)
        return output.loss_sum, output

    leaves = {k: jnp.asarray(given[k]) for k in slopes}
    (value, output), gradients = fast_jit(jax.value_and_grad(loss, has_aux=True))(leaves)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert float(output.weight) == given["valid"].sum()
    for name, slope in slopes.items():
        np.testing.assert_allclose(gradients[name], slope, atol=1e-5 * np.abs(slope).max(), err_msg=name)
    np.testing.assert_allclose(output.metrics["diffusion"] + output.metrics["first"], want, rtol=1e-5)


def test_gradient_of_powers_is_unbiased():
    """The mean of the gradient over all pairs of noise, by their probabilities, is the gradient of the mean loss."""
    rng = np.random.default_rng(3)
    tokens, classes, least = 2, 3, 0.01
    targets, t = np.array([[0, 2]]), np.float32(0.4)
    patterns = [np.array([x]) for x in itertools.product([False, True], repeat=tokens)]
    # a model that answers differently to each pattern
    logits = rng.normal(size=(len(patterns), 1, tokens, classes)).astype(np.float32)
    powers = jnp.asarray(rng.uniform(0.4, 2, classes), jnp.float32)

    def probability(powers, pattern):
        hidden = t ** powers[targets]
        return jnp.prod(jnp.where(pattern, hidden, 1 - hidden))

    def loss(powers, one, two):
        (logits, masked), (logits_again, masked_again) = one, two
        return objectives.learned_masked_diffusion(
            logits, logits_again, targets, masked, masked_again, jnp.full(1, t), powers, least_time=least
        ).loss_sum

    def weighted(powers, copy):  # of a copy and itself the score is 0: the bound alone
        return probability(powers, copy[1]) * loss(powers, copy, copy)

    copies = list(zip(logits, patterns, strict=True))
    chance, gradient, slope = fast_jit(probability), fast_jit(jax.grad(loss)), fast_jit(jax.grad(weighted))
    weights = [np.float64(chance(powers, pattern)) for pattern in patterns]
    want = sum(np.float64(slope(powers, copy)) for copy in copies)
    have = sum(
        weights[i] * weights[j] * np.float64(gradient(powers, copies[i], copies[j]))
        for i, j in itertools.product(range(len(copies)), repeat=2)
    )
    naive = sum(w * np.float64(gradient(powers, copy, copy)) for w, copy in zip(weights, copies, strict=True))
    np.testing.assert_allclose(have, want, rtol=2e-5, atol=1e-6)
    assert np.abs(naive - want).max() > 0.05  # what the score adds is no small thing here


def test_equal_powers_are_the_polynomial_schedule():
    """p everywhere: mu sums to 1, and the bound is that of `masked_diffusion` at every copy."""
    given = draw(4)
    powers = np.full(CLASSES, 1.7, np.float32)
    output = fast_jit(objectives.learned_masked_diffusion)(**(given | {"powers": powers}))
    bound = fast_jit(functools.partial(objectives.masked_diffusion, schedule="polynomial", power=1.7))
    want = sum(
        0.5
        * bound(
            jnp.asarray(given[f"logits{copy}"]), given["targets"], given[f"masked{copy}"], jnp.asarray(given["times"]),
            given["valid"],
        ).loss_sum
        for copy in ("", "_again")
    )  # fmt: skip
    np.testing.assert_allclose(output.metrics["diffusion"], want, rtol=1e-5)
    # before t0 every class is as likely: t0^p log Z per token
    first = given["valid"].sum() * diffusion.LEAST_TIME**1.7 * np.log(CLASSES)
    np.testing.assert_allclose(output.metrics["first"], first, rtol=1e-4)


def test_noise():
    """The share of masked tokens of each class is t^p, to five standard deviations."""
    rng = np.random.default_rng(5)
    tokens, powers = rng.integers(0, 3, (2, 30000)), np.array([0.5, 1.0, 2.0], np.float32)
    times, valid = np.array([0.2, 0.7], np.float32), np.broadcast_to(np.arange(30000) >= 100, (2, 30000))
    noisy, masked = mask_tokens_by_class(jax.random.key(1), tokens, times, 9, jnp.asarray(powers), valid)
    masked = np.asarray(masked)
    np.testing.assert_array_equal(noisy, np.where(masked, 9, tokens))
    assert not masked[:, :100].any()
    for row, t in enumerate(times):
        for k, power in enumerate(powers):
            of_class = masked[row, 100:][tokens[row, 100:] == k]
            p = t**power
            assert abs(of_class.mean() - p) < 5 * np.sqrt(p * (1 - p) / of_class.size)


def test_what_does_not_count_has_no_influence():
    given = draw(6)
    hidden = ~given["valid"]
    poisoned = dict(given)
    for k in ("logits", "logits_again"):
        poisoned[k] = np.where(hidden[..., None], np.nan, given[k])
    poisoned["targets"] = np.where(hidden, 10**6, given["targets"])

    results = [value_and_gradients(x) for x in (given, poisoned)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sums_of_rows_are_the_whole():
    given = draw(7)
    loss = fast_jit(objectives.learned_masked_diffusion)
    whole = loss(**given)
    rows = [loss(**{k: v if k == "powers" else v[b : b + 1] for k, v in given.items()}) for b in range(ROWS)]
    for have, *parts in zip(*map(jax.tree.leaves, (whole, *rows)), strict=True):
        np.testing.assert_allclose(have, sum(parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("power", [1e-3, 50.0])
@pytest.mark.parametrize("time", [1e-3, 0.9999999])
def test_extremes_are_finite(power, time):
    given = draw(8) | {"powers": np.full(CLASSES, power, np.float32), "times": np.full(ROWS, time, np.float32)}
    given["logits"] = 1e3 * given["logits"]
    if time**power == 0 or 1 - np.float32(time) ** np.float32(power) == 0:
        given["masked"] = given["masked_again"] = np.ones((ROWS, TOKENS), bool)  # what such a schedule draws

    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(value_and_gradients(given)))


def test_refusals():
    given = draw()
    for change, message in (
        ({"powers": given["powers"][1:]}, r"powers must have shape \(5,\), got \(4,\)"),
        ({"powers": -given["powers"]}, "powers must be in"),
        ({"least_time": 0.0}, "least_time must be above 0, got 0.0"),
        ({"times": given["times"][1:]}, r"times must have shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            objectives.learned_masked_diffusion(**(given | change))

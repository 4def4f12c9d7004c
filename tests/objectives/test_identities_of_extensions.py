"""The lattice of exact identities: what every extension of DPO reduces to, and values where the margin is 0."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import objectives
from tests.objectives.pairs import draw, log_probs, rows

BETA = 0.3
ONE, ZERO = np.ones(5, np.float32), np.zeros(5, np.float32)


def renamed(seed, **names):
    more = draw(seed)
    return {new: more[old] for new, old in names.items()}


SAMPLED = renamed(11, policy_sampled="policy_chosen", ref_sampled="ref_chosen")
TARGET = renamed(12, policy_target="policy_chosen", ref_target="ref_chosen")
BASE = renamed(13, base_chosen="ref_chosen", base_rejected="ref_rejected")
ONLINE = {f"online_{name}": value for name, value in draw(14).items()}


def guides(pairs):
    return {f"guide_{side}": pairs[f"policy_{side}"] for side in ("chosen", "rejected")}


# Each is DPO: name, extra arguments, options.
IS_DPO = {
    "dpo_shift": ({}, {"shift": 1.0}),
    "mappo": ({"score_chosen": ONE, "score_rejected": ZERO}, {}),
    "tgdpo": (guides, {"guidance": 0.0}),
    "selm": (SAMPLED, {"optimism": 0.0}),
    "wrpo": (TARGET, {"source_weight": 1.0}),
    "mmpo": ({"score_chosen": 1e4 * ONE, "score_rejected": ZERO}, {}),
    "dno": ({"score_chosen": 1e4 * ONE, "score_rejected": ZERO}, {}),
    "cream": ({"consistency": ONE}, {}),
    "spin": ({}, {}),
    "spin of a base without weight": (BASE, {"base_weight": 0.0}),
    "metaapo": (ONLINE | {"weight": ONE}, {}),
    "pessimistic_dpo": ({}, {"pessimism": 0.0}),
    "rpo of one": ({}, {}),
    "rpo_unpaired of one": ({}, {}),
    "rpo_diagonal of one": ({}, {"diagonal_weight": 0.4}),
    "rpo_diagonal": ({}, {"diagonal_weight": 1.0}),
}


def by_row(name, extras, options, pairs):
    """Losses by row and their gradients in the four statistics' sums."""
    loss = objectives.create(name.split(" ")[0], beta=BETA, **options)
    extras = extras(pairs) if callable(extras) else extras
    if "of one" in name:
        return rows(loss, **pairs), None

    def total(pairs):
        return loss(**pairs, **extras).loss_sum

    return rows(loss, **pairs, **extras), jax.grad(total)(pairs)


@pytest.mark.parametrize("name", IS_DPO)
def test_is_dpo(name):
    pairs = draw()
    values, gradients = by_row(name, *IS_DPO[name], pairs)
    want, dpo_gradients = by_row("dpo", {}, {}, pairs)
    np.testing.assert_allclose(values, want, rtol=3e-6)
    if gradients is None or name == "tgdpo":  # of per_token instead of the sums
        return
    for statistic in pairs:
        np.testing.assert_allclose(gradients[statistic].sum, dpo_gradients[statistic].sum, rtol=1e-5, atol=1e-7)


def test_every_objective_of_four_statistics_and_a_log_ratio_is_here():
    """New members of the family join this table or the list of those with another value at 0."""
    others = {"todo", "gpo", "reward_distillation", "metaapo_weights", "mappo_ipo", "mappo_cpo", "mappo_simpo"}
    mine = {name.split(" ")[0] for name in IS_DPO} | others
    modules = ("calibrated", "margins", "mixing", "relative", "self_play", "soft_labels", "token_level")
    registered = {
        name
        for name in objectives.list_objectives("preference")
        if inspect.unwrap(objectives.OBJECTIVES.get(name).function).__module__.split(".")[-1] in modules
    }
    assert registered - mine == {"phantom"}


def same_as_reference(pairs):
    return pairs | {f"policy_{side}": pairs[f"ref_{side}"] for side in ("chosen", "rejected")}


@pytest.mark.parametrize("name", IS_DPO)
def test_a_policy_that_is_its_reference_has_log_two(name):
    extras, options = IS_DPO[name]
    pairs = same_as_reference(draw())
    values, _ = by_row(name, extras, options, pairs)
    np.testing.assert_allclose(values, np.log(2), rtol=1e-6)


def test_values_at_zero():
    pairs, width = same_as_reference(draw()), 0.5
    tie = rows(objectives.create("todo", beta=BETA, tie_width=width), **pairs, tie=ONE > 0)
    np.testing.assert_allclose(tie, -np.log((np.exp(2 * width) - 1) / (1 + np.exp(width)) ** 2), rtol=1e-6)
    win = rows(objectives.create("todo", beta=BETA, tie_width=width), **pairs, tie=ONE < 0)
    np.testing.assert_allclose(win, np.log1p(np.exp(width)), rtol=1e-6)
    gap = {"score_chosen": 3 * ONE, "score_rejected": ONE}
    np.testing.assert_allclose(
        rows(objectives.create("reward_distillation", beta=BETA), **pairs, **gap), 4.0, rtol=1e-6
    )
    np.testing.assert_allclose(rows(objectives.create("gpo", beta=BETA), **pairs, **gap), 10 / BETA**2, rtol=1e-6)
    np.testing.assert_allclose(rows(objectives.create("cream", beta=BETA), **pairs, consistency=0.3 * ONE), np.log(2))


@pytest.mark.parametrize("name", ["dpo_shift", "selm", "wrpo", "spin of a base without weight", "tgdpo", "mmpo"])
def test_schedules_and_microbatches(name):
    """Options may be traced, and the sums of two halves are those of the whole."""
    extras, options = IS_DPO[name]
    pairs = draw(batch=6)
    extras = extras(pairs) if callable(extras) else jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), extras)
    given = pairs | extras
    options = dict.fromkeys(options, 0.4) | {"beta": BETA}
    loss = objectives.OBJECTIVES.get(name.split(" ")[0]).function
    want = loss(**given, **options)
    traced = jax.jit(lambda given, options: loss(**given, **options))(given, options)
    halves = [loss(**jax.tree.map(lambda x, s=s: x[s], given), **options) for s in (slice(0, 2), slice(2, 6))]
    for other in (traced, jax.tree.map(jnp.add, *halves)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-6, atol=1e-6), other, want)


def test_ends_of_mixtures():
    """All weight at the other end: WRPO on the model's own responses, SPIN against the base, MetaAPO on online ones."""
    pairs = draw()

    def value(name, **arguments):
        return float(objectives.create(name, beta=BETA)(**arguments).loss_sum)

    own = pairs | {"policy_chosen": TARGET["policy_target"], "ref_chosen": TARGET["ref_target"]}
    wrpo = float(objectives.wrpo(**pairs, **TARGET, beta=BETA, source_weight=0.0).loss_sum)
    np.testing.assert_allclose(wrpo, value("dpo", **own), rtol=2e-6)
    spin = float(objectives.spin(**pairs, **BASE, beta=BETA, base_weight=1.0).loss_sum)
    base = pairs | {"ref_chosen": BASE["base_chosen"], "ref_rejected": BASE["base_rejected"]}
    np.testing.assert_allclose(spin, value("dpo", **base), rtol=2e-6)
    online = {name.removeprefix("online_"): x for name, x in ONLINE.items()}
    np.testing.assert_allclose(value("metaapo", **pairs, **ONLINE, weight=ZERO), value("dpo", **online), rtol=2e-6)


def test_spin_against_one_iterate_is_spin():
    pairs = draw()
    opponent = {
        f"ref_{side}": objectives.fictitious_opponent([pairs[f"ref_{side}"]] * 3) for side in ("chosen", "rejected")
    }
    np.testing.assert_allclose(
        objectives.spin(**(pairs | opponent)).loss_sum, objectives.spin(**pairs).loss_sum, rtol=1e-6
    )


def test_swapped_labels():
    """Exchanging the responses turns a label p into 1 - p; the difference of DPO both ways is -beta d."""
    pairs = draw()
    swapped = {k: pairs[k.replace("chosen", "#").replace("rejected", "chosen").replace("#", "rejected")] for k in pairs}
    d = sum(np.asarray(pairs[k].sum) * sign for k, sign in zip(pairs, (1, -1, -1, 1), strict=True))
    there, back = (rows(objectives.create("dpo", beta=BETA), **x) for x in (pairs, swapped))
    np.testing.assert_allclose(there - back, -BETA * d, rtol=1e-5, atol=1e-5)
    p = np.random.default_rng(0).random(5).astype(np.float32)
    there, back = objectives.cream(**pairs, consistency=p), objectives.cream(**swapped, consistency=1 - p)
    np.testing.assert_allclose(there.loss_sum, back.loss_sum, rtol=1e-6)
    scores = {"score_chosen": p, "score_rejected": p[::-1]}
    turned = {"score_chosen": p[::-1], "score_rejected": p}
    for name in ("mmpo", "dno", "gpo", "reward_distillation"):
        loss = objectives.create(name)
        np.testing.assert_allclose(loss(**pairs, **scores).loss_sum, loss(**swapped, **turned).loss_sum, rtol=1e-6)
    tie = np.ones(5, bool)
    np.testing.assert_allclose(
        objectives.todo(**pairs, tie=tie).loss_sum, objectives.todo(**swapped, tie=tie).loss_sum, rtol=1e-6
    )


def test_a_shift_of_policy_and_reference_cancels():
    pairs = draw()
    moved = {k: dataclasses.replace(v, sum=v.sum - 2.0) if k.endswith("chosen") else v for k, v in pairs.items()}
    for name, (extras, options) in IS_DPO.items():
        if name in ("tgdpo", "spin of a base without weight") or "of one" in name:
            continue
        loss = objectives.create(name.split(" ")[0], **options)
        np.testing.assert_allclose(loss(**moved, **extras).loss_sum, loss(**pairs, **extras).loss_sum, rtol=1e-5)


def test_no_width_of_ties_is_dpo_for_preferences():
    pairs = draw()
    ours = objectives.todo(**pairs, tie=np.zeros(5, bool), beta=BETA, tie_width=1e-7)
    np.testing.assert_allclose(ours.loss_sum, objectives.dpo(**pairs, beta=BETA).loss_sum, rtol=1e-6)


@pytest.mark.parametrize("name", IS_DPO)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extremes_are_finite(name, size):
    extras, options = IS_DPO[name]
    sums = (size, -size, 0.0, 0.0)
    pairs = {k: log_probs([x] * 5) for k, x in zip(draw(), sums, strict=True)}
    extras = extras(pairs) if callable(extras) else extras
    if "of one" in name:
        pairs = jax.tree.map(lambda x: x[:1], pairs)
    loss = objectives.create(name.split(" ")[0], **options)
    value, gradient = jax.value_and_grad(lambda x: loss(**x, **extras).loss_sum)(pairs)
    assert np.isfinite(value)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))

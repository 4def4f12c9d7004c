"""Losses of responses: what they take of a batch, their reference, drawn responses, padding and microbatches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import objectives
from launch import config as config_lib
from launch import losses, responses, rollout, step
from launch.config import ConfigError
from launch.configs import base
from objectives.registry import OBJECTIVES
from objectives.statistics import collect_logps
from tests.launch.test_step import ROUNDING, model
from tests.trees import FLOAT32_TOLERANCE, assert_close, redraw
from zoo.core.context import SeqContext

REFERENCE_SEED = 11


def draw(rows=4, each=2, length=12, seed=0):
    """A batch of responses; the last row is padding."""
    rng = np.random.default_rng(seed)
    shape = (rows, each, length)
    lengths = rng.integers(5, length + 1, shape[:2])
    segment_ids = (np.arange(length) < lengths[..., None]).astype(np.int32)
    segment_ids[-1] = 0
    first = rng.integers(1, 4, rows)[:, None, None]
    return {
        "tokens": rng.integers(4, 64, shape, dtype=np.int32),
        "targets": rng.integers(4, 64, shape, dtype=np.int32),
        "loss_mask": (segment_ids * (np.arange(length) >= first)).astype(np.float32),
        "segment_ids": segment_ids,
        "positions": (np.arange(length) * segment_ids).astype(np.int32),
        "index": np.arange(rows, dtype=np.int32),
    }


@functools.cache
def parameters(seed):
    return redraw(model().param_specs(), seed)


@jax.jit
def logps_of_rows(params, tokens, positions, segment_ids, targets, mask):
    ctx = SeqContext(positions=positions, segment_ids=segment_ids)
    logits = model().apply(params, tokens, ctx=ctx).logits
    return collect_logps(objectives.token_logps(logits, targets, mask), mask)


def logps_of(params, batch, k):
    """LogProbs of response k, by a call of its own."""
    names = ("tokens", "positions", "segment_ids", "targets", "loss_mask")
    return logps_of_rows(params, *(batch[name][:, k] for name in names))


def loss_of(name, reference=True, **options):
    objective = objectives.create(name, **options)
    return jax.jit(losses.response_loss(name, objective, model(), model() if reference else None))


def test_a_preference_loss_is_its_objective_of_four_calls():
    batch = draw()
    policy, reference = parameters(1), parameters(REFERENCE_SEED)
    args = [logps_of(p, batch, k) for p in (policy, reference) for k in (0, 1)]
    want = objectives.dpo(*args, beta=0.3)
    got = loss_of("dpo", beta=0.3)(policy, batch, jax.random.key(0), reference)
    assert float(want.weight) == 3.0  # the row of padding is no pair
    jax.tree.map(lambda a, b: assert_close(a, b, FLOAT32_TOLERANCE), got, want)


def test_a_precomputed_reference_is_the_one_that_is_computed():
    batch, policy, reference = draw(), parameters(1), parameters(REFERENCE_SEED)
    want = loss_of("dpo")(policy, batch, jax.random.key(0), reference)
    kept = np.stack([logps_of(reference, batch, k).per_token for k in (0, 1)], axis=1)
    got = loss_of("dpo", reference=False)(policy, {**batch, "ref_logps": kept}, jax.random.key(0))
    jax.tree.map(lambda a, b: assert_close(a, b, FLOAT32_TOLERANCE), got, want)


def test_labelled_responses_take_mismatched_pairs_and_labels():
    batch = {**draw(), "label": np.array([1, 0, 1, 0], np.float32)}
    policy, reference = parameters(1), parameters(REFERENCE_SEED)
    p, p_kl, r, r_kl = (logps_of(m, batch, k) for m in (policy, reference) for k in (0, 1))
    want = objectives.kto(p, r, batch["label"], p_kl, r_kl)
    got = loss_of("kto")(policy, batch, jax.random.key(0), reference)
    jax.tree.map(lambda a, b: assert_close(a, b, FLOAT32_TOLERANCE), got, want)


def test_the_reference_has_no_gradient():
    gradient = jax.grad(lambda ref: loss_of("dpo")(parameters(1), draw(), jax.random.key(0), ref).loss_sum)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient(parameters(REFERENCE_SEED))))


def test_microbatches_of_pairs_are_the_whole_batch():
    batch, reference = draw(rows=8), parameters(REFERENCE_SEED)
    loss = losses.response_loss("dpo", objectives.create("dpo"), model(), model())

    def summed(count):
        one = lambda p, b, k: loss(p, b, k, reference)  # noqa: E731
        return jax.jit(lambda p: step.summed_gradients(one, p, batch, jax.random.key(0), count))(parameters(1))

    jax.tree.map(lambda a, b: assert_close(a, b, 10 * ROUNDING), summed(4), summed(1))


def test_rewards_are_scores_after_the_last_token():
    batch, params = draw(), parameters(1)
    scores = jax.jit(functools.partial(responses.scores, model()))(params, batch)
    for row in range(3):
        for k in range(2):
            size = int(batch["segment_ids"][row, k].sum())
            alone = model().apply(params, batch["tokens"][row, k, :size][None]).logits[0, -1, responses.REWARD_TOKEN]
            assert_close(scores[row, k], alone, FLOAT32_TOLERANCE)
    objective = objectives.create("bradley_terry")
    output = jax.jit(losses.reward_loss("bradley_terry", objective, model()))(params, batch, jax.random.key(0))
    want = np.sum(np.logaddexp(0, -np.float64(scores[:3, 0] - scores[:3, 1])))
    assert_close(output.loss_sum, want, FLOAT32_TOLERANCE)
    assert float(output.weight) == 3
    # A tie is half a preference, or an outcome of its own.
    tie = np.float32([0, 1, 0, 0])
    for name, given in {
        "bradley_terry": {"label": 1 - tie[:3] / 2},
        "bradley_terry_ties": {"outcome": np.array([1, 0, 1])},
    }.items():
        objective = objectives.create(name)
        output = jax.jit(losses.reward_loss(name, objective, model()))(params, {**batch, "tie": tie}, jax.random.key(0))
        assert_close(output.loss_sum, objective(scores[:3, 0], scores[:3, 1], **given).loss_sum, FLOAT32_TOLERANCE)
        assert float(output.weight) == 3


def test_a_policy_learns_from_what_was_drawn():
    batch = draw(each=3)
    rng = np.random.default_rng(5)
    advantages = rng.standard_normal((4, 3)).astype(np.float32)
    old = np.stack([logps_of(parameters(2), batch, k).per_token for k in range(3)], axis=1)
    rewards = rng.uniform(size=(4, 3)).astype(np.float32)
    given = {**batch, "advantages": advantages, "old_logps": old, "rewards": rewards}
    output = loss_of("grpo", reference=False)(parameters(1), given, jax.random.key(0))
    total = count = 0.0
    for k in range(3):
        new, before = logps_of(parameters(1), batch, k), logps_of(parameters(2), batch, k)
        ratio = np.exp(np.float64(new.per_token) - np.float64(before.per_token))
        a = advantages[:, k, None]
        each = np.maximum(-ratio * a, -np.clip(ratio, 0.8, 1.2) * a) * batch["loss_mask"][:, k]
        total, count = total + each.sum(), count + batch["loss_mask"][:, k].sum()
    assert_close(output.loss_sum, total, 1e-5)
    assert float(output.weight) == count
    assert_close(output.metrics["reward"] / output.weight, rewards[:3].mean(), FLOAT32_TOLERANCE)


def test_what_stands_in_padding_and_prompts_changes_nothing():
    batch, reference = draw(), parameters(REFERENCE_SEED)
    other = {key: value.copy() for key, value in batch.items()}
    other["tokens"][batch["segment_ids"] == 0] = 5
    other["targets"][batch["loss_mask"] == 0] = 10**6
    a, b = (loss_of("simpo", reference=False)(parameters(1), each, jax.random.key(0)) for each in (batch, other))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert reference is not None


def test_every_registered_preference_objective_of_pairs_runs_by_name_alone():
    batch = {**draw(), "scores": np.random.default_rng(0).uniform(size=(4, 2)).astype(np.float32)}
    policy, reference = parameters(1), parameters(REFERENCE_SEED)
    given = {"policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "score_chosen", "score_rejected"}
    policy_logps, ref_logps = (
        jax.jit(lambda p: jnp.stack([x.per_token for x in responses.logps(model(), p, batch)], axis=1))(each)
        for each in (policy, reference)
    )
    batch["ref_logps"], served = ref_logps, []
    with pytest.MonkeyPatch.context() as patch:  # the model's part is the same for all: once is enough
        patch.setattr(responses, "logps", lambda model, params, batch, _: responses.by_response(batch, policy_logps))
        for name in objectives.list_objectives("preference"):
            if {each for each in OBJECTIVES.get(name).inputs if not each.startswith("[")} <= given:
                loss = losses.response_loss(name, objectives.create(name), model(), None)
                output = loss(policy, batch, jax.random.key(0))
                assert np.isfinite(output.loss_sum), name
                served.append(name)
            else:
                with pytest.raises(ConfigError, match="needs"):
                    losses.response_loss(name, objectives.create(name), model(), None)(
                        policy, {k: v for k, v in batch.items() if k != "scores"}, jax.random.key(0)
                    )
    assert len(served) > 30, served


def config_of(**changes):
    config = config_lib.to_dict(base.get_config())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return config


def test_what_does_not_go_together_is_refused():
    none = (model(), None, None)
    with pytest.raises(ConfigError, match=r"'dpo' needs config\.teacher"):
        losses.make(config_of(objective={"name": "dpo"}), model(), None, None)
    for name in ("vector_regression", "info_nce", "rerouting", "melle"):
        with pytest.raises(ConfigError, match="which no run gives it yet"):
            losses.make(config_of(objective={"name": name}), model(), None, None)
    assert [name for name in objectives.list_objectives() if losses.takes_ties(name)] == [
        "todo", "bradley_terry", "bradley_terry_ties",
    ]  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"'bradley_terry_ranking' would take a tie for a preference.*bradley_terry_t"
    ):
        losses.make(config_of(objective={"name": "bradley_terry_ranking"}, data={"source": {"ties": True}}), *none)
    with pytest.raises(ConfigError, match="reads none"):
        losses.make(config_of(teacher={"name": "initial"}), model(), None, None)
    with pytest.raises(ConfigError, match=r"grpo.*'policy'"):
        rollout.check(config_of(objective={"name": "grpo"}), "rl")
    with pytest.raises(ConfigError, match="takes 'none' or 'teacher'"):
        rollout.check(config_of(rollout={"name": "policy"}), "language_model")
    for key, value in {"samples": 1, "max_tokens": 0, "temperature": 0.0}.items():
        with pytest.raises(ConfigError, match=key):
            rollout.check(config_of(objective={"name": "grpo"}, rollout={"name": "policy", key: value}), "rl")
    for key in ("reward", "advantages"):
        with pytest.raises(ValueError, match=key):
            rollout.check(config_of(objective={"name": "grpo"}, rollout={"name": "policy", key: "gruop"}), "rl")

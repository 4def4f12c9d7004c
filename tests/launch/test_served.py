"""Objectives that a run serves beside next tokens and responses: each against its objective on calls of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import objectives
from launch import losses, step
from launch import optimizer as optimizer_lib
from launch.config import ConfigError
from launch.text_losses import BESIDE, MASK_TOKEN
from objectives import LossOutput, diffusion, learned_diffusion
from objectives.language_model import hide_tokens
from objectives.registry import OBJECTIVES
from objectives.statistics import collect_logps
from tests.launch.test_alignment import REFERENCE_SEED, config_of, draw, parameters
from tests.launch.test_step import ROUNDING, draw_batch, model
from tests.trees import FLOAT32_TOLERANCE, assert_close, redraw
from zoo.core.context import SeqContext
from zoo.core.params import Spec

KEY = jax.random.key(3)


@functools.cache
def outputs():
    """(parameters, rows, tokens) -> the model's output, compiled once for a shape."""

    def run(params, rows, tokens):
        ctx = SeqContext(positions=rows["positions"], segment_ids=rows["segment_ids"])
        output = model().apply(params, tokens, ctx=ctx, inputs=True)
        return output.logits, output.aux

    return jax.jit(run)


def logits_of(params, rows, tokens=None):
    return outputs()(params, rows, rows["tokens"] if tokens is None else tokens)[0]


def served(name, plain=None, **options):
    """The loss that a config with this objective gives, jitted, without the choice of a teacher."""
    config = config_of(objective={"name": name, **options}, **(plain or {}))
    objective, given = losses._split(config)
    kind = losses.kind_of(name)
    assert kind is not None
    return jax.jit(kind.build(losses.Parts(name, objective, given, config, model(), model())))


def with_gradient(name, **options):
    """(parameters, batch) -> the output and the gradient of its loss, compiled as one."""
    loss = served(name, **options)

    def both(params, batch):
        def one(params):
            output = loss(params, batch, KEY)
            return output.loss_sum, output

        gradient, output = jax.grad(one, has_aux=True)(params)
        return output, gradient

    return jax.jit(both)


def same(got, want, tolerance=FLOAT32_TOLERANCE):
    assert_close(got.loss_sum, want.loss_sum, tolerance)
    assert_close(got.weight, want.weight, tolerance)
    for name, value in want.metrics.items():
        assert_close(got.metrics[name], value, tolerance)


def rows_of(batch):
    return {key: batch[key][:, 0] for key in ("tokens", "targets", "loss_mask", "segment_ids", "positions")}


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_quality_weighs_examples_and_tokens_of_packed_rows(packed):
    batch = draw_batch() if packed else draw(each=1)
    rows = batch if packed else rows_of(batch)
    quality = np.random.default_rng(1).uniform(size=rows["tokens"].shape if packed else 4).astype(np.float32)
    got = served("weighted_cross_entropy", normalise="plain")(parameters(1), {**batch, "quality": quality}, KEY)
    args = (logits_of(parameters(1), rows), rows["targets"], rows["loss_mask"], quality)
    same(got, objectives.create("weighted_cross_entropy", normalise="plain")(*args))
    with pytest.raises(ConfigError, match="needs 'quality', which"):
        served("weighted_cross_entropy")(parameters(1), batch, KEY)


def test_prompts_weigh_otherwise_than_responses():
    batch = draw(each=1)
    prompt = batch["loss_mask"] * (np.arange(12) < 6)
    got = served("instruction_modelling", prompt_weight=0.25)(parameters(1), {**batch, "prompt_mask": prompt}, KEY)
    rows = rows_of(batch)
    response = rows["loss_mask"] - prompt[:, 0]
    logits = logits_of(parameters(1), rows)
    same(got, objectives.instruction_modelling(logits, rows["targets"], response, prompt[:, 0], prompt_weight=0.25))
    assert float(got.weight) == response.sum() + 0.25 * prompt.sum()


def test_hidden_tokens_are_predicted_where_they_stand():
    batch, options = draw_batch(), {"rate": 0.4, "keep": 0.2, "replace": 0.3}
    valid = batch["loss_mask"] != 0
    tokens, selected = hide_tokens(KEY, batch["targets"], valid, mask_token=9, vocab_size=64, **options)
    assert 0 < np.sum(selected) < valid.sum()
    logits = logits_of(parameters(1), batch, tokens)
    got = served("masked_language_model", mask_token=9, **options)(parameters(1), batch, KEY)
    same(got, objectives.cross_entropy(logits, batch["targets"], selected))
    plain = config_of(objective={"name": "masked_language_model"})
    assert not losses.codes_text(plain), "the loss is of some tokens given others: no code length"
    assert losses.codes_text(config_of())


def test_masked_diffusion_in_steps_draws_their_times():
    batch = draw(rows=8, each=1)
    rows = rows_of(batch)
    of_times, of_masks = jax.random.split(KEY)
    times, valid = diffusion.draw_times(of_times, 8, steps=4), rows["loss_mask"] != 0
    assert {*(4 * np.asarray(times)).tolist()} == {1.0, 2.0, 3.0, 4.0}
    noisy, masked = diffusion.mask_tokens(of_masks, rows["targets"], times, MASK_TOKEN, valid)
    objective = objectives.create("masked_diffusion", mask_token=MASK_TOKEN, steps=4)
    want = objective(logits_of(parameters(1), rows, noisy), rows["targets"], masked, times, valid)
    assert_close(served("masked_diffusion", steps=4)(parameters(1), batch, KEY).loss_sum, want.loss_sum, ROUNDING)


@pytest.mark.slow
def test_learnt_powers_are_of_all_classes_but_the_mask_token():
    batch = draw_batch()
    batch["targets"] = np.where(batch["targets"] == MASK_TOKEN, 5, batch["targets"])
    config = config_of(objective={"name": "learned_masked_diffusion"})
    specs = losses.beside(config, model())
    raw = redraw(specs, 4)[BESIDE]["power"]
    assert raw.shape == (63,)
    assert_close(jax.nn.softplus(specs[BESIDE]["power"].init(KEY, (), jnp.float32)), 1.0, FLOAT32_TOLERANCE)
    of_times, *of_copies = jax.random.split(KEY, 3)
    times, valid = diffusion.draw_times(of_times, 8), batch["loss_mask"] != 0
    # The same with classes that count from 1 behind the mask token, which is moved to the front.
    powers, labels = jax.nn.softplus(raw), batch["targets"] - (batch["targets"] > MASK_TOKEN)
    order = np.delete(np.arange(64), MASK_TOKEN)
    copies = []
    for key in of_copies:
        _, masked = learned_diffusion.mask_tokens_by_class(key, jnp.asarray(labels), times, MASK_TOKEN, powers, valid)
        tokens = jnp.where(masked, MASK_TOKEN, batch["targets"])
        copies.append((logits_of(parameters(1), batch, tokens)[..., order], masked))
    (a, m), (b, n) = copies
    got, gradient = with_gradient("learned_masked_diffusion")({**parameters(1), BESIDE: {"power": raw}}, batch)
    objective = objectives.create("learned_masked_diffusion")
    same(got, objective(a, b, labels, m, n, times, powers, valid))
    assert np.isfinite(gradient[BESIDE]["power"]).all()
    assert np.any(gradient[BESIDE]["power"])


def test_heads_ahead_are_the_models_own_and_blocks_on_its_hidden_states():
    batch = draw_batch()
    config = config_of(objective={"name": "multi_token_prediction", "heads": 3})
    heads = redraw(losses.beside(config, model()), 4)[BESIDE]["heads"]
    params = {**parameters(1), BESIDE: {"heads": heads}}
    logits, aux = outputs()(parameters(1), batch, batch["tokens"])
    hidden = np.asarray(aux["hidden"], np.float64)
    unembed = np.asarray(parameters(1).get("head", parameters(1)["embedding"].T), np.float64)
    ahead = [np.asarray(logits)]
    for w in np.asarray(heads, np.float64):
        z = hidden @ w
        ahead.append((hidden + z / (1 + np.exp(-z))) @ unembed)
    documents = batch["segment_ids"]
    want = objectives.multi_token_prediction(
        jnp.asarray(np.stack(ahead), jnp.float32), batch["targets"], batch["loss_mask"], documents, weights=(1, 0.5, 2)
    )
    got, gradient = with_gradient("multi_token_prediction", heads=3, weights=(1, 0.5, 2))(params, batch)
    same(got, want, 10 * FLOAT32_TOLERANCE)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    for number in (1, True, 2.5):
        with pytest.raises(ConfigError, match="at least 2"):
            losses.beside(config_of(objective={"name": "multi_token_prediction", "heads": number}), model())


def test_features_of_layers_and_of_what_the_head_reads():
    batch, teacher = draw_batch(), parameters(REFERENCE_SEED)
    (own, aux), (_, of_teacher) = (outputs()(p, batch, batch["tokens"]) for p in (parameters(1), teacher))
    matrix = np.random.default_rng(2).standard_normal((16, 16)).astype(np.float32)
    params = {**parameters(1), BESIDE: {"projection": matrix}}
    mask = batch["loss_mask"]
    wanted = objectives.feature_distillation(aux["hidden"], of_teacher["hidden"], mask, matrix, form="cosine")
    hard = objectives.cross_entropy(own, batch["targets"], mask)
    got = served("feature_distillation", form="cosine", projection=16, ce_weight=0.5)(params, batch, KEY, teacher)
    assert_close(got.loss_sum, wanted.loss_sum + 0.5 * hard.loss_sum, FLOAT32_TOLERANCE)
    assert_close(got.metrics["distance"], wanted.loss_sum, FLOAT32_TOLERANCE)
    (path, index, _), (of_path, of_index, _) = (model().config.in_order()[i] for i in (1, 0))
    first, second = (
        a["inputs"][p.split("/")[0]][p.split("/")[1]][i]
        for a, p, i in ((aux, path, index), (of_teacher, of_path, of_index))
    )
    got = served("feature_distillation", layer=1, teacher_layer=0)(params, batch, KEY, teacher)
    same(got, objectives.feature_distillation(first, second, mask))
    for options, message in (
        ({"layer": 2}, "layer=2 must be below 2"),
        ({"projection": 8}, "to the teacher's; set 16"),
        ({"ce_weight": -1.0}, "ce_weight"),
    ):
        with pytest.raises(ConfigError, match=message):
            served("feature_distillation", **options)


@pytest.mark.slow
def test_function_matching_reads_what_counts():
    batch, teacher = draw_batch(), parameters(REFERENCE_SEED)
    got = served("function_matching", temperature=2.0)(parameters(1), batch, KEY, teacher)
    own, other = (logits_of(p, batch) for p in (parameters(1), teacher))
    same(got, objectives.function_matching(own, other, batch["loss_mask"], temperature=2.0))


@pytest.mark.slow
def test_preference_distillation_is_dpo_against_the_teacher():
    batch, teacher = draw(), parameters(REFERENCE_SEED)
    got = served("preference_distillation", beta=0.3)(parameters(1), batch, KEY, teacher)
    same(got, served("dpo", beta=0.3, nll_weight=1.0)(parameters(1), batch, KEY, teacher))


def mean(output):
    return output.loss_sum / output.weight


@pytest.mark.parametrize(
    ("name", "retain"),
    [
        ("npo", "retain_kl"),
        ("gradient_ascent", "cross_entropy"),
        pytest.param("simnpo", "cross_entropy", marks=pytest.mark.slow),
        pytest.param("npo", "cross_entropy", marks=pytest.mark.slow),
    ],
)
def test_unlearning_divides_each_loss_by_its_own_weight(name, retain):
    kept, gone, teacher = draw_batch(8), draw(rows=3, each=1, seed=5), parameters(REFERENCE_SEED)
    batch = {**kept, **{f"forget_{key}": value for key, value in gone.items()}}
    got = served(name, retain=retain, retain_weight=0.3)(parameters(1), batch, KEY, teacher)
    rows = rows_of(gone)

    def logps(params):
        logits = logits_of(params, rows)
        return collect_logps(objectives.token_logps(logits, rows["targets"], rows["loss_mask"]), rows["loss_mask"])

    given = {"logits": logits_of(parameters(1), rows), "targets": rows["targets"], "loss_mask": rows["loss_mask"]}
    given |= {"policy": logps(parameters(1)), "ref": logps(teacher)}
    forget = objectives.create(name)(**{each: given[each] for each in OBJECTIVES.get(name).inputs})
    own = logits_of(parameters(1), kept)
    nll = objectives.cross_entropy(own, kept["targets"], kept["loss_mask"])
    kl = objectives.retain_kl(own, logits_of(teacher, kept), kept["loss_mask"])
    want = mean(forget) + 0.3 * mean(kl if retain == "retain_kl" else nll)
    assert_close(mean(got), want, FLOAT32_TOLERANCE)
    assert float(got.weight) == kept["loss_mask"].sum() + rows["loss_mask"].sum()
    forget_nll = objectives.cross_entropy(given["logits"], rows["targets"], rows["loss_mask"])
    assert_close(got.metrics["forget_nll"] / got.weight, mean(forget_nll), FLOAT32_TOLERANCE)
    assert_close(got.metrics["retain_nll"] / got.weight, mean(nll), FLOAT32_TOLERANCE)


def test_what_unlearning_needs_is_asked_for():
    forgetting = {"objective": {"name": "simnpo"}, "data": {"forget": {"name": "stdlib"}}}
    for changes, message in (
        ({"objective": {"name": "simnpo"}}, r"'simnpo' needs config\.data\.forget"),
        ({"data": {"forget": {"name": "stdlib"}}}, "'cross_entropy' forgets nothing"),
        ({**forgetting, "accumulation": 2}, r"config\.accumulation=2 must be 1"),
        ({**forgetting, "objective": {"name": "simnpo", "retain": "kl"}}, "retain='kl' is not supported"),
        ({**forgetting, "objective": {"name": "simnpo", "retain_weight": -1}}, "retain_weight=-1"),
        ({**forgetting, "objective": {"name": "simnpo", "retain": "retain_kl"}}, r"needs config\.teacher"),
        ({**forgetting, "objective": {"name": "npo"}}, r"'npo' needs config\.teacher"),
    ):
        with pytest.raises(ConfigError, match=message):
            losses.make(config_of(**changes), model(), None, None)


def test_every_objective_is_served_or_refused_by_name():
    """What no line of the table serves says so; and no line serves nothing."""
    left = set(losses.KINDS)
    refused = []
    for name in objectives.list_objectives():
        entry = OBJECTIVES.get(name)
        if losses.kind_of(name) is None:
            with pytest.raises(ConfigError, match="which no run gives it yet"):
                losses.make(config_of(objective={"name": name}), model(), None, None)
            refused.append(name)
        left -= {(entry.category, " ".join(entry.inputs)), (entry.category, losses.ANY)}
    assert not left
    expected = "info_nce melle rerouting rerouting_retain retain_kl top_k_distillation vector_regression"
    assert sorted(refused) == expected.split()


@pytest.mark.slow
def test_parameters_beside_the_models_are_trained_with_them():
    config = config_of(objective={"name": "multi_token_prediction", "heads": 2})
    specs = {**model().param_specs(), **losses.beside(config, model())}
    rate = jnp.asarray(1e-2)
    optimizer = optax.adam(1e-2)
    loss = served("multi_token_prediction", heads=2)
    train_step = jax.jit(step.make_train_step(loss, optimizer, lambda _: rate))
    state = step.init_state(specs, optimizer, seed=0, ema=False)
    found = []
    for _ in range(8):
        state, metrics = train_step(state, draw_batch())
        found.append(float(metrics["nll_2"]))
    assert found[-1] < 0.9 * found[0]
    assert np.any(state.params[BESIDE]["heads"])


def test_a_rate_follows_the_number_of_tokens():
    """With SGD the update is the gradient times the rate, and the gradient that of a loss per token."""
    updates = {}
    for reference in (0, 16):
        config = {"name": "sgd", "learning_rate": 0.5, "clip_norm": 0.0, "reference_tokens": reference,
                  "schedule": {"name": "constant", "steps": 5}}  # fmt: skip
        optimizer, schedule = optimizer_lib.make(config, {"w": Spec((3,), ("embed",))})

        def loss(params, batch, key):
            del key
            return LossOutput(jnp.sum(batch["x"] * params["w"]), jnp.sum(batch["mask"]))

        state = step.init_state({"w": Spec((3,), ("embed",))}, optimizer, seed=0, ema=False)
        batch = {"x": np.arange(12.0).reshape(4, 3), "mask": np.ones((4, 16))}
        new, _ = jax.jit(step.make_train_step(loss, optimizer, schedule, accumulation=2))(state, batch)
        updates[reference] = np.asarray(new.params["w"])
    assert_close(updates[16], 2 * updates[0], FLOAT32_TOLERANCE)
    assert_close(updates[0], -0.5 * np.arange(12.0).reshape(4, 3).sum(0) / 64, FLOAT32_TOLERANCE)
    for name, value, message in (("sgd", -1, "above 0"), ("schedule_free_sgd", 8, "averages what it steps through")):
        config = {"name": name, "learning_rate": 0.5, "reference_tokens": value, "schedule": config["schedule"]}
        with pytest.raises(ValueError, match=message):
            optimizer_lib.make(config, {"w": Spec((3,), ("embed",))})

"""What no objective can mean is refused by name: options of all that have them, labels, targets, masks, shapes.

Preference objectives of different numbers of responses are in test_every_preference_objective.py, records and
conversations in tests/pipelines.
"""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import objectives
from objectives import OBJECTIVES, LogProbs, checks
from tests.objectives.pairs import inputs_of, log_probs

BATCH, TOKENS, CLASSES = 2, 3, 5
POSITIVE = {
    "beta",
    "tau",
    "temperature",
    "odds_weight",
    "tie_width",
    "score_scale",
    "max_weight",
    "shift",
    "clip",
    "max_nll",
    "power",
    "least_time",
}
UNBOUNDED = {("wpo", "max_weight"), ("clipped_value", "clip")}  # infinity leaves out what they bound
SHARES = {"logit_distillation", "function_matching"}  # their beta is a share, from 0 to 1


def tokens(**more):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(BATCH, TOKENS, CLASSES)).astype(np.float32)
    targets = rng.integers(0, CLASSES, (BATCH, TOKENS))
    return {"logits": jnp.asarray(logits), "targets": jnp.asarray(targets)} | {
        k: jnp.asarray(v) for k, v in more.items()
    }


MASK = np.ones((BATCH, TOKENS), np.float32)
HALF = np.full(BATCH, 0.5, np.float32)
VALUES = {"values": 0 * MASK, "old_values": 0 * MASK, "returns": 0 * MASK, "mask": MASK}
# Inputs of what has targets, and of what has options but takes no statistics.
OF_TARGETS = {
    "cross_entropy": lambda: tokens(loss_mask=MASK),
    "masked_language_model": lambda: tokens(selected=MASK),
    "instruction_modelling": lambda: tokens(response_mask=MASK, prompt_mask=0 * MASK),
    "weighted_cross_entropy": lambda: tokens(loss_mask=MASK, quality=HALF),
    "selective_cross_entropy": lambda: tokens(loss_mask=MASK, ref_nll=MASK),
    "multi_token_prediction": lambda: (lambda x: x | {"logits": x["logits"][None]})(tokens(loss_mask=MASK)),
    "logit_distillation": lambda: tokens(loss_mask=MASK, teacher_logits=tokens()["logits"]),
    "gradient_ascent": lambda: tokens(loss_mask=MASK),
    "masked_diffusion": lambda: tokens(masked=MASK, times=HALF),
    "learned_masked_diffusion": lambda: tokens(
        logits_again=tokens()["logits"], masked=MASK, masked_again=MASK, times=HALF, powers=np.ones(CLASSES)
    ),
}
OTHERS = {
    "function_matching": lambda: {"logits": tokens()["logits"], "teacher_logits": tokens()["logits"]},
    "bradley_terry_ties": lambda: dict(zip(("score_first", "score_second", "outcome"), 3 * [np.zeros(2)], strict=True)),
    "general_preference": lambda: dict.fromkeys(("embedding_chosen", "embedding_rejected"), np.ones((2, 4))),
    "info_nce": lambda: dict.fromkeys(("queries", "keys"), jnp.ones((2, 4))),
    "clipped_value": lambda: VALUES,
    "ppo": lambda: {"policy": log_probs([-1.0, -2.0]), "advantages": jnp.ones((2, 1))},
    "grpo": lambda: {"policy": log_probs([-1.0, -2.0]), "advantages": jnp.ones(2)},
}


def inputs(name):
    made = OF_TARGETS.get(name) or OTHERS.get(name)
    return made() if made else inputs_of(name)


CASES = [
    (name, option)
    for name, entry in OBJECTIVES.items().items()
    for option in sorted(POSITIVE & set(entry.defaults))
    if not (option == "beta" and name in SHARES)
]


@pytest.mark.parametrize(("name", "option"), CASES, ids=lambda x: x)
def test_scales_are_above_zero(name, option):
    for value in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"\b{option} must be above 0,.* got {value}"):
            objectives.create(name, **{option: value})(**inputs(name))
    if (name, option) not in UNBOUNDED:
        with pytest.raises(ValueError, match=rf"\b{option} must be finite, got inf"):
            objectives.create(name, **{option: math.inf})(**inputs(name))


def test_every_beta_is_checked():
    of_beta = {name for name, entry in OBJECTIVES.items().items() if "beta" in entry.defaults}
    assert {name for name, option in CASES if option == "beta"} | SHARES == of_beta
    for name in SHARES:
        for beta in (-0.1, 1.1):
            with pytest.raises(ValueError, match=rf"beta must be in \[0.0, 1.0\], got {beta}"):
                objectives.create(name, beta=beta)(**inputs(name))


def test_a_number_that_is_a_text():
    with pytest.raises(ValueError, match=r"beta must be above 0, got '0.2'; give a number, such as 0.2"):
        objectives.create("dpo", beta="0.2")(**inputs_of("dpo"))
    with pytest.raises(ValueError, match=r"alpha must be in \[0.0, 1.0\], got None; give a number"):
        objectives.create("ld_dpo", alpha=None)(**inputs_of("ld_dpo"))


def test_every_objective_of_targets_is_here():
    takes = {name for name, entry in OBJECTIVES.items().items() if {"logits", "targets"} <= set(entry.inputs)}
    assert takes == set(OF_TARGETS)


@pytest.mark.parametrize("name", OF_TARGETS)
def test_targets_and_masks(name):
    """A counted target outside the vocabulary is an error, and NaN in a traced function; masks have the shape of it."""
    given, function = inputs(name), OBJECTIVES.get(name).function
    assert np.isfinite(function(**given).loss_sum)
    for label in (-1, CLASSES):
        wrong = given | {"targets": given["targets"].at[1, 2].set(label)}
        message = rf"targets\[1, 2\] = {label} is outside the vocabulary, \[0, {CLASSES}\)"
        with pytest.raises(ValueError, match=message):
            function(**wrong)
        assert np.isnan(jax.jit(function)(**wrong).loss_sum)
    mask = next(key for key in given if "mask" in key or key == "selected")
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        function(**given | {mask: given[mask][:, :2]})


# Objective, argument, value, message: eagerly they are refused.
LABELS = [
    ("bradley_terry", "label", [0.5, 2.0], r"label must be in \[0.0, 1.0\] everywhere, got 2.0 at index 1"),
    ("bradley_terry_ties", "outcome", [0, 2], "outcome must be -1, 0 or 1 everywhere, got 2 at index 1"),
    ("binary_principle", "label", [-1.0, 1.0], r"label must be in \[0.0, 1.0\] everywhere, got -1.0 at index 0"),
    ("uncertainty_tuning", "correct", [1, 2], "correct must be 0 or 1 everywhere, got 2 at index 1"),
    ("compression_distance", "answers", [4, 5], r"answers must be in \[0, 4\] everywhere, got 5 at index 1"),
    ("outcome_value", "outcomes", [0, 10], r"outcomes must be in \[0.0, 1.0\] everywhere, got 10 at index 1"),
    (
        "step_values",
        "targets",
        [[0.0, 1.5], [0, 0]],
        r"targets must be in \[-1.0, 1.0\] everywhere, got 1.5 at index \(0",
    ),
    ("masked_diffusion", "times", [0.5, 0.0], "times must be in .* everywhere, got 0.0 at index 1"),
    (
        "learned_masked_diffusion",
        "times",
        [0.5, 1e-5],
        r"times must be in \[0.001, 1.0\] everywhere, got .* at index 1",
    ),
    ("cream", "consistency", 5 * [1.5], r"consistency must be in \[0.0, 1.0\] everywhere, got 1.5 at index 0"),
    ("metaapo", "weight", 5 * [-0.5], r"weight must be in \[0.0, 1.0\] everywhere, got -0.5 at index 0"),
    ("bco", "weights", 5 * [-1.0], "weights must be in .* everywhere, got -1.0 at index 0"),
    ("kto", "desirable", 5 * [3], "desirable must be 0 or 1 everywhere, got 3 at index 0"),
    ("todo", "tie", 5 * [-1], "tie must be 0 or 1 everywhere, got -1 at index 0"),
]
ZERO = np.zeros(2, np.float32)
LABELLED = OTHERS | {
    "bradley_terry": lambda: {"score_chosen": ZERO, "score_rejected": ZERO},
    "binary_principle": lambda: {"logp_yes": ZERO, "logp_no": ZERO},
    "uncertainty_tuning": lambda: {"option_logits": np.zeros((2, 2), np.float32)},
    "compression_distance": lambda: {"base_logits": np.zeros((2, 5)), "logits": np.zeros((2, 5))},
    "outcome_value": lambda: {"values": MASK[:, :2], "mask": MASK[:, :2]},
    "step_values": lambda: {"values": MASK[:, :2], "mask": MASK[:, :2]},
}


@pytest.mark.parametrize(
    ("name", "argument", "value", "message"), LABELS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_labels(name, argument, value, message):
    given = LABELLED[name]() if name in LABELLED else inputs(name)
    with pytest.raises(ValueError, match=message):
        objectives.create(name)(**given | {argument: jnp.asarray(value)})


def test_padding_may_hold_any_label():
    mask = np.array([1, 0])
    given = {"score_first": ZERO, "score_second": ZERO, "outcome": np.array([1, 9]), "mask": mask}
    assert float(objectives.bradley_terry_ties(**given).weight) == 1.0
    # What cannot be looked at must not pass for another outcome.
    assert np.isnan(jax.jit(objectives.bradley_terry_ties)(**given | {"mask": np.array([1, 1])}).loss_sum)
    policy = log_probs([-1.0, 0.0], [1, 0])
    assert np.isfinite(objectives.kto(policy, policy, np.array([1, 7]), kl=jnp.float32(0.0)).loss_sum)


def test_a_response_without_tokens():
    """An error where it is made; in statistics it is padding, which takes no part (all: test_any_mask_is_finite_...)"""
    given, mask = tokens(), MASK * np.array([[1.0], [0.0]])
    with pytest.raises(ValueError, match="row 1 of mask counts no token: a response has at least its end-of-text"):
        objectives.sequence_logps(given["logits"], given["targets"], mask)
    for name in ("dpo", "orpo", "kto", "rpo"):
        entry, found = OBJECTIVES.get(name), inputs_of(name)
        annotations = inspect.get_annotations(entry.function)
        empty = functools.partial(jax.tree.map, jnp.zeros_like)
        padding = {k: empty(x) if annotations[k] is LogProbs else x for k, x in found.items()}
        output = objectives.create(name)(**padding)
        assert (float(output.loss_sum), float(output.weight)) == (0.0, 0.0), name


def test_checks_pass_traced_values():
    jax.jit(lambda x: checks.check_values_in(0.0, 1.0, x=x))(5.0)
    jax.jit(lambda x: checks.check_values_among((0, 1), x=x))(5)
    jax.jit(lambda x: checks.check_positive(x=x))(-1.0)
    checks.check_values_in(0.0, 1.0, where=[True, False], x=np.array([[0.5, 1.0], [9.0, 9.0]]))
    with pytest.raises(ValueError, match=r"x must be in \[0.0, 1.0\] everywhere, got 9.0 at index \(1, 0\)"):
        checks.check_values_in(0.0, 1.0, where=[False, True], x=np.array([[0.5, 1.0], [9.0, 9.0]]))
    with pytest.raises(ValueError, match=r"x must be in \[0.0, inf\) everywhere, got inf at index 1"):
        checks.check_values_in(0.0, math.inf, x=np.array([0.5, math.inf]))

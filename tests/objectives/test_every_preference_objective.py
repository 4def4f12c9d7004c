"""What holds for every registered preference objective, whatever its formula.

Inputs come from the signatures and from `tests.objectives.extras`. Padding is a pair whose mask counts no token.
"""

import functools
from pathlib import Path

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import objectives
from objectives import OBJECTIVES, LogProbs
from tests.objectives.extras import OF_THE_BATCH, VARIANTS
from tests.objectives.pairs import from_tokens, inputs_of, response_of
from tests.trees import assert_close, assert_finite, fast_jit

NAMES = objectives.list_objectives("preference")
CASES = [(name, options) for name in NAMES for options in [{}, *VARIANTS.get(name, [])]]
IDS = [f"{name} {options}" if options else name for name, options in CASES]
BATCH, TOKENS = 6, 9
F32 = 1e-5  # relative, of sums in another order
FAR = 1e4

every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


def split(inputs):
    """(log-probabilities by token, masks, everything else), by argument name."""
    statistics = {name: value for name, value in inputs.items() if isinstance(value, LogProbs)}
    others = {name: value for name, value in inputs.items() if name not in statistics}
    return {n: s.per_token for n, s in statistics.items()}, {n: s.mask for n, s in statistics.items()}, others


@functools.cache
def compiled(case):
    """function(per_token, masks, others) -> (LossOutput, gradient of the loss with respect to per_token)."""
    name, options = CASES[case]
    objective = objectives.create(name, **options)

    def loss(per_token, masks, others):
        output = objective(**{n: from_tokens(per_token[n], masks[n]) for n in per_token}, **others)
        return output.loss_sum, output

    def run(*args):
        (_, output), gradient = jax.value_and_grad(loss, has_aux=True)(*args)
        return output, gradient

    return fast_jit(run)


def evaluate(name, options, *args):
    return compiled(CASES.index((name, options)))(*args)


def on_rows(function, tree):
    return jax.tree.map(lambda x: function(x) if x.ndim > 0 and x.shape[0] == BATCH else x, tree)


def without(masks, rows):
    return {name: mask * (~np.isin(np.arange(BATCH), rows))[:, None] for name, mask in masks.items()}


def mask_of(name, x, masks):
    """The mask of the response whose tokens x [B, T] is about, by the end of its name; None of other arrays."""
    found = [mask for n, mask in masks.items() if name.endswith(response_of(n))]
    return found[0] if x.shape == (BATCH, TOKENS) and found else None


def overwrite(name, x, masks):
    """x with other numbers in padding and in uncounted tokens."""
    if x.ndim == 0 or x.shape[0] != BATCH or x.dtype != jnp.float32:
        return x
    mask = mask_of(name, x, masks)
    return (x if mask is None else jnp.where(mask != 0, x, 7.0)).at[4:].set(7.0)


def right_aligned(name, x, masks):
    """x with the uncounted tokens of a row moved ahead of the others."""
    mask = mask_of(name, x, masks)
    return x if mask is None else jnp.take_along_axis(x, jnp.argsort(mask, axis=-1, stable=True), axis=-1)


@every_case
def test_what_is_padding_has_no_influence(name, options):
    """Other numbers in uncounted tokens and in padding, tokens moved within their row, and rows in another order."""
    per_token, masks, others = split(inputs_of(name, 1, BATCH, TOKENS))
    masks = without(masks, [4, 5])
    want, gradient = evaluate(name, options, per_token, masks, others)
    assert float(want.weight) == BATCH - 2
    assert all(np.shape(leaf) == () and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(want))
    for side, x in gradient.items():
        assert not np.any(np.asarray(x)[np.asarray(masks[side]) == 0]), side
        assert "policy" in side.split("_") or not np.any(x), f"{side} has a gradient"
    wild = {n: jnp.where(masks[n] != 0, x, jnp.nan) for n, x in per_token.items()}
    changed = evaluate(name, options, wild, masks, {n: overwrite(n, x, masks) for n, x in others.items()})
    jax.tree.map(np.testing.assert_array_equal, changed, (want, gradient))
    order = np.array([4, 2, 0, 5, 3, 1])
    moved = [{n: right_aligned(n, x, masks) for n, x in tree.items()} for tree in (per_token, masks, others)]
    got, _ = evaluate(name, options, *on_rows(lambda x: x[order], moved))
    assert_close(got.loss_sum, want.loss_sum, F32, name)


@pytest.mark.parametrize("name", sorted(set(NAMES) - OF_THE_BATCH))
def test_parts_add_up(name):
    per_token, masks, others = split(inputs_of(name, 2, BATCH, TOKENS))
    whole, gradient = evaluate(name, {}, per_token, masks, others)
    parts = [evaluate(name, {}, per_token, without(masks, rows), others) for rows in ([0, 1, 4], [2, 3, 5])]
    output, slopes = jax.tree.map(lambda a, b: a + b, *parts)
    assert float(output.weight) == float(whole.weight)
    for a, b in zip(jax.tree.leaves((output, slopes)), jax.tree.leaves((whole, gradient)), strict=True):
        assert_close(a, b, F32, name, floor=1e-3)


@pytest.mark.parametrize("name", sorted(OF_THE_BATCH & set(NAMES)))
def test_statistics_of_a_batch_leave_padding_out(name):
    """Four pairs with two of padding are the four pairs; all log-ratios lie to one side of the 0 of padding."""
    inputs = inputs_of(name, 7, BATCH, TOKENS)
    inputs["policy_chosen"] = from_tokens(inputs["policy_chosen"].per_token - 5.0, inputs["policy_chosen"].mask)
    per_token, masks, others = split(inputs)
    got, gradient = evaluate(name, {}, per_token, without(masks, [0, 3]), others)
    rows = np.array([1, 2, 4, 5])
    want, slopes = evaluate(name, {}, *on_rows(lambda x: x[rows], [per_token, masks, others]))
    gradient = on_rows(lambda x: x[rows], gradient)
    for a, b in zip(jax.tree.leaves((got, gradient)), jax.tree.leaves((want, slopes)), strict=True):
        assert_close(a, b, F32, name, floor=1e-3)


@every_case
def test_far_log_ratios_are_finite(name, options):
    per_token, masks, others = split(inputs_of(name, 3, BATCH, TOKENS))
    rng = np.random.default_rng(4)
    for spread in (0.0, 2.0 * FAR):
        far = {n: jnp.float32(-spread * rng.integers(0, 2, x.shape) / TOKENS) for n, x in per_token.items()}
        assert_finite({"of": evaluate(name, options, far, masks, others)}, f"{name} {options} at {spread}")
    # Sums that lie FAR apart in every combination of signs, one token each.
    single = {n: mask * (np.arange(TOKENS) == 0) for n, mask in masks.items()}
    ends = {n: jnp.where(rng.random((BATCH, 1)) < 0.5, -FAR, 0.0) * jnp.ones((1, TOKENS)) for n in per_token}
    assert_finite({"of": evaluate(name, options, ends, single, others)}, f"{name} {options}")


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name):
    inputs = inputs_of(name)
    statistics = [key for key, value in inputs.items() if isinstance(value, LogProbs)]
    short = inputs | {statistics[-1]: jax.tree.map(lambda x: x[:3], inputs[statistics[-1]])}
    with pytest.raises(ValueError, match=rf"{statistics[-1]} has 3 responses, \w+ has 5"):
        objectives.create(name)(**short)
    with pytest.raises(ValueError, match=f"{statistics[0]} must be LogProbs"):
        objectives.create(name)(**inputs | {statistics[0]: inputs[statistics[0]].sum})


def test_proofs_exist():
    for name, entry in OBJECTIVES.items().items():
        file, _, function = entry.proof.partition("::")
        path = Path(__file__).parent / file
        assert path.exists(), f"{name}: no file {file}"
        assert f"def {function}(" in path.read_text(), f"{name}: no test {entry.proof}"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(NAMES), batch=st.integers(1, 5), tokens=st.integers(1, 8))
def test_any_shape_gives_float32_scalars(name, batch, tokens):
    inputs = inputs_of(name, 0, batch, tokens)
    output = jax.eval_shape(lambda inputs: objectives.create(name)(**inputs), inputs)
    assert all(leaf.shape == () and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(output))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=st.sampled_from(range(len(CASES))),
    masks=hnp.arrays(np.bool_, (2, BATCH, TOKENS)),
    low=st.sampled_from([0.0, -1e-7, -1.0, -88.0, -3e3]),
    seed=st.integers(0, 9),
)
def test_any_mask_is_finite_and_counts_its_pairs(case, masks, low, seed):
    per_token, drawn, others = split(inputs_of(CASES[case][0], seed, BATCH, TOKENS))
    responses = sorted({response_of(n) for n in drawn})
    given_masks = {n: jnp.float32(masks[responses.index(response_of(n)) % 2]) for n in drawn}
    per_token = {n: jnp.where(x < -1.5, low, x) for n, x in per_token.items()}
    output, gradient = compiled(case)(per_token, given_masks, others)
    assert_finite({"output": output, "gradient": gradient}, IDS[case])
    if set(responses) <= {"", "chosen", "rejected"}:
        assert float(output.weight) == masks.any(-1)[: len(responses)].all(0).sum()

"""Selective language modelling against sorted lists, and where its scopes agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import objectives
from objectives.selective import select_tokens
from tests.objectives.test_cross_entropy import F32
from tests.objectives.test_cross_entropy import draw as draw_logits
from tests.trees import fast_jit

ROWS, TOKENS = 4, 6


def draw(seed):
    logits, targets, _ = draw_logits(seed, shape=(ROWS, TOKENS))
    rng = np.random.default_rng(seed + 100)
    mask = (rng.random((ROWS, TOKENS)) < 0.7).astype(np.float32)
    mask[0] *= 0  # padding
    return logits, targets, mask, rng.uniform(0, 6, (ROWS, TOKENS)).astype(np.float32)


def chosen(excess, mask, ratio, groups):
    """Sorted lists in Python: each group keeps the first of its counted tokens in order of falling excess."""
    keep = np.zeros(mask.shape, bool)
    size = ROWS // groups
    for group in range(groups):
        places = [(b, t) for b in range(group * size, (group + 1) * size) for t in range(TOKENS) if mask[b, t]]
        places.sort(key=lambda place: -excess[place])  # stable
        number = -(-round(ratio * 1000) * len(places) // 1000)  # ceiling, exactly
        for place in places[:number]:
            keep[place] = True
    return keep


@functools.lru_cache
def compiled(*options):
    def loss(logits, ref_nll, targets, mask, ratio):
        output = objectives.selective_cross_entropy(logits, targets, mask, ref_nll, ratio=ratio, **dict(options))
        return output.loss_sum, output

    return fast_jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.6, 1.0])
@pytest.mark.parametrize(
    ("options", "groups"),
    [({}, 1), ({"scope": "sequence"}, ROWS), ({"scope": "device", "devices": 2}, 2), ({"scope": "device"}, 1)],
)
def test_is_its_definition(options, groups, ratio):
    logits, targets, mask, ref_nll = draw(0)
    logs = np.float64(logits) - np.log(np.exp(np.float64(logits)).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logs, targets[..., None], -1)[..., 0]
    keep = chosen(nll - ref_nll, mask, ratio, groups)
    (_, output), (gradient, of_ref) = compiled(*options.items())(logits, ref_nll, targets, mask, ratio)
    np.testing.assert_allclose(output.loss_sum, nll[keep].sum(), rtol=F32)
    assert float(output.weight) == keep.sum()
    np.testing.assert_allclose(output.metrics["excess"], (nll - ref_nll)[keep].sum(), rtol=1e-5)
    np.testing.assert_allclose(output.metrics["nll_all"], (nll * mask).sum(), rtol=F32)
    assert float(output.metrics["weight_all"]) == mask.sum()
    one_hot = np.eye(logits.shape[-1])[targets]
    np.testing.assert_allclose(gradient, keep[..., None] * (np.exp(logs) - one_hot), atol=F32)
    assert not np.any(of_ref)


@pytest.mark.parametrize("scope", ["batch", "sequence", "device"])
def test_of_all_tokens_is_cross_entropy(scope):
    logits, targets, mask, ref_nll = draw(1)
    ours = objectives.selective_cross_entropy(logits, targets, mask, ref_nll, ratio=1.0, scope=scope)
    want = objectives.cross_entropy(logits, targets, mask)
    np.testing.assert_allclose(ours.loss_sum, want.loss_sum, rtol=F32)
    assert float(ours.weight) == float(want.weight)


def test_scopes_with_as_many_groups_agree():
    given = draw(2)
    for scope, devices in (("sequence", ROWS), ("batch", 1)):
        one = objectives.selective_cross_entropy(*given, scope=scope)
        other = objectives.selective_cross_entropy(*given, scope="device", devices=devices)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), one, other))


def test_numbers_of_kept_tokens():
    """Exact ceilings where float32 products are rounded, equal tokens in order, NaN first, -inf before padding."""
    select = fast_jit(lambda ratio: select_tokens(jnp.zeros((1, 1000)), jnp.ones((1, 1000)), ratio, 1))
    for percent in range(1, 101):
        kept = np.asarray(select(percent / 100))
        assert int(kept.sum()) == 10 * percent
        assert kept[0, : 10 * percent].all()
    excess = jnp.array([[1.0, np.nan, 2.0, -np.inf, 0.0]])
    np.testing.assert_array_equal(select_tokens(excess, jnp.ones((1, 5)), 0.2, 1), [[0, 1, 0, 0, 0]])
    mask = jnp.array([[0, 0, 1, 1, 0]])
    np.testing.assert_array_equal(select_tokens(excess, mask, 1.0, 1), [[0, 0, 1, 1, 0]])
    assert int(select_tokens(excess, mask, 0.01, 1).sum()) == 1
    assert int(select_tokens(excess, 0 * mask, 0.5, 1).sum()) == 0


def test_refusals():
    given = draw(3)
    for options, message in (
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\], such as 0.6, got 0.0"),
        ({"scope": "row"}, "scope='row' is not supported"),
        ({"devices": 2}, "devices=2 belongs to scope 'device', got scope 'batch'"),
        ({"scope": "device", "devices": 3}, "3 devices do not divide a batch of 4 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            objectives.selective_cross_entropy(*given, **options)
    with pytest.raises(ValueError, match=r"ref_nll must have shape \(4, 6\), got \(4, 5\)"):
        objectives.selective_cross_entropy(*given[:3], given[3][:, 1:])

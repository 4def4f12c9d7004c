"""DPO with other margins against the equations in torch, values of the authors' code, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import objectives
from objectives.ties import outcome_log_probabilities
from tests.objectives.oracle import check
from tests.objectives.pairs import draw

RNG = np.random.default_rng(3)


def ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected):
    return policy_chosen.sum - ref_chosen.sum.detach(), policy_rejected.sum - ref_rejected.sum.detach()


def dpo_shift(*, beta, shift, **four):
    h_w, h_l = ratios(**four)
    return -F.logsigmoid(beta * (h_w - shift * h_l))


def todo(tie, *, beta, tie_width, **four):
    h_w, h_l = ratios(**four)
    d = beta * (h_w - h_l)
    win = torch.exp(d) / (torch.exp(d) + np.exp(tie_width))
    draw_ = (np.exp(2 * tie_width) - 1) / ((1 + torch.exp(tie_width + d)) * (1 + torch.exp(tie_width - d)))
    return -torch.log(torch.where(tie, draw_, win))


def selm(policy_sampled, ref_sampled, *, beta, optimism, **four):
    h_w, h_l = ratios(**four)
    return -F.logsigmoid(beta * (h_w - h_l)) + optimism * beta * (policy_sampled.sum - ref_sampled.sum.detach())


def wrpo(policy_target, ref_target, *, beta, source_weight, **four):
    h_w, h_l = ratios(**four)
    h_t = policy_target.sum - ref_target.sum.detach()
    return -F.logsigmoid(beta * (source_weight * h_w + (1 - source_weight) * h_t - h_l))


def phantom(policy_chosen, policy_rejected, *, beta, margin, nll_weight):
    m_w, m_l = policy_chosen.mean, policy_rejected.mean
    return -nll_weight * m_w - F.logsigmoid(beta * (m_w - m_l) - margin)


def other(*names):
    more = draw(seed=8)
    return {name: more[kind] for name, kind in zip(names, ("policy_chosen", "ref_chosen"), strict=True)}


CASES = {
    "dpo_shift": (dpo_shift, {}, {"beta": 0.3, "shift": 0.7}),
    "todo": (todo, {"tie": np.array([True, False, True, False, False])}, {"beta": 0.3, "tie_width": 0.7}),
    "selm": (selm, other("policy_sampled", "ref_sampled"), {"beta": 0.3, "optimism": 0.2}),
    "wrpo": (wrpo, other("policy_target", "ref_target"), {"beta": 0.3, "source_weight": 0.3}),
    "phantom": (phantom, {}, {"beta": 1.7, "margin": 0.4, "nll_weight": 0.6}),
}


def arguments(name, seed=0):
    return draw(seed) | CASES[name][1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_is_its_definition(name, seed):
    equation, _, options = CASES[name]
    given = arguments(name, seed)
    if name == "phantom":
        given = {k: v for k, v in given.items() if k.startswith("policy")}
    check(objectives.create(name), equation, given, **options)


@pytest.mark.parametrize("width", [0.05, 0.5, 3.0, 100.0])
def test_outcomes_sum_to_one(width):
    x = jnp.asarray([-1e4, -30.0, -1.0, 0.0, 0.3, 20.0, 1e4])
    log_p = outcome_log_probabilities(x, width)
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1.0, rtol=1e-5)
    assert np.isfinite(log_p).all()
    np.testing.assert_allclose(log_p, outcome_log_probabilities(-x, width)[:, ::-1], rtol=1e-6)


def test_refusals():
    pairs, one = draw(), np.ones(5, np.float32)
    for name, options, message in [
        ("dpo_shift", {"shift": 1.5}, r"shift must be in \[0.0, 1.0\], got 1.5"),
        ("dpo_shift", {"shift": 0.0}, "shift must be above 0"),
        ("todo", {"tie": one > 0, "tie_width": 0.0}, "tie_width must be above 0, got 0.0"),
        ("todo", {"tie": one[:3] > 0}, r"tie must have shape \(5,\), got \(3,\)"),
        ("todo", {"tie": 2 * one}, "tie must be 0 or 1 everywhere, got 2.0 at index 0"),
        ("selm", other("policy_sampled", "ref_sampled") | {"optimism": -1.0}, "optimism must be in"),
        (
            "wrpo",
            {"policy_target": draw(batch=3)["policy_chosen"], "ref_target": pairs["ref_chosen"]},
            "has 3 responses",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            objectives.create(name)(**pairs, **options)

"""Exact identities between preference objectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import objectives
from tests.objectives.pairs import STATISTICS, draw, log_probs

F32 = 2e-6  # relative, of the same sums in another order
SWAP = {"policy_chosen": "policy_rejected", "policy_rejected": "policy_chosen"}
SWAP |= {"ref_chosen": "ref_rejected", "ref_rejected": "ref_chosen"}
ONE_EXPONENTIAL_PAIR = {"policy_chosen": -3.0, "policy_rejected": -5.5, "ref_chosen": -4.0, "ref_rejected": -4.5}


def policy_of(pairs):
    return {name: pairs[name] for name in ("policy_chosen", "policy_rejected")}


def zeros(pairs):
    return pairs | {name: jax.tree.map(jnp.zeros_like, pairs[name]) for name in ("ref_chosen", "ref_rejected")}


def value_and_slopes(loss, pairs):
    """The loss, and its gradient with respect to the log-probabilities of each token of the policy."""

    def of(chosen, rejected):
        def rebuild(side, per_token):
            total = (side.mask * per_token).sum(-1)
            return side.replace(per_token=per_token, sum=total, mean=total / jnp.maximum(side.count, 1.0))

        sides = {"policy_chosen": chosen, "policy_rejected": rejected}
        return loss(pairs | {name: rebuild(pairs[name], x) for name, x in sides.items()})

    return jax.value_and_grad(of, argnums=(0, 1))(pairs["policy_chosen"].per_token, pairs["policy_rejected"].per_token)


def of(name, **options):
    return lambda pairs: objectives.create(name, **options)(**pairs).loss_sum


def free(name, **options):
    return lambda pairs: objectives.create(name, **options)(**policy_of(pairs)).loss_sum


def one_token_each(pairs):
    """Means over tokens that are the sums, with the gradients of them."""
    return {name: x.replace(mean=x.sum, count=jnp.ones_like(x.count)) for name, x in pairs.items()}


def one_token(pairs):
    return {name: log_probs(x.sum) for name, x in pairs.items()}


IDENTITIES = {
    "ld_dpo keeps tails": (of("ld_dpo", alpha=1.0), of("dpo")),
    "r_dpo without cost": (of("r_dpo", alpha=0.0), of("dpo")),
    "alpha 0 is the reverse KL": (of("dpo", divergence="alpha", divergence_alpha=0.0), of("dpo")),
    "alpha 1 is the forward KL": (
        of("dpo", divergence="alpha", divergence_alpha=1.0),
        of("dpo", divergence="forward_kl"),
    ),
    "robust without flips": (of("robust_dpo", label_smoothing=0.0), of("dpo")),
    "cpo is dpo without reference": (free("cpo", nll_weight=0.0), lambda pairs: of("dpo")(zeros(pairs))),
    "cpo imitates as dpo does": (free("cpo", nll_weight=0.7), lambda pairs: of("dpo", nll_weight=0.7)(zeros(pairs))),
    "simpo is length-normalised": (
        free("simpo", beta=0.4, gamma=0.0),
        lambda pairs: of("dpo", beta=0.4, length_normalised=True)(zeros(pairs)),
    ),
    "simpo of sums is dpo without reference": (
        lambda pairs: free("simpo", beta=0.4, gamma=0.0)(one_token_each(pairs)),
        lambda pairs: of("dpo", beta=0.4)(zeros(one_token_each(pairs))),
    ),
    "AlphaPO at 0 is simpo": (free("simpo", alpha=1e-6), free("simpo")),
    "tpo of the chosen is cpo": (
        lambda pairs: objectives.tpo(**policy_of(pairs), policy_gold=pairs["policy_chosen"], beta=0.1).loss_sum,
        free("cpo"),
    ),
    "tpo_l of the chosen is simpo": (
        lambda pairs: objectives.tpo_l(**policy_of(pairs), policy_gold=pairs["policy_chosen"], gamma=0.2).loss_sum,
        free("simpo", beta=0.01, gamma=0.2, nll_weight=1.0),
    ),
    "sppo with certain wins": (
        lambda pairs: objectives.sppo(**pairs, prob_chosen=jnp.ones(5), prob_rejected=jnp.zeros(5), beta=0.1).loss_sum,
        of("sppo", beta=0.1),
    ),
    "wpo of what is likely": (
        lambda pairs: (
            objectives.wpo(
                **pairs, **{f"collision_{r}": pairs[f"policy_{r}"].per_token for r in ("chosen", "rejected")}
            ).loss_sum
        ),
        of("dpo"),
    ),
    "smoothing mixes": (
        of("dpo", label_smoothing=0.2),
        lambda pairs: 0.8 * of("dpo")(pairs) + 0.2 * of("dpo")({SWAP[name]: x for name, x in pairs.items()}),
    ),
}


@pytest.mark.parametrize("which", IDENTITIES)
def test_is_the_same_function(which):
    left, right = IDENTITIES[which]
    pairs = draw(7)
    for a, b in zip(*(jax.tree.leaves(value_and_slopes(f, pairs)) for f in (left, right)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=F32)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_transport_of_one_pair_is_dpo(name):
    pairs = jax.tree.map(lambda x: x[:1], draw(8))
    np.testing.assert_allclose(of(name, label_smoothing=0.1)(pairs), of("dpo", label_smoothing=0.1)(pairs), rtol=F32)


def test_transport_sorts():
    """Against sorting in NumPy, with a pair of padding whose sums would be in the middle."""
    pairs = draw(9, batch=6)
    gone = {name: x.replace(count=x.count * (np.arange(6) != 2), mask=x.mask * (np.arange(6) != 2)[:, None])
            for name, x in pairs.items()}  # fmt: skip
    s = {name: np.delete(np.float64(x.sum), 2) for name, x in pairs.items()}
    u = np.sort(s["policy_chosen"] - s["policy_rejected"]) - np.sort(s["ref_chosen"] - s["ref_rejected"])
    h = np.sort(s["policy_chosen"] - s["ref_chosen"]) - np.sort(s["policy_rejected"] - s["ref_rejected"])
    np.testing.assert_allclose(of("aot")(gone), np.log1p(np.exp(-0.1 * u)).sum(), rtol=F32)
    np.testing.assert_allclose(of("aot_unpaired")(gone), np.log1p(np.exp(-0.1 * h)).sum(), rtol=F32)


AT_THE_REFERENCE = {
    "dpo": np.log(2.0),
    "ipo": 1.0 / (4 * 0.1**2),
    "hinge": 1.0,
    "nca": 2 * np.log(2.0),
    "bco_pair": 2 * np.log(2.0),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "aot": np.log(2.0),
    "discopop": 0.5 * np.log(2.0) + 0.5,
    "cell": 0.5 * np.log(2.0) + 0.5,
    "padll": 0.9 * np.log(2.0),
    "sppo": 2 * (0.5 / 0.1) ** 2,
}


@pytest.mark.parametrize("name", AT_THE_REFERENCE)
def test_where_the_policy_is_the_reference(name):
    pairs = draw(10)
    same = pairs | {name: pairs[name.replace("ref", "policy")] for name in STATISTICS[2:]}
    output = objectives.create(name, beta=0.1)(**same)
    np.testing.assert_allclose(output.loss_sum / output.weight, AT_THE_REFERENCE[name], rtol=F32)
    assert float(output.metrics["margin"]) == 0.0
    assert float(output.metrics["accuracy"]) == 0.0


def test_kto_where_the_policy_is_the_reference():
    policy = log_probs([-3.0, -4.0])
    output = objectives.kto(policy, policy, np.array([1, 0]), policy_kl=policy, ref_kl=policy)
    np.testing.assert_allclose(output.loss_sum / output.weight, 0.5, rtol=F32)


def test_slope_of_dpo():
    pairs = one_token(draw(11))
    s = {name: np.float64(x.sum) for name, x in pairs.items()}
    d = s["policy_chosen"] - s["policy_rejected"] - s["ref_chosen"] + s["ref_rejected"]
    _, (chosen, rejected) = value_and_slopes(of("dpo", beta=0.3), pairs)
    want = -0.3 / (1 + np.exp(0.3 * d))
    np.testing.assert_allclose(chosen[:, 0], want, rtol=1e-5)
    np.testing.assert_allclose(rejected[:, 0], -want, rtol=1e-5)


def test_swapping_the_responses():
    """dpo(d) - dpo(-d) = -beta d, and the divergence of EXO turns round with its labels."""
    pairs = draw(12)
    swapped = {SWAP[name]: x for name, x in pairs.items()}
    margin = float(objectives.dpo(**pairs).metrics["margin"])
    np.testing.assert_allclose(of("dpo")(pairs) - of("dpo")(swapped), -margin, rtol=1e-5)
    # exo(d; e) - exo(-d; e) = (2 q - 1) log(e / (1 - e)) for q = sigma(beta d): what is left of e and 1 - e exchanged.
    one = {name: log_probs([x]) for name, x in ONE_EXPONENTIAL_PAIR.items()}
    turned = {SWAP[name]: x for name, x in one.items()}
    q, e = 1 / (1 + np.exp(-0.1 * 2.0)), 0.05
    exo = of("exo", label_smoothing=e)
    np.testing.assert_allclose(exo(one) - exo(turned), (2 * q - 1) * np.log(e / (1 - e)), rtol=1e-5)


def test_what_policy_and_reference_share_cancels():
    """A constant in s_w and ref_w alike leaves objectives of log-ratios as they are, and those of s not."""
    pairs = one_token(draw(13))
    shifted = pairs | {f"{side}_chosen": log_probs(pairs[f"{side}_chosen"].sum - 4.0) for side in ("policy", "ref")}
    for name in ("dpo", "ipo", "hinge", "nca", "bco_pair", "apo_zero", "sppo", "aot_unpaired", "discopop"):
        np.testing.assert_allclose(of(name, beta=0.1)(shifted), of(name, beta=0.1)(pairs), rtol=1e-5, err_msg=name)
    for name in ("cpo", "simpo", "orpo", "asft"):
        assert abs(float(free(name)(shifted) - free(name)(pairs))) > 0.1, name


def test_asft():
    """Two forms of it, and ORPO's: L_ORPO = L_ASFT + lambda log(p_w (1 - p_l) + p_l (1 - p_w)) (arXiv:2502.01237)."""
    rng = np.random.default_rng(14)
    a = {side: -rng.uniform(0.01, 3.0, 6).astype(np.float32) for side in ("chosen", "rejected")}
    pairs = {f"policy_{side}": log_probs(3 * x, np.full(6, 3)) for side, x in a.items()}
    w, r = (np.exp(np.float64(x)) for x in a.values())
    sigma = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    odds = [np.log(p / (1 - p)) for p in (w, r)]
    want = -np.log(w) - 0.3 * (np.log(sigma(odds[0])) + np.log(sigma(-odds[1])))
    asft = objectives.asft(**pairs, odds_weight=0.3).loss_sum
    np.testing.assert_allclose(asft, want.sum(), rtol=1e-5)
    between = 0.3 * np.log(w * (1 - r) + r * (1 - w))
    orpo = objectives.orpo(**pairs, odds_weight=0.3)
    np.testing.assert_allclose(orpo.loss_sum, asft + between.sum(), rtol=1e-5)
    np.testing.assert_allclose(orpo.metrics["log_odds_ratio"], (odds[0] - odds[1]).sum(), rtol=1e-5)


def test_orpo_imitates_the_prompt_if_given():
    pairs = policy_of(draw(15))
    full = draw(16)["policy_chosen"]
    apart = objectives.orpo(**pairs).loss_sum + jnp.sum(pairs["policy_chosen"].mean)
    np.testing.assert_allclose(objectives.orpo(**pairs, policy_full=full).loss_sum, apart - full.mean.sum(), rtol=1e-5)


def test_r_dpo():
    """A cost per token is a reward: DPO whose reference has alpha / beta less for each token of a response."""
    pairs = draw(17)
    costly = pairs | {f"ref_{r}": pairs[f"ref_{r}"].replace(sum=pairs[f"ref_{r}"].sum - 3.0 * pairs[f"ref_{r}"].count)
                      for r in ("chosen", "rejected")}  # fmt: skip
    np.testing.assert_allclose(of("r_dpo", beta=0.2, alpha=0.6)(pairs), of("dpo", beta=0.2)(costly), rtol=1e-5)


def test_r_dpo_has_the_sign_of_a_cost():
    """Five responses: the policy that is best for the reward less alpha n has the loss of preferences by the reward."""
    rng = np.random.default_rng(21)
    beta, alpha, reward, count = 0.4, 0.3, rng.normal(size=5), np.asarray([1, 2, 4, 7, 11])
    ref = np.log(rng.dirichlet(np.ones(5)))
    goal = lambda p: np.sum(p * (reward - alpha * count - beta * (np.log(p) - ref)))  # noqa: E731
    best = np.exp(ref + (reward - alpha * count) / beta)
    best /= best.sum()
    assert all(goal(best) > goal(p) for p in rng.dirichlet(np.ones(5), 200))
    w, r = np.nonzero(~np.eye(5, dtype=bool))
    given = {}
    for side, i in {"chosen": w, "rejected": r}.items():
        given |= {f"policy_{side}": log_probs(np.log(best)[i], count[i]), f"ref_{side}": log_probs(ref[i], count[i])}
    want = np.log1p(np.exp(reward[r] - reward[w])).sum()
    np.testing.assert_allclose(of("r_dpo", beta=beta, alpha=alpha)(given), want, rtol=1e-5)


def test_ld_dpo_discounts_the_tail():
    pairs = draw(18)
    shared = np.minimum(pairs["policy_chosen"].count, pairs["policy_rejected"].count)[:, None]
    s = {}
    for name, x in pairs.items():
        tokens = np.float64(x.per_token)
        s[name] = np.where(np.arange(tokens.shape[1]) < shared, tokens, 0.3 * tokens).sum(-1)
    d = s["policy_chosen"] - s["policy_rejected"] - s["ref_chosen"] + s["ref_rejected"]
    np.testing.assert_allclose(of("ld_dpo", alpha=0.3)(pairs), np.log1p(np.exp(-0.1 * d)).sum(), rtol=1e-5)


def test_wpo_weights():
    pairs = draw(19)
    rng = np.random.default_rng(20)
    collisions = {f"collision_{r}": -rng.uniform(0, 3, (5, 7)).astype(np.float32) for r in ("chosen", "rejected")}
    log_weight, s = 0.0, {name: np.float64(x.sum) for name, x in pairs.items()}
    for r in ("chosen", "rejected"):
        side = pairs[f"policy_{r}"]
        difference = (np.float64(side.per_token) - collisions[f"collision_{r}"]) * np.asarray(side.mask)
        log_weight = log_weight + difference.sum(-1) / np.asarray(side.count)
    loss = np.log1p(np.exp(-0.1 * (s["policy_chosen"] - s["policy_rejected"] - s["ref_chosen"] + s["ref_rejected"])))
    assert (np.exp(log_weight) > 0.5).any()
    for bound in (0.5, np.inf):
        output = objectives.wpo(**pairs, **collisions, max_weight=bound)
        weight = np.minimum(np.exp(log_weight), bound)
        np.testing.assert_allclose(output.loss_sum, (weight * loss).sum(), rtol=1e-5)
        np.testing.assert_allclose(output.metrics["pair_weight"], weight.sum(), rtol=1e-5)

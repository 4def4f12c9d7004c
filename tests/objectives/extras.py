"""What tests that hold for every preference objective need to know of some of them, by name.

A new objective is in those tests by being registered. If it takes more than statistics it needs an entry in EXTRAS.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Extras = Callable[[np.random.Generator, int, int], dict[str, Any]]


def probability(name: str) -> Extras:
    """An array [responses] of numbers in (0, 1), called `name`."""
    return lambda rng, batch, tokens: {name: rng.uniform(0.05, 0.95, batch).astype(np.float32)}


def scores(rng: np.random.Generator, batch: int, tokens: int) -> dict[str, Any]:
    """score_chosen and score_rejected, of which the first is the greater, in [0, 1]."""
    chosen, rejected = rng.uniform(0.5, 1.0, batch), rng.uniform(0.0, 0.5, batch)
    return {"score_chosen": chosen.astype(np.float32), "score_rejected": rejected.astype(np.float32)}


# Further inputs: function(generator, responses, tokens) -> arrays by argument name, float32 where they are real.
# Arrays [responses, ...] have a row per example, all others belong to the batch.
EXTRAS: dict[str, Extras] = {
    "bco": lambda rng, batch, tokens: {
        "desirable": np.arange(batch) % 2 == 0,
        "reward_mean": np.float32(0.3),
        "weights": rng.uniform(0.5, 2.0, batch).astype(np.float32),
    },
    "bco_pair": lambda rng, batch, tokens: {"reward_mean": np.float32(-0.4)},
    "cream": probability("consistency"),
    "dno": scores,
    "gpo": scores,
    "kto": lambda rng, batch, tokens: {"desirable": np.arange(batch) % 2 == 0, "kl": np.float32(0.7)},
    **dict.fromkeys(("mappo", "mappo_cpo", "mappo_ipo", "mappo_simpo"), scores),
    "metaapo": probability("weight"),
    "metaapo_weights": probability("weight"),
    "mmpo": scores,
    "reward_distillation": scores,
    "sppo": lambda rng, batch, tokens: {
        side: rng.random(batch).astype(np.float32) for side in ("prob_chosen", "prob_rejected")
    },
    "todo": lambda rng, batch, tokens: {"tie": np.arange(batch) % 3 == 0},
    "wpo": lambda rng, batch, tokens: {
        side: -rng.uniform(0.0, 4.0, (batch, tokens)).astype(np.float32)
        for side in ("collision_chosen", "collision_rejected")
    },
}

# Options, beside the defaults, under which an objective is another function.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "aot": [{"label_smoothing": 0.2}],
    "cpo": [{"form": "hinge"}, {"form": "ipo"}],
    "dpo": [
        {"label_smoothing": 0.2, "length_normalised": True, "nll_weight": 0.5},
        {"divergence": "forward_kl"},
        {"divergence": "js"},
        {"divergence": "alpha"},
    ],
    "ipo": [{"length_normalised": True}],
    "simpo": [{"alpha": 0.25, "nll_weight": 1.0}, {"alpha": -0.5}],
    "tpo": [{"form": "ipo"}],
}

# Objectives of a whole batch, which are not the sums of those of its parts.
OF_THE_BATCH = {"aot", "aot_unpaired", "aqfl", "aql", "dbaql", "rpo", "rpo_diagonal", "rpo_unpaired"}

# Objectives of which a part has no gradient with respect to the policy on purpose: finite differences see it.
STOPPED = {"metaapo_weights", "wpo"}

"""Preference objectives: functions of the log-probabilities of chosen and rejected responses."""

from objectives.preference.calibrated import mappo, mappo_cpo, mappo_ipo, mappo_simpo
from objectives.preference.curriculum import clear_pairs, curriculum_pairs, ranking_concordance, reward_augmented_pairs
from objectives.preference.discovered import aqfl, aql, cell, dbaql, discopop, padll, pfl
from objectives.preference.dpo import dpo, exo, hinge, ipo, nca, robust_dpo
from objectives.preference.length import ld_dpo, r_dpo
from objectives.preference.margins import dpo_shift, phantom, selm, todo, wrpo
from objectives.preference.mixing import init_mixing, metaapo, metaapo_weights, mixing_weight
from objectives.preference.pointwise import apo_down, apo_zero, bco_pair, sppo
from objectives.preference.reference_free import asft, cpo, orpo, simpo, tpo, tpo_l
from objectives.preference.relative import rpo, rpo_diagonal, rpo_unpaired
from objectives.preference.self_augmentation import ReplayBuffer, ema_update, splice_segment
from objectives.preference.self_play import fictitious_opponent, geometric_mixture, spin
from objectives.preference.soft_labels import (
    cream,
    dno,
    gpo,
    mmpo,
    pessimistic_dpo,
    ranking_consistency,
    reward_distillation,
)
from objectives.preference.token_level import tgdpo
from objectives.preference.transport import aot, aot_unpaired
from objectives.preference.unpaired import bco, kto
from objectives.preference.weighted import wpo
from objectives.preference.zeroth_order import comparison_direction, comparison_step, noisy_pairs

__all__ = [
    "ReplayBuffer",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "aqfl",
    "aql",
    "asft",
    "bco",
    "bco_pair",
    "cell",
    "clear_pairs",
    "comparison_direction",
    "comparison_step",
    "cpo",
    "cream",
    "curriculum_pairs",
    "dbaql",
    "discopop",
    "dno",
    "dpo",
    "dpo_shift",
    "ema_update",
    "exo",
    "fictitious_opponent",
    "geometric_mixture",
    "gpo",
    "hinge",
    "init_mixing",
    "ipo",
    "kto",
    "ld_dpo",
    "mappo",
    "mappo_cpo",
    "mappo_ipo",
    "mappo_simpo",
    "metaapo",
    "metaapo_weights",
    "mixing_weight",
    "mmpo",
    "nca",
    "noisy_pairs",
    "orpo",
    "padll",
    "pessimistic_dpo",
    "pfl",
    "phantom",
    "r_dpo",
    "ranking_concordance",
    "ranking_consistency",
    "reward_augmented_pairs",
    "reward_distillation",
    "robust_dpo",
    "rpo",
    "rpo_diagonal",
    "rpo_unpaired",
    "selm",
    "simpo",
    "spin",
    "splice_segment",
    "sppo",
    "tgdpo",
    "todo",
    "tpo",
    "tpo_l",
    "wpo",
    "wrpo",
]

"""Reward, preference and value models: functions of scores, embeddings, values and answer probabilities."""

from objectives.reward.augmentation import Comparisons, cross_prompt_comparisons, draw_partners, uncertain_comparisons
from objectives.reward.bradley_terry import (
    binary_principle,
    bradley_terry,
    bradley_terry_ranking,
    bradley_terry_ties,
    multi_attribute,
)
from objectives.reward.general_preference import general_preference, general_preference_score, pair_preference
from objectives.reward.uncertainty import (
    CalibrationBins,
    auroc,
    calibration_bins,
    compression_distance,
    epistemic_covariance,
    paired_prediction,
    uncertainty_tuning,
)
from objectives.reward.value import outcome_value, step_values

__all__ = [
    "CalibrationBins",
    "Comparisons",
    "auroc",
    "binary_principle",
    "bradley_terry",
    "bradley_terry_ranking",
    "bradley_terry_ties",
    "calibration_bins",
    "compression_distance",
    "cross_prompt_comparisons",
    "draw_partners",
    "epistemic_covariance",
    "general_preference",
    "general_preference_score",
    "multi_attribute",
    "outcome_value",
    "pair_preference",
    "paired_prediction",
    "step_values",
    "uncertain_comparisons",
    "uncertainty_tuning",
]

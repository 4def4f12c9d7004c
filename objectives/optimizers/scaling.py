"""How learning rates and initialisations follow the length of training, the width and the density of a model."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from objectives.checks import check_positive, check_range
from objectives.optimizers import layout as layout_lib
from objectives.optimizers.layout import Layout
from zoo.core.params import Tree

HORIZON_EXPONENT = 0.32


def horizon_learning_rate(
    learning_rate: float, tokens: float, reference_tokens: float, *, exponent: float = HORIZON_EXPONENT
) -> float:
    """The learning rate of a run of `tokens` from the best one of a run of `reference_tokens` (arXiv:2409.19913).

      lr(D) = B D^-exponent,   so lr = learning_rate (tokens / reference_tokens)^-exponent

    The paper fits such laws to models of 50M to 2.7B parameters, and finds that longer runs want smaller rates whatever
    the model. 0.32 is the exponent that it proposes for all of them, and that of tokens in its law of both sizes,
    1.3192e-5 N^-0.23 D^-0.32 as arXiv:2503.04715 quotes it; Phi-4-Mini (arXiv:2503.01743) takes it from there. Each
    size has an exponent of its own: fit yours with `fit_horizon`.

    Args:
      learning_rate: best one of the reference run, above 0.
      tokens: of the run, above 0.
      reference_tokens: above 0.
      exponent: at least 0.
    """
    check_positive(learning_rate=learning_rate, tokens=tokens, reference_tokens=reference_tokens)
    check_range(0.0, math.inf, exponent=exponent)
    return learning_rate * (tokens / reference_tokens) ** -exponent


def fit_best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The minimum of a parabola in log rate through losses of runs of one length, as the paper estimates it.

    Args:
      rates: learning rates, three or more, above 0.
      losses: final losses.

    Raises:
      ValueError: fewer than three rates, or losses that have no minimum.
    """
    x, y = np.log(np.asarray(rates, np.float64)), np.asarray(losses, np.float64)
    if len(x) < 3 or x.shape != y.shape:
        raise ValueError(f"a parabola needs three rates and as many losses, got {x.size} and {y.size}")
    curvature, slope, _ = np.polyfit(x, y, 2)
    if curvature <= 0:
        raise ValueError("the losses have no minimum in the learning rate: give rates on both sides of the best one")
    return float(np.exp(-slope / (2 * curvature)))


def fit_horizon(tokens: Sequence[float], rates: Sequence[float]) -> tuple[float, float]:
    """(B, b) of lr = B D^-b by least squares in logarithms, from the best rates of two lengths or more."""
    if len(tokens) < 2 or len(tokens) != len(rates):
        raise ValueError(f"a power law needs two lengths and as many rates, got {len(tokens)} and {len(rates)}")
    slope, intercept = np.polyfit(np.log(np.asarray(tokens, np.float64)), np.log(np.asarray(rates, np.float64)), 1)
    return float(np.exp(intercept)), float(-slope)


@dataclasses.dataclass(frozen=True)
class SparseParametrization:
    """Maximal update parametrisation of sparse models, SuPar (arXiv:2405.15743, table 1); density 1 is muP.

    Rates and scales are those of a dense model of the base width, times these. Sparse are the hidden matrices alone;
    a hidden matrix acts as one of width width_multiplier density_multiplier. All as in the authors' code
    (EleutherAI/nanoGPT-mup, branch supar, model.py), whose density multiplier is 1 less the sparsity.

    Attributes:
      width_multiplier: width over base width, m_d.
      density_multiplier: density over base density, m_rho; 1 where nothing is sparse.
    """

    width_multiplier: float
    density_multiplier: float = 1.0

    def __post_init__(self):
        check_positive(width_multiplier=self.width_multiplier, density_multiplier=self.density_multiplier)

    @property
    def hidden_variance(self) -> float:
        """Of the initialisation of hidden matrices: 1 / (m_d m_rho)."""
        return 1.0 / (self.width_multiplier * self.density_multiplier)

    @property
    def hidden_rate(self) -> float:
        """Of Adam's learning rate of hidden matrices: 1 / (m_d m_rho). Embeddings, biases and norms keep theirs."""
        return 1.0 / (self.width_multiplier * self.density_multiplier)

    @property
    def logits(self) -> float:
        """Of the output: 1 / m_d. The head's initialisation and learning rate are those of the base."""
        return 1.0 / self.width_multiplier

    @staticmethod
    def attention(key_width: int) -> float:
        """Scale of attention's scores, 1 / key_width in place of its root."""
        return 1.0 / key_width


def scale_hidden_rates(
    scaling: SparseParametrization, *, layout: Tree | None = None, hidden: Tree | None = None
) -> optax.GradientTransformation:
    """Updates of hidden matrices times `scaling.hidden_rate`; chain it after an optimiser of Adam's kind.

    What the optimiser adds for weight decay is multiplied, too, as in the authors' code.

    Args:
      scaling: of the model.
      layout: which leaves are matrices; a matrix outside the stack of layers (a head) is no hidden one.
      hidden: boolean tree that says so in place of the layout.
    """

    def is_hidden(updates: Any) -> Tree:
        if hidden is not None:
            return hidden
        found = layout_lib.resolve(layout, updates)
        matrix = lambda how: isinstance(how, Layout) and how.stacked and how.is_matrix  # noqa: E731
        return jax.tree.map(matrix, found, is_leaf=layout_lib.is_layout)

    def update(updates: Any, params: Any = None) -> Any:
        del params
        scale = lambda u, yes: (u * scaling.hidden_rate).astype(u.dtype) if yes else u  # noqa: E731
        return jax.tree.map(scale, updates, is_hidden(updates))

    return optax.stateless(update)

"""Distillation: of a teacher's distributions, preferences and features."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_range, check_shape
from objectives.contrastive import unit_vectors
from objectives.language_model import cross_entropy
from objectives.output import LossOutput
from objectives.preference import dpo
from objectives.registry import register
from objectives.statistics import LogProbs, is_concrete
from zoo.core.registry import check_choice


def divergence(log_p: jax.Array, log_q: jax.Array, beta: float) -> jax.Array:
    """Generalised Jensen-Shannon divergence of q from p over the last axis (GKD, arXiv:2306.13649, equation 1).

      beta 0         sum_z p_z (log p_z - log q_z)
      beta 1         sum_z q_z (log q_z - log p_z)
      between        beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q

    The ends are not the limits of what is between, which are 0, but, as in TRL, those of it over beta (1 - beta).

    Args:
      log_p: float[..., Z]; -inf at classes that p excludes.
      log_q: likewise of q.
      beta: in [0, 1].
    """

    def kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
        # A class with a = 0 and log a = -inf adds 0.
        present = log_a > -jnp.inf
        ratio = jnp.where(present, log_a, 0.0) - jnp.where(present, log_b, 0.0)
        return jnp.sum(jnp.exp(log_a) * ratio, axis=-1)

    if beta == 0.0:
        return kl(log_p, log_q)
    if beta == 1.0:
        return kl(log_q, log_p)
    absent = (log_p == -jnp.inf) & (log_q == -jnp.inf)
    log_p, log_q = (jnp.where(absent, -1e30, x) for x in (log_p, log_q))  # e^-1e30 = 0, and differences are finite
    log_m = jnp.logaddexp(math.log(beta) + log_p, math.log1p(-beta) + log_q)
    return beta * kl(log_p, log_m) + (1.0 - beta) * kl(log_q, log_m)


def _log_softmax(x: jax.Array, counted: jax.Array, temperature: jax.Array | float) -> jax.Array:
    x = jnp.where(counted[..., None], x.astype(jnp.float32), 0.0)
    return jax.nn.log_softmax(x / temperature, axis=-1)


def _check_beta(beta: Any) -> None:
    if not is_concrete(beta):
        raise ValueError("beta must be a number: its ends 0 and 1 are other formulas than what is between")
    check_range(0.0, 1.0, beta=beta)


@register(
    "logit_distillation",
    category="distillation",
    papers=("2408.15237", "1503.02531", "2306.13649", "2408.15881"),
    proof="test_distillation.py::test_is_its_definition_with_gradient",
)
def logit_distillation(
    logits: jax.Array,
    targets: jax.Array,
    loss_mask: jax.Array,
    teacher_logits: jax.Array,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    beta: float = 0.0,
) -> LossOutput:
    """Kullback-Leibler divergence of a student from its teacher plus the cross entropy of the targets, as sums.

    With p = softmax(teacher_logits / T), q = softmax(logits / T), T = temperature:

      loss = sum_bt mask_bt [ kl_weight T^2 D_beta(p_bt, q_bt) + ce_weight nll_bt ]

      D_0 = sum_z p_z (log p_z - log q_z), the forward divergence      D_1 = KL(q || p), the reverse one
      D_beta = beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q, Jensen-Shannon (GKD, eq. 1)

    The mimic distillation of LLaVA-MoD (arXiv:2408.15881) is beta 0 with a cross entropy beside it. TRL's GKD leaves
    T^2 out: kl_weight = T^-2 does.

    Computed in float32; T^2 keeps the gradient's scale (arXiv:1503.02531). The divergence is weighted per token: the
    code of Mamba in the Llama divides its sum by the rows alone, which is a kl_weight as many times as large as a row
    has tokens. The teacher gets no gradient. Where the mask is 0, neither logits nor targets reach the loss or its
    gradient.

    Args:
      logits: float[B, T, Z] of the student.
      targets: int[B, T].
      loss_mask: [B, T], weight of each position; 0 leaves it out.
      teacher_logits: float[B, T, Z].
      kl_weight: weight of the divergence.
      ce_weight: weight of the cross entropy.
      temperature: divides both logits in the divergence.
      beta: which divergence, a number in [0, 1].

    Returns:
      LossOutput: weight = sum of the mask; metrics kl (D_beta at the temperature, without T^2), nll and accuracy.

    Raises:
      ValueError: shapes disagree or an option is out of range.

    Reference: arXiv:2408.15237, section 3.
    """
    if teacher_logits.shape != logits.shape:
        raise ValueError(f"teacher_logits must be {logits.shape} as logits, got {teacher_logits.shape}")
    check_range(0.0, math.inf, kl_weight=kl_weight, ce_weight=ce_weight)
    check_positive(temperature=temperature)
    if is_concrete(kl_weight, ce_weight) and kl_weight + ce_weight == 0.0:
        raise ValueError("kl_weight and ce_weight are both 0; one of them must be above 0")
    _check_beta(beta)
    hard = cross_entropy(logits, targets, loss_mask)
    mask = loss_mask.astype(jnp.float32)
    log_p = jax.lax.stop_gradient(_log_softmax(teacher_logits, mask != 0, temperature))
    log_q = _log_softmax(logits, mask != 0, temperature)
    kl = jnp.sum(mask * divergence(log_p, log_q, beta))
    loss = kl_weight * temperature**2 * kl + ce_weight * hard.loss_sum
    return LossOutput(loss, hard.weight, {**hard.metrics, "kl": jax.lax.stop_gradient(kl)})


@register(
    "function_matching",
    category="distillation",
    papers=("2106.05237",),
    proof="test_distillation.py::test_function_matching_is_its_definition",
)
def function_matching(
    logits: jax.Array,
    teacher_logits: jax.Array,
    valid: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    beta: float = 0.0,
) -> LossOutput:
    """Divergence of two classifiers on the same inputs, without labels (arXiv:2106.05237).

      loss = sum_b T^2 D_beta(softmax(teacher_logits_b / T), softmax(logits_b / T)),   T = temperature

    with D of `divergence`, T^2 as in the authors' code. What makes it function matching is outside: teacher and student
    see the very same crop and the very same mixture of images (`mixup`), mixed far from the data, over a long schedule.
    The teacher gets no gradient.

    Args:
      logits: float[..., Z] of the student.
      teacher_logits: float[..., Z].
      valid: [...], 0 at padding, which may be NaN. None = all.
      temperature: T, above 0. The paper tries 1 to 10.
      beta: a number in [0, 1]; the paper has 0.

    Returns:
      LossOutput: weight = number of valid inputs; metrics kl (without T^2) and agreement (of the likeliest classes).

    Raises:
      ValueError: shapes disagree or an option is out of range.
    """
    check_shape(logits.shape, teacher_logits=teacher_logits)
    check_positive(temperature=temperature)
    _check_beta(beta)
    counted = jnp.ones(logits.shape[:-1], bool) if valid is None else valid != 0
    check_shape(logits.shape[:-1], valid=counted)
    log_p = jax.lax.stop_gradient(_log_softmax(teacher_logits, counted, temperature))
    log_q = _log_softmax(logits, counted, temperature)
    kl = jnp.sum(jnp.where(counted, divergence(log_p, log_q, beta), 0.0))
    agree = counted & (jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1))
    metrics = {"kl": kl, "agreement": jnp.sum(agree, dtype=jnp.float32)}
    return LossOutput(temperature**2 * kl, jnp.sum(counted, dtype=jnp.float32), jax.lax.stop_gradient(metrics))


def mixup(key: jax.Array, inputs: jax.Array) -> jax.Array:
    """r inputs + (1 - r) (inputs in another order), r uniform in [0, 1) per input (arXiv:2106.05237).

    Args:
      key: random key.
      inputs: float[B, ...].
    """
    order, share = jax.random.split(key)
    r = jax.random.uniform(share, (inputs.shape[0],) + (1,) * (inputs.ndim - 1)).astype(inputs.dtype)
    return r * inputs + (1 - r) * inputs[jax.random.permutation(order, inputs.shape[0])]


@register(
    "preference_distillation",
    category="distillation",
    papers=("2408.15881",),
    proof="test_distillation.py::test_preference_distillation_is_dpo_with_the_teacher_as_reference",
)
def preference_distillation(
    student_chosen: LogProbs,
    student_rejected: LogProbs,
    teacher_chosen: LogProbs,
    teacher_rejected: LogProbs,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
) -> LossOutput:
    """DPO whose reference is the teacher, plus the loss of the chosen response (LLaVA-MoD, arXiv:2408.15881).

      loss = sp(-beta d) - nll_weight s_w / n_w,   d = (s_w - z_w) - (s_l - z_l), s of the student, z of the teacher

    The student learns to tell good from bad better than the teacher does. `dpo` under the names of distillation.

    Args:
      student_chosen: of the model that is trained.
      student_rejected: likewise.
      teacher_chosen: of the teacher, which gets no gradient.
      teacher_rejected: likewise.
      beta: above 0.
      nll_weight: at least 0.

    Returns:
      LossOutput, as `dpo`.

    Raises:
      ValueError: as `dpo`.
    """
    return dpo(student_chosen, student_rejected, teacher_chosen, teacher_rejected, beta=beta, nll_weight=nll_weight)


@register(
    "feature_distillation",
    category="distillation",
    papers=("1412.6550",),
    proof="test_distillation.py::test_feature_distillation_is_its_definition",
)
def feature_distillation(
    features: jax.Array,
    teacher_features: jax.Array,
    loss_mask: jax.Array,
    projection: jax.Array | None = None,
    *,
    form: str = "mse",
) -> LossOutput:
    """Distance of a student's hidden states from a teacher's (hints, arXiv:1412.6550), as sums.

      f = projection^T features
      mse     loss = sum_bt mask_bt (1 / E) sum_e (f_bte - teacher_bte)^2
      cosine  loss = sum_bt mask_bt (1 - cos(f_bt, teacher_bt))

    Args:
      features: float[B, T, D] of the student's layer.
      teacher_features: float[B, T, E]; no gradient reaches them.
      loss_mask: [B, T], weight of each position; 0 leaves it out, be it NaN.
      projection: float[D, E], learnt with the student. None = none, E = D.
      form: mse or cosine.

    Returns:
      LossOutput: weight = sum of the mask; metrics cosine (of f and the teacher's).

    Raises:
      ValueError: shapes disagree or another form.
    """
    check_choice("form", form, ("mse", "cosine"))
    check_shape(features.shape[:-1], loss_mask=loss_mask)
    width = features.shape[-1] if projection is None else projection.shape[-1]
    if projection is not None:
        check_shape((features.shape[-1], width), projection=projection)
    check_shape((*features.shape[:-1], width), teacher_features=teacher_features)
    mask = loss_mask.astype(jnp.float32)
    f, teacher = (jnp.where((mask != 0)[..., None], x.astype(jnp.float32), 0.0) for x in (features, teacher_features))
    teacher = jax.lax.stop_gradient(teacher)
    if projection is not None:
        f = f @ projection.astype(jnp.float32)
    cosine = jnp.sum(unit_vectors(f) * unit_vectors(teacher), axis=-1)
    loss = jnp.mean(jnp.square(f - teacher), axis=-1) if form == "mse" else 1.0 - cosine
    metrics = {"cosine": jax.lax.stop_gradient(jnp.sum(mask * cosine))}
    return LossOutput(jnp.sum(mask * loss), jnp.sum(mask), metrics)

"""The optimisers of optax, by name.

Those whose `update` needs more than gradients and parameters (the loss: polyak_sgd, momo, lbfgs; a second gradient:
sam, sophia) are not here, for a training step has one gradient and no loss to give them; nor are wrappers (lookahead,
mechanize), which take an optimiser. A leaf that stacks layers is one tensor to those that take norms or factors of
tensors (lamb, lars, novograd, adafactor, sm3); muon alone of these sees its layers. optax keeps moments in the dtype of
the parameters, and dog and prodigy do not leave their start in bfloat16: launch trains in float32.
"""

import functools
import inspect
from typing import Any

import jax
import optax
import optax.contrib

from objectives.optimizers import layout as layout_lib
from objectives.optimizers.layout import Layout
from objectives.optimizers.registry import OPTIMIZERS, Entry
from objectives.optimizers.registry import register as register_builder
from zoo.core.params import Tree

register = functools.partial(register_builder, source="optax")
BATTERY = "test_battery.py::test_every_optimizer_learns"
PARITY = "test_parity.py::test_optax_against_the_authors_packages"
_MASKS = ("mask", "weight_decay_mask")


def _not_an_option(parameter: inspect.Parameter) -> bool:
    """The learning rate, trees over parameters, and what is no data: functions and variadic arguments."""
    structure = parameter.name == "learning_rate" or parameter.name.endswith(("_mask", "_dimension_numbers"))
    variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    return structure or variadic or parameter.name == "mask" or parameter.name.endswith("_fn")


def _add(
    name: str, function: Any, papers: tuple[str, ...], proof: str = BATTERY, evaluation_params: Any = None
) -> None:
    parameters = inspect.signature(function).parameters
    defaults = {key: p.default for key, p in parameters.items() if not _not_an_option(p)}
    mask = next((key for key in _MASKS if key in parameters), None)
    OPTIMIZERS.register(name)(
        Entry(function, papers, proof, defaults, mask, source="optax", evaluation_params=evaluation_params)
    )


@register("adamw", papers=("1711.05101",), proof=BATTERY)
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    mask: Tree | None = None,
) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101): the decay is multiplied by the learning rate.

    b2 and the decay are those of language models (arXiv:2005.14165), not optax's 0.999 and 1e-4.
    """
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)


@register("sgd", papers=(), proof=BATTERY)
def sgd(
    learning_rate: optax.ScalarOrSchedule, *, momentum: float = 0.0, nesterov: bool = False
) -> optax.GradientTransformation:
    """params <- params - learning_rate (momentum trace of) gradient."""
    return optax.sgd(learning_rate, momentum=momentum or None, nesterov=nesterov)


@register("sm3", papers=("1901.11150",), proof=BATTERY)
def sm3(learning_rate: optax.ScalarOrSchedule, *, momentum: float = 0.9) -> optax.GradientTransformation:
    """SM3, with schedules, which optax.sm3 does not take (arXiv:1901.11150)."""
    return optax.chain(optax.scale_by_sm3(momentum), optax.scale_by_learning_rate(learning_rate))


@register("muon", papers=("2409.20325", "2502.16982"), proof="test_battery.py::test_muon_sees_matrices")
def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    ns_steps: int = 5,
    beta: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    consistent_rms: float | None = None,
    adam_b1: float = 0.9,
    adam_b2: float = 0.999,
    adam_learning_rate: float | None = None,
    mask: Tree | None = None,
    layout: Tree | None = None,
) -> optax.GradientTransformation:
    """Muon: momentum orthogonalised by Newton-Schulz, for matrices; Adam for all else (optax.contrib.muon).

    Every layer of a stacked leaf is a matrix of its own.

    Args:
      learning_rate: of the matrices, and of Adam where `adam_learning_rate` is None.
      ns_steps: Newton-Schulz iterations.
      beta: of the momentum.
      weight_decay: of the matrices, times the learning rate.
      nesterov: whether the momentum looks ahead.
      consistent_rms: scales updates by consistent_rms sqrt(max(rows, columns)) (arXiv:2502.16982 has 0.2); None =
        sqrt(max(1, columns / rows)).
      adam_b1: of Adam.
      adam_b2: of Adam.
      adam_learning_rate: of Adam.
      mask: True where the decay applies.
      layout: which leaves are matrices.
    """

    def dimensions(params: Tree) -> Tree:
        return _dimension_numbers(optax.contrib.MuonDimensionNumbers, params, layout)

    return optax.contrib.muon(
        learning_rate,
        ns_steps=ns_steps,
        beta=beta,
        weight_decay=weight_decay,
        weight_decay_mask=mask,
        nesterov=nesterov,
        consistent_rms=consistent_rms,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_learning_rate=adam_learning_rate,
        muon_weight_dimension_numbers=dimensions,
    )


def _dimension_numbers(kind: Any, params: Tree, layout: Tree | None) -> Tree:
    # optax asks again inside, with what is no matrix masked out.
    def numbers(how: Layout, leaf: Any) -> Any:
        split = how.stacked + how.inputs
        return kind(tuple(range(int(how.stacked), split)), tuple(range(split, leaf.ndim))) if how.is_matrix else None

    return jax.tree.map(numbers, layout_lib.resolve(layout, params), params, is_leaf=layout_lib.is_layout)


def schedule_free_evaluation(state: Any, params: Tree) -> Tree:
    """x of schedule-free methods (arXiv:2405.15682): the average of the iterates. `params` are y, where gradients are
    taken."""
    found = _find(state, optax.contrib.ScheduleFreeState)
    return params if found is None else optax.contrib.schedule_free_eval_params(found, params)


def _find(state: Any, kind: type) -> Any:
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return next((leaf for leaf in leaves if isinstance(leaf, kind)), None)


_contrib = optax.contrib
_schedule_free = functools.partial(_add, proof=PARITY, evaluation_params=schedule_free_evaluation)
_add("adam", optax.adam, ("1412.6980",))
_add("nadamw", optax.nadamw, ("1711.05101",))
_add("adamax", optax.adamax, ("1412.6980",))
_add("adafactor", optax.adafactor, ("1804.04235",))
_add("lion", optax.lion, ("2302.06675",))
_add("lamb", optax.lamb, ("1904.00962",))
_add("lars", optax.lars, ("1708.03888",))
_add("adagrad", optax.adagrad, ())
_add("rmsprop", optax.rmsprop, ())
_add("radam", optax.radam, ("1908.03265",))
_add("adabelief", optax.adabelief, ("2010.07468",))
_add("yogi", optax.yogi, ())
_add("novograd", optax.novograd, ("1905.11286",))
_add("adan", optax.adan, ("2208.06677",))
_add("signum", optax.signum, ("1802.04434",))
_schedule_free("schedule_free_adamw", _contrib.schedule_free_adamw, ("2405.15682",))
_schedule_free("schedule_free_sgd", _contrib.schedule_free_sgd, ("2405.15682",))
_add("prodigy", _contrib.prodigy, ("2306.06101",), PARITY)
_add("dadapt_adamw", _contrib.dadapt_adamw, ("2301.07733",), PARITY)
_add("dog", _contrib.dog, ("2302.12022",))
_add("dowg", _contrib.dowg, ("2305.16284",))
_add("adopt", _contrib.adopt, ("2411.02853",))
_add("ademamix", _contrib.ademamix, ("2409.03137",))
_add("simplified_ademamix", _contrib.simplified_ademamix, ("2409.03137", "2502.02431"))
_add("cocob", _contrib.cocob, ("1705.07795",))
_add("madgrad", _contrib.madgrad, ("2101.11075",))
_add("acprop", _contrib.acprop, ("2110.05454",))

"""Adam on a few layers at a time: BAdam, LISA and OwLore.

The parameters must stack their layers (`layout.Layout.stacked`: those of the zoo do, under "layers"); a layer is one
index of that dimension, in all stacked leaves at once, so that one repeat of a pattern of sublayers is one block. The
state holds moments of the layers that are trained now, [active, ...], and no others: whichever these are, shapes stay.
When the choice changes, moments are 0 again and Adam's bias correction starts anew. Updates of frozen layers are 0 to
the bit, and weight decay does not touch them.

What lies outside the stack (embedding, final norm, head, sublayers before and after the repeats) is trained throughout
with moments of its own, or frozen with none. What is saved is the memory of the moments: gradients of stacked layers
come out of a scan, which writes those of all layers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from objectives.checks import check_positive, check_range
from objectives.optimizers import common, galore
from objectives.optimizers import layout as layout_lib
from objectives.optimizers.layout import Layout
from objectives.optimizers.registry import register
from zoo.core.params import Tree
from zoo.core.registry import check_choice

ORDERS = ("random", "ascending", "descending", "fixed")
OUTSIDE = ("trained", "frozen")
# (number of the choice, parameters, layers) -> ids of the layers to train
Choose = Callable[[jax.Array, Any, int], jax.Array]


class LayerwiseState(NamedTuple):
    """State of layer-wise Adam.

    Attributes:
      steps: updates so far.
      choice: number of the choice that is in force; -1 before the first.
      since: updates since it was made.
      ids: layers that are trained, int32 [active].
      outside: updates of what is outside the layers, which is not reset.
      projectors: of stacked matrices, [active, ...], where gradients are projected; else None.
      mu: first moments, [active, ...] of stacked leaves; None of what is frozen.
      nu: second moments likewise.
    """

    steps: jax.Array
    choice: jax.Array
    since: jax.Array
    ids: jax.Array
    outside: jax.Array
    projectors: Any
    mu: Any
    nu: Any


def number_of_layers(params: Tree, layout: Tree) -> int:
    """The size of the dimension that stacks layers.

    Raises:
      ValueError: no leaf stacks layers, or they stack different numbers.
    """
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(layout, is_leaf=layout_lib.is_layout), strict=True)
    sizes = {x.shape[0] for x, how in pairs if how.stacked}
    if len(sizes) != 1:
        raise ValueError(
            f"layer-wise training needs leaves that stack the same number of layers, found {sorted(sizes) or 'none'}; "
            "give layout=optimizers.layout.of_specs(model.param_specs())"
        )
    return sizes.pop()


def _layerwise(
    learning_rate: optax.ScalarOrSchedule,
    choose: Choose,
    *,
    active: int,
    interval: int,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    outside: str,
    mask: Tree | None,
    layout: Tree | None,
    low_rank: tuple[int, int, float] | None = None,
) -> optax.GradientTransformation:
    """Adam on the layers that `choose` names, anew every `interval` updates.

    Args:
      learning_rate: lr.
      choose: of the layers.
      active: how many it names.
      interval: updates between choices.
      b1: of Adam.
      b2: of Adam.
      eps: of Adam.
      weight_decay: decoupled.
      outside: one of OUTSIDE.
      mask: True where the decay applies.
      layout: which leaves stack layers.
      low_rank: (rank, updates between projectors, scale) of GaLore in the layers, or None.
    """
    check_range(1, math.inf, active=active, interval=interval)
    check_range(0.0, 1.0, open_high=True, b1=b1, b2=b2)
    check_positive(eps=eps)
    check_range(0.0, math.inf, weight_decay=weight_decay)
    check_choice("outside", outside, OUTSIDE)
    rank, renew_every, scale = low_rank or (0, 1, 1.0)

    def projected(how: Layout) -> bool:
        return bool(low_rank) and how.stacked and how.is_matrix

    def taken(x: jax.Array, how: Layout, ids: jax.Array) -> jax.Array:
        return jnp.take(x, ids, axis=0) if how.stacked else x

    def init(params: Any) -> LayerwiseState:
        how = layout_lib.resolve(layout, params)
        layers = number_of_layers(params, how)
        check_range(1, layers, active=active)

        def one(x: jax.Array, how: Layout) -> tuple[Any, Any]:
            if not how.stacked and outside == "frozen":
                return None, None
            shape = (active, *x.shape[1:]) if how.stacked else x.shape
            if not projected(how):
                return None, jnp.zeros(shape, common.state_dtype(x))
            shapes = galore.low_shapes(how.matrix_shape(shape), rank, "smaller")
            return tuple(jnp.zeros(s, common.state_dtype(x)) for s in shapes)  # pyright: ignore[reportReturnType]

        projectors, mu = common.map_tuple(2, one, params, how)
        zero = jnp.zeros((), jnp.int32)
        ids = jnp.arange(active, dtype=jnp.int32)
        return LayerwiseState(zero, zero - 1, zero + interval, ids, zero, projectors, mu, jax.tree.map(jnp.copy, mu))

    def update(updates: Any, state: LayerwiseState, params: Any = None) -> tuple[Any, LayerwiseState]:
        params = common.need_params(params)
        layouts = layout_lib.resolve(layout, params)
        layers = number_of_layers(params, layouts)
        switch = state.since >= interval
        choice = state.choice + switch
        ids = jax.lax.cond(switch, lambda: choose(choice, params, layers).astype(jnp.int32), lambda: state.ids)
        since = jnp.where(switch, 0, state.since)
        rate = common.rate_at(learning_rate, state.steps)
        decayed = jax.tree.map(lambda _: True, params) if mask is None else mask

        def one(
            g: jax.Array, x: jax.Array, how: Layout, decays: Any, p: Any, mu: Any, nu: Any
        ) -> tuple[Any, Any, Any, Any]:
            if mu is None:
                return jnp.zeros_like(g), None, None, None
            count = (since if how.stacked else state.outside) + 1
            of_layers = low = taken(g, how, ids).astype(mu.dtype)
            if how.stacked:
                mu, nu = (jnp.where(switch, 0.0, moment) for moment in (mu, nu))
            matrices = of_layers
            if projected(how):
                matrices = of_layers.reshape(how.matrix_shape(of_layers.shape))
                new = lambda: galore.projector(matrices, rank, "smaller").astype(p.dtype)  # noqa: E731
                p = jax.lax.cond(since % renew_every == 0, new, lambda: p)
                low = galore.project(matrices, p, "smaller")
            mu, nu = b1 * mu + (1 - b1) * low, b2 * nu + (1 - b2) * low * low
            step = galore.adam_direction(mu, nu, count, b1, b2, eps)
            if projected(how):
                step = scale * galore.project_back(step, p, matrices.shape, "smaller").reshape(of_layers.shape)
            weights = taken(x, how, ids).astype(step.dtype)
            step = -rate * (step + jnp.where(decays, weight_decay, 0.0) * weights)
            step = step.astype(g.dtype)
            step = jnp.zeros_like(g).at[ids].set(step) if how.stacked else step
            return step, p, mu, nu

        trees = (params, layouts, decayed, state.projectors, state.mu, state.nu)
        step, *rest = common.map_tuple(4, one, updates, *trees)
        steps = common.increment(state.steps)
        return step, LayerwiseState(steps, choice, since + 1, ids, state.outside + 1, *rest)

    return common.transformation(init, update)


def _key(seed: int, number: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), number)


@register("badam", papers=("2404.02827",), proof="test_layers.py::test_badam_against_the_authors_package")
def badam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    interval: int = 100,
    order: str = "random",
    start: int = 0,
    seed: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    outside: str = "frozen",
    mask: Tree | None = None,
    layout: Tree | None = None,
) -> optax.GradientTransformation:
    """BAdam: Adam on one layer for `interval` steps, then on the next (arXiv:2404.02827, algorithm 1).

    Orders as in badam 1.4: "random", a new permutation in every round; "descending" from the last layer; "ascending";
    "fixed", always `start`. There the first block has one step fewer than `interval`; here, as in the paper, all have
    the same. State: the moments of one layer, 8 / L bytes a stacked parameter.

    Args:
      learning_rate: lr.
      interval: K, steps of a block, at least 1; the paper takes 50 to 100.
      order: of the blocks.
      start: the layer of order "fixed".
      seed: of order "random".
      b1: in [0, 1).
      b2: in [0, 1).
      eps: above 0.
      weight_decay: decoupled, times the learning rate, of the layer that is trained.
      outside: whether what is in no layer is "trained" throughout (badam's active_modules) or "frozen".
      mask: True where the decay applies.
      layout: which leaves stack layers.
    """
    check_choice("order", order, ORDERS)
    check_range(0, math.inf, start=start)

    def choose(number: jax.Array, params: Any, layers: int) -> jax.Array:
        del params
        if start >= layers:
            raise ValueError(f"start={start} must be below the number of layers, {layers}")
        turn = number % layers
        block = {
            "random": lambda: jax.random.permutation(_key(seed, number // layers), layers)[turn],
            "ascending": lambda: turn,
            "descending": lambda: layers - 1 - turn,
            "fixed": lambda: jnp.asarray(start),
        }[order]()
        return jnp.reshape(block, (1,))

    return _layerwise(
        learning_rate,
        choose,
        active=1,
        interval=interval,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        outside=outside,
        mask=mask,
        layout=layout,
    )


@register("lisa", papers=("2403.17919",), proof="test_layers.py::test_lisa_against_numpy")
def lisa(
    learning_rate: optax.ScalarOrSchedule,
    *,
    active: int = 2,
    interval: int = 20,
    seed: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Tree | None = None,
    layout: Tree | None = None,
) -> optax.GradientTransformation:
    """LISA: AdamW on `active` layers drawn every `interval` steps, and on all that is in no layer (arXiv:2403.17919).

    Layers are drawn uniformly, without replacement (algorithm 1, whose gamma is `active`); draws and defaults are those
    of the authors' code (OptimalScale/LMFlow, lisa_trainer.py and args.py), where moments of frozen layers stay and go
    on at the next draw of the layer. State: 8 active / L bytes a stacked parameter and 8 bytes of all others.

    Args:
      learning_rate: lr.
      active: gamma, layers that are trained at a time.
      interval: K, steps between draws.
      seed: of the draws.
      b1: in [0, 1).
      b2: in [0, 1).
      eps: above 0.
      weight_decay: decoupled, times the learning rate, of what is trained.
      mask: True where the decay applies.
      layout: which leaves stack layers.
    """

    def choose(number: jax.Array, params: Any, layers: int) -> jax.Array:
        del params
        return jax.random.permutation(_key(seed, number), layers)[:active]

    return _layerwise(
        learning_rate,
        choose,
        active=active,
        interval=interval,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        outside="trained",
        mask=mask,
        layout=layout,
    )


def outlier_share(params: Tree, layout: Tree, threshold: float) -> jax.Array:
    """Share of elements of every layer's matrices with |w| > threshold mean|w|, float32 [L].

    Share and mean are over all matrices of a layer together, as in OWL's code (luuyin/OWL, lib/prune_all.py). The paper
    weighs |w| with the norms of the layer's inputs first, which need data: give what that yields as `scores`.
    """
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(layout, is_leaf=layout_lib.is_layout), strict=True)
    matrices = [jnp.abs(x.reshape(x.shape[0], -1)) for x, how in pairs if how.stacked and how.is_matrix]
    if not matrices:
        raise ValueError("owlore needs stacked matrices, for their outliers; give scores, or a layout with matrices")

    def over_layer(function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        sums = [jnp.sum(function(x.astype(jnp.float32)), axis=1) for x in matrices]
        return jnp.sum(jnp.stack(sums), axis=0) / sum(x.shape[1] for x in matrices)

    least = threshold * over_layer(lambda x: x)[:, None]
    return over_layer(lambda x: (x > least).astype(jnp.float32))


@register("owlore", papers=("2405.18380", "2403.03507"), proof="test_layers.py::test_owlore_draws_by_scores")
def owlore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    active: int = 2,
    interval: int = 50,
    scores: tuple[float, ...] | list[float] | None = None,
    threshold: float = 13.0,
    rank: int = 128,
    update_every: int = 200,
    scale: float = 0.25,
    seed: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    outside: str = "trained",
    mask: Tree | None = None,
    layout: Tree | None = None,
) -> optax.GradientTransformation:
    """OwLore: layers drawn in proportion to their outliers, each trained by GaLore (arXiv:2405.18380).

      p_l = D_l / sum D,   D_l = share of elements above `threshold` times the mean

    `active` layers are drawn without replacement, one after another by p. The authors' code (pixeli99/OwLore) reads D
    from a file of the ratio 13 (metric_cache/llama2_7b_ratio_13.txt), computed once with the norms of inputs (as OWL
    does, arXiv:2310.05175): that is `scores`. Without them D is that of the weights alone when the choice is made, and
    uniform where fewer than `active` layers have outliers.

    Args:
      learning_rate: lr.
      active: gamma, layers that are trained at a time; 5 in the authors' script, 2 by default in their code.
      interval: steps between draws; 50 in the authors' script.
      scores: D of every layer, at least 0, not all 0; None = from the weights.
      threshold: M of the outliers, above 0; 13 by the name of the authors' file.
      rank: of the projections, at least 1.
      update_every: steps between projectors; each choice makes new ones.
      scale: of GaLore's updates.
      seed: of the draws.
      b1: in [0, 1).
      b2: in [0, 1).
      eps: above 0.
      weight_decay: decoupled, times the learning rate, of what is trained.
      outside: whether what is in no layer is "trained" throughout, by Adam, or "frozen".
      mask: True where the decay applies.
      layout: which leaves stack layers and which are matrices.
    """
    check_positive(threshold=threshold)
    galore.check_options(rank, update_every, scale, "smaller")
    if scores is not None and (min(scores, default=-1.0) < 0 or sum(s > 0 for s in scores) < active):
        raise ValueError(f"scores must be at least 0, and above 0 for active={active} layers, got {list(scores)}")

    def choose(number: jax.Array, params: Any, layers: int) -> jax.Array:
        if scores is None:
            given = outlier_share(params, layout_lib.resolve(layout, params), threshold)
            given = jnp.where(jnp.sum(given > 0) >= active, given, jnp.ones(layers))
        elif len(scores) != layers:
            raise ValueError(f"scores has {len(scores)} entries, the parameters have {layers} layers")
        else:
            given = jnp.asarray(scores, jnp.float32)
        noise = jax.random.gumbel(_key(seed, number), (layers,))
        # The largest of log p + Gumbel noise are a draw without replacement, one after another by p.
        return jax.lax.top_k(jnp.log(given) + noise, active)[1]

    return _layerwise(
        learning_rate,
        choose,
        active=active,
        interval=interval,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        outside=outside,
        mask=mask,
        layout=layout,
        low_rank=(rank, update_every, scale),
    )

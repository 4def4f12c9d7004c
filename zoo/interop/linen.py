"""Any zoo model as a flax.linen.Module, logical partitioning metadata included."""

from typing import Any

import flax.linen as nn
import jax

from zoo.core import params as params_lib
from zoo.core.context import SeqContext
from zoo.core.params import Spec
from zoo.models import Model
from zoo.models.language_model import LanguageModelOutput, LanguageModelState


class Module(nn.Module):
    """A zoo model with Linen's `init` and `apply`.

    The collection "params" holds the model's own nested dict, each leaf in `nn.LogicallyPartitioned` with its Spec's
    axes, so that `nn.get_partition_spec` and `nn.logical_to_mesh_sharding` work; `nn.unbox` gives the plain tree.
    `apply` takes boxed and plain parameters alike. State is an argument and a result, no mutable collection.

    Attributes:
      model: the zoo model.
    """

    model: Model

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        ctx: SeqContext | None = None,
        state: LanguageModelState | None = None,
        *,
        logits: str = "all",
        implementation: str | None = None,
    ) -> LanguageModelOutput:
        """The model on tokens int[B, T]; see `zoo.models.language_model.apply`."""
        specs = self.model.param_specs()
        if self.is_initializing():
            values = self.model.init(self.make_rng("params"))
            params = {name: self.param(name, _boxed, specs[name], values[name]) for name in specs}
        else:  # no check of shapes: a leaf may be an adapter or quantised storage
            params = {name: nn.unbox(self.get_variable("params", name)) for name in specs}
            if missing := [name for name, value in params.items() if value is None]:
                raise ValueError(f"the collection 'params' lacks {', '.join(missing)} of model {self.model.name!r}")
        return self.model.apply(params, tokens, ctx=ctx, state=state, logits=logits, implementation=implementation)


def _boxed(key: jax.Array, specs: Any, values: Any) -> Any:
    del key  # each leaf's key is folded from its path, in Model.init

    def box(spec: Spec, value: jax.Array) -> nn.LogicallyPartitioned:
        return nn.LogicallyPartitioned(value, names=spec.axes)

    return jax.tree.map(box, specs, values, is_leaf=params_lib.is_spec)


def as_module(model: Model) -> Module:
    """Hands a zoo model over as a Linen module.

    Args:
      model: from `zoo.create`.

    Returns:
      A module: `module.init(key, tokens)` gives {"params": ...}, with the values of `model.init` for the key that
      Linen derives; `module.apply({"params": params}, tokens)` equals `model.apply(params, tokens)`.
    """
    return Module(model)

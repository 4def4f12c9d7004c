"""Any zoo model as a flax.nnx.Module, sharding metadata included."""

from typing import Any

import jax
from flax import nnx

from zoo.core.context import SeqContext
from zoo.core.params import Spec, Tree, is_spec
from zoo.models import Model
from zoo.models.language_model import LanguageModelOutput, LanguageModelState


class Module(nnx.Module):
    """A zoo model whose parameters are `nnx.Param`s at the model's own paths, under `params`.

    Each Param carries its Spec's axes as `out_sharding` (logical names), so that `nnx.get_partition_spec` works, under
    `flax.core.spmd.logical_axis_rules` with mesh axes. Decoding state is an argument and a result of the call.

    Attributes:
      model: the zoo model.
      params: nested nnx.Dict of nnx.Param.
    """

    def __init__(self, model: Model, params: Tree):
        self.model = model
        self.params = _wrap(model.param_specs(), params)

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
        return self.model.apply(self.tree(), tokens, ctx=ctx, state=state, logits=logits, implementation=implementation)

    def tree(self) -> Tree:
        """The parameters as the model's plain nested dict of arrays."""
        return _unwrap(self.params)


def _wrap(specs: Tree, params: Tree) -> Any:
    if is_spec(specs):
        spec: Spec = specs
        # Axes are logical names: the arrays stay where they are, placing them is the caller's decision.
        return nnx.Param(params, out_sharding=spec.axes, eager_sharding=False)
    return nnx.Dict({name: _wrap(child, params[name]) for name, child in specs.items()})


def _unwrap(node: Any) -> Tree:
    if isinstance(node, nnx.Variable):
        return node.get_value()
    return {name: _unwrap(child) for name, child in node.items()}


def as_module(model: Model, key: jax.Array | nnx.Rngs) -> Module:
    """Hands a zoo model over as an NNX module with fresh parameters.

    Args:
      model: from `zoo.create`.
      key: a jax.random key, or nnx.Rngs whose "params" stream gives one. With a key the parameters are bitwise
        `model.init(key)`. For parameters that exist already use `Module(model, params)`.

    Returns:
      The module; `module(tokens)` equals `model.apply(module.tree(), tokens)`.
    """
    return Module(model, model.init(key.params() if isinstance(key, nnx.Rngs) else key))

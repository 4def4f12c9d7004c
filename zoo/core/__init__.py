"""Parameters, weights, sequence context, sharding and registries."""

from zoo.core.context import SeqContext
from zoo.core.linear import Weight, linear, materialise
from zoo.core.params import Spec
from zoo.core.registry import Registry

__all__ = ["Registry", "SeqContext", "Spec", "Weight", "linear", "materialise"]

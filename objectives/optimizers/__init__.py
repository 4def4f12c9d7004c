"""Optimisers, schedules and rules of scaling: optax's by name, and those that optax lacks.

`create(name, learning_rate, **options)` builds any of them; `python -m objectives.catalog` lists all.
"""

from objectives.optimizers import (
    block_coordinate,
    clippy,
    d_adaptation,
    from_optax,
    galore,
    layout,
    psgd,
    psgd_low_rank,
    scaling,
    sgd_sai,
    shampoo,
    welore,
)
from objectives.optimizers.layout import Layout
from objectives.optimizers.registry import (
    OPTIMIZERS,
    Entry,
    bytes_per_parameter,
    create,
    list_optimizers,
    register,
    state_bytes,
)
from objectives.optimizers.schedules import SCHEDULES
from objectives.optimizers.token_count import scale_by_token_count

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Entry",
    "Layout",
    "block_coordinate",
    "bytes_per_parameter",
    "clippy",
    "create",
    "d_adaptation",
    "from_optax",
    "galore",
    "layout",
    "list_optimizers",
    "psgd",
    "psgd_low_rank",
    "register",
    "scale_by_token_count",
    "scaling",
    "sgd_sai",
    "shampoo",
    "state_bytes",
    "welore",
]

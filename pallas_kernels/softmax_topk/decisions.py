"""What logits decide in the TPU kernel: its rule, run in NumPy, for `static_profile`.

Which groups of rows a block is searched for, how many rounds follow, and whether a search follows these: in the order
in which the kernel's schedule asks.
"""

import itertools
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from pallas_kernels.softmax_topk import keys, mosaic_tpu

LANES = mosaic_tpu.LANES
SEARCHED = mosaic_tpu._SEARCHED


def of_normal_logits(shape) -> Iterable[bool] | None:
    """The decisions for normally distributed logits at an entry of the shapes; None for a few rows or columns.

    Rows meet in blocks of 128 alone, so blocks of rows of one distribution decide alike: those of one come again and
    again, without end, as cores that share the rows ask for fewer.
    """
    if shape.rows % LANES or shape.columns < 4 * LANES:
        return None
    dtype = jnp.dtype(shape.dtype)
    sizes = mosaic_tpu.block_sizes(shape.rows, shape.columns, dtype.itemsize)
    logits = np.random.default_rng(0).standard_normal((LANES, shape.columns), np.float32).astype(dtype)
    rule = decide_of_keys if keys.serves(*sizes, dtype, mosaic_tpu.UNROLL) else decide
    decided, _ = rule(logits.astype(np.float32), shape.k, sizes[1])
    return itertools.cycle(itertools.chain(*decided))


DECISIONS = {"forward": of_normal_logits}


def decide(logits, k, block_columns):
    """The rule for 128 rows of finite logits: per block what it decides, and the columns of the k best.

    Of the entries that may enter, a lane gave `given` away and has two more, and the value of a third, than it had
    given when the block was last searched (`known`).
    """
    decided = []
    values, kept = np.full((LANES, k), -np.inf, np.float32), np.zeros((LANES, k), np.int64)
    for start in range(0, logits.shape[1], block_columns):
        block = logits[:, start : start + block_columns]
        least = values[:, -1] if start else np.partition(block, -k, axis=1)[:, -k]
        entries, columns = _lanes_of_best(block, least, start)
        given, known = (np.zeros((LANES, LANES), np.int64) for _ in range(2))
        found = [] if start else [False]  # whether a lane of the first block has no third entry above -inf
        searched = np.zeros(LANES // SEARCHED, bool)
        while True:
            rounds, entered = 0, True
            while entered or rounds % mosaic_tpu._ROUNDS:
                value, column = (np.take_along_axis(a, given[..., None], 2)[..., 0] for a in (entries, columns))
                value = np.where(given - known < 2, value, -np.inf)
                best = value.max(1)
                first = np.where(value == best[:, None], column, mosaic_tpu._NO_COLUMN).min(1)
                enters = _before(best, first, values[:, -1], kept[:, -1])
                given += enters[:, None] & (column == first[:, None])
                values, kept = _insert(values, kept, np.where(enters, best, -np.inf), first)
                rounds, entered = rounds + 1, enters.any()
            bound = np.take_along_axis(entries, known[..., None] + 2, 2)[..., 0]
            behind = _before(values[:, -1:], np.where(kept[:, -1:] < start, 0, mosaic_tpu._NO_COLUMN), bound, 1)
            waits = ((given - known == 2) & ~behind).any(1)
            again = [True] * (rounds // mosaic_tpu._ROUNDS - 1) + [False]
            found += [*searched, *again, waits.any(), waits.any()]
            if not waits.any():
                break
            searched = waits.reshape(-1, SEARCHED).any(1)
            known = np.where(np.repeat(searched, SEARCHED)[:, None], given, known)
        decided.append(found)
    return decided, kept


def decide_of_keys(logits, k, block_columns):
    """As `decide`, for 128 rows of bfloat16 numbers of usual size, which have keys."""
    decided = []
    values, kept = np.full((LANES, k), -np.inf, np.float32), np.full((LANES, k), mosaic_tpu._NO_COLUMN)
    for start in range(0, logits.shape[1], block_columns):
        entries, columns = _lanes_of_best(logits[:, start : start + block_columns], values[:, -1], start)
        found = [True, True, False, True, False][not start :]
        searched = np.ones(LANES, bool)
        for given in range(0, entries.shape[2], 2):
            new = (a[..., given : given + 2].reshape(LANES, -1) for a in (entries, columns))
            values, kept = _best(values, kept, *new, rows=searched)
            bound = entries[..., given + 2].max(1) if given + 2 < entries.shape[2] else np.full(LANES, -np.inf)
            behind = _before(values[:, -1], np.where(kept[:, -1] < start, 0, mosaic_tpu._NO_COLUMN), bound, 1)
            waits = searched & ~behind & (bound > -np.inf)
            groups = waits.reshape(-1, keys.SEARCHED).any(1)
            found += _asked(groups)
            if not groups.any():
                break
            searched = np.repeat(groups, keys.SEARCHED)
        decided.append([*found, False])  # whether the general kernel takes the block
    return decided, kept


def _asked(groups):
    """What the schedule asks when the groups that wait are known."""
    waits = bool(groups.any())
    return [waits, *(itertools.chain(*((g, not g) for g in groups)) if waits else ()), waits]


def _best(values, kept, new_values, new_kept, rows):
    """The lists with the entries of some rows."""
    k = values.shape[1]
    values = np.column_stack([values, np.where(rows[:, None], new_values, -np.inf)])
    kept = np.column_stack([kept, new_kept])
    order = np.lexsort((kept, -values), axis=1)[:, :k]
    return np.take_along_axis(values, order, 1), np.take_along_axis(kept, order, 1)


def _before(value, column, other_value, other_column):
    return (value > other_value) | ((value == other_value) & (column < other_column))


def _lanes_of_best(block, least, start):
    """(value, column) of the entries from `least` on, best first: [rows, lanes, depth], -inf behind the last."""
    rows, columns = np.nonzero(block >= least[:, None])
    values = block[rows, columns]
    order = np.lexsort((columns, -values, columns % LANES, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    lane = rows * LANES + columns % LANES
    depth = np.arange(len(lane)) - np.searchsorted(lane, lane)
    shape = (LANES * LANES, depth.max(initial=0) + 3)
    entries, where = np.full(shape, -np.inf, np.float32), np.full(shape, mosaic_tpu._NO_COLUMN)
    entries[lane, depth], where[lane, depth] = values, start + columns
    return (a.reshape(LANES, LANES, -1) for a in (entries, where))


def _insert(values, columns, value, column):
    """The sorted lists with one more entry."""
    values, columns = np.column_stack([values, value]), np.column_stack([columns, column])
    order = np.lexsort((columns, -values), axis=1)[:, :-1]
    return tuple(np.take_along_axis(a, order, 1) for a in (values, columns))

"""The loop over chunks, and what its turns are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunks import over_chunks


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [3, 4, 7, 8, 14])
def test_turns_are_given_what_was_loaded_for_them(length, reverse):
    table = np.random.default_rng(length).integers(100, size=-(-length // 4))

    def body(index, start, size, carry, loaded):
        turn, rows = carry
        return turn + 1, rows.at[index].set(jnp.stack([jnp.asarray(x) for x in (turn, start, size, loaded)]))

    @jax.jit
    def run(table):
        carry = jnp.asarray(0), jnp.full((len(table), 4), -1)
        return over_chunks(length, 4, body, carry, load=lambda index: table[index], reverse=reverse)

    turns, rows = run(table)
    order = np.arange(len(table))[:: -1 if reverse else 1]
    starts = 4 * np.arange(len(table))
    assert turns == len(table)
    np.testing.assert_array_equal(rows, np.stack([order, starts, np.minimum(4, length - starts), table], axis=1))

"""SeqContext: derived fields against hand-written rows and against a token-by-token loop."""

import jax.numpy as jnp
import numpy as np
import pytest

from zoo.core.context import SeqContext, last_valid, next_positions


def loop(positions, segments):
    """(reset, documents) of one row, one token after the other."""
    reset, documents, count, previous, seen = [], [], 0, 0, False
    for position, segment in zip(positions, segments, strict=True):
        if segment == 0:
            reset.append(False)
            documents.append(-1)
        else:
            new = position == 0 or (seen and segment != previous)
            count += new
            reset.append(bool(new))
            documents.append(count)
            seen = True
        previous = segment
    return reset, documents


def test_without_segments_everything_is_one_document_that_continues():
    ctx = SeqContext.contiguous(jnp.array([0, 4]), 3)
    np.testing.assert_array_equal(ctx.positions, [[0, 1, 2], [4, 5, 6]])
    assert ctx.segment_ids is None
    assert ctx.valid is None
    assert ctx.reset is None
    assert ctx.documents is None


@pytest.mark.parametrize(
    ("segments", "positions", "reset", "documents"),
    [
        # continues at position 4, then a new document
        ([1, 1, 2, 2], [4, 5, 0, 1], [0, 0, 1, 0], [0, 0, 1, 1]),
        # position 0 starts afresh, although it is the first document of the row
        ([1, 1, 2, 2], [0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 2, 2]),
        # padding on the left does not make the first document a new one
        ([0, 0, 3, 3], [0, 0, 7, 8], [0, 0, 0, 0], [-1, -1, 0, 0]),
        # padding between documents, and the same id again after it: another document
        ([1, 1, 0, 1, 1], [2, 3, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, -1, 1, 1]),
        # position 0 inside a run of one id starts a document too
        ([1, 1, 1, 1], [5, 6, 0, 1], [0, 0, 1, 0], [0, 0, 1, 1]),
        # a row of padding
        ([0, 0, 0], [0, 0, 0], [0, 0, 0], [-1, -1, -1]),
        # positions at padding are ignored
        ([0, 1, 0], [0, 3, 0], [0, 0, 0], [-1, 0, -1]),
    ],
)
def test_reset_and_documents_by_hand(segments, positions, reset, documents):
    ctx = SeqContext(jnp.array([positions]), jnp.array([segments]))
    np.testing.assert_array_equal(ctx.reset[0], np.array(reset, bool))
    np.testing.assert_array_equal(ctx.documents[0], documents)
    np.testing.assert_array_equal(ctx.valid[0], np.array(segments) != 0)
    assert ctx.documents.dtype == jnp.int32


def test_reset_and_documents_of_random_rows():
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 5, (64, 11)), axis=1) * (rng.random((64, 11)) < 0.7)
    start = rng.integers(0, 3, 64)
    ctx = SeqContext.from_segment_ids(jnp.asarray(segments), jnp.asarray(start))
    for row in range(64):
        reset, documents = loop(np.asarray(ctx.positions[row]), segments[row])
        np.testing.assert_array_equal(ctx.reset[row], reset)
        np.testing.assert_array_equal(ctx.documents[row], documents)


def test_from_segment_ids_counts_positions_inside_documents():
    ctx = SeqContext.from_segment_ids(jnp.array([[0, 2, 2, 0, 2, 3, 3], [1, 1, 2, 2, 2, 0, 0]]), jnp.array([5, 0]))
    np.testing.assert_array_equal(ctx.positions, [[0, 5, 6, 0, 0, 0, 1], [0, 1, 0, 1, 2, 0, 0]])
    with pytest.raises(ValueError, match=r"\[batch, time\]"):
        SeqContext.from_segment_ids(jnp.array([1, 1]))


def test_from_lengths_pads_on_the_right():
    ctx = SeqContext.from_lengths([2, 0, 3], 3, start=jnp.array([4, 9, 0]))
    np.testing.assert_array_equal(ctx.segment_ids, [[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(ctx.positions, [[4, 5, 0], [0, 0, 0], [0, 1, 2]])
    np.testing.assert_array_equal(last_valid(ctx), [1, -1, 2])
    np.testing.assert_array_equal(next_positions(ctx, jnp.array([4, 9, 0])), [6, 9, 3])


def test_last_valid_and_next_positions_without_segments():
    ctx = SeqContext.contiguous(jnp.array([0, 4]), 3)
    np.testing.assert_array_equal(last_valid(ctx), [2, 2])
    np.testing.assert_array_equal(next_positions(ctx, jnp.array([0, 4])), [3, 7])

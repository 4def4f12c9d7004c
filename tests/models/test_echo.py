"""Echo embeddings against a loop over documents: every layout of packing and padding, and what is refused."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.trees import fast_jit, redraw
from zoo.models import echo_embedding
from zoo.models.echo import echo_hidden, pool_documents

TOLERANCE = 1e-5  # float32, a few layers
WIDTH = 3
LAYOUT = [  # segment ids
    [0, 0, 7, 7, 0, 7, 3, 3, 0],
    [1, 2, 3, 3, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0, 4],
    [0] * 9,
    [1, 1, 2, 2, 2, 0, 0, 0, 0],
    [5] * 9,
]


def context():
    """Of LAYOUT, where the documents of the last row but one have equal ids: a position 0 tells them apart, and the
    first of them is the rest of one."""
    ctx = zoo.SeqContext.from_segment_ids(jnp.array(LAYOUT))
    positions = ctx.positions.at[4, :2].set(jnp.array([6, 7]))
    return zoo.SeqContext(positions, ctx.segment_ids.at[4, 2:5].set(1))


def documents_of(row):
    """(first index, end) of the runs of equal, non-zero ids."""
    found, index = [], 0
    for segment, run in itertools.groupby(row):
        start, index = index, index + len(list(run))
        if segment:
            found.append((start, index))
    return found


class Running:
    """A causal stand-in: the running sum of f(token) in a document, times the position, NaN at padding."""

    def apply(self, params, tokens, *, ctx=None, logits, implementation):
        segments = np.ones(tokens.shape, int) if ctx is None else np.asarray(ctx.segment_ids)
        hidden = np.full((*tokens.shape, WIDTH), np.nan)
        for b, row in enumerate(segments):
            for start, end in documents_of(row):
                hidden[b, start:end] = self.document(params, np.asarray(tokens)[b, start:end])
                if ctx is not None:
                    np.testing.assert_array_equal(ctx.positions[b, start:end], np.arange(end - start))
        assert logits == "none", "the head is not read"
        return types.SimpleNamespace(aux={"hidden": jnp.asarray(hidden, jnp.float32)})

    @staticmethod
    def document(params, tokens):
        return np.cumsum(params[tokens], axis=0) * np.sqrt(1 + np.arange(len(tokens)))[:, None]


def expected_of(params, tokens, segments, embed):
    """Per document in order: the rows of its second copy."""
    return [
        [(a, b, embed(params, np.concatenate([row[a:b], row[a:b]]))[b - a :]) for a, b in documents_of(ids)]
        for row, ids in zip(np.asarray(tokens), segments, strict=True)
    ]


def test_every_document_is_read_twice():
    rng = np.random.default_rng(0)
    params, tokens = rng.standard_normal((11, WIDTH)), jnp.asarray(rng.integers(0, 11, np.shape(LAYOUT)))
    ctx, most = context(), 4
    want_hidden = np.zeros((*tokens.shape, WIDTH))
    want = {pool: np.zeros((len(LAYOUT), most, WIDTH)) for pool in ("mean", "last")}
    for b, documents in enumerate(expected_of(params, tokens, LAYOUT, Running.document)):
        for number, (start, end, rows) in enumerate(documents):
            want_hidden[b, start:end] = rows
            want["mean"][b, number], want["last"][b, number] = rows.mean(0), rows[-1]
    hidden = echo_hidden(Running(), params, tokens, ctx=ctx)
    np.testing.assert_allclose(hidden, want_hidden, TOLERANCE, TOLERANCE)
    for pool, expected in want.items():
        pooled = echo_embedding(Running(), params, tokens, ctx=ctx, pool=pool, documents=most)
        np.testing.assert_allclose(pooled, expected, TOLERANCE, TOLERANCE)
        plain = echo_embedding(Running(), params, tokens[-1:], pool=pool)  # one document fills the last row
        np.testing.assert_allclose(plain, expected[-1:, :1], TOLERANCE, TOLERANCE)


def test_pooling_and_its_gradients_do_not_meet_padding():
    """The weight of every token in its document's vector, with padding that is NaN."""
    ctx, weights = context(), {pool: np.zeros(np.shape(LAYOUT)) for pool in ("mean", "last")}
    for b, row in enumerate(LAYOUT):
        for start, end in documents_of(row):
            weights["mean"][b, start:end], weights["last"][b, end - 1] = 1 / (end - start), 1
    hidden = jnp.where(ctx.valid[..., None], jnp.ones(WIDTH), jnp.nan)
    for pool, want in weights.items():
        gradient = jax.grad(lambda h, pool=pool: pool_documents(h, ctx, pool=pool, documents=4).sum())(hidden)
        np.testing.assert_allclose(gradient, np.repeat(want[..., None], WIDTH, 2), TOLERANCE)
    others = jnp.where(weights["last"][..., None] > 0, hidden, jnp.nan)  # what is not read may hold anything, too
    assert jnp.isfinite(pool_documents(others, ctx, pool="last", documents=4)).all()


def test_hybridna_reads_packed_rows_as_single_documents():
    """Its three kinds of layers; tokens at padding are outside the vocabulary."""
    model = zoo.create("hybridna-tiny", vocab_size=12, pattern="mamba2 mlp attention mlp")
    params = redraw(model.param_specs(), seed=1)
    segments = [[0, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2], [3, 3, 3, 3, 3, 0, 0, 0, 0, 0, 0, 0]]
    tokens = np.random.default_rng(2).integers(7, 12, np.shape(segments))
    tokens[np.array(segments) == 0] = 99
    ctx = zoo.SeqContext.from_segment_ids(jnp.array(segments))
    packed = fast_jit(lambda p, t: echo_embedding(model, p, t, ctx=ctx, documents=2))(params, jnp.asarray(tokens))
    hidden = fast_jit(lambda p, t: model.apply(p, t, logits="none").aux["hidden"])
    embed = lambda p, t: np.asarray(hidden(p, jnp.asarray(t)[None])[0])  # noqa: E731
    for b, documents in enumerate(expected_of(params, tokens, segments, embed)):
        for number, (*_, rows) in enumerate(documents):
            np.testing.assert_allclose(packed[b, number], rows.mean(0), TOLERANCE, TOLERANCE)
    np.testing.assert_array_equal(packed[1, 1], 0)


def test_errors_at_the_door():
    model, ctx = Running(), context()
    tokens, hidden = jnp.zeros(ctx.positions.shape, jnp.int32), jnp.zeros((*ctx.positions.shape, WIDTH))
    for call, message in (
        (lambda: echo_embedding(model, {}, tokens, pool="men"), "pool='men' is not supported"),
        (lambda: echo_hidden(model, {}, jnp.zeros((1, 3))), r"must be integers \[batch, time\], got float32"),
        (lambda: echo_hidden(model, {}, tokens[:, :2], ctx=ctx), r"ctx is for \(6, 9\), tokens are \(6, 2\)"),
        (lambda: pool_documents(hidden[:, :2], ctx), r"ctx is for \(6, 9\), hidden is \(6, 2, 3\)"),
        (lambda: pool_documents(hidden, ctx, documents=0), "documents must be >= 1, got 0"),
        (lambda: pool_documents(hidden, ctx, documents=2), "documents=2, but row 0 holds 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    inside = jax.jit(lambda h, ctx: pool_documents(h, ctx, documents=2))(hidden, ctx)
    assert jnp.isnan(inside[:2]).all(), "inside jit, where there are no errors"
    assert (inside[2:] == 0).all()

"""Echo embeddings (arXiv:2402.15449; of DNA, arXiv:2502.10807): a causal model reads every document twice.

Tokens of the first copy see what precedes them, those of the second copy the whole document:
h = hidden([x_1 ... x_n x_1 ... x_n]); token i has the embedding h_{n+i}, the document their mean, or the last one.
"""

import jax
import jax.core
import jax.numpy as jnp

from zoo.core.context import SeqContext
from zoo.core.params import Tree
from zoo.core.registry import check_choice
from zoo.models.model import Model

POOLS = ("mean", "last")


def _documents(ctx: SeqContext) -> tuple[jax.Array, jax.Array, jax.Array]:
    """int32[B, T] of every token: its document's number, from 1, and that document's first index and length.

    Padding has the number 0, and stands for itself: its own index and length 1.
    """
    documents = ctx.documents
    if documents is None:
        shape = ctx.positions.shape
        return jnp.ones(shape, jnp.int32), jnp.zeros(shape, jnp.int32), jnp.full(shape, shape[1], jnp.int32)
    index = jnp.broadcast_to(jnp.arange(documents.shape[1], dtype=jnp.int32), documents.shape)
    valid = documents >= 0
    differs = documents[:, 1:] != documents[:, :-1]
    is_first = valid & jnp.pad(differs, ((0, 0), (1, 0)), constant_values=True)
    is_last = valid & jnp.pad(differs, ((0, 0), (0, 1)), constant_values=True)
    number = jnp.where(valid, jnp.cumsum(is_first, axis=1, dtype=jnp.int32), 0)
    start = jnp.where(valid, jax.lax.cummax(jnp.where(is_first, index, 0), axis=1), index)
    last = jax.lax.cummin(jnp.where(is_last, index, documents.shape[1]), axis=1, reverse=True)
    return number, start, jnp.where(valid, last - start + 1, 1)


def echo_hidden(
    model: Model, params: Tree, tokens: jax.Array, *, ctx: SeqContext | None = None, implementation: str | None = None
) -> jax.Array:
    """Hidden states of the second copy of every document, at the place of the tokens.

    Args:
      model: a causal language model.
      params: its parameters.
      tokens: int[B, T], T >= 1. The model runs on [B, 2 T].
      ctx: documents and padding, anywhere; None = each row is one document. What is here of a document is read as a
        whole one: positions are counted anew, and no state is carried.
      implementation: of every op inside; None = the platform's.

    Returns:
      [B, T, D] after the final norm, in the compute dtype; 0 at padding.

    Raises:
      ValueError: tokens are not int[B, T], or ctx is of another shape.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [batch, time], got {tokens.dtype}{list(tokens.shape)}")
    if ctx is not None and ctx.positions.shape != tokens.shape:
        raise ValueError(f"ctx is for {ctx.positions.shape}, tokens are {tokens.shape}")
    length = tokens.shape[1]
    if ctx is None or ctx.segment_ids is None:
        twice = jnp.concatenate([tokens, tokens], axis=1)
        return model.apply(params, twice, logits="none", implementation=implementation).aux["hidden"][:, length:]

    # A document at s ... s + n - 1 gets the place 2 s ... 2 (s + n) - 1: rows keep their order and their padding.
    number, start, size = _documents(ctx)
    index = jnp.arange(2 * length, dtype=jnp.int32)
    first, n = (jnp.repeat(part, 2, axis=1) for part in (start, size))
    source = first + (index - 2 * first) % n
    echoed = SeqContext.from_segment_ids(jnp.take_along_axis(number, source, axis=1))
    twice = jnp.take_along_axis(tokens, source, axis=1)
    hidden = model.apply(params, twice, ctx=echoed, logits="none", implementation=implementation).aux["hidden"]
    second = start + size + index[:length]
    return jnp.where(number[..., None] > 0, jnp.take_along_axis(hidden, second[..., None], axis=1), 0)


def pool_documents(
    hidden: jax.Array, ctx: SeqContext | None = None, *, pool: str = "mean", documents: int = 1
) -> jax.Array:
    """One vector per document of a row.

    Args:
      hidden: [B, T, D]; padding may hold anything.
      ctx: documents and padding; None = each row is one document.
      pool: "mean" of the document's tokens, or its "last" one.
      documents: N, documents that a row holds at most.

    Returns:
      float32[B, N, D] in the order of the row; 0 where a row has fewer. Inside jit a row with more is NaN.

    Raises:
      ValueError: an unknown pool, documents < 1, ctx of another shape, or (outside jit) a row with more documents.
    """
    check_choice("pool", pool, POOLS)
    if documents < 1:
        raise ValueError(f"documents must be >= 1, got {documents}")
    batch, length, _ = hidden.shape
    ctx = SeqContext.contiguous(jnp.zeros((batch,), jnp.int32), length) if ctx is None else ctx
    if ctx.positions.shape != (batch, length):
        raise ValueError(f"ctx is for {ctx.positions.shape}, hidden is {hidden.shape}")
    number, start, size = _documents(ctx)
    most = number.max(axis=1)
    if not isinstance(most, jax.core.Tracer) and int(most.max()) > documents:
        raise ValueError(f"documents={documents}, but row {int(most.argmax())} holds {int(most.max())}")
    index = jnp.arange(length, dtype=jnp.int32)
    read = number > 0 if pool == "mean" else (number > 0) & (index == start + size - 1)
    share = hidden.astype(jnp.float32) / (size[..., None] if pool == "mean" else 1)
    share = jnp.where(read[..., None], share, 0)
    sums = jax.vmap(lambda rows, to: jax.ops.segment_sum(rows, to, documents + 1))(share, number)[:, 1:]
    return jnp.where((most > documents)[:, None, None], jnp.nan, sums)


def echo_embedding(
    model: Model,
    params: Tree,
    tokens: jax.Array,
    *,
    ctx: SeqContext | None = None,
    pool: str = "mean",
    documents: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """float32[B, documents, D]: `pool_documents` of `echo_hidden`, which see.

    >>> echo_embedding(model, params, tokens, ctx=SeqContext.from_lengths(lengths, tokens.shape[1]))[:, 0]
    """
    check_choice("pool", pool, POOLS)
    hidden = echo_hidden(model, params, tokens, ctx=ctx, implementation=implementation)
    return pool_documents(hidden, ctx, pool=pool, documents=documents)

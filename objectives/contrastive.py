"""Contrastive learning of embeddings."""

import jax
import jax.numpy as jnp

from objectives.checks import check_positive, check_shape
from objectives.output import LossOutput
from objectives.registry import register

LEAST_NORM = 1e-6


def unit_vectors(x: jax.Array) -> jax.Array:
    """float32 x / |x| over the last axis, with a finite gradient at 0, where it is 0."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), LEAST_NORM**2))


@register(
    "info_nce", category="auxiliary", papers=("1807.03748", "2405.20204"), proof="test_contrastive.py::test_is_torch"
)
def info_nce(
    queries: jax.Array,
    keys: jax.Array,
    valid: jax.Array | None = None,
    valid_keys: jax.Array | None = None,
    *,
    temperature: float = 0.05,
    symmetric: bool = False,
    normalise: bool = True,
) -> LossOutput:
    """InfoNCE with the other keys of the batch as negatives (arXiv:1807.03748, equation 4).

      s_bm = q_b . k_m / temperature,   loss = sum_b (logsumexp_m s_bm - s_bb)

    and, where symmetric, half of that and half of the same with queries as negatives of the first B keys
    (arXiv:2405.20204). Float32 inside. A batch is what one call sees: the sums of microbatches are not those of the
    whole. Arrays that a mesh splits over rows are gathered by the partitioner: [M, D] floats.

    Args:
      queries: [B, D].
      keys: [M, D], M >= B: key b belongs to query b, those past B are further negatives of all.
      valid: [B], 0 at pairs that are padding, which may be NaN: neither side takes part. None = all.
      valid_keys: [M - B], likewise of the further keys.
      temperature: above 0. A learned one is a traced value; the authors of CLIP clip it at 0.01 from below.
      symmetric: whether keys look for their queries too.
      normalise: whether to divide embeddings by their norms, of 1e-6 at least.

    Returns:
      LossOutput: weight = number of valid pairs; metrics accuracy (the own key scores above all others) and similarity
      (q_b . k_b).

    Raises:
      ValueError: shapes disagree or an option is out of range.
    """
    if queries.ndim != 2 or keys.ndim != 2 or keys.shape[0] < queries.shape[0] or keys.shape[1] != queries.shape[1]:
        raise ValueError(f"queries must be [B, D] and keys [M, D] with M >= B, got {queries.shape} and {keys.shape}")
    check_positive(temperature=temperature)
    batch, further = queries.shape[0], keys.shape[0] - queries.shape[0]
    valid = jnp.ones(batch, bool) if valid is None else valid
    valid_keys = jnp.ones(further, bool) if valid_keys is None else valid_keys
    check_shape((batch,), valid=valid)
    check_shape((further,), valid_keys=valid_keys)
    valid, takes_part = valid != 0, jnp.concatenate([valid != 0, valid_keys != 0])
    queries = jnp.where(valid[:, None], queries.astype(jnp.float32), 0.0)
    keys = jnp.where(takes_part[:, None], keys.astype(jnp.float32), 0.0)
    if normalise:
        queries, keys = unit_vectors(queries), unit_vectors(keys)
    similarity = jnp.einsum("bd,md->bm", queries, keys, precision=jax.lax.Precision.HIGHEST)
    own = jnp.diagonal(similarity)
    # An invalid query has a whole row, so that no sum is empty; it is left out at the end.
    rows = jnp.where(takes_part | ~valid[:, None], similarity / temperature, -jnp.inf)
    loss = jax.nn.logsumexp(rows, axis=1) - own / temperature
    if symmetric:
        columns = jnp.where(valid[:, None] | ~valid, similarity[:, :batch] / temperature, -jnp.inf)
        loss = 0.5 * (loss + jax.nn.logsumexp(columns, axis=0) - own / temperature)
    others = jnp.where(jnp.eye(batch, keys.shape[0], dtype=bool), -jnp.inf, rows)
    metrics = {
        "accuracy": jnp.sum(jnp.where(valid, own / temperature > jnp.max(others, axis=1, initial=-jnp.inf), False)),
        "similarity": jnp.sum(jnp.where(valid, own, 0.0)),
    }
    metrics = {name: jax.lax.stop_gradient(x.astype(jnp.float32)) for name, x in metrics.items()}
    return LossOutput(jnp.sum(jnp.where(valid, loss, 0.0)), jnp.sum(valid, dtype=jnp.float32), metrics)

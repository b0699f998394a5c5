"""Supervised Contrastive Learning (2020, arXiv 2004.11362): every example of an anchor's class is a positive.

What methods with labels in the family stand on and are compared with.

    loss_i = -mean over p in P(i) of [s_ip - log sum_{a != i} exp s_ia],   s = cosine / temperature,
    P(i) = the other examples with the label of i
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.contrastive._pairs import checked_where, own_index, unit_rows
from jaxlab.ops.chunks import map_rows
from jaxlab.ops.collectives import gather_rows
from jaxlab.ops.masked import masked_logsumexp, masked_mean
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed


def supervised_contrastive_loss(
    embeddings: Array,
    labels: Array,
    *,
    temperature: float | Array = 0.1,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Array:
    """Returns the supervised contrastive loss: the log-probability of each positive among all others, averaged.

    Several views of an example are several rows with its label.

    Args:
        embeddings: float [N, D]; need not be normalised, a zero vector has cosine 0 with everything.
        labels: int [N]; -1 = unlabelled: neither anchor nor positive, but a negative of all.
        temperature: t > 0.
        where: bool [N], real rows.
        axis_name: mapped axis over which the rows are spread: positives and negatives come from all shards.
        reduction: "mean" (over all shards) or "none", `[N]`.
        chunk: anchors that are compared at a time, forward and backward, so that memory is linear in N; None = all.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `embeddings`. An anchor
        without a positive is no term; no term gives 0.

    Raises:
        ValueError: shapes do not fit, temperature is not positive, or reduction is unknown.

    Example:
        >>> z = jnp.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> loss = jax.jit(supervised_contrastive_loss)
        >>> float(loss(z, jnp.array([0, 0, 1, 1]))) < float(loss(z, jnp.array([0, 1, 0, 1])))
        True

    Source:
        Khosla et al., arXiv 2004.11362, eq. 2 (the mean outside the logarithm), temperature 0.1; without the factor
        `temperature / base temperature` of the code, which is 1 there unless it is changed.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be [N, D], got {embeddings.shape}")
    keep = checked_where(where, embeddings.shape[0], temperature)
    if labels.shape != keep.shape:
        raise ValueError(f"labels has shape {labels.shape}, expected {keep.shape}, a label for each embedding")
    options = {"temperature": temperature, "axis_name": axis_name, "chunk": chunk}
    terms, some = rows_mixed(_terms)(embeddings, labels, keep, **options)
    return reduce_terms(terms, some, reduction=reduction, axis_name=axis_name, dtype=embeddings.dtype)


def _terms(embeddings, labels, keep, *, temperature, axis_name, chunk):
    unit = unit_rows(embeddings, keep)
    others, exist, classes = (gather_rows(x, axis_name) for x in (unit, keep, labels))

    def block(unit, labels, keep, index):
        logits = jnp.matmul(unit, others.T, precision=jax.lax.Precision.HIGHEST) / temperature
        counted = exist[None, :] & (index[:, None] != jnp.arange(len(others))[None, :])
        positive = counted & (keep & (labels >= 0))[:, None] & (labels[:, None] == classes[None, :])
        return _positive_terms(logits, positive, counted), jnp.any(positive, axis=1)

    return map_rows(block, unit, labels, keep, own_index(len(unit), axis_name), chunk=chunk)


def _positive_terms(logits: Array, positive: Array, counted: Array) -> Array:
    """Returns `-mean over the positives of (logit - log sum over the counted of exp logit)` by row, 0 without any."""
    # A row without a positive is no term; it counts everything, so that its logarithm is finite all the same.
    some = jnp.any(positive, axis=1, keepdims=True)
    log_sum = masked_logsumexp(logits, counted | jnp.logical_not(some))[:, None]
    return masked_mean(log_sum - logits, positive, axis=1)
